"""The drop-in for paho: the same programs, with paho over TCP and with our import and a URL, do the same.

And what a program meets when things go wrong: brokers that restart, connections that cannot be made, ends of
all sorts.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as real
import pytest
from deadlines import LONG, over_at
from paho_client import Paho
from paho_world import DROP_IN, REAL, SCHEMES, Program, installed, our_broker
from real_brokers import Mosquitto, free_port, free_udp_port

import tesaiot_connect.paho as mqtt
import tesaiot_connect.paho.client as client_module
from tesaiot_connect import Url
from tesaiot_connect.testing import Certificates

V2 = mqtt.CallbackAPIVersion.VERSION2
ALONE = ("publisher", "request_response", "select_loop", "first_style", "flood")
"""Programs that need nobody else."""
FEW = ("select_loop", "flood")
"""What a transport could do wrong alone: when there is something to read, and much of it."""
FLOOD = 2000


@pytest.fixture(scope="module")
def broker(certificates: Certificates) -> Iterator[dict[str, Url]]:
    with our_broker(certificates, installed()) as urls:
        yield urls


@pytest.fixture
def url(broker: dict[str, Url], scheme: str) -> Url:
    if scheme not in broker:
        pytest.skip(f"no plugin serves {scheme}://")
    return broker[scheme]


def trusted(certificates: Certificates, url: Url | str) -> Path | None:
    return None if str(url).startswith(("mqtt://", "ws://")) else certificates.ca_file


def client(url: Url | str, certificates: Certificates, **options: Any) -> mqtt.Client:
    made = mqtt.Client(V2, **options)
    if ca := trusted(certificates, url):
        made.tls_set(str(ca))
    return made


def until(true: Callable[[], object], what: str) -> None:
    """Returns once it is true. For what nothing announces."""
    condition = threading.Event()
    for _ in range(4000):
        if true():
            return
        condition.wait(0.005)
    raise AssertionError(f"it did not come about: {what}")


def no_bridge_left() -> bool:
    return not any(thread.name == "tesaiot-paho" for thread in threading.enumerate())


# --- the same programs -------------------------------------------------------------------------


def alone(
    module: str, host: str | Url, name: str, *, programs: Sequence[str] = ALONE, **more: Any
) -> dict[str, list[str]]:
    """What programs that need nobody else print; all run at once."""
    running = [
        Program(
            program,
            module,
            host,
            topic=f"{name}/{program}",
            count=FLOOD if program == "flood" else None,
            **more,
        )
        for program in programs
    ]
    return {program.name: program.end() for program in running}


def together(module: str, host: str | Url, name: str, **more: Any) -> list[str]:
    """What the subscriber prints while the publisher publishes."""
    with Program("subscriber", module, host, topic=f"{name}/both", count=60, **more) as subscriber:
        subscriber.until("subscribed [2, 1]")
        Program("publisher", module, host, topic=f"{name}/both", **more).end()
        first, second, *messages, last, code = subscriber.end()
    return [first, second, *sorted(messages), last, code]


@pytest.fixture(scope="module")
def expected(broker: dict[str, Url]) -> dict[str, list[str]]:
    """What the programs print with paho itself."""
    port = broker["mqtt"].port
    printed = alone(REAL, "127.0.0.1", "real", port=port)
    printed["subscriber"] = together(REAL, "127.0.0.1", "real", port=port)
    assert printed["flood"] == [f"QoS 0: {FLOOD} in order", f"QoS 1: {FLOOD} in order"]
    assert printed["publisher"][-1] == "acknowledged 60 different 60"
    assert len(printed["subscriber"]) == 64
    return printed


def test_programs_do_the_same_with_mosquitto(expected: dict[str, list[str]], mosquitto: Mosquitto) -> None:
    printed = alone(DROP_IN, mosquitto.url, "drop-in")
    printed["subscriber"] = together(DROP_IN, mosquitto.url, "drop-in")
    assert printed == expected


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "mqtt"])
def test_programs_do_the_same(
    expected: dict[str, list[str]], url: Url, scheme: str, certificates: Certificates
) -> None:
    ca = trusted(certificates, url)
    if scheme == "quic":
        printed = alone(DROP_IN, url, scheme, ca=ca)
        printed["subscriber"] = together(DROP_IN, url, scheme, ca=ca)
        assert printed == expected
    else:
        printed = alone(DROP_IN, url, scheme, programs=FEW, ca=ca)
        assert printed == {name: expected[name] for name in FEW}


def test_a_plain_host_goes_where_paho_takes_it(
    expected: dict[str, list[str]], broker: dict[str, Url]
) -> None:
    own = mqtt.Client(V2)
    own.connect(b"127.0.0.1", broker["mqtt"].port)  # type: ignore[arg-type]
    own.connect("127.0.0.1", broker["mqtt"].port)
    sock = own.socket()
    assert isinstance(sock, socket.socket)
    assert sock.getpeername() == ("127.0.0.1", broker["mqtt"].port)
    until(no_bridge_left, "those of other tests end")
    own.disconnect()


@pytest.fixture(scope="module")
def paho_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with paho-mqtt 1.6.1."""
    folder = tmp_path_factory.mktemp("paho1")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(folder), "paho-mqtt==1.6.1"], capture_output=True, text=True, check=False
    )
    if done.returncode and "connection" in done.stderr.lower():
        pytest.skip("no network: paho-mqtt 1.6.1 cannot be had from the package index")
    assert done.returncode == 0, done.stderr
    return folder


def test_programs_do_the_same_with_paho_1(
    expected: dict[str, list[str]], broker: dict[str, Url], certificates: Certificates, paho_1: Path
) -> None:
    version = (
        "import paho.mqtt, tesaiot_connect.paho as ours\n"
        "print(paho.mqtt.__version__, hasattr(ours, 'CallbackAPIVersion'))"
    )
    told = subprocess.run(
        [sys.executable, "-c", version],
        env={**os.environ, "PYTHONPATH": str(paho_1)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["1.6.1", "False"]
    for scheme, programs in (("mqtts", ALONE), ("wss", FEW)):
        if scheme in broker:
            ca = trusted(certificates, broker[scheme])
            printed = alone(DROP_IN, broker[scheme], f"1-{scheme}", programs=programs, ca=ca, paho=paho_1)
            assert printed == {name: expected[name] for name in programs}, scheme


@pytest.mark.parametrize("module", [mqtt, client_module], ids=["package", "paho.client"])
def test_every_name_of_paho_is_there(module: Any) -> None:
    """Also in the other way to write it, `from paho.mqtt import client`."""
    for name in dir(real):
        if not name.startswith("_") and name != "Client":
            assert getattr(module, name) is getattr(real, name)
    assert issubclass(module.Client, real.Client)
    assert module.Client is mqtt.Client


def test_calls_answer_as_those_of_paho(broker: dict[str, Url]) -> None:
    """Before, during and after a connection, mistakes included."""
    port = broker["mqtt"].port
    assert answers(mqtt.Client, f"mqtt://127.0.0.1:{port}") == answers(real.Client, "127.0.0.1", port)


def answers(kind: type[real.Client], host: Any, port: int = 1883) -> list[str]:
    own = kind(V2)
    told: list[str] = []

    def ask(call: Callable[..., Any], *args: Any, **named: Any) -> None:
        try:
            told.append(repr(call(*args, **named)))
        except Exception as error:
            told.append(repr(error))

    def greeted() -> None:
        until(lambda: own.loop(0.1) or own.is_connected(), "CONNACK comes")

    for call in (own.loop, own.disconnect, own.want_write, own.is_connected, own.reconnect, own.loop_stop):
        ask(call)
    ask(lambda: own.publish("a", "b", 1).rc)
    ask(own.connect, host, port, 60, clean_start=True)
    for wrong in ("", None):
        ask(own.connect, wrong)
    ask(own.connect, host, 0)
    ask(own.connect, host, port, keepalive=-1)
    ask(own.connect, host=host, port=port, keepalive=10)
    greeted()
    ask(own.reconnect)
    ask(own.is_connected)
    greeted()
    ask(lambda: own.publish("a", "b").rc)
    ask(lambda: own.subscribe("a")[0])
    for call in (own.want_write, own.loop_read, own.loop_misc, own.loop_write, own.disconnect):
        ask(call)
    ask(lambda: own.socket() is None)
    for call in (own.loop, own.is_connected, own.loop_stop):
        ask(call)
    return told


def test_tls_may_be_set_right_before_connecting(broker: dict[str, Url], certificates: Certificates) -> None:
    own = mqtt.Client(V2)
    own.on_pre_connect = lambda *_: own._ssl_context or own.tls_set(str(certificates.ca_file))
    greets(own, str(broker["mqtts"]))
    assert own._ssl
    greets(own, str(broker["mqtts"]))


def test_without_paho_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['paho'] = None; import tesaiot_connect.paho"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: tesaiot_connect.paho needs paho-mqtt: pip install 'tesaiot-connect[paho]'"
    )


# --- connections that are lost -----------------------------------------------------------------


def test_loop_forever_survives_restarts_of_mosquitto(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as mosquitto:
        with Program("reconnecting", DROP_IN, mosquitto.url, topic="stay") as program:
            program.until("subscribed")
            mosquitto.stop()
            program.until("connect failed")
            mosquitto.start()
            program.until("subscribed", 2)
            with Paho(mosquitto.port, real.MQTTv311) as other:
                other.publish("stay", [b"stop"], 1)
            lines = [line for line in program.end() if line != "connect failed"]
    once = ["connected 0", "subscribed"]
    assert lines == [*once, "disconnected not asked", *once, "message b'stop'", "disconnected as asked"]


@pytest.mark.parametrize("scheme", ["quic", "wss"])
def test_it_starts_before_the_broker_and_survives_its_restart(
    scheme: str, certificates: Certificates
) -> None:
    if scheme not in installed():
        pytest.skip(f"no plugin serves {scheme}://")
    ports = {scheme: free_udp_port() if scheme == "quic" else free_port(), "mqtt": free_port()}
    url = Url(scheme, "127.0.0.1", ports[scheme])
    with Program("reconnecting", DROP_IN, url, ca=certificates.ca_file, topic="stay") as program:
        program.until("connect failed")
        with our_broker(certificates, list(ports), ports=ports):
            program.until("subscribed")
        program.until("disconnected not asked")
        with our_broker(certificates, list(ports), ports=ports):
            program.until("subscribed", 2)
            with Paho(ports["mqtt"], real.MQTTv311) as other:
                other.publish("stay", [b"stop"], 1)
            assert program.end()[-2:] == ["message b'stop'", "disconnected as asked"]


# --- ends of all sorts -------------------------------------------------------------------------


ENDS = {
    "disconnected": [b"here", b"the last words"],
    "just-ended": [b"here", b"the last words", b"the will"],
    "killed": [b"here", b"the will"],
}
"""How a program ends, with its network loop stopped before, and what others get from it."""


@pytest.mark.parametrize("scheme", ["quic", "wss"])
def test_what_was_written_arrives_and_a_will_is_kept(
    broker: dict[str, Url], url: Url, scheme: str, certificates: Certificates
) -> None:
    """DISCONNECT alone keeps the will from being sent. Over QUIC nobody tells the broker of a killed one."""
    ends = {how: messages for how, messages in ENDS.items() if (how, scheme) != ("killed", "quic")}
    got: dict[str, list[bytes]] = {how: [] for how in ends}
    with Paho(broker["mqtt"].port, real.MQTTv311) as watching:
        watching.subscribe(f"ends/{scheme}/+", 1)
        running = {
            how: Program("ending", DROP_IN, url, ca=trusted(certificates, url), topic=f"ends/{scheme}/{how}")
            for how in ends
        }
        for how, program in running.items():
            assert program.end() == ([] if how == "killed" else ["main ends"])
        for message in watching.take(sum(map(len, ends.values()))):
            got[message.topic.rpartition("/")[2]].append(message.payload)
        assert got == ends
        watching.publish(f"ends/{scheme}/test", [b"no more of them"], 1)
        assert watching.take(1)[0].payload == b"no more of them"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_left_after_disconnecting(url: Url, certificates: Certificates) -> None:
    for _ in range(3):
        own = client(url, certificates)
        connected = threading.Event()
        own.on_connect = lambda *_, event=connected: event.set()
        own.connect(str(url))
        own.loop_start()
        assert connected.wait(20)
        own.disconnect()
        own.loop_stop()
    until(no_bridge_left, "the bridges' threads end")


def test_a_client_that_is_forgotten_closes_its_connection(broker: dict[str, Url]) -> None:
    own: mqtt.Client | None = mqtt.Client(V2)
    assert own is not None
    own.connect(str(broker["mqtt"]))
    assert not no_bridge_left()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        own = None
    until(no_bridge_left, "the bridge's thread ends")


def test_connecting_can_be_interrupted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        program = (
            "import sys, tesaiot_connect.paho as mqtt\n"
            "client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)\n"
            "client.connect_timeout = 600\n"
            "try:\n    client.connect(sys.argv[1])\n"
            "except KeyboardInterrupt:\n    print('interrupted')"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, f"mqtts://127.0.0.1:{port}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        accepted, _ = silent.accept()
        with accepted:
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("interrupted\n", "")


# --- connections that cannot be made -----------------------------------------------------------


def test_nobody_listens() -> None:
    port = free_port()
    own = mqtt.Client(V2)
    logged: list[str] = []
    own.on_log = lambda _client, _userdata, _level, text: logged.append(text)
    with pytest.raises(ConnectionRefusedError, match="nothing listens there: check the port") as caught:
        own.connect(f"mqtt://127.0.0.1:{port}")
    assert str(port) in str(caught.value)
    assert any("nothing listens there" in line for line in logged)
    with pytest.raises(OSError, match="nothing listens on that UDP port"):
        own.connect(f"quic://127.0.0.1:{free_udp_port()}")


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    over_at(monkeypatch, "secure")
    own = mqtt.Client(V2)
    own.connect_timeout = LONG
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(TimeoutError, match="does not answer the TLS handshake"):
            own.connect(f"mqtts://127.0.0.1:{silent.getsockname()[1]}")


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(socket.gaierror, match=r"nowhere\.invalid cannot be resolved"):
        mqtt.Client(V2).connect("mqtts://nowhere.invalid")


def test_a_server_that_is_not_trusted(broker: dict[str, Url], tmp_path: Path) -> None:
    stranger = Certificates(tmp_path, name="stranger")
    own = client(broker["mqtts"], stranger)
    with pytest.raises(ssl.SSLCertVerificationError, match="not from a trusted authority") as caught:
        own.connect(str(broker["mqtts"]))
    assert "`ca_certs` of tls_set" in str(caught.value)
    assert caught.value.verify_code in (18, 19, 20)
    with pytest.raises(OSError, match="not from a trusted authority"):
        own.connect(str(broker["quic"]))


def test_on_connect_fail_is_called_and_the_loop_goes_on(certificates: Certificates) -> None:
    port = free_port()
    own = mqtt.Client(V2)
    failed, connected = threading.Event(), threading.Event()
    own.on_connect_fail = lambda *_: failed.set()
    own.on_connect = lambda *_: connected.set()
    own.reconnect_delay_set(0.1, 0.1)  # type: ignore[arg-type]
    own.connect_async(f"mqtt://127.0.0.1:{port}")
    own.loop_start()
    assert failed.wait(20)
    with our_broker(certificates, ["mqtt"], ports={"mqtt": port}):
        assert connected.wait(20)
        own.disconnect()
        own.loop_stop()


@pytest.mark.parametrize(
    ("prepare", "host", "message"),
    [
        (lambda own: None, "carrier://pigeon", "no installed transport serves carrier://"),
        (lambda own: None, "mqtt://me:secret@localhost", "use username_pw_set"),
        (lambda own: None, "mqtts://", "names no host"),
        (lambda own: own.tls_set(), "mqtt://localhost", "not encrypted: use mqtts://, wss:// or quic://"),
        (lambda own: own.tls_set(ciphers="HIGH"), "mqtts://localhost", "ciphers cannot be chosen"),
        (lambda own: own.tls_set(alpn_protocols=["x"]), "mqtts://localhost", "chooses its ALPN"),
        (lambda own: (own.tls_set(), own.tls_insecure_set(True)), "mqtts://localhost", "unchecked alone"),
        (
            lambda own: own.tls_set_context(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)),
            "mqtts://localhost",
            r"use tls_set\(ca_certs=...\)",
        ),
        (
            lambda own: setattr(own, "_proxy", {"proxy_type": 3, "proxy_addr": "p"}),
            "quic://x",
            "proxy_set was",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused_at_once(
    prepare: Callable[[mqtt.Client], Any], host: str, message: str
) -> None:
    own = mqtt.Client(V2)
    prepare(own)
    with pytest.raises(ValueError, match=message):
        own.connect_async(host)
    with pytest.raises(ValueError, match=message):
        own.connect(host)


def test_a_local_address_is_kept_and_a_local_port_is_refused(broker: dict[str, Url]) -> None:
    own = mqtt.Client(V2)
    with pytest.raises(ValueError, match="bind_port"):
        own.connect(str(broker["mqtt"]), bind_address="127.0.0.1", bind_port=4711)
    with pytest.raises(OSError, match=r"cannot connect from 192\.0\.2\.1"):
        own.connect(str(broker["mqtt"]), bind_address="192.0.2.1")
    assert own.connect(str(broker["mqtt"]), bind_address="127.0.0.1") == mqtt.MQTT_ERR_SUCCESS
    own.disconnect()


# --- TLS and URLs ------------------------------------------------------------------------------


def greets(own: mqtt.Client, host: Any, **options: Any) -> None:
    """It connects, and is accepted."""
    answered: list[int] = []
    own.on_connect = lambda _client, _userdata, _flags, reason, _properties: answered.append(reason.value)
    own.connect(host, **options)
    until(lambda: own.loop(0.1) == mqtt.MQTT_ERR_SUCCESS and answered, "CONNACK comes")
    assert answered == [0]
    own.disconnect()


@pytest.mark.parametrize("scheme", ["mqtts", "quic", "wss"])
def test_an_ssl_context_of_ones_own(url: Url, certificates: Certificates) -> None:
    """Its authorities count, and a file with them goes with the client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(certificates.ca_file)
    own = mqtt.Client(V2)
    own.tls_set_context(context)
    greets(own, str(url))
    greets(own, str(url))


@pytest.mark.parametrize("scheme", ["mqtts", "quic", "wss"])
def test_verification_is_given_up_only_where_it_was_asked_for(url: Url) -> None:
    own = mqtt.Client(V2)
    with pytest.raises(OSError, match="not from a trusted authority"):
        own.connect(str(url))
    own.tls_set(cert_reqs=ssl.CERT_NONE)
    own.tls_insecure_set(True)
    greets(own, str(url))


def test_a_client_certificate(certificates: Certificates) -> None:
    server_tls = certificates.server(clients=certificates)
    identity = certificates.client()
    with our_broker(certificates, ["mqtts"], server_tls=server_tls) as urls:
        url = str(urls["mqtts"])
        own = mqtt.Client(V2)
        own.tls_set(str(certificates.ca_file), identity.certificate, identity.key, keyfile_password="unused")
        greets(own, url)
        without = mqtt.Client(V2)
        without.tls_set(str(certificates.ca_file))
        with pytest.raises(OSError, match="client certificate"):
            refused(without, url)


def refused(own: mqtt.Client, url: str) -> None:
    """In TLS 1.3 a server says so only after the client's handshake is complete."""
    logged: list[str] = []
    own.on_disconnect = lambda *_: logged.append("lost")
    own.connect(url)
    until(lambda: own.loop(0.1) and logged, "the server ends it")
    raise OSError("no client certificate")


def test_several_urls_are_tried_in_order(broker: dict[str, Url], certificates: Certificates) -> None:
    own = client(broker["mqtts"], certificates)
    urls = [f"quic://127.0.0.1:{free_udp_port()}", str(broker["mqtts"])]
    greets(own, urls)
    assert own.host == tuple(urls)
    wrong = [f"mqtts://127.0.0.1:{free_port()}", f"quic://127.0.0.1:{free_udp_port()}"]
    with pytest.raises(OSError, match=r"\(1\) mqtts://.*\(2\) quic://"):
        own.connect(wrong)


def test_the_port_argument_counts_where_the_url_has_none(broker: dict[str, Url]) -> None:
    greets(mqtt.Client(V2), "mqtt://127.0.0.1", port=broker["mqtt"].port)
    greets(mqtt.Client(V2), str(broker["mqtt"]), port=1)
    greets(mqtt.Client(V2, transport="websockets"), str(broker["mqtt"]))


# --- WebSocket ---------------------------------------------------------------------------------


def first_words(own: mqtt.Client, path: str, **proxy: Any) -> list[str]:
    """The lines of the HTTP request that a connect begins with, at the server or at a proxy before it."""
    if "wss" not in installed():
        pytest.skip("no plugin serves ws://")
    told: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if proxy:
            own._proxy = {**proxy, "proxy_addr": "127.0.0.1", "proxy_port": port}
        url = f"ws://broker.example{path}" if proxy else f"ws://127.0.0.1:{port}{path}"

        def serve() -> None:
            with server.accept()[0] as sock:
                told.append(sock.recv(4096))

        serving = threading.Thread(target=serve)
        serving.start()
        with pytest.raises(OSError, match=r"ws://|proxy"):
            own.connect(url)
        serving.join(20)
    return told[0].decode("latin-1").split("\r\n")


def test_path_and_headers_of_ws_set_options() -> None:
    own = mqtt.Client(V2, transport="websockets")
    own.ws_set_options(path="/broker", headers={"X-Token": "secret"})
    lines = first_words(own, "")
    assert lines[0] == "GET /broker HTTP/1.1"
    assert "x-token: secret" in [line.lower() for line in lines]
    assert first_words(own, "/from-the-url")[0] == "GET /from-the-url HTTP/1.1"


def test_headers_from_a_function_are_asked_for_at_each_connect() -> None:
    own = mqtt.Client(V2, transport="websockets")
    asked: list[str] = []

    def sign(headers: dict[str, str]) -> dict[str, str]:
        asked.append(headers["Host"])
        return {**headers, "X-Signature": f"number {len(asked)}"}

    own.ws_set_options(headers=sign)  # type: ignore[arg-type]
    first, second = first_words(own, ""), first_words(own, "")
    assert first[0] == "GET /mqtt HTTP/1.1"
    signed = [line for lines in (first, second) for line in lines if line.lower().startswith("x-signature")]
    assert len(signed) == len(set(signed)) == 2


def test_a_proxy() -> None:
    own = mqtt.Client(V2)
    lines = first_words(own, "", proxy_type=3, proxy_username="me", proxy_password="p@ss")
    assert lines[0] == "CONNECT broker.example:80 HTTP/1.1"
    assert any(line.lower().startswith("proxy-authorization: basic bwu6cebzcw==") for line in lines)
