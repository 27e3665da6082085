"""Delays between attempts: exponential, full jitter, capped, endless."""

from __future__ import annotations

from itertools import islice

import pytest

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.protocols import Duration


def test_the_upper_bound_doubles_up_to_the_cap() -> None:
    backoff = Backoff(min=Duration(1), max=Duration(10))
    assert list(islice(backoff.delays(lambda: 1.0), 6)) == [1, 2, 4, 8, 10, 10]


def test_jitter_is_full() -> None:
    """Any delay from 0 to the bound may come, so clients that fail together return apart."""
    backoff = Backoff(min=Duration(8), max=Duration(8))
    assert list(islice(backoff.delays(iter([0.0, 0.25, 0.5]).__next__), 3)) == [0, 2, 4]


def test_it_never_ends_and_never_overflows() -> None:
    delays = Backoff(factor=10).delays(lambda: 1.0)
    assert list(islice(delays, 5000, 5002)) == [60, 60]


def test_every_sequence_starts_afresh() -> None:
    backoff = Backoff()
    first = backoff.delays(lambda: 1.0)
    list(islice(first, 5))
    assert next(backoff.delays(lambda: 1.0)) == backoff.min


@pytest.mark.parametrize(
    "wrong",
    [{"min": 0.0}, {"max": -1.0}, {"factor": 0.5}, {"min": 10.0, "max": 5.0}],
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Backoff(**wrong)  # type: ignore[arg-type]
