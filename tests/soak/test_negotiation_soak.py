"""Negotiation under a network that never rests, and every scenario again over a path of 50 ms."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from negotiated_ways import LongLab, Trip, World, inside, trip
from negotiation_scenarios import ALL, SCENARIOS, cut, drop, narrow, reject, scheme, travel
from netlab import Lab
from relay import require_relay

from tesaiot_connect import Duration
from tesaiot_connect.testing import Certificates

TIMES = 3
EVENTS = 40
LONGEST = 2.0
"""Seconds a fault lasts."""

pytestmark = [pytest.mark.soak, pytest.mark.root]


def test_every_scenario_on_a_long_path(certificates: Certificates, tmp_path: Path) -> None:
    require_relay()
    with LongLab(0.025) as lab, World(lab, tmp_path, certificates) as world:
        for scenario in SCENARIOS:
            for number in range(TIMES):

                async def main(folder: Path = tmp_path / scenario.name / str(number)) -> None:
                    (await travel(world, scenario, folder)).check(scenario)  # noqa: B023

                inside(lab, main())


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm(seed: int, certificates: Certificates, tmp_path: Path) -> None:
    """Whatever comes: nothing is lost, and it ends on some connection that works."""
    require_relay()
    began = time.monotonic()
    chance = random.Random(seed)
    tcp = {"keepalive_idle": 1.0, "keepalive_interval": 1.0, "keepalive_count": 1}

    async def event(made: Trip, lab: Lab) -> None:
        faults: list[Callable[[Lab], None]] = [drop, reject, narrow, cut]
        match chance.choice(["fault", "fault", "address", "nat"]):
            case "address":
                await made.change(lab.move_client)
            case "nat":
                await made.change(lab.rebind_nat)
            case _:
                await made.change(chance.choice(faults), lab)
                made.size = chance.choice([9, 2000])
                deadline = time.monotonic() + chance.uniform(0, LONGEST)
                await made.until(lambda: time.monotonic() > deadline)
                await made.change(lab.heal)
        await made.more(100)

    with LongLab(0.025) as lab, World(lab, tmp_path, certificates) as world:

        async def main() -> None:
            watchful = {"path_timeout": 1.0, "keepalive": 1.0}
            dialer = world.dialer(tmp_path, ALL, timeout=2.0, penalty=Duration(0.2), quic=watchful, tcp=tcp)
            async with trip(world, dialer, connect_timeout=2.0) as made:
                for _ in range(EVENTS):
                    await event(made, lab)
                status = made.status
            accepted = world.accepted(made.client_id)
            print(
                f"\nseed {seed}: {made.sent:,} messages, {EVENTS} events, {status.connects} connects, "
                f"{status.moves} moves, {len(accepted)} CONNECTs, ends by {scheme(status.url)}, 0 lost, "
                f"longest gap {made.gap():.1f} s, {time.monotonic() - began:.0f} s"
            )
            # the answer to a CONNECT may get lost
            assert status.connects <= len(accepted) <= 3 * EVENTS

        inside(lab, main(), seconds=600)
