"""Dialling: the upgrade, what servers answer instead of it, pings, close codes, and what is said of each."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from deadlines import LONG, over_at
from loops import Run
from websocket_peers import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    Serve,
    accepted,
    answering,
    frame,
    read_close,
    read_frame,
    read_head,
    server,
    upgrading,
)

from tesaiot_connect import (
    CloseReason,
    ConnectFailed,
    Connection,
    Disconnected,
    Duration,
    PathLost,
    Secret,
    SecretFrom,
    Size,
    TlsOptions,
    Unsupported,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_wss import Wss


async def echo(connection: Connection) -> None:
    stream = await connection.accept_stream()
    while data := await stream.receive():
        await stream.send(data)


async def works(transport: Wss) -> Connection:
    """Makes a connection, tries it, and closes it."""
    connection = await transport.connect()
    try:
        stream = await connection.open_stream()
        await stream.send(b"ping")
        assert await stream.receive() == b"ping"
        return connection
    finally:
        await connection.aclose()


async def fails(transport: Wss) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as failed:
        await transport.connect()
    assert failed.value.fix
    assert str(transport.url).partition("?")[0].rstrip("/") in failed.value.what
    return failed.value


def ws(port: int, path: str = "/mqtt", **options: Any) -> Wss:
    return Wss(Url("ws", "127.0.0.1", port, path), **options)


async def talking_to(serve: Serve, port_use: Callable[[int], Coroutine[Any, Any, Any]]) -> Any:
    async with server(serve) as port:
        return await port_use(port)


# --- the upgrade --------------------------------------------------------------------------


def test_default_ports_and_path() -> None:
    assert Wss(Url.parse("ws://h")).port == 80
    assert Wss(Url.parse("wss://h")).port == 443
    assert Wss(Url.parse("wss://h")).path == "/mqtt"
    assert Wss(Url.parse("wss://h/")).path == "/"
    assert Wss(Url.parse("wss://h?a=b")).path == "/mqtt?a=b"


def test_what_the_upgrade_asks_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_head(reader))
        writer.write(accepted(seen[-1]))

    async def main() -> None:
        monkeypatch.setenv("WSS_TEST_HEADER", "from the environment")
        headers = {"Authorization": Secret("Bearer abc"), "X-Other": SecretFrom(env="WSS_TEST_HEADER")}
        async with server(serve) as port:
            recipe = ws(port, "/a path/mqtt?token=x&y=%20", headers=headers)
            (await recipe.connect()).abort()
            assert "abc" not in repr(recipe)
            line, *rest = seen[0].decode().split("\r\n")
            assert line == "GET /a%20path/mqtt?token=x&y=%20 HTTP/1.1"
            asked = {name.lower(): value for name, _, value in (one.partition(": ") for one in rest if one)}
            assert asked["host"] == f"127.0.0.1:{port}"
            assert asked["sec-websocket-protocol"] == "mqtt"
            assert asked["authorization"] == "Bearer abc"
            assert asked["x-other"] == "from the environment"
            assert "sec-websocket-extensions" not in asked

            error = await fails(ws(port, headers={"X-A": SecretFrom(env="WSS_TEST_NO_SUCH")}))
            assert "WSS_TEST_NO_SUCH is not set" in str(error)
            error = await fails(ws(port, headers={"X-A": Secret("a\r\nX-B: c")}))
            assert "X-A" in str(error)
            assert "X-B" not in str(error)

    run(main())


@pytest.mark.parametrize("name", ["Host", "Sec-WebSocket-Key", "upgrade", "a b", "x\r\ny", ""])
def test_headers_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="header"):
        Wss(Url.parse("ws://h"), headers={name: Secret("x")})


def test_a_server_that_chooses_no_subprotocol(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def hello(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(BINARY, b"hello"))

    async def main() -> None:
        async with server(upgrading(hello, protocol=None)) as port:
            connection = await ws(port).connect()
            assert await (await connection.open_stream()).receive() == b"hello"
            connection.abort()

    with caplog.at_level(logging.WARNING):
        run(main())
    assert "did not choose the subprotocol mqtt" in caplog.text


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 4096])
def test_every_split_of_answer_and_frames(run: Run, size: int) -> None:
    payload = b"\x30\x05\x00\x01tab" * 40
    frames = b"".join(
        (
            frame(BINARY, payload[:5]),
            frame(PING, b"p"),
            frame(BINARY, payload[5:50], fin=False),
            frame(PONG),
            frame(CONT, payload[50:]),
        )
    )

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = accepted(await read_head(reader)) + frames
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)
        assert await read_frame(reader) == (PONG, b"p")
        writer.write(frame(CLOSE, (1000).to_bytes(2, "big")))
        await reader.read()

    async def main() -> None:
        async with server(serve) as port:
            connection = await ws(port).connect()
            stream = await connection.open_stream()
            got = b""
            while data := await stream.receive(9):
                got += data
            assert got == payload
            await connection.aclose()
            assert (await connection.wait_closed()) == CloseReason(0, "closed by the peer", by_peer=True)

    run(main())


HTML = b"<html><body>It works!</body></html>"


def http(status: str, *headers: str, body: bytes = b"") -> bytes:
    head = "\r\n".join((f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}"))
    return f"{head}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "word", "fix"),
    [
        (http("401 Unauthorized", body=b"no token"), "401 Unauthorized); it says: no token", "headers"),
        (http("403 Forbidden"), "refuses (403 Forbidden)", "headers"),
        (http("404 Not Found", body=HTML), "nothing at this path (404 Not Found)", "/mqtt"),
        (http("301 Moved", "Location: https://b.example/x?secret=1"), "to https://b.example/x (301)", "wss://"),
        (http("302 Found"), "redirects (302)", "URL"),
        (http("407 Proxy Authentication Required"), "407", "proxy ="),
        (http("426 Upgrade Required"), "426", "Upgrade"),
        (http("200 OK", "Content-Type: text/html", body=HTML), "not a WebSocket endpoint", "port and path"),
        (http("502 Bad Gateway"), "no broker behind", "broker runs"),
        (http("418 I'm a teapot"), "418 I'm a teapot", "log"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", "until the end", "port"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "Connection", "proxy"),
        (b"HTTP/1.1 ABC what\r\n\r\n", "no valid HTTP", "WebSocket listener"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not with HTTP", "WebSocket listener"),
        (b"\x20\x02\x00\x00", "not with HTTP", "WebSocket listener"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, "too large", "WebSocket listener"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n" + b"x" * 200_000, "no end", "WebSocket listener"),
        (b"HTTP/1.1 2", "ended during the upgrade", "WebSocket"),
        (b"", "ended during the upgrade", "WebSocket"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else "",
)  # fmt: skip
def test_other_answers_are_explained(run: Run, answer: bytes, word: str, fix: str) -> None:
    async def main() -> None:
        async with server(answering(answer)) as port:
            error = await fails(ws(port))
            assert word in error.what
            assert fix in error.fix
            assert "secret" not in str(error)
            assert error.stage == "upgrade"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_wrong_accept_and_foreign_subprotocol(run: Run) -> None:
    async def liar(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await read_head(reader)
        writer.write(accepted(asked.replace(b"Key: ", b"Key: x")))

    async def idle(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with server(liar) as port:
            error = await fails(ws(port))
            assert "Sec-WebSocket-Accept" in error.what
            assert error.stage == "upgrade"
        async with server(upgrading(idle, protocol="chat")) as port:
            error = await fails(ws(port))
            assert "another subprotocol than mqtt" in error.what
            assert "chat" in error.what

    run(main())


def test_a_server_that_never_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    over_at(monkeypatch, "upgrade")

    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with server(silent) as port:
            error = await fails(ws(port, connect_timeout=LONG))
            assert "does not answer the upgrade" in str(error)
            assert error.stage == "upgrade"
            assert "1883" in error.fix

    run(main())


def test_a_server_that_is_not_there(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert run(fails(ws(port))).stage == "reach"
    with pytest.raises(ConnectFailed) as failed:
        run(Wss(Url.parse("ws://no-such-host.invalid")).connect())
    assert failed.value.stage == "name"


# --- TLS ----------------------------------------------------------------------------------


def test_tls_and_its_errors(run: Run, certificates: Certificates, tmp_path: Any) -> None:
    async def main() -> None:
        listening = Wss(Url.parse("wss://127.0.0.1:0/mqtt"), server_tls=certificates.server())
        trusting = TlsOptions(ca_file=certificates.ca_file)
        async with listening.listen(echo) as url:
            peer = (await works(Wss(Url.parse(url), tls=trusting))).peer
            assert (peer.secure, peer.alpn, peer.transport) == (True, "http/1.1", "wss")
            assert peer.certificate
            stranger = Certificates(tmp_path, name="somebody else")
            error = await fails(Wss(Url.parse(url), tls=TlsOptions(ca_file=stranger.ca_file)))
            assert "not from a trusted authority" in str(error)
            assert error.stage == "secure"
        named = Wss(Url.parse("wss://127.0.0.1:0"), server_tls=certificates.server("broker.example"))
        async with named.listen(echo) as url:
            error = await fails(Wss(Url.parse(url), tls=trusting))
            assert "the certificate names broker.example" in str(error)
            own = TlsOptions(ca_file=certificates.ca_file, server_name="broker.example")
            await works(Wss(Url.parse(url), tls=own))
        async with Wss(Url.parse("ws://127.0.0.1:0")).listen(echo) as url:
            error = await fails(Wss(Url.parse(url.replace("ws:", "wss:")), tls=trusting))
            assert "use ws://" in error.fix
            assert error.stage == "secure"

    run(main())


def test_a_required_client_certificate(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        tls = certificates.server(clients=certificates)
        async with Wss(Url.parse("wss://127.0.0.1:0"), server_tls=tls).listen(echo) as url:
            recipe = Wss(Url.parse(url), tls=TlsOptions(ca_file=certificates.ca_file))
            error = await fails(recipe)
            assert "may require a client certificate" in str(error)
            assert error.stage == "secure"
            connection = await recipe.connect(identity=certificates.client())
            await connection.aclose()

    run(main())


# --- how it ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "word"),
    [
        (1001, "bye", "going away"),
        (1002, "", "protocol was broken"),
        (1008, "not you", "'not you'"),
        (1009, "", "too big"),
        (1011, "", "it failed"),
        (4123, "own", "code 4123"),
    ],
)
def test_the_peers_close_code_is_told(run: Run, code: int, reason: str, word: str) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(BINARY, b"last") + frame(CLOSE, code.to_bytes(2, "big") + reason.encode()))
        assert await read_close(reader) == (code, reason)
        assert await reader.read() == b""

    async def main() -> None:
        async with server(upgrading(close)) as port:
            connection = await ws(port).connect()
            stream = await connection.open_stream()
            assert await stream.receive() == b"last"
            with pytest.raises(Disconnected, match=word) as ended:
                await stream.receive()
            assert ended.value.fix
            told = await connection.wait_closed()
            assert (told.code, told.by_peer) == (code, True)
            assert word in told.text
            assert connection.status().close_reason == told
            await connection.aclose()

    run(main())


@pytest.mark.parametrize("payload", [b"", (1000).to_bytes(2, "big") + b"done"])
def test_an_orderly_close_is_the_end_of_the_stream(run: Run, payload: bytes) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(BINARY, b"all") + frame(CLOSE, payload))
        await reader.read()

    async def main() -> None:
        async with server(upgrading(close)) as port:
            connection = await ws(port).connect()
            stream = await connection.open_stream()
            assert [await stream.receive(), await stream.receive()] == [b"all", b""]
            assert (await connection.wait_closed()).code == 0

    run(main())


def test_an_end_without_a_close_frame(run: Run) -> None:
    async def leave(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(BINARY, b"half") + b"\x82")

    async def main() -> None:
        async with server(upgrading(leave)) as port:
            connection = await ws(port).connect()
            stream = await connection.open_stream()
            assert await stream.receive() == b"half"
            with pytest.raises(Disconnected, match="1006"):
                await stream.receive()
            assert (await connection.wait_closed()).code == 1006

    run(main())


def test_our_close_frame(run: Run) -> None:
    seen: list[tuple[int, str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await read_frame(reader) == (BINARY, b"before")
        seen.append(await read_close(reader))
        writer.write(frame(BINARY, b"too late") + frame(CLOSE, (1000).to_bytes(2, "big")))
        assert await reader.read() == b""

    async def main() -> None:
        async with server(upgrading(serve)) as port:
            for code, reason in ((0, ""), (4000, "own words"), (1005, "may not be sent")):
                connection = await ws(port).connect()
                await (await connection.open_stream()).send(b"before")
                await connection.aclose(code, reason)
                assert connection.status().close_reason == CloseReason(0, "closed on this side")
        assert seen == [(1000, ""), (4000, "own words"), (1000, "")]

    run(main())


@pytest.mark.parametrize(
    ("wrong", "code", "word"),
    [
        (frame(TEXT, b"text"), 1003, "binary frames"),
        (frame(BINARY, b"x", mask=True), 1002, "broke the WebSocket protocol"),
        (frame(BINARY, bytes(2000)), 1009, "max_message_size"),
        (frame(BINARY, bytes(900), fin=False) + frame(CONT, bytes(900)), 1009, "max_message_size"),
    ],
    ids=["text", "masked", "too large", "too large in pieces"],
)
def test_violations_are_answered_and_told(run: Run, wrong: bytes, code: int, word: str) -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(BINARY, b"good") + wrong + b"rubbish" * 1000)
        seen.append((await read_close(reader))[0])

    async def main() -> None:
        async with server(upgrading(serve)) as port:
            connection = await ws(port, max_message_size=Size(1000)).connect()
            stream = await connection.open_stream()
            assert (await stream.receive(4)) == b"good"
            with pytest.raises(Disconnected, match=word):
                while await stream.receive():
                    pass
            told = await connection.wait_closed()
            assert (told.code, told.by_peer) == (code, False)
        assert seen == [code]

    run(main())


def test_send_eof_is_not_possible(run: Run) -> None:
    async def main() -> None:
        async with Wss(Url.parse("ws://127.0.0.1:0")).listen(echo) as url:
            connection = await Wss(Url.parse(url)).connect()
            with pytest.raises(Unsupported):
                await (await connection.open_stream()).send_eof()
            await connection.aclose()

    run(main())


# --- pings --------------------------------------------------------------------------------


def test_silence_is_noticed(run: Run) -> None:
    async def deaf(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with server(upgrading(deaf)) as port:
            recipe = ws(port, ping_interval=Duration(0.05), ping_timeout=Duration(0.05))
            connection = await recipe.connect()
            with pytest.raises(PathLost, match="not even an answer to a ping") as lost:
                await (await connection.open_stream()).receive()
            assert "goes on over the next endpoint" in lost.value.fix
            assert (await connection.wait_closed()).code == 1006

    run(main())


def test_pings_keep_a_silent_connection_and_measure_it(run: Run) -> None:
    """One after each silence, however long an answer may take."""
    pings = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal pings
        while True:
            opcode, payload = await read_frame(reader)
            if opcode == CLOSE:
                writer.write(frame(CLOSE, payload))
                return
            assert opcode == PING
            pings += 1
            writer.write(frame(PONG, payload))
            if pings == 4:
                writer.write(frame(BINARY, b"enough"))

    async def main() -> None:
        async with server(upgrading(serve)) as port:
            recipe = ws(port, ping_interval=Duration(0.02), ping_timeout=LONG)
            connection = await recipe.connect()
            assert await (await connection.open_stream()).receive() == b"enough"
            rtt = connection.status().rtt
            assert rtt is not None
            assert 0 < rtt < 60
            await connection.aclose()

    run(main())


def test_any_byte_shows_that_the_peer_lives(run: Run) -> None:
    pings: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (frame(PONG, b"of nobody"), frame(BINARY, b"still here")):
            opcode, payload = await read_frame(reader)
            assert opcode == PING
            pings.append(payload)
            writer.write(answer)
        await reader.read()

    async def main() -> None:
        async with server(upgrading(serve)) as port:
            recipe = ws(port, ping_interval=Duration(0.02), ping_timeout=LONG)
            connection: Any = await recipe.connect()
            assert connection.status().rtt is None
            while not pings or not connection._socket._heard:
                await asyncio.sleep(0.001)
            connection._socket._unanswered()  # the time for the answer is over
            assert await (await connection.open_stream()).receive() == b"still here"
            assert connection.status().rtt is None
            connection.abort()

    run(main())


def test_a_reader_that_takes_its_time_still_answers_pings(run: Run) -> None:
    """Unread data does not keep pings from being answered, nor our own from being judged unfairly."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(BINARY, b"unread"))
        for number in range(5):
            writer.write(frame(PING, b"%d" % number) + frame(BINARY, b"more"))
            assert await read_frame(reader) == (PONG, b"%d" % number)
        writer.write(frame(CLOSE, (1000).to_bytes(2, "big")))
        await reader.read()

    async def main() -> None:
        async with server(upgrading(serve)) as port:
            connection = await ws(port).connect()
            stream = await connection.open_stream()
            await connection.wait_closed()
            got = b""
            while data := await stream.receive(5):
                got += data
            assert got == b"unread" + b"more" * 5

    run(main())


def test_what_nobody_receives_stays_outside(run: Run) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        data = b"".join(frame(BINARY, bytes(100)) for _ in range(600))
        while True:
            writer.write(data)
            await writer.drain()
            sent += 600

    async def main() -> None:
        async with server(upgrading(flood)) as port:
            recipe = ws(port, ping_interval=Duration(0.05), ping_timeout=Duration(0.05))
            connection = await recipe.connect()
            stream: Any = await connection.open_stream()
            before = -1
            while before != sent:  # the kernel's buffers are full
                before = sent
                await asyncio.sleep(0.3)
            assert connection.status().bytes_received < 800_000
            assert connection.status().state.value == "open", "it was judged silent though we do not read"
            assert await stream.receive()
            connection.abort()
            await connection.wait_closed()

    run(main())


def test_pings_without_end_from_a_peer_that_reads_nothing(run: Run) -> None:
    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = frame(PING, bytes(125)) * 1000
        while True:
            writer.write(data)
            await writer.drain()

    async def main() -> None:
        async with server(upgrading(flood)) as port:
            connection = await ws(port).connect()
            with pytest.raises(Disconnected, match="reads no answers"):
                await (await connection.open_stream()).receive()

    run(main())


def test_probe(run: Run) -> None:
    async def deaf(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with Wss(Url.parse("ws://127.0.0.1:0")).listen(echo) as url:
            connection = await Wss(Url.parse(url)).connect()
            await asyncio.gather(*(connection.probe() for _ in range(20)))
            assert connection.status().rtt is not None
            await connection.aclose()
        async with server(upgrading(deaf)) as port:
            connection = await ws(port, ping_timeout=Duration(0.1)).connect()
            with pytest.raises(PathLost, match="did not answer a ping"):
                await connection.probe()
            probing = asyncio.create_task(connection.probe())
            await asyncio.sleep(0)
            connection.abort()
            with pytest.raises(Disconnected):
                await probing

    run(main())
