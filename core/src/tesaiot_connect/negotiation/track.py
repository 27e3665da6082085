"""The tasks of one race: the asyncio half of `race`.

Owns: attempts as tasks, from their start to their end. Rules: whatever happens, nothing is left but the
winner's connection; what loses is closed before the winner is given out, so that one CONNECT at most is on
its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from ..dialing import Attempt
from ..errors import ConnectorError, Unsupported
from ..protocols import Connection
from .race import PATIENCE, Command, Do, Race

log = logging.getLogger(__name__)

Begin = Callable[[int], Awaitable[Connection]]
"""Makes the attempt of a lane. Raises ConnectorError."""
_GIVEN_UP = "it was given up"
_LATE = "another endpoint was there first"


class Track:
    """One race, run once. `names` are the endpoints of the lanes.

    `stragglers` has the attempts that do not end though they were cancelled; they leave it when they do.
    """

    def __init__(
        self, race: Race, names: Sequence[str], begin: Begin, stragglers: set[asyncio.Task[Connection]]
    ) -> None:
        self.errors: dict[int, ConnectorError] = {}
        """Of the lanes that failed."""
        self._race = race
        self._names = names
        self._begin = begin
        self._stragglers = stragglers
        self._tasks: dict[int, asyncio.Task[Connection]] = {}
        self._connections: dict[int, Connection] = {}
        self._began: dict[int, tuple[float, float]] = {}
        """Seconds since the epoch and of the monotonic clock."""
        self._outcomes: dict[int, Attempt] = {}
        self._broken: BaseException | None = None
        """From an attempt: what is no Exception, and ends whatever runs."""

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """In the order of their starts."""
        return tuple(self._outcomes[lane] for lane in self._began if lane in self._outcomes)

    def attempt(self, lane: int) -> Attempt | None:
        return self._outcomes.get(lane)

    async def run(self) -> Connection | None:
        """The winner's connection; None where all failed.

        Takes no longer to be cancelled than losers may take to end (`PATIENCE`).
        """
        try:
            self._obey(self._race.begin(self._now()))
            while not self._race.over:
                await self._turn()
                if self._broken is not None:
                    raise self._broken
        except BaseException:
            self._obey(self._race.cancel(self._now()))
            while not self._race.over:
                with contextlib.suppress(asyncio.CancelledError):  # the first one is on its way already
                    await self._turn()
            raise
        return None if self._race.winner is None else self._connections[self._race.winner]

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _turn(self) -> None:
        """Until something happens."""
        due = self._race.next_timeout()
        wait = None if due is None else max(0.0, due - self._now())
        await asyncio.wait(self._tasks.values(), timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        for lane, task in list(self._tasks.items()):
            if task.done():
                self._obey(self._ended(lane, task))
        self._obey(self._race.handle_timeout(self._now()))

    def _ended(self, lane: int, task: asyncio.Task[Connection]) -> list[Command]:
        """The race hears how an attempt went."""
        race, now = self._race, self._now()
        del self._tasks[lane]
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self._connections[lane] = task.result()
            if race.decided:
                self._lost(lane)
            else:
                self._note(lane, "won")
            return race.succeeded(lane, now)
        if isinstance(error, Unsupported):
            self._note(lane, "left out", error.what, error.fix)
        elif isinstance(error, ConnectorError) and not race.decided:
            self._note(lane, "failed", error.what, error.fix)
        else:
            self._lost(lane)
        if isinstance(error, ConnectorError):
            self.errors[lane] = error
        elif not isinstance(error, asyncio.CancelledError):
            self._broken = error
        return race.failed(lane, now)

    def _obey(self, commands: Sequence[Command]) -> None:
        for do, lane in commands:
            if do is Do.START:
                self._began[lane] = time.time(), time.monotonic()
                self._tasks[lane] = asyncio.create_task(
                    self._make(lane), name=f"attempt at {self._names[lane]}"
                )
            elif do is Do.CANCEL:
                self._tasks[lane].cancel()
            elif do is Do.DISCARD:
                self._connections.pop(lane).abort()
            else:
                self._abandon(lane)

    async def _make(self, lane: int) -> Connection:
        return await self._begin(lane)

    def _abandon(self, lane: int) -> None:
        self._lost(lane)
        log.error(
            "the attempt at %s was cancelled and has not ended within %g s: its transport is at fault; what "
            "it brings will be closed",
            self._names[lane],
            PATIENCE,
        )
        task = self._tasks.pop(lane)
        self._stragglers.add(task)
        task.add_done_callback(self._straggled)

    def _straggled(self, task: asyncio.Task[Connection]) -> None:
        self._stragglers.discard(task)
        if not task.cancelled() and task.exception() is None:
            task.result().abort()

    def _lost(self, lane: int) -> None:
        self._note(lane, "lost", _GIVEN_UP if self._race.winner is None else _LATE)

    def _note(
        self,
        lane: int,
        outcome: Literal["won", "lost", "failed", "left out"],
        reason: str = "",
        fix: str = "",
    ) -> None:
        began, started = self._began[lane]
        seconds = time.monotonic() - started
        self._outcomes[lane] = Attempt(self._names[lane], outcome, began, seconds, reason, fix)
