"""`doctor` against real listeners, brokers and networks: what it finds, and that nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from issuing import Authority
from netlab import Lab, require_namespaces
from platform_thread import Platform
from real_brokers import Mosquitto, free_port, free_udp_port

from tesaiot_connect import (
    Broker,
    Client,
    Connection,
    Listener,
    ListenerSpec,
    Message,
    MqttConnection,
    Negotiator,
    Refused,
    ServerTls,
    Url,
    load,
)
from tesaiot_connect.cli import execute
from tesaiot_connect.diagnosis import Plan, diagnose, sample
from tesaiot_connect.portal import Portal
from tesaiot_connect.protocols import Credentials, Peer, Principal
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls
from tesaiot_connect_wss import Wss

PASSWORD = "pw-that-nobody-may-see"


@attrs.frozen
class Found:
    code: int
    document: dict[str, Any]
    text: str

    @property
    def only(self) -> dict[str, Any]:
        (connection,) = self.document["connections"]
        assert isinstance(connection, dict)
        return connection

    @property
    def endpoints(self) -> list[dict[str, Any]]:
        return list(self.only["endpoints"])

    def outcomes(self, place: int = 0) -> dict[str, str]:
        return {name: step["outcome"] for name, step in self.endpoints[place]["steps"].items()}

    def problem(self, place: int = 0) -> dict[str, Any]:
        found = self.endpoints[place]["problem"]
        assert isinstance(found, dict)
        return found


Doctor = Callable[..., Found]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    def run(*arguments: str | Path) -> Found:
        """What only URLs name has much time, unless it is said how much: what works may be slow."""
        if isinstance(arguments[0], str) and "--timeout" not in arguments:
            arguments = (*arguments, "--timeout", "60s")
        capsys.readouterr()
        code = execute(["doctor", "--json", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert PASSWORD not in captured.out + captured.err
        return Found(code, json.loads(captured.out), captured.err)

    return run


@pytest.fixture(autouse=True)
def little_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as is sent within any time."""
    monkeypatch.setattr(sample, "MOST_BYTES", 256 * 1024)
    monkeypatch.setattr(sample, "MOST_SECONDS", 60.0)


def patient(folder: Path, endpoints: Mapping[str, str], ca_file: Path | None = None) -> Path:
    """A file of one connection: each endpoint with the time it has to connect, and much time for the rest."""
    listed = ", ".join(f'{{ url = "{url}", connect_timeout = "{time}" }}' for url, time in endpoints.items())
    lines = ["[connections.c]", f"endpoints = [{listed}]", 'connect_timeout = "60s"']
    if ca_file is not None:
        lines.append(f"tls = {{ ca_file = {json.dumps(str(ca_file))} }}")
    file = folder / "patient.toml"
    file.write_text("\n".join((*lines, "")))
    return file


@contextmanager
def running(made: Callable[[], AbstractAsyncContextManager[Any]]) -> Iterator[Any]:
    """What the context manager gives, while it is open in a thread of its own."""
    with Portal(name="listeners") as portal:
        opened, close = threading.Event(), asyncio.Event()
        given: list[Any] = []

        async def hold() -> None:
            async with made() as found:
                given.append(found)
                opened.set()
                await close.wait()

        task = portal.start(hold())
        task.add_done_callback(lambda _: opened.set())
        assert opened.wait(30)
        if task.done():
            task.result()
        try:
            yield given[0]
        finally:

            async def end() -> None:
                close.set()

            portal.call(end)
            task.result(30)


@contextmanager
def served(*recipes: Listener, authenticator: Any = None) -> Iterator[list[str]]:
    """A broker with these listeners; their URLs."""
    given = {} if authenticator is None else {"authenticator": authenticator}
    specs = [ListenerSpec(str(number), one, **given) for number, one in enumerate(recipes)]
    with running(lambda: Broker().serving(specs)) as urls:
        yield list(urls)


@contextmanager
def stalling(recipe: Any, connected: threading.Event | None = None) -> Iterator[str]:
    """A listener whose connections are secured, and then hear nothing."""

    async def handler(_connection: Connection) -> None:
        if connected is not None:
            connected.set()
        await asyncio.Event().wait()

    with running(lambda: recipe.listen(handler)) as url:
        yield str(url)


@contextmanager
def silent_udp(port: int = 0) -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", port))
        yield sock.getsockname()[1]


def quic(tls: ServerTls, **more: Any) -> QuicAioquic:
    return QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=tls, **more)


def mqtts(tls: ServerTls) -> TcpTls:
    return TcpTls(Url.parse("mqtts://127.0.0.1:0"), server_tls=tls)


def wss(tls: ServerTls, path: str = "/mqtt") -> Wss:
    return Wss(Url.parse(f"wss://127.0.0.1:0{path}"), server_tls=tls)


MQTT = TcpTls(Url.parse("mqtt://127.0.0.1:0"))


class Doorman:
    """Knows one password, and allows topics under open/."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        if credentials.password != PASSWORD.encode():
            raise Refused("wrong", reason_code=0x86, permanent=True)
        return Guest()


class Guest:
    name, organisation, valid_until = "guest", None, None

    def may_publish(self, topic: str, /) -> bool:
        return topic.startswith("open/")

    may_subscribe = may_publish


LOGIN = ("--set", "auth.type=password", "--set", "auth.username=u", "--set", f"auth.password={PASSWORD}")


# --- what works -------------------------------------------------------------------------------


def test_everything_that_works(doctor: Doctor, certificates: Certificates) -> None:
    tls = certificates.server()
    with served(quic(tls), mqtts(tls), wss(tls), MQTT) as urls:
        found = doctor(*urls, "--set", f"tls.ca_file={certificates.ca_file}", "--throughput")
    assert found.code == 0
    assert found.document["usable"] is found.only["usable"] is True
    assert found.only["uses"] == urls[0]
    assert found.only["why"] == ["it is the first in order of preference, and works"]
    assert found.only["left_out"] == []
    assert [one["url"] for one in found.endpoints] == urls
    every = dict.fromkeys(("name", "reach", "mqtt", "echo", "again", "throughput"), "ok")
    for place, (secure, upgrade) in enumerate(
        (("ok", "none"), ("ok", "none"), ("ok", "ok"), ("none", "none"))
    ):
        assert found.outcomes(place) == {**every, "secure": secure, "upgrade": upgrade}, place
        assert found.endpoints[place]["steps"]["throughput"]["bytes_per_second"] > 0
        assert found.endpoints[place]["steps"]["echo"]["ms"] > 0
        assert found.endpoints[place]["problem"] is None
    over_quic, over_tls, over_wss, plain = found.endpoints
    assert [one["transport"] for one in found.endpoints] == ["quic_aioquic", "tcp_tls", "wss", "tcp_tls"]
    assert (over_quic["resumed"], over_quic["early_data_accepted"]) == (True, True)
    assert over_quic["quic"]["version"] == 1
    assert (over_tls["resumed"], over_tls["quic"]) == (None, None)
    assert [one["alpn"] for one in found.endpoints] == ["mqtt", None, "http/1.1", None]
    assert [one["tls_version"] for one in found.endpoints] == [*["TLSv1.3"] * 3, None]
    for one in (over_quic, over_tls, over_wss):
        assert one["verified"] is True
        assert one["server_name"] == "127.0.0.1"
        assert one["certificate"]["names"] == ["localhost", "127.0.0.1", "::1"]
        assert "O=test authority" in one["certificate"]["issuer"]
        assert one["certificate"]["chain"] == [one["certificate"]["issuer"]]
        days = (one["certificate"]["not_after"] - datetime.datetime.now(datetime.UTC).timestamp()) / 86400
        assert 29 < days < 31
    assert (plain["verified"], plain["certificate"]) == (False, None)
    assert over_tls["mqtt"]["version"] == "5"
    assert over_tls["mqtt"]["session_present"] is False
    assert over_tls["mqtt"]["limits"]["receive_maximum"] > 0
    assert over_tls["addresses"] == ["127.0.0.1"]
    assert over_tls["address"] == urls[1].removeprefix("mqtts://")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_mosquitto_notices_a_guest_that_leaves_nothing(doctor: Doctor, folder: Path, protocol: str) -> None:
    """A client with the same name stays connected, and nothing is retained."""
    file = folder / "f.toml"
    with Mosquitto(folder / "broker", "max_queued_messages 0") as broker:
        file.write_text(
            f'[connections.c]\nendpoints = ["{broker.url}"]\nclient_id = "dash"\nprotocol = "{protocol}"\n'
            'will = { topic = "wills/dash" }\n'
        )
        seen: list[str] = []

        @asynccontextmanager
        async def resident() -> AsyncIterator[Client]:
            made = load(file, need_pipelines=False).connections["c"]
            async with Client(made.dialer, made.options) as client:
                async with client.subscribe(["#"]) as reader:
                    await reader.grant()

                    async def read() -> None:
                        while True:
                            delivery = await reader.read()
                            seen.extend(one.topic for one in delivery.batch.messages)
                            await delivery.ack()

                    task = asyncio.create_task(read())
                    yield client
                    await client.publish([Message("the/end", b"", 1)])
                    while "the/end" not in seen:
                        await asyncio.sleep(0.001)
                    task.cancel()
                    assert client.status.connects == 1, "doctor took its session"

        with running(resident):
            found = doctor(file, "-c", "c", "--topic", "some/topic")
        log = broker.log.read_text()
    assert found.code == 0
    accepted = found.endpoints[0]["mqtt"]
    assert accepted["version"] == protocol
    assert re.fullmatch(r"dash-doctor-[0-9a-f]{6}", accepted["client_id"])
    assert set(seen) == {"some/topic", "the/end"}, "its will was published, or something else"
    (flags,) = set(re.findall(r"as dash-doctor-\w+ \((p\d, c\d)", log))
    assert flags == ("p5, c1" if protocol == "5" else "p2, c1")


def test_a_file_has_all_its_connections_side_by_side(doctor: Doctor, folder: Path) -> None:
    file = folder / "f.toml"
    with served(MQTT, MQTT) as (first, second):
        file.write_text(
            f'[connections.a]\nendpoints = ["{first}"]\n[connections.b]\nendpoints = ["{second}"]\n'
            f'[connections.c]\nendpoints = ["mqtt://127.0.0.1:{free_port()}"]\n'
        )
        found = doctor(file)
        assert found.code == 69, "one connection has no endpoint that can be used"
        assert [(one["name"], one["usable"]) for one in found.document["connections"]] == [
            ("a", True),
            ("b", True),
            ("c", False),
        ]
        assert found.document["connections"][2]["uses"] is None
        assert doctor(file, "-c", "b").code == 0
        both = doctor(file, first, second, "-c", "b")
        assert [one["name"] for one in both.document["connections"]] == ["b", "command line"]
        assert len(both.document["connections"][1]["endpoints"]) == 2
        assert execute(["doctor", str(file), "-c", "d"]) == 78


def test_the_bundle_of_the_platform(doctor: Doctor, folder: Path) -> None:
    """The right password and another one; then the certificate that QUIC does not take."""
    with Platform(folder) as platform:
        good = doctor(platform.device)
        assert good.code == 0
        assert [one["usable"] for one in good.endpoints] == [True, True]
        assert good.only["name"] == platform.device.name
        steps = good.endpoints[0]["steps"]
        assert steps["echo"]["outcome"] == "not allowed", "the platform's rules are about devices' topics"
        assert "not authorized" in steps["echo"]["what"]
        bad = doctor(platform.device, "--set", f"auth.password={PASSWORD}")
    assert bad.code == 69
    assert bad.only["uses"] is None
    for place in (0, 1):
        problem = bad.problem(place)
        assert (problem["step"], problem["reason_code"]) == ("mqtt", 0x86)
        assert problem["cause"] == (
            "every endpoint that answers refuses this login: the network is not the matter"
        )
        assert bad.outcomes(place) == {
            **dict.fromkeys(("name", "reach", "secure", "again"), "ok"),
            "mqtt": "failed",
            "upgrade": "none",
            "echo": "not reached",
            "throughput": "none",
        }


# --- what does not ----------------------------------------------------------------------------


def test_udp_is_blocked_and_tcp_is_not(doctor: Doctor, certificates: Certificates, folder: Path) -> None:
    with served(mqtts(certificates.server())) as (url,), silent_udp() as port:
        endpoints = {f"quic://localhost:{port}": "2s", localhost(url): "60s"}
        found = doctor(patient(folder, endpoints, certificates.ca_file))
    assert found.code == 0
    assert found.only["uses"].startswith("mqtts://")
    assert found.only["why"] == [f"quic://localhost:{port} is preferred, but fails"]
    assert found.outcomes() == {
        **dict.fromkeys(("secure", "mqtt", "echo", "again"), "not reached"),
        "name": "ok",
        "reach": "failed",
        "upgrade": "none",
        "throughput": "none",
    }
    problem = found.problem()
    assert problem["cause"].startswith(
        f"UDP port {port} is blocked on the way, or nothing listens there: mqtts://"
    )
    assert "MTU under 1280" in problem["cause"]
    assert f"have UDP port {port} opened in the firewall" in problem["fix"]


def test_udp_alone_is_only_silent(doctor: Doctor) -> None:
    with silent_udp() as port:
        found = doctor(f"quic://127.0.0.1:{port}", "--timeout", "2s")
    assert found.code == 69
    assert (found.only["uses"], found.only["why"]) == (None, ["no endpoint can be used"])
    assert found.problem()["cause"] == ""
    assert "blocks UDP" in found.problem()["fix"]


def test_a_broker_that_hangs_is_not_a_firewall(doctor: Doctor) -> None:
    """TCP connects, as long as the kernel answers for the broker."""
    with socket.create_server(("127.0.0.1", 0)) as server, silent_udp() as port:
        hung = f"mqtts://127.0.0.1:{server.getsockname()[1]}"
        found = doctor(f"quic://127.0.0.1:{port}", hung, "--timeout", "3s")
    assert found.code == 69
    assert found.problem()["cause"].startswith(f"not UDP alone: {hung}")


def test_a_listener_that_goes_after_the_first_client(doctor: Doctor) -> None:
    """The transport worked, and nothing is there any more for the try in MQTT 3.1.1."""
    listening = socket.create_server(("127.0.0.1", 0))

    def once() -> None:
        accepted, _ = listening.accept()
        with accepted:
            listening.close()
            accepted.recv(1)

    thread = threading.Thread(target=once)
    thread.start()
    found = doctor(f"mqtt://127.0.0.1:{listening.getsockname()[1]}")
    thread.join()
    assert found.code == 69
    assert (found.outcomes()["reach"], found.outcomes()["mqtt"]) == ("ok", "failed")
    assert "refused" in found.problem()["what"]


def test_another_protocol_at_that_port(doctor: Doctor, certificates: Certificates) -> None:
    tls, plain = certificates.server(), Wss(Url.parse("ws://127.0.0.1:0/mqtt"))
    with served(mqtts(tls), plain) as (encrypted, websocket):
        address = encrypted.removeprefix("mqtts://")
        http = websocket.replace("ws://", "mqtt://").removesuffix("/mqtt")
        found = doctor(f"mqtt://{address}", f"ws://{address}/mqtt", http)
    assert found.code == 69
    for place, secure in ((0, "mqtts"), (1, "wss")):
        assert "may speak TLS" in found.problem(place)["cause"]
        assert found.problem(place)["fix"].startswith(f"try {secure}://")
    assert found.problem(2)["cause"].startswith("it answers in HTTP")


def test_a_wrong_authority(doctor: Doctor, certificates: Certificates, folder: Path) -> None:
    """At every endpoint it is the CA file; at one of them it is that server."""
    tls = certificates.server()
    others = Certificates(folder / "others")
    with served(quic(tls), mqtts(tls), wss(others.server())) as urls:
        none = doctor(*urls[:2], "--set", f"tls.ca_file={others.ca_file}")
        assert none.code == 69
        for place in (0, 1):
            assert none.outcomes(place)["secure"] == "failed"
            assert none.outcomes(place)["reach"] == "ok"
            assert none.problem(place)["cause"].startswith("no endpoint's certificate is trusted")
            assert "ca_file" in none.problem(place)["fix"]
        one = doctor(*urls, "--set", f"tls.ca_file={certificates.ca_file}")
    assert one.code == 0
    assert one.problem(2)["cause"].startswith(f"the same settings verify {urls[0]}")
    assert "a proxy that opens TLS does" in one.problem(2)["cause"]


def issued(folder: Path, name: str, *, begins: float = -30, ends: float = 90) -> tuple[ServerTls, Path]:
    """A certificate for localhost, and its authority."""
    authority = Authority(f"authority {name}")
    made = authority.issue(
        "localhost",
        alternatives=[x509.DNSName("localhost")],
        begins=begins,
        ends=ends,
        usage=ExtendedKeyUsageOID.SERVER_AUTH,
    )
    certificate, key = made.write(folder / name)
    return ServerTls(certificate=certificate, key=key), authority.write(folder / name / "ca.pem")


def localhost(url: str) -> str:
    return url.replace("127.0.0.1", "localhost")


@pytest.mark.parametrize(
    ("begins", "ends", "words"),
    [(-30, -1, "has expired"), (1, 30, "is not valid yet")],
    ids=["expired", "not yet"],
)
def test_certificates_out_of_their_time(
    doctor: Doctor, folder: Path, begins: float, ends: float, words: str
) -> None:
    """Alone it may be the clock; beside a good one it is the server; with another bad one it is the clock."""
    bad, bad_ca = issued(folder, "bad", begins=begins, ends=ends)
    good, good_ca = issued(folder, "good")
    both = folder / "both.pem"
    both.write_bytes(bad_ca.read_bytes() + good_ca.read_bytes())
    trust = ("--set", f"tls.ca_file={both}")
    with served(mqtts(bad), quic(bad), mqtts(good)) as listening:
        over_tls, over_quic, fine = map(localhost, listening)
        alone = doctor(over_tls, *trust)
        beside = doctor(over_tls, over_quic, fine, *trust)
        together = doctor(over_tls, over_quic, *trust)
    assert (alone.code, beside.code, together.code) == (69, 0, 69)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert words in alone.problem()["what"]
    assert alone.problem()["cause"] == f"this machine's clock says {today}"
    for place in (0, 1):
        assert words in beside.problem(place)["what"]
        assert beside.problem(place)["cause"] == (
            f"the clock is right, for the certificate of {fine} is valid now"
        )
        assert "it is probably the clock" in together.problem(place)["cause"]
        assert together.problem(place)["fix"].startswith("set the clock")


def test_a_certificate_that_ends_soon(
    doctor: Doctor, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tls, ca = issued(folder, "short", ends=3)
    with served(mqtts(tls)) as (url,):
        assert execute(["doctor", localhost(url), "--set", f"tls.ca_file={ca}"]) == 0
    assert re.search(r"certificate +1 mqtts://localhost:\d+\n +It ends in 3 days\.", capsys.readouterr().out)


def test_a_name_that_the_certificate_does_not_have(doctor: Doctor, folder: Path) -> None:
    tls, ca = issued(folder, "one")
    with served(mqtts(tls)) as (url,):
        found = doctor(url, "--set", f"tls.ca_file={ca}")
        assert found.code == 69
        assert "is for another name" in found.problem()["what"]
        named = doctor(url, "--set", f"tls.ca_file={ca}", "--set", "tls.server_name=localhost")
        assert named.code == 0
        assert named.endpoints[0]["server_name"] == "localhost"


def test_a_wrong_path(doctor: Doctor, certificates: Certificates) -> None:
    with served(wss(certificates.server())) as (url,):
        found = doctor(url.replace("/mqtt", "/nothing"), url, "--set", f"tls.ca_file={certificates.ca_file}")
    assert found.code == 0
    assert found.outcomes()["secure"] == "ok"
    assert found.outcomes()["upgrade"] == "failed"
    assert found.outcomes()["mqtt"] == "not reached"
    assert "nothing at this path (404" in found.problem()["what"]
    assert "most brokers use /mqtt" in found.problem()["fix"]
    assert found.only["uses"] == url


def test_a_proxy_in_between(
    doctor: Doctor, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's proxy is not there, while the host can be reached without."""
    monkeypatch.setenv("https_proxy", f"http://user:{PASSWORD}@127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    # not loopback, which is never proxied
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        host = sock.getsockname()[0]
    tls = certificates.server(host)
    listening = TcpTls(Url.parse(f"mqtts://{host}:0"), server_tls=tls)
    with served(listening) as (url,):
        found = doctor(
            f"wss://{host}:{free_port()}/mqtt", url, "--set", f"tls.ca_file={certificates.ca_file}"
        )
    assert found.code == 0
    assert "the environment names that proxy (HTTPS_PROXY)" in found.problem()["cause"]
    assert f"{url} reaches the same host without it" in found.problem()["cause"]
    assert 'proxy = "none"' in found.problem()["fix"]


def test_a_login_that_only_one_listener_knows(doctor: Doctor) -> None:
    with served(MQTT, authenticator=Doorman()) as (closed,), served(MQTT) as (open_,):
        found = doctor(closed, open_, *LOGIN[:4], "--set", "auth.password=wrong")
    assert found.code == 0
    assert found.problem()["cause"].startswith(f"{open_} accepts the same login")
    assert found.only["uses"] is None
    assert found.only["why"] == [
        f"{closed} is there first, and its broker refuses: no other one is asked then"
    ]


def test_another_application_protocol(doctor: Doctor, certificates: Certificates) -> None:
    with served(quic(certificates.server(), alpn=("other",))) as (url,):
        found = doctor(url, "--set", f"tls.ca_file={certificates.ca_file}")
    assert found.code == 69
    assert found.outcomes()["secure"] == "failed"
    assert "ALPN" in found.problem()["what"]
    assert "`alpn`" in found.problem()["fix"]


def test_a_name_that_nobody_has(doctor: Doctor, mosquitto: Mosquitto) -> None:
    found = doctor("mqtts://nobody.invalid", mosquitto.url)
    assert found.code == 0
    assert found.outcomes() == {
        **dict.fromkeys(("reach", "secure", "mqtt", "echo", "again"), "not reached"),
        **dict.fromkeys(("upgrade", "throughput"), "none"),
        "name": "failed",
    }
    assert found.problem()["cause"] == ""
    none = doctor("mqtts://nobody.invalid", "quic://nowhere.invalid")
    assert none.code == 69
    assert "this machine is offline" in none.problem()["cause"]


def test_a_broker_that_stalls_after_tls(doctor: Doctor, certificates: Certificates) -> None:
    tls = certificates.server()
    with stalling(mqtts(tls)) as stalled, served(mqtts(tls)) as (url,):
        found = doctor(
            stalled, url, "--set", f"tls.ca_file={certificates.ca_file}", "--set", "protocol=5",
            "--timeout", "5s",
        )  # fmt: skip
    assert found.code == 0
    assert found.outcomes()["secure"] == "ok"
    assert found.outcomes()["mqtt"] == "failed"
    assert found.outcomes()["again"] == "ok", "the transport works"
    assert found.only["uses"] == url
    assert "does not answer CONNECT" in found.only["why"][0]


def test_what_an_endpoint_cannot_do_leaves_it_out(doctor: Doctor, certificates: Certificates) -> None:
    identity = certificates.client()
    tls = certificates.server(clients=certificates)
    with served(mqtts(tls)) as (url,):
        found = doctor(
            "quic://127.0.0.1:1", url, "--set", f"tls.ca_file={certificates.ca_file}",
            "--set", "auth.type=mtls", "--set", f"auth.certificate={identity.certificate}",
            "--set", f"auth.key={identity.key}",
        )  # fmt: skip
    assert found.code == 0
    assert found.problem()["left_out"] is True
    what = "client certificates are not available over QUIC"
    assert found.problem()["what"] == f"quic://127.0.0.1:1: {what}"
    assert found.only["why"] == [f"quic://127.0.0.1:1 is left out: {what}"]


def test_a_plugin_that_is_not_installed(
    doctor: Doctor, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = metadata.entry_points
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda **how: [one for one in every(**how) if not one.name.startswith("quic_")],
    )
    found = doctor("quic://127.0.0.1:1", mosquitto.url)
    assert found.code == 0
    assert found.only["left_out"] == [
        {
            "url": "quic://127.0.0.1:1",
            "reason": "no installed transport serves quic://",
            "fix": "Install it: pip install tesaiot-connect-quic-aioquic",
        }
    ]
    assert execute(["doctor", "quic://127.0.0.1:1"]) == 78


def test_what_is_remembered_is_told_and_left_as_it_is(
    doctor: Doctor, mosquitto: Mosquitto, folder: Path
) -> None:
    """A penalty of an earlier run; doctor neither ends it nor adds to it."""
    port, memory = free_port(), folder / "memory"
    urls = (f"mqtt://127.0.0.1:{port}", mosquitto.url)
    recipes = [TcpTls(Url.parse(url)) for url in urls]

    async def earlier() -> None:
        from tesaiot_connect import NegotiationOptions

        dialer = Negotiator(recipes, NegotiationOptions(memory_folder=memory))
        await (await dialer.connect()).aclose()

    asyncio.run(earlier())
    before = {path.name: path.read_bytes() for path in memory.iterdir()}
    with served(TcpTls(Url.parse(urls[0]))):  # it works again
        found = doctor(*urls, "--set", f"memory_folder={memory}")
    assert found.code == 0
    assert found.endpoints[0]["usable"] is True
    assert found.only["uses"] == urls[1]
    (why,) = found.only["why"]
    assert why.startswith(f"{urls[0]} is preferred, but not tried first for another")
    assert [one["memory"]["turn"] for one in found.endpoints] == [1, 0]
    assert found.endpoints[0]["memory"]["penalty_until"] > datetime.datetime.now(datetime.UTC).timestamp()
    assert found.endpoints[1]["memory"]["handshake_ms"] > 0
    assert {path.name: path.read_bytes() for path in memory.iterdir()} == before


@pytest.mark.parametrize("works", [True, False])
def test_check_says_what_became_of_the_other_endpoints(
    mosquitto: Mosquitto, folder: Path, capsys: pytest.CaptureFixture[str], works: bool
) -> None:
    nobody = f"mqtt://127.0.0.1:{free_port()}"
    file = folder / "f.toml"
    forbidden, last = mosquitto.url, f"mqtt://127.0.0.1:{free_port()}"
    file.write_text(
        f'[connections.c]\nendpoints = ["{nobody}", "{mosquitto.url if works else last}"]\n'
        f"memory_folder = {json.dumps(str(folder / 'memory'))}\n"
    )
    code = execute(["check", str(file)])
    lines = capsys.readouterr().out.splitlines()
    if works:
        assert code == 0
        assert lines[0].startswith("c  ok  127.0.0.1:")
        assert lines[1].startswith(f"   {nobody} failed: {nobody} cannot be reached")
        assert len(lines) == 2
    else:
        assert code == 69
        (line,) = lines
        assert nobody in line
        assert last in line
    # under a policy the plain one is left out, which both commands say
    secured = f'[security]\npolicy = "ncsa-1"\n[connections.c]\nendpoints = ["{forbidden}", "mqtts://nobody.invalid"]\n'
    file.write_text(secured)
    assert execute(["check", str(file)]) == 69
    told = f'{forbidden} left out: mqtt:// is not encrypted, which the policy "ncsa-1" forbids. Use mqtts://'
    assert told in capsys.readouterr().out
    assert execute(["doctor", str(file)]) == 69
    assert 'which the policy "ncsa-1" forbids' in capsys.readouterr().out


# --- what must not be shown, and what must not end it --------------------------------------


def test_values_of_a_query_are_sent_and_not_shown(
    doctor: Doctor, certificates: Certificates, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it fails, and by `check`."""
    with served(wss(certificates.server())) as (url,), served(MQTT) as (plain,):
        trust = ("--set", f"tls.ca_file={certificates.ca_file}")
        good = doctor(f"{url}?token={PASSWORD}", *trust)
        bad = doctor(f"{url}/no?token={PASSWORD}", plain, *trust)
        file = folder / "f.toml"
        file.write_text(
            f'[connections.c]\nendpoints = ["{url}/no?token={PASSWORD}", "{plain}"]\n'
            f'tls = {{ ca_file = "{certificates.ca_file}" }}\n'
        )
        assert execute(["doctor", str(file)]) == execute(["check", str(file)]) == 0
    captured = capsys.readouterr()
    assert PASSWORD not in captured.out + captured.err
    assert captured.out.count(f"{url}/no?***") > 2
    assert (good.code, good.endpoints[0]["url"]) == (0, f"{url}?***")
    assert "404" in bad.problem()["what"]


@attrs.frozen
class Odd:
    """Connections of a plugin with a mistake in it."""

    schemes = {"mqtt": 1883}
    rank, races = 1, True
    url: Url
    breaks: str

    async def connect(self, **_: Any) -> Any:
        return OddConnection(await TcpTls(self.url).connect(), self.breaks)


class OddConnection:
    def __init__(self, inner: Connection, breaks: str) -> None:
        self._inner, self._breaks = inner, breaks

    def __getattr__(self, name: str) -> Any:
        if name == self._breaks:
            raise ZeroDivisionError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize("breaks", ["peer", "status", "open_stream", "wait_closed"])
def test_a_plugin_with_a_mistake_is_a_finding(mosquitto: Mosquitto, breaks: str) -> None:
    url = Url.parse(mosquitto.url)
    dialer = Negotiator([Odd(url, breaks), TcpTls(url)])
    (found,) = asyncio.run(diagnose({"c": MqttConnection("c", dialer)}, Plan(timeout=60.0)))
    odd, fine = found.findings
    wrong = [step for step in odd.steps.values() if step.outcome == "failed"]
    assert wrong
    assert "ZeroDivisionError" in wrong[0].what
    assert fine.usable
    assert fine.problem is None


def test_a_machine_without_a_folder_for_temporary_files(
    doctor: Doctor, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(quic(certificates.server())) as (url,):
        monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
        found = doctor(url, "--set", f"tls.ca_file={certificates.ca_file}")
    assert found.code == 0


def test_check_goes_on_where_a_broker_does_not_answer_connect(
    mosquitto: Mosquitto, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `run` does, and as `doctor` says."""
    file = folder / "f.toml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        mute = f"mqtt://127.0.0.1:{server.getsockname()[1]}"

        def checked(time: str, *urls: str) -> tuple[int, str]:
            file.write_text(
                f'[connections.c]\nendpoints = {json.dumps(urls)}\nprotocol = "5"\n'
                f"memory_folder = {json.dumps(str(folder / 'memory'))}\n"
                f'connect_timeout = "{time}"\n'
            )
            return execute(["check", str(file)]), capsys.readouterr().out

        code, text = checked("5s", mute, mosquitto.url)
        assert code == 0
        assert text.startswith("c  ok  ")
        assert f"{mute} failed: " in text
        code, text = checked("1s", mute)
        assert code == 69
        assert "sent no CONNACK" in text


# --- the echo ---------------------------------------------------------------------------------


def test_the_echo_is_allowed_where_rights_are(doctor: Doctor) -> None:
    with served(MQTT, authenticator=Doorman()) as (url,):
        refused = doctor(url, *LOGIN, "--throughput")
        allowed = doctor(url, *LOGIN, "--throughput", "--topic", "open/door")
    assert (refused.code, allowed.code) == (0, 0)
    assert refused.outcomes()["echo"] == refused.outcomes()["throughput"] == "not allowed"
    assert "not authorized" in refused.endpoints[0]["steps"]["throughput"]["what"]
    assert "--topic" in refused.endpoints[0]["steps"]["echo"]["fix"]
    assert allowed.outcomes()["echo"] == allowed.outcomes()["throughput"] == "ok"


def test_an_echo_that_is_dropped_in_silence(
    doctor: Doctor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mosquitto grants the subscription of a client that may not read, and drops what it may not."""
    echo = sample.echo
    monkeypatch.setattr(sample, "echo", lambda client, fate, topic, _timeout: echo(client, fate, topic, 1.0))
    acl = folder / "acl"
    acl.write_text("topic write #\n")
    with Mosquitto(folder / "broker", f"acl_file {acl}") as broker:
        found = doctor(broker.url)
    assert found.code == 0
    assert found.outcomes()["echo"] in ("failed", "not allowed")
    assert "--topic" in found.endpoints[0]["steps"]["echo"]["fix"]


# --- for people -------------------------------------------------------------------------------


def test_a_table_for_80_columns(
    certificates: Certificates,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tls = certificates.server()
    with served(quic(tls), mqtts(tls), wss(tls)) as urls, silent_udp() as port:
        silent = f"quic://127.0.0.1:{port}"
        endpoints = {silent: "1s", **dict.fromkeys((*urls, "mqtts://nobody.invalid"), "60s")}
        file = patient(folder, endpoints, certificates.ca_file)
        code = execute(["doctor", str(file), "--throughput"])
    text = capsys.readouterr().out
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80, text
    assert "\x1b" not in text, "colours, and no terminal"
    rows = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert {"name", "reach", "handshake", "again", "certificate", "valid", "CONNACK", "echo"} <= rows
    flat = " ".join(text.split())
    assert f"uses now {urls[0]}" in flat
    assert "0-RTT" in flat
    assert "verified: 127.0.0.1" in flat
    assert "MB/s" in flat
    assert f"failed 1 quic://127.0.0.1:{port}" in flat
    assert "likely UDP port" in flat
    assert "fix Check its spelling" in flat
    # where nobody's eyes limit them, lines stay whole
    monkeypatch.delenv("COLUMNS")
    execute(["doctor", "mqtts://nobody.invalid"])
    assert "The name nobody.invalid cannot be resolved" in capsys.readouterr().out.replace("\n  ", "")


@pytest.mark.skipif(os.name == "nt", reason="no such signal")
def test_an_interrupt_ends_it_without_a_word(certificates: Certificates) -> None:
    connected = threading.Event()
    with stalling(mqtts(certificates.server()), connected) as url:
        command = [sys.executable, "-m", "tesaiot_connect", "doctor", url, "--timeout", "100s"]
        with subprocess.Popen(
            [*command, "--set", f"tls.ca_file={certificates.ca_file}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert connected.wait(60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "")


# --- a network --------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("fault", ["none", "dropped", "rejected", "narrow"])
def test_on_a_network(doctor: Doctor, certificates: Certificates, fault: str) -> None:
    """UDP that is dropped or rejected on the way, and a tunnel that is too narrow for QUIC."""
    require_namespaces()
    with Lab() as lab, contextlib.ExitStack() as stack:
        tls = certificates.server(lab.server)
        port = free_udp_port()
        listeners: list[Listener] = [
            QuicAioquic(Url("quic", lab.server, port), server_tls=tls),
            TcpTls(Url("mqtts", lab.server, 8883), server_tls=tls),
        ]
        with lab.enter("sv"):
            urls = stack.enter_context(served(*listeners))
        if fault == "dropped":
            lab.drop_udp(port)
        elif fault == "rejected":
            lab.reject_udp(port)
        elif fault == "narrow":
            lab.mtu(1100)
        with lab.enter("cl"):
            found = doctor(*urls, "--set", f"tls.ca_file={certificates.ca_file}", "--timeout", "5s")
    assert found.code == 0
    assert found.only["uses"] == urls[0 if fault == "none" else 1]
    if fault == "none":
        return
    problem = found.problem()
    assert problem["step"] == "reach"
    words = {
        "dropped": "UDP port",
        "rejected": "ICMP port unreachable",
        "narrow": "QUIC needs a path for packets of",
    }
    assert words[fault] in problem["cause" if fault == "dropped" else "what"]
