"""The client of the long-path benchmarks, run at one end of it.

wan.py connect HOST QUIC_PORT TLS_PORT CA REPETITIONS
    dials again and again, each way in turn, and prints a line for each:
    MODE SECONDS_TO_CONNACK SECONDS_TO_FIRST_PUBACK
wan.py stream KIND HOST PORT CA SECONDS RATE TOPICS
    publishes RATE messages a second on TOPICS topics; each carries the clock. KIND is
    "streams" (QUIC, a stream for each topic), "stream" (QUIC, one stream) or "tls"
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import attrs

from tesaiot_connect import Client, ClientOptions, Message, Negotiator, TlsOptions, Transport, Url
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls


async def dial(transport: Transport, *, early_publish: bool) -> tuple[float, float]:
    options = ClientOptions(client_id="bench", clean_session=True, early_publish=early_publish)
    began = time.monotonic()
    async with Client(Negotiator([transport]), options) as client:
        publishing = asyncio.create_task(client.publish([Message("bench/first", b"1", qos=1)]))
        await client.connected()
        accepted = time.monotonic()
        await publishing
        return accepted - began, time.monotonic() - began


async def connect(host: str, quic_port: int, tls_port: int, ca: Path, repetitions: int) -> None:
    tls = TlsOptions(ca_file=ca, minimum_version="1.3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quic = QuicAioquic(Url("quic", host, quic_port), tls=tls, ticket_folder=folder / "kept")
        await dial(quic, early_publish=False)  # leaves a ticket
        for number in range(repetitions):
            modes: dict[str, tuple[Transport, bool]] = {
                "1rtt": (attrs.evolve(quic, ticket_folder=folder / str(number)), False),
                "resumed": (attrs.evolve(quic, zero_rtt=False), False),
                "0rtt": (quic, False),
                "0rtt-early": (quic, True),
                "tls": (TcpTls(Url("mqtts", host, tls_port), tls=tls), False),
            }
            for mode, (transport, early) in modes.items():
                print(mode, *await dial(transport, early_publish=early), flush=True)


async def stream(kind: str, host: str, port: int, ca: Path, seconds: float, rate: float, topics: int) -> None:
    tls = TlsOptions(ca_file=ca)
    transport: Transport
    if kind == "tls":
        transport = TcpTls(Url("mqtts", host, port), tls=tls)
    else:
        transport = QuicAioquic(Url("quic", host, port), tls=tls, zero_rtt=False)
    options = ClientOptions(
        client_id=f"bench-{kind}",
        clean_session=True,
        streams="per-topic" if kind == "streams" else "single",
        max_streams=min(topics, 16),
    )
    count = int(seconds * rate)
    async with Client(Negotiator([transport]), options) as client:
        await client.connected()
        pending: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            payload = f"{time.monotonic():.9f}".encode()
            message = Message(f"bench/load/{number % topics}", payload, qos=1)
            task = asyncio.create_task(client.publish([message]))
            pending.add(task)
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)
        print("streams", client.status.streams, "connects", client.status.connects, flush=True)


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "connect":
        host, quic_port, tls_port, ca, repetitions = words
        asyncio.run(connect(host, int(quic_port), int(tls_port), Path(ca), int(repetitions)))
    else:
        kind, host, port, ca, seconds, rate, topics = words
        asyncio.run(stream(kind, host, int(port), Path(ca), float(seconds), float(rate), int(topics)))


if __name__ == "__main__":
    main()
