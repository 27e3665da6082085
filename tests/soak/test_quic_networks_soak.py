"""The proof of migration: ten times in a row, 20,000 messages each, over one connection and over ten."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from netlab import Lab, require_namespaces
from quic_peers import Keeping, Moved, apart, serving

from tesaiot_connect import Client
from tesaiot_connect.testing import Certificates

COUNT = 20_000
TIMES = 10

pytestmark = [pytest.mark.soak, pytest.mark.root]

Change = Callable[[Lab, Keeping], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "nat rebind": lambda lab, dialer: apart(lab.rebind_nat),
    "new address": lambda lab, dialer: apart(lab.move_client),
    "on request": lambda lab, dialer: dialer.connections[0].migrate(),
}


@pytest.mark.parametrize("one_connection", [True, False], ids=["one connection", "ten connections"])
@pytest.mark.parametrize("change", CHANGES)
def test_ten_times_in_a_row(
    change: str, one_connection: bool, certificates: Certificates, tmp_path: Path
) -> None:
    require_namespaces()
    began = time.monotonic()
    runs, rounds = (1, TIMES) if one_connection else (TIMES, 1)
    sent = migrations = connects = 0
    for run in range(runs):
        with Lab() as lab, serving(lab, certificates) as served:
            moved = Moved(lab, served, certificates, tmp_path / str(run))

            async def test(client: Client, dialer: Keeping, lab: Lab = lab, moved: Moved = moved) -> None:
                nonlocal connects
                for _ in range(rounds):
                    await moved.publish(client, COUNT, lambda: CHANGES[change](lab, dialer))
                moved.check(client)
                connects += client.status.connects

            moved.run(test)
            sent += moved.sent
            migrations += served.status().migrations
    print(
        f"\n{change}: {sent:,} messages, {migrations} migrations, {connects} connects, 0 lost, "
        f"0 duplicates, {time.monotonic() - began:.0f} s"
    )
    assert migrations == TIMES
    assert sent >= TIMES * COUNT
