"""Whether a client's path is alive.

Owns: when to ask, when to look around, when to give up. Rule: silence means something only after
something was sent that must be answered. Times are the event loop's clock, in seconds.
"""

from __future__ import annotations

import math

from .endpoint import Tuning
from .figures import Figures

_LOOK = 3.0
"""Seconds of silence after which a client looks whether this machine's address is still the same, and, once
after it has written something, whether the peer is still alive."""


class Liveness:
    """`client` False, a listener's side: it asks where it is told to and gives up by the idle timeout."""

    def __init__(self, figures: Figures, tuning: Tuning, *, client: bool) -> None:
        self.asked: float | None = None
        """When the first packet went out that must be answered, and nothing has come since."""
        self._figures = figures
        self._keepalive = tuning.keepalive
        self._limit = tuning.path_timeout
        self._client = client
        self._last_ping = 0.0
        self._last_look = 0.0
        self._wrote = False

    def wrote(self) -> None:
        """The application wrote something."""
        self._wrote = True

    def sent(self, now: float) -> None:
        """Something is on its way that must be answered."""
        if self.asked is None:
            self.asked = now

    def heard(self) -> None:
        """The peer is alive."""
        self.asked = None

    def due(self, idle: float) -> float:
        """When to look at the three below. `idle` is the idle timeout."""
        return min(self._ping_due(idle), self._look_due(), self._silence_due())

    def silent(self, now: float) -> bool:
        """Nothing was answered for longer than anybody should wait."""
        return now >= self._silence_due()

    def ping(self, now: float, idle: float) -> bool:
        """Whether to send a PING, for the sake of NATs and idle timers."""
        if now < self._ping_due(idle):
            return False
        self._last_ping = now
        return True

    def look(self, now: float) -> tuple[bool, bool]:
        """Whether to look for another local address, and whether to ask the peer if it lives: it has what was
        written, and perhaps died before it could answer."""
        if now < self._look_due():
            return False, False
        self._last_look = now
        wrote, self._wrote = self._wrote, False
        return True, wrote

    def _ping_due(self, idle: float) -> float:
        """Often enough for both sides' idle timeouts."""
        if not self._keepalive:
            return math.inf
        return max(self._figures.last_received, self._last_ping) + min(self._keepalive, max(1.0, idle / 3))

    def _look_due(self) -> float:
        return max(self._figures.last_received, self._last_look) + _LOOK if self._client else math.inf

    def _silence_due(self) -> float:
        return (
            self.asked + self._limit if self._client and self._limit and self.asked is not None else math.inf
        )
