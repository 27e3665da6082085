"""How a program is told to stop.

Owns: SIGINT and SIGTERM while a program runs. Rules: the first asks, the second insists; handlers are put
back at the end. Only who owns the process uses it, never what may be embedded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("tesaiot_connect.runner")

_TWICE = 0.25
"""Seconds within which the same signal counts once."""


class SecondSignal:
    """Tells a second signal from the first one that came twice: timeout(1) and service managers send theirs
    to a process and to its group."""

    def __init__(self) -> None:
        self._first = 0, -math.inf

    def first(self, number: int) -> None:
        self._first = number, time.monotonic()

    def counts(self, number: int) -> bool:
        first, at = self._first
        return number != first or time.monotonic() - at > _TWICE


@contextlib.contextmanager
def stopping_on_signals(stop: asyncio.Event, *, portable: bool = False) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`, any further one cancels the calling task.

    For the main thread of a program. `portable` takes the way of systems whose event loop has
    no signal handlers (Windows), where it is taken anyway. Handlers are put back at the end.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    again = SecondSignal()

    def asked(number: int) -> None:
        if not stop.is_set():
            log.info("asked to stop; a second signal stops at once")
            again.first(number)
        elif again.counts(number):
            task.cancel()
        stop.set()

    def handler(number: int, _frame: Any) -> None:
        loop.call_soon_threadsafe(asked, number)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            try:
                if portable:
                    raise NotImplementedError
                loop.add_signal_handler(number, asked, number)
                stack.callback(signal.signal, number, before)
                stack.callback(loop.remove_signal_handler, number)
            except NotImplementedError:
                signal.signal(number, handler)
                stack.callback(signal.signal, number, before)
        yield
