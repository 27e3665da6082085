"""Servers that mean harm, or know no better: a client ends with words, soon, and with bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tracemalloc
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given, seed, settings, strategies as st
from websocket_peers import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    TEXT,
    Serve,
    accepted,
    frame,
    read_head,
    server,
    upgrading,
)

from tesaiot_connect import ConnectFailed, Disconnected, Duration, Size, Url
from tesaiot_connect_wss import Wss

MIB = 1024 * 1024


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Nothing of the client may reach asyncio's last resort."""

    async def bounded() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(str(context)))
        async with asyncio.timeout(60):
            return await main

    lost: list[str] = []
    found = asyncio.run(bounded())
    # Python 3.11 complains of servers that are stopped while they serve
    assert not [one for one in lost if "StreamReaderProtocol" not in one]
    return found


def ws(port: int, **options: Any) -> Wss:
    return Wss(Url("ws", "127.0.0.1", port, "/mqtt"), **options)


def endless(head: bytes, more: bytes) -> Serve:
    """Answers with `head`, and then `more` without end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await read_head(reader)
        writer.write(head or accepted(asked))
        while True:
            writer.write(more)
            await writer.drain()
            await asyncio.sleep(0)

    return serve


@contextlib.contextmanager
def bounded(most: int) -> Iterator[None]:
    """So many bytes are held at most, at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


async def fails(recipe: Wss) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as failed:
        await recipe.connect()
    assert failed.value.fix
    return failed.value


async def ends(recipe: Wss) -> Disconnected:
    """Connects, reads what there is, and gives the words of the end."""
    connection = await recipe.connect()
    stream = await connection.open_stream()
    with pytest.raises(Disconnected) as ended:
        while await stream.receive():
            pass
    await connection.wait_closed()
    await connection.aclose()
    assert ended.value.fix
    return ended.value


@pytest.mark.parametrize(
    ("head", "more", "word"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\n", b"X: y\r\n" * 100, "too large"),
        (b"HTTP/1.1 101 Switching Protocols\r\nX: ", b"x" * 1000, "too large"),
        (b"HTTP/1.1 ", b"1" * 1000, "too large"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"<p>" * 1000, "no end"),
        (b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 500, "no end"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 1000, "too large"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, "100 Continue"),
        (frame(BINARY, b"early"), frame(BINARY, b"and more"), "not with HTTP"),
        (b"\x16\x03\x03\x00\x7a", b"\x02" * 1000, "not with HTTP"),
        (b"\r\n", b"\r\n" * 1000, "not with HTTP"),
    ],
    ids=lambda value: value[9:12].decode(errors="replace") if isinstance(value, bytes) else value,
)
def test_answers_without_end(head: bytes, more: bytes, word: str) -> None:
    async def main() -> None:
        async with server(endless(head, more)) as port:
            with bounded(4 * MIB):
                assert word in (await fails(ws(port))).what

    run(main())


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 101 Switching Protocols\r\n", b"HTTP/1.1 404 Not Found\r\n\r\n"]
)
def test_a_byte_now_and_then(head: bytes) -> None:
    """The time for the whole is bounded, however promptly each byte comes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(head)
        leaving = asyncio.create_task(reader.read())
        while not leaving.done():
            writer.write(b"X")
            await asyncio.wait([leaving], timeout=0.01)

    async def main() -> None:
        async with server(serve) as port:
            error = await fails(ws(port, connect_timeout=Duration(0.3 if head else 60)))
            assert "not with HTTP" in error.what if not head else "0.3 s" in error.what

    run(main())


def test_a_101_with_something_wrong() -> None:
    wrong: dict[str, tuple[bytes, bytes]] = {
        "no Upgrade": (b"Upgrade: websocket\r\n", b""),
        "another Upgrade": (b"Upgrade: websocket", b"Upgrade: h2c"),
        "no Connection": (b"Connection: Upgrade\r\n", b""),
        "a second Accept": (b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept: x\r\nSec-WebSocket-Accept: "),
        "Accept of another": (b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept: A"),
        "no Accept": (b"Sec-WebSocket-Accept: ", b"X-Accept: "),
        "compression": (b"Upgrade: w", b"Sec-WebSocket-Extensions: permessage-deflate\r\nUpgrade: w"),
        "two subprotocols": (b"Protocol: mqtt", b"Protocol: mqtt, mqttv3.1"),
        "another subprotocol": (b"Protocol: mqtt", b"Protocol: amqp"),
        "HTTP/1.0": (b"HTTP/1.1", b"HTTP/1.0"),
        "HTTP/2": (b"HTTP/1.1", b"HTTP/2"),
        "NUL": (b"Upgrade: w", b"X: \0\r\nUpgrade: w"),
        "a folded header": (b"Upgrade: w", b"X: a\r\n b\r\nUpgrade: w"),
        "no status": (b"101 Switching", b"Switching"),
    }

    async def main() -> None:
        for name, (right, instead) in wrong.items():

            async def serve(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                right: bytes = right,
                instead: bytes = instead,
            ) -> None:
                answer = accepted(await read_head(reader))
                assert right in answer
                writer.write(answer.replace(right, instead) + frame(BINARY, b"already"))
                await reader.read()

            async with server(serve) as port:
                with pytest.raises(ConnectFailed) as failed:
                    await ws(port).connect()
                assert failed.value.fix, name

    run(main())


def test_a_loop_of_redirects() -> None:
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        _, path, _ = (await read_head(reader)).split(b" ", 2)
        location = b"/b" if path == b"/mqtt" else b"/mqtt"
        writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n")

    async def main() -> None:
        async with server(serve) as port:
            assert "redirects to /b (302), which is not followed" in (await fails(ws(port))).what
        assert asked == 1

    run(main())


def test_gone_at_every_byte_of_the_answer() -> None:
    async def main() -> None:
        cut, whole = 0, 1000

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal whole
            answer = accepted(await read_head(reader))
            whole = len(answer)
            writer.write(answer[:cut])
            if cut % 2:
                writer.transport.abort()

        async with server(serve) as port:
            while cut < whole:
                with pytest.raises(ConnectFailed) as failed:
                    await ws(port).connect()
                assert str(port) in failed.value.what
                assert failed.value.fix
                cut += 1

    run(main())


WRONG = (
    (frame(BINARY, bytes(500), fin=False) + frame(CONT, bytes(500), fin=False) * 20, "broke"),
    (frame(CONT, bytes(500), fin=False), "broke"),
    (b"\x82\x7f\x7f" + b"\xff" * 7, "max_message_size"),
    (b"\x82\x7f\xff" + b"\xff" * 7, "max_message_size"),
    (b"\x02\x00" + frame(CONT, b"", fin=False) * 5000, "broke"),
    (frame(BINARY, b"x", mask=True), "broke"),
    (frame(TEXT, b"text"), "binary"),
    (frame(BINARY, b"x", rsv=4), "broke"),
    (frame(PING, bytes(126)), "broke"),
    (frame(PING) * 5000, "pings"),
    (frame(CLOSE, b"\x03"), "broke"),
    (frame(CLOSE, (1006).to_bytes(2, "big")), "broke"),
    (frame(CLOSE, (1000).to_bytes(2, "big") + b"\xff\xff"), "broke"),
)


def test_frames_that_must_not_be() -> None:
    async def one(more: bytes, word: str) -> None:
        async with server(endless(b"", more)) as port:
            error = await ends(ws(port, max_message_size=Size(100_000)))
            assert (more[:20], word in error.what) == (more[:20], True), error.what

    async def main() -> None:
        await asyncio.gather(*(one(*wrong) for wrong in WRONG))

    with bounded(40 * MIB):
        run(main())


def test_one_message_without_end() -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(BINARY, b"", fin=False))
        while True:
            writer.write(frame(CONT, bytes(5000), fin=False))
            await writer.drain()
            await asyncio.sleep(0)

    async def main() -> None:
        async with server(upgrading(serve)) as port:
            with bounded(4 * MIB):
                error = await ends(ws(port, max_message_size=Size(100_000)))
            assert "max_message_size" in error.what

    run(main())


# --- anything -----------------------------------------------------------------------------

FRAMES = (
    frame(BINARY, b"\x20\x02\x00\x00"),
    frame(PING, b"there?"),
    frame(BINARY, b"\x30\x05\x00\x01", fin=False),
    frame(CONT, b"tpp"),
    frame(BINARY, bytes(300)),
    frame(CLOSE, (1001).to_bytes(2, "big") + b"bye"),
)


def test_mutated_answers(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes, what a client raises is an error of ours."""

    async def one(changes: list[tuple[int, bytes, int]], size: int) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = bytearray(accepted(await read_head(reader)) + b"".join(FRAMES))
            for at, instead, gone in changes:
                at %= len(data) + 1
                data[at : at + gone] = instead
            for begin in range(0, len(data), size):
                writer.write(data[begin : begin + size])
                await asyncio.sleep(0)
            writer.write_eof()
            await reader.read()

        async with server(serve) as port:
            try:
                connection = await ws(port, max_message_size=Size(1000)).connect()
            except ConnectFailed:
                return
            with contextlib.suppress(Disconnected):
                stream = await connection.open_stream()
                while await stream.receive():
                    pass
            assert (await connection.wait_closed()).text
            await connection.aclose()

    @seed(8085)
    @settings(max_examples=200, deadline=None, database=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 600), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4
        ),
        st.sampled_from((1, 50, 10_000)),
    )
    def attack(changes: list[tuple[int, bytes, int]], size: int) -> None:
        run(one(changes, size))

    with caplog.at_level(logging.INFO):
        attack()
    known = "did not choose the subprotocol"
    assert not [one for one in caplog.records if known not in one.getMessage()]
