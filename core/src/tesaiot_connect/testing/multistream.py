"""The part of the conformance kit about several streams, early data, the path and the figures.

Owns: the checks of a transport whose connections are `multistream`, and of what only some
transports can do. Rule: a transport that says it cannot (`multistream` false, Unsupported) is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from ..errors import Disconnected, Unsupported
from ..protocols import ByteStream, Connection, QuicState, State
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
    expect,
    pattern,
    read_all,
    read_exactly,
    rule,
    transfer,
    turns,
)

multistream_checks: list[TransportCheck] = []
_rule = functools.partial(rule, multistream_checks)

_STREAMS = 8
_IN_SEQUENCE = 500
_MOST_LEFT = 50  # of those, so many may be about to end


@asynccontextmanager
async def _many(link: Link) -> AsyncIterator[Link]:
    async with link.open() as ready:
        if not ready.near.multistream:
            raise Unsupported("it has one stream")
        expect(ready.far.multistream, "`multistream` is true on the dialling side only")
        yield ready


async def _pair(ready: Link) -> tuple[ByteStream, ByteStream]:
    """A further stream, both ends of it."""
    near = await ready.near.open_stream()
    await near.send(GREETING)
    far = await ready.far.accept_stream()
    expect(await read_exactly(far, len(GREETING)) == GREETING, "it did not bring what was sent on it")
    return near, far


async def _goes_on(pairs: Sequence[tuple[ByteStream, ByteStream]]) -> None:
    """A few bytes, there and back, again and again."""
    for number in range(20):
        for near, far in pairs:
            for sender, receiver in ((near, far), (far, near)):
                word = b"%d of 20 words on a stream that has nothing to do with it" % number
                await sender.send(word)
                expect(await read_exactly(receiver, len(word)) == word, "a sibling lost its bytes")


async def _breaks(stream: ByteStream) -> None:
    """It must not look like an end of the stream: the receiver would take what it has for all."""
    try:
        while await stream.receive():
            pass
    except Disconnected:
        return
    raise ContractBroken("the peer read an orderly end")


async def _piecewise(stream: ByteStream, data: bytes) -> None:
    for begin in range(0, len(data), 8000):
        await stream.send(data[begin : begin + 8000])
        await asyncio.sleep(0)  # the next stream's turn


@_rule("further streams carry data both ways, many at once, each in its own order.")
async def _many_streams(link: Link) -> None:
    async with _many(link) as ready:
        pairs = [(ready.a, ready.b), *[await _pair(ready) for _ in range(_STREAMS - 1)]]
        everything = pattern(MIB)
        sending, arriving = [], []
        for number, ends in enumerate(pairs):
            for way in (0, 1):
                data = everything[2 * number + way :][: 256 * 1024]  # no two are the same
                sending.append(asyncio.create_task(_piecewise(ends[way], data)))
                reading = asyncio.create_task(read_exactly(ends[1 - way], len(data)))
                arriving.append((number, data, reading))
        tasks = [*sending, *(reading for _, _, reading in arriving)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        for number, data, reading in arriving:
            expect(reading.result() == data, f"on stream {number} something else arrived than was sent")


@_rule("accept_stream gives streams in the order they were opened in, whichever brings bytes first.")
async def _stream_order(link: Link) -> None:
    async with _many(link) as ready:
        opened = [await ready.near.open_stream() for _ in range(4)]
        for number in reversed(range(4)):
            await opened[number].send(b"%d" % number)
            await turns(50)
        for number in range(4):
            stream = await ready.far.accept_stream()
            expect(await read_exactly(stream, 1) == b"%d" % number, f"stream {number} was not the next")


@_rule("a stream that nobody reads holds back its own sender, and no other stream.")
async def _unread_stream(link: Link) -> None:
    async with _many(link) as ready:
        chunk = pattern(16384)
        sibling = await _pair(ready)
        near, far = await _pair(ready)
        for sender, receiver in ((near, far), (far, near)):
            flood = Flood(sender, chunk, MOST_IN_FLIGHT)
            async with flood:
                await flood.stalled()
                expect(not flood.finished, f"the sender got rid of {flood.sent} bytes nobody read")
                await _goes_on([(ready.a, ready.b), sibling, await _pair(ready)])
                flood.stop = True
                received = await count(receiver, chunk, flood)
                expect(received == flood.sent, f"{flood.sent} bytes sent, {received} arrived")


@_rule("what is on its way to a peer that reads no stream is bounded for all streams together.")
async def _unread_streams(link: Link) -> None:
    async with _many(link) as ready:
        pairs = [await _pair(ready) for _ in range(_STREAMS)]
        async with AsyncExitStack() as stack:
            floods = [Flood(near, pattern(65536), MOST_IN_FLIGHT) for near, _ in pairs]
            for flood in floods:
                await stack.enter_async_context(flood)
            await asyncio.gather(*(flood.stalled() for flood in floods))
            sent = sum(flood.sent for flood in floods)
            expect(sent < MOST_IN_FLIGHT, f"the senders got rid of {sent} bytes nobody read")
        for near, _ in pairs:
            near.abort()


@_rule("abort of one stream is Disconnected for the peer's reader of it, and its siblings go on.")
async def _abort_stream(link: Link) -> None:
    async with _many(link) as ready:
        sibling = await _pair(ready)
        for side in (0, 1):
            for waiting in (False, True):
                ends = await _pair(ready)
                await ends[side].send(b"never finished")
                if not waiting:
                    ends[side].abort(7)
                reading = asyncio.create_task(_breaks(ends[1 - side]))
                await turns(5)
                ends[side].abort(7)
                await reading
                await _goes_on([(ready.a, ready.b), sibling])
        for connection in (ready.near, ready.far):
            state = connection.status().state
            expect(state is State.OPEN, f"the connection's state is {state}")


@_rule("abort of one stream ends what waits on it, on both sides: receive and send raise Disconnected.")
async def _abort_wakes(link: Link) -> None:
    async with _many(link) as ready:
        for aborting, sending in ((0, 0), (0, 1), (1, 0), (1, 1)):
            ends = await _pair(ready)
            reading = asyncio.create_task(_breaks(ends[sending]))
            async with Flood(ends[sending], pattern(65536), MOST_IN_FLIGHT) as flood:
                await flood.stalled()
                ends[aborting].abort(7)
                await flood.broken()
                await reading
            await _goes_on([(ready.a, ready.b)])
            ends[1 - aborting].abort()


@_rule("the end of one stream leaves the others and the connection as they are.")
async def _end_of_one(link: Link) -> None:
    async with _many(link) as ready:
        sibling = await _pair(ready)
        for closing in (False, True):
            near, far = await _pair(ready)
            await near.send(b"question")
            ended = asyncio.create_task(near.aclose() if closing else near.send_eof())
            expect(await read_all(far) == b"question", "what came before the end was lost")
            await _goes_on([(ready.a, ready.b), sibling])
            if not closing:
                await far.send(b"answer")
            await far.aclose()
            if not closing:
                expect(await read_all(near) == b"answer", "the answer was lost")
            await ended
            await near.aclose()
            await _goes_on([(ready.a, ready.b), sibling])
        for connection in (ready.near, ready.far):
            state = connection.status().state
            expect(state is State.OPEN, f"the connection's state is {state}")


@_rule("accept_stream waits for a stream; when it is cancelled, no stream is lost.")
async def _cancelled_accept(link: Link) -> None:
    async with _many(link) as ready:
        numbers: list[bytes] = []
        opened = []
        for number in range(40):
            accepting = asyncio.create_task(ready.far.accept_stream())
            await turns(number % 3)
            expect(not accepting.done(), "it gave a stream that nobody opened")
            near = await ready.near.open_stream()
            await near.send(b"%02d" % number)
            await turns(number * (1 + number // 10))
            accepting.cancel()
            try:
                opened.append((near, await accepting))
            except asyncio.CancelledError:
                opened.append((near, await ready.far.accept_stream()))
            numbers.append(await read_exactly(opened[-1][1], 2))
            for end in opened.pop():
                end.abort()
        expect(numbers == [b"%02d" % number for number in range(40)], f"it gave the streams {numbers}")


@_rule("accept_stream raises Disconnected when the connection ends, on either side of it.")
async def _accept_ends(link: Link) -> None:
    for closing in (True, False):
        async with _many(link) as ready:
            sides = (ready.near, ready.far)
            accepting = [asyncio.create_task(side.accept_stream()) for side in sides]
            peer = asyncio.create_task(closes_at_end(ready.far, ready.b))
            try:
                await turns(5)
                expect(not any(task.done() for task in accepting), "it returned while nothing was opened")
                if closing:
                    await ready.near.aclose()
                else:
                    ready.near.abort()
                await peer
                for task, side in zip(accepting, sides, strict=True):
                    for waiting in (task, side.accept_stream()):
                        try:
                            await waiting
                        except Disconnected:
                            continue
                        raise ContractBroken("it gave a stream")
            finally:
                for task in (*accepting, peer):
                    task.cancel()
                await asyncio.gather(*accepting, peer, return_exceptions=True)


@_rule("open_stream raises Disconnected once the connection has ended, on either side of it.")
async def _open_after_end(link: Link) -> None:
    async with _many(link) as ready:
        peer = asyncio.create_task(closes_at_end(ready.far, ready.b))
        await ready.near.aclose()
        await peer
        await asyncio.gather(ready.near.wait_closed(), ready.far.wait_closed())
        for side in (ready.near, ready.far):
            try:
                await side.open_stream()
            except Disconnected:
                continue
            raise ContractBroken("it gave a stream")


@_rule("streams that ended are forgotten: hundreds, one after the other, leave nothing behind.")
async def _many_in_sequence(link: Link) -> None:
    async with _many(link) as ready:
        alive: weakref.WeakSet[ByteStream] = weakref.WeakSet()
        for number in range(_IN_SEQUENCE):
            word = b"%d, and no more" % number
            near = await ready.near.open_stream()
            await near.send(word)
            if number % 5:
                await near.send_eof()
            far = await ready.far.accept_stream()
            alive.update((near, far))
            expect(await read_exactly(far, len(word)) == word, f"stream {number} brought something else")
            if number % 5:
                expect(await read_all(far) == b"", "something came after the end")
                await far.send(word)
                await far.aclose()
                expect(await read_all(near) == word, f"the answer on stream {number} was lost")
                await near.aclose()
            else:
                near.abort()
                await drain(far)
                far.abort()
        del near, far
        await _goes_on([(ready.a, ready.b)])
        gc.collect()
        left = len(alive)
        expect(left <= _MOST_LEFT, f"of {2 * _IN_SEQUENCE} ends of streams {left} are still held")
        for side in (ready.near, ready.far):
            quic = side.status().quic
            still = quic.streams_open if quic is not None else 0
            expect(still <= _MOST_LEFT, f"status().quic.streams_open is {still}")


@_rule("`early_sent` tells the truth: then, and only then, the first stream begins with `early`.")
async def _early(link: Link) -> None:
    early, late = b"this may come early, ", b"and this is late."

    async def handler(connection: Connection) -> None:
        stream = await connection.accept_stream()
        got = b""
        while not got.endswith(late):
            piece = await stream.receive()
            expect(bool(piece), f"the stream ended after {got!r}")
            got += piece
        await stream.send(got + b".")

    async with link.listen.listen(handler) as url:
        recipe = link.connect(url)
        for attempt in range(3):  # the first is never early where a ticket is needed; the others may be
            near = await (recipe if attempt < 2 else link.connect(url)).connect(
                identity=link.identity, early=early
            )
            try:
                stream = await near.open_stream()
                await stream.send(late)
                expected = (early + late if near.early_sent else late) + b"."
                got = b""
                with contextlib.suppress(Disconnected):
                    while len(got) < len(expected) and (piece := await stream.receive()):
                        got += piece
                expect(got == expected, f"early_sent was {near.early_sent}, and the peer had read {got!r}")
            finally:
                await near.aclose()


@_rule("set_keepalive takes any number of seconds, 0 included, and data flows on.")
async def _keepalive(link: Link) -> None:
    async with link.open() as ready:
        for seconds in (5, 0, 60):
            for side in (ready.near, ready.far):
                side.set_keepalive(seconds)
            await _goes_on([(ready.a, ready.b)])


@_rule("probe returns while the path is alive, and raises Disconnected once it has ended.")
async def _probe(link: Link) -> None:
    async with link.open() as ready:
        for side in (ready.near, ready.far, ready.near):
            await side.probe()
        await _goes_on([(ready.a, ready.b)])
        peer = asyncio.create_task(closes_at_end(ready.far, ready.b))
        await ready.near.aclose()
        await peer
        try:
            await ready.near.probe()
        except Disconnected:
            return
        raise ContractBroken("it returned though the connection was closed")


@_rule("migrate moves the connection: nothing is lost, streams go on, status counts it.")
async def _migrate(link: Link) -> None:
    async with link.open() as ready:
        before = ready.near.status().migrations
        data = pattern(2 * MIB)
        flowing = asyncio.gather(transfer(ready.a, ready.b, data), transfer(ready.b, ready.a, data))
        try:
            for _ in range(3):
                await turns(20)
                await ready.near.migrate()
            expect(list(await flowing) == [data, data], "something else arrived than was sent")
        finally:
            flowing.cancel()
            await asyncio.gather(flowing, return_exceptions=True)
        await _goes_on([(ready.a, ready.b)])
        moved = ready.near.status().migrations - before
        expect(moved == 3, f"status().migrations grew by {moved} at three moves")
        if ready.near.multistream:
            await _goes_on([await _pair(ready)])


@_rule("where status has `quic`, its states go forward and end with CLOSED, and its figures make sense.")
async def _quic_status(link: Link) -> None:
    async with link.open() as ready:
        sides = (ready.near, ready.far)
        if any(side.status().quic is None for side in sides):
            raise Unsupported("status has no `quic`")
        await transfer(ready.a, ready.b, pattern(100_000))
        for side in sides:
            quic = side.status().quic
            expect(quic.state is QuicState.ONE_RTT, f"an open connection's state is {quic.state}")
            expect(quic.streams_open >= 1 <= quic.streams_total, "it counts no stream")
            for name in ("handshake_time", "rtt_smoothed", "rtt_min", "rtt_latest", "blocked_time"):
                value = getattr(quic, name)
                expect(value is None or 0 <= value < 60, f"{name} is {value}")
            for name in ("packets_sent", "packets_received", "congestion_window", "path_mtu"):
                value = getattr(quic, name)
                expect(value is None or value > 0, f"{name} is {value}")
        closing = asyncio.create_task(ready.near.aclose())
        await drain(ready.b)
        await ready.far.aclose()
        await closing
        order = list(QuicState)
        for side in sides:
            await side.wait_closed()
            quic = side.status().quic
            expect(quic.state is QuicState.CLOSED, f"a closed connection's state is {quic.state}")
            places = [order.index(state) for state, _ in quic.states]
            expect(
                places == sorted(set(places)), f"its states were {[state.value for state, _ in quic.states]}"
            )
            times = [since for _, since in quic.states]
            expect(times == sorted(times), "the times of its states go back")
