"""How long to wait before trying again.

Owns: the delays between retries. Rule: exponential with full jitter and a cap, so that a
thousand clients that lost the same broker do not come back in the same instant.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from .protocols import Duration


def _positive(_instance: Any, field: attrs.Attribute[Any], value: float) -> None:
    if value <= 0:
        raise ValueError(f"{field.name} must be more than 0, not {value}")


@attrs.frozen(kw_only=True)
class Backoff:
    """A recipe for delays: the n-th is between 0 and `min * factor ** n`, capped at `max`."""

    min: Duration = attrs.field(
        default=Duration(0.5),
        validator=_positive,
        metadata={"help": "Upper bound of the first delay."},
    )
    max: Duration = attrs.field(
        default=Duration(60.0),
        validator=_positive,
        metadata={"help": "Upper bound of every delay."},
    )
    factor: float = attrs.field(
        default=2.0, metadata={"help": "How much the upper bound grows with each delay."}
    )

    @factor.validator
    def _grows(self, _field: object, value: float) -> None:
        if value < 1:
            raise ValueError(f"factor must be at least 1, not {value}")

    def __attrs_post_init__(self) -> None:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must not be less than min ({self.min})")

    def delays(self, rng: Callable[[], float] = random.random) -> Iterator[float]:
        """Seconds to wait before each further attempt, for ever; ask again after a success.

        `rng` gives numbers in [0, 1).
        """
        bound = float(self.min)
        while True:
            yield rng() * bound
            bound = min(float(self.max), bound * self.factor)
