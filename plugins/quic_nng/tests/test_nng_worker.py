"""A worker as a process, our broker behind a library of NanoSDK's shape, and a client on its data socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nng_clock
import nng_stub
import pytest
from nng_peers import PATIENCE, Peer, ServingBroker, WorkerProcess, broker, worker

from tesaiot_connect import Message
from tesaiot_connect.mqtt import V3, V5, ClientEngine, Connect, Session, Subscription
from tesaiot_connect_quic_nng.control import Ended, Failed, Job, Loaded, Ping, Pong
from tesaiot_connect_quic_nng.trust import throwaway
from tesaiot_connect_quic_nng.watches import Company, Progress
from tesaiot_connect_quic_nng.worker import _Service

Start = Callable[..., WorkerProcess]
LONG = nng_clock.LONG
RETRY = 60_000_000
"""Microseconds until the library makes another connection: a worker has gone by then, however slow it is."""


@pytest.fixture(scope="module")
def served() -> Iterator[ServingBroker]:
    with broker() as one:
        yield one


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(nng_stub.installed(tmp_path_factory.mktemp("installed")))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "stub.log"


@pytest.fixture
def start(served: ServingBroker, library: str, log: Path) -> Iterator[Start]:
    """`start({"window": 1}, lose_ack=7)`: a worker with that job and those faults of the library. All that is
    bounded by the job may take long."""
    with ExitStack() as stack:

        def one(job: dict[str, object] | None = None, **faults: object) -> WorkerProcess:
            url = f"mqtt-quic://127.0.0.1:{served.port}"
            told: dict[str, Any] = {
                "library": library,
                "url": url,
                "verify": False,
                "connect_timeout": LONG,
                "ack_timeout": LONG,
            }
            told |= job or {}
            return stack.enter_context(worker(Job(**told), nng_stub.environment(log=log, **faults)))

        yield one
    served.dismiss()


def connected(one: WorkerProcess, name: str = "device-1") -> Peer:
    one.secured()
    peer = Peer(one.data, name)
    peer.until(lambda: peer.connected)
    return peer


def numbered(count: int, qos: int, topic: str = "up/x") -> list[Message]:
    return [Message(topic, b"%d" % number, qos) for number in range(count)]


def numbers(messages: list[Message]) -> list[int]:
    return [int(message.payload) for message in messages]


def gone(one: WorkerProcess) -> int:
    return one.process.wait(PATIENCE)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_messages_both_ways(start: Start, served: ServingBroker, log: Path, qos: int) -> None:
    one = start({"accept_early_acks": True})
    peer, observer = connected(one), served.observer("up/#")
    peer.publish(numbered(700, qos))
    observer.until(lambda: len(observer.messages) == 700 or peer.step(0.001))
    assert numbers(observer.messages) == list(range(700))
    assert {message.qos for message in observer.messages} == {qos}
    peer.until(lambda: not qos or len(peer.acknowledged) == 700)
    peer.subscribe("down/#", qos=qos)
    served.publish(numbered(100, qos, "down/ä"))
    peer.until(lambda: len(peer.messages) == 100)
    assert numbers(peer.messages) == list(range(100))
    assert {(message.topic, message.qos) for message in peer.messages} == {("down/ä", min(qos, 1))}
    peer.engine.unsubscribe(["down/#"])
    peer.until(lambda: len(peer.answers) == 2)
    peer.disconnect()
    ended = one.ended()
    assert ended.orderly, ended
    assert gone(one) == 0
    assert one.printed() == ""
    assert "dropped" not in nng_stub.counters(log)


def test_contents_and_retain(start: Start, served: ServingBroker) -> None:
    sent = [Message("kept/y", b"", 1), Message("kept/z", bytes(range(256)) * 1000, 1, retain=True)]
    peer = connected(start())
    peer.publish(sent)
    peer.until(lambda: len(peer.acknowledged) == 2)
    observer = served.observer("kept/z")
    observer.until(lambda: observer.messages)
    assert observer.messages == [Message("kept/z", sent[1].payload, 1, retain=True)]


@pytest.mark.parametrize("qos", [0, 1])
def test_a_burst_overflows_nothing(start: Start, served: ServingBroker, log: Path, qos: int) -> None:
    one = start(send_delay=100)
    peer, observer = connected(one), served.observer("up/#")
    peer.publish(numbered(5000, qos))
    observer.until(lambda: len(observer.messages) == 5000 or peer.step(0.001))
    assert numbers(observer.messages) == list(range(5000))
    peer.disconnect()
    assert one.ended().orderly
    assert nng_stub.counters(log)["publish"] == 5000
    assert "dropped" not in nng_stub.counters(log)


def test_the_client_leaves_right_behind_its_last_message(start: Start, served: ServingBroker) -> None:
    one = start(send_delay=200)
    peer, observer = connected(one), served.observer("up/#")
    peer.publish(numbered(500, 0))
    peer.disconnect()
    peer.sock.close()
    assert one.ended().orderly
    observer.until(lambda: len(observer.messages) == 500)


def test_one_at_a_time(start: Start) -> None:
    """No acknowledgement waits for the next."""
    peer = connected(start())
    for number in range(200):
        peer.publish([Message("up/x", b"1", 1)], first=number)
        peer.until(lambda number=number: number in peer.acknowledged)  # type: ignore[misc]


@pytest.mark.parametrize(("faults", "count"), [({"lose_ack": 50}, 1), ({"lose_all_acks_after": 20}, 16)])
def test_lost_acknowledgements_end_it(
    start: Start, served: ServingBroker, faults: dict[str, int], count: int, log: Path
) -> None:
    one = start(**faults)
    peer, observer = connected(one), served.observer("up/#")
    peer.publish(numbered(1000, 1))
    peer.until(lambda: nng_stub.counters(log)["ack_lost"] >= count)
    one.hours_go_by()
    peer.until(lambda: peer.eof)
    ended = one.ended()
    assert ended.silent and not ended.orderly, ended
    assert "not acknowledged within 600 s" in ended.what
    observer.until(lambda: len(observer.messages) == nng_stub.counters(log)["publish"])
    assert peer.acknowledged <= set(numbers(observer.messages))
    assert len(peer.acknowledged) < 1000
    assert gone(one) == 0


def test_the_connection_ends(start: Start) -> None:
    one = start(drop_after=30)
    peer = connected(one)
    peer.publish(numbered(100, 1))
    peer.until(lambda: peer.eof)
    ended = one.ended()
    assert not ended.silent and not ended.orderly
    assert "the QUIC connection ended" in ended.what
    assert gone(one) == 0


def test_an_ending_connection_takes_nothing_down(start: Start) -> None:
    """No acknowledgement that is due then has its aio on a stack."""
    one = start(drop_after=30, abort_on_loss=True)
    peer = connected(one)
    peer.publish(numbered(100, 1))
    peer.until(lambda: peer.eof)
    assert "the QUIC connection ended" in one.ended().what
    assert gone(one) == 0


def test_a_lost_connection_is_not_made_anew(start: Start, served: ServingBroker, log: Path) -> None:
    """Not even while the client does not take what came; the library would, after a while."""
    one = start({"window": 1}, drop_after=20, retry=RETRY)
    peer = connected(one)
    peer.subscribe("down/#", qos=0)
    served.publish([Message("down/x", bytes(10_000))] * 200)
    peer.publish(numbered(20, 1))
    peer.step(0)
    assert "the QUIC connection ended" in one.ended().what
    assert gone(one) == 0
    assert nng_stub.events(log).count("connected") == 1


@pytest.mark.parametrize("orderly", [True, False])
def test_a_worker_leaves_before_the_library_connects_again(orderly: bool) -> None:
    """Which it does a second after the loss."""
    service: Any = SimpleNamespace(_sdk=SimpleNamespace(lost_at=100.0))
    ended = Ended(what="", orderly=orderly)
    assert 100 < _Service._last(service, ended, 100.01) <= 100.5
    assert _Service._last(service, ended, 98.1) <= 100.5


def test_a_connection_lost_while_the_last_messages_are_confirmed(start: Start, log: Path) -> None:
    one = start(drop_after=20, retry=RETRY)
    peer = connected(one)
    peer.publish(numbered(20, 0))
    peer.disconnect()
    ended = one.ended()
    assert not ended.orderly
    assert "the QUIC connection ended" in ended.what
    assert gone(one) == 0
    assert nng_stub.events(log).count("connected") == 1


def test_the_library_aborts(start: Start) -> None:
    one = start(abort_after=30)
    peer = connected(one)
    peer.publish(numbered(100, 1))
    peer.until(lambda: peer.eof)
    assert gone(one) == -signal.SIGABRT
    assert not isinstance(one.last_word(), Failed)


def test_the_library_aborts_at_the_end(start: Start) -> None:
    one = start(abort_on_close=True)
    connected(one).disconnect()
    assert one.ended().orderly


def test_the_library_freezes(start: Start, log: Path) -> None:
    """Signs of life come from the loop, which goes on; that nothing else does ends it."""
    one = start(hang_after=5)
    peer = connected(one)
    peer.publish(numbered(30, 1))
    peer.until(lambda: nng_stub.counters(log)["publish"] == 5)
    one.say(Ping(7))
    assert one.report() == Pong(7)
    one.hours_go_by()
    peer.until(lambda: peer.eof)
    assert one.ended().silent
    assert gone(one) == 0


@pytest.mark.parametrize("faults", [{"no_handshake": True}, {"hang_on_open": True}, {"hang_after": 0}])
def test_it_goes_with_whoever_started_it(start: Start, faults: dict[str, object]) -> None:
    one = start({"connect_timeout": 600.0}, **faults)
    assert isinstance(one.report(), Loaded)
    if "hang_after" in faults:
        one.report()
        peer = Peer(one.data, "device-1")
        peer.until(lambda: peer.connected)
        peer.publish(numbered(1, 1))
        peer.flush()
    one.orders.close()
    assert gone(one) == 0


def test_it_goes_before_it_has_a_job(library: str) -> None:
    with worker(Job(library=library)) as one:
        one.orders.close()
        assert gone(one) == 0


def test_no_handshake(start: Start, served: ServingBroker) -> None:
    one = start({"connect_timeout": 0.2}, no_handshake=True)
    failed = one.last_word()
    assert isinstance(failed, Failed)
    assert (failed.stage, failed.unsupported) == ("reach", False)
    assert f"no QUIC handshake with 127.0.0.1:{served.port} in time" in failed.what
    assert "ALPN mqtt" in failed.fix
    assert gone(one) == 0


def test_a_certificate_that_cannot_be_read(start: Start, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    one = start({"verify": True, "ca_file": str(tmp_path / "ca.pem"), "certificate": "none", "key": "none"})
    failed = one.last_word()
    assert isinstance(failed, Failed)
    assert "cannot read certificate and key, or has no open files or threads left" in failed.what
    assert "ulimit -n" in failed.fix
    assert gone(one) == 0


def test_no_connack(start: Start) -> None:
    one = start({"ack_timeout": 0.5}, no_connack=True)
    one.secured()
    peer = Peer(one.data, "device-1")
    peer.until(lambda: peer.eof)
    ended = one.ended()
    assert ended.silent
    assert "CONNACK did not come within 0.5 s" in ended.what


def test_mqtt_5_is_refused_without_traffic(start: Start, log: Path) -> None:
    one = start()
    one.secured()
    peer = Peer(one.data, "device-1", version=V5)
    peer.until(lambda: peer.eof)
    assert peer.closed is not None
    assert peer.closed.reason_code == 0x84
    assert "3.1.1" in one.ended().what
    assert not [line for line in nng_stub.events(log) if line.startswith("send 1 ")]


def test_a_client_that_does_not_read(start: Start, served: ServingBroker) -> None:
    one = start({"memory": 300_000})
    peer = connected(one)
    peer.subscribe("down/#", qos=0)
    for _ in range(30):
        served.publish([Message("down/x", bytes(10_000))] * 20)
    ended = one.ended()
    assert "more than 300000 bytes from the server wait" in ended.what


def test_a_client_is_not_read_while_the_window_is_full(start: Start) -> None:
    """Its bytes stay in the socket."""
    one = start(lose_all_acks_after=0)
    peer = connected(one)
    peer.publish([Message("up/x", bytes(10_000), 1)] * 400)
    end = time.monotonic() + PATIENCE
    quiet = 0
    while quiet < 10:
        assert time.monotonic() < end
        before = len(peer._output)
        peer.step()
        quiet = quiet + 1 if len(peer._output) == before else 0
    assert len(peer._output) + len(peer._queue) * 10_000 > 1_000_000


def test_signs_of_life_and_signals(start: Start) -> None:
    one = start()
    peer = connected(one)
    one.process.send_signal(signal.SIGINT)
    for number in range(3):
        one.say(Ping(number))
        assert one.report() == Pong(number)
    peer.publish(numbered(1, 1))
    peer.until(lambda: peer.acknowledged)


def test_it_leaves_no_core_and_no_secret(start: Start, tmp_path: Path) -> None:
    """And the authorities reach the library, which waits for them in its handshake."""
    pair, ca_file = throwaway(), tmp_path / "ca.pem"
    ca_file.write_text(pair.certificate + "#" * 200_000)
    secret: dict[str, object] = {"key": pair.key, "certificate": pair.certificate}
    one = start({"verify": True, "ca_file": str(ca_file), **secret})
    connected(one)
    process = Path("/proc") / str(one.process.pid)
    if not process.is_dir():
        pytest.skip("no /proc here")
    limits = (process / "limits").read_text()
    assert next(line for line in limits.splitlines() if "core file" in line).split()[4:6] == ["0", "0"]
    for name in ("cmdline", "environ"):
        assert b"PRIVATE KEY" not in (process / name).read_bytes()
    names = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
    assert not [name for name in names if "memfd" in name]


def test_it_puts_nothing_on_the_disk(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Being killed it could not take it away."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("no files in memory here")
    pair, ca_file, empty = throwaway(), tmp_path / "ca.pem", tmp_path / "empty"
    ca_file.write_text(pair.certificate)
    empty.mkdir()
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(empty))
    monkeypatch.setattr(tempfile, "tempdir", None)
    secret: dict[str, object] = {"key": pair.key, "certificate": pair.certificate}
    one = start(
        {"verify": True, "ca_file": str(ca_file), "connect_timeout": 600.0, **secret}, no_handshake=True
    )
    assert isinstance(one.report(), Loaded)
    while "open" not in nng_stub.events(tmp_path / "stub.log"):
        time.sleep(0.01)
    assert not list(empty.iterdir())


def test_what_it_does_not_understand_has_no_traceback(start: Start) -> None:
    one = start({"verify": True, "ca_file": "absent.pem"})
    assert "No such file or directory: 'absent.pem'" in one.ended().what
    assert gone(one) == 0
    assert one.printed() == ""
    with worker(Ping(1)) as two:  # type: ignore[arg-type]
        assert "no job" in two.ended().what
        assert gone(two) == 0
        assert two.printed() == ""


# --- a server that says what a test says -----------------------------------------------------


CONNACK = bytes((0x20, 2, 0, 0))


@contextmanager
def server(*answers: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """One connection over TCP, in a thread: its port, and what came. Each piece that comes is answered by the
    next of `answers`."""
    came: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with (
            connection,
            contextlib.suppress(ConnectionError),
        ):  # a worker that dies may leave something unread
            for answer in (*answers, b""):
                came.append(connection.recv(65536))
                connection.sendall(answer)
            while connection.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], came


def published(topic: bytes, *, length: int | None = None) -> bytes:
    body = struct.pack(">H", len(topic) if length is None else length) + topic + b"payload"
    return bytes((0x30, len(body))) + body


@pytest.mark.parametrize(
    "wrong",
    [published(b""), published(b"a\0b"), published(b"a/#"), published(b"a/+"), published(b"\xff")],
    ids=["empty", "zero byte", "hash", "plus", "no UTF-8"],
)
def test_a_malformed_publish_ends_it(start: Start, wrong: bytes) -> None:
    with server(CONNACK + published(b"right") + wrong) as (port, _):
        one = start({"url": f"mqtt-quic://127.0.0.1:{port}"})
        connected(one)
        ended = one.ended()
    assert (ended.what, ended.by_peer) == ("the server sent a malformed PUBLISH", True)
    assert gone(one) == 0


def test_another_answer_to_subscribe_ends_it(start: Start) -> None:
    with server(CONNACK, bytes((0xB0, 2, 0, 1))) as (port, _):
        one = start({"url": f"mqtt-quic://127.0.0.1:{port}"})
        peer = connected(one)
        peer.engine.subscribe([Subscription("x")])
        peer.until(lambda: peer.eof)
        ended = one.ended()
    assert "answered SUBSCRIBE by a packet of type 11" in ended.what
    assert ended.by_peer


@pytest.mark.parametrize(("asked", "sent"), [(1, 10), (9, 10), (11, 11), (65_535, 65_535), (0, 60)])
def test_keepalive_is_none_that_the_library_cannot_keep(start: Start, asked: int, sent: int) -> None:
    with server(CONNACK) as (port, came):
        one = start({"url": f"mqtt-quic://127.0.0.1:{port}"})
        one.secured()
        peer = Peer(one.data, "device-1")
        peer.engine = ClientEngine(
            Connect(client_id="device-1", version=V3, keepalive=asked), Session(), now=time.monotonic()
        )
        peer.until(lambda: peer.connected)
        assert struct.unpack_from(">H", came[0], 10) == (sent,)


# --- watches ---------------------------------------------------------------------------------


def test_a_library_that_computes_without_an_end() -> None:
    progress = Progress(10.0, now=100.0, cpu=3.0)
    assert progress.next_timeout() == 110
    assert not progress.none(now=109.9, cpu=20.0)
    progress.made(now=109.9, cpu=20.0)
    assert progress.next_timeout() == 119.9
    assert not progress.none(now=119.9, cpu=24.9), "less than half a core"
    assert not progress.none(now=129.8, cpu=34.8), "not for so long yet"
    assert progress.none(now=139.8, cpu=44.0)


def test_nobody_asks_any_more() -> None:
    company = Company(10.0)
    assert company.next_timeout() is None
    assert not company.gone(1e6), "nobody has asked yet"
    company.heard(100.0)
    assert company.next_timeout() == 110
    assert not company.gone(109.0)
    assert not company.gone(1000.0), "both were stopped"
    assert company.next_timeout() == 1010
    assert not company.gone(1010.0)
    company.heard(1011.0)
    assert not company.gone(1021.0)
    assert not company.gone(1031.0)
    assert company.gone(1041.0)


def test_it_goes_when_nobody_asks_any_more(start: Start) -> None:
    """Although its control socket is open."""
    one = start({"ack_timeout": 0.5})
    one.secured()
    one.say(Ping(1))
    assert "does not ask for signs of life" in one.ended().what
    assert Pong(1) in one.reports
    assert gone(one) == 0
