"""The short run of the nothing-lost harness; the long one is in tests/soak."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Literal

import pytest
from nothing_lost import nothing_lost


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a process SIGTERM")
@pytest.mark.parametrize("broker", ["mosquitto", "ours"])
def test_nothing_lost(tmp_path: Path, broker: Literal["mosquitto", "ours"]) -> None:
    outcome = asyncio.run(nothing_lost(tmp_path, broker, messages=3000, kills=3, restarts=1, seed=1))
    assert outcome.published == 3000
    assert outcome.missing == []
