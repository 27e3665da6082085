"""What a connection does about a path that fell silent: on loopback, and between two machines without I/O.

The networks themselves are in the project's tests/test_quic_networks.py, which needs root.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from aioquic.quic.configuration import QuicConfiguration

from tesaiot_connect import Connection, TlsOptions, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic, liveness
from tesaiot_connect_quic_aioquic.certificates import ServerIdentity, client_trust
from tesaiot_connect_quic_aioquic.connection import QuicConnection
from tesaiot_connect_quic_aioquic.dial import ClientEndpoint
from tesaiot_connect_quic_aioquic.endpoint import Windows
from tesaiot_connect_quic_aioquic.quic import Quic

CLIENT, SERVER = ("192.0.2.1", 1), ("192.0.2.2", 2)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


class Machines:
    """A client and a server whose datagrams travel in no time, by a clock of their own."""

    def __init__(self, certificates: Certificates, size: int) -> None:
        self.now = 100.0
        trust = client_trust(TlsOptions(ca_file=certificates.ca_file))
        windows = Windows(100_000, 100_000, 10)
        configuration = QuicConfiguration(
            is_client=True, alpn_protocols=["mqtt"], server_name="localhost", max_datagram_size=size
        )
        configuration.cadata = trust.cadata
        self.client = Quic(configuration, windows, clock=lambda: self.now)
        theirs = QuicConfiguration(is_client=False, alpn_protocols=["mqtt"], max_datagram_size=size)
        ServerIdentity(certificates.server()).apply(theirs)
        self.server = Quic(
            theirs,
            windows,
            clock=lambda: self.now,
            original_destination_connection_id=self.client.original_destination_connection_id,
        )
        self.client.connect(SERVER, self.now)
        for _ in range(20):
            self.exchange()
        assert self.client.confirmed

    def exchange(self, *, client_too: bool = True) -> None:
        if client_too:
            for data in self.sends(self.client):
                self.server.take_datagram(data, CLIENT, self.now)
        for data in self.sends(self.server):
            self.client.take_datagram(data, SERVER, self.now)
        self.now += 0.03  # so that delayed acknowledgements are due
        for one in (self.client, self.server):
            if one.due() <= self.now:
                one.handle_timer(self.now)

    def sends(self, one: Quic) -> list[bytes]:
        return [data for data, _ in one.make_datagrams(self.now)[0]]


def test_probes_go_on_at_least_once_a_second(certificates: Certificates) -> None:
    """However long the silence lasts: after it, the connection goes on at once."""
    machines = Machines(certificates, 1200)
    client = machines.client
    client.send_stream_data(client.next_stream_id(), bytes(10_000))
    times, end = [machines.now], machines.now + 20
    while machines.now < end:
        if machines.sends(client):
            times.append(machines.now)
        machines.now = client.due()
        client.handle_timer(machines.now)
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert max(gaps) < 1.1
    assert gaps[5] > 2 * gaps[1]  # it backs off nevertheless
    assert client.probe_timeouts < 40


def test_datagrams_get_small_where_large_ones_vanish(certificates: Certificates) -> None:
    machines = Machines(certificates, 1452)
    client = machines.client
    stream_id = client.next_stream_id()
    client.send_stream_data(stream_id, bytes(20_000))
    sizes = set()
    for _ in range(1000):
        for data in machines.sends(client):
            sizes.add(len(data))
            if len(data) <= 1252:  # all that the path takes
                machines.server.take_datagram(data, CLIENT, machines.now)
        machines.exchange(client_too=False)
        if client.sent_all(stream_id):
            break
    assert max(sizes) == 1452
    assert client.datagram_size == 1200
    assert client.sent_all(stream_id)


# --- on loopback


async def echo(connection: Connection) -> None:
    stream = await connection.accept_stream()
    while data := await stream.receive():
        await stream.send(data)


def over_loopback(certificates: Certificates, folder: Path, work: Any, **options: Any) -> None:
    async def main() -> None:
        listener = QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=certificates.server())
        async with asyncio.timeout(30), listener.listen(echo) as url:
            tls = TlsOptions(ca_file=certificates.ca_file)
            connection = await QuicAioquic(Url.parse(url), tls=tls, ticket_folder=folder, **options).connect()
            try:
                await work(cast("QuicConnection", connection))
            finally:
                connection.abort()

    asyncio.run(main())


def test_forged_refusals_end_nothing(certificates: Certificates, tmp_path: Path) -> None:
    """Anybody can send ICMP; the peer's answer to a PING shows that it is alive."""

    async def work(connection: QuicConnection) -> None:
        endpoint = cast("ClientEndpoint", connection._endpoint)
        loop = asyncio.get_running_loop()
        until = loop.time() + 1
        while loop.time() < until:
            endpoint._on_error(ConnectionRefusedError())
            await asyncio.sleep(0.001)
        await connection.probe()

    over_loopback(certificates, tmp_path, work)


def test_who_has_written_asks_whether_the_peer_is_alive(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once. A peer that died with our words would not be missed until the keepalive."""
    monkeypatch.setattr(liveness, "_LOOK", 0.05)

    async def work(connection: QuicConnection) -> None:
        pings: list[None] = []
        looks: list[None] = []
        ping, probing = connection.ping, connection._endpoint.probing
        monkeypatch.setattr(connection, "ping", lambda: (pings.append(None), ping()))
        monkeypatch.setattr(connection._endpoint, "probing", lambda one: (looks.append(None), probing(one)))

        async def three_looks() -> None:
            before = len(looks)
            while len(looks) < before + 3:
                await asyncio.sleep(0.01)

        await three_looks()
        assert pings == []
        for count in (1, 2):
            stream = await connection.open_stream()
            await stream.send(b"x")
            await three_looks()
            assert len(pings) == count

    over_loopback(certificates, tmp_path, work)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.1 is loopback's only address")
def test_an_address_that_was_asked_for_is_kept(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`local_address` need not be the one that the routing table prefers."""
    monkeypatch.setattr(liveness, "_LOOK", 0.02)

    async def work(connection: QuicConnection) -> None:
        endpoint = cast("ClientEndpoint", connection._endpoint)
        await asyncio.sleep(0.2)
        endpoint._checked = 0.0
        endpoint.probing(connection)
        await connection.probe()
        assert connection.status().migrations == 0
        assert endpoint.socket.local_address[0] == "127.0.0.5"

    over_loopback(certificates, tmp_path, work, local_address="127.0.0.5")
