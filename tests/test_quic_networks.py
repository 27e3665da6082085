"""MQTT over QUIC on networks that change and fail under it. Needs root: each test makes its namespaces.

Client `cl` - NAT router `rt` - broker `sv`. Where the connection should live on, the client must have
connected once and the broker's subscriber must have got every message once.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab import Lab, require_namespaces
from quic_peers import (
    PORT,
    TOPIC,
    Keeping,
    Moved,
    Served,
    Streams,
    apart,
    gives_up_after,
    serving,
    until,
)

from tesaiot_connect import (
    BrokerOptions,
    Client,
    ConnectFailed,
    Connection,
    Disconnected,
    Duration,
    Message,
    PathLost,
    Reader,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import liveness
from tesaiot_connect_quic_aioquic.connection import QuicConnection

pytestmark = pytest.mark.root

COUNT = 20_000


@pytest.fixture
def lab() -> Iterator[Lab]:
    require_namespaces()
    with Lab() as made:
        yield made


@pytest.fixture
def served(lab: Lab, certificates: Certificates) -> Iterator[Served]:
    with serving(lab, certificates, BrokerOptions(drain_timeout=Duration(0.2))) as found:
        yield found


@pytest.fixture
def moved(lab: Lab, served: Served, certificates: Certificates, tmp_path: Path) -> Moved:
    return Moved(lab, served, certificates, tmp_path)


async def why_it_ended(connection: Connection) -> Disconnected:
    """As whoever reads from it is told."""
    stream = await connection.open_stream()
    with pytest.raises(Disconnected) as caught:
        await stream.receive()
    return caught.value


def silence_in(error: Disconnected) -> int:
    """For how many seconds the broker had not answered, as the error says."""
    found = re.search(r"has not answered for (\d+) s", error.what)
    assert found is not None, error.what
    return int(found[1])


# --- moves


@pytest.mark.parametrize("rounds", [2])
def test_a_nat_rebind_in_mid_stream(moved: Moved, rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        for _ in range(rounds):
            await moved.publish(client, COUNT, lambda: apart(moved.lab.rebind_nat))
        moved.check(client)
        assert moved.served.status().migrations == rounds
        assert caplog.text.count("a client moved from 10.99.2.1:") == rounds

    with caplog.at_level("INFO"):
        moved.run(test)


@pytest.mark.parametrize("rounds", [2])
def test_a_new_address_in_mid_stream(moved: Moved, rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        for _ in range(rounds):
            await moved.publish(client, COUNT, lambda: apart(moved.lab.move_client))
        moved.check(client)
        status = dialer.connections[0].status()
        assert status.migrations == rounds
        assert status.quic is not None and status.quic.migrations == rounds
        assert moved.served.status().migrations == rounds
        assert caplog.text.count("moved to another local address") == rounds

    with caplog.at_level("INFO"):
        moved.run(test)


def test_migration_on_request_in_mid_stream(moved: Moved) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        (connection,) = dialer.connections
        for _ in range(5):
            await moved.publish(client, 4000, connection.migrate)
        moved.check(client)
        assert connection.status().migrations == 5
        assert moved.served.status().migrations == 5

    moved.run(test)


@pytest.mark.parametrize("streams", ["single", "per-topic"])
def test_moves_of_a_client_that_receives_as_much_as_it_sends(moved: Moved, streams: Streams) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        echoed: list[int] = []

        async def receive(reader: Reader) -> None:
            while True:
                delivery = await reader.read()
                echoed.extend(int(message.payload) for message in delivery.batch.messages)
                await delivery.ack()

        async with client.subscribe([f"{TOPIC}/#"]) as reader:
            receiving = asyncio.create_task(receive(reader))
            while not echoed:  # until it is subscribed
                await client.publish([Message(TOPIC, b"-1", qos=1)])
            for change in (moved.lab.rebind_nat, moved.lab.move_client, moved.lab.rebind_nat):
                await moved.publish(client, 4000, lambda change=change: apart(change))  # type: ignore[misc]
            numbers = set(range(moved.sent))
            await until(lambda: numbers <= set(echoed))
            receiving.cancel()
            await asyncio.wait([receiving])
        assert len([one for one in echoed if one >= 0]) == moved.sent
        moved.check(client)
        assert moved.served.status().migrations == 3
        assert (client.status.streams > 1) == (streams == "per-topic")

    moved.run(test, streams=streams)


def test_more_moves_than_connection_ids(moved: Moved) -> None:
    """While nothing comes through, no new ids come either."""

    async def test(client: Client, dialer: Keeping) -> None:
        async def wander() -> None:
            (connection,) = dialer.connections
            await apart(moved.lab.drop_udp, PORT)
            for _ in range(9):
                before = connection.status().migrations
                await apart(moved.lab.move_client)
                while connection.status().migrations == before:
                    await asyncio.sleep(0.005)
            await apart(moved.lab.heal)

        await moved.publish(client, 4000, wander)
        moved.check(client)

    moved.run(test, path_timeout=60.0, keepalive=1.0)


def test_a_link_that_goes_and_comes_back_with_another_address(moved: Moved) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        (connection,) = dialer.connections

        async def roam() -> None:
            await apart(moved.lab.ip, "cl", "link", "set", "c0", "down")
            before = connection.status().last_received
            await until(lambda: asyncio.get_running_loop().time() - before > 1)
            await apart(moved.lab.ip, "cl", "link", "set", "c0", "up")
            await apart(moved.lab.move_client)

        await moved.publish(client, 4000, roam)
        moved.check(client)
        assert connection.status().migrations == 1

    moved.run(test)


def test_a_client_that_only_listens_notices_its_new_address(
    moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "_LOOK", 0.5)

    async def test(client: Client, dialer: Keeping) -> None:
        async with client.subscribe(["to/me"]) as reader:
            reading = asyncio.create_task(reader.read())
            while not reading.done():
                await client.publish([Message("to/me", b"first")])
                await asyncio.wait([reading], timeout=0.05)
            await (await reading).ack()
            await client.publish([Message("to/me", b"kept", qos=1)])
            await (await reader.read()).ack()
            await apart(moved.lab.move_client)
            await until(lambda: moved.served.status().migrations == 1, seconds=40)
        assert dialer.connections[0].status().migrations == 1
        assert client.status.connects == 1

    moved.run(test, keepalive=60.0)


# --- losses and silence


def test_a_fifth_of_all_packets_lost(moved: Moved) -> None:
    moved.lab.lose(20)

    async def test(client: Client, dialer: Keeping) -> None:
        first = len(dialer.connections)
        await moved.publish(client, 2000, lambda: asyncio.sleep(0))
        assert moved.served.seen == set(range(moved.sent))
        status = dialer.connections[-1].status()
        assert status.lost
        assert client.status.connects == first == 1

    moved.run(test, connect_timeout=30.0)


def test_three_seconds_without_udp(moved: Moved) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        async def outage() -> None:
            await apart(moved.lab.drop_udp, PORT)
            await asyncio.sleep(3)  # the subject
            await apart(moved.lab.heal)

        await moved.publish(client, 4000, outage)
        moved.check(client)
        assert dialer.connections[0].status().migrations == 0

    moved.run(test, path_timeout=30.0)


def test_a_lost_packet_after_a_long_rest_is_not_a_dead_path(moved: Moved) -> None:
    """The path's timeout begins with the question, not with the last answer."""

    async def test(client: Client, dialer: Keeping) -> None:
        connection = dialer.connections[0]
        assert isinstance(connection, QuicConnection)
        await until(lambda: not connection.quic.waiting)
        # it has rested for longer than the timeout
        connection.figures.last_received -= 1000
        connection._liveness._alive -= 1000
        await apart(moved.lab.drop_udp, PORT)
        before = connection.quic.probe_timeouts
        probe = asyncio.create_task(connection.probe())
        await until(lambda: connection.quic.probe_timeouts >= before + 4)
        await apart(moved.lab.heal)
        await probe
        assert connection.status().close_reason is None

    moved.run(test, keepalive=0.0)


def test_a_path_that_is_gone_is_noticed(moved: Moved) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        (connection,) = dialer.connections
        ending = asyncio.create_task(why_it_ended(connection))

        async def gone() -> None:
            gives_up_after(connection, 1.0)
            await apart(moved.lab.drop_udp, PORT)
            error = await ending
            assert isinstance(error, PathLost)
            assert 1 <= silence_in(error) < 40  # far from the other timeouts, however slow this machine is
            assert "UDP is blocked" in error.fix
            await apart(moved.lab.heal)

        await moved.publish(client, 4000, gone)
        assert moved.served.seen == set(range(moved.sent))
        assert client.status.connects == 2

    moved.run(test, keepalive=1.0)


def test_the_broker_notices_that_a_client_is_gone(moved: Moved) -> None:
    async def main() -> None:
        connection = await moved.recipe(idle_timeout=4.0, path_timeout=0.0, keepalive=0.0).connect()
        assert moved.served.status().accepted == 1
        await apart(moved.lab.drop_udp, PORT)
        await until(lambda: moved.served.status().connections == 0)
        assert "idle timeout" in (await connection.wait_closed()).text

    moved.run_alone(main())


def test_refusals_end_a_connection_that_had_worked(moved: Moved) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        (connection,) = dialer.connections
        ending = asyncio.create_task(why_it_ended(connection))

        async def refused() -> None:
            await apart(moved.lab.reject_udp, PORT)
            async with asyncio.timeout(40):
                error = await ending
            assert "nothing listens any more" in error.what
            assert not isinstance(error, PathLost)  # the next attempt hears it at once
            await apart(moved.lab.heal)

        await moved.publish(client, 4000, refused)
        assert moved.served.seen == set(range(moved.sent))
        assert client.status.connects == 2

    moved.run(test, path_timeout=60.0, keepalive=1.0)


def test_what_the_system_says_of_a_lost_path(moved: Moved) -> None:
    """A router's word is no reason to give up before the time: networks find other ways."""

    async def test(client: Client, dialer: Keeping) -> None:
        (connection,) = dialer.connections
        ending = asyncio.create_task(why_it_ended(connection))

        async def prohibited() -> None:
            gives_up_after(connection, 2.0)
            await apart(moved.lab._rule, f"udp dport {PORT} reject with icmp admin-prohibited")
            error = await ending
            assert isinstance(error, PathLost)
            assert "the system says: No route to host" in error.what
            await apart(moved.lab.heal)

        await moved.publish(client, 4000, prohibited)
        assert moved.served.seen == set(range(moved.sent))

    moved.run(test, keepalive=1.0)


def test_a_client_that_only_listens_leaves_a_dead_path(moved: Moved) -> None:
    """It was busy lately, so it asks long before its keepalive."""

    async def test(client: Client, dialer: Keeping) -> None:
        loop = asyncio.get_running_loop()
        (connection,) = dialer.connections
        async with client.subscribe(["to/me"]) as reader:
            reading = asyncio.create_task(reader.read())
            while not reading.done():
                await client.publish([Message("to/me", b"first", qos=1)])
                await asyncio.wait([reading], timeout=0.05)
            await (await reading).ack()
            await apart(moved.lab.drop_udp, PORT)
            await connection.wait_closed()
            silence = loop.time() - connection.status().last_received
            assert 1.9 <= silence < 50
            await apart(moved.lab.heal)
            await until(lambda: client.status.connects == 2)

    moved.run(test, path_timeout=2.0, keepalive=60.0, idle_timeout=60.0)


# --- path MTU


def test_a_path_of_1280_bytes(moved: Moved) -> None:
    moved.lab.mtu(1280)

    async def test(client: Client, dialer: Keeping) -> None:
        await moved.publish(client, 4000, lambda: asyncio.sleep(0))
        moved.check(client)

    moved.run(test)


def test_a_path_of_1100_bytes_is_named_as_the_reason(moved: Moved) -> None:
    moved.lab.mtu(1100)

    async def main() -> None:
        with pytest.raises(ConnectFailed) as caught:
            await moved.recipe(connect_timeout=1.0).connect()
        assert "packets of 1228 bytes, and this one takes 1100" in caught.value.what
        assert "raise the MTU" in caught.value.fix

    moved.run_alone(main())


def test_a_path_that_becomes_narrower(certificates: Certificates, lab: Lab, tmp_path: Path) -> None:
    """From 1500 to 1280 bytes: datagrams become smaller, in both directions."""
    with serving(lab, certificates, max_datagram_size=1452) as served:
        moved = Moved(lab, served, certificates, tmp_path)

        async def test(client: Client, dialer: Keeping) -> None:
            await moved.publish(client, 4000, lambda: apart(lab.mtu, 1280))
            moved.check(client)
            status = dialer.connections[0].status().quic
            assert status is not None and status.path_mtu == 1200
            async with client.subscribe([f"{TOPIC}/big"]) as reader:
                reading = asyncio.create_task(reader.read())
                while not reading.done():  # until it is subscribed
                    await client.publish([Message(f"{TOPIC}/big", b"%-*d" % (300_000, -2), qos=1)])
                    await asyncio.wait([reading], timeout=0.1)
                delivery = await reading
                assert len(delivery.batch.messages[0].payload) == 300_000
                await delivery.ack()
            assert client.status.connects == 1

        moved.run(test, max_datagram_size=1452)


def test_larger_datagrams_than_the_path_takes(certificates: Certificates, lab: Lab, tmp_path: Path) -> None:
    """From the start: the handshake takes longer, no more."""
    lab.mtu(1280)
    with serving(lab, certificates, max_datagram_size=1452) as served:
        moved = Moved(lab, served, certificates, tmp_path)

        async def test(client: Client, dialer: Keeping) -> None:
            await moved.publish(client, 4000, lambda: asyncio.sleep(0))
            moved.check(client)

        moved.run(test, max_datagram_size=1452)


def test_a_path_that_becomes_too_narrow_for_quic(moved: Moved) -> None:
    async def test(client: Client, dialer: Keeping) -> None:
        (connection,) = dialer.connections
        ending = asyncio.create_task(why_it_ended(connection))
        gives_up_after(connection, 1.0)
        await apart(moved.lab.mtu, 1100)
        while not ending.done():
            await client.publish([Message(TOPIC, b"%-*d" % (5000, -2))])
            await asyncio.wait([ending], timeout=0.01)
        error = await ending
        assert isinstance(error, PathLost)
        assert 1 <= silence_in(error) < 40
        assert "packets of 1228 bytes, and this one takes 1100" in error.what

    moved.run(test, keepalive=1.0)
