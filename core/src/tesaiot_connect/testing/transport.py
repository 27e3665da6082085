"""The transport conformance kit: the contract of `Transport`, `Connection` and `ByteStream`, run.

Owns: one check for each sentence of the contract that a caller relies on. Rule: a check can
fail; what it fails with is that sentence, and what was seen instead. No check depends on how
fast the machine is: waiting is bounded by `timeout`, and running into it is a failure.

    check_transport(listen=Unix(url), connect=lambda url: Unix(Url.parse(url)))

or, one test for each sentence:

    @pytest.mark.parametrize("check", transport_checks, ids=str)
    def test_contract(check):
        check(listen=Unix(url), connect=lambda url: Unix(Url.parse(url)))
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

from ..errors import ConnectFailed, Disconnected, Unsupported
from ..protocols import (
    ByteStream,
    ClientCertificate,
    Connection,
    Listener,
    State,
    Transport,
)

MIB = 1024 * 1024
MOST_IN_FLIGHT = 64 * MIB
"""More than this on the way to a peer that does not read is no backpressure. Kernels hold a few MiB."""
_QUIET = 0.3  # seconds without progress that count as "the sender waits"; too short only weakens the check
_GREETING = b"!"  # some transports show a stream to the peer only once something is on it


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
            await _read_exactly(stream, len(_GREETING))
            accepted.set_result((connection, stream))
            await finished.wait()

        async with self.listen.listen(handler) as url:
            near = await self.dial(url)
            try:
                a = await near.open_stream()
                await a.send(_GREETING)
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
            _, tasks = await asyncio.wait(tasks, timeout=1)
        if tasks:
            raise self._broken(f"a task was left running: {next(iter(tasks))!r}")

    def _broken(self, seen: str) -> ContractBroken:
        return ContractBroken(f"{self.name}: the contract says: {self.rule} But {seen}")


def check_transport(
    *,
    listen: Any,
    connect: Callable[[str], Transport],
    identity: ClientCertificate | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    timeout: float = 60.0,
) -> list[str]:
    """Run every check; returns the names of those skipped because the transport says Unsupported.

    Raises ContractBroken with all sentences that were broken.
    """
    skipped: list[str] = []
    broken: list[ContractBroken] = []
    for check in transport_checks:
        try:
            check(
                listen=listen,
                connect=connect,
                identity=identity,
                loop_factory=loop_factory,
                timeout=timeout,
            )
        except unittest.SkipTest:
            skipped.append(check.name)
        except ContractBroken as error:
            broken.append(error)
    if broken:
        raise ContractBroken("\n".join(str(error) for error in broken)) from broken[0]
    return skipped


# --- the checks ---------------------------------------------------------------------------

transport_checks: list[TransportCheck] = []
"""Every check, in the order to fix them in."""


def _rule(text: str) -> Callable[[Body], Body]:
    def register(body: Body) -> Body:
        name = getattr(body, "__name__", "check").strip("_")
        transport_checks.append(TransportCheck(name, text, body))
        return body

    return register


@_rule("a transport is a class with `schemes`, `rank` and `races`; listening gives a URL it can dial.")
async def _recipe(link: Link) -> None:
    async with link.open() as ready:
        recipe = ready.connect(ready.url)
        for side in (link.listen, recipe):
            schemes = getattr(side, "schemes", {})
            _expect(bool(schemes), "`schemes` is missing or empty")
            _expect(isinstance(getattr(side, "rank", None), int), "`rank` is not an int")
            _expect(isinstance(getattr(side, "races", None), bool), "`races` is not a bool")
        scheme = ready.url.partition("://")[0]
        _expect(scheme in recipe.schemes, f"{ready.url} is not of its schemes {[*recipe.schemes]}")
        _expect(isinstance(ready.near, Connection), "connect returned something else than a Connection")
        for stream in (ready.a, ready.b):
            _expect(isinstance(stream, ByteStream), f"{stream!r} is not a ByteStream")
        _expect(bool(ready.near.peer.transport), "peer.transport is empty")
        again = await recipe.connect(identity=link.identity)
        again.abort()


@_rule("what is sent arrives, all of it, in order, both ways.")
async def _echo(link: Link) -> None:
    async with link.open() as ready:
        for size in (1, 2, 1000, 65536, 3 * MIB):
            data = _pattern(size)
            for sender, receiver in ((ready.a, ready.b), (ready.b, ready.a)):
                got = await _transfer(sender, receiver, data)
                _expect(got == data, f"of {size} bytes something else arrived ({len(got)} bytes)")


@_rule("receive gives at least one byte, at most `max_bytes`.")
async def _receive_size(link: Link) -> None:
    async with link.open() as ready:
        data = _pattern(5000)
        sending = asyncio.create_task(ready.a.send(data))
        got = b""
        while len(got) < len(data):
            piece = await ready.b.receive(7)
            _expect(bool(piece), "it gave b'' though the stream is open")
            _expect(len(piece) <= 7, f"receive(7) gave {len(piece)} bytes")
            got += piece
        await sending
        _expect(got == data, "the pieces do not make up what was sent")


@_rule("after send_eof the peer reads the end of the stream, and receiving goes on.")
async def _half_close(link: Link) -> None:
    async with link.open() as ready:
        await ready.a.send(b"question")
        await ready.a.send_eof()
        _expect(await _read_all(ready.b) == b"question", "what came before it was lost")
        await ready.b.send(b"answer")
        await ready.b.send_eof()
        _expect(await _read_all(ready.a) == b"answer", "the answer was lost")


@_rule("the end of the stream is for good: once receive gave b'' it always does.")
async def _end_is_final(link: Link) -> None:
    async with link.open() as ready:
        await ready.a.send(b"last words")
        closing = asyncio.create_task(ready.a.aclose())
        _expect(await _read_all(ready.b) == b"last words", "what was sent before aclose was lost")
        for _ in range(3):
            _expect(await ready.b.receive() == b"", "data came after the end")
        await ready.far.aclose()
        await closing


@_rule("a peer that does not read holds the sender back, and gets everything once it reads.")
async def _backpressure(link: Link) -> None:
    async with link.open() as ready:
        chunk = _pattern(65536)
        for sender, receiver in ((ready.a, ready.b), (ready.b, ready.a)):
            flood = _Flood(sender, chunk, MOST_IN_FLIGHT)
            async with flood:
                await flood.stalled()
                _expect(not flood.finished, f"the sender got rid of {flood.sent} bytes nobody read")
                flood.stop = True
                received = await _count(receiver, chunk, flood)
                _expect(received == flood.sent, f"{flood.sent} bytes sent, {received} arrived")


@_rule("one task may receive while another sends: both directions flow at the same time.")
async def _both_ways(link: Link) -> None:
    async with link.open() as ready:
        receiving = asyncio.create_task(ready.b.receive())
        await _turns(5)
        await ready.b.send(b"x")
        _expect(await ready.a.receive() == b"x", "something else arrived")
        await ready.a.send(b"y")
        _expect(await receiving == b"y", "something else arrived")
        data = _pattern(8 * MIB)
        got = await asyncio.gather(_transfer(ready.a, ready.b, data), _transfer(ready.b, ready.a, data))
        _expect(got[0] == data and got[1] == data, "the bytes of the two directions got mixed up")


@_rule("a cancelled receive loses no bytes.")
async def _cancelled_receive(link: Link) -> None:
    async with link.open() as ready:
        expected, got = bytearray(), bytearray()
        for number in range(200):
            receiving = asyncio.create_task(ready.b.receive(number % 5 + 1))
            await _turns(number % 3)
            word = b"%d," % number
            expected += word
            await ready.a.send(word)
            await _turns(number % 7)
            receiving.cancel()
            try:
                got += await receiving
            except asyncio.CancelledError:
                pass
        while len(got) < len(expected):
            piece = await ready.b.receive()
            _expect(bool(piece), f"only {len(got)} of {len(expected)} bytes arrived")
            got += piece
        _expect(got == expected, "bytes were lost or came twice")


@_rule("after a cancelled send the stream is good for abort, and the peer learns of the end.")
async def _cancelled_send(link: Link) -> None:
    async with link.open() as ready:
        async with _Flood(ready.a, _pattern(65536), MOST_IN_FLIGHT) as flood:
            await flood.stalled()
        ready.a.abort()
        ready.near.abort()
        await _drain(ready.b)
        await ready.far.aclose()


@_rule("closing ends a receive that waits.")
async def _close_during_receive(link: Link) -> None:
    for whole in (False, True):
        async with link.open() as ready:
            receiving = asyncio.create_task(_end_of(ready.a))
            peer = asyncio.create_task(_closes_at_end(ready.far, ready.b))
            await _turns(5)
            await (ready.near.aclose() if whole else ready.a.aclose())
            await receiving
            await ready.near.aclose()
            await peer


@_rule("a peer that vanishes ends receive and send with Disconnected, and wait_closed returns.")
async def _peer_vanishes(link: Link) -> None:
    async with link.open() as ready:
        receiving = asyncio.create_task(_end_of(ready.b))
        await _turns(5)
        ready.near.abort()
        await receiving
        await _send_until_broken(ready.b)
        ready.far.abort()
        await ready.far.wait_closed()


@_rule("abort ends a send that waits.")
async def _abort_during_send(link: Link) -> None:
    async with link.open() as ready:
        flood = _Flood(ready.a, _pattern(65536), MOST_IN_FLIGHT)
        async with flood:
            await flood.stalled()
            ready.near.abort()
            await flood.broken()


@_rule("aclose flushes: what was sent before it arrives, though the peer was still sending.")
async def _close_flushes(link: Link) -> None:
    async with link.open() as ready:
        data = _pattern(200_000)
        await ready.b.send(b"x" * 1000)

        async def send_and_close() -> None:
            await ready.a.send(data)
            await ready.near.aclose()

        closing = asyncio.create_task(send_and_close())
        got = await _read_all(ready.b)
        _expect(got == data, f"{len(got)} of {len(data)} bytes arrived")
        await ready.far.aclose()
        await closing


@_rule("aclose and abort are idempotent, in any order, and never raise.")
async def _idempotent(link: Link) -> None:
    for orders in (("aclose", "aclose", "abort"), ("abort", "abort", "aclose")):
        async with link.open() as ready:
            peer = asyncio.create_task(_closes_at_end(ready.far, ready.b))
            for target in (ready.a, ready.near, ready.b, ready.far):
                for order in orders:
                    outcome = getattr(target, order)()
                    if outcome is not None:
                        await outcome
            await peer


@_rule("nothing can be sent or received after aclose on this side: that raises Disconnected.")
async def _closed_is_closed(link: Link) -> None:
    async with link.open() as ready:
        peer = asyncio.create_task(_closes_at_end(ready.far, ready.b))
        await ready.near.aclose()
        await peer
        for use in (ready.a.receive, lambda: ready.a.send(b"x")):
            try:
                await use()
            except Disconnected:
                continue
            raise ContractBroken("it returned as if nothing had happened")


@_rule("aclose is bounded: it returns though the peer neither reads nor closes.")
async def _close_is_bounded(link: Link) -> None:
    async with link.open() as ready:
        await ready.a.send(_pattern(1000))
        await ready.near.aclose()


@_rule("wait_closed returns a reason, and status then says closed.")
async def _wait_closed(link: Link) -> None:
    async with link.open() as ready:
        waiting = [asyncio.create_task(side.wait_closed()) for side in (ready.near, ready.far)]
        await _turns(5)
        _expect(not any(task.done() for task in waiting), "it returned while the connection was open")
        closing = asyncio.create_task(ready.near.aclose())
        await _drain(ready.b)
        await ready.far.aclose()
        await closing
        for task, side in zip(waiting, (ready.near, ready.far), strict=True):
            _expect(await task is not None, "wait_closed gave None")
            status = side.status()
            _expect(status.state is State.CLOSED, f"status().state is {status.state}")
            _expect(status.close_reason is not None, "status().close_reason is None")


@_rule("status counts what was received and sent.")
async def _status(link: Link) -> None:
    async with link.open() as ready:
        before = ready.far.status()
        _expect(before.state is State.OPEN, f"an open connection's state is {before.state}")
        await _transfer(ready.a, ready.b, _pattern(100_000))
        after = ready.far.status()
        grown = after.bytes_received - before.bytes_received
        _expect(grown >= 100_000, f"bytes_received grew by {grown} when 100000 came")
        _expect(ready.near.status().bytes_sent >= 100_000, "bytes_sent does not count")
        _expect(after.last_received >= before.last_received, "last_received went back")


@_rule("with `multistream` false the only stream is the first: open_stream then raises Unsupported.")
async def _one_stream(link: Link) -> None:
    async with link.open() as ready:
        if ready.near.multistream:
            raise Unsupported("it has many streams")
        try:
            await ready.near.open_stream()
        except Unsupported:
            return
        raise ContractBroken("a second open_stream gave a stream")


@_rule("leaving a listener cancels the handlers that still run, and their peers learn of the end.")
async def _listener_leaves(link: Link) -> None:
    cancelled: list[bool] = []
    running = asyncio.Event()

    async def handler(connection: Connection) -> None:
        try:
            stream = await connection.accept_stream()
            await stream.receive()
            running.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async with link.listen.listen(handler) as url:
        near = await link.dial(url)
        stream = await near.open_stream()
        await stream.send(_GREETING)
        await running.wait()
        ending = asyncio.create_task(_closes_at_end(near, stream))
    _expect(cancelled == [True], "the handler was not cancelled")
    await ending


@_rule("the listener closes a connection when its handler returns or raises, and serves on.")
async def _handler_ends(link: Link) -> None:
    async def returns(connection: Connection) -> None:
        stream = await connection.accept_stream()
        await stream.receive()

    async def raises(connection: Connection) -> None:
        await returns(connection)
        raise Disconnected("as a handler does whose peer has left")

    for handler in (returns, raises):
        async with link.listen.listen(handler) as url:
            for _ in range(3):
                near = await link.dial(url)
                stream = await near.open_stream()
                await stream.send(_GREETING)
                await _closes_at_end(near, stream)


@_rule("a listener serves many connections at the same time.")
async def _many_connections(link: Link) -> None:
    together = asyncio.Barrier(20)

    async def handler(connection: Connection) -> None:
        stream = await connection.accept_stream()
        data = await _read_exactly(stream, 2)
        await together.wait()
        await stream.send(data)
        await _drain(stream)

    async def client(url: str, number: int) -> None:
        near = await link.dial(url)
        try:
            stream = await near.open_stream()
            await stream.send(b"%02d" % number)
            _expect(await _read_exactly(stream, 2) == b"%02d" % number, "answers got mixed up")
        finally:
            await near.aclose()

    async with link.listen.listen(handler) as url:
        await asyncio.gather(*(client(url, number) for number in range(together.parties)))


@_rule("connect raises ConnectFailed with a `fix` where nobody listens.")
async def _refused(link: Link) -> None:
    async with link.open() as ready:
        url = ready.url
    try:
        connection = await link.dial(url)
    except ConnectFailed as error:
        _expect(bool(error.fix), f"its `fix` is empty: {error}")
        return
    connection.abort()
    raise ContractBroken("it connected to a listener that was closed")


@_rule("a cancelled connect leaves nothing behind.")
async def _cancelled_connect(link: Link) -> None:
    async def handler(connection: Connection) -> None:
        await connection.wait_closed()

    async with link.listen.listen(handler) as url:
        for turns in range(12):
            connecting = asyncio.create_task(link.dial(url))
            await _turns(turns)
            connecting.cancel()
            try:
                (await connecting).abort()
            except asyncio.CancelledError:
                pass


# --- tools of the checks ------------------------------------------------------------------


def _expect(condition: bool, seen: str) -> None:
    if not condition:
        raise ContractBroken(seen)


def _pattern(size: int) -> bytes:
    word = bytes(range(251))  # a prime length: a block that is lost or doubled shows
    return (word * (size // len(word) + 1))[:size]


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def _read_exactly(stream: ByteStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive(size - len(data))
        _expect(bool(piece), f"the stream ended after {len(data)} of {size} bytes")
        data += piece
    return data


async def _read_all(stream: ByteStream) -> bytes:
    pieces = []
    while piece := await stream.receive():
        pieces.append(piece)
    return b"".join(pieces)


async def _drain(stream: ByteStream) -> None:
    try:
        while await stream.receive():
            pass
    except Disconnected:
        pass


async def _end_of(stream: ByteStream) -> None:
    try:
        data = await stream.receive()
    except Disconnected:
        return
    _expect(data == b"", f"it gave {data[:20]!r} though nothing was sent")


async def _closes_at_end(connection: Connection, stream: ByteStream) -> None:
    await _drain(stream)
    await connection.aclose()


async def _transfer(sender: ByteStream, receiver: ByteStream, data: bytes) -> bytes:
    sending = asyncio.create_task(sender.send(data))
    pieces, left = [], len(data)
    try:
        while left:
            piece = await receiver.receive()
            _expect(bool(piece), f"the stream ended {left} bytes early")
            pieces.append(piece)
            left -= len(piece)
        await sending
    finally:
        sending.cancel()
    return b"".join(pieces)


async def _send_until_broken(stream: ByteStream) -> None:
    try:
        while True:
            await stream.send(b"x" * 1000)
            await asyncio.sleep(0)
    except Disconnected:
        pass


class _Flood:
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


async def _count(stream: ByteStream, chunk: bytes, flood: _Flood) -> int:
    """Read until the flood, which was told to stop, is over; checks every byte."""
    total = 0
    twice = chunk * 6
    while not (flood.finished and total >= flood.sent):
        data = await stream.receive(4 * len(chunk))
        _expect(bool(data), f"the stream ended after {total} bytes")
        begin = total % len(chunk)
        _expect(data == twice[begin : begin + len(data)], f"wrong bytes after {total}")
        total += len(data)
        await asyncio.sleep(0)
    return total


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
