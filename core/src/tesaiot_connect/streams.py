"""Byte streams and single-stream connections over asyncio transports.

Owns: the step from asyncio's push (`data_received`) to the contract's pull (`receive`), for any
stream transport and event loop. Rule: memory is bounded both ways; a reader that is not read
stops reading its socket, and a sender waits while its peer does not read.

Not an `asyncio.StreamReader`: what one socket read brought is handed over as it is, without a
copy, at the cost of one future for each wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from .errors import Disconnected, PathLost, Unsupported
from .protocols import CloseReason, ConnectionStatus, Peer, State

log = logging.getLogger(__name__)

HIGH_WATER = 256 * 1024
"""Bytes a sender may leave in this process before `send` waits."""
CLOSE_TIMEOUT = 5.0
"""Seconds `aclose` waits for the peer to take what was sent."""
LINGER = 1.0
"""Seconds `aclose` waits for the peer's end of stream after it took everything."""


GOES_ON = "the session goes on over the next endpoint, if there is one"
"""What happens next after a path was lost."""

Explain = Callable[[BaseException], Disconnected]


def explain_os_error(error: BaseException) -> Disconnected:
    """What a broken connection means, in words. Keeps the error as its cause."""
    if isinstance(error, Disconnected):
        return error
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)):
        told = Disconnected("the connection was reset by the peer or a device in between")
    elif isinstance(error, TimeoutError):
        told = PathLost("the peer no longer answers", fix=f"{GOES_ON}; check the network path to it")
    elif number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN):
        told = PathLost("the network path to the peer is gone", fix=f"{GOES_ON}; check the network")
    else:
        told = Disconnected(f"the connection broke: {error or type(error).__name__}")
    told.__cause__ = error
    return told


class AsyncioStream(asyncio.Protocol):
    """A `ByteStream` that is the protocol of an asyncio transport: give it as the factory's result.

    `explain` puts the error of a broken connection into words (`tls.explain_tls` knows TLS alerts).
    `half_close` says that the transport can end one direction alone; TLS over TCP cannot.
    `silent` is what receiving raises when the peer leaves before it sent a single byte, where that
    has a meaning (TLS 1.3: this is how a server rejects a client's certificate).
    """

    def __init__(
        self,
        *,
        explain: Explain = explain_os_error,
        half_close: bool = True,
        silent: Disconnected | None = None,
        high_water: int = HIGH_WATER,
        close_timeout: float = CLOSE_TIMEOUT,
    ) -> None:
        self._explain = explain
        self._half_close = half_close
        self._silent = silent
        self._high_water = high_water
        self._close_timeout = close_timeout
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._offset = 0  # how much of the first chunk was handed out
        self._reader: asyncio.Future[None] | None = None
        self._senders: deque[asyncio.Future[None]] = deque()
        self._reading = True
        self._writing = True
        self._eof = False  # the peer sent all it had
        self._by_peer = False  # the peer ended it first
        self._eof_sent = False
        self._closing = False  # by us
        self._lost = False
        self._error: Disconnected | None = None
        self._ended = self._loop.create_future()  # EOF or lost
        self._gone = self._loop.create_future()  # lost
        self.last_received = self._loop.time()
        self.bytes_received = 0
        self.bytes_sent = 0

    # --- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self._high_water)

    def data_received(self, data: bytes) -> None:
        self.bytes_received += len(data)
        if self._closing:
            return
        self._chunks.append(data)
        self.last_received = self._loop.time()
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)
                return
        if self._reading:
            self._reading = False
            self._live.pause_reading()

    def eof_received(self) -> bool:
        self._eof = True
        self._by_peer = self._by_peer or not self._closing
        if self._by_peer and not self.bytes_received:
            self._error = self._silent
        self._wake(self._ended)
        self._wake_reader()
        return self._half_close  # True keeps our own direction open

    def pause_writing(self) -> None:
        self._writing = False

    def resume_writing(self) -> None:
        self._writing = True
        self._wake_senders()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._lost = True
        self._writing = True
        if exc is not None and not self._closing:
            silent = self._silent is not None and not self.bytes_received
            if silent and isinstance(exc, ConnectionError):  # its farewell did not get through
                self._error = self._silent
            else:
                self._error = self._explain(exc)
        elif not self._closing:
            self._eof = self._by_peer = True
        if self._by_peer and not self.bytes_received:
            self._error = self._error or self._silent
        self._wake(self._ended)
        self._wake(self._gone)
        self._wake_reader()
        self._wake_senders()

    # --- the contract

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        chunks = self._chunks
        if not chunks:
            await self._wait_for_data()
            if not chunks:
                if self._closing:
                    raise Disconnected("the connection was closed on this side")
                if self._error is not None:
                    raise self._again() from self._error.__cause__
                return b""
        first = chunks[0]
        offset = self._offset
        if len(chunks) == 1 and not offset and len(first) <= max_bytes:
            chunks.clear()
            return first
        end = offset + max_bytes
        if end < len(first):
            self._offset = end
            return first[offset:end]
        chunks.popleft()
        self._offset = 0
        if offset:
            return first[offset:]
        if sum(map(len, chunks)) + len(first) > max_bytes:
            return first
        data = first + b"".join(chunks)
        chunks.clear()
        return data

    def pause(self) -> None:
        """Leave what comes to the kernel until the next `receive`: fewer, larger reads."""
        if self._reading and not self._chunks and self._reader is None and not self._lost:
            self._reading = False
            self._live.pause_reading()

    async def send(self, data: bytes, /) -> None:
        if self._closing or self._lost or self._eof_sent or (self._eof and not self._half_close):
            raise self._not_writable()
        if not data:
            return
        self.bytes_sent += len(data)
        self._live.write(data)
        while not self._writing:
            room = self._loop.create_future()
            self._senders.append(room)
            try:
                await room
            finally:
                with contextlib.suppress(ValueError):
                    self._senders.remove(room)
        if self._lost:
            raise self._not_writable()

    async def send_eof(self) -> None:
        if not self._half_close or not self._live.can_write_eof():
            raise Unsupported("this transport cannot end one direction alone", fix="use aclose")
        if self._closing or self._lost:
            raise self._not_writable()
        if self._eof_sent:
            return
        self._eof_sent = True
        try:
            self._live.write_eof()
        except OSError as error:
            raise self._explain(error) from error

    async def aclose(self) -> None:
        """Flush, end both directions, release. Idempotent, never raises Disconnected.

        Bounded: a peer that takes nothing for `close_timeout` seconds is cut off. A transport
        that can half-close waits a moment for the peer's end too, because closing a socket
        with unread bytes in it makes the kernel throw away what was sent last.
        """
        transport = self._transport
        if transport is None or self._lost:
            self._closing = True
            return
        if not self._closing:
            self._closing = True
            self._discard()
        try:
            async with asyncio.timeout(self._close_timeout):
                if self._half_close and transport.can_write_eof() and not transport.is_closing():
                    await self._linger(transport)
                transport.close()
                await asyncio.shield(self._gone)
        except TimeoutError:
            transport.abort()
            await asyncio.shield(self._gone)
        except BaseException:
            transport.abort()
            raise

    def abort(self, code: int = 0) -> None:
        self._closing = True
        self._chunks.clear()
        self._offset = 0
        self._wake_reader()
        if self._transport is not None and not self._lost:
            self._transport.abort()

    # --- for the connection around it

    @property
    def transport(self) -> asyncio.Transport:
        """The asyncio transport, for `get_extra_info`."""
        return self._live

    @property
    def error(self) -> Disconnected | None:
        """Why it broke; None where it did not."""
        return self._error

    @property
    def state(self) -> State:
        if self._lost:
            return State.CLOSED
        return State.CLOSING if self._closing else State.OPEN

    @property
    def close_reason(self) -> CloseReason | None:
        """None while it is open."""
        if not self._lost:
            return None
        if self._error is not None:
            return CloseReason(1, self._error.what, by_peer=True)
        if self._by_peer:
            return CloseReason(0, "closed by the peer", by_peer=True)
        return CloseReason(0, "closed on this side")

    async def wait_gone(self) -> None:
        """Returns when the asyncio transport is gone. Cancel-safe."""
        await asyncio.shield(self._gone)

    # --- inside

    @property
    def _live(self) -> asyncio.Transport:
        if self._transport is None:
            raise Disconnected("the stream was not connected yet")
        return self._transport

    async def _wait_for_data(self) -> None:
        if self._eof or self._lost or self._closing:
            return
        if self._reader is not None:
            raise RuntimeError("another task is receiving from this stream already")
        reader = self._reader = self._loop.create_future()
        if not self._reading:
            self._reading = True
            self._live.resume_reading()
        try:
            await reader
        finally:
            if self._reader is reader:
                self._reader = None

    async def _linger(self, transport: asyncio.Transport) -> None:
        if not self._eof_sent:
            self._eof_sent = True
            try:
                transport.write_eof()
            except OSError:  # the peer is gone already
                return
        transport.set_write_buffer_limits(high=0)
        while not self._writing and not self._lost:
            room = self._loop.create_future()
            self._senders.append(room)
            await room
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                await asyncio.shield(self._ended)

    def _discard(self) -> None:
        self._chunks.clear()
        self._offset = 0
        self._wake_reader()
        if not self._reading:
            self._reading = True
            self._live.resume_reading()

    def _again(self) -> Disconnected:
        assert self._error is not None
        return type(self._error)(self._error.what, fix=self._error.fix)

    def _not_writable(self) -> Disconnected | RuntimeError:
        if self._error is not None:
            told = self._again()
            told.__cause__ = self._error.__cause__
            return told
        if self._closing:
            return Disconnected("the connection was closed on this side")
        if self._lost or (self._eof and not self._half_close):
            return Disconnected("the connection was closed by the peer")
        return RuntimeError("the stream cannot send: send_eof was called before")

    @staticmethod
    def _wake(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)

    def _wake_reader(self) -> None:
        if self._reader is not None:
            self._wake(self._reader)
            self._reader = None

    def _wake_senders(self) -> None:
        for sender in self._senders:
            self._wake(sender)
        self._senders.clear()


class StreamConnection:
    """A `Connection` with the one stream of a stream transport.

    The side that dialled opens the stream, the side that accepted (`accepted`) accepts it.
    """

    multistream = False
    early_sent = False

    def __init__(self, stream: AsyncioStream, peer: Peer, *, accepted: bool = False) -> None:
        self._stream = stream
        self._peer = peer
        self._accepted = accepted
        self._taken = False

    @property
    def peer(self) -> Peer:
        return self._peer

    async def open_stream(self, *, priority: int = 0) -> AsyncioStream:
        if self._accepted:
            raise Unsupported(
                f"{self._peer.transport} has one stream, which the dialling side opens",
                fix="use accept_stream here",
            )
        if self._taken:
            raise Unsupported(f"{self._peer.transport} has one stream, which is open already")
        return self._take()

    async def accept_stream(self) -> AsyncioStream:
        """A second call waits for the end of the connection: there will be no other stream."""
        if self._accepted and not self._taken:
            return self._take()
        reason = await self.wait_closed()
        raise Disconnected(f"no more streams: {reason.text}")

    def _take(self) -> AsyncioStream:
        if self._stream.state is State.CLOSED and not self._stream.bytes_received:
            raise self._stream._not_writable()
        self._taken = True
        return self._stream

    def status(self) -> ConnectionStatus:
        stream = self._stream
        return ConnectionStatus(
            state=stream.state,
            last_received=stream.last_received,
            bytes_received=stream.bytes_received,
            bytes_sent=stream.bytes_sent,
            close_reason=stream.close_reason,
        )

    def set_keepalive(self, seconds: float) -> None:
        """Nothing to do: a stream transport has no idle timer of its own."""

    async def probe(self) -> None:
        raise Unsupported(f"{self._peer.transport} cannot probe its path", fix="send a PINGREQ")

    async def migrate(self) -> None:
        raise Unsupported(f"{self._peer.transport} cannot move to another address", fix="reconnect")

    async def wait_closed(self) -> CloseReason:
        await self._stream.wait_gone()
        reason = self._stream.close_reason
        assert reason is not None
        return reason

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        await self._stream.aclose()

    def abort(self, code: int = 0) -> None:
        self._stream.abort(code)


# --- sockets that fail --------------------------------------------------------------------


async def to_its_end(making: asyncio.Task[Any], sock: socket.socket) -> asyncio.Transport:
    """The transport of `making`, which leaves nothing of itself or `sock` when it fails or is cancelled.

    Cancelling asyncio's own handshake in its first turn would leave it running, so a cancelled
    one is ended from below.
    """
    try:
        transport: asyncio.Transport = (await asyncio.shield(making))[0]
        return transport
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        await asyncio.wait([making])
        if not making.cancelled() and making.exception() is None:
            making.result()[0].abort()
        await _let_go(sock)
        raise
    except OSError:
        await _let_go(sock)
        raise


async def _let_go(sock: socket.socket) -> None:
    """Wait until the failed transport closed its socket.

    uvloop forgets to tell the socket object when the peer leaves in the first turn: the
    descriptor is closed, and may be another connection's soon, so the object must not close it.
    """
    for _ in range(5):
        if sock.fileno() < 0:
            return
        await asyncio.sleep(0)
    sock.detach()
