"""What ends a worker that nobody tells anything any more, on any clock.

Owns: two counts of time. Rule: no I/O, and no clock of its own.
"""

from __future__ import annotations

_BUSY = 0.5
"""Of a core. Threads that wait use next to none, and a machine with other work gives them less than one."""
_TURNS = 3


class Progress:
    """Notices that the library works without an end: it computes, and nothing comes of it. All in seconds."""

    def __init__(self, patience: float, *, now: float, cpu: float) -> None:
        """`cpu` is the processor time that the library's threads have used, here and below."""
        self._patience = patience
        self.made(now=now, cpu=cpu)

    def made(self, *, now: float, cpu: float) -> None:
        """Something came from the library."""
        self._now, self._cpu = now, cpu

    def next_timeout(self) -> float:
        return self._now + self._patience

    def none(self, *, now: float, cpu: float) -> bool:
        """Whether it has been busy for `patience`, and nothing came."""
        if now < self.next_timeout():
            return False
        busy = cpu - self._cpu >= _BUSY * (now - self._now)
        self.made(now=now, cpu=cpu)
        return busy


class Company:
    """Notices that the process that started this one is gone although its socket is open, which a fork of it
    keeps. Turns of `patience` seconds are counted, not seconds: both may have been stopped together."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._due: float | None = None
        self._turns = 0

    def heard(self, now: float) -> None:
        """It asked for a sign of life. Before the first time nothing is expected of it."""
        self._due = now + self._patience
        self._turns = 0

    def next_timeout(self) -> float | None:
        return self._due

    def gone(self, now: float) -> bool:
        """Call it when all that it said was heard."""
        if self._due is not None and now >= self._due:
            self._due = now + self._patience
            self._turns += 1
        return self._turns >= _TURNS
