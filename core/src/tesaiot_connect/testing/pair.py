"""Connections in memory: two ends, nothing in between.

Owns: a transport with the semantics of the contract and no network, for tests that need a
connection but no socket. Rule: its buffers are as bounded as real ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
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
        self.aborted_by: object | None = None
        self.closed_by: object | None = None
        self.closed = asyncio.Event()

    def reason_for(self, end: object) -> CloseReason | None:
        if self.aborted_by is not None and self.aborted_by is not end:
            return CloseReason(1, "the connection was reset by the peer", by_peer=True)
        if self.closed_by is not None and self.closed_by is not end:
            return CloseReason(0, "closed by the peer", by_peer=True)
        return CloseReason(0, "closed on this side") if self.closed.is_set() else None


class PairStream:
    """One end. A `ByteStream`."""

    def __init__(self, inward: _Flow, outward: _Flow, shared: _Shared, ended: Callable[[], None]) -> None:
        self._in = inward
        self._out = outward
        self._shared = shared
        self._ended = ended
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

    def send_early(self, data: bytes) -> None:
        """Before anybody can wait for it, so whatever its size."""
        self._out.data += data
        self.bytes_sent += len(data)

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
        return self._shared.reason_for(self)

    async def wait_gone(self) -> None:
        await self._shared.closed.wait()

    @property
    def over(self) -> bool:
        """Whether this end was closed, or either end aborted."""
        return self._closed or self._shared.aborted_by is not None

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
        self._ended()


class PairConnection:
    """One end. A `Connection` with one stream."""

    multistream = False
    early_sent = False

    def __init__(self, stream: PairStream, peer: Peer, *, accepted: bool) -> None:
        self._stream = stream
        self._peer = peer
        self._accepted = accepted
        self._taken = False

    def send_early(self, data: bytes) -> None:
        """The first bytes of the dialling end, before anybody opens its stream."""
        self._stream.send_early(data)
        self.early_sent = True

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


class _Bundle:
    """What both ends of a connection with several streams know."""

    def __init__(self, buffer: int, max_streams: int | None) -> None:
        self.buffer = buffer
        self.max_streams = max_streams
        self.streams: list[tuple[PairStream, PairStream]] = []
        """The dialling and the accepting end of each that is not over."""
        self.waiting: deque[PairStream] = deque()
        """Accepting ends that nobody took yet."""
        self.past = ([0, 0], [0, 0])
        """Bytes received and sent on streams that are over, for each end."""
        self.last_received = [asyncio.get_running_loop().time()] * 2
        self.shared = _Shared()
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def notify(self) -> None:
        self._changed.set()

    def open(self) -> PairStream:
        """The dialling end of a new stream; the other one waits to be accepted."""
        near, far = _stream_pair(self.buffer, self.notify)
        self.streams.append((near, far))
        self.waiting.append(far)
        self.notify()
        return near

    def forget(self) -> None:
        """The streams that are over."""
        over = [ends for ends in self.streams if all(end.over for end in ends)]
        for ends in over:
            self.streams.remove(ends)
            for side, end in enumerate(ends):
                self.past[side][0] += end.bytes_received
                self.past[side][1] += end.bytes_sent
                self.last_received[side] = max(self.last_received[side], end.last_received)


class BundleConnection:
    """One end. A `Connection` with as many streams as the dialling end opens."""

    multistream = True
    early_sent = False

    def __init__(self, bundle: _Bundle, peer: Peer, *, accepted: bool) -> None:
        self._bundle = bundle
        self._peer = peer
        self._accepted = accepted
        self._early: PairStream | None = None

    def send_early(self, data: bytes) -> None:
        """The first bytes of the dialling end's first stream."""
        self._early = self._bundle.open()
        self._early.send_early(data)
        self.early_sent = True

    @property
    def peer(self) -> Peer:
        return self._peer

    async def open_stream(self, *, priority: int = 0) -> PairStream:
        """Waits while there are as many as the network allows at a time."""
        bundle = self._bundle
        while True:
            if bundle.shared.closed.is_set():
                raise Disconnected("the connection is closed")
            if self._accepted:
                raise Unsupported("the dialling side opens the streams of a pair")
            if self._early is not None:
                stream, self._early = self._early, None
                return stream
            bundle.forget()
            if bundle.max_streams is None or len(bundle.streams) < bundle.max_streams:
                return bundle.open()
            await bundle.wait()

    async def accept_stream(self) -> PairStream:
        bundle = self._bundle
        while True:
            if self._accepted and bundle.waiting:
                return bundle.waiting.popleft()
            if bundle.shared.closed.is_set():
                raise Disconnected(f"no more streams: {self._reason.text}")
            await bundle.wait()

    @property
    def _reason(self) -> CloseReason:
        return self._bundle.shared.reason_for(self) or CloseReason()

    def status(self) -> ConnectionStatus:
        bundle, mine = self._bundle, self._mine()
        reason, (received, sent) = bundle.shared.reason_for(self), bundle.past[self._accepted]
        before = bundle.last_received[self._accepted]
        return ConnectionStatus(
            state=State.OPEN if reason is None else State.CLOSED,
            last_received=max((stream.last_received for stream in mine), default=before),
            bytes_received=received + sum(stream.bytes_received for stream in mine),
            bytes_sent=sent + sum(stream.bytes_sent for stream in mine),
            close_reason=reason,
        )

    def _mine(self) -> list[PairStream]:
        return [ends[self._accepted] for ends in self._bundle.streams]

    def set_keepalive(self, seconds: float) -> None:
        pass

    async def probe(self) -> None:
        raise Unsupported("a pair has no path to probe")

    async def migrate(self) -> None:
        raise Unsupported("a pair has no address to leave")

    async def wait_closed(self) -> CloseReason:
        await self._bundle.shared.closed.wait()
        return self._reason

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        shared = self._bundle.shared
        if not shared.closed.is_set():
            shared.closed_by = self
            shared.closed.set()
            for stream in self._mine():
                await stream.aclose()
            self._bundle.notify()

    def abort(self, code: int = 0) -> None:
        shared = self._bundle.shared
        if not shared.closed.is_set():
            shared.aborted_by = self
            shared.closed.set()
            self._bundle.waiting.clear()
            for stream in self._mine():
                stream.abort(code)
            self._bundle.notify()


def _stream_pair(buffer: int, ended: Callable[[], None]) -> tuple[PairStream, PairStream]:
    there, back, shared = _Flow(buffer), _Flow(buffer), _Shared()
    return PairStream(back, there, shared, ended), PairStream(there, back, shared, ended)


def connected_bundle(
    buffer: int = BUFFER, *, max_streams: int | None = None
) -> tuple[BundleConnection, BundleConnection]:
    """As `connected_pair`, with many streams; `buffer` bounds each direction of each stream."""
    bundle = _Bundle(buffer, max_streams)
    return (
        BundleConnection(bundle, Peer("listener", "pair"), accepted=False),
        BundleConnection(bundle, Peer("dialler", "pair"), accepted=True),
    )


def connected_pair(
    buffer: int = BUFFER, *, certificate: bytes | None = None
) -> tuple[PairConnection, PairConnection]:
    """The dialling and the accepting end; `buffer` bounds each direction, in bytes.

    `certificate` is what the accepting end sees as the client's verified certificate.
    """
    near, far = _stream_pair(buffer, lambda: None)
    return (
        PairConnection(near, Peer("listener", "pair"), accepted=False),
        PairConnection(far, Peer("dialler", "pair", certificate=certificate), accepted=True),
    )


class Network:
    """Where pair listeners and diallers meet; instead of a machine's ports.

    `multistream`: its connections have many streams, at most `max_streams` at a time. `early`: what
    `connect` is given as early bytes is sent with it. Both may be changed for later connections.
    """

    def __init__(
        self,
        buffer: int = BUFFER,
        *,
        multistream: bool = False,
        max_streams: int | None = None,
        early: bool = False,
    ) -> None:
        self.buffer = buffer
        self.multistream = multistream
        self.max_streams = max_streams
        self.early = early
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
        network = self.network
        near: PairConnection | BundleConnection
        far: PairConnection | BundleConnection
        if network.multistream:
            near, far = connected_bundle(network.buffer, max_streams=network.max_streams)
        else:
            near, far = connected_pair(network.buffer)
        if early and network.early:
            near.send_early(early)

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
