"""quic_nng's process: whatever becomes of it is one reason, and nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nng_scripted
import pytest
from loops import LOOPS
from nng_scripted import LOADED, SECURED, ended, failed, script

from tesaiot_connect import ConnectFailed, ConnectorError, Duration, TlsOptions, Unsupported, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_nng import QuicNng, connection as nng_connection, supervisor
from tesaiot_connect_quic_nng.connection import NngConnection, connect

pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")

Play = Callable[..., None]
LONG = Duration(60.0)
SERVE = ("job", LOADED, SECURED, "serve", ended("the client has closed", orderly=True))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Sets what the next workers do, and lets them take their time."""
    monkeypatch.setattr(supervisor, "COMMAND", nng_scripted.COMMAND)
    monkeypatch.setattr(supervisor, "PROBE", 60.0)
    monkeypatch.setattr(supervisor, "_LEAVE", 60.0)

    def play(*steps: str) -> None:
        for name, value in script(*steps).items():
            monkeypatch.setenv(name, value)

    return play


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[supervisor.Worker]:
    """The workers of all connections, from when they are started."""
    made: list[supervisor.Worker] = []

    def worker(place: str, *, patience: float) -> supervisor.Worker:
        made.append(supervisor.Worker(place, patience=patience))
        return made[-1]

    monkeypatch.setattr(nng_connection, "Worker", worker)
    return made


def until(condition: Callable[[], bool]) -> None:
    """Returns when `condition` holds; an error after a long time."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def descriptors() -> set[str]:
    """Of this process, where the system can say."""
    return {one.name for one in Path("/dev/fd").iterdir()} if sys.platform == "linux" else set()


def children() -> set[str]:
    """Of this process, zombies included, where the system can say."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has gone
            pid, _, rest = status.read_text().rpartition(")")
            if int(rest.split()[1]) == os.getpid():
                found.add(pid)
    return found


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Neither a descriptor nor a child, beside those that other tests share."""
    for loop in LOOPS:
        loop.values[0]().close()  # the first of a kind leaves something for all
    before = descriptors(), children()
    yield
    assert descriptors() == before[0]
    until(lambda: children() == before[1])  # a killed process takes its time on a busy machine


def recipe(**options: Any) -> QuicNng:
    tls = TlsOptions(verify="none", insecure=True)
    options = {"connect_timeout": LONG, "ack_timeout": LONG, **options}
    return QuicNng(Url.parse("quic://127.0.0.1"), tls=tls, **options)


async def dial(**options: Any) -> NngConnection:
    return await connect(recipe(**options), identity=None)


def refusal(**options: Any) -> ConnectorError:
    with pytest.raises(ConnectorError) as caught:
        asyncio.run(dial(**options))
    return caught.value


def exists(pid: int) -> bool:
    """Zombies do not count: who reaps an orphan is not ours."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- a good life ------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_lives_in_a_process_of_its_own(play: Play, loop: Any) -> None:
    play(*SERVE)

    async def run() -> int:
        connection = await dial()
        assert connection.pid != os.getpid()
        assert os.getsid(connection.pid) == connection.pid  # Ctrl-C in a terminal is not for it
        stream = await connection.open_stream()
        await stream.send(b"question")
        assert await stream.receive() == b"question"
        await connection.aclose()
        assert connection.status().close_reason is not None
        return connection.pid

    with asyncio.Runner(loop_factory=loop) as runner:
        assert not exists(runner.run(run()))


def test_it_needs_neither_the_main_thread_nor_a_thread_nor_a_signal(play: Play) -> None:
    play(*SERVE)
    seen: set[threading.Thread] = set()
    before = signal.getsignal(signal.SIGCHLD)

    async def run() -> None:
        connection = await dial()
        seen.update(one for one in threading.enumerate() if not one.name.startswith("asyncio"))
        await connection.aclose()

    threads = set(threading.enumerate())
    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    thread.join()
    assert seen - threads == {thread}  # asyncio's resolves names
    assert signal.getsignal(signal.SIGCHLD) is before


def test_secrets_travel_in_the_control_socket_alone(
    play: Play, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(*SERVE)
    monkeypatch.setenv("TESAIOT_SCRIPT_JOB", str(tmp_path / "job"))
    trusting = QuicNng(
        Url.parse("quic://localhost:1234"),
        tls=TlsOptions(ca_file=certificates.ca_file),
        verify_hostname=False,
        library=Path("libnng.so"),
        window=7,
        connect_timeout=LONG,
        ack_timeout=Duration(31.0),
    )

    async def run() -> tuple[bytes, bool]:
        connection = await connect(trusting, identity=certificates.client())
        place = Path(f"/proc/{connection.pid}")
        seen = b"".join((place / name).read_bytes() for name in ("cmdline", "environ"))
        await connection.aclose()
        return seen, connection.peer.secure

    seen, secure = asyncio.run(run())
    assert secure
    job = json.loads((tmp_path / "job").read_bytes())
    assert "BEGIN PRIVATE KEY" in job["key"]
    assert b"PRIVATE KEY" not in seen
    assert job["url"] == "mqtt-quic://localhost:1234"
    assert job["library"] == str(Path.cwd() / "libnng.so")
    assert job["ca_file"] == str(certificates.ca_file)
    assert (job["window"], job["ack_timeout"]) == (7, 31.0)
    assert 0 < job["connect_timeout"] < trusting.connect_timeout


@pytest.mark.parametrize("loop", LOOPS)
def test_fifty_connections_in_a_row_leave_nothing(play: Play, loop: Any) -> None:
    play(*SERVE)

    async def run() -> None:
        before = descriptors()
        for number in range(50):
            connection = await dial()
            if number % 2:
                connection.abort()
            else:
                await connection.aclose()
        await connection.wait_closed()
        async with asyncio.timeout(20):
            while len(descriptors()) > len(before) + 2:  # the loop's own
                await asyncio.sleep(0.002)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


def test_the_process_ends_with_its_parent_however_that_ends(play: Play) -> None:
    play(*SERVE)
    code = """
import asyncio, nng_scripted
from tesaiot_connect import Duration, TlsOptions, Url
from tesaiot_connect_quic_nng import QuicNng, supervisor
supervisor.COMMAND = nng_scripted.COMMAND
long = Duration(60.0)
async def main():
    tls = TlsOptions(verify="none", insecure=True)
    recipe = QuicNng(Url.parse("quic://127.0.0.1"), tls=tls, connect_timeout=long, ack_timeout=long)
    connection = await recipe.connect()
    print(connection.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(nng_scripted.__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert exists(pid)
        parent.kill()
    until(lambda: not exists(pid))


# --- a connection that does not come about ----------------------------------------------------


def test_what_is_not_here_is_unsupported(play: Play) -> None:
    play("job", failed("no NanoSDK: nothing names one", "set TESAIOT_NNG_LIBRARY", unsupported=True))
    told = refusal()
    assert isinstance(told, Unsupported)
    assert told.what == "quic://127.0.0.1:14567: no NanoSDK: nothing names one"
    assert told.fix == "set TESAIOT_NNG_LIBRARY"


def test_a_failure_keeps_its_stage(play: Play) -> None:
    play("job", LOADED, failed("no handshake", "check the port", stage="reach"), "wait")
    told = refusal()
    assert isinstance(told, ConnectFailed)
    assert (told.stage, told.fix) == ("reach", "check the port")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (("job", "print msquic: assertion failed", "print ", "abort"), "SIGABRT: msquic: assertion failed"),
        (("job", LOADED, "exit 3"), "ended without a word (exit status 3)"),
        (("print first line", "exit 0"), "ended without a word (exit status 0): first line"),
    ],
)
def test_a_process_that_dies_is_a_failure_with_its_last_line(
    play: Play, steps: tuple[str, ...], words: str
) -> None:
    play(*steps)
    told = refusal()
    assert isinstance(told, ConnectFailed)
    assert told.what.startswith("quic://127.0.0.1:14567: the process of quic_nng ")
    assert words in told.what
    assert told.fix


@pytest.mark.parametrize("steps", [("job", "wait"), ("stop",)])
def test_one_that_takes_too_long_is_killed(play: Play, steps: tuple[str, ...]) -> None:
    play(*steps)
    told = refusal(connect_timeout=Duration(0.3))
    assert isinstance(told, ConnectFailed)
    assert "has not loaded the library yet" in told.what
    assert told.stage == ""
    assert told.fix


def test_one_whose_handshake_takes_too_long_is_killed(
    play: Play, made: list[supervisor.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    play("job", LOADED, "wait")
    real = time.monotonic

    async def run() -> None:
        dialing = asyncio.create_task(dial())
        while not (made and made[0].loaded):
            assert not dialing.done()
            await asyncio.sleep(0.002)
        monkeypatch.setattr(time, "monotonic", lambda: real() + 1000)  # the loop's clock too
        await dialing

    with pytest.raises(ConnectFailed, match="no QUIC handshake was completed") as caught:
        asyncio.run(run())
    assert caught.value.stage == "reach"
    assert caught.value.fix


def test_a_name_that_is_none_is_told(play: Play) -> None:
    play("wait")
    tls = TlsOptions(verify="none", insecure=True)
    nowhere = QuicNng(Url.parse("quic://" + "x" * 70), tls=tls, connect_timeout=LONG)
    with pytest.raises(ConnectFailed, match="cannot be resolved to an IPv4 address") as caught:
        asyncio.run(connect(nowhere, identity=None))
    assert caught.value.stage == "name"


def test_no_interpreter_is_unsupported(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert isinstance(refusal(), Unsupported)


def test_no_process_to_be_had_is_told(play: Play, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    told = refusal()
    assert isinstance(told, ConnectFailed)
    assert "cannot be started: No such file" in told.what


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("steps", [("stop",), SERVE], ids=["stuck", "well"])
def test_giving_up_early_leaves_nothing(play: Play, loop: Any, steps: tuple[str, ...]) -> None:
    play(*steps)

    async def run() -> None:
        for turns in (0, 1, 2, 3, 5, 8):
            dialing = asyncio.create_task(dial())
            for _ in range(turns):
                await asyncio.sleep(0)
            dialing.cancel()
            await asyncio.wait((dialing,))
            if not dialing.cancelled():
                dialing.result().abort()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("loop", LOOPS)
def test_giving_up_when_it_becomes_a_connection_leaves_nothing(
    play: Play, loop: Any, made: list[supervisor.Worker]
) -> None:
    play(*SERVE)

    async def run() -> None:
        for turns in range(8):
            dialing = asyncio.create_task(dial())
            while len(made) == turns or made[-1].loaded is None:
                assert not dialing.done()
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            dialing.cancel()
            await asyncio.wait((dialing,))
            if not dialing.cancelled():
                dialing.result().abort()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_takes_long_to_die_outlives_the_loop_and_is_reaped(
    play: Play, loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    play("stop")
    dying: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: dying.append(process))  # later
    before = descriptors()

    async def run() -> None:
        dialing = asyncio.create_task(dial())
        await asyncio.sleep(0)
        dialing.cancel()
        await asyncio.wait((dialing,))
        assert dialing.cancelled()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())
    assert descriptors() == before
    (one,) = dying
    assert one.returncode is None
    one.send_signal(signal.SIGKILL)
    until(lambda: one.returncode is not None)  # which asks nobody: a thread has waited for it
    assert one.returncode == -signal.SIGKILL


# --- what it says -----------------------------------------------------------------------------


def test_what_is_no_report_is_passed_over(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    play("job", LOADED, '{"type": "unheard of"}', SECURED, "serve")

    async def run() -> None:
        await (await dial()).aclose()

    asyncio.run(run())
    assert "no report" in caplog.text


def test_what_it_prints_is_logged_for_who_looks(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "tesaiot_connect_quic_nng")
    play("print a line from C", "job", LOADED, SECURED, "serve")

    async def run() -> None:
        await (await dial()).aclose()

    asyncio.run(run())
    assert "a line from C" in caplog.text
    assert "/lib/libnng.so, version 1.8" in caplog.text


# --- whether it is there ----------------------------------------------------------------------


def test_nothing_is_missing_where_the_library_loads(play: Play) -> None:
    play("job", LOADED, "wait")
    assert QuicNng.missing() is None


def test_what_is_missing_is_said(play: Play) -> None:
    play("job", failed("no NanoSDK", "set TESAIOT_NNG_LIBRARY", unsupported=True))
    told = QuicNng.missing()
    assert isinstance(told, Unsupported)
    assert (told.what, told.fix) == ("no NanoSDK", "set TESAIOT_NNG_LIBRARY")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (("stop",), "said nothing for 0.5 s"),
        (("job", "print boom", "abort"), "was killed by SIGABRT: boom"),
        (("exit 2",), "ended without a word (exit status 2)"),
    ],
)
def test_a_library_that_breaks_is_missing_too(
    play: Play, monkeypatch: pytest.MonkeyPatch, steps: tuple[str, ...], words: str
) -> None:
    if steps == ("stop",):
        monkeypatch.setattr(supervisor, "PROBE", 0.5)
    play(*steps)
    told = QuicNng.missing()
    assert told is not None
    assert words in told.what
