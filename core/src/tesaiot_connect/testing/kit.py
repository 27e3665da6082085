"""How a transport is checked: one connection over it, one sentence of the contract, no leftovers.

Owns: the runner of a check and the tools that checks are written with; the checks themselves are
in `transport` and `multistream`. Rule: what a check leaves behind (a task, a socket, a warning) is
a failure too.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import unittest
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import attrs

from ..errors import Disconnected, Unsupported
from ..protocols import (
    ByteStream,
    ClientCertificate,
    Connection,
    Listener,
    Transport,
)

MIB = 1024 * 1024
MOST_IN_FLIGHT = 64 * MIB
"""More than this on the way to a peer that does not read is no backpressure. Kernels hold a few MiB."""
_QUIET = 0.3  # seconds without progress that count as "the sender waits"; too short only weakens the check
GREETING = b"!"  # some transports show a stream to the peer only once something is on it


class ContractBroken(AssertionError):
    """A transport does not keep its contract."""


@attrs.frozen
class Link:
    """What a check works on: how to listen and dial, and then a connection with one stream."""

    listen: Listener
    connect: Callable[[str], Transport]
    identity: ClientCertificate | None
    url: str = ""
    near: Any = None  # the dialling side's connection
    far: Any = None
    a: Any = None  # its stream
    b: Any = None

    async def dial(self, url: str) -> Connection:
        return await self.connect(url).connect(identity=self.identity)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Link]:
        """Listener up, one connection made, its first stream open on both sides."""
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[tuple[Connection, ByteStream]] = loop.create_future()
        finished = asyncio.Event()

        async def handler(connection: Connection) -> None:
            if accepted.done():
                await connection.wait_closed()
                return
            stream = await connection.accept_stream()
            await read_exactly(stream, len(GREETING))
            accepted.set_result((connection, stream))
            await finished.wait()

        async with self.listen.listen(handler) as url:
            near = await self.dial(url)
            try:
                a = await near.open_stream()
                await a.send(GREETING)
                far, b = await accepted
                yield attrs.evolve(self, url=url, near=near, far=far, a=a, b=b)
            finally:
                near.abort()
                finished.set()


Body = Callable[[Link], Awaitable[None]]


@attrs.frozen
class TransportCheck:
    """One sentence of the contract. Call it to check a transport; see the module's docstring."""

    name: str
    rule: str
    body: Body

    def __str__(self) -> str:
        return self.name

    def __call__(
        self,
        *,
        listen: Any,
        connect: Callable[[str], Transport],
        identity: ClientCertificate | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        timeout: float = 60.0,
    ) -> None:
        """`listen` is a recipe to listen with, `connect` makes a recipe of the URL it gives.

        Raises ContractBroken, or unittest.SkipTest (which pytest knows too) where the
        transport says Unsupported. `loop_factory` chooses the event loop.
        """
        link = Link(listen, connect, identity)
        before = _open_sockets()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(self._run(link, timeout))
            gc.collect()
        leaks = [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)]
        if leaks:
            raise self._broken(f"something was left open: {leaks[0]}")
        left = _open_sockets() - before
        if left:
            raise self._broken(f"{len(left)} socket(s) were left open")

    async def _run(self, link: Link, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout) as deadline:
                await self.body(link)
        except Unsupported as error:
            raise unittest.SkipTest(f"{self.name}: {error}") from error
        except ContractBroken as error:
            raise self._broken(str(error)) from error
        except TimeoutError as error:
            if not deadline.expired():
                raise self._broken(f"it raised {error!r}, which is not ours") from error
            raise self._broken(f"nothing happened for {timeout:g} s") from error
        except Exception as error:
            raise self._broken(f"it raised {type(error).__name__}: {error}") from error
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=timeout)
        if tasks:
            raise self._broken(f"a task was left running: {next(iter(tasks))!r}")

    def _broken(self, seen: str) -> ContractBroken:
        return ContractBroken(f"{self.name}: the contract says: {self.rule} But {seen}")


def rule(checks: list[TransportCheck], text: str) -> Callable[[Body], Body]:
    """Makes a function the check of a sentence, the next one in the list."""

    def register(body: Body) -> Body:
        name = getattr(body, "__name__", "check").strip("_")
        checks.append(TransportCheck(name, text, body))
        return body

    return register


def _open_sockets() -> set[str]:
    """Sockets of this process, where the system can say (Linux); elsewhere nothing."""
    if not sys.platform.startswith("linux"):
        return set()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)  # noqa: PTH115 - "socket:[123]" is no path
        except OSError:  # the folder's own descriptor
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


# --- tools of the checks ------------------------------------------------------------------


def expect(condition: bool, seen: str) -> None:
    if not condition:
        raise ContractBroken(seen)


def pattern(size: int) -> bytes:
    word = bytes(range(251))  # a prime length: a block that is lost or doubled shows
    return (word * (size // len(word) + 1))[:size]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def read_exactly(stream: ByteStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive(size - len(data))
        expect(bool(piece), f"the stream ended after {len(data)} of {size} bytes")
        data += piece
    return data


async def read_all(stream: ByteStream) -> bytes:
    pieces = []
    while piece := await stream.receive():
        pieces.append(piece)
    return b"".join(pieces)


async def drain(stream: ByteStream) -> None:
    try:
        while await stream.receive():
            pass
    except Disconnected:
        pass


async def end_of(stream: ByteStream) -> None:
    try:
        data = await stream.receive()
    except Disconnected:
        return
    expect(data == b"", f"it gave {data[:20]!r} though nothing was sent")


async def closes_at_end(connection: Connection, stream: ByteStream) -> None:
    await drain(stream)
    await connection.aclose()


async def transfer(sender: ByteStream, receiver: ByteStream, data: bytes) -> bytes:
    sending = asyncio.create_task(sender.send(data))
    pieces, left = [], len(data)
    try:
        while left:
            piece = await receiver.receive()
            expect(bool(piece), f"the stream ended {left} bytes early")
            pieces.append(piece)
            left -= len(piece)
        await sending
    finally:
        sending.cancel()
    return b"".join(pieces)


async def send_until_broken(stream: ByteStream) -> None:
    try:
        while True:
            await stream.send(b"x" * 1000)
            await asyncio.sleep(0)
    except Disconnected:
        pass


class Flood:
    """Sends `chunk` again and again, up to `most` bytes; leaving cancels it."""

    def __init__(self, stream: ByteStream, chunk: bytes, most: int) -> None:
        self._stream = stream
        self._chunk = chunk
        self._most = most
        self._task: asyncio.Task[None]
        self.sent = 0
        self.stop = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self.stop and self.sent < self._most:
            await self._stream.send(self._chunk)
            self.sent += len(self._chunk)

    @property
    def finished(self) -> bool:
        return self._task.done()

    async def stalled(self) -> None:
        """Returns when nothing went out for a moment, or everything did."""
        before = -1
        while before != self.sent and not self._task.done():
            before = self.sent
            await asyncio.wait([self._task], timeout=_QUIET)

    async def broken(self) -> None:
        try:
            await self._task
        except Disconnected:
            return
        raise ContractBroken(f"send returned as if nothing had happened, after {self.sent} bytes")


async def count(stream: ByteStream, chunk: bytes, flood: Flood) -> int:
    """Read until the flood, which was told to stop, is over; checks every byte."""
    total = 0
    twice = chunk * 6
    while not (flood.finished and total >= flood.sent):
        data = await stream.receive(4 * len(chunk))
        expect(bool(data), f"the stream ended after {total} bytes")
        begin = total % len(chunk)
        expect(data == twice[begin : begin + len(data)], f"wrong bytes after {total}")
        total += len(data)
        await asyncio.sleep(0)
    return total
