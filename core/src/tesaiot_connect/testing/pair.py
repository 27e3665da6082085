"""Connections in memory: two ends, nothing in between.

Owns: a transport with the semantics of the contract and no network, for tests that need a
connection but no socket. Rule: its buffers are as bounded as real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import ClassVar

import attrs

from ..accept import Start, serving
from ..errors import ConnectFailed, ConnectorError, Disconnected, Unsupported
from ..protocols import (
    ClientCertificate,
    CloseReason,
    Connection,
    ConnectionStatus,
    Handler,
    Peer,
    State,
    Url,
)

BUFFER = 64 * 1024


class _Flow:
    """One direction: a bounded buffer."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.data = bytearray()
        self.ended = False  # nothing more will be written
        self.refused = False  # nothing more will be read
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def notify(self) -> None:
        self._changed.set()


class _Shared:
    """What both ends know."""

    def __init__(self) -> None:
        self.aborted_by: PairStream | None = None
        self.closed_by: PairStream | None = None
        self.closed = asyncio.Event()


class PairStream:
    """One end. A `ByteStream`."""

    def __init__(self, inward: _Flow, outward: _Flow, shared: _Shared) -> None:
        self._in = inward
        self._out = outward
        self._shared = shared
        self._closed = False
        self.bytes_received = 0
        self.bytes_sent = 0
        self.last_received = asyncio.get_running_loop().time()

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        flow = self._in
        while True:
            self._check_open()
            if flow.data:
                data = bytes(flow.data[:max_bytes])
                del flow.data[:max_bytes]
                flow.notify()
                self.bytes_received += len(data)
                self.last_received = asyncio.get_running_loop().time()
                return data
            if flow.ended:
                return b""
            await flow.wait()

    async def send(self, data: bytes, /) -> None:
        flow, sent = self._out, 0
        if flow.ended and not self._closed and not self._shared.closed.is_set():
            raise RuntimeError("the stream cannot send: send_eof was called before")
        while True:
            self._check_open()
            if flow.refused:
                raise Disconnected("the connection was closed by the peer")
            piece = data[sent : sent + flow.limit - len(flow.data)]
            if piece:
                flow.data += piece
                sent += len(piece)
                self.bytes_sent += len(piece)
                flow.notify()
            if sent == len(data):
                return
            await flow.wait()

    async def send_eof(self) -> None:
        self._out.ended = True
        self._out.notify()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._shared.closed_by = self._shared.closed_by or self
            self._end()

    def abort(self, code: int = 0) -> None:
        if not self._closed:
            self._closed = True
            if self._shared.closed_by is None:
                self._shared.aborted_by = self
                self._out.data.clear()
            self._end()

    @property
    def close_reason(self) -> CloseReason | None:
        shared = self._shared
        if shared.aborted_by is not None and shared.aborted_by is not self:
            return CloseReason(1, "the connection was reset by the peer", by_peer=True)
        if shared.closed_by is not None and shared.closed_by is not self:
            return CloseReason(0, "closed by the peer", by_peer=True)
        return CloseReason(0, "closed on this side") if shared.closed.is_set() else None

    async def wait_gone(self) -> None:
        await self._shared.closed.wait()

    def _check_open(self) -> None:
        if self._closed:
            raise Disconnected("the connection was closed on this side")
        if self._shared.aborted_by is not None:
            raise Disconnected("the connection was reset by the peer")

    def _end(self) -> None:
        self._out.ended = True
        self._in.refused = True
        self._in.data.clear()
        self._shared.closed.set()
        self._in.notify()
        self._out.notify()


class PairConnection:
    """One end. A `Connection` with one stream."""

    multistream = False
    early_sent = False

    def __init__(self, stream: PairStream, peer: Peer, *, accepted: bool) -> None:
        self._stream = stream
        self._peer = peer
        self._accepted = accepted
        self._taken = False

    @property
    def peer(self) -> Peer:
        return self._peer

    async def open_stream(self, *, priority: int = 0) -> PairStream:
        if self._taken or self._accepted:
            raise Unsupported("a pair has one stream, which the dialling side opens")
        self._taken = True
        return self._stream

    async def accept_stream(self) -> PairStream:
        if self._taken or not self._accepted:
            reason = await self.wait_closed()
            raise Disconnected(f"no more streams: {reason.text}")
        self._taken = True
        return self._stream

    def status(self) -> ConnectionStatus:
        reason = self._stream.close_reason
        return ConnectionStatus(
            state=State.OPEN if reason is None else State.CLOSED,
            last_received=self._stream.last_received,
            bytes_received=self._stream.bytes_received,
            bytes_sent=self._stream.bytes_sent,
            close_reason=reason,
        )

    def set_keepalive(self, seconds: float) -> None:
        pass

    async def probe(self) -> None:
        raise Unsupported("a pair has no path to probe")

    async def migrate(self) -> None:
        raise Unsupported("a pair has no address to leave")

    async def wait_closed(self) -> CloseReason:
        await self._stream.wait_gone()
        return self._stream.close_reason or CloseReason()

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        await self._stream.aclose()

    def abort(self, code: int = 0) -> None:
        self._stream.abort(code)


def connected_pair(
    buffer: int = BUFFER, *, certificate: bytes | None = None
) -> tuple[PairConnection, PairConnection]:
    """The dialling and the accepting end; `buffer` bounds each direction, in bytes.

    `certificate` is what the accepting end sees as the client's verified certificate.
    """
    there, back, shared = _Flow(buffer), _Flow(buffer), _Shared()
    near = PairStream(back, there, shared)
    far = PairStream(there, back, shared)
    return (
        PairConnection(near, Peer("listener", "pair"), accepted=False),
        PairConnection(far, Peer("dialler", "pair", certificate=certificate), accepted=True),
    )


class Network:
    """Where pair listeners and diallers meet; instead of a machine's ports."""

    def __init__(self, buffer: int = BUFFER) -> None:
        self.buffer = buffer
        self._listeners: dict[str, Start] = {}

    def transport(self, url: str = "pair://broker") -> PairTransport:
        return PairTransport(Url.parse(url), self)


@attrs.frozen
class PairTransport:
    """A recipe whose endpoints are names in a `Network`."""

    schemes: ClassVar[Mapping[str, int]] = {"pair": 0}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    url: Url
    network: Network

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        start = self.network._listeners.get(self.url.host)
        if start is None:
            raise ConnectFailed(f"nobody listens at {self.url}", fix="open the listener first")
        near, far = connected_pair(self.network.buffer)

        async def accepted() -> Connection:
            return far

        start(accepted)
        return near

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        name = self.url.host
        if name in self.network._listeners:
            raise ConnectorError(f"{self.url} is taken", fix="choose another name")
        async with serving(handler) as start:
            self.network._listeners[name] = start
            try:
                yield str(self.url)
            finally:
                del self.network._listeners[name]
