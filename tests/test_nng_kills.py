"""SIGKILL of quic_nng's worker, and of its client, in the middle of things: nothing acknowledged is lost.

The long run is in tests/soak.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import nng_ends
import nng_stub
import pytest
from nng_ends import Ends
from nng_kills import Outcome, client_killed, worker_killed

from tesaiot_connect.testing import Certificates

pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")

SILENT, LOUD = 0.5, 30.0
"""Seconds until silence is noticed, where there is any; a connection that ends sooner is made anew."""
FAULTS: dict[str, tuple[int, float, dict[str, Any]]] = {
    "every seventh acknowledgement is lost": (20, SILENT, {"lose_ack": 7}),
    "some acknowledgements are lost": (300, SILENT, {"lose_ack": 97}),
    "acknowledgements cease": (300, SILENT, {"lose_all_acks_after": 120}),
    "the library aborts": (300, LOUD, {"abort_after": 150}),
    "the library hangs": (300, SILENT, {"hang_after": 120}),
    "the connection drops": (300, LOUD, {"drop_after": 130, "abort_on_close": True}),
}
"""How many messages are published, the ack timeout, and what the stand-in does in each of its processes."""


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nng")


@pytest.fixture(params=nng_ends.NAMES)
def ends(request: pytest.FixtureRequest, certificates: Certificates, installation: Path) -> Ends:
    return nng_ends.ends(request.param, certificates, installation)


def whole(outcome: Outcome, connects: int) -> None:
    """Nothing is missing, nobody is left, and there were so many connections at least."""
    print(outcome, dict(outcome.ends))
    assert outcome.missing == []
    assert outcome.left == []
    assert outcome.connects >= connects


@pytest.mark.parametrize(("qos", "kept"), [(1, True), (2, False)])
def test_the_worker_is_killed(ends: Ends, qos: int, kept: bool) -> None:
    outcome = asyncio.run(worker_killed(ends, qos=qos, kept=kept, kills=3, stops=qos == 1, seed=qos))
    whole(outcome, connects=3)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_library_fails(
    certificates: Certificates,
    installation: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    stub = nng_ends.ends("stub", certificates, installation)
    messages, ack_timeout, faults = FAULTS[fault]
    for name, value in nng_stub.environment(**faults).items():
        monkeypatch.setenv(name, value)
    killed = worker_killed(stub, qos=1, messages=messages, kills=0, seed=1, ack_timeout=ack_timeout)
    outcome = asyncio.run(killed)
    whole(outcome, connects=2)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_the_client_is_killed(ends: Ends, tmp_path: Path) -> None:
    outcome = asyncio.run(client_killed(ends, tmp_path, qos=1, kills=2, seed=1))
    whole(outcome, connects=3)
