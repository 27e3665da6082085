"""Negotiation on networks that fail, with a broker in a process of its own. Needs root: namespaces.

Client `cl` - NAT router `rt` - broker `sv`. The client publishes numbered QoS 1 messages all the time; what
matters is by which endpoint they go in the end, that all of them arrive, and how many CONNECTs that took.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from negotiated_ways import World, healed, inside, trip
from negotiation_scenarios import (
    ALL,
    NEVER,
    SCENARIOS,
    SOON,
    WATCHFUL,
    Scenario,
    drop,
    scheme,
    travel,
    udp_back,
    udp_dropped,
)
from netlab import Lab, require_namespaces

from tesaiot_connect import Client, ClientOptions, ConnectFailed, Duration
from tesaiot_connect.testing import Certificates

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require_namespaces()
    with Lab() as lab, World(lab, tmp_path_factory.mktemp("world"), certificates) as made:
        yield made


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_what_becomes_of_it(scenario: Scenario, world: World, tmp_path: Path) -> None:
    async def main() -> None:
        (await travel(world, scenario, tmp_path)).check(scenario)

    inside(world.lab, main())


def test_what_was_learned_on_one_network_counts_there_alone(world: World, tmp_path: Path) -> None:
    async def outcomes(race_delay: Duration) -> list[tuple[str, str]]:
        """Of a client that starts now, up to the winner."""
        async with trip(world, world.dialer(tmp_path, ALL, race_delay=race_delay)) as made:
            found = [(scheme(one.endpoint), one.outcome) for one in made.status.attempts]
        assert len(world.accepted(made.client_id)) == 1
        return found[: [outcome for _, outcome in found].index("won") + 1]

    async def main() -> None:
        drop(world.lab)
        assert await outcomes(SOON) == [("quic", "lost"), ("mqtts", "won")]
        assert await outcomes(NEVER) == [("mqtts", "won")], "QUIC comes last, and nobody is waited for"
        healed(world.lab)
        assert await outcomes(NEVER) == [("mqtts", "won")], "the penalty lasts"
        world.lab.move_client()
        assert await outcomes(NEVER) == [("quic", "won")], "another network, of which nothing is known"

    inside(world.lab, main())


def test_where_everything_fails_each_says_why_and_nothing_is_held_against_it(
    world: World, tmp_path: Path
) -> None:
    async def main() -> None:
        dialer = world.dialer(
            tmp_path, ("quic distrusted", "mqtts distrusted", "mqtts that stalls"), timeout=5.0
        )
        async with Client(dialer, ClientOptions(client_id="nobody")) as client:
            with pytest.raises(ConnectFailed) as caught:
                await client.connected(once=True)
            attempts = client.status.attempts
        assert [one.outcome for one in attempts] == ["failed"] * 3
        assert caught.value.attempts == attempts
        for one, why in zip(attempts, ("not from a trusted authority",) * 2 + ("within 5 s",), strict=True):
            assert why in one.reason
            assert one.reason in caught.value.what
            assert one.fix
        assert [one.turn for one in sorted(dialer.outlook(), key=lambda one: one.place)] == [0, 1, 2]
        assert not any(one.penalty_until for one in dialer.outlook())
        assert world.accepted("nobody") == []

    inside(world.lab, main())


def penalties(dialer: Any) -> list[float]:
    """Where the length of each penalty is put that it gives, in seconds, however long that takes."""
    found: list[float] = []
    now, clock, write = 0.0, dialer._clock, dialer._write

    def noted() -> float:
        nonlocal now
        now = clock()
        return now

    def written(place: int, record: Any) -> None:
        if record.penalty_until:
            found.append(record.penalty_until - now)
        write(place, record)

    dialer._clock, dialer._write = noted, written
    return found


def test_a_path_that_comes_and_goes_is_tried_less_and_less_often(world: World, tmp_path: Path) -> None:
    async def main() -> None:
        waits: list[float] = []
        dialer = world.dialer(tmp_path, ALL, race_delay=NEVER, penalty=Duration(0.2), quic=WATCHFUL)
        lengths = penalties(dialer)
        async with trip(world, dialer) as made:
            for _ in range(3):
                lengths.clear()
                await udp_dropped(made)
                assert made.status.better_after is not None
                waits.append(lengths[0])
                await udp_back(made)
            assert (made.status.connects, made.status.moves) == (7, 3)
        assert world.accepted(made.client_id) == ["quic_aioquic", *["tcp_tls", "quic_aioquic"] * 3]
        assert waits[2] > 1.5 * waits[1] > 2 * waits[0]

    inside(world.lab, main())
