"""A worker with NanoNNG's streams: bytes both ways, faults of the library, the end; with a stand-in in C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nng_clock
import nng_stub
import pytest
from nng_peers import PATIENCE, WorkerProcess, worker

from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_nng.control import Ended, Failed, Job, Loaded, Ping, Pong
from tesaiot_connect_quic_nng.library import Library, load
from tesaiot_connect_quic_nng.nng_stream import SYMBOLS, Stream

pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")

CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00"
CONNACK = b"\x20\x02\x00\x00"
PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"
PUBLISH = b"\x30\x05\x00\x01tOK"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def library() -> Path:
    return nng_stub.built("nanonng")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "stub.log"


def job(library: Path, listener: socket.socket, **more: Any) -> Job:
    url = f"mqtt-quic://127.0.0.1:{listener.getsockname()[1]}"
    long = dict.fromkeys(("connect_timeout", "ack_timeout", "watchdog"), nng_clock.LONG)
    return Job(**{"backend": "nanonng", "library": str(library), "url": url, "verify": False, **long, **more})


@contextlib.contextmanager
def connected(
    library: Path,
    listener: socket.socket,
    log: Path | None = None,
    *,
    faults: dict[str, Any] | None = None,
    **more: Any,
) -> Iterator[tuple[WorkerProcess, socket.socket]]:
    """A worker, its client's socket within it, and the server's."""
    environment = nng_stub.environment(log=log, **(faults or {}))
    with worker(job(library, listener, **more), environment) as one:
        one.secured()
        server, _ = listener.accept()
        with server:
            one.data.settimeout(PATIENCE)
            server.settimeout(PATIENCE)
            yield one, server


def read(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size and (piece := sock.recv(size - len(got))):
        got += piece
    return bytes(got)


def transferred(sender: socket.socket, receiver: socket.socket, data: bytes) -> bytes:
    sending = threading.Thread(target=sender.sendall, args=(data,))
    sending.start()
    got = read(receiver, len(data))
    sending.join(PATIENCE)
    return got


def lost(log: Path) -> int:
    return nng_stub.counters(log)["lost"]


def await_lost(log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not lost(log):
        assert time.monotonic() < end
        time.sleep(0.001)


DATA = bytes(range(251)) * (2 * MIB // 251)


# --- the dial


def test_what_the_dial_is_told(
    library: Path, listener: socket.socket, log: Path, certificates: Certificates
) -> None:
    identity = certificates.client()
    with connected(
        library,
        listener,
        log,
        verify=True,
        ca_file=str(certificates.ca_file),
        certificate=Path(identity.certificate).read_text(),
        key=Path(identity.key).read_text(),
        idle_timeout=2.5,
        keepalive=0.5,
        connect_timeout=7.0,
    ):
        assert sorted(nng_stub.events(log)) == [
            "quic-connect-timeout 7",
            "quic-idle-timeout 3",
            "quic-keepalive 1",
            "quic-tls-ca readable",
            "quic-tls-cacert readable",
            "quic-tls-key readable",
            "quic-tls-verify 1",
        ]


def test_no_certificate_is_no_verification(library: Path, listener: socket.socket, log: Path) -> None:
    with connected(library, listener, log):
        assert not [line for line in nng_stub.events(log) if "tls" in line]


@pytest.mark.parametrize(
    "more",
    [
        {"verify": True},
        {"verify": True, "ca_file": "/ca.pem"},
        {"verify": True, "certificate": "one", "key": "two"},
        {"verify": False, "ca_file": "/ca.pem", "certificate": "one", "key": "two"},
    ],
)
def test_it_does_not_dial_what_would_be_verified_otherwise(
    library: Path, listener: socket.socket, more: dict[str, Any]
) -> None:
    with worker(job(library, listener, **more)) as one:
        failed = one.last_word()
    assert isinstance(failed, Failed)
    assert failed.unsupported
    assert "verifies" in failed.what


@pytest.mark.parametrize("fault", ["refuse", "no_handshake"])
def test_a_dial_that_fails(library: Path, listener: socket.socket, fault: str) -> None:
    with worker(job(library, listener, connect_timeout=0.3), nng_stub.environment(**{fault: True})) as one:
        failed = one.last_word()
    assert isinstance(failed, Failed)
    assert (failed.stage, failed.unsupported) == ("reach", False)
    assert "no QUIC handshake with 127.0.0.1:" in failed.what
    assert failed.fix


def test_signs_of_life_while_the_dial_does_not_end(library: Path, listener: socket.socket) -> None:
    slow = job(library, listener, connect_timeout=100.0)
    with worker(slow, nng_stub.environment(no_handshake=True)) as one:
        assert isinstance(one.report(), Loaded)
        for number in (1, 2):
            one.say(Ping(number))
            assert one.report() == Pong(number)


# --- bytes


@pytest.mark.parametrize(
    "faults",
    [{}, {"split": 1000}, {"event": 2}, {"event": 3000, "split": 1999}, {"split": 1}],
    ids=str,
)
def test_all_bytes_arrive_both_ways(
    library: Path, listener: socket.socket, log: Path, faults: dict[str, Any]
) -> None:
    """However the library shows them, it never has any while no receive is posted."""
    data = DATA if not faults else DATA[: 20 * min(faults.values())]
    with connected(library, listener, log, faults=faults) as (one, server):
        assert transferred(server, one.data, data) == data
        assert transferred(one.data, server, DATA) == DATA
    assert lost(log) == 0


@pytest.mark.parametrize("faults", [{}, {"split": 60_000}], ids=str)
def test_a_client_that_does_not_read_holds_the_server_back(
    library: Path, listener: socket.socket, log: Path, faults: dict[str, Any]
) -> None:
    with connected(library, listener, log, faults=faults) as (one, server):
        server.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 * MIB:
                sent += server.send(DATA[sent % 251 :])
        assert sent < 64 * MIB
        server.settimeout(PATIENCE)
        assert read(one.data, sent) == (DATA * (sent // len(DATA) + 1))[:sent]
        assert transferred(server, one.data, DATA) == DATA
    assert lost(log) == 0


POSTED = 33
"""Receives: every second one is large, the others are of a byte."""


@contextlib.contextmanager
def streaming(
    library: Path, listener: socket.socket
) -> Iterator[tuple[Stream, socket.socket, Callable[[int], None]]]:
    """A stream in this process, its server, and a wait until so many receives are complete.

    Nobody looks meanwhile, so none of them is posted again.
    """
    loaded = load("nanonng", str(library), "", SYMBOLS)
    assert isinstance(loaded, Library), loaded
    wakes = threading.Semaphore(0)
    stream = Stream(loaded, wakes.release)

    def completed(count: int) -> None:
        for _ in range(count):
            assert wakes.acquire(timeout=PATIENCE)

    stream.dial(job(library, listener), certificate="", key="")
    server, _ = listener.accept()
    with server:
        completed(1)
        stream.look()
        assert stream.secured
        try:
            yield stream, server, completed
        finally:
            stream.look()
            stream.close()
            while stream.error is None or stream._posted:  # which a thread of the library still tells
                completed(1)
                stream.look()


def test_nothing_is_lost_while_nobody_looks(
    library: Path, listener: socket.socket, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESAIOT_STUB_LOG", str(log))
    with streaming(library, listener) as (stream, server, completed):
        sending = threading.Thread(target=server.sendall, args=(DATA,))
        sending.start()
        completed(POSTED)
        got = b""
        while len(got) < len(DATA):
            got += b"".join(stream.look())
        sending.join(PATIENCE)
    assert got == DATA
    assert lost(log) == 0


def test_the_stand_in_loses_what_comes_without_a_receive(
    library: Path, listener: socket.socket, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NanoNNG does: without that the tests above would show nothing."""
    monkeypatch.setenv("TESAIOT_STUB_LOG", str(log))
    with streaming(library, listener) as (stream, server, completed):
        for _ in range(POSTED):
            server.sendall(b"!")
            completed(1)
        server.sendall(b"?")
        await_lost(log)
        assert b"".join(stream.look()) == b"!" * POSTED
        assert stream.error is None


def test_signs_of_life_while_bytes_flow(library: Path, listener: socket.socket) -> None:
    with connected(library, listener) as (one, server):
        for number in (1, 2, 3):
            one.say(Ping(number))
            assert one.report() == Pong(number)
            assert transferred(server, one.data, DATA[:1000]) == DATA[:1000]


# --- the watchdog


def test_the_question_and_its_answer_stay_between_worker_and_server(
    library: Path, listener: socket.socket
) -> None:
    with connected(library, listener) as (one, server):
        one.data.sendall(CONNECT)
        assert read(server, len(CONNECT)) == CONNECT
        server.sendall(CONNACK)
        assert read(one.data, len(CONNACK)) == CONNACK
        for _ in range(2):
            one.forward()
            assert read(server, 2) == PINGREQ
            server.sendall(PINGRESP + PUBLISH)
            assert read(one.data, len(PUBLISH)) == PUBLISH
        one.data.sendall(PINGREQ)
        assert read(server, 2) == PINGREQ
        server.sendall(PINGRESP)
        assert read(one.data, len(PINGRESP)) == PINGRESP


def test_a_library_that_stalls_is_given_up(library: Path, listener: socket.socket, log: Path) -> None:
    faults = {"stall_after": len(CONNACK + PUBLISH)}
    with connected(library, listener, log, faults=faults) as (one, server):
        one.data.sendall(CONNECT)
        read(server, len(CONNECT))
        server.sendall(CONNACK + PUBLISH)
        assert read(one.data, len(CONNACK + PUBLISH)) == CONNACK + PUBLISH
        one.forward()
        assert read(server, 2) == PINGREQ
        server.sendall(PINGRESP)
        await_lost(log)
        one.hours_go_by()
        ended = one.ended()
        assert ended.silent
        assert "PINGREQ" in ended.what
        assert ended.fix
        assert one.data.recv(1) == b""


def test_a_client_that_does_not_read_is_no_silence(library: Path, listener: socket.socket) -> None:
    """No answer can be expected then. It is asked for again once there is room."""
    with connected(library, listener, memory=100_000) as (one, server):
        one.data.sendall(CONNECT)
        read(server, len(CONNECT))
        stream = memoryview(CONNACK + (b"\x30\xff\xff\x03" + bytes(65535)) * 1000)
        server.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < len(stream):
                sent += server.send(stream[sent:])
        assert sent < len(stream)
        for _ in range(5):
            one.forward()
            assert isinstance(one.report(), Pong)
        assert read(one.data, sent) == stream[:sent]


# --- the end


def test_the_server_closes(library: Path, listener: socket.socket) -> None:
    with connected(library, listener) as (one, server):
        server.sendall(DATA[:5000])
        server.close()
        assert read(one.data, 6000) == DATA[:5000]
        ended = one.ended()
    assert ended.by_peer
    assert not ended.orderly
    assert not ended.silent
    assert "the server closed the connection" in ended.what


def test_the_client_closes_and_all_it_said_arrives(library: Path, listener: socket.socket) -> None:
    with connected(library, listener) as (one, server):
        one.data.sendall(DATA[:100_000])
        one.data.shutdown(socket.SHUT_WR)
        assert read(server, 200_000) == DATA[:100_000]
        ended = one.ended()
        assert one.process.wait(PATIENCE) == 0
    assert ended == Ended(what=ended.what, orderly=True)


def test_the_server_closes_after_disconnect(library: Path, listener: socket.socket) -> None:
    with connected(library, listener) as (one, server):
        one.data.sendall(CONNECT + b"\xe0\x00")
        one.data.shutdown(socket.SHUT_WR)
        assert read(server, len(CONNECT) + 2) == CONNECT + b"\xe0\x00"
        server.close()
        assert one.ended().orderly


def test_the_library_aborts(library: Path, listener: socket.socket) -> None:
    with connected(library, listener, faults={"abort_after": 10}) as (one, server):
        server.sendall(bytes(10))
        assert not isinstance(one.last_word(), Ended)
        assert one.process.wait(PATIENCE) == -signal.SIGABRT


def test_the_parent_goes(library: Path, listener: socket.socket) -> None:
    with connected(library, listener) as (one, server):
        one.orders.close()
        assert one.process.wait(PATIENCE) == 0
        assert server.recv(1) == b""


def test_nobody_asks_any_more(library: Path, listener: socket.socket) -> None:
    """Although the parent's end of the control socket is open: a fork of it has that too."""
    with worker(job(library, listener, ack_timeout=0.1)) as one:
        one.say(Ping(1))
        assert isinstance(one.ended(), Ended)
        assert Pong(1) in one.reports
        assert one.process.wait(PATIENCE) == 0
