"""The bytes of the transport conformance kit as MQTT messages, since NanoSDK carries nothing else.

`TranslatedDialer` and `TranslatedListener` go around a transport's recipe and a listener. What is sent on a
stream travels as payloads of PUBLISH on one topic: to the server at the QoS that the dialer is given, to the
client at QoS 0. All else that a check sees is the transport's own: connections, their ends and their
figures, cancellation, and what its stream says about any of it. Nothing runs besides the caller's tasks: who
waits reads for all, and who does not read leaves everything where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from tesaiot_connect import (
    ClientCertificate,
    Connection,
    Disconnected,
    Handler,
    Listener,
    Message,
)
from tesaiot_connect.mqtt import (
    V3,
    Acknowledged,
    ClientEngine,
    Closed,
    Connect,
    Connected,
    ConnectRequest,
    Event,
    Received,
    Send,
    ServerEngine,
    ServerLimits,
    Session,
    Suback,
    SubscribeRequest,
    Subscription,
    UnsubscribeRequest,
)
from tesaiot_connect_quic_nng import QuicNng

TOPIC = "bytes"
_PIECE = 32_768
"""Bytes of a payload."""
_OF_THE_TRANSPORT = (
    "peer",
    "multistream",
    "early_sent",
    "open_stream",
    "accept_stream",
    "status",
    "set_keepalive",
    "probe",
    "migrate",
    "wait_closed",
    "aclose",
    "abort",
)


class TranslatedStream:
    """A `ByteStream` over the payloads of one MQTT connection; `stream` is the one under test."""

    def __init__(self, stream: Any, engine: ClientEngine | ServerEngine, qos: Literal[0, 1]) -> None:
        self._stream = stream
        self._engine: Any = engine
        self._qos = qos
        self._now = asyncio.get_running_loop().time
        self._inbox = bytearray()
        self._events: list[Event] = []
        """Of the way up, until somebody looks for them."""
        self._acknowledged = 0
        self._reading = asyncio.Lock()
        self._writing = asyncio.Lock()
        self.send_eof = stream.send_eof
        self.aclose = stream.aclose
        self.abort = stream.abort

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        if not await self._until(lambda: self._inbox):
            return b""
        data = bytes(self._inbox[:max_bytes])
        del self._inbox[:max_bytes]
        return data

    async def send(self, data: bytes, /) -> None:
        pieces = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
        messages = [Message(TOPIC, piece, self._qos) for piece in pieces]
        while messages:
            taken, known = self._engine.publish(messages, [0] * len(messages)), self._acknowledged
            del messages[:taken]
            await self.flush()
            if messages and not taken and not await self._until(lambda: self._acknowledged > known):  # noqa: B023
                raise RuntimeError("the stream ended as if all had been said, and a message has no PUBACK")

    async def event(self, kind: type[Any]) -> Any:
        """The next one of that kind, which is taken away with those before it. Raises Disconnected."""

        def found() -> list[Event]:
            return [one for one in self._events if isinstance(one, kind)]

        if not await self._until(found):
            raise Disconnected("the connection ended before MQTT was ready")
        event = found()[0]
        del self._events[: self._events.index(event) + 1]
        return event

    async def flush(self) -> None:
        async with self._writing:
            await self._stream.send(b"".join(one.data for one in self._engine.outputs() if type(one) is Send))

    async def _until(self, reached: Callable[[], object]) -> bool:
        """Reads until then. False: the stream has ended."""
        while not reached():
            async with self._reading:
                if reached():
                    break
                data = await self._stream.receive()
                if not data:
                    return False
                for event in self._engine.receive_data(data, now=self._now()):
                    self._take(event)
            with contextlib.suppress(Disconnected):  # what it was for has come all the same
                await self.flush()
        return True

    def _take(self, event: Event) -> None:
        if isinstance(event, Received):
            self._inbox += b"".join(message.payload for message in event.messages)
            self._engine.settle(event.token)
        elif isinstance(event, Acknowledged):
            assert not event.refused, event
            self._acknowledged += len(event.keys)
        elif isinstance(event, UnsubscribeRequest):
            self._engine.unsuback(event, [0] * len(event.packet.filters))
        elif isinstance(event, Closed):
            raise RuntimeError(f"what came is no MQTT: {event.text}")
        else:
            self._events.append(event)


class TranslatedConnection:
    """A `Connection` that is the one under test, but for its first stream; that stream is taken already."""

    def __init__(self, connection: Connection, stream: TranslatedStream, *, accepted: bool) -> None:
        for name in _OF_THE_TRANSPORT:
            setattr(self, name, getattr(connection, name))
        which = "accept_stream" if accepted else "open_stream"
        further = getattr(connection, which)
        first = [stream]

        async def take(*arguments: Any, **options: Any) -> Any:
            return first.pop() if first else await further(*arguments, **options)

        setattr(self, which, take)


class TranslatedDialer:
    """A recipe around another one. `qos` is that of what is sent."""

    def __init__(self, recipe: QuicNng, qos: Literal[0, 1]) -> None:
        self.schemes, self.rank, self.races = recipe.schemes, recipe.rank, recipe.races
        self._recipe = recipe
        self._qos = qos

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Any:
        connection = await self._recipe.connect(identity=identity, early=early)
        try:
            connect = Connect(client_id="kit", version=V3, keepalive=0)
            engine = ClientEngine(connect, Session(), now=asyncio.get_running_loop().time())
            stream = TranslatedStream(await connection.open_stream(), engine, self._qos)
            await stream.flush()
            await stream.event(Connected)
            engine.subscribe([Subscription(TOPIC, 1)])
            await stream.flush()
            await stream.event(Suback)
        except BaseException:
            connection.abort()
            raise
        return TranslatedConnection(connection, stream, accepted=False)


class TranslatedListener:
    """A listener around another one, whose URL it gives with the scheme "quic"."""

    schemes, rank, races = QuicNng.schemes, QuicNng.rank, QuicNng.races

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    @contextlib.asynccontextmanager
    async def listen(self, handler: Handler) -> AsyncIterator[str]:
        async def serve(connection: Connection) -> None:
            engine = ServerEngine(ServerLimits(), now=asyncio.get_running_loop().time())
            stream = TranslatedStream(await connection.accept_stream(), engine, 0)
            await stream.event(ConnectRequest)
            engine.accept(Session(), session_present=False, now=asyncio.get_running_loop().time())
            await stream.flush()
            request: SubscribeRequest = await stream.event(SubscribeRequest)
            engine.suback(request, [one.qos for one in request.packet.subscriptions])
            await stream.flush()
            one: Any = TranslatedConnection(connection, stream, accepted=True)
            await handler(one)

        async with self._listener.listen(serve) as url:
            yield f"quic://{url.partition('://')[2]}"
