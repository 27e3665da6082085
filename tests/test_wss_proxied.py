"""MQTT over WebSocket as it is deployed: behind nginx, which ends TLS and knows nothing of MQTT."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import pytest
from paho_client import Paho
from real_brokers import free_port
from web_servers import javascript, nginx, websocket_mosquitto
from wss_dialogue import client, dialogue

from tesaiot_connect import (
    Anonymous,
    Broker,
    BrokerOptions,
    Client,
    Credentials,
    Duration,
    ListenerSpec,
    Message,
    Peer,
    Principal,
    Size,
    Subscription,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_wss import Wss

BIG = 1024 * 1024


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


class Front:
    """nginx that can be stopped and started: its port stays."""

    def __init__(self, folder: Path, certificates: Certificates, backend: int, **options: Any) -> None:
        self._make = lambda: nginx(folder, backend, certificates.server(), port=self.port, **options)
        self._running = ExitStack()
        self.port = free_port()
        self.url = f"wss://localhost:{self.port}/mqtt"

    def start(self) -> None:
        self._running.enter_context(self._make())

    def stop(self) -> None:
        self._running.close()

    def __enter__(self) -> Front:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Guests:
    """Lets everybody in, and remembers where they came from."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        self.addresses.append(peer.address)
        return await Anonymous().begin(peer, credentials)


@asynccontextmanager
async def broker(port: int, guests: Guests | None = None, **options: Any) -> AsyncIterator[Broker]:
    """Ours, with a plain WebSocket listener."""
    transport = Wss(Url("ws", "127.0.0.1", port, "/mqtt"), **options)
    made = Broker(BrokerOptions(max_packet_size=Size(2 * BIG)))
    spec = ListenerSpec("ws", transport, guests or Anonymous())
    async with asyncio.timeout(90), made.serving([spec]):
        yield made


@pytest.fixture
def front(folder: Path, certificates: Certificates) -> Iterator[tuple[Front, int]]:
    """nginx, and the port it hands connections on to."""
    backend = free_port()
    with Front(folder / "nginx", certificates, backend) as made:
        yield made, backend


def test_clients_reach_our_broker(front: tuple[Front, int], certificates: Certificates) -> None:
    nginx, backend = front
    guests = Guests()

    async def ours() -> None:
        there = {"local_address": "127.0.0.2"}
        writer, subscriber = (client(nginx.url, certificates, transport=there) for _ in range(2))
        async with dialogue("ours", writer, subscriber) as both:
            for qos in (0, 1, 2):
                sent = [Message("ours", b"%d" % number, qos=qos) for number in range(1000)]
                assert [one.payload for one in await both.there_and_back(sent)] == [
                    one.payload for one in sent
                ]
            (message,) = await both.there_and_back([Message("ours", bytes(BIG), qos=1)])
            assert message.payload == bytes(BIG)

    async def mqtt_js() -> None:
        process = await asyncio.create_subprocess_exec(
            *javascript("ws_client.js", "mqtt", "ws"), nginx.url, "5", str(certificates.ca_file),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        line = await process.stdout.readline()
        assert json.loads(line or b"null")["extensions"] == ""
        process.kill()
        await process.wait()

    def with_paho() -> None:
        with Paho(nginx.port, paho.MQTTv311, ca=str(certificates.ca_file), path="/mqtt") as one:
            one.subscribe("paho", 1)
            one.publish("paho", [b"%d" % number for number in range(200)], 1)
            assert [one.payload for one in one.take(200)] == [b"%d" % number for number in range(200)]

    async def main() -> None:
        quick = Duration(0.1)
        async with broker(backend, guests, trusted_proxies=("127.0.0.1/32",), ping_interval=quick):
            await ours()
            assert guests.addresses == ["127.0.0.2:0"] * 2, "nginx says who they are"
            await mqtt_js()
            await asyncio.to_thread(with_paho)

    asyncio.run(main())


def test_nothing_acknowledged_is_lost_when_nginx_restarts(folder: Path, certificates: Certificates) -> None:
    async def main(front: Front) -> None:
        numbers = [b"%d" % number for number in range(3000)]
        writer = client(front.url, certificates, client_id="writer")
        subscriber = client(front.url, certificates, client_id="reader")
        async with dialogue("restart", writer, subscriber) as both:
            publishing = asyncio.create_task(
                writer.publish([Message("restart", number, qos=1) for number in numbers])
            )
            seen: set[bytes] = set()
            while len(seen) < 1000:
                seen |= {message.payload for message in await both.read(1)}
            await asyncio.to_thread(front.stop)
            publishing_more = asyncio.create_task(writer.publish([Message("restart", b"meanwhile", qos=1)]))
            await asyncio.to_thread(front.start)
            await asyncio.gather(publishing, publishing_more)
            while not seen >= {*numbers, b"meanwhile"}:
                seen |= {message.payload for message in await both.read(1)}
            assert (writer.status.connects, subscriber.status.connects) == (2, 2)

    with (
        websocket_mosquitto(folder / "mosquitto", "max_queued_messages 0") as url,
        Front(folder / "nginx", certificates, port_of(url)) as front,
    ):
        asyncio.run(main(front))


@asynccontextmanager
async def idle(one: Client) -> AsyncIterator[Client]:
    """Connected, and connected again whenever it is cut off."""
    async with one, one.subscribe([Subscription("nothing/ever")]) as reader:
        reading = asyncio.create_task(reader.read())
        try:
            await one.connected()
            yield one
        finally:
            reading.cancel()
            await asyncio.wait([reading])


def test_pings_outlast_the_read_timeout(folder: Path, certificates: Certificates) -> None:
    """nginx cuts what is silent for 6 s; MQTT's keepalive is a minute. Pings of either side keep it."""
    none, often = Duration(0.0), Duration(0.3)
    quiet, pinging = free_port(), free_port()

    async def main(to_quiet: str, to_pinging: str) -> None:
        cut: list[Any] = []

        def with_paho() -> Paho:
            one = Paho(port_of(to_pinging), paho.MQTTv5, ca=str(certificates.ca_file), path="/mqtt")
            one.client.on_disconnect = lambda *said: cut.append(said)
            return one

        async with (
            broker(quiet, ping_interval=none),
            broker(pinging, ping_interval=often),
            idle(client(to_quiet, certificates, transport={"ping_interval": often})) as asks,
            idle(client(to_pinging, certificates, transport={"ping_interval": none})) as is_asked,
        ):
            other = await asyncio.to_thread(with_paho)
            async with idle(client(to_quiet, certificates, transport={"ping_interval": none})) as silent:
                while silent.status.connects < 2:  # by then the others would have been cut too
                    await asyncio.sleep(0.02)
            assert (asks.status.connects, is_asked.status.connects, cut) == (1, 1, [])
            await asyncio.to_thread(other.__exit__)

    with (
        Front(folder / "quiet", certificates, quiet, read_timeout="6s") as one,
        Front(folder / "pinging", certificates, pinging, read_timeout="6s") as two,
    ):
        asyncio.run(main(one.url, two.url))


def test_a_broker_that_is_down(front: tuple[Front, int], certificates: Certificates) -> None:
    """nginx answers 502: the client says what that means, and comes in once the broker is there."""
    nginx, backend = front

    async def main() -> None:
        async with asyncio.timeout(60), client(nginx.url, certificates) as one:
            connecting = asyncio.create_task(one.connected())
            while not one.status.last_error:
                await asyncio.wait([connecting], timeout=0.01)
            said = one.status.last_error
            assert "a proxy reached no broker behind it (502 Bad Gateway)" in said
            assert "check that the broker runs" in said
            assert nginx.url in said
            async with broker(backend):
                await connecting
                await one.publish([Message("t", b"there it is", qos=1)])
                assert one.status.connects == 1

    asyncio.run(main())
