"""A worker of `quic_nng` with both its sockets in our hands, a client for it, and a broker in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import nng_clock

from tesaiot_connect import Broker, BrokerOptions, ListenerSpec, Message, Url
from tesaiot_connect.mqtt import (
    V3,
    Acknowledged,
    ClientEngine,
    Closed,
    Connect,
    Connected,
    Received,
    Send,
    Session,
    Suback,
    Subscription,
)
from tesaiot_connect_quic_nng import control
from tesaiot_connect_tcp_tls import TcpTls

PATIENCE = 20.0
"""Seconds; nothing here takes as long unless it hangs."""


class Peer:
    """An MQTT client on a connected socket. It settles what comes at once."""

    def __init__(self, sock: socket.socket, client_id: str, *, version: int = V3, **more: Any) -> None:
        self.sock = sock
        sock.setblocking(False)
        connect = Connect(client_id=client_id, version=version, keepalive=0, **more)
        self.engine = ClientEngine(connect, Session(), now=time.monotonic())
        self.messages: list[Message] = []
        self.acknowledged: set[int] = set()
        self.connected: Connected | None = None
        self.answers: list[Suback] = []
        self.closed: Closed | None = None
        self.eof = False
        self._queue: list[tuple[Message, int]] = []
        self._output = b""

    def publish(self, messages: Sequence[Message], *, first: int = 0) -> None:
        """Their keys count from `first`."""
        self._queue += [(one, first + at) for at, one in enumerate(messages)]

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        self.engine.subscribe([Subscription(one, qos) for one in filters])
        known = len(self.answers)
        self.until(lambda: len(self.answers) > known)

    def until(self, reached: Callable[[], object], patience: float = PATIENCE) -> None:
        end = time.monotonic() + patience
        while not reached():
            assert time.monotonic() < end, f"not reached; closed={self.closed}, eof={self.eof}"
            self.step()

    def step(self, patience: float = 0.05) -> None:
        """Moves bytes both ways, or waits for that a little."""
        now = time.monotonic()
        while self._queue:
            some = self._queue[:1000]
            taken = self.engine.publish([one for one, _ in some], [key for _, key in some])
            del self._queue[:taken]
            if taken < len(some):
                break
        self._output += b"".join(one.data for one in self.engine.outputs() if isinstance(one, Send))
        if self.eof:
            time.sleep(patience)
            return
        readable, writable, _ = select.select([self.sock], [self.sock] if self._output else [], [], patience)
        if writable:
            try:
                self._output = self._output[self.sock.send(self._output) :]
            except OSError:
                self.eof = True
        if readable:
            try:
                data = self.sock.recv(262_144)
            except OSError:
                data = b""
            self.eof = not data
            for event in self.engine.receive_data(data, now=now) if data else []:
                self._take(event)

    def _take(self, event: object) -> None:
        if isinstance(event, Received):
            self.messages += event.messages
            if event.token:
                self.engine.settle(event.token)
        elif isinstance(event, Acknowledged):
            self.acknowledged.update(event.keys)
        elif isinstance(event, Connected):
            self.connected = event
        elif isinstance(event, Suback):
            self.answers.append(event)
        elif isinstance(event, Closed):
            self.closed = event

    def flush(self) -> None:
        """All that was published has left."""
        self.until(lambda: not (self._queue or self._output or self.engine.has_output) or self.eof)

    def disconnect(self) -> None:
        self.flush()
        self.engine.disconnect()
        self.flush()


class WorkerProcess:
    """A worker, its data socket and what it reports."""

    def __init__(self, job: control.Job, environment: Mapping[str, str] = {}) -> None:
        self.data, data = socket.socketpair()
        self.orders, orders = socket.socketpair()
        self.reports: list[control.Report] = []
        self._read = b""
        with data, orders:
            numbers = (data.fileno(), orders.fileno())
            self.process = subprocess.Popen(
                [sys.executable, *nng_clock.COMMAND, *map(str, numbers)],
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TESAIOT_PATIENT": "1", **environment},
                start_new_session=True,
            )
        self.say(job)

    def say(self, order: control.Order) -> None:
        self.orders.sendall(control.line(order))

    def forward(self) -> None:
        """Hours go by for it, at once. It has said `Loaded`."""
        nng_clock.forward(self.process.pid)
        self.say(control.Ping(0))  # which wakes it

    def hours_go_by(self) -> None:
        """Again and again, until it has said its last word: what it hears of late may begin its time anew."""
        for _ in range(1000):
            with contextlib.suppress(BrokenPipeError):
                self.forward()
            if not isinstance(self.report(), control.Pong):
                return
        raise AssertionError("nothing ends it")

    def report(self, patience: float = PATIENCE) -> control.Report | None:
        """The next one, None where there is none any more."""
        self.orders.settimeout(patience)
        while b"\n" not in self._read:
            try:
                piece = self.orders.recv(65536)
            except ConnectionResetError:
                piece = b""
            if not piece:
                return None
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        self.reports.append(control.reports.decode(line))
        return self.reports[-1]

    def secured(self) -> None:
        loaded, secured = self.report(), self.report()
        assert isinstance(loaded, control.Loaded), loaded
        assert isinstance(secured, control.Secured), secured

    def last_word(self) -> control.Report | None:
        while self.report() is not None:
            pass
        return self.reports[-1] if self.reports else None

    def ended(self) -> control.Ended:
        word = self.last_word()
        assert isinstance(word, control.Ended), (word, self.printed())
        return word

    def printed(self) -> str:
        """All it printed; waits for its end."""
        assert self.process.stdout is not None
        return self.process.stdout.read().decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.data.close()
        self.orders.close()


@contextlib.contextmanager
def worker(job: control.Job, environment: Mapping[str, str] = {}) -> Iterator[WorkerProcess]:
    one = WorkerProcess(job, environment)
    try:
        yield one
    finally:
        one.close()


class ServingBroker:
    """Our broker in a thread, at `urls`."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broker: Broker | None = None
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._observers: list[Peer] = []

    async def _serve(self, specs: Sequence[ListenerSpec], options: BrokerOptions | None) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            self._broker = Broker(options)
            async with self._broker.serving(specs) as urls:
                self.urls = [str(one) for one in urls]
                self._ready.set()
                await self._stop.wait()
        finally:
            self._ready.set()

    def publish(self, messages: Sequence[Message]) -> None:
        assert self._broker is not None and self._loop is not None
        asyncio.run_coroutine_threadsafe(self._broker.publish(messages), self._loop).result(PATIENCE)

    def stop(self) -> None:
        assert self._loop is not None and self._stop is not None
        with contextlib.suppress(RuntimeError):  # stopped already
            self._loop.call_soon_threadsafe(self._stop.set)

    @property
    def port(self) -> int:
        """Of the first listener."""
        return Url.parse(self.urls[0]).port or 0

    def observer(self, *filters: str, url: int = 0) -> Peer:
        """A subscriber over TCP, until `dismiss` or the end."""
        address = Url.parse(self.urls[url])
        peer = Peer(socket.create_connection(("127.0.0.1", address.port or 0)), "observer")
        self._observers.append(peer)
        peer.until(lambda: peer.connected)
        peer.subscribe(*filters, qos=2)
        return peer

    def dismiss(self) -> None:
        while self._observers:
            self._observers.pop().sock.close()


@contextlib.contextmanager
def broker(*more: ListenerSpec, options: BrokerOptions | None = None) -> Iterator[ServingBroker]:
    """With an `mqtt://` listener, and `more`."""
    one = ServingBroker()
    specs = [ListenerSpec("tcp", TcpTls(Url.parse("mqtt://127.0.0.1:0"))), *more]
    thread = threading.Thread(target=lambda: asyncio.run(one._serve(specs, options)))
    thread.start()
    try:
        assert one._ready.wait(PATIENCE) and one.urls, "the broker did not start"
        yield one
    finally:
        one.dismiss()
        one.stop()
        thread.join(PATIENCE)
