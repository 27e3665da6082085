"""Listening: who is let in, what the others are told, and what strangers cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from deadlines import LONG, Deadlines
from loops import Run
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

from tesaiot_connect import Connection, ConnectorError, Disconnected, Peer, Size, TlsOptions, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_wss import Wss


async def echo(connection: Connection) -> None:
    stream = await connection.accept_stream()
    while data := await stream.receive():
        await stream.send(data)


def listening(path: str = "/mqtt", **options: Any) -> Wss:
    return Wss(Url("ws", "127.0.0.1", 0, path), **options)


def port_of(url: str) -> int:
    return Url.parse(url).port


async def answer_to(port: int, asked: bytes) -> tuple[str, str]:
    """Head and body of the answer, until the listener hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(asked)
        with contextlib.suppress(ConnectionError):
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
            return head, body
        raise AssertionError("the connection was reset before its answer came")
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


GET = "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("asked", "status", "word"),
    [
        (GET.format("/mqtt").encode(), 426, "connect with an MQTT client"),
        (GET.format("/").encode(), 404, "served at /mqtt"),
        (request("/"), 404, "served at /mqtt"),
        (request("/mqtt/"), 404, "served at /mqtt"),
        (b"HEAD /mqtt HTTP/1.1\r\nHost: h\r\n\r\n", 405, ""),
        (b"POST /mqtt HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", 405, "GET"),
        (request(protocol=None), 400, "the client offers none"),
        (request(protocol="chat, soap"), 400, "not chat, soap"),
        (request().replace(b"Version: 13", b"Version: 8"), 400, "Version"),
        (request(key=b"short"), 400, "Key"),
        (request().replace(b"HTTP/1.1", b"HTTP/1.0"), 505, "HTTP/1.0"),
        (request().replace(b"Host: ", b"Ho st: "), 400, "invalid"),
        (b"\x10\x0c\x00\x04MQTT\x05\x02\x00\x3c", 400, "ws:// or wss://"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "ws:// or wss://"),
        (request(more="X: " + "x" * 20_000 + "\r\n"), 431, "16 KiB"),
        (b"GET /" + b"x" * 20_000, 431, "16 KiB"),
        (request(more="X: y\r\n" * 300), 400, "128 headers"),
    ],
    ids=lambda value: value[:18] if isinstance(value, bytes) else "",
)
def test_what_is_no_upgrade_is_told_why(run: Run, asked: bytes, status: int, word: str) -> None:
    served: list[Connection] = []

    async def handler(connection: Connection) -> None:
        served.append(connection)

    async def main() -> None:
        async with listening().listen(handler) as url:
            head, body = await answer_to(port_of(url), asked)
            assert head.startswith(f"HTTP/1.1 {status} ")
            assert word in body
            if status == 405:
                assert "Allow: GET" in head
            if status == 426:
                assert "Upgrade: websocket" in head
        assert not served

    run(main())


@pytest.mark.parametrize("protocol", ["mqtt", "mqttv3.1", "chat, mqttv3.1, mqtt"])
def test_subprotocols(run: Run, protocol: str) -> None:
    async def main() -> None:
        async with listening().listen(echo) as url:
            async with dialled(port_of(url), asked=request(protocol=protocol)) as (reader, _writer):
                head = (await read_head(reader)).decode()
        chosen = "mqttv3.1" if protocol == "mqttv3.1" else "mqtt"
        assert f"Sec-WebSocket-Protocol: {chosen}\r\n" in head

    run(main())


def test_a_path_of_ones_own_and_any_query(run: Run) -> None:
    async def main() -> None:
        async with listening("/things/mqtt?ignored=1").listen(echo) as url:
            assert url.endswith("/things/mqtt")
            for path in ("/things/mqtt", "/things/mqtt?token=abc"):
                async with dialled(port_of(url), asked=request(path)) as (reader, _writer):
                    assert b" 101 " in await read_head(reader)
            _, body = await answer_to(port_of(url), request())
            assert "served at /things/mqtt" in body

    run(main())


def test_origins(run: Run) -> None:
    async def main() -> None:
        async with listening(origins=("https://app.example",)).listen(echo) as url:
            for more in ("", "Origin: https://app.example\r\n"):
                async with dialled(port_of(url), asked=request(more=more)) as (reader, _writer):
                    assert b" 101 " in await read_head(reader)
            head, _ = await answer_to(port_of(url), request(more="Origin: https://evil.example\r\n"))
            assert " 403 " in head

    run(main())


def test_the_address_behind_proxies(run: Run) -> None:
    peers: asyncio.Queue[Peer] = asyncio.Queue()

    async def handler(connection: Connection) -> None:
        await peers.put(connection.peer)

    async def address(url: str, forwarded: str) -> str:
        more = "".join(f"X-Forwarded-For: {line}\r\n" for line in forwarded.split("|"))
        async with dialled(port_of(url), asked=request(more=more)):
            return (await peers.get()).address

    async def main() -> None:
        async with listening().listen(handler) as url:
            assert (await address(url, "203.0.113.7")).startswith("127.0.0.1:"), "anybody may write that"
        trusting = listening(trusted_proxies=("127.0.0.0/8", "2001:db8::/32"))
        async with trusting.listen(handler) as url:
            assert await address(url, "203.0.113.7") == "203.0.113.7:0"
            assert await address(url, "198.51.100.1, 203.0.113.7") == "203.0.113.7:0"
            assert await address(url, "203.0.113.7, 2001:db8::5|127.0.0.9") == "203.0.113.7:0"
            assert await address(url, "2001:db9::1") == "[2001:db9::1]:0"
            assert (await address(url, "<script>")).startswith("127.0.0.1:")

    run(main())
    with pytest.raises(ValueError, match="does not appear to be"):
        listening(trusted_proxies=("localhost",))


def test_every_byte_alone(run: Run) -> None:
    """TCP may cut request and frames anywhere."""
    payload = b"\x10\x0c\x00\x04MQTT" * 9
    frames = (
        frame(BINARY, payload[:7], mask=True)
        + frame(PING, b"now", mask=True)
        + frame(BINARY, payload[7:20], fin=False, mask=True)
        + frame(CONT, payload[20:], mask=True)
    )

    async def main() -> None:
        async with listening().listen(echo) as url:
            for cut in range(0, len(request() + frames), 11):
                data = request() + frames
                async with dialled(port_of(url), asked=data[:cut]) as (reader, writer):
                    await asyncio.sleep(0)
                    for at in range(cut, len(data)) if cut % 3 == 0 else [cut]:
                        writer.write(data[at : at + 1] if cut % 3 == 0 else data[at:])
                        await writer.drain()
                        await asyncio.sleep(0)
                    assert b" 101 " in await read_head(reader)
                    got, pongs = b"", []
                    while len(got) < len(payload) or not pongs:
                        opcode, part = await read_frame(reader)
                        if opcode == PONG:
                            pongs.append(part)
                        else:
                            got += part
                    assert (got, pongs) == (payload, [b"now"])

    run(main())


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (frame(BINARY, b"x"), 1002),
        (frame(TEXT, b"x", mask=True), 1003),
        (frame(BINARY, bytes(5000), mask=True)[:14], 1009),
        (frame(PING, bytes(126), mask=True), 1002),
        (b"\xff" * 5000, 1002),
    ],
    ids=["unmasked", "text", "too large", "large ping", "noise"],
)
def test_violations(run: Run, wrong: bytes, code: int, caplog: pytest.LogCaptureFixture) -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()

    async def handler(connection: Connection) -> None:
        try:
            await echo(connection)
        except Disconnected as error:
            await ended.put(error.what)
            raise

    async def main() -> None:
        async with listening(max_message_size=Size(4096)).listen(handler) as url:
            async with dialled(port_of(url)) as (other, other_writer):
                async with dialled(port_of(url)) as (reader, writer):
                    writer.write(frame(BINARY, b"good", mask=True))
                    assert await read_frame(reader) == (BINARY, b"good")
                    writer.write(wrong)
                    assert (await read_close(reader))[0] == code
                    writer.close()
                    assert await ended.get()
                other_writer.write(frame(BINARY, b"undisturbed", mask=True))
                assert await read_frame(other) == (BINARY, b"undisturbed")

    with caplog.at_level(logging.WARNING):
        run(main())
    assert not caplog.records


def test_the_listener_says_that_it_stops(run: Run) -> None:
    async def main() -> None:
        async with listening().listen(echo) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
            writer.write(request() + frame(BINARY, b"x", mask=True))
            await read_head(reader)
            assert await read_frame(reader) == (BINARY, b"x")
            leaving = asyncio.create_task(read_close(reader))
        assert (await leaving) == (1001, "the listener stops")
        writer.close()
        await writer.wait_closed()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_the_handlers_end_is_an_orderly_close(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the client's close frame comes."""
    monkeypatch.setattr("tesaiot_connect_wss.layer._LINGER", 600.0)

    async def handler(connection: Connection) -> None:
        await (await connection.accept_stream()).receive()

    async def main() -> None:
        async with listening().listen(handler) as url:
            async with dialled(port_of(url)) as (reader, writer):
                writer.write(frame(BINARY, b"x", mask=True))
                assert (await read_close(reader))[0] == 1000
                writer.write(frame(CLOSE, (1000).to_bytes(2, "big"), mask=True))
                assert await reader.read() == b""

    run(main())


@pytest.mark.parametrize("said", [b"", b"GET /mqtt HT", request()[:-2]])
def test_dawdlers_are_dropped(run: Run, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    deadlines = Deadlines(monkeypatch)

    async def main() -> None:
        async with listening(handshake_timeout=LONG).listen(echo) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
            writer.write(said)
            while not deadlines.running:
                await asyncio.sleep(0.001)
            async with dialled(port_of(url)) as (other, other_writer):
                deadlines.pass_by(0)
                assert await reader.read() == b""
                other_writer.write(frame(BINARY, b"served", mask=True))
                assert await read_frame(other) == (BINARY, b"served")
            writer.close()
            await writer.wait_closed()

    run(main())


def test_leaving_ends_handshakes_in_progress(run: Run, tmp_path: Any) -> None:
    async def main() -> None:
        tls = Certificates(tmp_path)
        secure = Wss(Url.parse("wss://127.0.0.1:0"), server_tls=tls.server())
        async with listening().listen(echo) as plain, secure.listen(echo) as url:
            pairs = [await asyncio.open_connection("127.0.0.1", port_of(one)) for one in (plain, plain, url)]
            pairs[0][1].write(b"GET /mqtt")
            connection = await Wss(Url.parse(url), tls=TlsOptions(ca_file=tls.ca_file)).connect()
            await connection.aclose()
        for reader, writer in pairs:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_a_listener_for_wss_needs_a_certificate(run: Run) -> None:
    async def main() -> None:
        async with Wss(Url.parse("wss://127.0.0.1:0")).listen(echo):
            pass

    with pytest.raises(ConnectorError, match="use ws:// without TLS"):
        run(main())
