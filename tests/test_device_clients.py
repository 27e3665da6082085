"""The device clients against the sandbox platform: over every transport, through its restarts, and
when something is wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
from platform_thread import Platform
from real_brokers import free_port

from tesaiot_connect import (
    Client,
    ConfigError,
    ConnectFailed,
    ConnectorError,
    Disconnected,
    Message,
    MQTTQUICClient,
    ProtocolError,
    PublishRefused,
    Refused,
    TESAIoTMQTTClient,
)
from tesaiot_connect.testing import Certificates

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = DOCS / "examples" / "devices"
PAGE = (DOCS / "guide" / "devices.md").read_text(encoding="utf-8")
DROP_IN = re.findall(r"```py\n(.*?)```", (DOCS / "guide" / "paho.md").read_text(encoding="utf-8"), re.DOTALL)[
    0
]
DEVICE, CALLBACKS, APPLICATION = re.findall(r"(?<!-->\n)```python\n(.*?)```", PAGE, re.DOTALL)
SENDER, SUBSCRIBER = EXAMPLES / "device.py", EXAMPLES / "subscriber.py"
WAYS = ("quic", "tls", "wss")
UNKNOWN = "tesa_mqtt_acme_" + "0123456789abcdef" * 2
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals between processes")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform(tmp_path_factory.mktemp("home") / "sandbox") as running:
        yield running


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Platform]:
    """A platform of one's own, to stop and start."""
    with Platform(tmp_path / "platform") as running:
        yield running


def over(way: str, platform: Platform, bundle: Path, to: Path) -> Path:
    """A copy of a bundle that knows one endpoint alone."""
    if way not in platform.urls:
        pytest.skip(f"the plugin for {way} is not installed")
    shutil.copytree(bundle, to)
    file = to / "mqtt-quic-config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "endpoints": [platform.urls[way]]}))
    return to


class Collector(TESAIoTMQTTClient):
    """Puts what it gets into a queue, and runs in a thread of its own."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.got: Queue[tuple[str, str, Any]] = Queue()
        self.rcs: list[int] = []
        self.subscribed = threading.Event()
        self.error: BaseException | None = None

    def process_telemetry(self, device_id: str, sensor_type: str, data: Any) -> None:
        self.got.put((device_id, sensor_type, data))

    def _on_connect(self, client: Any, userdata: Any, flags: Any, rc: int, properties: Any = None) -> None:
        self.rcs.append(rc)

    def _on_subscribe(
        self, client: Any, userdata: Any, mid: int, granted_qos: Any, properties: Any = None
    ) -> None:
        self.subscribed.set()

    def _run(self) -> None:
        try:
            self.run_forever()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Collector:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.subscribed.wait(30), self.error
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()
        self._thread.join(30)
        assert not self._thread.is_alive()


# --- what they are for --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_what_a_device_publishes_a_subscriber_processes(way: str, platform: Platform, tmp_path: Path) -> None:
    device_bundle = over(way, platform, platform.device, tmp_path / "device")
    with Collector(over(way, platform, platform.organisation, tmp_path / "organisation")) as subscriber:
        assert subscriber.status is not None
        with MQTTQUICClient(device_bundle) as device:
            assert device.is_connected()
            publication = device.publish_telemetry({"temperature": 25.5})
            assert publication.is_published()
            assert device.status is not None
            assert device.status.transport == {"quic": "quic_aioquic", "tls": "tcp_tls", "wss": "wss"}[way]
        name, sensor, data = subscriber.got.get(timeout=30)
        assert (name, sensor, data["value"], data["unit"]) == ("device-1", "temperature", 25.5, "celsius")
        assert data["timestamp"].endswith("Z")
        assert not device.is_connected()
    assert subscriber.error is None
    assert (subscriber.processed, subscriber.failed, subscriber.rcs) == (1, 0, [0])


def test_arguments_count_before_the_bundle(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "mqtt-quic-config.json").write_text('{"host": "nowhere.example", "device_id": "nobody"}')
    account = platform.estate.devices[0]
    device = MQTTQUICClient(
        tmp_path,
        host="localhost",
        port=int(platform.urls["tls"].rpartition(":")[2]),
        transport="tls",
        device_id=account.name,
        password=account.password,
        ca_file=platform.estate.ca_file,
        keepalive=20,
        client_id="another",
    )
    with device:
        assert device.device_id == "device-1"
        assert device.status is not None
        assert device.status.client_id == "another"
        device.publish_telemetry({"temperature": 1}, qos=0)


def test_of_two_logins_in_the_environment_each_client_takes_its_own(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = platform.estate.devices[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MQTT_API_TOKEN", UNKNOWN)
    monkeypatch.setenv("TESAIOT_DEVICE_ID", account.name)
    monkeypatch.setenv("TESAIOT_PASSWORD", account.password)
    how: dict[str, Any] = {"url": platform.urls["tls"], "ca_file": platform.estate.ca_file}
    with MQTTQUICClient(**how) as device:
        assert device.publish_telemetry({"temperature": 1}).is_published()
    with pytest.raises(Refused, match="MQTT Tokens"):
        TESAIoTMQTTClient(**how).connect()
    monkeypatch.delenv("TESAIOT_PASSWORD")
    with pytest.raises(Refused, match="MQTT Tokens"):
        MQTTQUICClient(**how).connect()


def test_no_bundle_at_all_and_a_name_with_variables(platform: Platform) -> None:
    """What Python gave is taken as it is: no `${}` is looked for."""
    with pytest.raises(Refused) as refused:
        MQTTQUICClient(
            None,
            url=platform.urls["tls"],
            device_id="${HOME}",
            password="$$ {x}",
            ca_file=platform.estate.ca_file,
        ).connect()
    assert refused.value.reason_code == 0x86


def test_callbacks_run_in_one_thread_and_may_do_everything(
    platform: Platform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: Queue[tuple[Any, ...]] = Queue()

    def tell(*what: Any) -> None:
        told.put((*what, threading.current_thread().name))

    class Mistake(BaseException):
        """Of the sort that `except Exception` does not see."""

    class Device(MQTTQUICClient):
        def on_message(self, client: Any, userdata: Any, message: Message) -> None:
            tell("message", message.payload, userdata)
            if message.payload == b"fail":
                raise Mistake("a mistake in a callback")
            if message.payload == b"answer":
                assert not client.publish_telemetry({"answer": 1}).is_published()
                client.subscribe("devices/device-1/commands/more")
                assert client.connect()
            if message.payload == b"leave":
                client.disconnect()

    device = Device(platform.device)
    device.userdata = "mine"
    device.on_connect = lambda client, userdata, flags, rc: tell("connect", flags, rc)
    device.on_disconnect = lambda client, userdata, rc: tell("disconnect", rc)
    device.on_publish = lambda client, userdata, mid: tell("publish", mid)
    device.subscribe("devices/device-1/commands/#")
    device.connect()
    own = "tesaiot-device-1"
    assert told.get(timeout=0) == ("connect", {"session present": 0}, 0, own), "before connect() returned"
    with MQTTQUICClient(platform.organisation) as operator:
        for number, payload in enumerate(("fail", "answer"), 1):
            operator.publish("devices/device-1/commands/x", payload)
            assert told.get(timeout=30) == ("message", payload.encode(), "mine", own), number
        assert told.get(timeout=30) == ("publish", 1, own)
        operator.publish("devices/device-1/commands/x", "leave")
        assert told.get(timeout=30) == ("message", b"leave", "mine", own)
    assert told.get(timeout=30) == ("disconnect", 0, own)
    assert "a mistake in a callback" in caplog.text
    with pytest.raises(Disconnected, match=r"call connect\(\) first"):
        device.publish_telemetry({})
    device.connect()
    assert told.get(timeout=0)[0] == "connect"
    device.disconnect()
    device.disconnect()
    assert told.get(timeout=0)[:2] == ("disconnect", 0)


def test_a_message_that_the_broker_refuses(platform: Platform, caplog: pytest.LogCaptureFixture) -> None:
    with MQTTQUICClient(platform.device) as device:
        with pytest.raises(PublishRefused) as refused:
            device.publish("devices/somebody-else/telemetry", b"x")
        assert refused.value.reason_code == 0x87
        publication = device.publish("devices/somebody-else/telemetry", b"x", wait=False)
        with pytest.raises(PublishRefused):
            publication.wait_for_publish(30)
        with pytest.raises(Refused, match="somebody-else") as denied:
            device.subscribe("devices/somebody-else/#")
        assert denied.value.reason_code == 0x87
        with pytest.raises(ProtocolError):
            device.publish("a/#", b"x")
        with pytest.raises(TypeError, match="bytes or text"):
            device.publish("a", 1)  # type: ignore[arg-type]
        with pytest.raises(PublishRefused, match="topic name invalid"):
            device.publish("devices/device-1/\ud800", b"x")
        with pytest.raises(ProtocolError, match="UTF-8"):
            device.subscribe("devices/device-1/\ud800")
        odd: Any = "yes"
        assert device.publish("devices/device-1/kept", b"x", retain=odd).is_published()
        assert device.publish_telemetry({"temperature": 2}).is_published()
    assert caplog.text.count("the broker does not take a message") == 3
    with pytest.raises(ProtocolError, match="UTF-8"):
        TESAIoTMQTTClient(platform.organisation, topic="device/\ud800").run_forever()


def test_a_failure_of_its_own_leaves_nobody_waiting(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(client: Client, messages: Any) -> None:
        raise RuntimeError("a mistake inside")

    with MQTTQUICClient(platform.device) as device:
        with monkeypatch.context() as patched:
            patched.setattr(Client, "publish", broken)
            with pytest.raises(ConnectorError, match="a mistake inside"):
                device.publish_telemetry({"temperature": 1})
        assert device.publish_telemetry({"temperature": 1}).is_published()


def test_a_failing_process_is_counted_and_the_message_does_not_come_again(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Collector):
        def process_telemetry(self, device_id: str, sensor_type: str, data: Any) -> None:
            super().process_telemetry(device_id, sensor_type, data)
            if sensor_type == "temperature":
                raise ValueError("cannot process this")

    caplog.set_level(logging.INFO, "tesaiot_connect.device")
    how: dict[str, Any] = {"client_id": "failing", "clean_session": False}
    with MQTTQUICClient(platform.device) as device:
        with Failing(platform.organisation, **how) as subscriber:
            device.publish_telemetry({"temperature": 1, "humidity": 2})
            assert {subscriber.got.get(timeout=30)[1] for _ in range(2)} == {"temperature", "humidity"}
        assert (subscriber.processed, subscriber.failed) == (2, 1)
        assert "cannot process this" in caplog.text
        assert "device=device-1 sensor=temperature data={'value': 1" in caplog.text
        with Collector(platform.organisation, **how) as again:
            device.publish_telemetry({"last": 1})
            assert again.got.get(timeout=30)[1] == "last"


def test_what_was_not_processed_comes_again(platform: Platform) -> None:
    class Ending(Collector):
        def process_message(self, device_id: str, sensor_type: str, data: Any) -> None:
            self.got.put((device_id, sensor_type, data))
            raise SystemExit(3)

        process_telemetry = TESAIoTMQTTClient.process_telemetry

    how: dict[str, Any] = {"client_id": "ending", "clean_session": False}
    with MQTTQUICClient(platform.device) as device:
        with Ending(platform.organisation, **how) as subscriber:
            device.publish_telemetry({"temperature": 1})
            assert subscriber.got.get(timeout=30)[1] == "temperature"
            subscriber._thread.join(30)
        assert isinstance(subscriber.error, SystemExit)
        with Collector(platform.organisation, **how) as again:
            assert again.got.get(timeout=30)[1] == "temperature"


def test_payloads_that_are_not_json(platform: Platform) -> None:
    topic = "devices/{device}/telemetry"
    with (
        Collector(platform.organisation, topic=["devices/+/telemetry"]) as subscriber,
        MQTTQUICClient(platform.device) as device,
    ):
        for payload in ("25.5 C", b"\xff\x00", "[1]"):
            device.publish(topic.format(device="device-1"), payload)
        got = [subscriber.got.get(timeout=30) for _ in range(3)]
    assert got == [("device-1", "", "25.5 C"), ("device-1", "", b"\xff\x00"), ("device-1", "", [1])]


def test_a_slow_subscriber_holds_the_broker_back(platform: Platform) -> None:
    came, go = threading.Event(), threading.Event()

    class Slow(Collector):
        def process_telemetry(self, device_id: str, sensor_type: str, data: Any) -> None:
            came.set()
            assert go.wait(60)
            super().process_telemetry(device_id, sensor_type, data)

    with Slow(platform.organisation) as subscriber, MQTTQUICClient(platform.device) as device:
        for number in range(1000):
            last = device.publish_telemetry({"number": number}, wait=False)
        last.wait_for_publish(60)
        assert came.wait(60)
        assert subscriber.status is not None
        assert 0 < subscriber.status.received <= 100
        go.set()
        assert [subscriber.got.get(timeout=60)[2]["value"] for _ in range(1000)] == list(range(1000))


def test_further_topics_and_those_that_are_refused(platform: Platform) -> None:
    answers: Queue[tuple[int, tuple[int, ...]]] = Queue()

    class More(Collector):
        def _on_connect(
            self, client: Any, userdata: Any, flags: Any, rc: int, properties: Any = None
        ) -> None:
            client.subscribe(self.topic, qos=1)  # as programs of old do
            client.subscribe("devices/+/telemetry", qos=0)
            client.subscribe("devices/+/secrets")

        def _on_subscribe(
            self, client: Any, userdata: Any, mid: int, granted_qos: Any, properties: Any = None
        ) -> None:
            answers.put((mid, granted_qos))
            self.subscribed.set()

    more = More(platform.organisation, topic=["device/+/telemetry/#"])
    with pytest.raises(ValueError, match="qos is 0, 1 or 2"):
        more.subscribe("a", qos=3)  # type: ignore[arg-type]
    with more:
        got: dict[int, tuple[int, ...]] = {}
        while len(got) < 3:
            mid, codes = answers.get(timeout=30)
            got[mid] = codes
    assert got == {1: (1,), 2: (0,), 3: (0x87,)}
    with pytest.raises(Refused, match="not authorized") as refused:
        TESAIoTMQTTClient(platform.organisation, topic="#").run()
    assert refused.value.reason_code == 0x87


# --- what goes wrong ----------------------------------------------------------------------


def test_a_wrong_password(platform: Platform) -> None:
    rcs: list[int] = []
    device = MQTTQUICClient(platform.device, password="wrong")
    device.on_connect = lambda client, userdata, flags, rc: rcs.append(rc)
    with pytest.raises(Refused, match="bad user name or password") as refused:
        device.connect()
    assert refused.value.reason_code == 0x86
    assert "password" in refused.value.fix
    assert rcs == [4]
    assert "tesaiot-device-1" not in [thread.name for thread in threading.enumerate()], "nothing goes on"


def test_a_refused_token(platform: Platform) -> None:
    subscriber = Collector(platform.organisation, token=UNKNOWN)
    with pytest.raises(Refused) as refused:
        subscriber.run_forever()
    assert refused.value.permanent
    assert "MQTT Tokens" in str(refused.value)
    assert UNKNOWN not in str(refused.value)
    assert subscriber.rcs[0] in (4, 5)


@pytest.mark.parametrize("token", ["", "tesa_mqtt_acme_short", "password"])
def test_a_token_of_the_wrong_form_is_told_before_any_traffic(token: str) -> None:
    with pytest.raises(ConnectorError, match="token"):
        TESAIoTMQTTClient(None, url="wss://nowhere.example:1/mqtt", token=token)


def test_an_authority_that_is_not_the_servers(platform: Platform, tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other").ca_file
    for way in platform.urls:
        device = MQTTQUICClient(platform.device, url=platform.urls[way], ca_file=other)
        with pytest.raises(ConnectFailed, match=r"(?i)certificate") as failed:
            device.connect()
        assert failed.value.fix


def test_nobody_answers() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        device = MQTTQUICClient(None, url=f"mqtt://127.0.0.1:{port}", device_id="d", password="x")
        with pytest.raises(ConnectFailed, match=r"no connection within 0\.3 s") as failed:
            device.connect(timeout=0.3)
    assert failed.value.fix
    with pytest.raises(ConnectFailed, match="refused"):
        device.connect()


def test_what_is_missing_is_named(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MQTT_API_TOKEN", "MQTT_BROKER_URL", "TESAIOT_HOST", "TESAIOT_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="MQTT_API_TOKEN") as empty:
        TESAIoTMQTTClient()
    assert str(tmp_path) in str(empty.value)
    with pytest.raises(ConfigError, match="there is no such folder"):
        MQTTQUICClient("nowhere")
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.pem"):
        MQTTQUICClient(platform.device, ca_file="nowhere.pem")
    for name, words in (("ca-chain.pem", "ca-chain.pem"), (".env", "TESAIOT_PASSWORD")):
        bundle = tmp_path / name.strip(".")
        shutil.copytree(platform.device, bundle)
        (bundle / name).unlink()
        with pytest.raises(ConfigError, match=words) as missing:
            MQTTQUICClient(bundle)
        assert str(bundle) in str(missing.value)
    with pytest.raises(ConfigError, match="keepaliv"):
        MQTTQUICClient(platform.device, keepaliv=3)
    with pytest.raises(ConfigError, match="transport"):
        MQTTQUICClient(platform.device, host="localhost", transport="pigeon")
    with pytest.raises(ConfigError, match="beside"):
        MQTTQUICClient(platform.device, host="localhost", url="mqtt://localhost")
    with pytest.raises(ConfigError, match="of no use without"):
        MQTTQUICClient(platform.device, port=1)
    with pytest.raises(ConnectorError, match="which device this is"):
        MQTTQUICClient(None, url="mqtt://localhost").publish_telemetry({})


# --- outages ------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"reconnect": {"min": "50ms", "max": "200ms"}}


def test_what_is_published_during_an_outage_is_kept_and_bounded(mortal: Platform) -> None:
    lost = threading.Event()
    with Collector(mortal.organisation, client_id="s", clean_session=False, **QUICK) as subscriber:
        device = MQTTQUICClient(mortal.device, url=mortal.urls["tls"], max_waiting=3, **QUICK)
        device.on_disconnect = lambda client, userdata, rc: lost.set() if rc else None
        device.connect()
        device.publish_telemetry({"number": 0})
        assert subscriber.got.get(timeout=30)[2]["value"] == 0
        mortal.stop()
        assert lost.wait(30)
        assert not device.is_connected()
        waiting = [device.publish_telemetry({"number": number}, wait=False) for number in (1, 2, 3)]
        with pytest.raises(Disconnected, match=r"3 messages of .* wait already"):
            device.publish_telemetry({"number": -1}, wait=False, timeout=0)
        with pytest.raises(Disconnected, match="has not acknowledged"):
            waiting[0].wait_for_publish(0)
        mortal.start()
        device.publish_telemetry({"number": 4}, timeout=60)  # waits for room, and for its own turn
        assert all(one.is_published() for one in waiting)
        assert [subscriber.got.get(timeout=30)[2]["value"] for _ in range(4)] == [1, 2, 3, 4]
        mortal.stop()
        left = device.publish_telemetry({"number": 5}, wait=False)
        assert device.disconnect(timeout=0) is False
        with pytest.raises(Disconnected):
            left.wait_for_publish()
        mortal.start()
    assert subscriber.rcs.count(0) >= 2


@pytest.mark.parametrize("way", ["quic", "wss"])
@posix
def test_the_examples_lose_nothing_when_all_sides_restart(way: str, mortal: Platform, tmp_path: Path) -> None:
    bundles = {
        "device": over(way, mortal, mortal.device, tmp_path / "device"),
        "subscriber": over(way, mortal, mortal.organisation, tmp_path / "organisation"),
    }
    seen: set[int] = set()
    with Example(SUBSCRIBER, bundles["subscriber"]) as subscriber:
        subscriber.until("session, subscribing")
        with Example(SENDER, bundles["device"], 0.2) as device:
            device.until("'reading': 1}")
            subscriber.until("reading {'value': 1,")
            mortal.stop()
            mortal.start()
            device.until("'reading': 3}")
            assert subscriber.end(signal.SIGTERM) == 0
            device.until("'reading': 4}")
            assert device.end(signal.SIGINT) == 0
    with Example(SUBSCRIBER, bundles["subscriber"]) as again:
        published = max(device.readings)
        again.until(f"reading {{'value': {published},")
        assert again.end(signal.SIGINT) == 0
    seen = subscriber.readings | again.readings
    assert seen >= set(range(1, published + 1))


class Example:
    """A program of the documentation as a process; its lines as they come."""

    def __init__(self, program: str | Path, *arguments: object, cwd: Path | None = None) -> None:
        if isinstance(program, Path):
            program = program.read_text(encoding="utf-8")
        command = [sys.executable, "-u", "-c", program, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=cwd
        )
        self._lines: Queue[str | None] = Queue()
        self.text = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, words: str) -> None:
        while words not in self.text:
            line = self._lines.get(timeout=60)
            assert line is not None, f"it ended without {words!r}:\n{self.text}"
            self.text += line

    def more(self, seconds: float) -> None:
        """A line, if one comes."""
        with contextlib.suppress(Empty):
            line = self._lines.get(timeout=seconds)
            assert line is not None, f"it ended:\n{self.text}"
            self.text += line

    def end(self, number: int | None = None) -> int:
        """The exit code, after this signal."""
        if number is not None:
            self._process.send_signal(number)
        code = self._process.wait(60)
        self._reader.join(30)
        while (line := self._lines.get(timeout=30)) is not None:
            self.text += line
        return code

    @property
    def readings(self) -> set[int]:
        """The numbers in what was printed."""
        found = re.findall(
            r"^(?:published .*'reading': |device-1 reading .'value': )(\d+)", self.text, re.MULTILINE
        )
        return set(map(int, found))

    def __enter__(self) -> Example:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(30)
        self._reader.join(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@posix
def test_the_programs_of_the_guide(platform: Platform) -> None:
    home = platform.estate.folder.parent
    with Example(APPLICATION, cwd=home) as application:
        application.until("session, subscribing")
        with Example(DEVICE, cwd=home) as device:
            assert device.end() == 0
            assert device.text == "the platform has it\n"
        application.until("device-1 temperature 25.5 celsius")
        application.until("device-1 humidity 55.3 percent")
        assert "INFO:tesaiot_connect.device:" in application.text
        with Example(CALLBACKS, cwd=home) as device:
            assert device.end() == 0
            assert device.text.splitlines() == [
                "acknowledged 1", "acknowledged 2", "acknowledged 3", "disconnected 0", "all published: True"
            ]  # fmt: skip
        assert application.end(signal.SIGTERM) == 0
    drop_in = DROP_IN.replace("quic://localhost:14567", platform.urls["quic"])
    with Example(drop_in, cwd=home) as application, MQTTQUICClient(platform.device) as device:
        for _ in range(300):  # it does not say when it has subscribed
            device.publish_telemetry({"temperature": 3})
            application.more(0.1)
            if application.text:
                break
        assert application.text.startswith("device/device-1/telemetry/temperature b'{")
        application.end(signal.SIGINT)
        assert "KeyboardInterrupt" in application.text
