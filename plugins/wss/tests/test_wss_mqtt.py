"""Our client against our broker over WebSocket, in a program and on the command line."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loops import LOOPS

from tesaiot_connect import (
    Broker,
    BrokerOptions,
    Client,
    ListenerSpec,
    Message,
    Negotiator,
    Size,
    TlsOptions,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_wss import Wss

TOOL = Path(sys.executable).with_name("tesaiot-connect")
COUNT = 3000
MIB = 1024 * 1024


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_messages_of_every_size_at_qos_1(loop_factory: Any, certificates: Certificates) -> None:
    """Larger than a frame may be, and thousands of small ones, there and back."""
    sizes = [0, 1, 100, 65_535, 70_000, 500_000]
    sent = [Message(f"t/{at}", bytes([at % 256]) * size, qos=1) for at, size in enumerate(sizes)]
    sent += [Message("t/many", b"%d" % number, qos=1) for number in range(COUNT)]

    async def main() -> None:
        server = Wss(Url.parse("wss://127.0.0.1:0/mqtt"), server_tls=certificates.server())
        async with asyncio.timeout(60), Broker().serving([ListenerSpec("wss", server)]) as (url,):
            dialer = Negotiator([Wss(Url.parse(url), tls=TlsOptions(ca_file=certificates.ca_file))])
            async with Client(dialer) as client, client.subscribe(["t/#"]) as reader:
                await client.connected()
                publishing = asyncio.create_task(client.publish(sent))
                got: list[Message] = []
                while len(got) < len(sent):
                    delivery = await reader.read()
                    got += delivery.batch.messages
                    await delivery.ack()
                await publishing
        assert [(one.topic, one.payload) for one in got] == [(one.topic, one.payload) for one in sent]

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def test_a_client_takes_as_large_a_packet_as_over_tcp() -> None:
    asyncio.run(take_a_large_packet())


async def take_a_large_packet() -> None:
    large = Message("t/large", bytes(15 * MIB), qos=1)
    server = Wss(Url.parse("ws://127.0.0.1:0/mqtt"), max_message_size=Size(16 * MIB))
    broker = Broker(BrokerOptions(max_packet_size=Size(16 * MIB), max_queue_bytes=Size(64 * MIB)))
    async with asyncio.timeout(60), broker.serving([ListenerSpec("ws", server)]) as (url,):
        async with Client(Negotiator([Wss(Url.parse(url))])) as client, client.subscribe(["t/#"]) as reader:
            await client.connected()
            await client.publish([large])
            delivery = await reader.read()
            await delivery.ack()
    assert delivery.batch.messages[0].payload == large.payload


BROKER = """
[listeners.web]
scheme = "wss"
host = "127.0.0.1"
port = 0
server_tls = {{ certificate = "{certificate}", key = "{key}" }}
"""
CLIENT = """
[connections.platform]
tls = {{ ca_file = "{ca}" }}

[[connections.platform.endpoints]]
url = "wss://localhost:{port}/mqtt"
headers = {{ Authorization = "Bearer x" }}
proxy = "none"
"""


@pytest.fixture
def broker_port(tmp_path: Path, certificates: Certificates) -> Iterator[int]:
    """A broker process that serves wss://."""
    own = certificates.server()
    config = tmp_path / "broker.toml"
    config.write_text(BROKER.format(certificate=own.certificate.as_posix(), key=own.key.as_posix()))
    with subprocess.Popen([TOOL, "serve", config], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            seen = ""
            while (found := re.search(r"wss://127\.0\.0\.1:(\d+)/mqtt", seen)) is None:
                line = process.stderr.readline()
                assert line, seen
                seen += line
            yield int(found[1])
        finally:
            timer.cancel()
            process.kill()


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_check_pub_and_sub(broker_port: int, tmp_path: Path, certificates: Certificates) -> None:
    config = tmp_path / "client.toml"
    config.write_text(CLIENT.format(port=broker_port, ca=certificates.ca_file.as_posix()))
    checked = tool("check", config)
    assert checked.returncode == 0, checked.stderr
    assert "by wss, MQTT 5" in checked.stdout

    url, trust = f"wss://localhost:{broker_port}", ("--set", f"tls.ca_file={certificates.ca_file}")
    published = tool("pub", url, "device/d1/telemetry/temperature", "25.5", "--retain", *trust)
    assert published.returncode == 0, published.stderr
    subscribed = tool("sub", url, "device/#", "-C", "1", *trust)
    assert subscribed.returncode == 0, subscribed.stderr
    assert "25.5" in subscribed.stdout

    lost = tool("pub", f"{url}/elsewhere", "t", "x", *trust)
    assert lost.returncode == 69
    assert "served at /mqtt" in lost.stderr + lost.stdout
