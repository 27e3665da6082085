"""Nothing lost: messages through `tesaiot-connect run` into SQLite while everything around it breaks.

One run publishes numbered QoS 1 messages and meanwhile, in an order that a seed decides, kills the pipeline's
process (SIGKILL), restarts the broker (SIGTERM) and makes the sink fail for two seconds (another connection
holds the database locked). Each event waits for rows to arrive and then strikes at a random moment, so that
it hits work in progress. Afterwards every number must be in the table; numbers that are there more than once
are counted. That is what at least once means: after a kill the broker sends again whatever it has not read
a PUBACK for, which is at most the Receive Maximum a kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from real_brokers import Mosquitto, free_port, stop, until_listening

from tesaiot_connect import Backoff, Client, ClientOptions, Duration, Message, Negotiator, Url
from tesaiot_connect_tcp_tls import TcpTls

TOOL = Path(sys.executable).with_name("tesaiot-connect")
OUTAGE = 2.0
"""Seconds the sink fails."""
_BATCH = 50
_STALLED = 60.0
"""Seconds without a new row after which the run counts as stuck."""

PIPELINE = """
[connections.broker]
client_id = "archive"
endpoints = ["mqtt://127.0.0.1:{port}"]
reconnect = {{ min = "50ms", max = "500ms" }}

[sources.telemetry]
type = "mqtt"
connection = "broker"
subscribe = ["device/+/telemetry"]
topic_fields = "device/{{device_id}}/telemetry"

[sinks.archive]
type = "sqlite"
path = "{database}"
busy_timeout = "100ms"

[pipelines.archive]
from = "telemetry"
to = ["archive"]
retry = {{ min = "50ms", max = "500ms" }}
"""

BROKER = """
[broker]
state_file = "{folder}/broker.db"
synchronous = "normal"
max_queue_messages = 1000000
max_queue_bytes = "512MiB"

[listeners.tcp]
port = {port}
"""


class RestartableBroker(Protocol):
    port: int

    def start(self) -> None: ...
    def stop(self) -> None: ...


class OurBroker:
    """`tesaiot-connect serve` on a state file."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._config = folder / "broker.toml"
        self._config.write_text(BROKER.format(folder=folder.as_posix(), port=self.port))
        self._log = folder / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([TOOL, "serve", self._config], stdout=log, stderr=log)
        until_listening(self.port, self._process, self._log)

    def stop(self) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None


class Pipeline:
    """`tesaiot-connect run` as a process that can be killed."""

    def __init__(self, folder: Path, port: int) -> None:
        self.database = folder / "telemetry.db"
        self.log = folder / "pipeline.log"
        self._config = folder / "pipeline.toml"
        self._config.write_text(PIPELINE.format(port=port, database=self.database.as_posix()))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([TOOL, "run", self._config], stdout=log, stderr=log)

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.poll() is None, f"it ended by itself:\n{self.log.read_text()[-3000:]}"
        self._process.kill()
        self._process.wait()

    def drain(self) -> int:
        assert self._process is not None
        return stop(self._process)

    def rows(self) -> int:
        """How many, duplicates included; the table only grows."""
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as db:
                (count,) = db.execute("SELECT coalesce(max(rowid), 0) FROM telemetry").fetchone()
                assert isinstance(count, int)
                return count
        except sqlite3.OperationalError:
            return 0

    def numbers(self) -> list[int]:
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            return [number for (number,) in db.execute("SELECT number FROM telemetry")]

    def lock(self, seconds: float) -> None:
        """Nobody else can write to the database for so long."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30, isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            db.execute("ROLLBACK")


class Outcome(NamedTuple):
    published: int
    missing: list[int]
    duplicates: int
    seconds: float


class _Publisher:
    """Publishes the numbers in order; may be ahead of the events by one share of the whole."""

    def __init__(self, messages: int, shares: int) -> None:
        self.acknowledged = 0
        self._messages = messages
        self._share = -(-messages // shares)
        self._allowed = self._share
        self._more = asyncio.Event()

    def allow_next_share(self) -> None:
        self._allowed += self._share
        self._more.set()

    async def run(self, port: int) -> None:
        options = ClientOptions(client_id="devices", reconnect=Backoff(min=Duration(0.05), max=Duration(0.5)))
        transport = TcpTls(url=Url.parse(f"mqtt://127.0.0.1:{port}"))
        async with Client(Negotiator([transport]), options) as client:
            while self.acknowledged < self._messages:
                while self.acknowledged >= self._allowed:
                    self._more.clear()
                    await self._more.wait()
                stop = min(self.acknowledged + _BATCH, self._allowed, self._messages)
                numbers = range(self.acknowledged, stop)
                await client.publish(
                    [
                        Message(f"device/{number % 20}/telemetry", b'{"number":%d}' % number, qos=1)
                        for number in numbers
                    ]
                )
                self.acknowledged = stop


async def _until_more_rows(pipeline: Pipeline, than: int) -> None:
    deadline = time.monotonic() + _STALLED
    while await asyncio.to_thread(pipeline.rows) <= than:
        if time.monotonic() > deadline:
            raise AssertionError(f"no row for {_STALLED:.0f} s:\n{pipeline.log.read_text()[-3000:]}")
        await asyncio.sleep(0.02)


async def _until_subscribed(pipeline: Pipeline, port: int) -> None:
    """Returns when a message of ours is stored: the session exists from then on."""
    transport = TcpTls(url=Url.parse(f"mqtt://127.0.0.1:{port}"))
    deadline = time.monotonic() + _STALLED
    async with Client(Negotiator([transport])) as client:
        while not await asyncio.to_thread(pipeline.rows):
            assert time.monotonic() < deadline, pipeline.log.read_text()[-3000:]
            await client.publish([Message("device/first/telemetry", b'{"number":-1}', qos=1)])
            await asyncio.sleep(0.05)


async def nothing_lost(
    folder: Path,
    kind: Literal["mosquitto", "ours"],
    *,
    messages: int,
    kills: int,
    restarts: int,
    seed: int,
) -> Outcome:
    """One run; `kills`, `restarts` and one outage of the sink happen in it."""
    began = time.monotonic()
    source = random.Random(seed)
    events = ["kill"] * kills + ["restart"] * restarts + ["outage"]
    source.shuffle(events)
    broker: RestartableBroker = (
        Mosquitto(folder / "mosquitto", "max_queued_messages 0", persistence=True)
        if kind == "mosquitto"
        else OurBroker(folder)
    )
    broker.start()
    pipeline = Pipeline(folder, broker.port)
    pipeline.start()
    publisher = _Publisher(messages, len(events) + 1)
    publishing: asyncio.Task[None] | None = None
    try:
        await _until_subscribed(pipeline, broker.port)
        rows = await asyncio.to_thread(pipeline.rows)
        publishing = asyncio.create_task(publisher.run(broker.port))
        for event in events:
            await _until_more_rows(pipeline, rows)
            await asyncio.sleep(source.uniform(0, 0.15))
            rows = await asyncio.to_thread(pipeline.rows)
            publisher.allow_next_share()
            match event:
                case "kill":
                    await asyncio.to_thread(pipeline.kill)
                    pipeline.start()
                case "restart":
                    await asyncio.to_thread(broker.stop)
                    await asyncio.to_thread(broker.start)
                case "outage":
                    await asyncio.to_thread(pipeline.lock, OUTAGE)
        await publishing
        seen, deadline = -1, 0.0
        while not (set(range(messages)) <= set(await asyncio.to_thread(pipeline.numbers))):
            rows = await asyncio.to_thread(pipeline.rows)
            if rows > seen:
                seen, deadline = rows, time.monotonic() + _STALLED / 4
            if time.monotonic() > deadline:
                break  # the missing ones are reported below
            await asyncio.sleep(0.2)
        assert await asyncio.to_thread(pipeline.drain) == 0, pipeline.log.read_text()[-3000:]
    finally:
        if publishing is not None:
            publishing.cancel()
            await asyncio.wait([publishing])
        with contextlib.suppress(AssertionError):
            pipeline.kill()
        broker.stop()
    numbers = [number for number in pipeline.numbers() if number >= 0]
    distinct = set(numbers)
    return Outcome(
        published=publisher.acknowledged,
        missing=sorted(set(range(messages)) - distinct),
        duplicates=len(numbers) - len(distinct),
        seconds=time.monotonic() - began,
    )
