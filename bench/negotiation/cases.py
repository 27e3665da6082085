"""The cases of the benchmark that are about negotiation: what several ways to a broker cost, and save.

A client behind a router, our broker 50 ms away (a relay delays each packet), in namespaces: needs root.
The client has QUIC, TLS and WebSocket, in this order, with the defaults; the peers are the same client with
fewer ways or other rules. Each dial counts until the first QoS 1 message is acknowledged.

`negotiation-bar-*` are promises: the peer is the bound. The others go through every scenario of the tests,
beside TLS alone on a network without faults; what was chosen and what was lost stands with them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quic.cases import Row, Unavailable, row

DELAY = 0.025  # seconds, each way
RTT = 2 * DELAY
RACE = 0.2
PATH = 5.0
SEQUENTIAL = 10.0
"""Seconds a client that tries one endpoint after the other has for each."""
Pin = Callable[[int], Callable[[], None] | None]

DIALS = {
    "negotiation-bar-udp-blocked": "TLS alone, and race_delay",
    "negotiation-bar-udp-blocked-known": "TLS alone",
    "negotiation-udp-blocked-sequential": "one after the other, 10 s each",
    "negotiation-both-open": "TLS alone",
    "negotiation-both-open-known": "QUIC alone, 0-RTT",
    "negotiation-bar-both-open-quic": "every run",
}
DIES, RETURNS = "negotiation-bar-path-dies", "negotiation-udp-returns-gap"


@contextmanager
def world(folder: Path) -> Iterator[Any]:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    from negotiated_ways import LongLab, World

    from tesaiot_connect.testing import Certificates

    for name in ("tesaiot_connect", "quic"):
        logging.getLogger(name).addHandler(logging.NullHandler())  # what happens is what is measured
    place = folder / "negotiation"
    place.mkdir(exist_ok=True)
    try:
        lab = LongLab(DELAY)
        lab.__enter__()
    except BaseException as error:
        raise Unavailable(f"no long path here: {error}") from error
    try:
        with World(lab, place, Certificates(place / "certificates")) as made:
            yield made
    finally:
        lab.__exit__()


class Sequential:
    """A dialer as others have it: the next endpoint once the time of the one before is over."""

    def __init__(self, dialer: Any) -> None:
        self._endpoints = dialer.endpoints

    async def connect(self, *, identity: Any = None, early: bytes = b"") -> Any:
        from tesaiot_connect import ConnectFailed, ConnectorError

        for endpoint in self._endpoints:
            try:
                async with asyncio.timeout(SEQUENTIAL):
                    return await endpoint.connect(identity=identity)
            except (ConnectorError, TimeoutError):
                continue
        raise ConnectFailed("none")


class Runs:
    """Dials and scenarios in one world, each in a folder of its own."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self._numbers = itertools.count(1)

    def folder(self) -> Path:
        return Path(self.world.folder) / f"run-{next(self._numbers)}"

    def dial(self, *ways: str, folder: Path | None = None, sequential: bool = False) -> tuple[float, Any]:
        """Seconds to the first acknowledgement, and the status then."""
        from negotiated_ways import trip

        found: list[tuple[float, Any]] = []

        async def main() -> None:
            quic = {"connect_timeout": SEQUENTIAL} if sequential else {}
            dialer = self.world.dialer(folder or self.folder(), ways, quic=quic)
            async with trip(self.world, Sequential(dialer) if sequential else dialer) as made:
                found.append((made.times[0] - made.began, made.first))

        self.run(main())
        return found[0]

    def run(self, main: Any) -> None:
        """It must leave the network as it found it."""
        with self.world.lab.enter("cl"):
            asyncio.run(main)


def dials(runs: Runs, repetitions: int, only: str) -> Iterator[Row]:
    from negotiated_ways import healed
    from negotiation_scenarios import ALL, drop, scheme

    wanted = [name for name in DIALS if only in name]
    if not wanted:
        return
    times: dict[str, list[float]] = defaultdict(list)
    wins = 0
    lab, known, resumed = runs.world.lab, runs.folder(), runs.folder()
    runs.dial(*ALL, folder=known)
    runs.dial("quic", folder=resumed)
    for _ in range(repetitions):
        drop(lab)
        blocked = runs.folder()
        times["tls"].append(runs.dial("mqtts")[0])
        times["first"].append(runs.dial(*ALL, folder=blocked)[0])
        times["again"].append(runs.dial(*ALL, folder=blocked)[0])
        healed(lab)
        seconds, status = runs.dial(*ALL)
        times["open"].append(seconds)
        wins += scheme(status.url) == "quic"
        times["open again"].append(runs.dial(*ALL, folder=known)[0])
        times["quic again"].append(runs.dial("quic", folder=resumed)[0])
    if "negotiation-udp-blocked-sequential" in wanted:
        drop(lab)
        for _ in range(min(3, repetitions)):
            times["sequential"].append(runs.dial(*ALL, sequential=True)[0])
        healed(lab)
    ms = {name: statistics.median(found) * 1000 for name, found in times.items()}
    figures = {
        "negotiation-bar-udp-blocked": (ms["first"], ms["tls"] + RACE * 1000, "ms"),
        "negotiation-bar-udp-blocked-known": (ms["again"], ms["tls"], "ms"),
        "negotiation-udp-blocked-sequential": (ms["first"], ms.get("sequential", 1.0), "ms"),
        "negotiation-both-open": (ms["open"], ms["tls"], "ms"),
        "negotiation-both-open-known": (ms["open again"], ms["quic again"], "ms"),
        "negotiation-bar-both-open-quic": (float(wins), float(repetitions), "runs"),
    }
    for name in wanted:
        ours, peer, unit = figures[name]
        yield row(name, ours, peer, DIALS[name], unit)


def changes(runs: Runs, repetitions: int, only: str) -> Iterator[Row]:
    """What happens to a stream when its path dies, and when a better one is there again."""
    from negotiated_ways import healed, trip
    from negotiation_scenarios import ALL, drop, udp_back

    from tesaiot_connect import Duration

    if not any(only in name for name in (DIES, RETURNS)):
        return
    times: dict[str, list[float]] = defaultdict(list)
    sent: dict[str, int] = defaultdict(int)

    async def dies() -> None:
        async with trip(runs.world, runs.world.dialer(runs.folder(), ALL)) as made:
            await made.more(300)
            await asyncio.sleep(random.uniform(0, 0.2))
            await made.change(drop, runs.world.lab)
            await made.by("mqtts")
            times["dies"].append(made.gap())
            won = next(one for one in made.status.attempts if one.outcome == "won")
            times["handshake"].append(won.seconds)
        sent["dies"] += made.sent

    async def returns() -> None:
        dialer = runs.world.dialer(runs.folder(), ALL, penalty=Duration(1.0))
        async with trip(runs.world, dialer) as made:
            await udp_back(made)
            times["returns"].append(made.gap())
            assert made.status.moves == 1
        sent["returns"] += made.sent

    for _ in range(repetitions):
        if only in DIES:
            runs.run(dies())
            healed(runs.world.lab)
        if only in RETURNS:
            drop(runs.world.lab)
            runs.run(returns())
            times["quic"].append(runs.dial("quic")[0])
    ms = {name: statistics.median(found) * 1000 for name, found in times.items()}
    if only in DIES:
        bound = (PATH + 2 * RTT) * 1000 + ms["handshake"]
        told = f"path_timeout, 2 RTT and handshake; 0 of {sent['dies']} lost"
        yield row(DIES, ms["dies"], bound, told, "ms")
    if only in RETURNS:
        told = f"a new QUIC connection; 0 of {sent['returns']} lost"
        yield row(RETURNS, ms["returns"], ms["quic"], told, "ms")


def scenarios(runs: Runs, repetitions: int, only: str) -> Iterator[Row]:
    from negotiated_ways import healed
    from negotiation_scenarios import SCENARIOS, scheme, travel

    from tesaiot_connect import Duration

    names = {f"negotiation-{_slug(scenario.name)}": scenario for scenario in SCENARIOS}
    wanted = {name: one for name, one in names.items() if only in name}
    if not wanted:
        return
    tls = statistics.median(runs.dial("mqtts")[0] for _ in range(max(3, repetitions)))
    for name, scenario in wanted.items():
        found: list[Any] = []

        async def main(scenario: Any = scenario, found: Any = found) -> None:
            found.append(await travel(runs.world, scenario, runs.folder(), race_delay=Duration(RACE)))

        for _ in range(repetitions):
            runs.run(main())
            healed(runs.world.lab)
        ways = " or ".join(sorted({_way(scheme(one.first.url), scheme(one.last.url)) for one in found}))
        lost, sent = sum(one.lost for one in found), sum(one.sent for one in found)
        gap = statistics.median(one.gap for one in found)
        told = f"TLS alone; {ways}, {lost} of {sent} lost, longest gap {gap * 1000:,.0f} ms"
        seconds = statistics.median(one.seconds for one in found)
        yield row(name, seconds * 1000, tls * 1000, told, "ms")


def _slug(name: str) -> str:
    return "-".join(name.lower().replace(",", "").split())


def _way(first: str, last: str) -> str:
    return first if first == last else f"{first}, then {last}"


def rows(folder: Path, repetitions: int, scale: float, only: str, pin: Pin) -> Iterator[Row]:
    """All rows whose name contains `only`. Says on stderr what this machine cannot run."""
    if "negotiation" not in only and only not in "negotiation":
        return
    try:
        with world(folder) as made:
            runs = Runs(made)
            for way in ("quic", "mqtts", "wss"):
                runs.dial(way)  # so that what is loaded once is there
            yield from dials(runs, 3 * repetitions, only)
            yield from changes(runs, repetitions, only)
            yield from scenarios(runs, max(1, repetitions // 2), only)
    except Unavailable as error:
        print(f"left out: {error}", file=sys.stderr)
