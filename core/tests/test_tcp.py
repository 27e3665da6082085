"""The race of addresses: order, head starts, and no socket left but the winner's."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import Any

import pytest

from tesaiot_connect.tcp import Address, alternate, race

V4, V6 = socket.AF_INET, socket.AF_INET6


def test_families_take_turns() -> None:
    found: list[Address] = [(V6, "a"), (V6, "b"), (V4, "c"), (V4, "d"), (V4, "e")]
    assert alternate(found) == [(V6, "a"), (V4, "c"), (V6, "b"), (V4, "d"), (V4, "e")]
    assert alternate([]) == []


class Addresses:
    """Fake addresses that connect when told; every socket they made is known."""

    def __init__(self, **plans: Any) -> None:
        self.plans = plans
        self.started: list[str] = []
        self.sockets: dict[str, socket.socket] = {}

    @property
    def all(self) -> list[Address]:
        return [(V4, name) for name in self.plans]

    async def connect(self, address: Address) -> socket.socket:
        name, plan = address[1], self.plans[address[1]]
        self.started.append(name)
        if isinstance(plan, Exception):
            raise plan
        if plan is not None:
            await plan.wait()
        sock = self.sockets[name] = socket.socket()
        return sock

    async def race(self, delay: float) -> socket.socket:
        attempts = [partial(self.connect, address) for address in self.all]
        return await race(attempts, delay, failure=OSError, discard=socket.socket.close)

    def check(self, winner: socket.socket | None) -> None:
        for sock in self.sockets.values():
            assert (sock is winner) == (sock.fileno() >= 0), "a loser was left open"
        if winner is not None:
            winner.close()


def test_the_first_address_wins_without_the_others() -> None:
    addresses = Addresses(a=None, b=None)
    addresses.check(asyncio.run(addresses.race(3600)))
    assert addresses.started == ["a"]


def test_a_failure_starts_the_next_at_once() -> None:
    addresses = Addresses(a=OSError("no"), b=OSError("no"), c=None)
    addresses.check(asyncio.run(addresses.race(3600)))
    assert addresses.started == ["a", "b", "c"]


def test_silence_starts_the_next_after_the_delay() -> None:
    async def main() -> None:
        addresses = Addresses(a=asyncio.Event(), b=None)
        winner = await addresses.race(0.001)
        assert winner is addresses.sockets["b"]
        addresses.check(winner)

    asyncio.run(main())


def test_two_winners_at_once() -> None:
    async def main() -> None:
        go = asyncio.Event()
        addresses = Addresses(a=go, b=go, c=go)
        racing = asyncio.create_task(addresses.race(0.001))
        while len(addresses.started) < 3:
            await asyncio.sleep(0)
        go.set()
        addresses.check(await racing)
        assert len(addresses.sockets) == 3

    asyncio.run(main())


def test_all_fail() -> None:
    addresses = Addresses(a=OSError("first"), b=OSError("second"))
    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(addresses.race(3600))
    assert [str(error) for error in failed.value.exceptions] == ["first", "second"]


def test_a_bug_is_not_hidden() -> None:
    addresses = Addresses(a=KeyError("bug"), b=None)
    with pytest.raises(KeyError):
        asyncio.run(addresses.race(3600))


def test_cancelled_it_leaves_nothing() -> None:
    async def main() -> None:
        go = asyncio.Event()
        addresses = Addresses(a=go, b=go)
        racing = asyncio.create_task(addresses.race(0.001))
        while len(addresses.started) < 2:
            await asyncio.sleep(0)
        go.set()
        await asyncio.sleep(0)
        racing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await racing
        addresses.check(None)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
