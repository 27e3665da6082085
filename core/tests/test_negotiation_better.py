"""The way back up: when a better endpoint is tried, and that nothing spins meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoints import Endpoint, opened, run, until

from tesaiot_connect.dialing import Dialed
from tesaiot_connect.errors import ConnectFailed, Unsupported
from tesaiot_connect.negotiation import NegotiationOptions, Negotiator, dialer as module
from tesaiot_connect.protocols import Duration
from tesaiot_connect.testing import ManualClock

Test = Callable[["Fallback"], Awaitable[None]]


class Fallback:
    """Connected by "b", since "a" failed."""

    def __init__(self, folder: Path | None = None, **options: Any) -> None:
        self.clock = ManualClock(1.7e9)
        self.a, self.b = Endpoint("a", ConnectFailed("it is off")), Endpoint("b")
        chosen = NegotiationOptions(memory=folder is not None, memory_folder=folder, **options)
        self.dialer = Negotiator([self.a, self.b], chosen, clock=self.clock)
        self.dialed = Dialed(None)  # type: ignore[arg-type]

    def run(self, test: Test) -> None:
        async def main() -> None:
            self.dialed = await self.dialer.dial()
            assert self.dialed.place == 1
            await test(self)

        run(main())

    def better(self) -> asyncio.Task[Dialed]:
        return asyncio.create_task(self.dialer.better(self.dialed))

    @property
    def due(self) -> float:
        due = self.dialer.better_after(self.dialed)
        assert due is not None
        return due


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.001)
    monkeypatch.setattr(module, "_PAUSE", 0.001)


async def end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def some_looks() -> None:
    for _ in range(10):
        await asyncio.sleep(0.002)


def test_it_waits_out_the_penalty_and_then_connects() -> None:
    async def test(world: Fallback) -> None:
        assert 269 <= world.due - world.clock() <= 331
        world.a.outcome = "connect"
        better = world.better()
        await some_looks()
        assert world.a.tries == 1
        world.clock.now = world.due
        found = await better
        assert (found.endpoint, found.place) == ("test://a:1", 0)
        assert [one.outcome for one in found.attempts] == ["won"]
        assert world.a.early[-1] == b""
        assert opened(world.a) == [found.connection]
        assert (await world.dialer.dial(early=b"x")).place == 0
        assert world.a.early[-1] == b"x", "it is trusted again"

    Fallback().run(test)


def test_a_failure_doubles_the_penalty() -> None:
    async def test(world: Fallback) -> None:
        better = world.better()
        for tries, penalty in ((2, 600), (3, 1200), (4, 2400)):
            world.clock.now = world.due
            await until(lambda tries=tries: world.a.tries == tries and world.due > world.clock())
            assert 0.89 * penalty <= world.due - world.clock() <= 1.11 * penalty
        await end(better)

    Fallback().run(test)


@pytest.mark.parametrize("case", ["upgrade is off", "the first", "it does not race"])
def test_there_is_nothing_better(case: str) -> None:
    async def test(world: Fallback) -> None:
        world.clock.advance(1e6)
        world.a.outcome = "connect"
        if case == "the first":
            world.dialed = await world.dialer.dial()
        elif case == "it does not race":
            world.a.races = False  # type: ignore[misc]
        tries = world.a.tries
        assert world.dialer.better_after(world.dialed) is None
        better = world.better()
        await some_looks()
        assert world.a.tries == tries
        await end(better)

    Fallback(upgrade=case != "upgrade is off").run(test)


def test_one_that_is_unable_is_not_asked_again() -> None:
    async def test(world: Fallback) -> None:
        world.clock.now = world.due
        world.a.outcome = Unsupported("it takes no client certificates")
        better = world.better()
        await until(lambda: world.dialer.better_after(world.dialed) is None)
        await some_looks()
        assert world.a.tries == 2
        await end(better)
        again = world.better()
        await some_looks()
        assert world.a.tries == 2
        await end(again)

    Fallback().run(test)


def test_the_nearest_of_several_is_tried_first() -> None:
    async def main() -> None:
        clock = ManualClock(1.7e9)
        a, b, c = Endpoint("a", ConnectFailed("x")), Endpoint("b", ConnectFailed("x")), Endpoint("c")
        dialer = Negotiator([a, b, c], NegotiationOptions(memory=False), clock=clock)
        dialed = await dialer.dial()
        clock.now = max(one.penalty_until for one in dialer.outlook())
        b.outcome = "connect"
        found = await dialer.better(dialed)
        assert (a.tries, found.place) == (2, 1), "both are due: the preferred one first"
        assert dialer.better_after(found) is not None
        better = asyncio.create_task(dialer.better(found))
        await some_looks()
        assert b.tries == 2, "it is no better than itself"
        await end(better)

    run(main())


def test_another_network_is_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: Fallback) -> None:
        where = world.dialer._store.network()
        monkeypatch.setattr(world.dialer._store, "network", lambda: where)
        world.a.outcome = "connect"
        better = world.better()
        await some_looks()
        assert world.a.tries == 1
        where = "f" * 32
        assert (await better).place == 0

    Fallback().run(test)


def test_what_another_process_learns_meanwhile_counts(tmp_path: Path) -> None:
    async def test(world: Fallback) -> None:
        better = world.better()
        await some_looks()
        other = Fallback(tmp_path)
        other.clock.now = world.due
        await other.dialer.dial()  # "a" fails there
        world.clock.now = other.clock()
        await some_looks()
        await until(lambda: world.due > world.clock())
        assert world.a.tries == 1
        await end(better)

    Fallback(tmp_path).run(test)


@pytest.mark.parametrize("seconds", [-1e8, 1e8, -3600.0])
def test_a_clock_that_jumps_makes_nothing_spin(seconds: float) -> None:
    async def test(world: Fallback) -> None:
        better = world.better()
        await some_looks()
        tries = 1 if seconds == -3600.0 else 2
        world.clock.now += seconds
        await until(lambda: world.a.tries == tries and world.due > world.clock())
        await some_looks()
        assert world.a.tries == tries
        assert world.due > world.clock()
        await end(better)

    Fallback().run(test)


def test_a_penalty_that_cannot_be_kept_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, and still holds what was known before."""

    async def test(world: Fallback) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tesaiot_connect.negotiation.store.write_private", full)
        world.clock.now = world.due
        better = world.better()
        await until(lambda: world.due > world.clock())
        await some_looks()
        assert world.a.tries == 2
        await end(better)

    Fallback(tmp_path).run(test)


def test_a_folder_that_somebody_keeps_empty_makes_nothing_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: Fallback) -> None:
        monkeypatch.setattr(world.dialer._store, "write", lambda *_: None)
        world.dialer._store._own.clear()
        monkeypatch.setattr(module, "_PAUSE", 600.0)
        better = world.better()
        for _ in range(500):
            await asyncio.sleep(0)
        assert world.a.tries == 2
        await end(better)

    Fallback().run(test)


def test_a_tiny_penalty_grows() -> None:
    """And the loop lives meanwhile, though attempts fail without waiting for anything."""

    async def test(world: Fallback) -> None:
        better = world.better()
        await until(lambda: world.due > time.time() + 0.02)
        assert world.a.tries < 40
        await end(better)

    world = Fallback(penalty=Duration(1e-9))
    world.dialer._clock = time.time
    world.run(test)


def test_cancelled_after_any_number_of_turns_it_leaves_nothing_behind() -> None:
    async def test(world: Fallback) -> None:
        world.clock.now = world.due
        world.a.outcome = "late"
        for turns in range(12):
            better = world.better()
            for _ in range(turns):
                await asyncio.sleep(0)
            await end(better)
            assert (world.a.trying, opened(world.a)) == (0, [])
        assert world.a.tries > 1

    Fallback().run(test)


def test_when_it_is_due_is_known_without_a_look_at_the_disk_or_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: Fallback) -> None:
        for name in ("network", "read", "write"):
            monkeypatch.delattr(type(world.dialer._store), name)
        assert world.due > world.clock()

    Fallback(tmp_path).run(test)


def test_while_it_waits_the_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: Fallback) -> None:
        reads = []
        read = world.dialer._store.read
        monkeypatch.setattr(world.dialer._store, "read", lambda *name: reads.append(name) or read(*name))
        better = world.better()
        await until(lambda: reads)
        await some_looks()
        assert len(reads) == 2  # one an endpoint
        await end(better)

    Fallback(tmp_path).run(test)
