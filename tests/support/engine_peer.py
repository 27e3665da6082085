"""A client for tests that does only what it is told: the client engine over any transport.

It never reconnects, and acknowledges nothing on its own when `settle` is false.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tesaiot_connect.errors import Disconnected
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import (
    Acknowledged,
    AuthChallenge,
    Closed,
    Connected,
    Event,
    Received,
    Send,
    Suback,
)
from tesaiot_connect.mqtt.packets import Connack, Connect, Subscription, Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.protocols import Connection, Transport

E = TypeVar("E", bound=Event)
_PATIENCE = 20.0


class EnginePeer:
    """One connection. `await EnginePeer.open(transport, "id", ...)`; then say and read things."""

    def __init__(self, connection: Connection, engine: ClientEngine, *, settle: bool) -> None:
        self.connection = connection
        self.engine = engine
        self.settle = settle
        self.events: list[Event] = []
        self.messages: list[Message] = []
        self.tokens: list[int] = []
        self.acknowledged: list[int] = []
        self.refused: dict[int, int] = {}
        self._next_key = 1

    @classmethod
    async def open(
        cls,
        transport: Transport,
        client_id: str = "",
        *,
        clean: bool = True,
        expiry: int = 0,
        version: int = 5,
        keepalive: int = 0,
        will: Will | None = None,
        session: Session | None = None,
        settle: bool = True,
        properties: dict[P, Any] | None = None,
        username: str | None = None,
        password: bytes | None = None,
        send: bool = True,
    ) -> EnginePeer:
        found = dict(properties or {})
        if version == 5 and expiry:
            found[P.SESSION_EXPIRY] = expiry
        connect = Connect(
            client_id=client_id,
            version=version,
            clean_start=clean,
            keepalive=keepalive,
            will=will,
            username=username,
            password=password,
            properties=found,
        )
        now = asyncio.get_running_loop().time()
        engine = ClientEngine(connect, session or Session(), now=now)
        peer = cls(await transport.connect(), engine, settle=settle)
        try:
            peer.stream = await peer.connection.open_stream()
            if send:
                await peer.flush()
        except BaseException:
            peer.connection.abort()
            raise
        return peer

    async def flush(self) -> None:
        for output in self.engine.outputs():
            if isinstance(output, Send):
                await self.stream.send(output.data)

    async def read(self) -> None:
        """What comes next, at least a byte or the end."""
        now = asyncio.get_running_loop().time()
        async with asyncio.timeout(_PATIENCE):
            try:
                data = await self.stream.receive()
            except Disconnected:
                events = self.engine.stream_reset(0, now=now)
            else:
                events = (
                    self.engine.receive_data(data, now=now) if data else self.engine.stream_eof(0, now=now)
                )
        self.events += events
        for event in events:
            if isinstance(event, Received):
                self.messages += event.messages
                if event.token and self.settle:
                    self.engine.settle(event.token)
                elif event.token:
                    self.tokens.append(event.token)
            elif isinstance(event, Acknowledged):
                self.acknowledged += event.keys
                self.refused.update(event.refused)
        try:
            await self.flush()
        except Disconnected:
            pass

    async def until(self, done: Callable[[], object]) -> None:
        async with asyncio.timeout(_PATIENCE):
            while not done():
                if any(isinstance(event, Closed) for event in self.events):
                    raise AssertionError(f"the connection ended: {self.events}")
                await self.read()

    async def wait_for(self, kind: type[E]) -> E:
        """The next event of a kind; it is taken out of `events`."""
        async with asyncio.timeout(_PATIENCE):
            while True:
                for event in self.events:
                    if isinstance(event, kind):
                        self.events.remove(event)
                        return event
                await self.read()

    async def connack(self) -> Connack:
        return (await self.wait_for(Connected)).connack

    async def closed(self) -> Closed:
        return await self.wait_for(Closed)

    async def challenge(self) -> AuthChallenge:
        return await self.wait_for(AuthChallenge)

    async def subscribe(
        self, *filters: str, qos: int = 2, identifier: int = 0, **options: Any
    ) -> Sequence[int]:
        """The reason codes."""
        properties = {P.SUBSCRIPTION_ID: [identifier]} if identifier else {}
        subscriptions = [Subscription(topic_filter, qos, **options) for topic_filter in filters]
        self.engine.subscribe(subscriptions, properties=properties)
        await self.flush()
        return (await self.wait_for(Suback)).codes

    async def unsubscribe(self, *filters: str) -> Sequence[int]:
        self.engine.unsubscribe(list(filters))
        await self.flush()
        return (await self.wait_for(Suback)).codes

    async def send(self, *messages: Message) -> list[int]:
        """The keys of the messages. Returns when all are written, as the window allows."""
        keys = list(range(self._next_key, self._next_key + len(messages)))
        self._next_key += len(messages)
        taken = self.engine.publish(messages, keys)
        await self.flush()
        while taken < len(messages):
            await self.read()
            taken += self.engine.publish(messages[taken:], keys[taken:])
            await self.flush()
        return keys

    async def publish(self, *messages: Message) -> None:
        """Returns when the broker has acknowledged all that are to be."""
        keys = await self.send(*messages)
        due = {key for key, message in zip(keys, messages, strict=True) if message.qos}
        await self.until(lambda: due <= {*self.acknowledged, *self.refused})

    async def received(self, count: int) -> list[Message]:
        """The first so many messages, taken."""
        await self.until(lambda: len(self.messages) >= count)
        found, self.messages = self.messages[:count], self.messages[count:]
        return found

    async def nothing_more(self) -> None:
        """Raises if messages came that nobody asked for: a ping-pong through the broker is the fence."""
        await self.publish(Message("fence/nobody/listens", b"", 1))
        assert self.messages == []

    async def disconnect(self, reason_code: int = 0, **properties: Any) -> None:
        """DISCONNECT, then wait for the broker's close."""
        found = {P[name.upper()]: value for name, value in properties.items()}
        self.engine.disconnect(reason_code, properties=found)
        await self.flush()
        try:
            async with asyncio.timeout(_PATIENCE):
                while await self.stream.receive():
                    pass
        except Disconnected:
            pass
        await self.connection.aclose()

    async def vanish(self) -> None:
        """Without a word."""
        self.connection.abort()
