"""The long run of the kills of tests/test_quic_kills.py: 30 rounds, 240 blows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from quic_kills import nothing_lost_over_quic

from tesaiot_connect.testing import Certificates

ROUNDS = 10


@pytest.mark.soak
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_nothing_is_lost_in_many_kills(tmp_path: Path, certificates: Certificates, seed: int) -> None:
    outcome = asyncio.run(nothing_lost_over_quic(tmp_path, certificates, rounds=ROUNDS, seed=seed))
    print(
        f"\n{outcome.acknowledged:,} acknowledged, {len(outcome.missing)} missing, {outcome.duplicates:,} "
        f"duplicates, slowest recovery {outcome.slowest:.1f} s, {outcome.early} connections with early data, "
        f"{outcome.seconds:.0f} s"
    )
    assert outcome.missing == []
    assert outcome.early > ROUNDS
