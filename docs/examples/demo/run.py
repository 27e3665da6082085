"""The main job, end to end, on this machine alone: `make demo`.

Starts a sandbox of the platform, and ten devices that publish at QoS 1 over QUIC, each with its password
(over TLS where QUIC is not installed), and runs `tesaiot-connect run pipeline.toml`, which reads over
WebSocket with the organisation's token and stores what it gets. A device sends {"timestamp", "data":
{sensor: value}}; the platform delivers each reading on a topic of its own. The devices disconnect and come
back all the time, as those do that sleep: over QUIC their first packet then holds CONNECT. After 15 seconds
everything drains and is counted: exit 0 only if each reading that was published is stored.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tesaiot_connect import Broker, Client, ListenerStatus, Message, MqttConnection
from tesaiot_connect.config import bundle_connection
from tesaiot_connect.sandbox import SandboxOptions, running

HERE = Path(__file__).resolve().parent
PIPELINE = HERE / "pipeline.toml"
DEVICES = 10
PERIOD = 0.1
"""Seconds between two batches of a device."""
AWAKE = 10
"""Batches that a device publishes before it disconnects."""


class Device:
    """Publishes telemetry until it is told to stop; counts the readings that were acknowledged."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.published = 0
        self.streams = 0
        self._value = random.Random(name)
        self._time = datetime.datetime.now(datetime.UTC)

    async def run(self, platform: MqttConnection, stop: asyncio.Event) -> None:
        while not stop.is_set():
            async with Client(platform.dialer, platform.options, auth=platform.auth) as client:
                for _ in range(AWAKE):
                    batch = [self._report() for _ in range(5)]
                    await client.publish(batch)
                    self.published += 2 * len(batch)
                    self.streams = max(self.streams, client.status.streams)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(PERIOD):
                            await stop.wait()
                            break

    def _report(self) -> Message:
        # never the same time twice, so that a reading can be told from its duplicate
        tick = datetime.timedelta(microseconds=1)
        self._time = max(datetime.datetime.now(datetime.UTC), self._time + tick)
        data = {
            "temperature": round(self._value.gauss(25, 2), 2),
            "humidity": round(self._value.uniform(40, 70), 2),
        }
        report = {"timestamp": self._time.isoformat().replace("+00:00", "Z"), "data": data}
        return Message(f"devices/{self.name}/telemetry", json.dumps(report).encode(), qos=1)


class Stored:
    """What is in the database, by device: rows, and rows that are not there twice."""

    def __init__(self, database: Path) -> None:
        self.rows: Counter[str] = Counter()
        self.distinct: Counter[str] = Counter()
        with contextlib.suppress(sqlite3.OperationalError):  # there is no table before the first row
            with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
                found = connection.execute(
                    "SELECT device_id, count(*), count(DISTINCT sensor_type || timestamp) FROM telemetry "
                    "GROUP BY device_id"
                )
                for device, rows, distinct in found:
                    self.rows[device], self.distinct[device] = rows, distinct


async def until_subscribed(broker: Broker, pipeline: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(30):
        while not broker.stats.subscriptions:
            if pipeline.returncode is not None:
                raise SystemExit(f"tesaiot-connect run ended with {pipeline.returncode}")
            await asyncio.sleep(0.05)


async def until_stored(database: Path, published: int) -> None:
    """Returns when as many are stored as were published, or after 20 s without that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while (await asyncio.to_thread(Stored, database)).distinct.total() < published:
                await asyncio.sleep(0.1)


async def drain(pipeline: asyncio.subprocess.Process) -> int:
    """The first signal makes `run` write and acknowledge what it has read, then end.

    Windows cannot send one process a signal: there it ends at once, after all is stored.
    """
    if pipeline.returncode is not None:
        return pipeline.returncode
    if sys.platform == "win32":
        pipeline.terminate()
        await pipeline.wait()
        return 0
    pipeline.send_signal(signal.SIGINT)
    return await pipeline.wait()


async def demo(data: Path, seconds: float, console: Console) -> bool:
    ports = {"quic": 0, "tls": 0, "wss": 0}
    devices: list[Device] = []
    asked = SandboxOptions(folder=data / "sandbox", devices=DEVICES, ports=ports)
    async with running(asked) as sandbox:
        estate, urls, broker = sandbox.estate, sandbox.urls, sandbox.broker
        for number, url in enumerate(urls.values()):
            console.print(f"{'' if number else 'sandbox':<12}{url}")
        for why in estate.missing:
            console.print(f"{'':<12}{why}")
        way = "QUIC" if "quic" in urls else "TLS"
        console.print(f"devices     {DEVICES}, publishing at QoS 1 over {way} for {seconds:g} s")
        console.print(f"pipeline    tesaiot-connect run {relative(PIPELINE)}\n")
        tool = Path(sys.executable).with_name("tesaiot-connect")
        environ = {**os.environ, "DEMO_DATA": str(data)}
        pipeline = await asyncio.create_subprocess_exec(tool, "run", PIPELINE, env=environ)
        try:
            await until_subscribed(broker, pipeline)
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for account in estate.devices:
                    devices.append(Device(account.name))
                    # the bundle says where and who; what is said here counts before it
                    own = [
                        f"endpoints={endpoints(urls, data / 'tickets' / account.name)}",
                        'streams="per-topic"',
                    ]
                    group.create_task(devices[-1].run(bundle_connection(account.folder, overrides=own), stop))
                await asyncio.sleep(seconds)
                stop.set()
            await until_stored(data / "telemetry.db", sum(device.published for device in devices))
        finally:
            handshakes = broker.listeners().get("quic")
            code = await drain(pipeline)
    if handshakes is not None:
        console.print(by_quic(handshakes, devices))
    stored = Stored(data / "telemetry.db")
    with (data / "telemetry.jsonl").open("rb") as lines:
        logged = len({(line["topic"], line["value"]["timestamp"]) for line in map(json.loads, lines)})
    console.print(summary(devices, stored))
    published = sum(device.published for device in devices)
    if code:
        console.print(f"tesaiot-connect run ended with {code}")
    if logged != published:
        console.print(f"the log holds {logged} of {published} readings")
    return code == 0 and logged == published and all(stored.distinct[d.name] == d.published for d in devices)


def endpoints(urls: Mapping[str, str], tickets: Path) -> str:
    """QUIC, with a folder for the tickets that spare a round trip, and TLS where it does not get through."""
    quic = {"url": urls.get("quic", ""), "ticket_folder": str(tickets)}
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in quic.items())
    return "[" + (f"{{ {table} }}, " if "quic" in urls else "") + json.dumps(urls["tls"]) + "]"


def by_quic(handshakes: ListenerStatus, devices: list[Device]) -> str:
    streams = 1 + max(device.streams for device in devices)
    return (
        f"quic        {handshakes.accepted} connections of up to {streams} streams, "
        f"{handshakes.resumed} resumed\n"
        f"            CONNECT came with the first packet of {handshakes.early_data_accepted} (0-RTT)\n"
    )


def summary(devices: list[Device], stored: Stored) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("readings of")
    for name in ("published", "stored", "duplicates"):
        table.add_column(name, justify="right")
    total = [0, 0, 0]
    for device in devices:
        rows, distinct = stored.rows[device.name], stored.distinct[device.name]
        counts = [device.published, distinct, rows - distinct]
        total = [sum(pair) for pair in zip(total, counts, strict=True)]
        table.add_row(device.name, *(f"{count:,}" for count in counts))
    table.add_section()
    table.add_row("total", *(f"{count:,}" for count in total), style="bold")
    return table


def relative(path: Path) -> str:
    return os.path.relpath(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--data", type=Path, default=Path("demo-data"), help="emptied at the start")
    arguments = parser.parse_args()
    data = arguments.data.absolute()
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    console = Console()
    complete = asyncio.run(demo(data, arguments.seconds, console))
    tool = relative(Path(sys.executable).with_name("tesaiot-connect"))
    console.print(f"\nrows        {relative(data / 'telemetry.db')} (table telemetry)", highlight=False)
    console.print(f"lines       {relative(data / 'telemetry.jsonl')}", highlight=False)
    again = f"{tool} sandbox {relative(data / 'sandbox')} --simulate"
    console.print(f"next        {again}", highlight=False, soft_wrap=True)
    console.print("\nEverything that was published is stored." if complete else "\nSomething is missing.")
    return 0 if complete else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
