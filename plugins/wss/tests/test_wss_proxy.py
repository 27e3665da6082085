"""Through proxies: HTTP CONNECT and SOCKS5, from the recipe and from the environment."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from deadlines import LONG, Deadlines
from loops import Run
from websocket_peers import answering, connect_proxy, server, socks5_proxy

from tesaiot_connect import ConnectFailed, Connection, Secret, SecretFrom, TlsOptions, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_wss import Wss
from tesaiot_connect_wss.proxy import from_environment

VARIABLES = [f"{name}_proxy" for name in ("ws", "wss", "http", "https", "all", "no", "socks")]


@pytest.fixture(autouse=True)
def _no_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


async def echo(connection: Connection) -> None:
    stream = await connection.accept_stream()
    while data := await stream.receive():
        await stream.send(data)


async def works(transport: Wss) -> None:
    connection = await transport.connect()
    try:
        stream = await connection.open_stream()
        await stream.send(b"ping")
        assert await stream.receive() == b"ping"
    finally:
        await connection.aclose()


async def fails(transport: Wss) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as failed:
        await transport.connect()
    assert failed.value.fix
    assert "hunter2" not in str(failed.value)
    return failed.value


def through(port: int, proxy: str, **options: Any) -> Wss:
    return Wss(Url("ws", "broker.invalid", port, "/mqtt"), proxy=Secret(proxy), **options)


def test_connect(run: Run) -> None:
    async def main() -> None:
        async with Wss(Url.parse("ws://127.0.0.1:0")).listen(echo) as url:
            port = Url.parse(url).port
            for pieces in (False, True):
                async with connect_proxy(pieces=pieces) as proxy:
                    await works(through(port, f"http://127.0.0.1:{proxy.port}"))
                    assert proxy.targets == [("broker.invalid", port)], "the proxy resolves the name"
                    assert proxy.credentials == [""]
            async with connect_proxy(credentials="me@work:hunter2:x") as proxy:
                await works(through(port, f"http://me%40work:hunter2%3Ax@127.0.0.1:{proxy.port}"))
                error = await fails(through(port, f"http://me:hunter2@127.0.0.1:{proxy.port}"))
                assert "407" in error.what
                assert "user:password" in error.fix
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_tls_goes_through(run: Run, certificates: Certificates) -> None:
    """The certificate is the broker's, also where it is told what is wrong with it."""

    async def main() -> None:
        tls = TlsOptions(ca_file=certificates.ca_file)
        listening = Wss(Url.parse("wss://127.0.0.1:0"), server_tls=certificates.server("broker.invalid"))
        async with listening.listen(echo) as url, connect_proxy() as proxy, socks5_proxy() as socks:
            port = Url.parse(url).port
            for way in (f"http://127.0.0.1:{proxy.port}", f"socks5h://127.0.0.1:{socks.port}"):
                secured = Wss(Url("wss", "broker.invalid", port), tls=tls, proxy=Secret(way))
                await works(secured)
                other = Wss(Url("wss", "other.invalid", port), tls=tls, proxy=Secret(way))
                assert "the certificate names broker.invalid" in (await fails(other)).what

    run(main())


def test_socks5(run: Run) -> None:
    async def main() -> None:
        async with Wss(Url.parse("ws://127.0.0.1:0")).listen(echo) as url:
            port = Url.parse(url).port
            async with socks5_proxy(credentials="me:hunter2") as proxy:
                await works(through(port, f"socks5h://me:hunter2@127.0.0.1:{proxy.port}"))
                assert proxy.targets == [("broker.invalid", port)], "socks5h: the proxy resolves the name"
                here = Wss(
                    Url("ws", "127.0.0.1", port), proxy=Secret(f"socks5://me:hunter2@127.0.0.1:{proxy.port}")
                )
                await works(here)
                assert proxy.targets[1] == ("127.0.0.1", port)
                error = await fails(through(port, f"socks5h://me:hunter2x@127.0.0.1:{proxy.port}"))
                assert "does not connect" in error.what
            async with socks5_proxy(refuse=5) as proxy:
                error = await fails(through(port, f"socks5h://127.0.0.1:{proxy.port}"))
                assert "refused" in error.what.lower()

    run(main())


def test_a_proxy_that_never_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it was asked, the time is over."""
    deadlines = Deadlines(monkeypatch)

    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        assert await reader.read(1)
        deadlines.pass_by()
        await reader.read()

    async def main() -> None:
        async with server(silent) as port:
            for scheme in ("http", "socks5"):
                recipe = Wss(
                    Url("ws", "127.0.0.1", 1),
                    proxy=Secret(f"{scheme}://127.0.0.1:{port}"),
                    connect_timeout=LONG,
                )
                error = await fails(recipe)
                assert f"the proxy {scheme}://127.0.0.1:{port} does not answer" in error.what
                assert error.stage == "upgrade"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_proxies_that_do_not_work(run: Run) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        for scheme in ("http", "socks5h"):
            error = await fails(through(1, f"{scheme}://me:hunter2@127.0.0.1:{port}"))
            assert f"the proxy {scheme}://127.0.0.1:{port}" in error.what
            assert error.stage == "reach"
        for answer, word in (
            (b"HTTP/1.1 403 Forbidden\r\n\r\n", "forbids"),
            (b"SSH-2.0\r\n", "no HTTP answer"),
        ):
            async with server(answering(answer)) as port:
                error = await fails(through(1, f"http://127.0.0.1:{port}"))
                assert word in error.what
                assert error.stage == "upgrade"
        for wrong in (
            "https://me:hunter2@p",
            "ftp://p",
            "hunter2",
            "http://",
            "http://h:port",
            "socks5://me:hunter2@",
        ):
            await fails(through(1, wrong))
        assert (
            "PROXY_TEST" in (await fails(Wss(Url.parse("ws://h"), proxy=SecretFrom(env="PROXY_TEST")))).what
        )
        assert "hunter2" not in repr(through(1, "http://me:hunter2@h:1"))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Wss(Url.parse("ws://127.0.0.1:0")).listen(echo) as url, connect_proxy() as proxy:
            port = Url.parse(url).port
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
            await works(Wss(Url("ws", "broker.invalid", port)))
            assert proxy.targets == [("broker.invalid", port)]
            await works(Wss(Url("ws", "127.0.0.1", port)))
            direct = Wss(Url("ws", "broker.invalid", port), proxy=Secret("none"))
            assert "cannot be resolved" in (await fails(direct)).what
            assert len(proxy.targets) == 1

    run(main())


def test_which_variable_is_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_environment("wss", "h", 443) is None
    monkeypatch.setenv("ALL_PROXY", "socks5://a:1")
    assert from_environment("wss", "h", 443) == from_environment("ws", "h", 80) == "socks5://a:1"
    monkeypatch.setenv("HTTP_PROXY", "http://b:1")
    assert from_environment("ws", "h", 80) == "http://b:1"
    assert from_environment("wss", "h", 443) == "socks5://a:1"
    monkeypatch.setenv("HTTPS_PROXY", "c:1")
    assert from_environment("wss", "h", 443) == "http://c:1"
    monkeypatch.setenv("NO_PROXY", ".example,10.0.0.1")
    assert from_environment("wss", "a.example", 443) is None
    assert from_environment("wss", "10.0.0.1", 443) is None
    assert from_environment("wss", "a.other", 443) == "http://c:1"
    for loopback in ("localhost", "127.0.0.9", "::1"):
        assert from_environment("wss", loopback, 443) is None
