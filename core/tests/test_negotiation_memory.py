"""What follows from what is remembered."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tesaiot_connect.negotiation import memory
from tesaiot_connect.negotiation.memory import LASTED, LATELY, LONGEST, UNKNOWN, Record

NOW = 1.7e9
EVEN = 0.5
"""Luck that spreads nothing."""


def failed(record: Record, now: float, *, penalty: float = 300.0, luck: float = EVEN) -> Record:
    return memory.after_failure(record, now, penalty=penalty, luck=luck)


def trusted(record: Record, now: float, delay: float = 0.2) -> bool:
    return memory.trusted(record, now, delay)


def test_penalties_double_up_to_a_longest() -> None:
    record, now, lengths = UNKNOWN, NOW, []
    for _ in range(80):
        record = failed(record, now)
        lengths.append(round(record.penalty_until - now))
        now = record.penalty_until
        assert not memory.penalised(record, now)
    assert lengths[:8] == [300, 600, 1200, 2400, 4800, 9600, 19200, LONGEST]
    assert set(lengths[7:]) == {LONGEST}


def test_one_failure_counts_for_a_penalty() -> None:
    """Many clients lose the same path at the same time."""
    record = failed(UNKNOWN, NOW)
    assert failed(record, NOW) is record
    assert failed(record, NOW + 299) is record
    assert failed(record, NOW + 301).failures == 2


def test_success_ends_the_penalty_and_counts_for_good_when_it_has_lasted() -> None:
    record = memory.after_success(failed(failed(UNKNOWN, NOW), NOW + 301), NOW + 400, 0.05)
    assert record.penalty_until == 0
    assert not memory.penalised(record, NOW + 400)
    assert failed(record, NOW + 400 + LASTED - 1).failures == 3
    assert failed(record, NOW + 400 + LASTED).failures == 1


def test_a_penalty_of_a_clock_that_ran_ahead_does_not_last() -> None:
    record = failed(UNKNOWN, NOW + 10 * 365 * 86400)
    assert not memory.penalised(record, NOW)
    assert failed(record, NOW).penalty_until == pytest.approx(NOW + 600)


def test_a_success_of_a_clock_that_ran_ahead_is_none_until_the_next() -> None:
    record = memory.after_success(UNKNOWN, NOW + 1e6, 0.1)
    assert not trusted(record, NOW)
    assert trusted(memory.after_success(failed(record, NOW), NOW, 0.1), NOW)


def test_trusted_is_who_worked_lately_and_did_not_fail_since() -> None:
    record = memory.after_success(UNKNOWN, NOW, 0.1)
    assert not trusted(UNKNOWN, NOW)
    assert trusted(record, NOW)
    assert trusted(record, NOW + LATELY - 1)
    assert not trusted(record, NOW + LATELY)
    assert not trusted(record, NOW, delay=0), "a rival starts at the same time"
    slow = memory.after_success(UNKNOWN, NOW, 1.01)
    assert not trusted(slow, NOW), "a rival starts before"
    assert trusted(slow, NOW, delay=0.3)
    lost = failed(record, NOW + 5)
    assert not trusted(lost, NOW + 6)
    assert not trusted(lost, lost.penalty_until + 1)  # it may be tried, and has to work first


@given(luck=st.floats(0, 1, exclude_max=True), penalty=st.floats(1, LONGEST))
def test_the_spread_is_a_tenth_each_way(luck: float, penalty: float) -> None:
    length = failed(UNKNOWN, NOW, penalty=penalty, luck=luck).penalty_until - NOW
    assert 0.899 * penalty <= length <= 1.101 * penalty
    assert memory.penalised(failed(UNKNOWN, NOW, penalty=penalty, luck=luck), NOW)


def test_order_is_that_of_preference_with_the_penalised_and_the_suspects_last() -> None:
    bad = failed(UNKNOWN, NOW)
    assert memory.order([UNKNOWN] * 3, NOW) == [0, 1, 2]
    assert memory.order([bad, UNKNOWN, bad, UNKNOWN], NOW) == [1, 3, 0, 2]
    assert memory.order([UNKNOWN, UNKNOWN, bad], NOW, {0}) == [1, 0, 2]
    assert memory.order([bad, bad], NOW, {0, 1}) == [0, 1]


def test_head_starts_follow_the_handshake_within_bounds() -> None:
    def after(handshake: float) -> float:
        return memory.head_start(memory.after_success(UNKNOWN, NOW, handshake), 0.2)

    assert memory.head_start(UNKNOWN, 0.2) == 0.2
    assert after(0.15) == pytest.approx(0.3)
    assert after(0.001) == pytest.approx(0.1)
    assert after(60) == pytest.approx(1.0)
    assert memory.head_start(memory.after_success(UNKNOWN, NOW, 60), 0) == 0


def test_what_is_shown_tells_of_a_penalty_only_while_it_lasts() -> None:
    record = memory.after_failure(
        memory.after_success(UNKNOWN, NOW, 0.05), NOW + 9, "lost", penalty=300, luck=EVEN
    )
    during = memory.outlook(record, NOW + 10, place=0, turn=1, delay=0.2, alone=False)
    assert (during.place, during.turn, during.penalty_until) == (0, 1, NOW + 309)
    assert (during.succeeded, during.handshake, during.head_start) == (NOW, 0.05, 0.1)
    assert "lost" in during.reason
    after = memory.outlook(record, NOW + 310, place=0, turn=0, delay=0.2, alone=True)
    assert (after.penalty_until, after.reason, after.alone) == (0, "", True)
