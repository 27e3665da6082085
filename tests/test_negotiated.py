"""Negotiation over real transports: QUIC and TLS on loopback, and our broker behind both."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from scripted_endpoints import run, until

from tesaiot_connect import (
    Broker,
    Client,
    ClientCertificate,
    ClientOptions,
    Connection,
    Credentials,
    Dialed,
    Duration,
    ListenerSpec,
    NegotiationOptions,
    Negotiator,
    Peer,
    TlsOptions,
    Url,
)
from tesaiot_connect.access import Anybody
from tesaiot_connect.errors import PathLost
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls

HOST = "127.0.0.1"
EARLY = b"CONNECT, perhaps"
SOON = Duration(0.05)
NEVER = Duration(600.0)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets are counted in /proc")


class Counting:
    """An authenticator that lets everybody in, and counts CONNECTs."""

    def __init__(self) -> None:
        self.connects: list[str] = []

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Anybody:
        self.connects.append(peer.transport)
        return Anybody()


class Overheard:
    """A transport, and what its attempts were given as early data."""

    schemes: ClassVar[Mapping[str, int]] = {}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    def __init__(self, inner: Any) -> None:
        self.url = inner.url
        self.early: list[bytes] = []
        self._inner = inner

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.early.append(early)
        connection: Connection = await self._inner.connect(identity=identity, early=early)
        return connection


class Served:
    """Our broker: where it is, and the recipes and dialers of its clients."""

    def __init__(self, urls: list[str], counting: Counting, certificates: Certificates, folder: Path) -> None:
        self.quic_url, self.tls_url = urls
        self.connects = counting.connects
        self.tickets = folder / "tickets"
        self._memory = folder / "memory"
        self._tls = TlsOptions(ca_file=certificates.ca_file)

    def quic(self, url: str = "") -> QuicAioquic:
        return QuicAioquic(Url.parse(url or self.quic_url), tls=self._tls, ticket_folder=self.tickets)

    def tls(self) -> TcpTls:
        return TcpTls(Url.parse(self.tls_url), tls=self._tls)

    def dialer(self, *endpoints: Any, race_delay: Duration = NEVER) -> Negotiator:
        options = NegotiationOptions(race_delay=race_delay, memory_folder=self._memory)
        return Negotiator(endpoints or (self.quic(), self.tls()), options)


@asynccontextmanager
async def serving(certificates: Certificates, folder: Path) -> AsyncIterator[Served]:
    server, counting = certificates.server(HOST), Counting()
    specs = [
        ListenerSpec("quic", QuicAioquic(Url.parse(f"quic://{HOST}:0"), server_tls=server), counting),
        ListenerSpec("tls", TcpTls(Url.parse(f"mqtts://{HOST}:0"), server_tls=server), counting),
    ]
    async with Broker().serving(specs) as urls:
        yield Served(urls, counting, certificates, folder)


@contextmanager
def silent() -> Iterator[str]:
    """URL of a UDP port that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST, 0))
        yield f"quic://{HOST}:{sock.getsockname()[1]}"


def won(dialed: Dialed) -> list[tuple[str, str]]:
    return [(attempt.endpoint.partition(":")[0], attempt.outcome) for attempt in dialed.attempts]


def quic_of(dialed: Dialed) -> Any:
    return dialed.connection.status().quic


def sockets() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(entry))  # noqa: PTH115 - "socket:[123]" is no path
        except OSError:  # the folder's own descriptor
            continue
    return {one for one in found if one.startswith("socket:")}


def test_where_udp_is_silent_tls_wins_and_is_first_from_then_on(
    certificates: Certificates, folder: Path
) -> None:
    async def main() -> None:
        async with serving(certificates, folder) as served:
            with silent() as nowhere:
                quic, tls = Overheard(served.quic(nowhere)), Overheard(served.tls())
                dialed = await served.dialer(quic, tls, race_delay=SOON).dial(early=EARLY)
                assert won(dialed) == [("quic", "lost"), ("mqtts", "won")]
                assert (quic.early, tls.early) == ([b""], [b""]), "nobody is trusted yet"
                await dialed.connection.aclose()
                again = served.dialer(quic, tls, race_delay=SOON)
                tried = [one.place for one in again.outlook()]
                assert tried == [1, 0]
                dialed = await again.dial(early=EARLY)
                assert won(dialed)[0] == ("mqtts", "won")
                assert (quic.early[1:], tls.early[1:]) in (([], [EARLY]), ([b""], [EARLY]))
                assert again.better_after(dialed) is not None
                await dialed.connection.aclose()

    run(main())


def test_where_both_are_open_quic_wins_and_resumes(certificates: Certificates, folder: Path) -> None:
    async def main() -> None:
        async with serving(certificates, folder) as served:
            # a ticket from a time that memory does not know of
            known = await served.quic().connect()
            await until(lambda: list(served.tickets.glob("*.ticket")))
            await known.aclose()
            first = await served.dialer().dial(early=EARLY)
            assert won(first) == [("quic", "won")]
            assert quic_of(first).resumed
            assert not first.connection.early_sent, "memory does not trust it yet"
            await until(lambda: list(served.tickets.glob("*.ticket")))
            await first.connection.aclose()
            dialer = served.dialer()
            second = await dialer.dial(early=EARLY)
            assert won(second) == [("quic", "won")]
            assert second.connection.early_sent
            assert quic_of(second).early_data_accepted
            second.connection.abort()
            dialer.lost(second, PathLost("silence"))
            third = await dialer.dial(early=EARLY)
            assert won(third) == [("mqtts", "won")]
            await third.connection.aclose()

    run(main())


def test_a_client_certificate_leaves_quic_out(certificates: Certificates, folder: Path) -> None:
    async def main() -> None:
        async with serving(certificates, folder) as served:
            dialer = served.dialer()
            dialed = await dialer.dial(identity=certificates.client())
            assert won(dialed) == [("quic", "left out"), ("mqtts", "won")]
            assert "certificate" in dialed.attempts[0].reason
            assert dialed.attempts[0].fix
            assert dialer.better_after(dialed) is None
            assert [one.place for one in dialer.outlook()] == [0, 1], "no penalty"
            await dialed.connection.aclose()

    run(main())


def test_from_a_fallback_back_to_quic(certificates: Certificates, folder: Path) -> None:
    async def main() -> None:
        async with serving(certificates, folder) as served:
            dialer = served.dialer()
            dialer.lost(await close(await dialer.dial()), PathLost("silence"))
            fallback = await dialer.dial()
            assert won(fallback) == [("mqtts", "won")]
            due = dialer.better_after(fallback)
            assert due is not None
            dialer._clock = lambda: due
            better = await dialer.better(fallback)
            assert (better.place, better.connection.peer.transport) == (0, "quic_aioquic")
            for dialed in (fallback, better):
                await close(dialed)

    run(main())


async def close(dialed: Dialed) -> Dialed:
    await dialed.connection.aclose()
    return dialed


@pytest.mark.parametrize("way", ["raced", "udp is silent", "in turn"])
def test_one_connect_reaches_the_broker(certificates: Certificates, folder: Path, way: str) -> None:
    """Whoever else was on its way."""

    async def main() -> None:
        async with serving(certificates, folder) as served:
            with silent() as nowhere:
                quic = served.quic(nowhere if way == "udp is silent" else "")
                delay = {"raced": Duration(0.0), "udp is silent": SOON}.get(way, NEVER)
                dialer = served.dialer(quic, served.tls(), race_delay=delay)
                for number in range(1, 4):
                    options = ClientOptions(client_id="one", clean_session=number % 2 == 1)
                    async with Client(dialer, options) as client:
                        await client.connected()
                        assert len(served.connects) == number
                    assert len(served.connects) == number

    run(main())


@linux
@pytest.mark.parametrize("way", ["raced", "udp is silent", "cancelled"])
def test_no_socket_is_left(certificates: Certificates, folder: Path, way: str) -> None:
    async def main() -> None:
        async with serving(certificates, folder) as served:
            with silent() as nowhere:
                before = sockets()
                quic = served.quic(nowhere if way == "udp is silent" else "")
                delay = SOON if way == "udp is silent" else Duration(0.0)
                for turns in range(0, 60, 3):
                    dialer = served.dialer(quic, served.tls(), race_delay=delay)
                    dialing = asyncio.create_task(dialer.dial(early=EARLY))
                    if way == "cancelled":
                        for _ in range(turns):
                            await asyncio.sleep(0.0003)
                        dialing.cancel()
                        await asyncio.wait([dialing])
                    if not dialing.cancelled():
                        (await dialing).connection.abort()
                await until(lambda: sockets() <= before)

    run(main())
