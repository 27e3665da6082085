"""The main job, end to end, on this machine alone: `make demo`.

Starts a broker on loopback, with QUIC and TLS, and ten devices that publish at QoS 1, and runs
`tesaiot-connect run pipeline.toml`, which stores what they say. The devices disconnect and come back all the
time, as those do that sleep: over QUIC their first packet then holds CONNECT. After 15 seconds everything
drains and is counted: exit 0 only if each message that was published is stored.
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
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tesaiot_connect import (
    Broker,
    Client,
    ClientOptions,
    InOrder,
    ListenerSpec,
    ListenerStatus,
    Message,
    TlsOptions,
    Transport,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_tcp_tls import TcpTls

try:
    from tesaiot_connect_quic_aioquic import QuicAioquic
except ImportError as missing:
    without_quic: str | None = str(missing)
else:
    without_quic = None

HERE = Path(__file__).resolve().parent
PIPELINE = HERE / "pipeline.toml"
PERIOD = 0.1
"""Seconds between two batches of a device."""
AWAKE = 5
"""Batches that a device publishes before it disconnects."""


class Device:
    """Publishes telemetry until it is told to stop; counts what the broker has acknowledged."""

    def __init__(self, name: str, *, sensors: bool) -> None:
        self.name = name
        self.published = 0
        self.streams = 0
        self._sensors = sensors
        self._value = random.Random(name)
        self._time = datetime.datetime.now(datetime.UTC)

    async def run(self, endpoints: Sequence[Transport], stop: asyncio.Event) -> None:
        options = ClientOptions(client_id=self.name, streams="per-topic")
        while not stop.is_set():
            async with Client(InOrder(endpoints), options) as client:
                for _ in range(AWAKE):
                    batch = [self._message() for _ in range(5)]
                    await client.publish(batch)
                    self.published += len(batch)
                    self.streams = max(self.streams, client.status.streams)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(PERIOD):
                            await stop.wait()
                            break

    def _message(self) -> Message:
        # never the same time twice, so that a message can be told from its duplicate
        tick = datetime.timedelta(microseconds=1)
        self._time = max(datetime.datetime.now(datetime.UTC), self._time + tick)
        now = self._time.isoformat().replace("+00:00", "Z")
        temperature = round(self._value.gauss(25, 2), 2)
        if self._sensors:
            topic = f"device/{self.name}/telemetry/temperature"
            payload: object = {"value": temperature, "unit": "celsius", "timestamp": now}
        else:
            topic = f"devices/{self.name}/telemetry"
            humidity = round(self._value.uniform(40, 70), 2)
            payload = {"timestamp": now, "data": {"temperature": temperature, "humidity": humidity}}
        return Message(topic, json.dumps(payload).encode(), qos=1)


class Stored:
    """What is in the database, by device: rows, and rows that are not there twice."""

    def __init__(self, database: Path) -> None:
        self.rows: Counter[str] = Counter()
        self.distinct: Counter[str] = Counter()
        with contextlib.suppress(sqlite3.OperationalError):  # there is no table before the first row
            with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
                found = connection.execute(
                    "SELECT device_id, count(*), count(DISTINCT timestamp) FROM telemetry GROUP BY device_id"
                )
                for device, rows, distinct in found:
                    self.rows[device], self.distinct[device] = rows, distinct


async def until_subscribed(broker: Broker, pipeline: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(30):
        while broker.stats.subscriptions < 2:
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
    authority = Certificates(data)
    certificate, trust = authority.server("localhost"), TlsOptions(ca_file=authority.ca_file)
    listeners = [ListenerSpec("tls", TcpTls(url=Url.parse("mqtts://127.0.0.1:0"), server_tls=certificate))]
    if not without_quic:
        quic = QuicAioquic(url=Url.parse("quic://127.0.0.1:0"), server_tls=certificate)
        listeners.insert(0, ListenerSpec("quic", quic))
    devices = [Device(f"sensor-{number}", sensors=True) for number in range(1, 6)]
    devices += [Device(f"device-{number}", sensors=False) for number in range(1, 6)]
    broker = Broker()
    async with broker.serving(listeners) as addresses:
        ports = {url.scheme: url.port for url in map(Url.parse, addresses)}
        urls = [f"{scheme}://localhost:{port}" for scheme, port in ports.items()]
        console.print(f"broker      {', '.join(urls)}")
        if without_quic:
            console.print(f"            no QUIC, since its plugin is not installed: {without_quic}")
        console.print(f"devices     {len(devices)}, publishing at QoS 1 for {seconds:g} s")
        console.print(f"pipeline    tesaiot-connect run {relative(PIPELINE)}\n")
        tool = Path(sys.executable).with_name("tesaiot-connect")
        pipeline = await asyncio.create_subprocess_exec(
            tool,
            "run",
            PIPELINE,
            *(["--set", f"connections.platform.endpoints={json.dumps(urls)}"] if without_quic else []),
            env={
                **os.environ,
                "DEMO_DATA": str(data),
                "DEMO_PORT": str(ports["mqtts"]),
                "DEMO_QUIC_PORT": str(ports.get("quic", "")),
            },
        )
        try:
            await until_subscribed(broker, pipeline)
            tcp = TcpTls(url=Url.parse(f"mqtts://localhost:{ports['mqtts']}"), tls=trust)
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for device in devices:
                    endpoints: list[Transport] = [tcp]
                    if not without_quic:
                        url, tickets = Url.parse(f"quic://localhost:{ports['quic']}"), data / "tickets"
                        quic = QuicAioquic(url=url, tls=trust, ticket_folder=tickets / device.name)
                        endpoints.insert(0, quic)
                    group.create_task(device.run(endpoints, stop))
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
        console.print(f"the log holds {logged} of {published} messages")
    return code == 0 and logged == published and all(stored.distinct[d.name] == d.published for d in devices)


def by_quic(handshakes: ListenerStatus, devices: list[Device]) -> str:
    streams = 1 + max(device.streams for device in devices)
    return (
        f"quic        {handshakes.accepted} connections of up to {streams} streams, "
        f"{handshakes.resumed} resumed\n"
        f"            CONNECT came with the first packet of {handshakes.early_data_accepted} (0-RTT)\n"
    )


def summary(devices: list[Device], stored: Stored) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("device")
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
    console.print(f"next        {tool} serve {relative(HERE.parent / 'broker.toml')}", highlight=False)
    console.print("\nEverything that was published is stored." if complete else "\nSomething is missing.")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
