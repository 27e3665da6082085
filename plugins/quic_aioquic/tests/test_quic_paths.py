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
from quic_ends import HOST, Relay, ask, client, echoing, run

from tesaiot_connect import Connection, Disconnected, PathLost, TlsOptions, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic, liveness
from tesaiot_connect_quic_aioquic.certificates import ServerIdentity, client_trust
from tesaiot_connect_quic_aioquic.connection import QuicConnection
from tesaiot_connect_quic_aioquic.dial import ClientEndpoint
from tesaiot_connect_quic_aioquic.endpoint import Tuning, Windows
from tesaiot_connect_quic_aioquic.figures import Figures
from tesaiot_connect_quic_aioquic.liveness import Liveness
from tesaiot_connect_quic_aioquic.quic import Quic

CLIENT, SERVER = ("192.0.2.1", 1), ("192.0.2.2", 2)


class Machines:
    """A client and a server by a clock of their own. Datagrams travel in no time, unless `way` says else."""

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

    def exchange(self, *, client_too: bool = True, way: float = 0.0) -> None:
        if client_too:
            sent = self.sends(self.client)
            self.now += way
            for data in sent:
                self.server.take_datagram(data, CLIENT, self.now)
        sent = self.sends(self.server)
        self.now += way
        for data in sent:
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
    options.setdefault("connect_timeout", 30.0)

    async def main() -> None:
        listener = QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=certificates.server())
        async with listener.listen(echo) as url:
            tls = TlsOptions(ca_file=certificates.ca_file)
            connection = await QuicAioquic(Url.parse(url), tls=tls, ticket_folder=folder, **options).connect()
            try:
                await work(cast("QuicConnection", connection))
            finally:
                connection.abort()

    run(main())


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


def test_who_has_written_or_received_asks_whether_the_peer_is_alive(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that died with our words would not be missed until the keepalive."""

    async def work(connection: QuicConnection) -> None:
        pings: list[None] = []
        ping, clock = connection.ping, asyncio.get_running_loop().time
        monkeypatch.setattr(connection, "ping", lambda: (pings.append(None), ping()))

        async def silence(seconds: float) -> None:
            while clock() - connection.status().last_received < seconds:
                await asyncio.sleep(0.01)

        await silence(0.3)
        assert pings == []
        stream = await connection.open_stream()
        await stream.send(b"x")
        assert await stream.receive() == b"x"
        while not pings:
            await asyncio.sleep(0.01)
        await silence(0.3)
        assert len(pings) == 1

    over_loopback(certificates, tmp_path, work, path_timeout=0.4, keepalive=0.0)


@pytest.mark.parametrize("minutes", [10])
def test_an_idle_connection_sends_a_packet_a_keepalive(certificates: Certificates, minutes: int) -> None:
    """And gets one: two real machines, by a clock of their own."""
    machines = Machines(certificates, 1200)
    client = machines.client
    figures = Figures(machines.now)
    tuning = Tuning(
        place="", send_buffer=0, handshake_timeout=1, idle_timeout=45, keepalive=15, path_timeout=5
    )
    life = Liveness(client, figures, tuning, client=True, clock=lambda: machines.now)
    client.send_stream_data(client.next_stream_id(), b"something, once")
    life.active()
    began, sent, packets = machines.now, client.packets_sent, client.packets_received
    while machines.now < began + 60 * minutes:
        if life.ping(machines.now):
            client.send_ping(1)
        machines.exchange(way=0.02)
        if client.waiting:
            life.sent(machines.now)
        assert not life.silent(machines.now)
        if client.packets_received != packets:
            packets, figures.last_received = client.packets_received, machines.now
            life.heard(machines.now)
        if not client.waiting:
            machines.now = min(max(machines.now, life.due()), client.due(), machines.server.due())
    assert client.ending is None
    assert 60 * minutes / 20 < client.packets_sent - sent <= 60 * minutes / 15 + 10


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


# --- whose fault it is


async def ends_by(connection: Connection) -> Disconnected:
    """As whoever reads from it is told."""
    stream = await connection.open_stream()
    with pytest.raises(Disconnected) as caught:
        await stream.receive()
    return caught.value


def test_silence_is_a_lost_path(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        dead = False
        async with echoing(certificates) as far, Relay(far.port, lambda *_: not dead) as relay:
            connection = await client(relay.url, certificates, tmp_path, path_timeout=0.4).connect()
            await ask(connection, b"it works")
            dead = True
            error = await ends_by(connection)
            assert isinstance(error, PathLost)
            assert "the broker has not answered for" in error.what
            assert "goes on over the next endpoint" in error.fix
            stream = await connection.wait_closed()
            assert not stream.by_peer
            with pytest.raises(PathLost):
                await connection.open_stream()

    run(main())


def test_a_quiet_reader_is_told_in_time(certificates: Certificates, tmp_path: Path) -> None:
    """It has nothing to send, and the keepalive is far: it asks by itself, since it was busy."""

    async def main() -> None:
        dead = False
        async with echoing(certificates) as far, Relay(far.port, lambda *_: not dead) as relay:
            recipe = client(relay.url, certificates, tmp_path, path_timeout=1.0, keepalive=100.0)
            connection = await recipe.connect()
            stream = await connection.open_stream()
            await stream.send(b"it works")
            assert await stream.receive() == b"it works"
            dead = True
            with pytest.raises(PathLost):
                await stream.receive()
            took = asyncio.get_running_loop().time() - connection.status().last_received
            assert 0.9 <= took < 10  # far from the keepalive, however slow this machine is
            far.connections[0].abort()

    run(main())


def test_the_idle_timeout_is_a_lost_path_too(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        dead = False
        async with echoing(certificates) as far, Relay(far.port, lambda *_: not dead) as relay:
            recipe = client(
                relay.url, certificates, tmp_path, path_timeout=0.0, keepalive=0.0, idle_timeout=1.0
            )
            connection = await recipe.connect()
            dead = True
            error = await ends_by(connection)
            assert isinstance(error, PathLost)
            assert "idle timeout" in error.what

    run(main())


def test_refusals_of_a_broker_that_is_gone_are_no_lost_path(
    certificates: Certificates, tmp_path: Path
) -> None:
    """The far end answers, and says that nobody is there."""

    async def main() -> None:
        async with echoing(certificates) as far:
            recipe = client(far.url, certificates, tmp_path, path_timeout=25.0, keepalive=0.2)
            connection = await recipe.connect()
            await ask(connection, b"it works")
            for accepted in far.connections:  # without a word, as a process that is killed
                cast("QuicConnection", accepted).lost(Disconnected("killed"))
        error = await ends_by(connection)
        assert not isinstance(error, PathLost)
        assert "nothing listens any more" in error.what

    run(main())


def test_a_broker_that_lost_its_memory_is_no_lost_path(certificates: Certificates, tmp_path: Path) -> None:
    """It was restarted without `state_file`: its stateless resets make no sense here, but it answers."""

    async def main() -> None:
        async with echoing(certificates) as far:
            recipe = client(far.url, certificates, tmp_path, path_timeout=25.0, keepalive=0.2)
            connection = await recipe.connect()
            await ask(connection, b"it works")
            for accepted in far.connections:
                cast("QuicConnection", accepted).lost(Disconnected("killed"))
            again = f"quic://{HOST}:{far.port}"
        async with echoing(certificates, host=again) as back:
            error = await ends_by(connection)
            assert not isinstance(error, PathLost)
            assert "does not know this connection any more" in error.what
            assert back.status().stateless_resets

    run(main())


def test_datagrams_of_strangers_end_nothing(certificates: Certificates, tmp_path: Path) -> None:
    """Whoever forges the broker's address would have to silence the broker too."""

    async def main() -> None:
        async with echoing(certificates) as far, Relay(far.port) as relay:
            connection = await client(relay.url, certificates, tmp_path).connect()
            loop = asyncio.get_running_loop()
            until = loop.time() + 1
            while loop.time() < until:
                relay.near.sendto(b"\x40" + bytes(60), relay._client)
                await asyncio.sleep(0.001)
            await ask(connection, b"it works")
            await connection.aclose()

    run(main())
