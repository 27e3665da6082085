"""SIGKILL of either side of MQTT over QUIC, at every stage; the long run is in tests/soak."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from quic_kills import nothing_lost_over_quic

from tesaiot_connect.testing import Certificates


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a process SIGTERM")
def test_nothing_is_lost(tmp_path: Path, certificates: Certificates) -> None:
    outcome = asyncio.run(nothing_lost_over_quic(tmp_path, certificates, rounds=1, seed=1))
    print(outcome)
    assert outcome.missing == []
    assert outcome.acknowledged > 0
    assert outcome.early > 0
    assert outcome.slowest < 40  # restarts of Python included; timeouts of QUIC would take longer
