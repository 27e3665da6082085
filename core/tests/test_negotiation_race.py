"""A race by itself, and with the memory that orders it: a model, and the cases that have names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tesaiot_connect.negotiation import memory
from tesaiot_connect.negotiation.race import PATIENCE, Command, Do, Lane, Race
from tesaiot_connect.testing import ManualClock

START, CANCEL, DISCARD, ABANDON = Do.START, Do.CANCEL, Do.DISCARD, Do.ABANDON


class Dials(RuleBasedStateMachine):
    """Dials one after the other over some endpoints, with whatever happens in between.

    The clock of the races and that of the memory are apart, as they are in life: the latter jumps.
    """

    @initialize(
        alone=st.lists(st.sampled_from([False, False, True]), min_size=1, max_size=4),
        delay=st.sampled_from([0.0, 0.2, 3.0]),
        penalty=st.sampled_from([1e-6, 300.0, memory.LONGEST]),
    )
    def endpoints(self, alone: list[bool], delay: float, penalty: float) -> None:
        self.alone, self.delay, self.penalty = alone, delay, penalty
        self.records = [memory.UNKNOWN] * len(alone)
        self.clock, self.wall = ManualClock(50.0), 1.7e9
        self.race: Race | None = None

    # --- one dial

    @precondition(lambda self: self.race is None or self.race.over)
    @rule(
        suspects=st.sets(st.integers(0, 3), max_size=2),
        later=st.sampled_from([-1e9, -60.0, 1.0, 61.0, 400.0, memory.LONGEST, 1e8]),
    )
    def dial(self, suspects: set[int], later: float) -> None:
        if self.race is not None:
            self.learn(self.race)
        self.wall = max(1.0, self.wall + later)
        self.suspects = suspects
        self.places = memory.order(self.records, self.wall, suspects)
        self.check_order()
        starts = [memory.head_start(self.records[place], self.delay) for place in self.places]
        assert all(0.5 * self.delay <= start <= 5 * self.delay for start in starts)
        self.lanes = [
            Lane(start, self.alone[place]) for start, place in zip(starts, self.places, strict=True)
        ]
        self.race = Race(self.lanes)
        self.started: dict[int, float] = {}
        self.running: set[int] = set()
        self.told_to_go: set[int] = set()
        self.failed_lanes: set[int] = set()
        self.open: set[int] = set()
        """Lanes whose connection somebody has to close."""
        self.first: int | None = None
        """Who succeeded first, before anybody cancelled."""
        self.cancelled = False
        self.decided_at: float | None = None
        self.obey(self.race.begin(self.clock()))
        assert list(self.started) == [0]

    def check_order(self) -> None:
        late = {
            place
            for place, record in enumerate(self.records)
            if place in self.suspects or memory.penalised(record, self.wall)
        }
        there = set(range(len(self.records)))
        assert self.places == [*sorted(there - late), *sorted(late)]

    def obey(self, commands: Sequence[Command]) -> None:
        for do, lane in commands:
            if do is START:
                assert self.first is None
                assert not self.cancelled
                assert lane == len(self.started), "in order, each once"
                assert not (self.running and (self.lanes[lane].alone or self.shares_with_a_loner()))
                self.started[lane] = self.clock()
                self.running.add(lane)
            elif do is CANCEL:
                assert lane in self.running
                assert lane not in self.told_to_go
                self.told_to_go.add(lane)
            elif do is DISCARD:
                self.open.remove(lane)
            else:
                assert self.decided_at is not None
                assert self.clock() >= self.decided_at + PATIENCE
                assert lane in self.told_to_go
                self.running.remove(lane)

    def shares_with_a_loner(self) -> bool:
        return any(self.lanes[lane].alone for lane in self.running)

    @precondition(lambda self: self.race is not None and self.running)
    @rule(data=st.data(), well=st.booleans())
    def end(self, data: st.DataObject, well: bool) -> None:
        lane = data.draw(st.sampled_from(sorted(self.running)))
        if well:
            self.succeed(lane)
        else:
            self.fail(lane)

    def succeed(self, lane: int) -> None:
        assert self.race is not None
        self.running.remove(lane)
        self.open.add(lane)
        if self.first is None and not self.cancelled:
            self.first, self.decided_at = lane, self.clock()
        self.obey(self.race.succeeded(lane, self.clock()))

    def fail(self, lane: int) -> None:
        assert self.race is not None
        self.running.remove(lane)
        if lane not in self.told_to_go:
            self.failed_lanes.add(lane)
        before = len(self.started)
        self.obey(self.race.failed(lane, self.clock()))
        if self.first is None and not self.cancelled and not self.running:
            assert len(self.started) == min(before + 1, len(self.lanes)), "the next one starts at once"

    @precondition(lambda self: self.race is not None)
    @rule()
    def cancel(self) -> None:
        assert self.race is not None
        if self.decided_at is None:
            self.decided_at = self.clock()
        self.cancelled = True
        self.obey(self.race.cancel(self.clock()))
        assert not self.open

    @precondition(lambda self: self.race is not None)
    @rule(seconds=st.one_of(st.none(), st.floats(0, 3)))
    def time_passes(self, seconds: float | None) -> None:
        """None: until there is something to do."""
        assert self.race is not None
        due = self.race.next_timeout()
        if seconds is None:
            seconds = 0.0 if due is None else max(0.0, due - self.clock())
        before = len(self.started), len(self.running)
        self.obey(self.race.handle_timeout(self.clock.advance(seconds)))
        purpose = due is not None and due <= self.clock()
        assert ((len(self.started), len(self.running)) != before) == purpose, "timeouts have a purpose"

    def learn(self, race: Race) -> None:
        """As the dialer does."""
        if race.winner is None:
            return
        winner = self.places[race.winner]
        against = {self.places[lane] for lane in self.failed_lanes | race.outrun}
        against |= {place for place in self.suspects if place < len(self.records)}
        for place in against - {winner}:
            before = self.records[place]
            after = memory.after_failure(before, self.wall, penalty=self.penalty, luck=0.999)
            self.records[place] = after
            assert memory.penalised(after, self.wall)
            assert not memory.trusted(after, self.wall, 0.2)
            assert after.penalty_until - self.wall <= 1.1 * memory.LONGEST + 1e-3
        self.records[winner] = memory.after_success(self.records[winner], self.wall, 0.1)
        assert not memory.penalised(self.records[winner], self.wall)
        assert memory.trusted(self.records[winner], self.wall, 0.2)

    # --- at any time

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        race = getattr(self, "race", None)
        if race is None:
            return
        assert race.running == self.running
        assert race.winner == (None if self.cancelled else self.first)
        assert self.open == (set() if race.winner is None else {race.winner}), "one connection at most"
        decided = self.first is not None or self.cancelled
        if decided:
            assert self.told_to_go >= self.running, "whoever lost knows"
        done = decided or len(self.started) == len(self.lanes)
        assert race.over == (done and not self.running), "it ends when nothing is left to happen"
        due = race.next_timeout()
        if decided:
            assert (due is not None) == bool(self.running)
        elif len(self.started) < len(self.lanes):
            assert self.running, "somebody will end, or time will pass"
            if due is None:
                assert self.shares_with_a_loner() or self.lanes[len(self.started)].alone
            else:
                newest = len(self.started) - 1
                assert due == self.started[newest] + self.lanes[newest].head_start

    def teardown(self) -> None:
        """Nobody says a word any more, except those that run alone and have to fail: it ends all the same."""
        race = getattr(self, "race", None)
        if race is None:
            return
        for _ in range(4 * len(self.lanes)):
            self.it_is_as_the_model_says()
            if race.over:
                return
            due = race.next_timeout()
            if due is not None:
                self.time_passes(None)
            else:
                self.fail(min(self.running))
        raise AssertionError("it does not end")


TestDials = Dials.TestCase
TestDials.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


def race_of(*lanes: float | str) -> Race:
    """A head start for each lane; "alone" has one of 1 s and shares with nobody."""
    return Race([Lane(1.0, alone=True) if lane == "alone" else Lane(float(lane)) for lane in lanes])


def start(*lanes: int) -> list[Command]:
    return [Command(START, lane) for lane in lanes]


def test_head_starts_run_one_after_the_other() -> None:
    race = race_of(0.2, 0.5, 9)
    assert race.begin(10) == start(0)
    assert race.next_timeout() == 10.2
    assert race.handle_timeout(10.1) == []
    assert race.handle_timeout(10.2) == start(1)
    assert race.next_timeout() == 10.7
    assert race.handle_timeout(10.7) == start(2)
    assert race.next_timeout() is None


def test_an_end_starts_the_next_at_once() -> None:
    race = race_of(0.2, 0.2, 0.2)
    race.begin(0)
    assert race.failed(0, 0.05) == start(1)
    assert race.next_timeout() == pytest.approx(0.25)
    assert race.failed(1, 0.06) == start(2)
    assert race.failed(2, 0.07) == []
    assert (race.over, race.winner) == (True, None)


def test_two_that_succeed_in_one_turn() -> None:
    race = race_of(0, 0)
    race.begin(0)
    race.handle_timeout(0)
    assert race.succeeded(1, 1) == [Command(CANCEL, 0)]
    assert race.succeeded(0, 1) == [Command(DISCARD, 0)]
    assert (race.over, race.winner) == (True, 1)


def test_without_a_head_start_nobody_is_outrun() -> None:
    race = race_of(0, 0)
    race.begin(0)
    race.handle_timeout(0)
    race.succeeded(1, 1)
    assert race.outrun == frozenset()


def test_outrun_is_who_had_its_head_start() -> None:
    race = race_of(0.2, 0.2, 0.2)
    race.begin(0)
    race.handle_timeout(0.2)
    assert race.failed(0, 0.3) == start(2)
    race.succeeded(2, 0.35)  # 1 had 0.15 s only
    assert race.outrun == frozenset()
    race = race_of(0.2, 0.2, 0.2)
    race.begin(0)
    race.handle_timeout(0.2)
    race.handle_timeout(0.4)
    race.succeeded(1, 0.9)
    assert race.outrun == {0}  # and not 2, which stands behind the winner


@pytest.mark.parametrize("how", ["failed", "succeeded"])
def test_cancelled_in_the_middle(how: str) -> None:
    race = race_of(0.2, 0.2, 0.2)
    race.begin(0)
    race.handle_timeout(0.2)
    assert race.cancel(0.3) == [Command(CANCEL, 0), Command(CANCEL, 1)]
    assert race.cancel(0.3) == []
    end: Callable[[int, float], list[Command]] = getattr(race, how)
    expected = [Command(DISCARD, 0)] if how == "succeeded" else []
    assert end(0, 0.4) == expected
    assert not race.over
    end(1, 0.4)
    assert (race.over, race.winner) == (True, None)


def test_cancelled_after_it_was_won_nobody_has_won() -> None:
    race = race_of(0.2, 0.2)
    race.begin(0)
    race.handle_timeout(0.2)
    race.succeeded(0, 0.3)
    assert race.cancel(0.3) == [Command(DISCARD, 0)]
    assert race.failed(1, 0.4) == []
    assert (race.over, race.winner) == (True, None)


def test_a_loser_that_does_not_end_is_waited_for_so_long_and_no_longer() -> None:
    race = race_of(0.2, 0.2)
    race.begin(0)
    race.handle_timeout(0.2)
    race.succeeded(1, 1.0)
    assert race.next_timeout() == 1.0 + PATIENCE
    assert race.handle_timeout(1.0 + PATIENCE) == [Command(ABANDON, 0)]
    assert (race.over, race.winner) == (True, 1)
    assert race.next_timeout() is None


def test_alone_and_first() -> None:
    race = race_of("alone", 0.2, 0.2)
    assert race.begin(0) == start(0)
    assert race.handle_timeout(100) == []
    assert race.failed(0, 100) == start(1)
    assert race.handle_timeout(100.2) == start(2)


def test_alone_and_in_the_middle() -> None:
    race = race_of(0.2, 0.2, "alone", 0.2)
    race.begin(0)
    race.handle_timeout(0.2)
    assert race.handle_timeout(0.4) == []
    assert race.next_timeout() is None
    assert race.failed(0, 1) == []
    assert race.failed(1, 2) == start(2)
    assert race.handle_timeout(100) == []
    assert race.failed(2, 100) == start(3)


def test_alone_and_last() -> None:
    race = race_of(0.2, "alone")
    race.begin(0)
    assert race.handle_timeout(0.2) == []
    assert race.failed(0, 5) == start(1)
    assert race.succeeded(1, 6) == []
    assert race.winner == 1


@pytest.mark.parametrize("call", ["succeeded", "failed"])
def test_who_does_not_run_cannot_end(call: str) -> None:
    race = race_of(0.2, 0.2)
    race.begin(0)
    with pytest.raises(ValueError, match="attempt 1 is not running"):
        getattr(race, call)(1, 0)
