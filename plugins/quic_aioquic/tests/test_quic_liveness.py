"""When a client asks whether its path is alive, and when it gives it up: by a clock of the test's own."""

from __future__ import annotations

import pytest

from tesaiot_connect_quic_aioquic.endpoint import Tuning
from tesaiot_connect_quic_aioquic.figures import Figures
from tesaiot_connect_quic_aioquic.liveness import Liveness

RTT = 0.05
IDLE = 45.0

WITHIN = 4.9
"""Seconds of silence after which a path with a timeout of 5 s is left."""


class Life:
    """A client's connection as `Liveness` sees it: what is sent is answered after `RTT`, while `alive`; what
    is not answered is repeated after each `probe_timeout`."""

    idle_timeout = IDLE

    def __init__(
        self,
        *,
        path_timeout: float = 5.0,
        keepalive: float = 15.0,
        probe_timeout: float = 0.1,
        client: bool = True,
    ) -> None:
        self.now = 0.0
        self.probe_timeout = probe_timeout
        self.probe_timeouts = 0
        self.acknowledged = -1
        self.waiting = False
        self.alive = True
        self.pings: list[float] = []
        self.packets = 0
        """Sent, both ways."""
        self.given_up: float | None = None
        self.figures = Figures(0.0)
        tuning = Tuning(
            place="",
            send_buffer=0,
            handshake_timeout=1,
            idle_timeout=IDLE,
            keepalive=keepalive,
            path_timeout=path_timeout,
        )
        self.liveness = Liveness(self, self.figures, tuning, client=client, clock=lambda: self.now)
        self._answer: float | None = None
        self._probe: float | None = None

    def exchange(self, *, received: bool = False) -> None:
        """The application writes something, or gets something."""
        self.liveness.active()
        self.packets += 1
        if received:
            self.figures.last_received = self.now
            self.liveness.heard(self.now)
        else:
            self._ask()

    def _ask(self) -> None:
        self.waiting = True
        self.liveness.sent(self.now)
        self._answer = self.now + RTT
        self._probe = self.now + self.probe_timeout

    def until(self, end: float) -> None:
        while self.given_up is None:
            times = [self.liveness.due(), self._answer if self.alive else None, self._probe]
            due = min(time for time in times if time is not None)
            if due > end:
                self.now = end
                return
            self.now = max(self.now, due)
            if self.alive and self._answer == due:
                self._answer = self._probe = None
                self.acknowledged += 1
                self.waiting = False
                self.packets += 1
                self.figures.last_received = self.now
                self.liveness.heard(self.now)
            elif self._probe == due:
                self.probe_timeouts += 1
                self._probe = self.now + self.probe_timeout
            elif self.liveness.silent(self.now):
                self.given_up = self.now
            else:
                self.liveness.look(self.now)
                if self.liveness.ping(self.now):
                    self.pings.append(self.now)
                    self.packets += 1
                    self._ask()

    def dies(self, *, within: float = 1000.0) -> float:
        """The path does; seconds until it is given up."""
        died, self.alive = self.now, False
        self.until(died + within)
        assert self.given_up is not None
        return self.given_up - died


def test_a_path_that_dies_in_use_is_left_within_its_timeout() -> None:
    life = Life()
    life.until(100)
    life.exchange()
    life.until(100.5)
    last = life.figures.last_received
    life.exchange()
    life.dies()
    assert life.given_up == pytest.approx(last + 5, abs=0.51)


@pytest.mark.parametrize("received", [True, False])
def test_who_just_wrote_or_received_counts_from_the_last_sign_of_life(received: bool) -> None:
    life = Life()
    life.until(100)
    life.exchange(received=received)
    life.until(100 + 2 * RTT)
    last = life.figures.last_received
    life.dies()
    assert life.given_up == pytest.approx(last + WITHIN)
    assert life.pings[-1] == pytest.approx(last + 1.25)


@pytest.mark.parametrize("rest", [20, 25, 30])
def test_who_rests_takes_its_keepalive_and_the_timeout_together(rest: float) -> None:
    life = Life()
    life.exchange()
    life.until(rest)
    assert life.dies() <= 15 + 5


def test_a_path_that_dies_in_one_direction_is_dead() -> None:
    """What the broker repeats still comes; what it says is that it hears nothing."""
    life = Life()
    life.until(100)
    life.exchange()
    life.alive = False
    for tenth in range(1, 200):
        life.until(100 + tenth / 10)
        if life.given_up is None:
            life.figures.last_received = life.now
            life.liveness.heard(life.now)
    assert life.given_up == pytest.approx(99 + WITHIN, abs=0.26)


def test_who_often_receives_a_little_is_asked_about_more_than_once() -> None:
    """As a subscriber of one device: whenever the path dies, that is noticed about as soon."""
    took = []
    for moment in (0.1, 1.0, 2.0, 3.0, 4.0, 5.9):
        life = Life()
        for second in range(0, 61, 6):
            life.until(second)
            life.exchange(received=True)
        life.until(60 + moment)
        took.append(life.dies())
    assert max(took) <= 5 + 5
    assert min(took) <= 5


def test_an_idle_connection_costs_a_ping_a_keepalive() -> None:
    life = Life()
    life.exchange()
    life.until(60)
    before = life.packets
    life.until(60 + 3600)
    assert life.packets - before <= 2 * 3600 / 15


def test_mqtts_own_pings_cost_one_of_ours() -> None:
    """PINGREQ and PINGRESP once a minute: after them there is one question, and then the keepalive's."""
    life = Life()
    for minute in range(60):
        life.until(60 * minute)
        life.exchange()
        life.exchange(received=True)
    assert len(life.pings) <= 60 * 4


def test_without_keepalive_who_rests_does_not_ask() -> None:
    life = Life(keepalive=0.0)
    life.exchange()
    life.until(3600)
    assert len(life.pings) == 1


def test_nothing_is_asked_before_the_application_spoke() -> None:
    life = Life(keepalive=0.0)
    life.until(3600)
    assert life.pings == []


@pytest.mark.parametrize(("probe_timeout", "least"), [(0.1, WITHIN - 1.25), (1.0, 4), (3.0, 12)])
def test_a_long_way_has_more_time(probe_timeout: float, least: float) -> None:
    """Four probe timeouts: the question and its repetitions have each had time for their answer."""
    life = Life(probe_timeout=probe_timeout)
    life.until(14)
    life.exchange()
    asked = life.now
    life.dies()
    assert life.given_up == pytest.approx(asked + least)


def test_a_process_that_stood_still_gives_nothing_up() -> None:
    """It has not asked again, so it cannot know."""
    life = Life()
    life.exchange()
    assert life.now == 0
    for still in (10.0, 100.0):
        assert not life.liveness.silent(still)
    life.probe_timeouts += 2
    assert life.liveness.silent(10.0)


def test_who_always_sends_need_not_have_repeated_anything() -> None:
    """Each packet puts the probe timeout off (RFC 9002 section 6.2.1) until the window is full."""
    life = Life()
    for number in range(520):
        life.now = number * 0.01
        life.liveness.sent(life.now, more=True)
        assert life.liveness.silent(life.now) == (life.now >= WITHIN)


def test_who_sends_once_after_he_stood_still_has_not_asked_often_enough() -> None:
    life = Life()
    life.exchange()
    life.liveness.sent(10.0, more=True)
    assert not life.liveness.silent(10.0)
    life.liveness.sent(10.05, more=True)
    assert not life.liveness.silent(10.05)
    life.liveness.sent(10.1, more=True)
    assert life.liveness.silent(10.1)


def test_a_new_address_has_a_time_of_its_own() -> None:
    life = Life()
    life.until(10)
    life.exchange()
    life.alive = False
    life.until(13)
    life.liveness.moved(13.0)
    life.until(1000)
    assert life.given_up == pytest.approx(13 + WITHIN - 1.25)


@pytest.mark.parametrize("client", [True, False])
def test_without_a_timeout_nothing_is_given_up(client: bool) -> None:
    life = Life(path_timeout=0.0 if client else 5.0, keepalive=0.0, client=client)
    life.exchange()
    life.alive = False
    life.until(1000)
    assert life.given_up is None
