"""Kills of `quic_nng`'s worker while it publishes, and of the whole client: nothing acknowledged is lost.

A client publishes numbered messages to our broker, batch after batch; a subscriber beside it collects.
Meanwhile workers are killed, each a random moment after so many messages were acknowledged; a seed decides.
What is missing afterwards is lost; what came more than once is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nng_ends import Ends, Watched, client, gone, serving, subscriber, until

from tesaiot_connect import BrokerOptions, Duration, Message

WRITER = Path(__file__).with_name("nng_writer.py")
TOPIC = "kills/t"
BATCH = 50
_LATEST = 0.05
"""Seconds between a number of acknowledged messages and the blow that it brings, at most."""
_STALLED = 180.0
_BROKER = BrokerOptions(max_queue_messages=1_000_000, drain_timeout=Duration(0.1))


class Outcome(NamedTuple):
    acknowledged: int
    missing: list[int]
    duplicates: int
    kills: int
    connects: int
    ends: Counter[str]
    """How often connections ended with which words."""
    left: list[int]
    """Workers that live when all is over."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.acknowledged:6} {len(self.missing):7} {self.duplicates:10} {self.kills:5} "
            f"{self.connects:8} {self.seconds:7.1f}"
        )


HEAD = " acked missing duplicates kills connects seconds"


def _told(numbers: list[int], acknowledged: int) -> tuple[list[int], int]:
    seen = set(numbers)
    return [one for one in range(acknowledged) if one not in seen], len(numbers) - len(seen)


async def worker_killed(
    ends: Ends,
    *,
    qos: int,
    messages: int = 2000,
    kills: int = 4,
    stops: int = 0,
    kept: bool = True,
    seed: int,
    ack_timeout: float = 2.0,
) -> Outcome:
    """`kills` with SIGKILL, `stops` with SIGSTOP, which shows as silence. `kept`: the session is."""
    began = time.monotonic()
    source = random.Random(seed)
    blows = [signal.SIGKILL] * kills + [signal.SIGSTOP] * stops
    source.shuffle(blows)
    moments = sorted(source.sample(range(1, messages // BATCH - 1), len(blows)))
    async with serving(ends, options=_BROKER) as served, subscriber(served.tcp, "kills/#") as got:
        recipe = ends.recipe(served.url, ack_timeout=Duration(ack_timeout))
        dialer = Watched(recipe)
        options = {"client_id": "publisher"} if kept else {}
        ended: Counter[str] = Counter()
        async with client(dialer, **options) as publisher:

            def due(published: int, connects: int) -> bool:
                return publisher.status.published >= published and publisher.status.connects > connects

            async def strike() -> None:
                """One blow for each time it has connected."""
                for number, (blow, moment) in enumerate(zip(blows, moments, strict=True)):
                    await until(partial(due, moment * BATCH, number), patience=_STALLED)
                    await asyncio.sleep(source.uniform(0, _LATEST))
                    with contextlib.suppress(ProcessLookupError):  # it crashed by itself
                        os.kill(dialer.connections[-1].pid, blow)

            striking = asyncio.create_task(strike())
            try:
                for first in range(0, messages, BATCH):
                    numbers = range(first, min(first + BATCH, messages))
                    async with asyncio.timeout(_STALLED):
                        await publisher.publish([Message(TOPIC, b"%-100d" % one, qos) for one in numbers])
                await striking
            finally:
                striking.cancel()
                await asyncio.wait([striking])
            connects = publisher.status.connects
            acknowledged = messages
        with contextlib.suppress(TimeoutError):
            await got.until(lambda: len(set(got.payloads)) >= messages)
        for connection in dialer.connections:
            ended[(await connection.wait_closed()).text] += 1
    missing, duplicates = _told([int(one) for one in got.payloads], acknowledged)
    left = [one.pid for one in dialer.connections if not gone(one.pid)]
    return Outcome(
        acknowledged, missing, duplicates, len(blows), connects, ended, left, time.monotonic() - began
    )


def _all_gone(workers: list[int]) -> bool:
    return all(gone(pid) for pid in workers)


class _Writer:
    """`nng_writer.py` as a process, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.acknowledged = 0
        self.workers: list[int] = []
        self._log = log
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, ends: Ends, url: str, folder: Path, *, first: int, qos: int, environment: Mapping[str, str]
    ) -> _Writer:
        log = folder / "writer.log"
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *map(str, (WRITER, url, ends.certificates.ca_file, ends.library or "", first, qos)),
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
            )
        return cls(process, log)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            word, number = line.split()
            if word == b"acked":
                self.acknowledged = int(number)
            else:
                self.workers.append(int(number))
            self._news.set()
        self._news.set()

    async def reaches(self, number: int) -> None:
        try:
            async with asyncio.timeout(_STALLED):
                while self.acknowledged < number and not self._reading.done():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass
        assert self.acknowledged >= number, self._log.read_text()[-2000:]

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self._reading  # what it had said before counts


async def client_killed(
    ends: Ends,
    folder: Path,
    *,
    qos: int,
    messages: int = 1000,
    kills: int = 3,
    seed: int,
    environment: Mapping[str, str] = {},
) -> Outcome:
    """SIGKILL of the client's process, and another goes on behind what the one before had acknowledged."""
    began = time.monotonic()
    source = random.Random(seed)
    each = messages // (kills + 1)
    workers: list[int] = []
    acknowledged = 0
    async with serving(ends, options=_BROKER) as served, subscriber(served.tcp, "kills/#") as got:
        for turn in range(kills + 1):
            writer = await _Writer.start(
                ends, served.url, folder, first=acknowledged, qos=qos, environment=environment
            )
            try:
                await writer.reaches(messages if turn == kills else acknowledged + each)
                await asyncio.sleep(source.uniform(0, _LATEST))
            finally:
                await writer.kill()
                workers += writer.workers
            acknowledged = max(acknowledged, writer.acknowledged)
            await until(partial(_all_gone, workers), "a worker outlived its client")
        with contextlib.suppress(TimeoutError):
            await got.until(lambda: not _told([int(one) for one in got.payloads], acknowledged)[0])
    missing, duplicates = _told([int(one) for one in got.payloads], acknowledged)
    left = [pid for pid in workers if not gone(pid)]
    return Outcome(
        acknowledged, missing, duplicates, kills, len(workers), Counter(), left, time.monotonic() - began
    )
