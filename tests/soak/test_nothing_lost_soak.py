"""The long run of the nothing-lost harness: 100,000 messages, 20 kills, 3 restarts of the broker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest
from nothing_lost import nothing_lost

MESSAGES = 100_000


@pytest.mark.soak
@pytest.mark.parametrize("broker", ["mosquitto", "ours"])
def test_nothing_lost_soak(tmp_path: Path, broker: Literal["mosquitto", "ours"]) -> None:
    outcome = asyncio.run(nothing_lost(tmp_path, broker, messages=MESSAGES, kills=20, restarts=3, seed=20))
    print(
        f"\n{broker}: {outcome.published:,} published, {outcome.duplicates:,} duplicates, "
        f"{len(outcome.missing):,} missing, {outcome.seconds:.0f} s"
    )
    assert outcome.published == MESSAGES
    assert outcome.missing == []
