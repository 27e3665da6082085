"""The conformance kit passes what keeps the contract and catches what breaks it, rule by rule."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import attrs
import pytest

from tesaiot_connect.errors import ConnectFailed, Disconnected
from tesaiot_connect.protocols import ClientCertificate, Connection, Handler, State, Url
from tesaiot_connect.testing import (
    ContractBroken,
    Faulty,
    ManualClock,
    Network,
    TransportCheck,
    check_transport,
    connected_pair,
    transport_checks,
)
from tesaiot_connect.testing.multistream import multistream_checks

try:
    import uvloop

    LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
except ImportError:
    LOOPS = [asyncio.new_event_loop]

CHECKS = {check.name: check for check in transport_checks}


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_a_pair_keeps_the_contract(check: TransportCheck, loop_factory: Any) -> None:
    network = Network()
    check(listen=network.transport(), connect=network.transport, loop_factory=loop_factory)


@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_one_byte_at_a_time_is_within_the_contract(check: TransportCheck) -> None:
    if check.name in ("both_ways", "backpressure", "abort_during_send", "cancelled_send", "echo"):
        pytest.skip("megabytes, one byte at a time, take too long")
    network = Network()
    check(listen=network.transport(), connect=lambda url: Faulty(network.transport(url), piece=1))


# --- transports that break one rule each --------------------------------------------------

Bend = Callable[[Any, Any], None]


@attrs.frozen
class Bent:
    """A pair transport whose connections are spoilt by `bend(dialling end, accepting end)`."""

    schemes: ClassVar[Mapping[str, int]] = {"pair": 0}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    url: Url
    network: Network
    bend: Bend

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        start = self.network._listeners.get(self.url.host)
        if start is None:
            raise ConnectFailed("nobody listens", fix="listen")
        near, far = connected_pair()
        self.bend(near, far)

        async def accepted() -> Connection:
            return far

        start(accepted)
        return near


def bent(bend: Bend) -> tuple[Any, Any]:
    network = Network()
    return network.transport(), lambda url: Bent(Url.parse(url), network, bend)


def loses_the_last_byte(near: Any, far: Any) -> None:
    send = near._stream.send

    async def spoilt(data: bytes) -> None:
        await send(data[:-1] + b"?" if len(data) > 1 else data)

    near._stream.send = spoilt


def ignores_max_bytes(near: Any, far: Any) -> None:
    receive = far._stream.receive
    far._stream.receive = lambda max_bytes=65536: receive(65536 if max_bytes > 1 else 1)


def keeps_the_end_to_itself(near: Any, far: Any) -> None:
    async def send_eof() -> None:
        pass

    near._stream.send_eof = send_eof


def speaks_after_the_end(near: Any, far: Any) -> None:
    receive = far._stream.receive
    ends = 0

    async def spoilt(max_bytes: int = 65536) -> bytes:
        nonlocal ends
        data: bytes = await receive(max_bytes)
        ends += not data
        return b"ghost" if ends == 3 else data

    far._stream.receive = spoilt


def swallows_everything(near: Any, far: Any) -> None:
    near._stream._out.limit = 1 << 40


def receives_or_sends(near: Any, far: Any) -> None:
    stream, lock = far._stream, asyncio.Lock()
    receive, send = stream.receive, stream.send

    async def locked_receive(max_bytes: int = 65536) -> bytes:
        async with lock:
            data: bytes = await receive(max_bytes)
            return data

    async def locked_send(data: bytes) -> None:
        async with lock:
            await send(data)

    stream.receive, stream.send = locked_receive, locked_send


def forgets_when_cancelled(near: Any, far: Any) -> None:
    receive = far._stream.receive

    async def spoilt(max_bytes: int = 65536) -> bytes:
        data: bytes = await receive(max_bytes)
        await asyncio.sleep(0)
        return data

    far._stream.receive = spoilt


def cannot_abort(near: Any, far: Any) -> None:
    near.abort = near._stream.abort = lambda code=0: None


def closes_in_silence(near: Any, far: Any) -> None:
    async def aclose(*_: Any) -> None:
        near._stream._closed = True

    near.aclose = near._stream.aclose = aclose


def aborts_in_silence(near: Any, far: Any) -> None:
    near._stream._out.notify = lambda: None
    cannot_abort(near, far)


def leaves_senders_waiting(near: Any, far: Any) -> None:
    stream = near._stream

    def abort(code: int = 0) -> None:
        notify, stream._out.notify = stream._out.notify, lambda: None
        type(stream).abort(stream)
        stream._out.notify = notify

    stream.abort = near.abort = abort


def throws_away_what_was_sent(near: Any, far: Any) -> None:
    async def aclose(*_: Any) -> None:
        near._stream._out.data.clear()
        await near._stream.aclose()

    near.aclose = aclose


def closes_only_once(near: Any, far: Any) -> None:
    aclose, times = near.aclose, 0

    async def spoilt(*_: Any) -> None:
        nonlocal times
        times += 1
        if times > 1:
            raise RuntimeError("closed already")
        await aclose()

    near.aclose = spoilt


def pretends_to_send(near: Any, far: Any) -> None:
    send = near._stream.send

    async def spoilt(data: bytes) -> None:
        with contextlib.suppress(Disconnected):
            await send(data)

    near._stream.send = spoilt


def waits_for_the_peer(near: Any, far: Any) -> None:
    aclose = near.aclose

    async def spoilt(*_: Any) -> None:
        while near._stream._out.data:
            await asyncio.sleep(0)
        await aclose()

    near.aclose = spoilt


def stays_open(near: Any, far: Any) -> None:
    status = far.status
    far.status = lambda: attrs.evolve(status(), state=State.OPEN)


def counts_nothing(near: Any, far: Any) -> None:
    status = far.status
    far.status = lambda: attrs.evolve(status(), bytes_received=0)


def opens_twice(near: Any, far: Any) -> None:
    async def open_stream(*, priority: int = 0) -> Any:
        return near._stream

    near.open_stream = open_stream


@attrs.frozen
class BadListener:
    """A pair listener with a fault of its own."""

    schemes: ClassVar[Mapping[str, int]] = {"pair": 0}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    network: Network
    fault: str

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        loop, tasks = asyncio.get_running_loop(), set()
        turn = asyncio.Lock()

        async def serve(secure: Any) -> None:
            connection = await secure()
            if self.fault == "one at a time":
                async with turn:
                    await handler(connection)
            else:
                await handler(connection)
            if self.fault != "leaves connections open":
                await connection.aclose()

        def start(secure: Any) -> None:
            task = loop.create_task(serve(secure))
            tasks.add(task)

        self.network._listeners["broker"] = start
        try:
            yield "pair://broker"
        finally:
            del self.network._listeners["broker"]
            if self.fault != "lets handlers run":
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


def with_listener(fault: str) -> tuple[Any, Any]:
    network = Network()
    return BadListener(network, fault), network.transport


@attrs.frozen
class BadDialler:
    schemes: ClassVar[Mapping[str, int]] = {"pair": 0}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    inner: Any
    fault: str
    kept: list[Any] = attrs.field(factory=list)

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        try:
            connection: Connection = await self.inner.connect()
        except ConnectFailed as error:
            raise OSError("errno 111") if self.fault == "foreign error" else ConnectFailed("no") from error
        if self.fault == "leaks when cancelled":
            self.kept.append(asyncio.create_task(asyncio.sleep(3600)))
            await asyncio.sleep(0)
            self.kept.pop().cancel()
        if self.fault == "leaks a socket":
            sock = socket.socket()
            await asyncio.sleep(0)
            sock.close()
        return connection


def with_dialler(fault: str) -> tuple[Any, Any]:
    network = Network()
    return network.transport(), lambda url: BadDialler(network.transport(url), fault)


class Nameless:
    """Lacks `rank` and `races`."""

    schemes: ClassVar[Mapping[str, int]] = {"pair": 0}

    def __init__(self, inner: Any) -> None:
        self.connect = inner.connect


def nameless() -> tuple[Any, Any]:
    network = Network()
    return network.transport(), lambda url: Nameless(network.transport(url))


BROKEN: dict[str, list[tuple[Any, Any]]] = {
    "recipe": [nameless()],
    "echo": [bent(loses_the_last_byte)],
    "receive_size": [bent(ignores_max_bytes)],
    "half_close": [bent(keeps_the_end_to_itself)],
    "end_is_final": [bent(speaks_after_the_end)],
    "backpressure": [bent(swallows_everything)],
    "both_ways": [bent(receives_or_sends)],
    "cancelled_receive": [bent(forgets_when_cancelled)],
    "cancelled_send": [bent(cannot_abort)],
    "close_during_receive": [bent(closes_in_silence)],
    "peer_vanishes": [bent(aborts_in_silence)],
    "abort_during_send": [bent(leaves_senders_waiting)],
    "close_flushes": [bent(throws_away_what_was_sent)],
    "idempotent": [bent(closes_only_once)],
    "closed_is_closed": [bent(pretends_to_send)],
    "close_is_bounded": [bent(waits_for_the_peer)],
    "wait_closed": [bent(stays_open)],
    "status": [bent(counts_nothing)],
    "one_stream": [bent(opens_twice)],
    "listener_leaves": [with_listener("lets handlers run")],
    "handler_ends": [with_listener("leaves connections open")],
    "many_connections": [with_listener("one at a time")],
    "refused": [with_dialler("foreign error"), with_dialler("no fix")],
    "cancelled_connect": [with_dialler("leaks when cancelled"), with_dialler("leaks a socket")],
}


def test_every_rule_has_a_transport_that_breaks_it() -> None:
    """Those that break the rules about several streams are in test_transport_kit_streams."""
    assert BROKEN.keys() == CHECKS.keys() - {check.name for check in multistream_checks}


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, made in BROKEN.items() for number in range(len(made))]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_breaks_a_rule_is_caught(name: str, number: int) -> None:
    listen, connect = BROKEN[name][number]
    with pytest.raises(ContractBroken) as caught:
        CHECKS[name](listen=listen, connect=connect, timeout=1)
    assert CHECKS[name].rule in str(caught.value)


def test_a_task_that_ends_after_a_standstill_is_not_left_running() -> None:
    class Loop(asyncio.SelectorEventLoop):
        stood = 0.0

        def time(self) -> float:
            return super().time() + self.stood

    kept: list[Any] = []

    async def body(_: Any) -> None:
        loop: Any = asyncio.get_running_loop()

        async def ends() -> None:
            loop.stood += 5.0
            for _ in range(5):
                await asyncio.sleep(0)

        kept.append(asyncio.create_task(ends()))

    check = TransportCheck("late", "what it began ends.", body)
    check(listen=None, connect=Network().transport, loop_factory=Loop)
    assert kept[0].done()


def test_check_transport_tells_everything_at_once() -> None:
    listen, connect = bent(counts_nothing)
    with pytest.raises(ContractBroken) as caught:
        check_transport(listen=listen, connect=connect)
    assert CHECKS["status"].rule in str(caught.value)


def test_rules_are_sentences_and_names_are_unique() -> None:
    assert len(CHECKS) == len(transport_checks)
    for check in transport_checks:
        assert check.rule.endswith("."), check.rule


# --- the other tools ----------------------------------------------------------------------


def test_manual_clock() -> None:
    clock = ManualClock(100.0)
    assert clock() == 100.0
    assert clock.advance(2.5) == clock() == clock.now == 102.5
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)


def faulty(**faults: Any) -> tuple[Network, Faulty]:
    network = Network()
    return network, Faulty(network.transport(), **faults)


async def echo(connection: Connection) -> None:
    stream = await connection.accept_stream()
    while data := await stream.receive():
        await stream.send(data)


def test_faulty_refuses_then_connects() -> None:
    async def main() -> None:
        network, transport = faulty(refuse=2)
        async with network.transport().listen(echo):
            for _ in range(2):
                with pytest.raises(ConnectFailed):
                    await transport.connect()
            connection = await transport.connect()
            await connection.aclose()
        assert transport.connects == 3

    asyncio.run(main())


def test_faulty_drops_after_so_many_bytes() -> None:
    async def main() -> None:
        network, transport = faulty(drop_after=10)
        async with network.transport().listen(echo):
            connection = await transport.connect()
            stream = await connection.open_stream()
            await stream.send(b"12345")
            assert await stream.receive() == b"12345"
            with pytest.raises(Disconnected):
                await stream.receive()
            reason = await connection.wait_closed()
            assert not reason.by_peer
            again = await (await transport.connect()).open_stream()  # each connection counts anew
            with pytest.raises(Disconnected):
                await again.send(b"x" * 11)

    asyncio.run(main())


def test_faulty_cuts_into_pieces() -> None:
    async def main() -> None:
        network, transport = faulty(piece=3)
        async with network.transport().listen(echo):
            connection = await transport.connect()
            stream = await connection.open_stream()
            await stream.send(b"12345678")
            got = [await stream.receive()]
            while sum(map(len, got)) < 8:
                got.append(await stream.receive())
            assert b"".join(got) == b"12345678"
            assert max(map(len, got)) <= 3
            await connection.aclose()

    asyncio.run(main())
