"""The long run of tests/test_nng_kills.py: 20 runs of 2,000 messages, for each library and QoS."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import nng_ends
import pytest
from nng_ends import Ends
from nng_kills import HEAD, client_killed, worker_killed

from tesaiot_connect.testing import Certificates

RUNS = 20
MESSAGES = 2000
CLIENT_RUNS = 5


@pytest.fixture(params=nng_ends.NAMES)
def ends(request: pytest.FixtureRequest, certificates: Certificates, tmp_path: Path) -> Ends:
    return nng_ends.ends(request.param, certificates, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("qos", [1, 2])
def test_nothing_is_lost_in_many_kills_of_the_worker(ends: Ends, qos: int) -> None:
    source = random.Random(qos)
    outcomes = []
    print(f"\n{ends.name}, QoS {qos}\n run{HEAD}")
    for number in range(RUNS):
        outcome = asyncio.run(
            worker_killed(
                ends,
                qos=qos,
                messages=MESSAGES,
                kills=source.randint(3, 6),
                stops=number % 5 == 0,
                kept=number % 2 == 0,
                seed=100 * qos + number,
            )
        )
        print(f"{number + 1:4}{outcome}", flush=True)
        outcomes.append(outcome)
    assert [one.missing for one in outcomes] == [[]] * RUNS
    assert [one.left for one in outcomes] == [[]] * RUNS
    assert all(one.kills for one in outcomes)


@pytest.mark.soak
def test_nothing_is_lost_in_many_kills_of_the_client(ends: Ends, tmp_path: Path) -> None:
    print(f"\n{ends.name}, the client, QoS 1 and 2\n run{HEAD}")
    for number in range(CLIENT_RUNS):
        outcome = asyncio.run(
            client_killed(ends, tmp_path, qos=1 + number % 2, messages=MESSAGES, kills=4, seed=number)
        )
        print(f"{number + 1:4}{outcome}", flush=True)
        assert outcome.missing == []
        assert outcome.left == []
