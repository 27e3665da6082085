"""What the tests of the UDP socket share: the loops they run on, a peer that keeps what it is told, and a
socket that fails on request."""

from __future__ import annotations

import asyncio
import select
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tesaiot_connect_quic_aioquic.udp import Address, Datagram, UdpSocket, open_socket

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

V4, V6 = socket.AF_INET, socket.AF_INET6
HOST = {V4: "127.0.0.1", V6: "::1"}


def has_v6() -> bool:
    try:
        with socket.socket(V6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(V4, id="v4"),
        pytest.param(V6, id="v6", marks=pytest.mark.skipif(not has_v6(), reason="no IPv6 here")),
    ],
)


class NoReaders(asyncio.SelectorEventLoop):
    """As Windows' Proactor: no readiness, only operations."""

    def add_reader(self, *args: Any) -> Any:
        raise NotImplementedError

    remove_reader = add_writer = remove_writer = add_reader

    # the selector loop's own sock_recvfrom ends with these
    def _sock_read_done(self, fd: int, fut: Any, handle: Any = None) -> None:
        if handle is None or not handle.cancelled():
            self._remove_reader(fd)  # type: ignore[attr-defined]


LOOPS: dict[str, Any] = {"asyncio": asyncio.new_event_loop}
try:
    import uvloop
except ImportError:
    pass
else:
    LOOPS["uvloop"] = uvloop.new_event_loop

Run = Callable[[Coroutine[Any, Any, None]], None]


def runner(loop_factory: Any) -> Run:
    """Runs the test; what the loop would only have logged fails it."""

    def run(main: Coroutine[Any, Any, None]) -> None:
        unhandled: list[dict[str, Any]] = []

        async def bounded() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            async with asyncio.timeout(30):
                await main

        with asyncio.Runner(loop_factory=loop_factory) as on:
            on.run(bounded())
        assert not unhandled

    return run


class Peer:
    """A UdpSocket that keeps what it is told."""

    def __init__(self, sock: Any, **options: Any) -> None:
        self.udp = UdpSocket(sock, **options)
        self.got: list[Datagram] = []
        self.bursts: list[int] = []
        self.errors: list[OSError] = []
        self.writable = 0
        self._news = asyncio.Event()
        self.udp.start(self._datagrams, self._error, self._room)

    def _datagrams(self, datagrams: list[Datagram]) -> None:
        assert datagrams
        self.got += datagrams
        self.bursts.append(len(datagrams))
        self._news.set()

    def _error(self, error: OSError) -> None:
        self.errors.append(error)
        self._news.set()

    def _room(self) -> None:
        assert not self.udp.blocked
        self.writable += 1
        self._news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._news.clear()
            await self._news.wait()

    async def received(self, count: int) -> list[bytes]:
        await self.until(lambda: len(self.got) >= count)
        return [d.data for d in self.got]

    @property
    def address(self) -> Address:
        return self.udp.local_address

    def close(self) -> None:
        self.udp.close()


def bound(family: int = V4, **options: Any) -> socket.socket:
    return open_socket(
        family, local=(HOST[socket.AddressFamily(family)], 0), receive_buffer=1 << 20, **options
    )


def connected(remote: Address, family: int = V4) -> Any:
    return open_socket(family, remote=remote, receive_buffer=1 << 20)


class Fussy:
    """A socket whose sends answer from a list first: an errno raises, None goes through."""

    def __init__(self, sock: socket.socket, *answers: int | None, always: int | None = None) -> None:
        self._sock = sock
        self.answers = list(answers)
        self.always = always
        self.calls: list[int] = []  # bytes of each send that was tried

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def _answer(self, data: bytes) -> None:
        self.calls.append(len(data))
        number = self.answers.pop(0) if self.answers else self.always
        if number is not None:
            raise OSError(number, "as the test says")  # becomes the subclass of its errno

    def send(self, data: bytes) -> int:
        self._answer(data)
        return self._sock.send(data)

    def sendto(self, data: bytes, address: Address) -> int:
        self._answer(data)
        return self._sock.sendto(data, address)

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        self._answer(b"".join(buffers))
        return self._sock.sendmsg(buffers, *rest)


def refused(sender: socket.socket) -> None:
    """Returns once the refusal of what it sent has come; it is not taken from the socket."""
    errors = select.poll()
    errors.register(sender, 0)
    assert errors.poll(20_000), "no refusal came"


def mixed(count: int) -> list[bytes]:
    """Runs of one size that end in a shorter one, single ones, and sizes that grow."""
    sizes = [1200, 1200, 1200, 700, 1200, 1, 1, 1300, 1300, 1452, 8, 9, 10, 10, 10, 3]
    return [
        i.to_bytes(2, "big")[-s:] + b"x" * (s - 2) for i in range(count) for s in (sizes[i % len(sizes)],)
    ]
