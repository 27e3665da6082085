"""A clock that stands still until it is told to move."""

from __future__ import annotations


class ManualClock:
    """Time in seconds. Call it to read it, so it fits wherever a clock function is taken."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Moves forward and returns the new time."""
        if seconds < 0:
            raise ValueError("a clock does not go backwards")
        self.now += seconds
        return self.now
