"""A TCP path that falls silent under a connection, in namespaces. Needs root."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from netlab import Lab, require_namespaces

from tesaiot_connect import Connection, Disconnected, Duration, PathLost, TlsOptions, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_tcp_tls import TcpTls
from tesaiot_connect_wss import Wss

pytestmark = pytest.mark.root


@pytest.fixture
def lab() -> Iterator[Lab]:
    require_namespaces()
    with Lab() as made:
        yield made


async def echo(connection: Connection) -> None:
    stream = await connection.accept_stream()
    while data := await stream.receive():
        await stream.send(data)


@pytest.mark.parametrize(
    ("kind", "scheme", "fault", "word"),
    [
        (TcpTls, "mqtt", "reject with icmp admin-prohibited", "is gone"),
        (TcpTls, "mqtt", "drop", "no longer answers"),
        (TcpTls, "mqtts", "drop", "no longer answers"),
        (Wss, "wss", "drop", "no longer answers"),
    ],
)
def test_a_silent_path_is_a_lost_path(
    kind: Any, scheme: str, fault: str, word: str, lab: Lab, certificates: Certificates
) -> None:
    async def main() -> None:
        listening = kind(
            Url.parse(f"{scheme}://{lab.server}:0"),
            server_tls=None if scheme == "mqtt" else certificates.server(lab.server),
        )
        server = listening.listen(echo)
        with lab.enter("sv"):
            url = Url.parse(await server.__aenter__())
        try:
            recipe = kind(
                url,
                tls=TlsOptions(ca_file=certificates.ca_file),
                keepalive_idle=Duration(1),
                keepalive_interval=Duration(1),
                keepalive_count=1,
            )
            with lab.enter("cl"):
                connection = await recipe.connect()
            stream = await connection.open_stream()
            await stream.send(b"it works")
            assert await stream.receive() == b"it works"
            lab._rule(f"tcp dport {url.port} {fault}")
            lab._rule(f"tcp sport {url.port} drop")
            await stream.send(b"does this arrive?")
            with pytest.raises(PathLost, match=word) as lost:
                async with asyncio.timeout(30):
                    await stream.receive()
            assert "goes on over the next endpoint" in lost.value.fix
            with pytest.raises(PathLost, match=word):
                await stream.send(b"and this?")
            lab.heal()
        finally:
            await server.__aexit__(None, None, None)

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "scheme"), [(TcpTls, "mqtts"), (Wss, "wss")])
def test_a_reset_is_no_lost_path(kind: Any, scheme: str, lab: Lab, certificates: Certificates) -> None:
    """The other side, or something in its name, said that it is over."""

    async def main() -> None:
        listening = kind(
            Url.parse(f"{scheme}://{lab.server}:0"),
            server_tls=None if scheme == "mqtt" else certificates.server(lab.server),
        )
        server = listening.listen(echo)
        with lab.enter("sv"):
            url = Url.parse(await server.__aenter__())
        try:
            with lab.enter("cl"):
                connection = await kind(url, tls=TlsOptions(ca_file=certificates.ca_file)).connect()
            stream = await connection.open_stream()
            await stream.send(b"it works")
            assert await stream.receive() == b"it works"
            lab._rule(f"tcp dport {url.port} reject with tcp reset")
            await stream.send(b"does this arrive?")
            with pytest.raises(Disconnected) as ended:
                async with asyncio.timeout(30):
                    await stream.receive()
            assert not isinstance(ended.value, PathLost)
            lab.heal()
        finally:
            await server.__aexit__(None, None, None)

    asyncio.run(main())
