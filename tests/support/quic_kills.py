"""Kills of either side of MQTT over QUIC: SIGKILL at every stage of a connection's life, and nothing is lost.

A writer process publishes numbered QoS 1 messages to `tesaiot-connect serve`, which keeps sessions and QUIC
tickets in files; a subscriber with a kept session collects. Each blow waits until the writer says what it is
about to do, and strikes a random moment later. What the writer was told is the broker's must arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

from real_brokers import free_port, free_udp_port, stop, until_listening

from tesaiot_connect import Backoff, Client, ClientOptions, Disconnected, Duration, Negotiator, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_tcp_tls import TcpTls

TOOL = Path(sys.executable).with_name("tesaiot-connect")
WRITER = Path(__file__).with_name("quic_writer.py")

Side = Literal["writer", "broker"]
MOMENTS = {"connecting": 0.02, "migrating": 0.01, "acked": 0.1}
"""What the writer says, and how many seconds later the blow falls at the latest."""
STALLED = 50.0

BROKER = """
[broker]
state_file = "{folder}/broker.db"
synchronous = "normal"
max_queue_messages = 1000000
max_queue_bytes = "512MiB"

[listeners.tcp]
port = {tcp}

[listeners.quic]
scheme = "quic"
host = "127.0.0.1"
port = {quic}
state_file = "{folder}/tickets.db"
server_tls = {{ certificate = "{certificate}", key = "{key}" }}
"""


class Outcome(NamedTuple):
    acknowledged: int
    missing: list[int]
    duplicates: int
    slowest: float
    """Seconds from a blow to the next acknowledged message, at most: restarts of Python included."""
    early: int
    """Connections that the broker resumed with early data."""
    seconds: float


class _Run:
    def __init__(self, folder: Path, certificates: Certificates) -> None:
        self._folder = folder
        self._certificates = certificates
        own = certificates.server("127.0.0.1")
        self.tcp, self._quic = free_port(), free_udp_port()
        self._config = folder / "broker.toml"
        self._config.write_text(
            BROKER.format(
                folder=folder.as_posix(),
                tcp=self.tcp,
                quic=self._quic,
                certificate=own.certificate.as_posix(),
                key=own.key.as_posix(),
            )
        )
        self.log = folder / "broker.log"
        self.writer_log = folder / "writer.log"
        self._broker: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.acknowledged = 0
        self.said: dict[str, int] = dict.fromkeys(MOMENTS, 0)
        self._news = asyncio.Condition()
        self.numbers: list[int] = []
        self.seen: set[int] = set()

    def start_broker(self) -> None:
        with self.log.open("ab") as log:
            self._broker = subprocess.Popen([TOOL, "serve", self._config], stdout=log, stderr=log)
        until_listening(self.tcp, self._broker, self.log, 60.0)

    def stop_broker(self) -> None:
        if self._broker is not None:
            assert stop(self._broker, 60.0) == 0

    async def start_writer(self) -> None:
        url, tickets = f"quic://127.0.0.1:{self._quic}", str(self._folder / "tickets")
        with self.writer_log.open("ab") as log:
            self._writer = await asyncio.create_subprocess_exec(
                sys.executable,
                str(WRITER),
                url,
                str(self._certificates.ca_file),
                tickets,
                str(self.acknowledged),
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._reading = asyncio.create_task(self._listen(self._writer))

    async def _listen(self, writer: asyncio.subprocess.Process) -> None:
        assert writer.stdout is not None
        async for line in writer.stdout:
            word, *number = line.split()
            if number:
                self.acknowledged = int(number[0])
            async with self._news:
                self.said[word.decode()] += 1
                self._news.notify_all()

    async def heard(self, word: str, count: int = 1) -> None:
        """The writer says it so many times from now on."""
        goal = self.said[word] + count
        try:
            async with asyncio.timeout(STALLED), self._news:
                await self._news.wait_for(lambda: self.said[word] >= goal)
        except TimeoutError:
            raise AssertionError(
                f"no {word!r} for {STALLED:.0f} s:\n{self.writer_log.read_text()[-2000:]}\n"
                f"{self.log.read_text()[-2000:]}"
            ) from None

    async def kill_writer(self) -> None:
        assert self._writer is not None and self._reading is not None
        with contextlib.suppress(ProcessLookupError):
            self._writer.kill()
        await self._writer.wait()
        await self._reading  # what it had said before counts

    async def strike(self, side: Side, after: float) -> None:
        await asyncio.sleep(after)
        if side == "writer":
            await self.kill_writer()
            await self.start_writer()
        else:
            assert self._broker is not None
            self._broker.kill()
            self._broker.wait()
            await asyncio.to_thread(self.start_broker)

    async def collect(self, subscribed: asyncio.Event) -> None:
        options = ClientOptions(
            client_id="collector", reconnect=Backoff(min=Duration(0.05), max=Duration(0.2))
        )
        dialer = Negotiator([TcpTls(Url.parse(f"mqtt://127.0.0.1:{self.tcp}"))])
        async with Client(dialer, options) as client, client.subscribe(["kills/t"]) as reader:
            while True:
                with contextlib.suppress(Disconnected):
                    delivery = await reader.read()
                    found = [int(message.payload) for message in delivery.batch.messages]
                    self.numbers += found
                    self.seen.update(found)
                    await delivery.ack()
                    if found:
                        subscribed.set()


async def nothing_lost_over_quic(
    folder: Path, certificates: Certificates, *, rounds: int, seed: int
) -> Outcome:
    """Each round has one blow to each side at each moment, in an order that the seed decides."""
    began = time.monotonic()
    source = random.Random(seed)
    run = _Run(folder, certificates)
    run.start_broker()
    subscribed = asyncio.Event()
    collecting = asyncio.create_task(run.collect(subscribed))
    slowest = 0.0
    try:
        await run.start_writer()
        # before it is subscribed, messages are nobody's: numbers count from here
        async with asyncio.timeout(STALLED):
            await subscribed.wait()
        first = min(run.seen)
        for _ in range(rounds):
            sides: tuple[Side, ...] = ("writer", "broker")
            blows = [(side, moment) for side in sides for moment in MOMENTS]
            source.shuffle(blows)
            for side, moment in blows:
                if moment == "connecting":  # it does so only when the other side is new
                    other: Side = "broker" if side == "writer" else "writer"
                    waiting = asyncio.create_task(run.heard(moment))
                    await asyncio.sleep(0)
                    await run.strike(other, 0)
                    await waiting
                else:
                    await run.heard(moment)
                await run.strike(side, source.uniform(0, MOMENTS[moment]))
                struck = time.monotonic()
                await run.heard("acked", 3)
                slowest = max(slowest, time.monotonic() - struck)
        await run.kill_writer()
        wanted = set(range(first, run.acknowledged))
        deadline = time.monotonic() + STALLED
        while not wanted <= run.seen and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
    finally:
        collecting.cancel()
        await asyncio.wait([collecting])
        await run.kill_writer()
        run.stop_broker()
    return Outcome(
        acknowledged=run.acknowledged - first,
        missing=sorted(wanted - run.seen),
        duplicates=len(run.numbers) - len(run.seen),
        slowest=slowest,
        early=run.log.read_text().count("resumed with 0-RTT"),
        seconds=time.monotonic() - began,
    )
