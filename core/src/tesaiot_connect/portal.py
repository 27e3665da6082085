"""From synchronous code into asyncio: a thread that runs an event loop.

Owns: that thread and the way in and out. Rule: whoever makes a portal owns its thread; nothing is
shared, and neither a running coroutine nor a forgotten portal keeps the interpreter from ending.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

T = TypeVar("T")

CLOSE_TIMEOUT = 10.0
"""Seconds `close` waits for what it cancelled."""


class Portal:
    """Runs coroutines for code that has no event loop. Its methods may be called from any thread.

    The thread starts with the first coroutine and ends with `close`. It is a daemon, because a
    program that ends without closing must not hang in it; `close` is called at exit then, so that
    it is gone before the interpreter is. A portal that was closed stays closed.

        with Portal() as portal:
            reply = portal.call(ask, "question", timeout=10)
    """

    def __init__(self, *, name: str = "tesaiot-portal") -> None:
        self._name = name
        self._lock = threading.RLock()  # a signal handler or a finalizer may come in the middle of a call
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def call(
        self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, timeout: float | None = None
    ) -> T:
        """What `await function(*args)` gives in the portal's thread; raises what it raises.

        Raises TimeoutError after `timeout` seconds. Then, and when the waiting is interrupted, the
        coroutine is cancelled. Raises RuntimeError when the portal is closed, and in the portal's
        own thread, where waiting would never end.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "a coroutine of this portal must await, not call: the loop would wait for itself"
            )
        future = self.start(function(*args))
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine and go on; cancelling the future cancels it. Raises RuntimeError when closed."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RuntimeError("the portal is closed")
            tracked = self._tracked(coroutine)
            try:
                return asyncio.run_coroutine_threadsafe(tracked, self._loop or self._begin())
            except RuntimeError:  # no thread can be had, or a signal handler closed it right now
                tracked.close()
                coroutine.close()
                raise

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Cancel what still runs, wait until it has wrapped up, end the thread. Idempotent.

        Waits for `timeout` seconds at most, and not at all in the portal's own thread.
        """
        if threading.current_thread() is self._thread:
            assert self._loop is not None
            if not self._lock.acquire(timeout=0.1):  # a signal handler may have it, waiting for this thread
                self._loop.call_soon(self.close)
                return
            try:
                self._closed = True
                self._stop.set()
            finally:
                self._lock.release()
            return
        with self._lock:
            first, self._closed = not self._closed, True
            if first and self._loop is not None:
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _begin(self) -> asyncio.AbstractEventLoop:
        """With the lock held."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be had, or the interpreter is ending
            loop.close()
            raise
        self._loop, self._thread = loop, thread
        atexit.register(self.close)
        return loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(self._serve())
        finally:
            atexit.unregister(self.close)

    async def _serve(self) -> None:
        await self._stop.wait()
        await asyncio.sleep(0)  # what was started before the stop reaches `_tasks` in this turn
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _tracked(self, coroutine: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await coroutine
        finally:
            self._tasks.discard(task)
