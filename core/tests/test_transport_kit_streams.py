"""The kit's checks for several streams, early data, the path and the figures: what keeps each
sentence passes, and what breaks it is caught."""

from __future__ import annotations

import asyncio
import unittest
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import attrs
import pytest

from tesaiot_connect.accept import Start, serving
from tesaiot_connect.errors import ConnectFailed, Disconnected
from tesaiot_connect.protocols import (
    ClientCertificate,
    CloseReason,
    Connection,
    ConnectionStatus,
    Handler,
    Peer,
    QuicState,
    QuicStatus,
    State,
    Url,
)
from tesaiot_connect.testing import (
    ContractBroken,
    Network,
    TransportCheck,
    check_transport,
    connected_pair,
    transport_checks,
)
from tesaiot_connect.testing.multistream import multistream_checks

CHECKS = {check.name: check for check in multistream_checks}


class Path:
    """What both ends of a connection know."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.ended_by: Side | None = None
        self.states: list[tuple[QuicState, float]] = []
        for state in (QuicState.INITIAL, QuicState.HANDSHAKE, QuicState.ONE_RTT):
            self.enter(state)

    def enter(self, state: QuicState) -> None:
        self.states.append((state, asyncio.get_running_loop().time()))


class Side:
    """One end of a connection with many streams, each one a pair in memory."""

    multistream = True
    early_sent = False

    def __init__(self, path: Path, name: str) -> None:
        self.peer = Peer(name, "many")
        self.path = path
        self.other: Side
        self.incoming: deque[Any] = deque()
        self.changed = asyncio.Event()
        self.streams: list[Any] = []
        self.total = 0
        self.moves = 0
        self.first: Any = None
        self.dress: Callable[[Any], None] = lambda stream: None

    async def open_stream(self, *, priority: int = 0) -> Any:
        stream, self.first = self.first, None
        return stream or await self.opened()

    async def opened(self) -> Any:
        if self.path.ended.is_set():
            raise Disconnected("the connection has ended")
        near, far = connected_pair()
        ours, theirs = await near.open_stream(), await far.accept_stream()
        for side, stream in ((self, ours), (self.other, theirs)):
            side.total += 1
            side.streams = [*(one for one in side.streams if not one._shared.closed.is_set()), stream]
            side.dress(stream)
        self.other.incoming.append(theirs)
        self.other.changed.set()
        return ours

    async def accept_stream(self) -> Any:
        while not self.incoming:
            if self.path.ended.is_set():
                raise Disconnected("the connection has ended")
            self.changed.clear()
            await self.changed.wait()
        return self.incoming.popleft()

    def status(self) -> ConnectionStatus:
        streams, ended = self.streams, self.path.ended.is_set()
        still = sum(not stream._shared.closed.is_set() for stream in streams)
        return ConnectionStatus(
            State.CLOSED if ended else State.OPEN,
            max([stream.last_received for stream in streams], default=0.0),
            sum(stream.bytes_received for stream in streams),
            sum(stream.bytes_sent for stream in streams),
            migrations=self.moves,
            close_reason=CloseReason(by_peer=self.path.ended_by is not self) if ended else None,
            quic=QuicStatus(
                self.path.states[-1][0],
                tuple(self.path.states),
                streams_open=still,
                streams_total=self.total,
            ),
        )

    def set_keepalive(self, seconds: float) -> None:
        pass

    async def probe(self) -> None:
        if self.path.ended.is_set():
            raise Disconnected("the connection has ended")

    async def migrate(self) -> None:
        self.moves += 1

    async def wait_closed(self) -> CloseReason:
        await self.path.ended.wait()
        return CloseReason()

    def end(self) -> None:
        if not self.path.ended.is_set():
            self.path.ended_by = self
            self.path.enter(QuicState.CLOSED)
            self.path.ended.set()
            for side in (self, self.other):
                side.changed.set()

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        for stream in self.streams:
            await stream.aclose()
        self.end()

    def abort(self, code: int = 0) -> None:
        for stream in self.streams:
            stream.abort()
        self.end()


Bend = Callable[[Side, Side], None]


@attrs.frozen
class Many:
    """A transport in memory with many streams. The second connection of a recipe is early."""

    schemes: ClassVar[Mapping[str, int]] = {"many": 0}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    url: Url
    listeners: dict[str, Start]
    bend: Bend
    known: list[str] = attrs.field(factory=list)

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        start = self.listeners.get(self.url.host)
        if start is None:
            raise ConnectFailed("nobody listens", fix="listen")
        path = Path()
        near, far = Side(path, "listener"), Side(path, "dialler")
        near.other, far.other = far, near
        self.bend(near, far)
        if early and self.known:
            near.first = await near.opened()
            await near.first.send(early)
            near.early_sent = True
        self.known.append("a ticket")

        async def accepted() -> Connection:
            return far

        start(accepted)
        return near

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        async with serving(handler) as start:
            self.listeners[self.url.host] = start
            try:
                yield str(self.url)
            finally:
                del self.listeners[self.url.host]


def fine(near: Side, far: Side) -> None:
    pass


def bent(bend: Bend) -> tuple[Many, Callable[[str], Many]]:
    listeners: dict[str, Start] = {}
    return (
        Many(Url.parse("many://broker"), listeners, fine),
        lambda url: Many(Url.parse(url), listeners, bend),
    )


@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_many_streams_in_memory_keep_the_contract(check: TransportCheck) -> None:
    listen, connect = bent(fine)
    if check.name == "one_stream":
        with pytest.raises(unittest.SkipTest):
            check(listen=listen, connect=connect)
    else:
        check(listen=listen, connect=connect)


def test_what_a_transport_cannot_do_is_skipped() -> None:
    network = Network()
    skipped = check_transport(listen=network.transport(), connect=network.transport)
    assert CHECKS.keys() - {"early", "keepalive"} == set(skipped)


# --- transports that break one sentence each ----------------------------------------------


def mixes_bytes_up(near: Side, far: Side) -> None:
    def dress(stream: Any) -> None:
        number, receive = far.total, stream.receive

        async def spoilt(max_bytes: int = 65536) -> bytes:
            data: bytes = await receive(max_bytes)
            return data[::-1] if number == 3 else data

        stream.receive = spoilt

    far.dress = dress


def accepts_the_last_first(near: Side, far: Side) -> None:
    accept = far.accept_stream

    async def spoilt() -> Any:
        far.incoming.appendleft(await accept())
        return far.incoming.pop()

    far.accept_stream = spoilt  # type: ignore[method-assign]


def holds(limit: int) -> Bend:
    def bend(near: Side, far: Side) -> None:
        def dress(stream: Any) -> None:
            stream._out.limit = limit

        near.dress = dress

    return bend


def sends_on_one_stream_at_a_time(near: Side, far: Side) -> None:
    turn = asyncio.Lock()

    def dress(stream: Any) -> None:
        send = stream.send

        async def spoilt(data: bytes) -> None:
            async with turn:
                await send(data)

        stream.send = spoilt

    near.dress = dress


def aborts_politely(near: Side, far: Side) -> None:
    def dress(stream: Any) -> None:
        def spoilt(code: int = 0) -> None:
            if not stream._closed:
                stream._closed = True
                stream._shared.closed_by = stream
                stream._end()

        stream.abort = spoilt

    near.dress = dress


def aborts_everything(near: Side, far: Side) -> None:
    def spoilt(code: int = 0) -> None:
        for stream in near.streams:
            type(stream).abort(stream)
        near.end()

    def dress(stream: Any) -> None:
        stream.abort = spoilt

    near.dress = dress


def leaves_the_peers_sender_waiting(near: Side, far: Side) -> None:
    def dress(stream: Any) -> None:
        def spoilt(code: int = 0) -> None:
            notify, stream._in.notify = stream._in.notify, lambda: None
            type(stream).abort(stream)
            stream._in.notify = notify

        stream.abort = spoilt

    near.dress = dress


def closes_everything(near: Side, far: Side) -> None:
    def dress(stream: Any) -> None:
        closing = stream.aclose

        async def spoilt() -> None:
            await closing()
            near.abort()

        stream.aclose = spoilt

    near.dress = dress


def loses_the_accepted(near: Side, far: Side) -> None:
    accept = far.accept_stream

    async def spoilt() -> Any:
        stream = await accept()
        await asyncio.sleep(0)
        return stream

    far.accept_stream = spoilt  # type: ignore[method-assign]


def waits_for_ever(near: Side, far: Side) -> None:
    accept = near.accept_stream

    async def spoilt() -> Any:
        try:
            return await accept()
        except Disconnected:
            await asyncio.Event().wait()

    near.accept_stream = spoilt  # type: ignore[method-assign]


def accepts_nothing(near: Side, far: Side) -> None:
    async def spoilt() -> Any:
        raise Disconnected("streams come from the dialling side only")

    near.accept_stream = spoilt  # type: ignore[method-assign]


def opens_after_the_end(near: Side, far: Side) -> None:
    async def spoilt(*, priority: int = 0) -> Any:
        return await Side.opened(near) if not near.path.ended.is_set() else connected_pair()[0]._stream

    near.open_stream = spoilt  # type: ignore[method-assign]


def keeps_streams(near: Side, far: Side) -> None:
    kept: list[Any] = []
    near.dress = kept.append


def has_so_many_and_no_more(near: Side, far: Side) -> None:
    async def spoilt(*, priority: int = 0) -> Any:
        if near.total >= 100:
            raise Disconnected("the peer allows no more streams")
        return await Side.open_stream(near)

    near.open_stream = spoilt  # type: ignore[method-assign]


def is_early_in_words_only(near: Side, far: Side) -> None:
    near.early_sent = True


def is_early_in_secret(near: Side, far: Side) -> None:
    async def spoilt(*, priority: int = 0) -> Any:
        stream = await Side.opened(near)
        await stream.send(b"this may come early, ")
        return stream

    near.open_stream = spoilt  # type: ignore[method-assign]


def needs_a_keepalive(near: Side, far: Side) -> None:
    def spoilt(seconds: float) -> None:
        if not seconds:
            raise ValueError("not 0")

    near.set_keepalive = spoilt  # type: ignore[method-assign]


def proves_nothing(near: Side, far: Side) -> None:
    async def spoilt() -> None:
        pass

    near.probe = spoilt  # type: ignore[method-assign]


def moves_without_counting(near: Side, far: Side) -> None:
    async def spoilt() -> None:
        pass

    near.migrate = spoilt  # type: ignore[method-assign]


def loses_bytes_on_the_move(near: Side, far: Side) -> None:
    async def spoilt() -> None:
        near.moves += 1
        for stream in near.streams:
            del stream._out.data[:100]

    near.migrate = spoilt  # type: ignore[method-assign]


def goes_back(near: Side, far: Side) -> None:
    near.path.enter(QuicState.HANDSHAKE)
    near.path.enter(QuicState.ONE_RTT)


def never_closes(near: Side, far: Side) -> None:
    near.path.enter = lambda state: None  # type: ignore[method-assign]


BROKEN: dict[str, list[Bend]] = {
    "many_streams": [mixes_bytes_up],
    "stream_order": [accepts_the_last_first],
    "unread_stream": [holds(1 << 40), sends_on_one_stream_at_a_time],
    "unread_streams": [holds(10 * 1024 * 1024)],
    "abort_stream": [aborts_politely, aborts_everything],
    "abort_wakes": [leaves_the_peers_sender_waiting],
    "end_of_one": [closes_everything],
    "cancelled_accept": [loses_the_accepted],
    "accept_ends": [waits_for_ever, accepts_nothing],
    "open_after_end": [opens_after_the_end],
    "many_in_sequence": [keeps_streams, has_so_many_and_no_more],
    "early": [is_early_in_words_only, is_early_in_secret],
    "keepalive": [needs_a_keepalive],
    "probe": [proves_nothing],
    "migrate": [moves_without_counting, loses_bytes_on_the_move],
    "quic_status": [goes_back, never_closes],
}


def test_every_sentence_has_a_transport_that_breaks_it() -> None:
    assert BROKEN.keys() == CHECKS.keys()


@pytest.mark.parametrize(
    ("name", "bend"),
    [
        pytest.param(name, bend, id=f"{name}-{bend.__name__}")
        for name, bends in BROKEN.items()
        for bend in bends
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_breaks_a_sentence_is_caught(name: str, bend: Bend) -> None:
    listen, connect = bent(bend)
    with pytest.raises(ContractBroken) as caught:
        CHECKS[name](listen=listen, connect=connect, timeout=2)
    assert CHECKS[name].rule in str(caught.value)
