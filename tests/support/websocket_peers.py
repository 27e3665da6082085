"""The other sides of a WebSocket, bare: frames by hand, an HTTP server with one answer, two small proxies."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = False, rsv: int = 0) -> bytes:
    size, masked = len(payload), 0x80 if mask else 0
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    if size < 126:
        head += bytes([masked | size])
    elif size < 65536:
        head += bytes([masked | 126]) + struct.pack(">H", size)
    else:
        head += bytes([masked | 127]) + struct.pack(">Q", size)
    if not mask:
        return head + payload
    key = os.urandom(4)
    return head + key + bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))


def request(
    path: str = "/mqtt",
    *,
    protocol: str | None = "mqtt",
    key: bytes = b"dGhlIHNhbXBsZSBub25jZQ==",
    more: str = "",
) -> bytes:
    offered = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol is not None else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key.decode()}\r\nSec-WebSocket-Version: 13\r\n{offered}{more}\r\n"
    ).encode()


def accepted(asked: bytes, *, protocol: str | None = "mqtt") -> bytes:
    (key,) = (
        line.split(b": ", 1)[1]
        for line in asked.split(b"\r\n")
        if line.lower().startswith(b"sec-websocket-key:")
    )
    answer = base64.b64encode(hashlib.sha1(key + GUID, usedforsecurity=False).digest()).decode()
    chosen = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol is not None else ""
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {answer}\r\n{chosen}\r\n"
    ).encode()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Opcode and payload, unmasked."""
    first, second = await reader.readexactly(2)
    size = second & 0x7F
    if size == 126:
        (size,) = struct.unpack(">H", await reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack(">Q", await reader.readexactly(8))
    key = await reader.readexactly(4) if second & 0x80 else bytes(4)
    payload = await reader.readexactly(size)
    return first & 0x0F, bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))


async def read_close(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Code and reason of the close frame, past everything before it."""
    while True:
        opcode, payload = await read_frame(reader)
        if opcode == CLOSE:
            return int.from_bytes(payload[:2], "big"), payload[2:].decode()


@asynccontextmanager
async def server(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A TCP server; gives its port. Connections and their tasks end when it does."""
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        writers.append(writer)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:  # the server ends; Python 3.11 would complain
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(one, host, 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(Exception):
                await writer.wait_closed()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def answering(answer: bytes) -> Serve:
    """An HTTP server that knows one answer, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(answer)
        await writer.drain()

    return serve


def upgrading(then: Serve, *, protocol: str | None = "mqtt") -> Serve:
    """A WebSocket server; `then` goes on with frames."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(accepted(await read_head(reader), protocol=protocol))
        await then(reader, writer)

    return serve


@asynccontextmanager
async def dialled(
    port: int, *, asked: bytes | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client of a listener, upgraded."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(asked if asked is not None else request())
        if asked is None:
            assert b" 101 " in await read_head(reader)
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# --- proxies ------------------------------------------------------------------------------


@attrs.define
class Proxied:
    """What came to a proxy: (host, port) of each tunnel, and the credentials."""

    port: int = 0
    targets: list[tuple[str, int]] = attrs.field(factory=list)
    credentials: list[str] = attrs.field(factory=list)


async def _splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """To the port on loopback, whatever the host: tests have no other."""
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    try:
        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))
    finally:
        up_writer.close()


@asynccontextmanager
async def connect_proxy(
    *, credentials: str | None = None, answer: bytes | None = None, pieces: bool = False
) -> AsyncIterator[Proxied]:
    """An HTTP proxy that knows CONNECT (RFC 9110 section 9.3.6). `pieces`: it answers byte by byte."""
    seen = Proxied()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await read_head(reader)).decode().split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        given = base64.b64decode(headers.get("Proxy-Authorization", "Basic ").split(" ", 1)[1]).decode()
        host, _, port = target.rpartition(":")
        seen.targets.append((host.strip("[]"), int(port)))
        seen.credentials.append(given)
        if answer is not None:
            writer.write(answer)
            return
        if method != "CONNECT" or (credentials is not None and given != credentials):
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        reply = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n"
        for at in range(len(reply)) if pieces else [0]:
            writer.write(reply[at : at + 1] if pieces else reply)
            await writer.drain()
            await asyncio.sleep(0)
        await _splice(reader, writer, int(port))

    async with server(serve) as seen.port:
        yield seen


@asynccontextmanager
async def socks5_proxy(*, credentials: str | None = None, refuse: int = 0) -> AsyncIterator[Proxied]:
    """RFC 1928 and 1929. `refuse` is the reply code of its refusal."""
    seen = Proxied()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, count = await reader.readexactly(2)
        methods = await reader.readexactly(count)
        wanted = 2 if credentials is not None else 0
        if wanted not in methods:
            writer.write(b"\x05\xff")
            return
        writer.write(bytes([5, wanted]))
        if wanted:
            _, size = await reader.readexactly(2)
            user = await reader.readexactly(size)
            (size,) = await reader.readexactly(1)
            given = f"{user.decode()}:{(await reader.readexactly(size)).decode()}"
            seen.credentials.append(given)
            writer.write(bytes([1, given != credentials]))
            if given != credentials:
                return
        _, _, _, kind = await reader.readexactly(4)
        if kind == 3:
            (size,) = await reader.readexactly(1)
            host = (await reader.readexactly(size)).decode()
        else:
            host = ".".join(map(str, await reader.readexactly(4)))
        (port,) = struct.unpack(">H", await reader.readexactly(2))
        seen.targets.append((host, port))
        writer.write(bytes([5, refuse, 0, 1, 0, 0, 0, 0, 0, 0]))
        if not refuse:
            await _splice(reader, writer, port)

    async with server(serve) as seen.port:
        yield seen
