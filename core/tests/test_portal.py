"""The portal: synchronous code calls into asyncio, from several threads, and ends without hanging."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from tesaiot_connect.portal import Portal


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def thread_of(portal: Portal) -> threading.Thread:
    """Its own: an earlier test's may have the same name."""
    assert portal._thread is not None
    return portal._thread


async def thread_name() -> str:
    return threading.current_thread().name


class Sleeper:
    """A coroutine that runs until it is cancelled, and says how it went."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.wrapped_up = threading.Event()

    async def run(self) -> None:
        self.running.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.wrapped_up.set()


def test_a_call_gives_the_result_or_raises() -> None:
    async def fail() -> None:
        raise LookupError("no such thing")

    with Portal(name="the portal") as portal:
        assert portal.call(double, 21) == 42
        assert portal.call(thread_name) == "the portal"
        with pytest.raises(LookupError, match="no such thing"):
            portal.call(fail)
        assert portal.call(double, 4) == 8


def test_it_serves_several_threads_on_one_loop() -> None:
    with Portal() as portal, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: portal.call(double, n), range(200))) == [2 * n for n in range(200)]
        assert len(set(pool.map(lambda _: portal.call(thread_name), range(50)))) == 1


def test_a_call_that_takes_too_long_is_cancelled() -> None:
    sleeper = Sleeper()
    with Portal() as portal:
        with pytest.raises(TimeoutError):
            portal.call(sleeper.run, timeout=0.01)
        assert sleeper.wrapped_up.wait(20)


def test_what_was_started_can_be_cancelled() -> None:
    sleeper = Sleeper()
    with Portal() as portal:
        future = portal.start(sleeper.run())
        assert sleeper.running.wait(20)
        future.cancel()
        with pytest.raises(CancelledError):
            future.result(20)
        assert sleeper.wrapped_up.wait(20)


def test_closing_cancels_and_waits() -> None:
    sleepers = [Sleeper() for _ in range(3)]
    portal = Portal()
    futures = [portal.start(sleeper.run()) for sleeper in sleepers]
    assert all(sleeper.running.wait(20) for sleeper in sleepers)
    thread = thread_of(portal)
    portal.close()
    assert all(sleeper.wrapped_up.is_set() for sleeper in sleepers)
    assert all(future.cancelled() for future in futures)
    assert not thread.is_alive()
    portal.close()
    with pytest.raises(RuntimeError, match="closed"):
        portal.call(double, 1)


@pytest.mark.parametrize("in_between", ["close", "start"])
def test_a_signal_handler_may_come_in_the_middle_of_a_call(in_between: str) -> None:
    """It closes, or starts something, while a coroutine closes too."""
    portal = Portal()
    go = threading.Event()

    async def close() -> None:
        await asyncio.to_thread(go.wait, 20)
        portal.close()

    portal.start(close())
    thread = thread_of(portal)
    with portal._lock:
        go.set()
        if in_between == "close":
            portal.close(20)
            assert not thread.is_alive()
        else:
            assert portal.call(double, 2) == 4
    thread.join(20)
    assert not thread.is_alive()
    assert portal.closed


def test_closing_right_after_starting_leaves_no_coroutine_behind() -> None:
    """A coroutine that never ran would be warned about, and warnings are errors here."""
    for _ in range(50):
        portal = Portal()
        future = portal.start(Sleeper().run())
        portal.close()
        assert future.done()


def test_an_unused_portal_has_no_thread() -> None:
    before = set(threading.enumerate())
    with Portal() as portal:
        assert portal._thread is None
        assert not set(threading.enumerate()) - before


def test_a_coroutine_may_close_its_portal_and_must_not_call_it() -> None:
    portal = Portal()

    async def wrong() -> None:
        portal.call(double, 1)

    async def last() -> None:
        portal.close()

    with pytest.raises(RuntimeError, match="must await"):
        portal.call(wrong)
    ended: Future[None] = portal.start(last())
    try:
        ended.result(20)
    except CancelledError:  # it was still running when the loop stopped
        pass
    assert portal.closed
    portal.close()


@pytest.mark.parametrize("closing", ["", "portal.close()"])
def test_the_interpreter_ends_with_a_portal_in_use(closing: str) -> None:
    program = f"""
import asyncio, threading
from tesaiot_connect.portal import Portal

async def run(started):
    started.set()
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0.01)
        print("wrapped up", flush=True)

portal = Portal()
started = threading.Event()
portal.start(run(started))
started.wait(20)
{closing}
print("main ends", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expected = ["wrapped up", "main ends"] if closing else ["main ends", "wrapped up"]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, expected, "")
