"""The device clients at their ends: programs that end in every way, calls that are interrupted by other
threads, by signals and by callbacks."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from platform_thread import Platform

from tesaiot_connect import Disconnected, MQTTQUICClient, TESAIoTMQTTClient, signals
from tesaiot_connect.device import session as module
from tesaiot_connect.device.session import Session

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals between processes")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform(tmp_path_factory.mktemp("home") / "sandbox") as running:
        yield running


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"mqtt://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def readings(platform: Platform) -> Iterator[Queue[bytes]]:
    """What the platform gets of the device."""
    got: Queue[bytes] = Queue()
    with MQTTQUICClient(platform.organisation) as watching:
        watching.on_message = lambda _client, _userdata, message: got.put(message.payload)
        watching.subscribe("devices/device-1/telemetry")
        yield got


class Task:
    """A call in a thread of its own, and how it ended."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._args = args
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call(*self._args)
        except BaseException as error:
            self.error = error

    def end(self, timeout: float = 30) -> BaseException | None:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "it hangs"
        return self.error


BROKER = r"""
import os, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
sock, _ = listener.accept()
stream = sock.makefile("rb")
taken = open(sys.argv[2], "ab", buffering=0)
count = 0
while first := stream.read(1):
    body = stream.read(stream.read(1)[0])
    kind = first[0] >> 4
    if kind == 1:  # CONNECT
        sock.sendall(b"\x20\x02\x00\x00")
    elif kind == 3:  # PUBLISH
        count += 1
        end = 2 + int.from_bytes(body[:2], "big")
        for step in ("read", "noted", "acknowledged"):
            if step == "noted":
                taken.write(body[end + 2:] + b"\n")
            elif step == "acknowledged":
                sock.sendall(b"\x40\x02" + body[end:end + 2])
            if (count, step) == (5, sys.argv[3]):
                os.kill(os.getpid(), 9)
"""
"""MQTT 3.1.1 for one client: notes each message and acknowledges it, then kills itself if it is to."""


def program(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# --- other threads, callbacks and signals in the middle of a call ---------------------------


def test_disconnecting_ends_a_connect_of_another_thread(silent: str) -> None:
    device = MQTTQUICClient(None, url=silent, device_id="d", password="x", connect_timeout=600)
    connecting = Task(device.connect)
    while device._session is None:
        pass
    device.disconnect()
    error = connecting.end()
    assert isinstance(error, Disconnected)
    assert "was disconnected while it was connecting" in str(error)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [MQTTQUICClient, TESAIoTMQTTClient])
def test_disconnecting_while_a_connect_begins(
    kind: type[Any], when: str, silent: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Session.begin

    def disturbed(session: Session) -> None:
        if when == "before":
            client.disconnect()
        begin(session)
        if when == "after":
            client.disconnect()

    monkeypatch.setattr(Session, "begin", disturbed)
    client = kind(platform.organisation, url=silent, connect_timeout=600)
    connecting = Task(client.connect)
    with pytest.raises(Disconnected, match="was disconnected while it was connecting"):
        raise connecting.end() or AssertionError("it connected")
    assert not client.is_connected()
    monkeypatch.undo()
    with kind(platform.organisation) as another:
        assert another.is_connected()


def test_what_is_asked_while_a_connect_begins_is_done(
    platform: Platform, readings: Queue[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a thread then, which does not run yet."""
    began, go = threading.Event(), threading.Event()
    begin, run = Session.begin, Session._run

    def announced(session: Session) -> None:
        begin(session)
        began.set()

    async def held(session: Session) -> None:
        assert go.wait(60)
        await run(session)

    monkeypatch.setattr(Session, "begin", announced)
    monkeypatch.setattr(Session, "_run", held)
    device = MQTTQUICClient(platform.device)
    device.subscribe("devices/device-1/commands/one")
    connecting = Task(device.connect)
    assert began.wait(60)
    publications = [device.publish_telemetry({"early": one}, wait=False) for one in (1, 2)]
    subscribing = [Task(device.subscribe, f"devices/device-1/commands/{one}") for one in ("one", "two")]
    go.set()
    for publication in publications:
        publication.wait_for_publish(60)
    assert [b'"early":1' in readings.get(timeout=60), b'"early":2' in readings.get(timeout=60)] == [True] * 2
    assert [one.end() for one in (connecting, *subscribing)] == [None] * 3
    device.disconnect()


def test_threads_that_connect_at_once_share_one_connection(platform: Platform) -> None:
    device = MQTTQUICClient(platform.device)
    barrier = threading.Barrier(4)

    def connect() -> None:
        barrier.wait(20)
        device.connect()
        device.publish_telemetry({"temperature": 1})

    assert [one.end() for one in [Task(connect) for _ in range(4)]] == [None] * 4
    assert device.status is not None
    assert (device.status.connects, device.status.published) == (1, 4)
    assert [thread.name for thread in threading.enumerate()].count("tesaiot-device-1") == 1
    device.disconnect()


def test_disconnecting_ends_every_wait(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connecting = threading.Event()
    wait_connected = Session.wait_connected

    def announced(session: Session, timeout: float | None) -> None:
        connecting.set()
        wait_connected(session, timeout)

    monkeypatch.setattr(Session, "wait_connected", announced)
    with Platform(tmp_path / "platform") as mortal:
        device = MQTTQUICClient(mortal.device, url=mortal.urls["tls"], max_waiting=1)
        lost = threading.Event()
        device.on_disconnect = lambda client, userdata, rc: lost.set()
        device.connect()
    assert lost.wait(20)
    kept = device.publish_telemetry({"kept": 1}, wait=False)
    waits = [
        Task(kept.wait_for_publish),
        Task(device.publish_telemetry, {"no room": 1}),
        Task(device.subscribe, "devices/device-1/commands/#", 1, None),
        Task(device.connect),
    ]
    assert connecting.wait(60)  # later, it would connect anew
    assert device._session is not None
    while "devices/device-1/commands/#" not in device._session._granted:
        time.sleep(0.001)
    assert device.disconnect(timeout=0) is False
    assert {type(one.end()) for one in waits} == {Disconnected}


def test_a_callback_that_never_returns_does_not_keep_disconnect(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAVE", 0.2)
    entered, leave = threading.Event(), threading.Event()

    def stuck(*_: Any) -> None:
        entered.set()
        leave.wait(60)

    device = MQTTQUICClient(platform.device)
    device.on_publish = stuck
    device.connect()
    device.publish_telemetry({"temperature": 1}, wait=False)
    assert entered.wait(20)
    left = device.publish_telemetry({"temperature": 2}, wait=False)
    assert device.disconnect(timeout=0) is False
    leave.set()
    with pytest.raises(Disconnected):
        left.wait_for_publish(20)
    assert device._session is not None and device._session._thread is not None
    device._session._thread.join(60)  # the next test has a thread of the same name
    assert not device._session._thread.is_alive()


@posix
def test_a_signal_handler_may_disconnect_in_the_middle_of_publish(platform: Platform) -> None:
    device = MQTTQUICClient(platform.device)
    device.connect()
    outgoing = device._session._outgoing  # type: ignore[union-attr]
    before = signal.signal(signal.SIGUSR1, lambda *_: device.disconnect())
    try:
        with outgoing._changed:  # as `publish` does
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(Disconnected):
        device.publish_telemetry({"temperature": 1})
    device.connect()
    assert device.publish_telemetry({"temperature": 1}).is_published()
    device.disconnect()


def test_disconnect_ends_run_forever_while_it_connects(silent: str, platform: Platform) -> None:
    subscriber = TESAIoTMQTTClient(platform.organisation, url=silent, connect_timeout=600)
    running = Task(subscriber.run_forever)
    while not subscriber._connecting:
        pass
    subscriber.disconnect()
    assert running.end() is None


def test_disconnect_ends_run_forever_however_early_it_comes(platform: Platform) -> None:
    subscriber = TESAIoTMQTTClient(platform.organisation)
    for _ in range(10):
        running = Task(subscriber.run_forever)
        while subscriber._runner is None:
            pass
        subscriber.disconnect()
        assert running.end() is None
    assert subscriber.connect()
    subscriber.disconnect()


# --- the end of a program ----------------------------------------------------------------------


@posix
def test_what_was_acknowledged_survives_a_kill(platform: Platform, readings: Queue[bytes]) -> None:
    killed = r"""
import os, sys, threading
from tesaiot_connect import MQTTQUICClient
device = MQTTQUICClient(sys.argv[1])
device.connect()
def publish(first):
    for number in range(first, first + 1000):
        device.publish_telemetry({"number": number})
        os.write(1, f"{number}\n".encode())
        if number % 1000 == 20:
            os.kill(os.getpid(), 9)
for first in range(0, 4000, 1000):
    threading.Thread(target=publish, args=[first]).start()
"""
    done = program(killed, platform.device)
    assert done.returncode == -9, done.stderr
    acknowledged = set(map(int, done.stdout.split()))
    assert len(acknowledged) > 20
    while acknowledged:
        acknowledged.discard(json.loads(readings.get(timeout=30))["data"]["number"])


@posix
def test_what_brokers_acknowledged_before_they_were_killed_had_arrived(tmp_path: Path) -> None:
    """Six brokers get five messages each and are killed, at each step of the last."""
    taken = tmp_path / "taken"
    acknowledged: list[int] = []

    def brokers() -> None:
        for killed in (*("read", "noted", "acknowledged") * 2, "never"):
            command = [sys.executable, "-S", "-c", BROKER, str(server.fileno()), str(taken), killed]
            codes.append(
                subprocess.run(command, pass_fds=[server.fileno()], timeout=90, check=False).returncode
            )

    def publish(first: int) -> None:
        for number in range(first, first + 10):
            device.publish("numbers", str(number))
            acknowledged.append(number)

    codes: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = Task(brokers)
        device = MQTTQUICClient(
            None,
            url=f"mqtt://127.0.0.1:{server.getsockname()[1]}",
            protocol="3.1.1",
            reconnect={"min": "1ms", "max": "10ms"},
        )
        with device:
            publishing = [Task(publish, first) for first in (0, 10, 20, 30)]
            assert [one.end(60) for one in publishing] == [None] * 4
        assert serving.end() is None
    assert codes == [*[-9] * 6, 0]
    assert sorted(acknowledged) == list(range(40))
    assert set(map(int, taken.read_text().split())) == set(range(40))


def test_a_program_that_ends_right_after_a_callback_disconnected(
    platform: Platform, readings: Queue[bytes]
) -> None:
    """What waits is still published."""
    ending = """
import sys, threading
from tesaiot_connect import MQTTQUICClient
from tesaiot_connect.device import session
session._AT_EXIT = 60.0  # however slow this machine is
left = threading.Event()
def on_connect(client, userdata, flags, rc):
    for number in range(1000):
        client.publish_telemetry({"number": number, "filler": "x" * 300})
    client.disconnect(timeout=60)
    left.set()
device = MQTTQUICClient(sys.argv[1])
device.on_connect = on_connect
device.connect()
left.wait(60)
"""
    done = program(ending, platform.device)
    assert (done.returncode, done.stderr) == (0, "")
    assert [f'"number":{one},'.encode() in readings.get(timeout=30) for one in range(1000)] == [True] * 1000


@posix
def test_what_was_being_processed_when_it_was_killed_comes_again(platform: Platform) -> None:
    processing = """
import os, sys
from tesaiot_connect import TESAIoTMQTTClient
class Subscriber(TESAIoTMQTTClient):
    def _on_subscribe(self, *_):
        print("subscribed", flush=True)
    def process_telemetry(self, device_id, sensor_type, data):
        print(sensor_type, data["value"], flush=True)
        if sys.argv[2] == "first":
            os.kill(os.getpid(), 9)
        self.disconnect()
Subscriber(sys.argv[1], client_id="killed", clean_session=False).run_forever()
"""
    command = [sys.executable, "-c", processing, str(platform.organisation)]
    with subprocess.Popen([*command, "first"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "subscribed\n"
        with MQTTQUICClient(platform.device) as device:
            device.publish_telemetry({"temperature": 7})
        assert first.stdout.read() == "temperature 7\n"
    again = program(processing, platform.organisation, "again")
    assert "temperature 7\n" in again.stdout


@posix
def test_signals_end_run_forever_and_their_handlers_come_back(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it connects."""
    monkeypatch.setattr(signals, "_TWICE", 3600.0)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    class Signalled(TESAIoTMQTTClient):
        def _on_subscribe(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # as timeout(1) does: it counts once

    class Impatient(TESAIoTMQTTClient):
        def _on_subscribe(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    left = threading.Event()

    def serve(server: socket.socket) -> None:
        with server.accept()[0]:
            os.kill(os.getpid(), signal.SIGTERM)
            left.wait(60)

    Signalled(platform.organisation).run_forever()
    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = Task(serve, server)
        url = f"mqtt://127.0.0.1:{server.getsockname()[1]}"
        TESAIoTMQTTClient(platform.organisation, url=url, connect_timeout=600).run_forever()
        left.set()
        assert serving.end() is None
    with pytest.raises(KeyboardInterrupt):
        Impatient(platform.organisation).run_forever()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_program_that_forgets_to_disconnect_still_ends_and_takes_its_leave(
    platform: Platform, readings: Queue[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tesaiot_connect.server")
    said: Queue[logging.LogRecord] = Queue()
    handler = QueueHandler(said)  # type: ignore[arg-type]
    logging.getLogger("tesaiot_connect.server").addHandler(handler)
    forgetful = """
import sys
from tesaiot_connect import MQTTQUICClient
from tesaiot_connect.device import session
session._AT_EXIT = 60.0  # however slow this machine is
device = MQTTQUICClient(sys.argv[1], url=sys.argv[2], client_id="forgetful")
device.connect()
device.publish_telemetry({"forgotten": 1}, wait=False)
"""
    done = program(forgetful, platform.device, platform.urls["tls"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert b"forgotten" in readings.get(timeout=30)
    while (words := said.get(timeout=30).getMessage()) != "client 'forgetful' disconnected: success (0x00)":
        assert "'forgetful' disconnected" not in words
    logging.getLogger("tesaiot_connect.server").removeHandler(handler)


@posix
def test_a_forked_child_is_told_and_ends(platform: Platform) -> None:
    forking = """
import os, sys
from tesaiot_connect import Disconnected, MQTTQUICClient
device = MQTTQUICClient(sys.argv[1], url=sys.argv[2], client_id="parent")
device.connect()
if os.fork() == 0:
    try:
        device.publish_telemetry({"forked": 1})
    except Disconnected as error:
        sys.exit(7 if "another process" in str(error) else 1)
else:
    print(os.waitstatus_to_exitcode(os.wait()[1]))
    device.publish_telemetry({"parent": 1}, timeout=30)
    device.disconnect()
"""
    done = program(forking, platform.device, platform.urls["tls"])
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
