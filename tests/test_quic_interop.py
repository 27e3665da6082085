"""MQTT over QUIC with an independent stack on the other side: quic-go, by a bridge before real peers.

Real clients reach our broker through it, and our client reaches mosquitto. At the end our own two halves meet
in the commands.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import paho.mqtt.client as paho
import pytest
import quic_bridge
from paho_client import Paho
from quic_bridge import Bridge
from quic_peers import Served, serving
from real_brokers import Mosquitto, free_udp_port, program, stop

from tesaiot_connect import (
    BrokerOptions,
    Client,
    ClientOptions,
    Message,
    Negotiator,
    Size,
    Subscription,
    TlsOptions,
    Unsupported,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic

JS = Path(__file__).parent / "js"
TOOL = Path(sys.executable).with_name("tesaiot-connect")
BIG = 5_000_000
both_versions = pytest.mark.parametrize("version", [paho.MQTTv311, paho.MQTTv5])
every_qos = pytest.mark.parametrize("qos", [0, 1, 2])


# --- their clients, our broker


@pytest.fixture(scope="module")
def served(certificates: Certificates) -> Iterator[Served]:
    """Our broker on loopback."""
    options = BrokerOptions(max_packet_size=Size(8 * 1024 * 1024))
    with serving(None, certificates, options) as found:
        yield found


def port_of(url: str) -> int:
    port = Url.parse(url).port
    assert port is not None
    return port


@contextmanager
def bridged(served: Served, certificates: Certificates, **flags: bool) -> Iterator[Bridge]:
    """A TCP port whose connections reach our broker over QUIC."""
    address = f"127.0.0.1:{port_of(served.url)}"
    with quic_bridge.client(address, certificates.ca_file, **flags) as bridge:
        yield bridge


@pytest.fixture
def bridge(served: Served, certificates: Certificates) -> Iterator[Bridge]:
    with bridged(served, certificates) as found:
        yield found


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
@every_qos
def test_mosquitto_tools_reach_our_broker(bridge: Bridge, version: str, qos: int) -> None:
    publish = program("mosquitto_pub", "mosquitto-clients")
    subscribe = program("mosquitto_sub", "mosquitto-clients")
    common = ["-p", str(bridge.port), "-t", f"tools/{uuid4()}", "-V", version]
    lines = "".join(f"{number}\n" for number in range(300))
    # retained, so that it does not matter who comes first
    subprocess.run([publish, *common, "-q", "1", "-r", "-m", "kept"], check=True, timeout=60)
    with subprocess.Popen(
        [subscribe, *common, "-q", "2", "-C", "301", "-W", "60"], stdout=subprocess.PIPE, text=True
    ) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "kept\n"
        subprocess.run(
            [publish, *common, "-q", str(qos), "-l"], input=lines, text=True, check=True, timeout=60
        )
        assert listener.stdout.read() == lines
    for number in (1, 2, 3):
        assert bridge.wait("closed", number)["error"] == ""


@both_versions
@every_qos
def test_paho_reaches_our_broker(bridge: Bridge, version: int, qos: int) -> None:
    payloads = [b"%d" % number for number in range(1000)]
    topic = f"paho/{uuid4()}"
    with Paho(bridge.port, version) as subscriber, Paho(bridge.port, version) as publisher:
        subscriber.subscribe(topic, 2)
        publisher.publish(topic, payloads, qos)
        got = subscriber.take(len(payloads))
        assert [message.payload for message in got] == payloads
        assert {message.qos for message in got} == {qos}


@both_versions
def test_paho_sends_a_big_message_there_and_back(bridge: Bridge, version: int) -> None:
    payload, topic = os.urandom(BIG), f"paho/{uuid4()}"
    with Paho(bridge.port, version) as one:
        one.subscribe(topic, 1)
        one.publish(topic, [payload], 1)
        assert one.take(1)[0].payload == payload


def test_mqtt_js_reaches_our_broker(bridge: Bridge) -> None:
    node = program("node", "nodejs")
    if not (JS / "node_modules" / "mqtt").is_dir():
        program("a copy of MQTT.js in tests/js", "npm ci in tests/js")
    command = [node, str(JS / "roundtrip.js"), str(bridge.port), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_quic_go_resumes_with_our_listener(served: Served, certificates: Certificates) -> None:
    before = served.status()
    with bridged(served, certificates, resume=True) as bridge:
        for number in (1, 2, 3):
            with Paho(bridge.port, paho.MQTTv5) as one:
                one.publish("resume/t", [b"x"], 1)
            assert bridge.wait("connected", number)["resumed"] is (number > 1)
            bridge.wait("closed", number)
    after = served.status()
    assert after.resumed - before.resumed == 2
    assert after.early_data_accepted == before.early_data_accepted


def test_quic_go_sends_early_data_to_our_listener(served: Served, certificates: Certificates) -> None:
    before = served.status()
    with bridged(served, certificates, early=True) as bridge:
        for number in (1, 2, 3):
            with Paho(bridge.port, paho.MQTTv5) as one:
                one.publish("early/t", [b"x"], 1)
            connected = bridge.wait("connected", number)
            assert (connected["early"], connected["used_0rtt"]) == (number > 1, number > 1)
            bridge.wait("closed", number)
    assert served.status().early_data_accepted - before.early_data_accepted == 2


def test_early_data_of_quic_go_that_we_reject_goes_again(certificates: Certificates) -> None:
    """The broker was restarted, and knows nothing of the ticket."""
    port = free_udp_port()
    with quic_bridge.client(f"127.0.0.1:{port}", certificates.ca_file, early=True) as via:
        with serving(None, certificates, port=port), Paho(via.port, paho.MQTTv5) as one:
            one.publish("early/t", [b"x"], 1)
            via.wait("connected")
        via.wait("closed")
        with serving(None, certificates, port=port) as anew:
            with Paho(via.port, paho.MQTTv5) as one:
                one.publish("early/t", [b"x"], 1)
            connected = via.wait("connected", 2)
            assert (connected["early"], connected["used_0rtt"], connected["resumed"]) == (True, False, False)
            assert (anew.status().accepted, anew.status().early_data_accepted) == (1, 0)


# --- our client, their broker


@contextmanager
def before_mosquitto(
    mosquitto: Mosquitto, certificates: Certificates, *, early: bool = False, port: int = 0
) -> Iterator[Bridge]:
    """mosquitto on a QUIC port."""
    own = certificates.server()
    with quic_bridge.server(
        f"127.0.0.1:{mosquitto.port}",
        own.certificate,
        own.key,
        early=early,
        listen=f"127.0.0.1:{port}",
    ) as bridge:
        yield bridge


def recipe(bridge: Bridge, certificates: Certificates, folder: Path, **options: Any) -> QuicAioquic:
    # the bridge is a process of its own, which may stand still for seconds
    options = {"connect_timeout": 30.0, "path_timeout": 40.0, **options}
    tls = TlsOptions(ca_file=certificates.ca_file)
    return QuicAioquic(Url.parse(f"quic://{bridge.address}"), tls=tls, ticket_folder=folder, **options)


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await main

    asyncio.run(bounded())


async def round_trip(transport: QuicAioquic, options: ClientOptions, payloads: list[bytes], qos: int) -> None:
    """One client sends to itself."""
    topic = f"ours/{uuid4()}"
    async with Client(Negotiator([transport]), options) as client:
        await client.connected()
        async with client.subscribe([Subscription(topic, qos=2)]) as reader:
            reading = asyncio.create_task(reader.read())
            while not reading.done():  # until it is subscribed
                await client.publish([Message(topic, b"first", qos=1)])
                await asyncio.wait([reading], timeout=0.02)
            delivery = await reading
            got: list[Message] = []
            publishing = asyncio.create_task(
                client.publish([Message(topic, payload, qos=qos) for payload in payloads])
            )
            while len(got) < len(payloads):
                got += [one for one in delivery.batch.messages if one.payload != b"first"]
                await delivery.ack()
                if len(got) < len(payloads):
                    delivery = await reader.read()
            await publishing
        assert [one.payload for one in got] == payloads
        assert {one.qos for one in got} == {qos}
        assert client.status.transport == "quic_aioquic"
        assert client.status.connects == 1


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
@every_qos
def test_our_client_reaches_mosquitto(
    mosquitto: Mosquitto,
    certificates: Certificates,
    tmp_path: Path,
    protocol: Literal["3.1.1", "5"],
    qos: int,
) -> None:
    with before_mosquitto(mosquitto, certificates) as bridge:
        payloads = [b"%d" % number for number in range(500)]
        transport = recipe(bridge, certificates, tmp_path)
        run(round_trip(transport, ClientOptions(protocol=protocol), payloads, qos))
        assert bridge.wait("connected")["alpn"] == "mqtt"


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
def test_our_client_sends_a_big_message_there_and_back(
    mosquitto: Mosquitto, certificates: Certificates, tmp_path: Path, protocol: Literal["3.1.1", "5"]
) -> None:
    with before_mosquitto(mosquitto, certificates) as bridge:
        transport = recipe(bridge, certificates, tmp_path)
        run(round_trip(transport, ClientOptions(protocol=protocol), [os.urandom(BIG)], 1))


async def one_connection(transport: QuicAioquic, early_publish: bool = False) -> tuple[bool, bool, bool]:
    """A client that publishes one message: whether its connection was resumed, sent early data, and whether
    that was accepted."""
    dialled = []

    class Dialer:
        async def connect(self, **arguments: Any) -> Any:
            dialled.append(await transport.connect(**arguments))
            return dialled[-1]

    options = ClientOptions(early_publish=early_publish)
    async with Client(Dialer(), options) as client:
        await client.publish([Message("ours/resume", b"x", qos=1)])
        (connection,) = dialled
        status = connection.status().quic
        assert status is not None
        return status.resumed, connection.early_sent, status.early_data_accepted


@pytest.mark.parametrize("early", [False, True])
def test_our_client_resumes_with_quic_go(
    mosquitto: Mosquitto, certificates: Certificates, tmp_path: Path, early: bool
) -> None:
    async def main(transport: QuicAioquic) -> None:
        assert await one_connection(transport) == (False, False, False)
        for early_publish in (False, True):
            assert await one_connection(transport, early_publish) == (True, early, early)

    with before_mosquitto(mosquitto, certificates, early=early) as bridge:
        run(main(recipe(bridge, certificates, tmp_path)))
        for number in (1, 2, 3):
            connected = bridge.wait("connected", number)
            assert (connected["resumed"], connected["used_0rtt"]) == (number > 1, early and number > 1)


def test_early_data_of_ours_that_quic_go_rejects_goes_again(
    mosquitto: Mosquitto, certificates: Certificates, tmp_path: Path
) -> None:
    with before_mosquitto(mosquitto, certificates, early=True) as bridge:
        run(once(recipe(bridge, certificates, tmp_path), (False, False, False)))
        bridge.stop()
        with before_mosquitto(mosquitto, certificates, early=True, port=bridge.port) as anew:
            # it knows nothing of the ticket
            run(once(recipe(anew, certificates, tmp_path), (False, True, False)))
            assert [one["event"] for one in anew.events].count("connected") == 1


async def once(transport: QuicAioquic, expected: tuple[bool, bool, bool]) -> None:
    assert await one_connection(transport, early_publish=True) == expected


def test_a_server_that_allows_no_moves(
    mosquitto: Mosquitto, certificates: Certificates, tmp_path: Path
) -> None:
    async def main(transport: QuicAioquic) -> None:
        connection = await transport.connect()
        with pytest.raises(Unsupported, match="does not allow its clients to move"):
            await connection.migrate()
        await connection.probe()
        await connection.aclose()

    with before_mosquitto(mosquitto, certificates) as bridge:
        run(main(recipe(bridge, certificates, tmp_path)))


# --- our commands on both sides


class Commands:
    """`tesaiot-connect` with a `serve` on QUIC."""

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        self.folder = folder
        self.ca_file = certificates.ca_file
        self.environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "HOME": str(folder)}
        self.url = ""

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [TOOL, *arguments], text=True, env=self.environment, stderr=subprocess.PIPE, **options
        )

    def run(self, *arguments: str, text: str = "") -> str:
        done = subprocess.run(
            [TOOL, *arguments],
            input=text,
            text=True,
            env=self.environment,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def trust(self) -> tuple[str, ...]:
        """And patience with a broker that stands still for seconds."""
        return ("--set", f"tls.ca_file={self.ca_file}", "--set", "connect_timeout=30s")


@pytest.fixture
def commands(tmp_path: Path, certificates: Certificates) -> Iterator[Commands]:
    own = certificates.server()
    config = tmp_path / "broker.toml"
    config.write_text(
        f"""
        [listeners.quic]
        url = "quic://127.0.0.1:0"
        server_tls = {{ certificate = "{own.certificate}", key = "{own.key}" }}
        """
    )
    made = Commands(tmp_path, certificates)
    log = tmp_path / "broker.log"
    with log.open("w") as output:
        process = subprocess.Popen([TOOL, "serve", config], env=made.environment, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"listener quic on (quic://\S+)\n", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        made.url = found[1]
        yield made
    finally:
        assert stop(process, 60.0) == 0, log.read_text()


@every_qos
def test_pub_and_sub(commands: Commands, qos: int) -> None:
    commands.run("pub", commands.url, "t/kept", "kept", "-r", *commands.trust)
    with commands.start(
        "sub", commands.url, "t/#", "-q", "2", "-C", "101", *commands.trust, stdout=subprocess.PIPE
    ) as listener:
        assert listener.stdout is not None and listener.stderr is not None
        assert listener.stdout.readline() == "t/kept kept\n"
        lines = "".join(f"{number}\n" for number in range(100))
        commands.run("pub", commands.url, "t/x", "-l", "-q", str(qos), *commands.trust, text=lines)
        assert listener.stdout.read() == "".join(f"t/x {number}\n" for number in range(100))
        assert listener.wait(60) == 0, listener.stderr.read()
    assert list((commands.folder / "state").rglob("*quic-tickets*")) != []


def test_run(commands: Commands) -> None:
    """A pipeline from a QUIC source to a file, and one from a file to a QUIC sink."""
    config = commands.folder / "pipeline.toml"
    archive = commands.folder / "archive.jsonl"
    config.write_text(
        f"""
        [connections.broker]
        client_id = "archive"
        endpoints = [{{ url = "{commands.url}", path_timeout = "5s" }}]
        tls = {{ ca_file = "{commands.ca_file}" }}

        [sources.telemetry]
        type = "mqtt"
        connection = "broker"
        subscribe = ["device/+/telemetry"]
        topic_fields = "device/{{device_id}}/telemetry"

        [sinks.archive]
        type = "jsonl"
        path = "{archive}"

        [pipelines.archive]
        from = "telemetry"
        to = ["archive"]
        """
    )
    commands.run("lint", str(config))
    assert "broker" in commands.run("check", str(config))
    process = commands.start("run", str(config))
    try:
        deadline = time.monotonic() + 100
        sent = 0
        while not (archive.exists() and archive.read_text().count("\n") >= 3):
            commands.run(
                "pub", commands.url, "device/d1/telemetry", json.dumps({"number": sent}), *commands.trust
            )
            sent += 1
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        assert stop(process, 60.0) == 0
        assert process.stderr is not None
        process.stderr.close()
    rows = [json.loads(line) for line in archive.read_text().splitlines()]
    assert "d1" in str(rows[0])


@pytest.mark.parametrize("wrong", ["authority", "port"])
def test_pub_says_what_is_wrong(commands: Commands, wrong: str) -> None:
    if wrong == "authority":
        command = ("pub", commands.url, "t", "x")
        told = "not from a trusted authority"
    else:
        command = ("pub", f"quic://127.0.0.1:{free_udp_port()}", "t", "x", *commands.trust)
        told = "nothing listens on that UDP port"
    with commands.start(*command) as process:
        assert process.stderr is not None
        assert told in process.stderr.readline()
        process.kill()
