"""Clients that mean harm, against a broker in a process of its own.

What they cost is bounded, they are told what RFC 9110 and RFC 6455 say, and their neighbours notice nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed, settings, strategies as st
from websocket_peers import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    dialled,
    frame,
    read_close,
    read_frame,
    read_head,
    request,
)
from wss_served import CONNECTIONS, MIB, Neighbour, Served

from tesaiot_connect import Client, ClientOptions, Message, Negotiator, Url
from tesaiot_connect_wss import Wss

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00"  # 3.1.1, a clean session without a name
CONNACK = b"\x20\x02\x00\x00"


def subscribe(topic_filter: bytes) -> bytes:
    body = b"\x00\x01" + struct.pack(">H", len(topic_filter)) + topic_filter + b"\x00"
    return b"\x82" + bytes([len(body)]) + body


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("served"))
    try:
        yield found
    finally:
        found.stop()


def among_neighbours(
    served: Served, attack: Callable[[Neighbour], Coroutine[Any, Any, None]], most: int = 24 * MIB
) -> None:
    """Runs the attack while a client of the same listener works, and another comes afterwards."""

    async def main() -> None:
        async with asyncio.timeout(200), Neighbour(served.port) as neighbour:
            with served.bounded(most):
                await attack(neighbour)
            await neighbour.more()
            async with Neighbour(served.port):
                pass

    asyncio.run(main())
    served.check()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What else comes, until the end, orderly or not."""
    got = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            while data := await reader.read(65536):
                got += data
    return got


async def pour(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Sends it again and again, no faster than it is taken, until the other side has left."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            while True:
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(0)  # for the neighbour


@asynccontextmanager
async def logged_in(port: int) -> AsyncIterator[Streams]:
    """A client that MQTT knows, raw."""
    async with dialled(port) as (reader, writer):
        writer.write(frame(BINARY, CONNECT, mask=True))
        assert await read_frame(reader) == (BINARY, CONNACK)
        yield reader, writer


# --- the handshake ------------------------------------------------------------------------

KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
GET = b"GET /mqtt HTTP/1.1\r\nHost: localhost\r\n"

NO_UPGRADES: dict[str, bytes] = {
    "a huge header": request(more=f"X: {'x' * 100_000}\r\n"),
    "1000 headers": request(more="".join(f"X-{n}: y\r\n" for n in range(1000))),
    "a huge path": request("/" + "x" * 100_000),
    "a header without a colon": request(more="no colon here\r\n"),
    "a folded header": request(more="X: a\r\n b\r\n"),
    "a space before the colon": request(more="Content-Length : 5\r\n"),
    "NUL in a header": request(more="X: a\0b\r\n"),
    "CR in a header": request(more="X: a\rY: b\r\n"),
    "lines that end in LF": request().replace(b"\r\n", b"\n") + b"\r\n\r\n",
    "a body": request(more="Content-Length: 5\r\n") + b"hello",
    "a body of two lengths": request(more="Content-Length: 0\r\nContent-Length: 48\r\n") + request(),
    "a length with a sign": request(more="Content-Length: +0\r\n"),
    "a chunked body": request(more="Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n" + request(),
    "both": request(more="Content-Length: 4\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
    "chunked, disguised": request(more="Transfer-Encoding: \x0bchunked\r\n") + b"0\r\n\r\n" + request(),
    "two keys": request(more=KEY),
    "no key": request().replace(KEY.encode(), b""),
    "a key too long": request(key=b"A" * 24 + b"=="),
    "two versions": request(more="Sec-WebSocket-Version: 13\r\n"),
    "an absolute path": request("http://elsewhere/mqtt"),
    "a path that climbs": request("/mqtt/../mqtt"),
    "a path of other bytes": request().replace(b"/mqtt", b"/mq\xfft"),
    "CONNECT": request().replace(b"GET /mqtt", b"CONNECT localhost:22"),
    "a method of other bytes": request().replace(b"GET", b"GE\xffT"),
    "HTTP/0.9": b"GET /mqtt\r\n\r\n",
    "HTTP/9": request().replace(b"HTTP/1.1", b"HTTP/9.9"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/2 upgrade": GET
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
    "two requests": GET + b"\r\n" + request(),
    "MQTT": CONNECT,
    "zeros": bytes(50_000),
    "noise": random.Random(7).randbytes(50_000),
    "an empty line": b"\r\n\r\n",
    "nothing": b"",
}


def test_no_upgrades(served: Served) -> None:
    """Each gets one answer with an error status, or none, and its connection ends."""

    async def one(name: str) -> None:
        async with dialled(served.port, asked=NO_UPGRADES[name]) as (reader, writer):
            with contextlib.suppress(OSError):
                writer.write_eof()
            answer = await rest_of(reader)
        told = re.findall(rb"^HTTP/1\.1 (\d+) ", answer, re.MULTILINE)
        assert (name, len(told)) <= (name, 1)
        assert all(400 <= int(status) < 500 or status == b"505" for status in told), (name, told)
        assert told or not answer, name

    async def attack(_neighbour: Neighbour) -> None:
        await asyncio.gather(*map(one, NO_UPGRADES))

    among_neighbours(served, attack)


def test_heads_without_end(served: Served) -> None:
    """They are told at 16 KiB, and have a moment to hear it."""

    async def one(begin: bytes, more: bytes) -> None:
        async with dialled(served.port, asked=begin) as (reader, writer):
            head = asyncio.create_task(reader.readline())
            await pour(writer, more)
            with contextlib.suppress(ConnectionError):
                assert (await head).startswith(b"HTTP/1.1 431 ")

    async def attack(_neighbour: Neighbour) -> None:
        in_value, in_names = request()[:-2] + b"X: ", request()[:-2]
        await asyncio.gather(
            one(b"GET /", b"x" * 6000), one(in_value, b"x" * 6000), one(in_names, b"X: y\r\n" * 1000)
        )

    among_neighbours(served, attack)


def test_two_requests_in_one_go(served: Served) -> None:
    """What follows an upgrade is frames, whatever it looks like."""

    async def attack(_neighbour: Neighbour) -> None:
        async with dialled(served.port, asked=request() + request()) as (reader, writer):
            assert b" 101 " in await read_head(reader)
            assert (await read_close(reader))[0] == 1002
            writer.write_eof()
            assert b"HTTP" not in await rest_of(reader)

    among_neighbours(served, attack)


def test_tls_at_the_plain_port(served: Served) -> None:
    async def attack(_neighbour: Neighbour) -> None:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", served.port, ssl=ssl.create_default_context())

    among_neighbours(served, attack)


@pytest.mark.parametrize(
    "offer",
    [
        "permessage-deflate",
        "permessage-deflate; client_max_window_bits; server_max_window_bits=8",
        "permessage-deflate, " * 200 + "x-webkit-deflate-frame",
        ';;;,,="',
    ],
    ids=["plain", "windows", "many", "nonsense"],
)
def test_no_compression(served: Served, offer: str) -> None:
    async def attack(_neighbour: Neighbour) -> None:
        asked = request(more=f"Sec-WebSocket-Extensions: {offer}\r\n")
        async with dialled(served.port, asked=asked) as (reader, writer):
            head = await read_head(reader)
            if b" 101 " not in head:
                assert offer.startswith(";")
                return
            assert b"extensions" not in head.lower()
            bomb = frame(BINARY, b"\xec\xc1\x01\x01\x00\x00\x00\x80\x90\xfe\xaf\xee", mask=True, rsv=4)
            writer.write(bomb)
            assert (await read_close(reader))[0] == 1002

    among_neighbours(served, attack)


@pytest.mark.parametrize(
    "said", [b"", b"GET /mqtt HTTP/1.1\r\n", b"\x16\x03\x01"], ids=["nothing", "HTTP", "TLS"]
)
def test_a_byte_now_and_then(served: Served, said: bytes) -> None:
    """Each byte in time does not make the whole in time."""

    async def attack(_neighbour: Neighbour) -> None:
        async with dialled(served.hasty, asked=said) as (reader, writer):
            ended = asyncio.create_task(rest_of(reader))
            asking = itertools.chain(request()[len(said) : -2], itertools.repeat(b"x"[0]))  # it has no end
            while not ended.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(bytes([next(asking)]))
                await asyncio.wait([ended], timeout=0.02)
            assert b" 101 " not in await ended

    among_neighbours(served, attack)


def test_half_handshakes_beyond_all_connections(served: Served) -> None:
    async def attack(neighbour: Neighbour) -> None:
        async with contextlib.AsyncExitStack() as stack:
            readers = []
            for number in range(2 * CONNECTIONS):
                half = request()[: number % len(request())]
                reader, _ = await stack.enter_async_context(dialled(served.hasty, asked=half))
                readers.append(reader)
            async with Neighbour(served.port):
                await neighbour.more()
            assert b" 101 " not in b"".join(await asyncio.gather(*map(rest_of, readers)))

    among_neighbours(served, attack)


def test_upgrades_beyond_all_connections(served: Served) -> None:
    """Those who have come in stay; those beyond are sent away at once."""
    beyond = 50 + 1  # the neighbour is in

    async def attack(neighbour: Neighbour) -> None:
        async with contextlib.AsyncExitStack() as stack:
            readers = []
            for _ in range(CONNECTIONS + 50):
                reader, _ = await stack.enter_async_context(dialled(served.port))
                readers.append(reader)
            await neighbour.more()
            waiting = {asyncio.create_task(reader.read(100)) for reader in readers}
            gone: set[asyncio.Task[bytes]] = set()
            while len(gone) < beyond:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                gone |= done
            await neighbour.more()
            assert waiting
            assert all(isinstance(one.exception(), ConnectionError) or not one.result() for one in gone)
            for one in waiting:
                one.cancel()
            await asyncio.wait(waiting)

    among_neighbours(served, attack)


def test_who_says_nothing_is_sent_away(tmp_path: Path) -> None:
    served = Served(tmp_path, connect_timeout="300ms")
    try:

        async def main() -> None:
            async with asyncio.timeout(60), dialled(served.port) as (reader, _writer):
                await read_close(reader)

        asyncio.run(main())
        served.check()
    finally:
        served.stop()


# --- frames -------------------------------------------------------------------------------


def close_code(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason, mask=True)


def claim(opcode: int, size: int) -> bytes:
    """The head of a frame that says it is so large."""
    return bytes([0x80 | opcode, 0xFF]) + struct.pack(">Q", size) + b"mask"


INVALID_CODES = (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535)
VIOLATIONS: dict[str, tuple[bytes, int]] = {
    "3 MiB claimed": (claim(BINARY, 3 * MIB), 1009),
    "2^62 claimed": (claim(BINARY, 2**62), 1009),
    "2^63 claimed": (claim(BINARY, 2**63), 1009),
    "a ping of 2^40": (claim(PING, 2**40), 1009),
    "not masked": (frame(BINARY, CONNECT), 1002),
    "not masked, large": (frame(BINARY, bytes(100_000)), 1002),
    "a ping not masked": (frame(PING), 1002),
    "text": (frame(TEXT, b"text", mask=True), 1003),
    "text that is none": (frame(TEXT, b"\xff\xfe", mask=True), 1003),
    "a continuation of nothing": (frame(CONT, b"x", mask=True), 1002),
    "a message inside a message": (
        frame(BINARY, b"x", fin=False, mask=True) + frame(BINARY, b"y", mask=True),
        1002,
    ),
    "a close in two": (frame(CLOSE, b"", fin=False, mask=True), 1002),
    "a ping in two": (frame(PING, b"", fin=False, mask=True), 1002),
    "a large ping": (frame(PING, bytes(126), mask=True), 1002),
    "a close of one byte": (frame(CLOSE, b"\x03", mask=True), 1002),
    "a close with other bytes": (close_code(1000, b"\xff\xfe"), 1007),
    "a large close": (close_code(1000, bytes(124)), 1002),
    **{f"opcode {code}": (frame(code, b"x", mask=True), 1002) for code in (*range(3, 8), *range(11, 16))},
    **{f"RSV {rsv}": (frame(BINARY, b"x", mask=True, rsv=rsv), 1002) for rsv in (1, 2, 4, 7)},
    **{f"close code {code}": (close_code(code), 1002) for code in INVALID_CODES},
}  # fmt: skip


@pytest.mark.parametrize("when", ["at once", "logged in"])
def test_violations(served: Served, when: str) -> None:
    """Each is told its code, and what came after it is not looked at."""

    async def one(name: str) -> None:
        wrong, code = VIOLATIONS[name]
        async with (logged_in if when == "logged in" else dialled)(served.port) as (reader, writer):
            writer.write(wrong + frame(BINARY, b"after", mask=True))
            opcode, payload = await read_frame(reader)
            assert (name, opcode, int.from_bytes(payload[:2], "big")) == (name, CLOSE, code)
            payload[2:].decode()
            writer.write_eof()
            assert await rest_of(reader) == b""

    async def attack(_neighbour: Neighbour) -> None:
        await asyncio.gather(*map(one, VIOLATIONS))

    among_neighbours(served, attack)


def test_the_same_close_code_back(served: Served) -> None:
    async def one(code: int) -> None:
        async with logged_in(served.port) as (reader, writer):
            writer.write(close_code(code, b"why not"))
            assert (await read_close(reader))[0] == code
            assert await rest_of(reader) == b""

    async def attack(_neighbour: Neighbour) -> None:
        await asyncio.gather(*map(one, (1000, 1001, 1003, 1007, 1011, 1014, 3000, 4999)))

    among_neighbours(served, attack)


def test_a_message_in_pieces_without_end(served: Served) -> None:
    """Together they are bounded like one frame, however little is in each."""
    publish = b"\x30\x08\x00\x01tpiece"

    async def one(count: int) -> None:
        async with logged_in(served.port) as (reader, writer):
            writer.write(frame(BINARY, publish, fin=False, mask=True))
            told = asyncio.create_task(read_close(reader))
            await pour(writer, frame(CONT, publish * count, fin=False, mask=True) * (1 + 6000 // count))
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await told)[0] == 1009

    async def attack(_neighbour: Neighbour) -> None:
        await asyncio.gather(one(6000), one(50))

    among_neighbours(served, attack)


async def told_while_pouring(port: int, begin: bytes, more: bytes) -> bytes:
    """The last that a client hears which sends `more` without end: also what came before a reset."""
    loop = asyncio.get_running_loop()

    async def hear() -> bytes:
        got = b""
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(sock, 65536):
                got = (got + data)[-65536:]
        return got

    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.setblocking(False)
        await loop.sock_sendall(sock, request() + frame(BINARY, CONNECT, mask=True) + begin)
        hearing = asyncio.create_task(hear())
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(60):
                while not hearing.done():
                    await loop.sock_sendall(sock, more)
                    await asyncio.sleep(0)  # for the neighbour
        return await hearing


def test_who_keeps_the_listener_busy(served: Served) -> None:
    """No limit on sizes ends these; that others have to wait for them does."""

    async def one(small: bytes) -> None:
        begin = frame(BINARY, b"", fin=False, mask=True)
        policy = (1008).to_bytes(2, "big")
        assert policy in (await told_while_pouring(served.port, begin, small * 10_000))[-200:]

    async def attack(_neighbour: Neighbour) -> None:
        await asyncio.gather(
            one(frame(CONT, b"", fin=False, mask=True)),
            one(frame(CONT, b"x", fin=False, mask=True)),
            one(frame(PING, mask=True)),
        )

    among_neighbours(served, attack)


def test_answers_without_a_mask(served: Served) -> None:
    """What RFC 6455 section 5.1 forbids, and paho-mqtt does: its pongs and close frames are understood."""

    async def attack(_neighbour: Neighbour) -> None:
        asked = request() + frame(BINARY, CONNECT, mask=True)
        async with dialled(served.curious, asked=asked) as (reader, writer):
            await read_head(reader)
            for number in range(3):
                opcode, payload = await read_frame(reader)
                while opcode == BINARY:  # CONNACK
                    opcode, payload = await read_frame(reader)
                assert (opcode, number) == (PING, number)
                pong = frame(PONG, payload)
                writer.write(pong[: number + 1])
                await asyncio.sleep(0)
                writer.write(pong[number + 1 :])
            writer.write(frame(BINARY, b"\xc0\x00", mask=True))
            while (received := await read_frame(reader))[0] == PING:
                pass
            assert received == (BINARY, b"\xd0\x00")
            writer.write(frame(CLOSE, (1000).to_bytes(2, "big")))
            assert (await read_close(reader))[0] == 1000

    among_neighbours(served, attack)


def test_empty_fragments(served: Served) -> None:
    """They are legal, and cost nothing but time."""

    async def attack(_neighbour: Neighbour) -> None:
        async with logged_in(served.port) as (reader, writer):
            for _ in range(20):
                empty = frame(CONT, b"", fin=False, mask=True)
                writer.write(frame(BINARY, b"", fin=False, mask=True) + empty * 500)
                writer.write(frame(CONT, b"\xc0\x00", mask=True))
                assert await read_frame(reader) == (BINARY, b"\xd0\x00")

    among_neighbours(served, attack)


def test_pings_without_end(served: Served) -> None:
    """Who reads the answers gets them; who does not is cut off."""

    pings = frame(PING, b"p" * 125, mask=True) * 500

    async def attack(neighbour: Neighbour) -> None:
        async with logged_in(served.port) as (reader, writer):
            for _ in range(30):
                writer.write(pings)
                for _ in range(500):
                    assert await read_frame(reader) == (PONG, b"p" * 125)
            await neighbour.more()
        async with logged_in(served.port) as (reader, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await pour(writer, pings)

    among_neighbours(served, attack)


def test_who_never_reads_is_not_waited_for(served: Served) -> None:
    count, payload = 600, bytes(100_000)

    async def attack(neighbour: Neighbour) -> None:
        url = Url("ws", "127.0.0.1", served.port, "/mqtt")
        async with (
            logged_in(served.port) as (reader, writer),
            Client(Negotiator([Wss(url)]), ClientOptions()) as client,
        ):
            writer.write(frame(BINARY, subscribe(b"flood"), mask=True))
            await read_frame(reader)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(0, count, 20):
                await client.publish(
                    [Message("flood", payload, qos=0)] * 19 + [Message("flood", payload, qos=1)]
                )
            await neighbour.more()

    among_neighbours(served, attack)


def test_whoever_is_silent_is_asked(served: Served) -> None:
    """Half a connection: its socket is there, and nobody behind it answers pings."""

    async def attack(_neighbour: Neighbour) -> None:
        asked = request() + frame(BINARY, CONNECT, mask=True)
        async with dialled(served.impatient, asked=asked) as (reader, _writer):
            await read_head(reader)
            frames = sorted([await read_frame(reader), await read_frame(reader)])
            assert [frames[0], frames[1][0]] == [(BINARY, CONNACK), PING]
            await rest_of(reader)

    among_neighbours(served, attack)


@pytest.mark.parametrize("how", ["shutdown", "reset"])
def test_gone_in_the_middle(served: Served, how: str) -> None:
    """Half closed, or reset, at any byte of a dialogue."""
    dialogue = request() + frame(BINARY, CONNECT, mask=True) + frame(BINARY, subscribe(b"#"), mask=True)

    async def one(at: int) -> None:
        async with dialled(served.port, asked=dialogue[:at]) as (reader, writer):
            if how == "shutdown":
                writer.write_eof()
                await rest_of(reader)
            else:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    async def attack(_neighbour: Neighbour) -> None:
        cuts = range(0, len(dialogue), 3)
        for begin in range(0, len(cuts), 40):
            await asyncio.gather(*map(one, cuts[begin : begin + 40]))

    among_neighbours(served, attack)


# --- anything -----------------------------------------------------------------------------

DIALOGUE = (
    request(),
    frame(BINARY, CONNECT, mask=True),
    frame(PING, b"there?", mask=True),
    frame(BINARY, subscribe(b"own/#")[:5], fin=False, mask=True),
    frame(CONT, subscribe(b"own/#")[5:], mask=True),
    frame(BINARY, b"\x30\x09\x00\x05own/tpp" * 30, mask=True),
    frame(BINARY, b"\xc0\x00", mask=True),
    frame(BINARY, b"\xe0\x00", mask=True),
    close_code(1000, b"bye"),
)

mutations = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "cut", "insert", "repeat", "swap")),
        st.integers(0, 2**16),
        st.integers(0, 255),
        st.binary(max_size=12),
    ),
    min_size=1,
    max_size=5,
)


def mutated(parts: tuple[bytes, ...], changes: list[tuple[str, int, int, bytes]]) -> list[bytes]:
    """A dialogue with something wrong about it."""
    out = [bytearray(part) for part in parts]
    for kind, where, value, extra in changes:
        part = out[where % len(out)]
        at = (where * 31 + value) % (len(part) + 1)
        if kind == "flip" and part:
            part[at % len(part)] ^= 1 << value % 8
        elif kind == "set" and part:
            part[at % len(part)] = value
        elif kind == "cut":
            del part[at : at + 1 + value % 20]
        elif kind == "insert":
            part[at:at] = extra
        elif kind == "repeat":
            part[at:at] = part[at:] * (1 + value % 3)
        else:
            out.append(out.pop(where % len(out)))
    return [bytes(part) for part in out]


def test_mutated_dialogues(served: Served) -> None:
    """Whatever is sent, the connection comes to an end when the client ends its side."""
    connect = ("127.0.0.1", served.port)

    @seed(8085)
    @settings(max_examples=300, deadline=None, database=None)
    @given(mutations, st.booleans())
    def attack(changes: list[tuple[str, int, int, bytes]], at_once: bool) -> None:
        parts = mutated(DIALOGUE, changes)
        with socket.create_connection(connect, timeout=20) as peer:
            with contextlib.suppress(ConnectionError):
                for part in [b"".join(parts)] if at_once else parts:
                    peer.sendall(part)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass

    async def attacking(_neighbour: Neighbour) -> None:
        await asyncio.to_thread(attack)

    among_neighbours(served, attacking)
