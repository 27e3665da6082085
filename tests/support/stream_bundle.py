"""The broker's end of a connection with many streams, made by hand: each stream is a pair in memory.

A test is the client: it opens streams, writes bytes on them, and sees with which code the broker
reset them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs

from tesaiot_connect.errors import Disconnected
from tesaiot_connect.protocols import (
    ByteStream,
    CloseReason,
    ConnectionStatus,
    Handler,
    Peer,
    QuicStatus,
    State,
)
from tesaiot_connect.testing import connected_pair


class Bundle:
    """A `Connection` whose streams `dial` makes. `buffer` bounds each direction of each, in bytes."""

    multistream = True
    early_sent = False
    peer = Peer("dialler", "bundle")

    def __init__(self, buffer: int = 65536) -> None:
        self.buffer = buffer
        self.quic: QuicStatus | None = None
        self.keepalive: float | None = None
        self.resets: list[int] = []
        """Codes of the streams the broker aborted."""
        self.over = asyncio.Event()
        self._opened: asyncio.Queue[ByteStream | None] = asyncio.Queue()

    async def dial(self) -> ByteStream:
        """The client's end of a new stream."""
        near, far = connected_pair(self.buffer)
        stream: Any = await far.accept_stream()
        abort, receive = stream.abort, stream.receive

        async def in_turn(max_bytes: int = 65536) -> bytes:
            await asyncio.sleep(0)  # as with a network, others have their turn before each read
            data: bytes = await receive(max_bytes)
            return data

        def noted(code: int = 0) -> None:
            if not stream._closed:
                self.resets.append(code)
            abort(code)

        stream.abort, stream.receive = noted, in_turn
        self._opened.put_nowait(stream)
        return await near.open_stream()

    def end(self) -> None:
        """No more streams: the connection has ended."""
        self._opened.put_nowait(None)

    async def accept_stream(self) -> ByteStream:
        stream = await self._opened.get()
        if stream is None:
            raise Disconnected("no more streams")
        return stream

    async def open_stream(self, *, priority: int = 0) -> ByteStream:
        raise NotImplementedError

    def status(self) -> ConnectionStatus:
        return ConnectionStatus(State.OPEN, 0.0, quic=self.quic)

    def set_keepalive(self, seconds: float) -> None:
        self.keepalive = seconds

    async def probe(self) -> None:
        raise NotImplementedError

    async def migrate(self) -> None:
        raise NotImplementedError

    async def wait_closed(self) -> CloseReason:
        raise NotImplementedError

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        self.over.set()
        self.end()

    def abort(self, code: int = 0) -> None:
        self.over.set()
        self.end()


@attrs.define
class OneBundle:
    """A listener for one connection, made by hand."""

    bundle: Bundle = attrs.field(factory=Bundle)
    url: str = "bundle://"

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(_serve(handler, self.bundle))
            yield self.url
            serving.cancel()


async def _serve(handler: Handler, bundle: Bundle) -> None:
    await handler(bundle)
