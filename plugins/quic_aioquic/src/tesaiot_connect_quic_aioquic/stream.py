"""One bidirectional stream of a QUIC connection, as a `ByteStream`.

Owns: the step from aioquic's events to `receive`, and `send`'s waiting for room. Rule: memory is
bounded both ways; what nobody reads holds the peer back at the window, and `send` waits while
more than the watermark is not acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

from tesaiot_connect import Disconnected

if TYPE_CHECKING:
    from .connection import QuicConnection

CLOSE_TIMEOUT = 5.0
"""Seconds `aclose` waits for the peer to acknowledge what was sent."""


class QuicStream:
    """A `ByteStream`. It belongs to a `QuicConnection`, which feeds it."""

    def __init__(self, connection: QuicConnection, stream_id: int) -> None:
        self.stream_id = stream_id
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[bytes] = deque()
        self._offset = 0
        """Bytes of the first chunk that were taken."""
        self._size = 0
        self._ended = False
        self._reset: int | None = None
        """The code with which the peer broke off its sending."""
        self._stopped: int | None = None
        """The code with which the peer refused ours."""
        self._eof_sent = False
        self._closed = False
        self._reader: asyncio.Future[None] | None = None
        self._senders: list[asyncio.Future[None]] = []

    # --- the contract -------------------------------------------------------------------------

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        while not self._chunks:
            if self._closed:
                raise Disconnected("the stream was closed on this side")
            if self._reset is not None:
                raise Disconnected(f"the peer reset the stream (code 0x{self._reset:x})")
            if self._ended and not self._connection.closed_here:
                return b""
            if self._connection.over:
                raise self._connection.gone()
            if self._reader is not None:
                raise RuntimeError("another task is receiving from this stream already")
            reader = self._reader = self._loop.create_future()
            try:
                await reader
            finally:
                if self._reader is reader:
                    self._reader = None
        data = self._take(max_bytes)
        self._size -= len(data)
        self._connection.consumed(self.stream_id, len(data))
        return data

    def _take(self, max_bytes: int) -> bytes:
        chunks, offset = self._chunks, self._offset
        if self._size <= max_bytes:
            self._offset = 0
            data = b"".join(chunks) if len(chunks) > 1 else chunks[0]
            chunks.clear()
            return data[offset:] if offset else data
        parts: list[bytes] = []
        room = max_bytes
        while room:
            chunk = chunks[0]
            end = offset + room
            if end < len(chunk):
                parts.append(chunk[offset:end])
                self._offset = end
                break
            parts.append(chunk[offset:] if offset else chunk)
            room -= len(chunk) - offset
            chunks.popleft()
            self._offset = offset = 0
        return b"".join(parts)

    async def send(self, data: bytes, /) -> None:
        self._check_sending()
        if not data:
            return
        connection, stream_id = self._connection, self.stream_id
        view = memoryview(data)
        while view:
            room = connection.room(stream_id)
            if room <= 0:
                await self._wait_for_room()
                continue
            part, view = view[:room], view[room:]
            connection.write(stream_id, bytes(part) if view or len(part) != len(data) else data)
        if connection.room(stream_id) <= 0:
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        connection = self._connection
        connection.waits(self)
        room = self._loop.create_future()
        self._senders.append(room)
        try:
            await room
        finally:
            with contextlib.suppress(ValueError):
                self._senders.remove(room)
        self._check_sending()

    def _check_sending(self) -> None:
        if self._connection.over or self._connection.closed_here:
            raise self._connection.gone()
        if self._stopped is not None:
            raise Disconnected(f"the peer refuses the stream (code 0x{self._stopped:x})")
        if self._closed:
            raise Disconnected("the stream was closed on this side")
        if self._eof_sent:
            raise RuntimeError("the stream cannot send: send_eof was called before")

    async def send_eof(self) -> None:
        if self._eof_sent:
            return
        self._check_sending()
        self._end()

    def _end(self) -> None:
        self._eof_sent = True
        self._connection.write(self.stream_id, b"", end=True)

    async def aclose(self) -> None:
        """Flush, end both directions, release. Idempotent, never raises Disconnected.

        Bounded: a peer that acknowledges nothing for some seconds is cut off.
        """
        connection, stream_id = self._connection, self.stream_id
        first = not self._closed
        self._closed = True
        self._wake_reader()
        self.wake_senders()
        if connection.over or not first:
            return
        if self._stopped is None and not self._eof_sent:
            self._end()
        if not self._ended and self._reset is None:
            connection.stop(stream_id)
        self._discard()
        try:
            await connection.wait_sent([stream_id], CLOSE_TIMEOUT)
        finally:
            if connection.over or connection.quic.sent_all(stream_id):
                connection.release(stream_id)
            else:
                connection.drop(stream_id, 0)

    def abort(self, code: int = 0) -> None:
        if self._closed:
            return
        self._closed = True
        self._discard()
        self._wake_reader()
        self.wake_senders()
        if not self._connection.over:
            self._connection.drop(self.stream_id, code)

    # --- for the connection -------------------------------------------------------------------

    @property
    def sends(self) -> bool:
        return not self._eof_sent and self._stopped is None and not self._closed

    def fed(self, data: bytes, end: bool) -> None:
        """Bytes came, or the end did."""
        self._ended = self._ended or end
        if data:
            if self._closed:
                self._connection.consumed(self.stream_id, len(data))
                return
            self._chunks.append(data)
            self._size += len(data)
        self._wake_reader()

    def was_reset(self, code: int) -> None:
        """By the peer: what it had sent before need not have arrived, and is dropped."""
        if self._ended:
            return
        self._reset = code
        self._discard()
        self._wake_reader()

    def was_stopped(self, code: int) -> None:
        """The peer reads no more of what we send."""
        self._stopped = code
        self.wake_senders()

    def wake(self) -> None:
        """The connection is over."""
        self._wake_reader()
        self.wake_senders()

    def wake_senders(self) -> None:
        for sender in self._senders:
            if not sender.done():
                sender.set_result(None)
        self._senders.clear()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _discard(self) -> None:
        size, self._size, self._offset = self._size, 0, 0
        self._chunks.clear()
        if size:
            self._connection.consumed(self.stream_id, size)


class Incoming:
    """Streams that the peer opened and nobody has accepted yet."""

    def __init__(self) -> None:
        self._streams: deque[QuicStream] = deque()
        self._acceptor: asyncio.Future[None] | None = None
        self._ended = False

    def __len__(self) -> int:
        return len(self._streams)

    def put(self, stream: QuicStream) -> None:
        self._streams.append(stream)
        self._wake()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._wake()

    async def take(self) -> QuicStream | None:
        """The next one; None when there will be none. Cancel-safe."""
        while not self._streams:
            if self._ended:
                return None
            if self._acceptor is not None:
                raise RuntimeError("another task is accepting streams already")
            acceptor = self._acceptor = asyncio.get_running_loop().create_future()
            try:
                await acceptor
            finally:
                self._acceptor = None
        return self._streams.popleft()

    def _wake(self) -> None:
        if self._acceptor is not None and not self._acceptor.done():
            self._acceptor.set_result(None)
