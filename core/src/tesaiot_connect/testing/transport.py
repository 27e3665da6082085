"""The transport conformance kit: the contract of `Transport`, `Connection` and `ByteStream`, run.

Owns: one check for each sentence of the contract that a caller relies on; those about several
streams are in `multistream`. Rule: a check can
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
import functools
import unittest
from collections.abc import Callable
from typing import Any

from ..errors import ConnectFailed, Disconnected, Unsupported
from ..protocols import ByteStream, ClientCertificate, Connection, State, Transport
from .kit import (
    GREETING,
    MIB,
    MOST_IN_FLIGHT,
    ContractBroken,
    Flood,
    Link,
    TransportCheck,
    closes_at_end,
    count,
    drain,
    end_of,
    expect,
    pattern,
    read_all,
    read_exactly,
    rule,
    send_until_broken,
    transfer,
    turns,
)
from .multistream import multistream_checks


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


_rule = functools.partial(rule, transport_checks)


@_rule("a transport is a class with `schemes`, `rank` and `races`; listening gives a URL it can dial.")
async def _recipe(link: Link) -> None:
    async with link.open() as ready:
        recipe = ready.connect(ready.url)
        for side in (link.listen, recipe):
            schemes = getattr(side, "schemes", {})
            expect(bool(schemes), "`schemes` is missing or empty")
            expect(isinstance(getattr(side, "rank", None), int), "`rank` is not an int")
            expect(isinstance(getattr(side, "races", None), bool), "`races` is not a bool")
        scheme = ready.url.partition("://")[0]
        expect(scheme in recipe.schemes, f"{ready.url} is not of its schemes {[*recipe.schemes]}")
        expect(isinstance(ready.near, Connection), "connect returned something else than a Connection")
        for stream in (ready.a, ready.b):
            expect(isinstance(stream, ByteStream), f"{stream!r} is not a ByteStream")
        expect(bool(ready.near.peer.transport), "peer.transport is empty")
        again = await recipe.connect(identity=link.identity)
        again.abort()


@_rule("what is sent arrives, all of it, in order, both ways.")
async def _echo(link: Link) -> None:
    async with link.open() as ready:
        for size in (1, 2, 1000, 65536, 3 * MIB):
            data = pattern(size)
            for sender, receiver in ((ready.a, ready.b), (ready.b, ready.a)):
                got = await transfer(sender, receiver, data)
                expect(got == data, f"of {size} bytes something else arrived ({len(got)} bytes)")


@_rule("receive gives at least one byte, at most `max_bytes`.")
async def _receive_size(link: Link) -> None:
    async with link.open() as ready:
        data = pattern(5000)
        sending = asyncio.create_task(ready.a.send(data))
        got = b""
        while len(got) < len(data):
            piece = await ready.b.receive(7)
            expect(bool(piece), "it gave b'' though the stream is open")
            expect(len(piece) <= 7, f"receive(7) gave {len(piece)} bytes")
            got += piece
        await sending
        expect(got == data, "the pieces do not make up what was sent")


@_rule("after send_eof the peer reads the end of the stream, and receiving goes on.")
async def _half_close(link: Link) -> None:
    async with link.open() as ready:
        await ready.a.send(b"question")
        await ready.a.send_eof()
        expect(await read_all(ready.b) == b"question", "what came before it was lost")
        await ready.b.send(b"answer")
        await ready.b.send_eof()
        expect(await read_all(ready.a) == b"answer", "the answer was lost")


@_rule("the end of the stream is for good: once receive gave b'' it always does.")
async def _end_is_final(link: Link) -> None:
    async with link.open() as ready:
        await ready.a.send(b"last words")
        closing = asyncio.create_task(ready.a.aclose())
        expect(await read_all(ready.b) == b"last words", "what was sent before aclose was lost")
        for _ in range(3):
            expect(await ready.b.receive() == b"", "data came after the end")
        await ready.far.aclose()
        await closing


@_rule("a peer that does not read holds the sender back, and gets everything once it reads.")
async def _backpressure(link: Link) -> None:
    async with link.open() as ready:
        chunk = pattern(65536)
        for sender, receiver in ((ready.a, ready.b), (ready.b, ready.a)):
            flood = Flood(sender, chunk, MOST_IN_FLIGHT)
            async with flood:
                await flood.stalled()
                expect(not flood.finished, f"the sender got rid of {flood.sent} bytes nobody read")
                flood.stop = True
                received = await count(receiver, chunk, flood)
                expect(received == flood.sent, f"{flood.sent} bytes sent, {received} arrived")


@_rule("one task may receive while another sends: both directions flow at the same time.")
async def _both_ways(link: Link) -> None:
    async with link.open() as ready:
        receiving = asyncio.create_task(ready.b.receive())
        await turns(5)
        await ready.b.send(b"x")
        expect(await ready.a.receive() == b"x", "something else arrived")
        await ready.a.send(b"y")
        expect(await receiving == b"y", "something else arrived")
        data = pattern(8 * MIB)
        got = await asyncio.gather(transfer(ready.a, ready.b, data), transfer(ready.b, ready.a, data))
        expect(got[0] == data and got[1] == data, "the bytes of the two directions got mixed up")


@_rule("a cancelled receive loses no bytes.")
async def _cancelled_receive(link: Link) -> None:
    async with link.open() as ready:
        expected, got = bytearray(), bytearray()
        for number in range(200):
            receiving = asyncio.create_task(ready.b.receive(number % 5 + 1))
            await turns(number % 3)
            word = b"%d," % number
            expected += word
            await ready.a.send(word)
            await turns(number % 7)
            receiving.cancel()
            try:
                got += await receiving
            except asyncio.CancelledError:
                pass
        while len(got) < len(expected):
            piece = await ready.b.receive()
            expect(bool(piece), f"only {len(got)} of {len(expected)} bytes arrived")
            got += piece
        expect(got == expected, "bytes were lost or came twice")


@_rule("after a cancelled send the stream is good for abort, and the peer learns of the end.")
async def _cancelled_send(link: Link) -> None:
    async with link.open() as ready:
        async with Flood(ready.a, pattern(65536), MOST_IN_FLIGHT) as flood:
            await flood.stalled()
        ready.a.abort()
        ready.near.abort()
        await drain(ready.b)
        await ready.far.aclose()


@_rule("closing ends a receive that waits.")
async def _close_during_receive(link: Link) -> None:
    for whole in (False, True):
        async with link.open() as ready:
            receiving = asyncio.create_task(end_of(ready.a))
            peer = asyncio.create_task(closes_at_end(ready.far, ready.b))
            await turns(5)
            await (ready.near.aclose() if whole else ready.a.aclose())
            await receiving
            await ready.near.aclose()
            await peer


@_rule("a peer that vanishes ends receive and send with Disconnected, and wait_closed returns.")
async def _peer_vanishes(link: Link) -> None:
    async with link.open() as ready:
        receiving = asyncio.create_task(end_of(ready.b))
        await turns(5)
        ready.near.abort()
        await receiving
        await send_until_broken(ready.b)
        ready.far.abort()
        await ready.far.wait_closed()


@_rule("abort ends a send that waits.")
async def _abort_during_send(link: Link) -> None:
    async with link.open() as ready:
        flood = Flood(ready.a, pattern(65536), MOST_IN_FLIGHT)
        async with flood:
            await flood.stalled()
            ready.near.abort()
            await flood.broken()


@_rule("aclose flushes: what was sent before it arrives, though the peer was still sending.")
async def _close_flushes(link: Link) -> None:
    async with link.open() as ready:
        data = pattern(200_000)
        await ready.b.send(b"x" * 1000)

        async def send_and_close() -> None:
            await ready.a.send(data)
            await ready.near.aclose()

        closing = asyncio.create_task(send_and_close())
        got = await read_all(ready.b)
        expect(got == data, f"{len(got)} of {len(data)} bytes arrived")
        await ready.far.aclose()
        await closing


@_rule("aclose and abort are idempotent, in any order, and never raise.")
async def _idempotent(link: Link) -> None:
    for orders in (("aclose", "aclose", "abort"), ("abort", "abort", "aclose")):
        async with link.open() as ready:
            peer = asyncio.create_task(closes_at_end(ready.far, ready.b))
            for target in (ready.a, ready.near, ready.b, ready.far):
                for order in orders:
                    outcome = getattr(target, order)()
                    if outcome is not None:
                        await outcome
            await peer


@_rule("nothing can be sent or received after aclose on this side: that raises Disconnected.")
async def _closed_is_closed(link: Link) -> None:
    async with link.open() as ready:
        peer = asyncio.create_task(closes_at_end(ready.far, ready.b))
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
        await ready.a.send(pattern(1000))
        await ready.near.aclose()


@_rule("wait_closed returns a reason, and status then says closed.")
async def _wait_closed(link: Link) -> None:
    async with link.open() as ready:
        waiting = [asyncio.create_task(side.wait_closed()) for side in (ready.near, ready.far)]
        await turns(5)
        expect(not any(task.done() for task in waiting), "it returned while the connection was open")
        closing = asyncio.create_task(ready.near.aclose())
        await drain(ready.b)
        await ready.far.aclose()
        await closing
        for task, side in zip(waiting, (ready.near, ready.far), strict=True):
            expect(await task is not None, "wait_closed gave None")
            status = side.status()
            expect(status.state is State.CLOSED, f"status().state is {status.state}")
            expect(status.close_reason is not None, "status().close_reason is None")


@_rule("status counts what was received and sent.")
async def _status(link: Link) -> None:
    async with link.open() as ready:
        before = ready.far.status()
        expect(before.state is State.OPEN, f"an open connection's state is {before.state}")
        await transfer(ready.a, ready.b, pattern(100_000))
        after = ready.far.status()
        grown = after.bytes_received - before.bytes_received
        expect(grown >= 100_000, f"bytes_received grew by {grown} when 100000 came")
        expect(ready.near.status().bytes_sent >= 100_000, "bytes_sent does not count")
        expect(after.last_received >= before.last_received, "last_received went back")


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
        await stream.send(GREETING)
        await running.wait()
        ending = asyncio.create_task(closes_at_end(near, stream))
    expect(cancelled == [True], "the handler was not cancelled")
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
                await stream.send(GREETING)
                await closes_at_end(near, stream)


@_rule("a listener serves many connections at the same time.")
async def _many_connections(link: Link) -> None:
    together = asyncio.Barrier(20)

    async def handler(connection: Connection) -> None:
        stream = await connection.accept_stream()
        data = await read_exactly(stream, 2)
        await together.wait()
        await stream.send(data)
        await drain(stream)

    async def client(url: str, number: int) -> None:
        near = await link.dial(url)
        try:
            stream = await near.open_stream()
            await stream.send(b"%02d" % number)
            expect(await read_exactly(stream, 2) == b"%02d" % number, "answers got mixed up")
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
        expect(bool(error.fix), f"its `fix` is empty: {error}")
        return
    connection.abort()
    raise ContractBroken("it connected to a listener that was closed")


@_rule("a cancelled connect leaves nothing behind.")
async def _cancelled_connect(link: Link) -> None:
    async def handler(connection: Connection) -> None:
        await connection.wait_closed()

    async with link.listen.listen(handler) as url:
        for number in range(12):
            connecting = asyncio.create_task(link.dial(url))
            await turns(number)
            connecting.cancel()
            try:
                (await connecting).abort()
            except asyncio.CancelledError:
                pass


transport_checks += multistream_checks
