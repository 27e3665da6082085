"""A pipeline whose connection moves to QUIC and loses it again: every row once, or at least once."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from quic_peers import gives_up_after
from udp_gate import Gate

from tesaiot_connect import (
    Broker,
    BrokerOptions,
    Client,
    ClientOptions,
    ListenerSpec,
    Message,
    Url,
    load,
    run,
)
from tesaiot_connect.client import moving
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls

PIPELINE = """
[connections.broker]
client_id = "archive"
endpoints = [
    {{ url = "quic://127.0.0.1:{quic}", path_timeout = "60s" }},
    "{tls}",
]
tls = {{ ca_file = "{ca_file}" }}
race_delay = "20ms"
penalty = "50ms"
memory = false
connect_timeout = "1s"
reconnect = {{ min = "10ms", max = "100ms" }}

[sources.telemetry]
type = "mqtt"
connection = "broker"
subscribe = ["device/+/telemetry"]

[sinks.rows]
type = "sqlite"
path = "{database}"

[sinks.copies]
type = "mqtt"
connection = "broker"
topic = "copy/{{topic}}"

[pipelines.archive]
from = "telemetry"
to = ["rows", "copies"]
retry = {{ min = "10ms", max = "100ms" }}
"""


def numbers(database: Path) -> Counter[int]:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
            return Counter(number for (number,) in db.execute("SELECT number FROM telemetry"))
    except sqlite3.OperationalError:
        return Counter()


def test_source_and_sink_move_and_lose_their_path_while_rows_come(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share one negotiator, with a client each. Moves alone may not even bring a row twice."""
    for name in ("_ANSWERS", "_SETTLING"):  # a machine that is slow may take them up
        monkeypatch.setattr(moving, name, 60.0)

    async def main() -> None:
        server = certificates.server()
        specs = [
            ListenerSpec("quic", QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=server)),
            ListenerSpec("tls", TcpTls(Url.parse("mqtts://127.0.0.1:0"), server_tls=server)),
            ListenerSpec("tcp", TcpTls(Url.parse("mqtt://127.0.0.1:0"))),
        ]
        options = BrokerOptions(max_queue_messages=1_000_000)
        async with Broker(options).serving(specs) as (quic, tls, tcp), Gate(Url.parse(quic).port) as gate:
            database = tmp_path / "telemetry.db"
            file = tmp_path / "pipeline.toml"
            file.write_text(
                PIPELINE.format(
                    quic=gate.port, tls=tls, ca_file=certificates.ca_file, database=database.as_posix()
                )
            )
            config = load(str(file))
            connection = config.connections["broker"]
            stop = asyncio.Event()
            plain = TcpTls(Url.parse(tcp))
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(run(config.pipelines, stop=stop))
                async with Client(plain, ClientOptions(client_id="witness", protocol="5")) as witness:
                    async with witness.subscribe(["copy/#"]) as reader:
                        copies: Counter[int] = Counter()
                        reading = tasks.create_task(collect(reader, copies))
                        await journey(connection, gate, witness, database, copies)
                        reading.cancel()
                stop.set()
            assert running.result()

    async def collect(reader: Any, copies: Counter[int]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                delivery = await reader.read()
                copies.update(int(one.payload[10:-1]) for one in delivery.batch.messages)
                await delivery.ack()

    async def journey(
        connection: Any, gate: Gate, witness: Client, database: Path, copies: Counter[int]
    ) -> None:
        sent = 0

        async def send(count: int = 25) -> None:
            nonlocal sent
            batch = range(sent, sent + count)
            sent += count
            await witness.publish(
                [Message(f"device/{n % 5}/telemetry", b'{"number":%d}' % n, 1) for n in batch]
            )

        def by(transport: str) -> bool:
            statuses = [client.status for client in connection.clients()]
            return len(statuses) == 2 and all(
                (one.state, one.transport) == ("connected", transport) for one in statuses
            )

        async def all_there() -> Counter[int]:
            wanted = set(range(first, sent))
            while True:
                rows = await asyncio.to_thread(numbers, database)
                if set(rows) >= wanted and set(copies) >= wanted:
                    return rows
                await asyncio.sleep(0.01)

        while not (copies and by("tcp_tls")):  # until it is subscribed
            await send(1)
            await asyncio.sleep(0.02)
        first = sent
        gate.open = True
        while not by("quic_aioquic"):
            await send()
        await send()
        assert max((await all_there()).values()) == 1, "a move brings nothing twice"
        gate.open = False
        for one in connection.clients():  # until here, standing still was no lost path
            gives_up_after(one._live.connection, 0.5)
        while not by("tcp_tls"):
            await send()
        gate.open = True
        while not by("quic_aioquic"):
            await send()
        await send()
        await all_there()
        statuses = {client.status.name: client.status for client in connection.clients()}
        assert set(statuses) == {"broker", "broker-sink"}
        for status in statuses.values():
            assert status.moves >= 2
            assert status.last_error == ""

    async def bounded() -> None:
        async with asyncio.timeout(200):
            await main()

    asyncio.run(bounded())
