"""The broker over a transport with several streams: what belongs to a stream stays on it."""

from __future__ import annotations

import asyncio

from stream_bundle import Bundle, OneBundle

from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import Acknowledged, Event, Received, Send, Suback
from tesaiot_connect.mqtt.packets import Connect, Subscription
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.protocols import ByteStream
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec


class Dialler:
    """The client's end: an engine and the streams it opened, by number."""

    def __init__(self, bundle: Bundle, expiry: int = 0) -> None:
        self._bundle = bundle
        connect = Connect(client_id="c", keepalive=0, properties={P.SESSION_EXPIRY: expiry})
        self.engine = ClientEngine(connect, Session(), now=0.0)
        self.streams: dict[int, ByteStream] = {}
        self.got: dict[int, list[Message]] = {}
        self.acknowledged: list[tuple[int, int]] = []
        self.codes: list[int] = []

    async def open(self, number: int) -> None:
        self.streams[number] = await self._bundle.dial()
        self.got[number] = []
        if number:
            self.engine.stream_opened(number, now=0.0)
        await self.flush()

    async def flush(self) -> None:
        for output in self.engine.outputs():
            if isinstance(output, Send):
                await self.streams[output.stream].send(output.data)

    async def read(self, number: int) -> None:
        async with asyncio.timeout(20):
            data = await self.streams[number].receive()
        assert data, f"stream {number} ended"
        for event in self.engine.receive_data(data, stream=number, now=0.0):
            self._take(event)
        await self.flush()

    def _take(self, event: Event) -> None:
        if isinstance(event, Received):
            self.got[event.stream] += event.messages
            if event.token:
                self.engine.settle(event.token)
        elif isinstance(event, Acknowledged):
            self.acknowledged += [(event.stream, key) for key in event.keys]
        elif isinstance(event, Suback):
            self.codes += event.codes

    async def subscribe(self, number: int, topic_filter: str) -> list[int]:
        self.engine.subscribe([Subscription(topic_filter, 2)], stream=number)
        await self.flush()
        while not self.codes:
            await self.read(number)
        codes, self.codes = self.codes, []
        return codes


def test_streams_have_acknowledgements_subscriptions_and_windows_of_their_own() -> None:
    async def main() -> None:
        listener = OneBundle()
        broker = Broker(BrokerOptions())
        async with asyncio.timeout(60), broker.serving([ListenerSpec("bundle", listener)]):
            client = Dialler(listener.bundle)
            await client.open(0)
            while not client.engine.connected:
                await client.read(0)
            await client.open(1)
            await client.open(2)
            for number in (0, 1, 2):
                assert await client.subscribe(number, "same") == [2]
            assert await client.subscribe(2, "second") == [2]
            # QoS 2 and 1 on all streams at once: packet identifiers are the same on each
            for number in (0, 1, 2):
                messages = [Message("nobody", b"", 1 + key % 2) for key in range(10)]
                assert client.engine.publish(messages, list(range(10)), stream=number) == 10
            await client.flush()
            for number in (0, 1, 2):
                while sum(stream == number for stream, _ in client.acknowledged) < 10:
                    await client.read(number)
            await broker.publish([Message("same", b"1", 1), Message("second", b"2", 2)])
            for number in (0, 1, 2):
                while not any(message.topic == "same" for message in client.got[number]):
                    await client.read(number)
            while len(client.got[2]) < 2:
                await client.read(2)
            assert {message.topic for message in client.got[2]} == {"same", "second"}
            # a stream that ends takes its subscriptions with it, and nothing else
            assert broker.stats.subscriptions == 4
            await client.streams[2].aclose()
            while broker.stats.subscriptions != 2:
                await asyncio.sleep(0.001)
            await broker.publish([Message("same", b"3", 1)])
            for number in (0, 1):
                while client.got[number][-1].payload != b"3":
                    await client.read(number)
            assert broker.stats.clients == 1
            while broker.stats.queued_bytes:
                await asyncio.sleep(0.001)

    asyncio.run(main())


def test_the_end_of_the_control_stream_is_the_end() -> None:
    async def main() -> None:
        listener = OneBundle()
        broker = Broker(BrokerOptions())
        async with asyncio.timeout(60), broker.serving([ListenerSpec("bundle", listener)]):
            client = Dialler(listener.bundle, expiry=100)
            await client.open(0)
            while not client.engine.connected:
                await client.read(0)
            await client.open(1)
            await client.subscribe(0, "kept")
            await client.subscribe(1, "gone")
            await client.streams[0].aclose()
            while broker.stats.connections:
                await asyncio.sleep(0.001)
            stats = broker.stats
            assert (stats.sessions, stats.clients, stats.subscriptions) == (1, 0, 1)

    asyncio.run(main())
