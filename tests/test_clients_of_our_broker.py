"""Other people's clients against our broker: paho-mqtt, MQTT.js, mosquitto_pub and mosquitto_sub."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import paho.mqtt.client as paho
import pytest
from paho_client import Paho
from real_brokers import program

from tesaiot_connect.protocols import Url
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Certificates
from tesaiot_connect.tls import ServerTls
from tesaiot_connect_tcp_tls import TcpTls

JS = Path(__file__).parent / "js"
both_versions = pytest.mark.parametrize("version", [paho.MQTTv311, paho.MQTTv5])
every_qos = pytest.mark.parametrize("qos", [0, 1, 2])


def with_broker(
    work: Callable[[int], Any], *, options: BrokerOptions | None = None, tls: ServerTls | None = None
) -> None:
    """Serves while `work(port)` runs in a thread."""

    async def main() -> None:
        scheme = "mqtts" if tls else "mqtt"
        transport = TcpTls(url=Url.parse(f"{scheme}://127.0.0.1:0"), server_tls=tls)
        async with Broker(options).serving([ListenerSpec("tcp", transport)]) as (address,):
            async with asyncio.timeout(90):
                await asyncio.to_thread(work, Url.parse(address).port)

    asyncio.run(main())


@both_versions
@every_qos
def test_paho_round_trip(version: int, qos: int) -> None:
    payloads = [b"%d" % number for number in range(1000)]

    def work(port: int) -> None:
        with Paho(port, version) as subscriber, Paho(port, version) as publisher:
            subscriber.subscribe("device/+/telemetry", 2)
            publisher.publish("device/d1/telemetry", payloads, qos)
            got = subscriber.take(len(payloads))
            assert [message.payload for message in got] == payloads
            assert {message.qos for message in got} == {qos}

    with_broker(work)


@both_versions
def test_paho_resumes_its_session(version: int, tmp_path: Path) -> None:
    payloads = [b"%d" % number for number in range(200)]
    options = BrokerOptions(state_file=tmp_path / "broker.db")

    def before(port: int) -> None:
        with Paho(port, version, "sleeper", keep=True) as subscriber:
            assert not subscriber.session_present
            subscriber.subscribe("t/#", 1)
        with Paho(port, version) as publisher:
            publisher.publish("t/kept", [b"retained"], 1, retain=True)
            publisher.publish("t/x", payloads, 1)

    def after(port: int) -> None:
        with Paho(port, version, "sleeper", keep=True) as subscriber:
            assert subscriber.session_present
            got = [message.payload for message in subscriber.take(201)]
            assert got == [b"retained", *payloads]
        with Paho(port, version) as late:
            late.subscribe("t/#", 1)
            (kept,) = late.take(1)
            assert (kept.payload, kept.retain) == (b"retained", True)

    with_broker(before, options=options)
    with_broker(after, options=options)


def test_paho_over_tls(certificates: Certificates) -> None:
    def work(port: int) -> None:
        with Paho(port, paho.MQTTv5, ca=str(certificates.ca_file)) as one:
            one.subscribe("t", 1)
            one.publish("t", [b"x" * 500_000], 1)
            assert len(one.take(1)[0].payload) == 500_000

    with_broker(work, tls=certificates.server())


@pytest.mark.parametrize("version", [4, 5])
def test_mqtt_js(version: int) -> None:
    node = program("node", "nodejs")
    if not (JS / "node_modules" / "mqtt").is_dir():
        program("a copy of MQTT.js in tests/js", "npm ci in tests/js")

    def work(port: int) -> None:
        command = [node, str(JS / "roundtrip.js"), str(port), str(version)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False)
        assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr

    with_broker(work)


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_mosquitto_tools(version: str) -> None:
    publish, subscribe = (
        program("mosquitto_pub", "mosquitto-clients"),
        program("mosquitto_sub", "mosquitto-clients"),
    )
    topic = f"tools/{uuid4()}"

    def work(port: int) -> None:
        common = ["-p", str(port), "-t", topic, "-V", version]
        lines = "".join(f"{number}\n" for number in range(300))
        # retained, so that it does not matter who comes first
        subprocess.run([publish, *common, "-q", "1", "-r", "-m", "kept"], check=True, timeout=30)
        with subprocess.Popen(
            [subscribe, *common, "-q", "2", "-C", "301"], stdout=subprocess.PIPE, text=True
        ) as listener:
            assert listener.stdout is not None
            assert listener.stdout.readline() == "kept\n"
            subprocess.run(
                [publish, *common, "-q", "2", "-l"], input=lines, text=True, check=True, timeout=30
            )
            assert listener.stdout.read() == lines

    with_broker(work)
