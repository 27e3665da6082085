"""Which attempts run: a race of endpoints, without I/O.

Owns: when an attempt starts, who wins, who has to go. Rules: the first that succeeds wins, and nobody else
does; whoever was started is heard of again, as `succeeded` or `failed`, or is abandoned, before the race is
over; a lane that is `alone` shares the track with nobody. Time is an argument, in seconds of any one clock.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import attrs

PATIENCE = 2.0
"""Seconds that cancelled attempts have to end. They end at once: this bounds those of a broken transport."""


@attrs.frozen
class Lane:
    """One endpoint's part. `head_start` is the time until the next one starts, in seconds."""

    head_start: float
    alone: bool = False
    """What stands behind it waits until it has failed, and it until what stands before it has."""


class Do(enum.Enum):
    """What the owner of the race is to do with an attempt."""

    START = "start"
    CANCEL = "cancel"
    """Give it up, and tell of its end."""
    DISCARD = "discard"
    """Close what it brought: nobody wants it any more."""
    ABANDON = "abandon"
    """It does not end: wait no longer, and close what it may bring yet."""


class Command(NamedTuple):
    do: Do
    lane: int


class Race:
    """Inputs are the methods; each returns commands, which are to be carried out in their order.

    Call `begin` once, `handle_timeout` at `next_timeout`, and the others as attempts go. An attempt that was
    told to be cancelled may still succeed or fail first; after it was abandoned nothing is told of it.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.winner: int | None = None
        self.outrun: frozenset[int] = frozenset()
        """Lanes that stood before the winner's and had used up their head start when it won."""
        self._lanes = tuple(lanes)
        self._next = 0
        self._running: dict[int, float] = {}
        """Lanes whose attempt has not ended, and when it started."""
        self._due: float | None = None
        self._decided = False
        """Nobody starts any more: one has won, or the race was cancelled."""

    @property
    def running(self) -> frozenset[int]:
        """Attempts that were started and have not ended."""
        return frozenset(self._running)

    @property
    def decided(self) -> bool:
        """Whether one has won, or nobody wants the outcome any more."""
        return self._decided

    @property
    def over(self) -> bool:
        """Whether nothing runs and nothing will: `winner` is final, None where all failed."""
        return not self._running and (self._decided or not self._waiting)

    def begin(self, now: float) -> list[Command]:
        return self._go_on(now)

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`; None: not at all."""
        return self._due

    def handle_timeout(self, now: float) -> list[Command]:
        if self._due is None or now < self._due:
            return []
        if not self._decided:
            return self._go_on(now)
        left = [Command(Do.ABANDON, lane) for lane in self._running]
        self._running.clear()
        self._due = None
        return left

    def succeeded(self, lane: int, now: float) -> list[Command]:
        self._end(lane)
        if self._decided:
            return [Command(Do.DISCARD, lane)]
        self.winner = lane
        self.outrun = frozenset(
            one for one, since in self._running.items() if one < lane and self._used_up(one, now - since)
        )
        return self._decide(now)

    def failed(self, lane: int, now: float) -> list[Command]:
        """Or it was cancelled and has ended. The next one starts at once."""
        self._end(lane)
        return [] if self._decided else self._go_on(now)

    def cancel(self, now: float) -> list[Command]:
        """Nobody wants the outcome any more."""
        winner, self.winner = self.winner, None
        lost = [] if winner is None else [Command(Do.DISCARD, winner)]
        return lost if self._decided else self._decide(now)

    @property
    def _waiting(self) -> bool:
        return self._next < len(self._lanes)

    def _used_up(self, lane: int, time: float) -> bool:
        return time >= self._lanes[lane].head_start > 0

    def _end(self, lane: int) -> None:
        if self._running.pop(lane, None) is None:
            raise ValueError(f"attempt {lane} is not running")
        if not self._running and self._decided:
            self._due = None

    def _decide(self, now: float) -> list[Command]:
        self._decided = True
        self._due = now + PATIENCE if self._running else None
        return [Command(Do.CANCEL, lane) for lane in self._running]

    def _go_on(self, now: float) -> list[Command]:
        """Start the next one, unless an end has to bring that on."""
        self._due = None
        if not self._waiting:
            return []
        lane = self._next
        if self._running and self._alone(lane, *self._running):
            return []
        self._next += 1
        self._running[lane] = now
        if self._waiting and not self._alone(lane, self._next):
            self._due = now + self._lanes[lane].head_start
        return [Command(Do.START, lane)]

    def _alone(self, *lanes: int) -> bool:
        """Whether one of them must not run beside another."""
        return any(self._lanes[lane].alone for lane in lanes)
