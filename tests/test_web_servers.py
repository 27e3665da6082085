"""The WebSocket servers of other tests are what they are taken for: other people's clients say so."""

from __future__ import annotations

import os
import queue
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import pytest
from web_servers import javascript, nginx, websocket_aedes, websocket_mosquitto

from tesaiot_connect.testing import Certificates

Server = Callable[[Path, Certificates], AbstractContextManager[str]]

SERVERS: dict[str, tuple[Server, tuple[int, ...]]] = {
    "mosquitto": (lambda folder, _: websocket_mosquitto(folder), (4, 5)),
    "mosquitto-tls": (lambda folder, own: websocket_mosquitto(folder, tls=own.server()), (5,)),
    "aedes": (lambda folder, _: websocket_aedes(folder), (4,)),
    "aedes-tls": (lambda folder, own: websocket_aedes(folder, tls=own.server()), (4,)),
}


def paho_round_trip(url: str, version: int, ca: Path) -> None:
    """One message there and back by paho over WebSocket."""
    parts = urlsplit(url)
    client = paho.Client(
        paho.CallbackAPIVersion.VERSION2, transport="websockets", protocol=paho.MQTTProtocolVersion(version)
    )
    seen: queue.Queue[bytes] = queue.Queue()
    client.ws_set_options(path=parts.path)
    client.on_connect = lambda *_: client.subscribe("web/servers", 1)
    client.on_subscribe = lambda *_: client.publish("web/servers", b"there and back", 1)
    client.on_message = lambda _client, _user, message: seen.put(message.payload)
    if parts.scheme == "wss":
        client.tls_set(str(ca))
    assert parts.hostname and parts.port
    client.connect(parts.hostname, parts.port)
    client.loop_start()
    try:
        assert seen.get(timeout=20) == b"there and back"
    finally:
        client.disconnect()
        client.loop_stop()


def mqtt_js_round_trip(url: str, version: int, ca: Path) -> None:
    command = [*javascript("ws_roundtrip.js", "mqtt"), url, str(version), str(ca)]
    small = {**os.environ, "SIZES": "0,125,65536"}  # mosquitto takes 50 kB/s over WebSocket
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False, env=small)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("name", SERVERS)
def test_clients_get_their_messages_back(name: str, folder: Path, certificates: Certificates) -> None:
    serve, versions = SERVERS[name]
    with serve(folder, certificates) as url:
        for version in versions:
            paho_round_trip(url, version, certificates.ca_file)
        mqtt_js_round_trip(url, versions[-1], certificates.ca_file)


@pytest.fixture(scope="module")
def terminated(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[str]:
    """nginx's URL, with aedes behind it."""
    folder = tmp_path_factory.mktemp("nginx")
    with websocket_aedes(folder / "aedes") as plain:
        backend = urlsplit(plain).port
        assert backend
        with nginx(folder / "nginx", backend, certificates.server()) as url:
            yield url


def test_nginx_ends_tls_in_front_of_a_broker(terminated: str, certificates: Certificates) -> None:
    paho_round_trip(terminated, 4, certificates.ca_file)
    mqtt_js_round_trip(terminated, 4, certificates.ca_file)


def test_nginx_hands_on_the_path_alone(terminated: str, certificates: Certificates) -> None:
    port = urlsplit(terminated).port
    context = ssl.create_default_context(cafile=str(certificates.ca_file))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as tcp,
        context.wrap_socket(tcp, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"GET /elsewhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: tls.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404") and b"Server: nginx" in answer


def test_a_server_is_gone_when_it_is_left(folder: Path, certificates: Certificates) -> None:
    with websocket_aedes(folder / "aedes") as plain:
        backend = urlsplit(plain).port
        assert backend
        with nginx(folder / "nginx", backend, certificates.server()) as url:
            ports = (backend, urlsplit(url).port)
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
