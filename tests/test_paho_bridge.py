"""Between paho's socket and a connection of ours: bounded both ways, and nothing lost at its ends."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
import pytest

from tesaiot_connect import (
    ClientCertificate,
    CloseReason,
    ConnectFailed,
    Connection,
    ConnectorError,
    Dialed,
    Disconnected,
    PathLost,
)
from tesaiot_connect.paho import bridge as module, drop_in
from tesaiot_connect.paho.bridge import CHUNK, Bridge

BOUND = 1024 * 1024
"""Bytes that may be under way in one direction: the buffers of two local sockets, and some chunks."""


class FakeStream:
    """A network that a test turns on and off: what is sent gathers, what is received is made up."""

    def __init__(self, *, sends: int | None = None, takes: bool = True) -> None:
        """`sends` is how many bytes come before the end; None goes on for ever."""
        self.left = sends
        self.given = 0
        self.taken = bytearray()
        self.taking = asyncio.Event()
        self.broken = asyncio.Event()
        if takes:
            self.taking.set()

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        if self.left == 0:
            return b""
        if self.left is not None and self.left < 0:  # silent
            await self.broken.wait()
            raise Disconnected("the network is gone")
        size = max_bytes if self.left is None else min(max_bytes, self.left)
        self.given += size
        if self.left is not None:
            self.left -= size
        await asyncio.sleep(0)
        return bytes(size)

    async def send(self, data: bytes, /) -> None:
        self.taken += data
        await self.taking.wait()

    async def send_eof(self) -> None: ...
    async def aclose(self) -> None: ...
    def abort(self, code: int = 0) -> None: ...


class FakeConnection:
    multistream = False
    early_sent = False

    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.keepalive = -1.0
        self.ends: list[str] = []
        self.closed = threading.Event()

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        return self  # type: ignore[return-value]

    async def open_stream(self, *, priority: int = 0) -> FakeStream:
        return self.stream

    def set_keepalive(self, seconds: float) -> None:
        self.keepalive = seconds

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        self.ends.append("closed")
        self.closed.set()

    def abort(self, code: int = 0) -> None:
        if not self.ends:
            self.ends.append("aborted")
        self.closed.set()

    async def wait_closed(self) -> CloseReason:
        return CloseReason()


def bridged(stream: FakeStream) -> tuple[Bridge, socket.socket, FakeConnection]:
    connection = FakeConnection(stream)
    bridge = Bridge(connection, None, 60)
    return bridge, bridge.open(), connection


def finish(bridge: Bridge, sock: socket.socket, connection: FakeConnection) -> None:
    sock.close()
    bridge.leave()
    assert connection.closed.wait(20)


def settled(figure: Callable[[], int]) -> int:
    """A figure of a chunk or more that stays as it is. Were this too hasty, a test would see too little of
    what is too much."""
    pause, before = threading.Event(), -1
    while (now := figure()) != before or now < CHUNK:
        before = now
        pause.wait(0.1)
    return now


def test_a_slow_reader_holds_the_network_back() -> None:
    stream = FakeStream()
    bridge, sock, connection = bridged(stream)
    given = settled(lambda: stream.given)
    assert given <= BOUND
    read = 0
    while read < 4 * BOUND:
        read += len(sock.recv(65536))
    assert stream.given - read <= BOUND
    assert connection.keepalive == 60
    finish(bridge, sock, connection)


def test_a_slow_network_holds_the_writer_back() -> None:
    stream = FakeStream(sends=-1, takes=False)
    bridge, sock, connection = bridged(stream)
    sock.setblocking(False)
    written = 0

    def write() -> int:
        nonlocal written
        try:
            while written <= BOUND:
                written += sock.send(bytes(65536))
        except BlockingIOError:
            pass
        return written

    assert settled(write) <= BOUND
    sock.close()
    bridge._portal.call(in_loop(stream.taking.set))
    bridge.leave()
    assert connection.closed.wait(20)
    assert (len(stream.taken), connection.ends) == (written, ["closed"])


def in_loop(function: Callable[[], None]) -> Callable[[], Any]:
    async def call() -> None:
        function()

    return call


def test_what_was_written_is_delivered_while_the_network_floods_the_reader() -> None:
    """As when a subscriber under load disconnects: its socket is closed with much unread in it."""
    for _ in range(20):
        stream = FakeStream()
        bridge, sock, connection = bridged(stream)
        sock.sendall(b"the last packet")
        finish(bridge, sock, connection)
        assert (bytes(stream.taken), connection.ends) == (b"the last packet", ["closed"])


def test_all_that_came_is_read_before_the_end() -> None:
    stream = FakeStream(sends=3 * BOUND)
    _, sock, connection = bridged(stream)
    read = 0
    while data := sock.recv(65536):
        read += len(data)
    assert read == 3 * BOUND
    assert connection.closed.wait(20)
    with pytest.raises(OSError, match="ipe"):
        sock.sendall(bytes(10))
        sock.sendall(bytes(10))
    sock.close()


def test_a_broken_network_is_seen_as_the_end() -> None:
    stream = FakeStream(sends=-1)
    bridge, sock, connection = bridged(stream)
    bridge._portal.call(in_loop(stream.broken.set))
    assert sock.recv(10) == b""
    assert connection.closed.wait(20)
    assert connection.ends == ["aborted"]
    bridge.leave()
    sock.close()


def test_a_network_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.05)
    stream = FakeStream(sends=-1, takes=False)
    bridge, sock, connection = bridged(stream)
    sock.sendall(b"nobody takes this")
    finish(bridge, sock, connection)
    assert connection.ends == ["aborted"]


def test_a_failure_leaves_nothing_behind() -> None:
    class Failing:
        async def connect(
            self, *, identity: ClientCertificate | None = None, early: bytes = b""
        ) -> Connection:
            raise ConnectFailed("nobody is there")

    before = set(threading.enumerate())  # those of other tests may be about to end
    bridge = Bridge(Failing(), None, 60)
    with pytest.raises(ConnectFailed, match="nobody is there"):
        bridge.open()
    assert set(threading.enumerate()) <= before
    bridge.leave()


@pytest.mark.parametrize("lost", [True, False])
def test_a_path_that_went_silent_is_told_to_a_dialer_that_negotiates(lost: bool) -> None:
    class Negotiating(FakeConnection):
        told: list[tuple[Dialed, ConnectorError]]

        async def dial(self, **how: Any) -> Dialed:
            self.told = []
            return Dialed(await self.connect(**how), "fake://")

        async def better(self, than: Dialed, **how: Any) -> Dialed:
            raise AssertionError("whoever carries bytes cannot move")

        def better_after(self, than: Dialed) -> float | None:
            raise AssertionError

        def lost(self, dialed: Dialed, error: ConnectorError) -> None:
            self.told.append((dialed, error))

    error = PathLost("nothing came for 5 s") if lost else Disconnected("it was reset")

    class Silent(FakeStream):
        async def receive(self, max_bytes: int = 65536, /) -> bytes:
            await self.broken.wait()
            raise error

    stream = Silent()
    connection = Negotiating(stream)
    bridge = Bridge(connection, None, 60)
    sock = bridge.open()
    bridge._portal.call(in_loop(stream.broken.set))
    sock.settimeout(20)
    assert sock.recv(1) == b""
    sock.close()
    bridge.leave()
    assert connection.closed.wait(20)
    assert [(dialed.endpoint, error.what) for dialed, error in connection.told] == (
        [("fake://", error.what)] if lost else []
    )


def test_a_reconnect_remembers_which_paths_were_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    dialers: list[Any] = []

    class Nowhere(Bridge):
        def open(self) -> socket.socket:
            dialers.append(self._dialer)
            raise ConnectFailed("nobody is there")

    monkeypatch.setattr(drop_in, "Bridge", Nowhere)
    client = drop_in.Client(paho.CallbackAPIVersion.VERSION2)
    for urls in (["mqtt://a", "mqtt://b"], ["mqtt://a", "mqtt://b"], ["mqtt://a"]):
        with pytest.raises(OSError, match="nobody"):
            client.connect(urls)
    assert dialers[0] is dialers[1]
    assert dialers[1] is not dialers[2]
