"""Whether a client's path is alive.

Owns: when to ask, when to look around, when to give up. Rules: silence means something only after something
was sent that must be answered, again and again; who was busy lately asks soon, who rests asks at the
keepalive. Times are the event loop's clock, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from .endpoint import Tuning
from .figures import Figures

_LOOK = 3.0
"""Seconds of silence after which a client looks whether this machine's address is still the same. After it
was busy, it does not wait longer either before it asks whether the peer is alive."""
_PROBE_TIMEOUTS = 4
"""A question has so many of the path's own for its answer (RFC 9002 section 6.2), whatever `path_timeout`."""
_WITHIN = 0.98
"""Share of `path_timeout` after which a path is left: what a timer sets off takes its time too."""
_PROBES = 2
"""Times that it was repeated at least, or more was sent a probe timeout later: each packet puts the
repetition off, so a client that always sends may repeat nothing. One that stood still has done neither."""


class Path(Protocol):
    """What `Quic` knows of the path."""

    @property
    def idle_timeout(self) -> float: ...
    @property
    def probe_timeout(self) -> float: ...
    @property
    def probe_timeouts(self) -> int: ...
    @property
    def acknowledged(self) -> int: ...
    @property
    def waiting(self) -> bool: ...


class Liveness:
    """`client` False, a listener's side: it asks where it is told to and gives up by the idle timeout."""

    def __init__(
        self, path: Path, figures: Figures, tuning: Tuning, *, client: bool, clock: Callable[[], float]
    ) -> None:
        self._path = path
        self._figures = figures
        self._keepalive = tuning.keepalive
        self._limit = tuning.path_timeout
        self._client = client
        self._clock = clock
        self._alive = figures.last_received
        """The last sign of life."""
        self._asked: float | None = None
        """When the first packet went out that must be answered, and was not."""
        self._acknowledged = -1
        self._probes = 0
        """Probe timeouts at that time."""
        self._more = 0
        """Times that more was sent since, a probe timeout apart."""
        self._latest = 0.0
        """When the latest of those was."""
        self._early = min(_LOOK, self._limit / 4 or _LOOK)
        self._gap = math.inf
        """Silence before the next early question."""
        self._last_gap = 0.0
        self._last_ping = -math.inf
        self._last_look = 0.0

    def active(self) -> None:
        """The application wrote or was given something: once it falls silent, that is asked about soon, and
        again after twice and four times as long where this comes often."""
        if self._client and self._gap != self._early:
            often = self._clock() - self._last_ping < 2 * self._limit
            self._gap, self._last_gap = self._early, self._limit if often else self._early

    def sent(self, now: float, *, more: bool = False) -> None:
        """Something is on its way that must be answered; `more` was sent just now."""
        if self._asked is None:
            self.moved(now)
        elif more and now >= self._latest + self._path.probe_timeout:
            self._more, self._latest = self._more + 1, now

    def moved(self, now: float) -> None:
        """Something is on its way over another path, which has a time of its own to answer."""
        self._asked, self._probes = now, self._path.probe_timeouts
        self._more, self._latest = 0, now

    def heard(self, now: float) -> None:
        """Packets came. While something is unanswered, only an acknowledgement shows that it was heard."""
        path, before = self._path, self._acknowledged
        self._acknowledged = path.acknowledged
        if self._asked is None or self._acknowledged != before or not path.waiting:
            self._asked, self._alive = None, now

    def due(self) -> float:
        """When to look at the three below."""
        return min(self._ping_due(), self._look_due(), self._silence_due())

    def silent(self, now: float) -> bool:
        """Nothing was answered for longer than anybody should wait."""
        return now >= self._silence_due()

    @property
    def since(self) -> float:
        """From when silence counts: the last sign of life, or shortly before the question after a rest."""
        asked = math.inf if self._asked is None else self._asked
        return max(self._alive, asked - self._early)

    def ping(self, now: float) -> bool:
        """Whether to send a PING: to ask, and for the sake of NATs and idle timers."""
        if now < self._ping_due():
            return False
        self._last_ping = now
        self._gap *= 2
        return True

    def look(self, now: float) -> bool:
        """Whether to look for another local address."""
        if now < self._look_due():
            return False
        self._last_look = now
        return True

    def _ping_due(self) -> float:
        """Not while something is unanswered: QUIC repeats that by itself."""
        if self._asked is not None:
            return math.inf
        gap = self._gap if self._gap <= self._last_gap else math.inf
        if self._keepalive:  # often enough for both sides' idle timeouts
            gap = min(gap, self._keepalive, max(1.0, self._path.idle_timeout / 3))
        return max(self._figures.last_received, self._last_ping) + gap

    def _look_due(self) -> float:
        return max(self._figures.last_received, self._last_look) + _LOOK if self._client else math.inf

    def _silence_due(self) -> float:
        if not self._client or not self._limit or self._asked is None:
            return math.inf
        if self._path.probe_timeouts - self._probes + self._more < _PROBES:
            return math.inf
        return max(
            self.since + _WITHIN * self._limit, self._asked + _PROBE_TIMEOUTS * self._path.probe_timeout
        )
