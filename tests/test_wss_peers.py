"""MQTT over WebSocket with other people's software on the other side: mosquitto, aedes, MQTT.js and paho."""

from __future__ import annotations

import asyncio
import http.server
import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import paho.mqtt.client as paho
import pytest
from paho_client import Paho
from real_brokers import Mosquitto, free_port
from web_servers import javascript, websocket_aedes, websocket_mosquitto
from wss_dialogue import client, dialogue, last_error

from tesaiot_connect import (
    Broker,
    BrokerOptions,
    Client,
    ClientOptions,
    Duration,
    ListenerSpec,
    Message,
    Negotiator,
    ServerTls,
    Size,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_tcp_tls import TcpTls
from tesaiot_connect_wss import Wss

Version = Literal["5", "3.1.1"]
FLOOD = 5000
BIG = 1024 * 1024
UNLIMITED = "max_queued_messages 0"


# --- our client, their brokers ------------------------------------------------------------


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[dict[str, str]]:
    """URLs by name."""
    folder, tls = tmp_path_factory.mktemp("servers"), certificates.server()
    with (
        websocket_mosquitto(folder / "plain", UNLIMITED) as plain,
        websocket_mosquitto(folder / "tls", UNLIMITED, tls=tls) as secure,
        websocket_aedes(folder / "aedes") as aedes,
        websocket_aedes(folder / "aedes-tls", tls=tls) as aedes_tls,
    ):
        yield {"mosquitto": plain, "mosquitto-tls": secure, "aedes": aedes, "aedes-tls": aedes_tls}


@pytest.mark.parametrize(
    ("server", "version"),
    [
        ("mosquitto", "5"),
        ("mosquitto", "3.1.1"),
        ("mosquitto-tls", "5"),
        ("aedes", "3.1.1"),
        ("aedes-tls", "3.1.1"),
    ],
)
def test_there_and_back(
    servers: dict[str, str], certificates: Certificates, server: str, version: Version
) -> None:
    """Every QoS, a flood, and a large message: all of it, once, in order."""
    topic, url = f"peers/{uuid4()}", servers[server]
    # mosquitto sends 4 KiB a tenth of a second, once a message is larger; it receives as fast as any
    large = 6000 if server.startswith("mosquitto") else BIG

    async def main() -> None:
        async with dialogue(
            topic, client(url, certificates, version), client(url, certificates, version)
        ) as both:
            for qos, count in ((0, 500), (1, FLOOD), (2, 500)):
                sent = [Message(topic, b"%d" % number, qos=qos) for number in range(count)]
                got = await both.there_and_back(sent)
                assert [message.payload for message in got] == [message.payload for message in sent]
                assert {message.qos for message in got} == {qos}
            payload = bytes(range(256)) * (large // 256)
            for qos in (0, 1, 2):
                (message,) = await both.there_and_back([Message(topic, payload, qos=qos)])
                assert message.payload == payload
            assert (both.writer.status.connects, both.subscriber.status.connects) == (1, 1)
            await both.writer.publish([Message(f"{topic}/other", bytes(BIG), qos=1)])

    asyncio.run(main())


@contextmanager
def two_doors(folder: Path) -> Iterator[tuple[Mosquitto, str]]:
    """mosquitto that keeps its sessions, and the URL of its WebSocket listener."""
    port = free_port()
    lines = (f"listener {port} 127.0.0.1", "protocol websockets", UNLIMITED)
    with Mosquitto(folder, *lines, persistence=True) as broker:
        yield broker, f"ws://127.0.0.1:{port}/mqtt"


def test_a_large_message_arrives_whole(folder: Path, certificates: Certificates) -> None:
    """At mosquitto over WebSocket, and from there over TCP."""
    payload = bytes(range(251)) * (BIG // 251)

    async def main(tcp: str, url: str) -> None:
        subscriber = Client(Negotiator([TcpTls(Url.parse(tcp))]), ClientOptions())
        async with dialogue("large", client(url, certificates), subscriber) as both:
            (message,) = await both.there_and_back([Message("large", payload, qos=1)])
            assert message.payload == payload

    with two_doors(folder) as (broker, url):
        asyncio.run(main(broker.url, url))


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_restarted_broker_is_found_again(
    folder: Path, certificates: Certificates, version: Version
) -> None:
    """What was acknowledged before, and what was published while it was away, arrives."""

    async def main(broker: Mosquitto, url: str) -> None:
        subscriber = client(url, certificates, version, client_id="reader")
        writer = client(url, certificates, version, client_id="writer")
        numbers = [b"%d" % number for number in range(3000)]
        async with dialogue("restart", writer, subscriber) as both:
            seen: set[bytes] = set()
            publishing = asyncio.create_task(
                writer.publish([Message("restart", number, qos=1) for number in numbers])
            )
            while len(seen) < 1000:
                seen |= {message.payload for message in await both.read(1)}
            await asyncio.to_thread(broker.stop)
            await asyncio.to_thread(broker.start)
            await writer.publish([Message("restart", b"the last", qos=1)])
            await publishing
            while not seen >= {*numbers, b"the last"}:
                seen |= {message.payload for message in await both.read(1)}
            assert (writer.status.connects, subscriber.status.connects) == (2, 2)

    with two_doors(folder) as (broker, url):
        asyncio.run(main(broker, url))


@contextmanager
def web_server(folder: Path) -> Iterator[int]:
    """One that knows nothing of WebSocket."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

    (folder / "mqtt").write_text("<html>It works!</html>")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_the_wrong_door(
    servers: dict[str, str], mosquitto: Mosquitto, folder: Path, certificates: Certificates
) -> None:
    def explained(url: str) -> str:
        said = asyncio.run(last_error(client(url, certificates)))
        assert url.partition("?")[0] in said
        return said

    plain, secure = servers["aedes"], servers["aedes-tls"]
    said = explained(plain.replace("/mqtt", "/elsewhere"))
    assert "400" in said
    assert "path" in said
    assert "not that of plain MQTT" in explained(f"ws://127.0.0.1:{mosquitto.port}/mqtt")
    assert "check that the port speaks TLS" in explained(f"wss://localhost:{mosquitto.port}/mqtt")
    assert "ws://" in explained(plain.replace("ws://127.0.0.1", "wss://localhost"))
    said = explained(secure.replace("wss:", "ws:"))
    assert "400" in said or "port" in said, said
    with web_server(folder) as port:
        assert "not a WebSocket endpoint" in explained(f"ws://127.0.0.1:{port}/mqtt")
        assert "nothing at this path (404" in explained(f"ws://127.0.0.1:{port}/ws")
    assert "refused" in explained(f"ws://127.0.0.1:{free_port()}/mqtt")


# --- their clients, our listener ----------------------------------------------------------


def listening(tls: ServerTls | None = None, **options: Any) -> ListenerSpec:
    scheme, host = ("wss", "localhost") if tls else ("ws", "127.0.0.1")
    return ListenerSpec("ws", Wss(Url.parse(f"{scheme}://{host}:0/mqtt"), server_tls=tls, **options))


def broker() -> Broker:
    return Broker(BrokerOptions(max_packet_size=Size(2 * BIG)))


@pytest.mark.parametrize(("version", "secure"), [(5, False), (4, True)])
def test_mqtt_js(certificates: Certificates, version: int, secure: bool) -> None:
    """Its packets come in many frames; the compression it offers is not taken; it learns how it ended."""
    tls = certificates.server() if secure else None
    command = javascript("ws_client.js", "mqtt", "ws")

    async def main() -> None:
        async with asyncio.timeout(90):
            async with broker().serving([listening(tls, ping_interval=Duration(0.1))]) as (url,):
                ca = str(certificates.ca_file)
                process = await asyncio.create_subprocess_exec(
                    *command, url, str(version), ca, stdout=asyncio.subprocess.PIPE
                )
                assert process.stdout is not None
                line = await process.stdout.readline()
                assert line, "it failed: see its output"
                told = json.loads(line)
            end = json.loads(await process.stdout.readline())
            assert await process.wait() == 0
        assert (told["extensions"], told["protocol"]) == ("", "mqtt")
        assert told["sent"] > 2 * told["packets"] > 2 * FLOOD, "it used to split its packets"
        assert end["code"] in (1000, 1001)
        assert end["disconnected"] == (0x8B if version == 5 else None)

    asyncio.run(main())


@pytest.mark.parametrize("version", [4, 5])
def test_mqtt_js_sizes_and_wills(certificates: Certificates, version: int) -> None:
    async def main() -> None:
        async with broker().serving([listening(certificates.server())]) as (url,), asyncio.timeout(80):
            process = await asyncio.create_subprocess_exec(
                *javascript("ws_roundtrip.js", "mqtt"),
                url,
                str(version),
                str(certificates.ca_file),
                stdout=asyncio.subprocess.PIPE,
            )
            said, _ = await process.communicate()
            assert (process.returncode, said) == (0, b"ok\n")

    asyncio.run(main())


@pytest.mark.parametrize(("version", "secure"), [(paho.MQTTv311, True), (paho.MQTTv5, False)])
def test_paho(certificates: Certificates, version: int, secure: bool) -> None:
    ended: queue.Queue[Any] = queue.Queue()

    def work(url: str) -> Paho:
        options: dict[str, Any] = {"ca": str(certificates.ca_file)} if secure else {}
        port = urlsplit(url).port
        assert port
        one = Paho(port, version, path="/mqtt", **options)
        answered = threading.Event()
        one.client.on_log = lambda *said: answered.set() if "PINGRESP" in said[3] else None
        one.client.on_disconnect = lambda *said: ended.put(said[3])
        one.subscribe("paho/#", 2)
        for qos, count in ((0, FLOOD), (1, 200), (2, 50)):  # it takes 2 ms to publish at QoS 1
            payloads = [b"%d" % number for number in range(count)]
            one.publish("paho/t", payloads, qos)
            assert [message.payload for message in one.take(count)] == payloads
        big = bytes(range(250)) * 4000
        one.publish("paho/big", [big], 1)
        assert one.take(1)[0].payload == big
        one.client._send_pingreq()
        assert answered.wait(20), "its keepalive was not answered"
        return one

    async def main() -> Paho:
        spec = listening(certificates.server() if secure else None, ping_interval=Duration(0.1))
        async with broker().serving([spec]) as (url,), asyncio.timeout(60):
            return await asyncio.to_thread(work, url)

    one = asyncio.run(main())
    reason = ended.get(timeout=20)
    assert reason.is_failure
    if version == paho.MQTTv5:
        assert reason.value == 0x8B
    one.client.disconnect()
    one.client.loop_stop()
