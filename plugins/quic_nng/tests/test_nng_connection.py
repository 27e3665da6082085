"""quic_nng's connection: bytes to and from its process, and the reason of its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nng_scripted
import pytest
from loops import LOOPS
from nng_scripted import LOADED, SECURED, ended, script

from tesaiot_connect import (
    Connection,
    ConnectionStatus,
    Disconnected,
    Duration,
    PathLost,
    State,
    TlsOptions,
    Unsupported,
    Url,
)
from tesaiot_connect_quic_nng import QuicNng, connection as nng_connection, supervisor
from tesaiot_connect_quic_nng.connection import NngConnection, NngStream, connect

pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")

Play = Callable[..., None]
LONG = Duration(60.0)
UP = ("job", LOADED, SECURED)
ORDERLY = ended("the client has closed", orderly=True)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Sets what the next workers do, and lets them take their time."""
    monkeypatch.setattr(supervisor, "COMMAND", nng_scripted.COMMAND)
    monkeypatch.setattr(supervisor, "_LEAVE", 60.0)
    monkeypatch.setattr(nng_connection, "_LAST_WORD", 60.0)

    def play(*steps: str) -> None:
        for name, value in script(*steps).items():
            monkeypatch.setenv(name, value)

    return play


@pytest.fixture(params=LOOPS)
def runner(request: pytest.FixtureRequest) -> Any:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


async def dial(**options: Any) -> tuple[NngConnection, NngStream]:
    tls = TlsOptions(verify="none", insecure=True)
    options = {"connect_timeout": LONG, "ack_timeout": LONG, **options}
    connection = await connect(QuicNng(Url.parse("quic://127.0.0.1"), tls=tls, **options), identity=None)
    return connection, await connection.open_stream()


async def how_it_ends(stream: NngStream) -> Disconnected:
    """Twice, since the end is for good."""
    told = []
    for _ in range(2):
        with pytest.raises(Disconnected) as caught:
            await stream.receive()
        told.append(caught.value)
    assert type(told[0]) is type(told[1])
    assert str(told[0]) == str(told[1])
    return told[0]


def reaped(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def until(condition: Callable[[], bool]) -> None:
    """A killed process takes its time on a busy machine."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


# --- what it is -------------------------------------------------------------------------------


def test_the_view_from_above(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve", ORDERLY)

    async def run() -> ConnectionStatus:
        connection, stream = await dial()
        assert isinstance(connection, Connection)
        peer = connection.peer
        assert (peer.address, peer.transport) == ("127.0.0.1:14567", "quic_nng")
        assert (peer.alpn, peer.tls_version, peer.secure) == ("mqtt", "TLSv1.3", False)
        assert not connection.multistream
        assert not connection.early_sent
        connection.set_keepalive(10)
        for use in (connection.open_stream, connection.probe, connection.migrate, stream.send_eof):
            with pytest.raises(Unsupported):
                await use()
        await stream.send(b"x" * 1000)
        size = 0
        while size < 1000:
            size += len(await stream.receive(100))
        status = connection.status()
        assert (status.state, status.bytes_sent, status.bytes_received) == (State.OPEN, 1000, 1000)
        assert status.close_reason is None
        accepting = asyncio.create_task(connection.accept_stream())
        await connection.aclose()
        with pytest.raises(Disconnected, match="no more streams"):
            await accepting
        return connection.status()

    status = runner.run(run())
    assert status.state is State.CLOSED
    assert status.close_reason is not None
    assert (status.close_reason.code, status.close_reason.by_peer) == (0, False)


def test_a_lot_flows_both_ways_at_once(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve", ORDERLY)
    data = os.urandom(3_000_000)

    async def run() -> bytes:
        connection, stream = await dial()

        async def send() -> None:
            for begin in range(0, len(data), 100_000):
                await stream.send(data[begin : begin + 100_000])

        sending = asyncio.create_task(send())
        received = b""
        while len(received) < len(data):
            received += await stream.receive()
        await sending
        await connection.aclose()
        return received

    assert runner.run(run()) == data


def test_closing_flushes(play: Play, runner: asyncio.Runner) -> None:
    """What the worker was sent before its end of the data it has."""
    play(*UP, "serve", ORDERLY)

    async def run() -> int:
        connection, stream = await dial()
        sending = asyncio.create_task(stream.send(b"x" * 2_000_000))
        await asyncio.sleep(0)
        await connection.aclose()
        await asyncio.wait((sending,))
        sending.exception()
        return connection.status().bytes_received

    assert runner.run(run()) == 2_000_000  # it had come back


# --- how it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind", "by_peer"),
    [
        (ended("the server closed the connection", "see its log", by_peer=True), Disconnected, True),
        (ended("an acknowledgement did not come", "see its log", silent=True), PathLost, False),
    ],
)
def test_its_last_word_is_the_reason(
    play: Play, runner: asyncio.Runner, word: str, kind: type[Disconnected], by_peer: bool
) -> None:
    play(*UP, "serve", word)

    async def run() -> None:
        connection, stream = await dial()
        await stream.send(b"before")
        assert await stream.receive() == b"before"
        await stream.send(b"go on")
        told = await how_it_ends(stream)
        assert type(told) is kind
        assert told.what in word
        assert told.fix == "see its log"
        reason = await connection.wait_closed()
        assert (reason.code, reason.text, reason.by_peer) == (1, told.what, by_peer)
        assert connection.status().state is State.CLOSED
        with pytest.raises(kind, match=told.what):
            await stream.send(b"x")
        connection.abort()

    runner.run(run())


def test_what_came_before_the_end_is_read_first(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve", ended("the server closed the connection"))

    async def run() -> None:
        connection, stream = await dial()
        await stream.send(b"x" * 50_000)
        while connection.status().bytes_sent < 50_000:
            await asyncio.sleep(0)
        first = await stream.receive(1)
        received = first
        while len(received) < 50_000:
            received += await stream.receive(1000)
        await stream.send(b"go on")
        await connection.wait_closed()
        assert "server closed" in (await how_it_ends(stream)).what
        await connection.aclose()

    runner.run(run())


def test_an_orderly_end_is_the_end_of_the_stream(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve", ORDERLY)

    async def run() -> None:
        connection, stream = await dial()
        await stream.send(b"go on")
        assert [await stream.receive() for _ in range(3)] == [b"", b"", b""]
        assert (await connection.wait_closed()).code == 0
        await connection.aclose()

    runner.run(run())


def test_a_crash_is_a_lost_connection(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve")

    async def run() -> None:
        connection, stream = await dial()
        receiving = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        await stream.send(b"abort")
        with pytest.raises(Disconnected) as caught:
            await receiving
        what = "the process of quic_nng was killed by SIGABRT: pthread_mutex_lock: Invalid argument"
        assert caught.value.what == what
        assert caught.value.fix
        assert not isinstance(caught.value, PathLost)
        assert (await connection.wait_closed()).text == what
        assert reaped(connection.pid)
        await connection.aclose()

    runner.run(run())


def test_a_crash_in_the_handshake_is_tried_again(play: Play, runner: asyncio.Runner, tmp_path: Path) -> None:
    play("job", LOADED, f"abort once {tmp_path / 'crashed'}", SECURED, "serve")

    async def run() -> None:
        connection, stream = await dial()
        assert (tmp_path / "crashed").exists()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        await connection.aclose()

    runner.run(run())


def test_a_process_that_is_killed_is_a_lost_connection(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve")

    async def run() -> None:
        connection, stream = await dial()
        os.kill(connection.pid, signal.SIGKILL)
        assert "was killed by SIGKILL" in (await how_it_ends(stream)).what
        await connection.aclose()

    runner.run(run())


def test_a_process_that_hangs_is_a_lost_path(play: Play, runner: asyncio.Runner) -> None:
    """And is killed, though it is stopped."""
    play(*UP, "serve")

    async def run() -> None:
        connection, stream = await dial(ack_timeout=Duration(0.4))
        await stream.send(b"stop")
        told = await how_it_ends(stream)
        assert isinstance(told, PathLost)
        assert told.what == "the process of quic_nng hangs: no sign of life for 0.4 s"
        assert reaped(connection.pid)
        await connection.aclose()

    runner.run(run())


def test_a_stall_of_our_own_is_not_its_fault(
    play: Play, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stall shows is a clock that has gone on; asyncio's loop looks at the same one."""
    monkeypatch.setattr(supervisor, "_PING", 0.02)
    play(*UP, "serve", ORDERLY)
    real = time.monotonic

    async def run() -> None:
        connection, stream = await dial()
        monkeypatch.setattr(time, "monotonic", lambda: real() + 1000)
        pings = connection._worker._pings
        await until(lambda: connection._worker._answered > pings + 2)
        await stream.send(b"still here")
        assert await stream.receive() == b"still here"
        await connection.aclose()

    runner.run(run())


def test_the_end_of_the_data_without_a_word(
    play: Play, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nng_connection, "_LAST_WORD", 0.1)
    play(*UP, "close data", "wait")

    async def run() -> None:
        connection, stream = await dial()
        assert "ended the data without a word" in (await how_it_ends(stream)).what
        assert reaped(connection.pid)
        await connection.aclose()

    runner.run(run())


def test_one_that_stays_after_its_last_word_is_killed(
    play: Play, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LEAVE", 0.1)
    play(*UP, "serve", ended("the server closed the connection"), "stop")

    async def run() -> None:
        connection, stream = await dial()
        await stream.send(b"go on")
        assert (await connection.wait_closed()).text == "the server closed the connection"
        assert reaped(connection.pid)
        assert "server closed" in (await how_it_ends(stream)).what
        await connection.aclose()

    runner.run(run())


@pytest.mark.parametrize("beat", [False, True], ids=["the loop", "a sign of life"])
def test_one_that_only_closes_its_control_socket_is_killed_after_a_while(
    play: Play, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, beat: bool
) -> None:
    """One that dies does that first, and takes its time where much else runs. Whoever finds it closed."""
    play(*UP, "close control", "stop")
    waits: list[float] = []
    later = supervisor.Worker._later

    def sooner(worker: supervisor.Worker, delay: float, do: Callable[[], None]) -> None:
        if delay <= 0.1:  # no sign of life
            waits.append(delay)
            delay = 0.0
        later(worker, delay, do)

    monkeypatch.setattr(supervisor.Worker, "_later", sooner)

    async def run() -> None:
        connection, _ = await dial()
        while beat and "(stopped)" not in Path(f"/proc/{connection.pid}/status").read_text():
            time.sleep(0.002)  # the loop stands still
        if beat:
            connection._worker._beat()
        assert "closed its control socket and stayed" in (await connection.wait_closed()).text
        assert sum(waits) >= 60
        await connection.aclose()

    runner.run(run())


def test_closing_is_bounded(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve", "stop")

    async def run() -> None:
        connection, stream = await dial(ack_timeout=1.0)
        await stream.aclose()
        assert reaped(connection.pid)
        assert (await connection.wait_closed()).code == 0
        for use in (stream.receive, lambda: stream.send(b"x")):
            with pytest.raises(Disconnected, match="closed on this side"):
                await use()

    runner.run(run())


def test_closing_waits_for_a_process_that_takes_long_to_die(
    play: Play, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(*UP, "serve", "stop")
    dying: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: dying.append(process))  # later

    async def run() -> None:
        connection, _ = await dial()
        connection._patience = 0.1  # with closing alone; it is not for signs of life
        closing = asyncio.create_task(connection.aclose())
        await until(lambda: bool(dying))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closing.done()
        assert connection.status().state is State.CLOSING
        dying[0].send_signal(signal.SIGKILL)
        await closing
        assert reaped(connection.pid)
        assert connection.status().state is State.CLOSED

    runner.run(run())


def test_closing_that_is_cancelled_leaves_nothing(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve", "stop")

    async def run() -> None:
        for turns in (0, 1, 3):
            connection, _ = await dial()
            closing = asyncio.create_task(connection.aclose())
            for _ in range(turns + 1):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait((closing,))
            assert closing.cancelled()
            await until(lambda: reaped(connection.pid))  # noqa: B023

    runner.run(run())


def test_abort_kills_at_once(play: Play, runner: asyncio.Runner) -> None:
    """It is stopped: nothing else ends it, and no sign of life is missed so soon."""
    play(*UP, "stop")

    async def run() -> None:
        for end in ("connection", "stream"):
            connection, stream = await dial()
            receiving = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            (connection if end == "connection" else stream).abort()
            await until(lambda: reaped(connection.pid))  # noqa: B023
            with pytest.raises(Disconnected, match="closed on this side"):
                await receiving
            connection.abort()
            await connection.aclose()
            assert (await connection.wait_closed()).code == 0

    runner.run(run())


def test_a_receive_that_is_cancelled_loses_nothing(play: Play, runner: asyncio.Runner) -> None:
    play(*UP, "serve", ORDERLY)

    async def run() -> None:
        connection, stream = await dial()
        expected = received = b""
        for number in range(100):
            receiving = asyncio.create_task(stream.receive(number % 5 + 1))
            for _ in range(number % 4):
                await asyncio.sleep(0)
            word = b"%d." % number
            expected += word
            await stream.send(word)
            receiving.cancel()
            await asyncio.wait((receiving,))
            if not receiving.cancelled():
                received += receiving.result()
        while len(received) < len(expected):
            received += await stream.receive()
        assert received == expected
        await connection.aclose()

    runner.run(run())
