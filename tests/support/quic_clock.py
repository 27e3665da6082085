"""An event loop whose clock does not see that the machine stood still.

A test with both ends of a connection on one loop may use short timeouts on it: they pass while the loop
waits, and hardly while it works or is kept from working.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
import time
from collections.abc import Callable
from typing import Any

_SLICE = 0.01
"""Seconds that one wait lasts, and passes, at most."""
_LOOK = 0.001
"""Seconds that pass between two looks at the clock at most, where nothing was waited for."""


class _Clock:
    def __init__(self) -> None:
        self._now = self._looked = time.monotonic()

    def __call__(self) -> float:
        self.passes(_LOOK)
        return self._now

    def passes(self, most: float) -> None:
        looked = time.monotonic()
        self._now += min(looked - self._looked, most)
        self._looked = looked


class _Slices(selectors.DefaultSelector):
    """Waits in slices, so that no more than one is lost to a machine that stands still meanwhile."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        self._clock.passes(_LOOK)
        timeout = _SLICE if timeout is None else min(timeout, _SLICE)
        found = super().select(timeout)
        self._clock.passes(_LOOK if timeout <= 0 else _SLICE)
        return found


class SteadyLoop(asyncio.SelectorEventLoop):
    """asyncio's own, on that clock."""

    def __init__(self) -> None:
        self._steady = _Clock()
        super().__init__(_Slices(self._steady))

    def time(self) -> float:
        return self._steady()


steady_loop: Callable[[], asyncio.AbstractEventLoop] | None = SteadyLoop if sys.platform != "win32" else None
"""For `asyncio.Runner`."""
