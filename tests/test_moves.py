"""From TLS over TCP to QUIC and on, with real transports, while messages stream in both directions."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Literal

import pytest
from platform_thread import Platform
from udp_gate import Gate

from tesaiot_connect import (
    Backoff,
    Broker,
    BrokerOptions,
    Client,
    ClientOptions,
    Duration,
    ListenerSpec,
    Message,
    MQTTQUICClient,
    NegotiationOptions,
    Negotiator,
    TlsOptions,
    Url,
)
from tesaiot_connect.client import moving
from tesaiot_connect.portal import Portal
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls

QUICK = Backoff(min=Duration(0.01), max=Duration(0.1))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow may take these times up."""
    for name in ("_ANSWERS", "_SETTLING"):
        monkeypatch.setattr(moving, name, 60.0)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("streams", ["single", "per-topic"])
def test_from_tls_to_quic_when_udp_comes_back(
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
    protocol: Literal["5", "3.1.1"],
    streams: Literal["single", "per-topic"],
) -> None:
    caplog.set_level(logging.INFO, logger="tesaiot_connect")

    async def main() -> None:
        server = certificates.server()
        specs = [
            ListenerSpec("quic", QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=server)),
            ListenerSpec("tls", TcpTls(Url.parse("mqtts://127.0.0.1:0"), server_tls=server)),
        ]
        tls = TlsOptions(ca_file=certificates.ca_file)
        async with Broker(BrokerOptions(max_queue_messages=100_000)).serving(specs) as (quic, tcp):
            behind = Url.parse(quic).port
            async with Gate(behind) as gate:
                dialer = Negotiator(
                    [
                        QuicAioquic(Url.parse(f"quic://127.0.0.1:{gate.port}"), tls=tls),
                        TcpTls(Url.parse(tcp), tls=tls),
                    ],
                    NegotiationOptions(race_delay=Duration(0.02), penalty=Duration(0.05), memory=False),
                    timeout=30.0,
                )
                options = ClientOptions(
                    client_id="mover", protocol=protocol, streams=streams, reconnect=QUICK
                )
                await stream(gate, dialer, options, TcpTls(Url.parse(tcp), tls=tls))

    async def stream(gate: Gate, dialer: Negotiator, options: ClientOptions, plain: TcpTls) -> None:
        async with (
            Client(dialer, options) as mover,
            Client(plain, ClientOptions(reconnect=QUICK)) as other,
            mover.subscribe(["down/#"]) as down,
            other.subscribe(["up/#"]) as up,
        ):
            for one in (mover, other):
                await one.publish([Message("x", b"", 1)])
            assert mover.status.transport == "tcp_tls"
            assert mover.status.better_after is not None
            assert [one.outcome for one in mover.status.attempts] == ["lost", "won"]
            sent = {"up": 0, "down": 0}
            got: dict[str, list[int]] = {"up": [], "down": []}

            async def feed(one: Client, way: str) -> None:
                while mover.status.moves == 0 or sent[way] < 2000:
                    numbers = range(sent[way], sent[way] + 50)
                    sent[way] += 50
                    await one.publish([Message(f"{way}/{n % 4}", b"%d" % n, 1) for n in numbers])

            async def collect(reader: Any, way: str) -> None:
                while mover.status.moves == 0 or sent[way] < 2000 or len(got[way]) < sent[way]:
                    delivery = await reader.read()
                    got[way] += [int(one.payload) for one in delivery.batch.messages]
                    await delivery.ack()

            async def allow() -> None:
                while min(map(len, got.values())) < 500:
                    await asyncio.sleep(0.005)
                gate.open = True

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(feed(mover, "up"))
                tasks.create_task(feed(other, "down"))
                tasks.create_task(collect(up, "up"))
                tasks.create_task(collect(down, "down"))
                tasks.create_task(allow())
            for way in got:
                for topic in range(4):
                    mine = [number for number in got[way] if number % 4 == topic]
                    assert mine == list(range(topic, sent[way], 4)), "all, once, in order"
            status = mover.status
            assert status.transport == "quic_aioquic"
            assert status.url == f"quic://127.0.0.1:{gate.port}"
            assert (status.connects, status.moves, status.better_after) == (2, 1, None)
            assert status.session_present

    async def bounded() -> None:
        async with asyncio.timeout(150):
            await main()

    asyncio.run(bounded())
    told = [line for line in caplog.messages if line.startswith("mover: moved from mqtts://")]
    assert len(told) == 1
    assert "by quic_aioquic" in told[0]
    assert "session kept, not subscribing again" in told[0]


def test_a_device_is_not_told_of_a_move(tmp_path: Path) -> None:
    told: list[str] = []
    with Platform(tmp_path / "platform") as platform, Portal(name="gate") as portal:
        gate = Gate(Url.parse(platform.urls["quic"]).port)
        portal.call(gate.__aenter__)
        device = MQTTQUICClient(
            platform.device,
            url=[f"quic://localhost:{gate.port}", platform.urls["tls"]],
            client_id="mover",
            race_delay="20ms",
            penalty="50ms",
            memory=False,
        )
        device.on_connect = lambda *_: told.append("connect")
        device.on_disconnect = lambda *_: told.append("disconnect")
        with device:
            assert device.status is not None
            assert device.status.transport == "tcp_tls"
            gate.open = True
            while device.status.moves == 0 or device.status.state != "connected":
                assert device.publish_telemetry({"temperature": 1}, timeout=30).is_published()
            assert device.status.transport == "quic_aioquic"
            assert told == ["connect"]
        portal.call(gate.__aexit__)
    assert told == ["connect", "disconnect"]
