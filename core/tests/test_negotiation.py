"""Dialling over several endpoints: who is tried, who wins, what is left behind, and what is learned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoints import Endpoint, opened, run, until

from tesaiot_connect.dialing import Attempt, Dialed, Dialer, NegotiatingDialer
from tesaiot_connect.errors import ConnectFailed, ConnectorError, PathLost, Refused, Unsupported
from tesaiot_connect.negotiation import NegotiationOptions, Negotiator, race
from tesaiot_connect.protocols import ClientCertificate, Duration, Url
from tesaiot_connect.testing import ManualClock

NEVER = Duration(600.0)
"""A head start that no test waits for."""
AT_ONCE = Duration(0.0)


class World:
    """A folder and a clock; each dialer is a process that has started anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "memory"
        self.clock = ManualClock(1.7e9)

    def dialer(self, *endpoints: Endpoint, race_delay: Duration = NEVER, **more: Any) -> Negotiator:
        options = NegotiationOptions(race_delay=race_delay, memory_folder=self.folder)
        return Negotiator(endpoints, options, clock=self.clock, **more)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def down(what: str = "it is off", fix: str = "") -> ConnectFailed:
    return ConnectFailed(what, fix=fix)


def outcomes(attempts: tuple[Attempt, ...]) -> list[tuple[str, str]]:
    return [(attempt.endpoint[7:].removesuffix(":1"), attempt.outcome) for attempt in attempts]


def penalised(dialer: Negotiator) -> set[int]:
    return {one.place for one in dialer.outlook() if one.penalty_until}


# --- who wins -----------------------------------------------------------------------------


def test_the_first_that_connects_wins_and_a_failure_starts_the_next_at_once(world: World) -> None:
    endpoints = [Endpoint("a", down(fix="switch it on")), Endpoint("b"), Endpoint("c")]
    identity = ClientCertificate("cert", "key")
    dialed = run(world.dialer(*endpoints).dial(identity=identity))
    assert dialed.connection is endpoints[1].connections[0]
    assert (dialed.endpoint, dialed.place) == ("test://b:1", 1)
    assert outcomes(dialed.attempts) == [("a", "failed"), ("b", "won")]
    first = dialed.attempts[0]
    assert (first.reason, first.fix) == ("it is off", "switch it on")
    assert first.began > 0
    assert [one.tries for one in endpoints] == [1, 1, 0]
    assert endpoints[1].identities == [identity]


def test_a_slow_one_is_overtaken_and_closed(world: World) -> None:
    a, b = Endpoint("a", "hang"), Endpoint("b")
    dialed = run(world.dialer(a, b, race_delay=Duration(0.001)).dial())
    assert outcomes(dialed.attempts) == [("a", "lost"), ("b", "won")]
    assert "another endpoint" in dialed.attempts[0].reason
    assert a.trying == 0
    assert opened(a, b) == [dialed.connection]


def test_two_that_connect_in_one_turn_of_the_loop(world: World) -> None:
    async def main() -> None:
        go = asyncio.Event()
        a, b = Endpoint("a", go), Endpoint("b", go)
        dialing = asyncio.create_task(world.dialer(a, b, race_delay=AT_ONCE).dial())
        await b.began.wait()
        go.set()
        dialed = await dialing
        assert len(a.connections) + len(b.connections) == 2
        assert opened(a, b) == [dialed.connection]
        assert sorted(outcome for _, outcome in outcomes(dialed.attempts)) == ["lost", "won"]

    run(main())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_that_does_not_race_is_tried_alone(world: World, place: int) -> None:
    async def main() -> None:
        endpoints = [Endpoint(host, "hang") for host in "abc"]
        endpoints[place].races = False  # type: ignore[misc]
        together = []

        def watch() -> bool:
            together.append({one.url.host for one in endpoints if one.trying})
            return all(one.began.is_set() for one in endpoints)

        dialer = world.dialer(*endpoints, race_delay=AT_ONCE, timeout=0.02)
        dialing = asyncio.create_task(dialer.dial())
        await until(watch)
        alone = endpoints[place].url.host
        assert all(hosts in ({alone}, hosts - {alone}) for hosts in together)
        with pytest.raises(ConnectFailed):
            await dialing

    run(main())


def test_one_that_is_unable_is_left_out_with_its_reason(world: World) -> None:
    a = Endpoint("a", Unsupported("it takes no client certificates", fix="use b"))
    absent = Attempt("quic://c", "left out", reason="its plugin is missing")
    dialer = world.dialer(a, Endpoint("b"), left_out=[absent])
    dialed = run(dialer.dial())
    left_out, won, last = dialed.attempts
    assert (left_out.outcome, left_out.reason, left_out.fix) == (
        "left out",
        "it takes no client certificates",
        "use b",
    )
    assert (won.outcome, last) == ("won", absent)
    assert not penalised(dialer)
    assert dialer.better_after(dialed) is None


# --- what is said when nobody wins ----------------------------------------------------------


def test_all_reasons_are_told(world: World) -> None:
    dialer = world.dialer(
        Endpoint("a", down("it is off", "switch it on")), Endpoint("b", down("no route", "check the cable"))
    )
    with pytest.raises(ConnectFailed) as failed:
        run(dialer.dial())
    for part in ("test://a:1: it is off", "test://b:1: no route", "switch it on", "check the cable"):
        assert part in str(failed.value)
    assert outcomes(failed.value.attempts) == [("a", "failed"), ("b", "failed")]
    assert not penalised(dialer), "it says nothing about either"


def test_an_endpoint_is_named_once(world: World) -> None:
    dialer = world.dialer(Endpoint("a", down("test://a:1 is off")), Endpoint("b", down("no route")))
    with pytest.raises(ConnectFailed) as failed:
        run(dialer.dial())
    assert failed.value.what.endswith(": (1) test://a:1 is off; (2) test://b:1: no route")


def test_one_endpoint_speaks_for_itself(world: World) -> None:
    refused = Refused("bad credentials", permanent=True)
    with pytest.raises(Refused) as failed:
        run(world.dialer(Endpoint("a", refused)).connect())
    assert failed.value is refused
    assert outcomes(refused.attempts) == [("a", "failed")]


def test_refused_for_good_by_all_that_took_part_is_for_good(world: World) -> None:
    banned = [Endpoint(host, Refused("banned", permanent=True)) for host in "ab"]
    with pytest.raises(Refused) as failed:
        run(world.dialer(*banned, Endpoint("c", Unsupported("it cannot"))).dial())
    assert failed.value.permanent
    assert len(failed.value.attempts) == 3
    with pytest.raises(ConnectFailed):
        run(world.dialer(*banned, Endpoint("c", down())).dial())


def test_an_endpoint_that_hangs_is_left_behind(world: World) -> None:
    dialed = run(world.dialer(Endpoint("a", "hang"), Endpoint("b"), timeout=0.01).dial())
    assert "within 0.01 s" in dialed.attempts[0].reason
    assert dialed.attempts[0].fix


@pytest.mark.parametrize("error", [KeyError("oops"), TimeoutError(), asyncio.CancelledError()])
def test_a_broken_transport_does_not_hide_the_next(
    world: World, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    dialed = run(world.dialer(Endpoint("a", error), Endpoint("b")).dial())
    assert "test://a:1 failed in an unexpected way" in caplog.text
    assert "unexpected" in dialed.attempts[0].reason
    with pytest.raises(ConnectFailed, match="unexpected"):
        run(world.dialer(Endpoint("a", error)).dial())


def test_no_endpoints_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Negotiator([])


def test_what_is_no_transport_is_a_mistake() -> None:
    class Bare:
        async def connect(self, **how: Any) -> Any:
            raise AssertionError

    class Unsure(Bare):
        races = None

    for wrong, told in (
        (Bare(), "Bare lacks `races`"),
        (Unsure(), "Unsure lacks `races`"),
        (Endpoint, "is no transport: give a recipe"),
        ("mqtt://a", "is no transport"),
    ):
        with pytest.raises(TypeError, match=told):
            Negotiator([Endpoint("a"), wrong])  # type: ignore[list-item]


def test_it_is_a_dialer(world: World) -> None:
    dialer: Dialer = world.dialer(Endpoint("a"))
    assert isinstance(dialer, NegotiatingDialer)


# --- what is left behind --------------------------------------------------------------------


class Panic(BaseException):
    """As extensions in other languages raise it."""


@pytest.mark.parametrize("error", [Panic(), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_exception_ends_everything(world: World, error: BaseException) -> None:
    a, b, c = Endpoint("a", "hang"), Endpoint("b", error), Endpoint("c", "late")
    with pytest.raises(type(error)):
        asyncio.run(world.dialer(a, c, b, race_delay=AT_ONCE).dial())
    assert (a.trying, b.tries, c.trying) == (0, 1, 0)
    assert not opened(a, b, c)


CASES: dict[str, Callable[[], list[Endpoint]]] = {
    "one": lambda: [Endpoint("a")],
    "none answers": lambda: [Endpoint("a", "hang"), Endpoint("b", "hang")],
    "the second wins": lambda: [Endpoint("a", "hang"), Endpoint("b"), Endpoint("c", "late")],
    "all win": lambda: [Endpoint("a"), Endpoint("b"), Endpoint("c")],
    "failures": lambda: [Endpoint("a", down()), Endpoint("b", KeyError()), Endpoint("c")],
    "late ones": lambda: [Endpoint("a", "late"), Endpoint("b", "late")],
    "alone": lambda: [Endpoint("a", down(), races=False), Endpoint("b", races=False)],
}


@pytest.mark.parametrize("case", CASES)
def test_cancelled_after_any_number_of_turns_it_leaves_nothing_behind(world: World, case: str) -> None:
    async def dial(turns: int) -> bool:
        """Whether it was cancelled in time."""
        endpoints = CASES[case]()
        dialing = asyncio.create_task(world.dialer(*endpoints, race_delay=AT_ONCE).dial())
        for _ in range(turns):
            await asyncio.sleep(0)
        dialing.cancel()
        try:
            dialed = await dialing
        except asyncio.CancelledError:
            assert opened(*endpoints) == []
            return True
        finally:
            assert [one.trying for one in endpoints] == [0] * len(endpoints)
        assert opened(*endpoints) == [dialed.connection]
        return False

    cancelled = [run(dial(turns)) for turns in range(25)]
    assert True in cancelled
    if "a" not in case:
        assert False in cancelled


def test_cancelled_again_while_losers_end_it_still_waits_for_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "PATIENCE", 1000.0)

    async def main() -> None:
        a, b = Endpoint("a", "slow to go"), Endpoint("b", "late")
        dialing = asyncio.create_task(world.dialer(a, b, race_delay=AT_ONCE).dial())
        await b.began.wait()
        for _ in range(3):
            dialing.cancel()
            await asyncio.wait([dialing], timeout=0.001)
        assert not dialing.done()
        a.release.set()
        await asyncio.wait([dialing])
        assert dialing.cancelled()
        assert (a.trying, b.trying, opened(a, b)) == (0, 0, [])

    run(main())


def test_the_winner_is_given_out_when_the_losers_have_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "PATIENCE", 1000.0)

    async def main() -> None:
        a, b = Endpoint("a", "slow to go"), Endpoint("b")
        dialing = asyncio.create_task(world.dialer(a, b, race_delay=AT_ONCE).dial())
        await until(lambda: b.connections)
        await asyncio.wait([dialing], timeout=0.001)
        assert not dialing.done()
        a.release.set()
        assert (await dialing).place == 1

    run(main())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_loser_that_does_not_go_holds_nobody_up(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cancelled: bool
) -> None:
    monkeypatch.setattr(race, "PATIENCE", 0.01)

    async def main() -> None:
        a, b = Endpoint("a", "deaf"), Endpoint("b", "hang" if cancelled else "connect")
        dialer = world.dialer(a, b, race_delay=AT_ONCE)
        dialing = asyncio.create_task(dialer.dial())
        await b.began.wait()
        if cancelled:
            dialing.cancel()
            await asyncio.wait([dialing])
            assert dialing.cancelled()
        else:
            assert (await dialing).place == 1
        assert "test://a:1 was cancelled and has not ended" in caplog.text
        a.release.set()
        await until(lambda: a.connections and not a.open)
        await until(lambda: len(asyncio.all_tasks()) == 1)

    run(main())


# --- what is learned ------------------------------------------------------------------------


def test_one_endpoint_needs_no_memory(world: World) -> None:
    dialer = world.dialer(Endpoint("a"))
    dialed = run(dialer.dial(early=b"hello"))
    dialer.lost(dialed, PathLost("silence"))
    run(dialer.dial())
    assert [one.reason for one in dialer.outlook()] == [""]
    assert not world.folder.exists()


def test_who_failed_is_tried_last_the_next_time_also_by_another_process(world: World) -> None:
    a, b = Endpoint("a", down()), Endpoint("b")
    run(world.dialer(a, b).dial())
    again = world.dialer(a, b)
    assert outcomes(run(again.dial()).attempts) == [("b", "won")]
    first, last = again.outlook()
    assert (first.place, last.place) == (1, 0)
    assert 269 <= last.penalty_until - world.clock() <= 331
    assert "failed" in last.reason
    world.clock.advance(331)
    assert outcomes(run(again.dial()).attempts) == [("a", "failed"), ("b", "won")]
    assert 539 <= again.outlook()[1].penalty_until - world.clock() <= 661


def test_the_log_says_why_a_preferred_one_was_not_tried(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tesaiot_connect.negotiation")
    a, b = Endpoint("a", down()), Endpoint("b")
    run(world.dialer(a, b).dial())
    assert caplog.messages == [f"{a.url} is not tried first for the next {seconds(caplog)} s: it is off"]
    caplog.clear()
    run(world.dialer(a, b).dial())
    assert caplog.messages == [f"{a.url} was not tried, because it failed while another endpoint worked"]
    caplog.clear()
    world.clock.advance(1e5)
    a.outcome = "connect"
    run(world.dialer(a, b).dial())
    assert caplog.messages == []


def seconds(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.messages[0].partition(" next ")[2].partition(" s:")[0]


def test_who_was_outrun_is_tried_last_the_next_time(world: World) -> None:
    dialer = world.dialer(Endpoint("a", "hang"), Endpoint("b"), race_delay=Duration(0.001))
    run(dialer.dial())
    (known,) = [one for one in dialer.outlook() if one.place == 0]
    assert known.penalty_until
    assert "not answered" in known.reason


def test_nobody_loses_by_a_head_start_that_nobody_has(world: World) -> None:
    dialer = world.dialer(Endpoint("a", "hang"), Endpoint("b"), race_delay=AT_ONCE)
    dialed = run(dialer.dial())
    assert not penalised(dialer)
    assert dialer.better_after(dialed) == world.clock()


def test_early_data_goes_to_one_that_worked_lately_and_comes_first(world: World) -> None:
    a, b = Endpoint("a"), Endpoint("b")
    run(world.dialer(a, b).dial(early=b"CONNECT"))
    run(world.dialer(a, b).dial(early=b"CONNECT"))
    assert (a.early, b.early) == ([b"", b"CONNECT"], [])
    a.outcome = down()
    run(world.dialer(a, b).dial(early=b"CONNECT"))
    assert (a.early[-1], b.early) == (b"CONNECT", [b""]), "a rival gets none"
    run(world.dialer(a, b).dial(early=b"CONNECT"))
    assert b.early[-1] == b"CONNECT", "now this one is trusted"
    world.clock.advance(8 * 86400)
    a.outcome = "connect"
    run(world.dialer(a, b).dial(early=b"CONNECT"))
    assert a.early[-1] == b""


def test_alone_an_endpoint_gets_early_data_always(world: World) -> None:
    a = Endpoint("a")
    run(world.dialer(a).dial(early=b"CONNECT"))
    assert a.early == [b"CONNECT"]


def test_a_lost_path_goes_last_and_is_punished_when_another_works(world: World) -> None:
    a, b = Endpoint("a"), Endpoint("b")
    dialer = world.dialer(a, b)
    dialer.lost(run(dialer.dial()), PathLost("silence"))
    dialed = run(dialer.dial(early=b"CONNECT"))
    assert outcomes(dialed.attempts) == [("b", "won")]
    assert b.early == [b""]
    assert dialer.outlook()[1].reason == "a connection by it was lost while another endpoint worked"


@pytest.mark.parametrize("wins", ["nobody", "itself"])
def test_a_lost_path_is_forgiven(world: World, wins: str) -> None:
    a, b = Endpoint("a"), Endpoint("b", down())
    dialer = world.dialer(a, b)
    dialer.lost(run(dialer.dial()), PathLost("silence"))
    if wins == "nobody":
        a.outcome = down()
        with pytest.raises(ConnectorError):
            run(dialer.dial())
        a.outcome = "connect"
    else:
        run(dialer.dial())
        assert a.early[-1] == b""
    assert dialer.outlook()[0].place == 0
    assert 0 not in penalised(dialer)
    assert run(dialer.dial()).place == 0


def test_many_that_lose_the_same_path_at_once_count_once(world: World) -> None:
    """Clients that share a dialer, and processes that share the folder."""

    async def main() -> None:
        a, b = Endpoint("a"), Endpoint("b")
        dialers = [world.dialer(a, b) for _ in range(3)]
        dialed = [(dialer, await dialer.dial()) for dialer in dialers for _ in range(2)]
        for dialer, one in dialed:
            dialer.lost(one, PathLost("silence"))
        places = [one.place for one in await asyncio.gather(*(dialer.dial() for dialer, _ in dialed))]
        assert places == [1] * 6
        (known,) = [one for one in dialers[0].outlook() if one.place == 0]
        assert known.penalty_until - world.clock() <= 331

    run(main())


def test_what_others_learned_during_a_race_is_not_undone_by_it(world: World) -> None:
    """They know of two failures; ours, which began before, is not a first one."""

    async def main() -> None:
        gate = asyncio.Event()
        slow = Endpoint("b", gate)
        dialling = asyncio.create_task(
            world.dialer(Endpoint("a", "hang"), slow, race_delay=Duration(0.001)).dial()
        )
        await slow.began.wait()
        other = world.dialer(Endpoint("a", down()), Endpoint("b"))
        await other.dial()
        world.clock.advance(400.0)
        await other.dial()
        known = {one.place: (one.penalty_until, one.reason) for one in other.outlook()}
        assert known[0][0] > world.clock() + 500.0
        gate.set()
        assert (await dialling).place == 1
        assert {one.place: (one.penalty_until, one.reason) for one in other.outlook()} == known

    run(main())


def test_a_dial_that_is_cancelled_leaves_the_suspicion(world: World) -> None:
    async def main() -> None:
        a, b = Endpoint("a"), Endpoint("b", "hang")
        dialer = world.dialer(a, b)
        dialer.lost(await dialer.dial(), PathLost("silence"))
        dialing = asyncio.create_task(dialer.dial())
        await b.began.wait()
        dialing.cancel()
        await asyncio.wait([dialing])
        b.outcome = "connect"
        assert (await dialer.dial()).place == 1
        assert penalised(dialer) == {0}

    run(main())


def test_what_happened_while_the_network_changed_says_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        go = asyncio.Event()
        dialer = world.dialer(Endpoint("a", down()), Endpoint("b", go))
        where = "0" * 32
        monkeypatch.setattr(dialer._store, "network", lambda: where)
        dialing = asyncio.create_task(dialer.dial())
        await asyncio.sleep(0)
        where = "1" * 32
        go.set()
        assert (await dialing).place == 1
        assert not penalised(dialer)
        where = "0" * 32
        assert not penalised(dialer)
        await dialer.dial()
        assert penalised(dialer) == {0}
        where = "2" * 32
        assert not penalised(dialer), "another network, another story"

    run(main())


def test_who_moves_to_another_network_holds_nothing_against_the_old_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        dialer = world.dialer(Endpoint("a"), Endpoint("b"))
        where = "0" * 32
        monkeypatch.setattr(dialer._store, "network", lambda: where)
        first = await dialer.dial()
        where = "1" * 32
        dialer.lost(first, PathLost("silence"))
        assert (await dialer.dial()).place == 0
        assert not penalised(dialer)

    run(main())


def test_what_takes_a_while_to_import_is_loaded_before_the_head_start(world: World) -> None:
    class Lazy(Endpoint):
        loads: list[str]

        def load(self) -> None:
            self.loads.append("late" if self.began.is_set() else "before it began")

    async def main() -> None:
        one = Lazy("a")
        one.loads = []
        await world.dialer(one, Endpoint("b")).dial()
        assert one.loads == ["before it began"]

    run(main())


def test_endpoints_that_differ_in_what_is_not_shown_are_remembered_apart(world: World) -> None:
    async def main() -> None:
        one, other = Endpoint("a", down()), Endpoint("a")
        one.url, other.url = Url.parse("test://a/x?t=1"), Url.parse("test://a/x?t=2")
        dialer = world.dialer(one, other)
        assert (await dialer.dial()).place == 1
        assert penalised(dialer) == {0}

    run(main())


def test_one_url_may_have_several_implementations(world: World) -> None:
    class Another(Endpoint):
        pass

    dialer = world.dialer(Endpoint("a", down()), Another("a"))
    assert run(dialer.dial()).place == 1
    assert penalised(dialer) == {0}


def test_what_cannot_be_kept_costs_no_connection(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.folder.write_text("a file in its place")
    a, b = Endpoint("a", down()), Endpoint("b")
    dialer = world.dialer(a, b)
    for _ in range(3):
        dialed: Dialed = run(dialer.dial())
        assert dialed.place == 1
    assert a.tries == 1, "this process knows it"
    assert caplog.text.count("cannot be kept") == 1
