"""The client against our own broker over a network in memory that breaks on request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import attrs
import pytest

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions, MqttConnection, WillOptions
from tesaiot_connect.errors import Disconnected, PartialDelivery, PublishRefused, Refused
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import Credentials, Duration, Peer, Principal
from tesaiot_connect.server import Anybody, Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Faulty, Network

FAST = Backoff(min=Duration(0.01), max=Duration(0.05))


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await main

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def broker(
    network: Network, options: BrokerOptions | None = None, **listener: Any
) -> AsyncIterator[Broker]:
    server = Broker(options)
    async with server.serving([ListenerSpec("pair", network.transport(), **listener)]):
        yield server


def client(network: Network, client_id: str = "", *, faults: Faulty | None = None, **options: Any) -> Client:
    options.setdefault("reconnect", FAST)
    dialer = Negotiator([faults or network.transport()])
    return Client(dialer, ClientOptions(client_id=client_id, **options))


async def collect(reader: Any, count: int) -> list[Message]:
    got: list[Message] = []
    while len(got) < count:
        delivery = await reader.read()
        got += delivery.batch.messages
        await delivery.ack()
    return got


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_of_every_qos_arrive_in_order(protocol: str) -> None:
    async def main() -> None:
        network = Network()
        async with (
            broker(network),
            client(network, protocol=protocol) as subscriber,
            client(network, protocol=protocol) as publisher,
            subscriber.subscribe([Subscription("t/#", 2)]) as reader,
        ):
            await reader.grant()
            sent = [Message(f"t/{n % 7}", b"%d" % n, n % 3) for n in range(3000)]
            _, got = await asyncio.gather(publisher.publish(sent), collect(reader, len(sent)))
            by_qos = [[m.payload for m in got if m.qos == qos] for qos in range(3)]
            assert by_qos == [[m.payload for m in sent if m.qos == qos] for qos in range(3)]
            assert publisher.status.published == len(sent)
            assert subscriber.status.version == protocol

    run(main())


def test_qos_1_and_2_survive_a_connection_that_breaks_again_and_again() -> None:
    async def main() -> None:
        network = Network()
        cut = Faulty(network.transport(), drop_after=40_000)
        async with (
            broker(network),
            client(network, "reader", faults=cut) as subscriber,
            client(network, "writer", faults=attrs.evolve(cut)) as publisher,
            subscriber.subscribe([Subscription("t/#", 2)]) as reader,
        ):
            await reader.grant()
            sent = [Message("t/1", b"%d" % n, 1 + n % 2) for n in range(6000)]
            publishing = asyncio.create_task(publisher.publish(sent))
            seen: dict[bytes, int] = {}
            while len(seen) < len(sent):
                delivery = await reader.read()
                for message in delivery.batch.messages:
                    seen[message.payload] = seen.get(message.payload, 0) + 1
                await delivery.ack()
            await publishing
            assert set(seen) == {m.payload for m in sent}
            twice = [m.payload for m in sent if m.qos == 2 and seen[m.payload] != 1]
            assert not twice, "QoS 2 is exactly once"
            assert subscriber.status.connects > 3
            assert publisher.status.connects > 3

    run(main())


def test_resubscribes_only_when_the_session_was_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tesaiot_connect.client")

    async def main() -> None:
        network = Network()
        faults = Faulty(network.transport())
        async with client(network, "kept", faults=faults) as subscriber:
            async with subscriber.subscribe(["t"]) as reader:
                async with broker(network):
                    await subscriber.publish([Message("x", b"", 1)])  # its PUBACK is behind the SUBACK
                    await cut_off(subscriber)
                    await connects(subscriber, 2)
                    assert "session kept, not subscribing again" in caplog.text
                    assert "new session, subscribing" in caplog.text
                    caplog.clear()
                async with broker(network) as other:  # it knows nothing of the session
                    await connects(subscriber, 3)
                    assert "new session, subscribing" in caplog.text
                    while not other.stats.subscriptions:
                        await asyncio.sleep(0)
                    await other.publish([Message("t", b"again", 1)])
                    assert [m.payload for m in await collect(reader, 1)] == [b"again"]

    run(main())


async def cut_off(subscriber: Client) -> None:
    live = subscriber._live
    assert live is not None
    live.connection.abort()


async def connects(one: Client, count: int) -> None:
    while one.status.connects < count:
        await asyncio.sleep(0.001)


def test_a_nacked_delivery_comes_again() -> None:
    async def main() -> None:
        network = Network()
        async with (
            broker(network) as server,
            client(network, "c") as subscriber,
            subscriber.subscribe([Subscription("t", 2)]) as reader,
        ):
            await subscriber.connected()
            while not server.stats.subscriptions:
                await asyncio.sleep(0)
            await server.publish([Message("t", b"one", 1), Message("t", b"two", 2)])
            delivery = await reader.read()
            first = [m.payload for m in delivery.batch.messages]
            await delivery.nack(RuntimeError("the sink is full"))
            again = await collect(reader, 2)
            assert first and first == [m.payload for m in again][: len(first)]
            assert subscriber.status.connects == 2

    run(main())


def test_an_old_delivery_settled_after_a_reconnect_does_no_harm() -> None:
    async def main() -> None:
        network = Network()
        async with (
            broker(network) as server,
            client(network, "c") as subscriber,
            subscriber.subscribe([Subscription("t", 2)]) as reader,
        ):
            await subscriber.connected()
            while not server.stats.subscriptions:
                await asyncio.sleep(0)
            await server.publish([Message("t", b"two", 2)])
            delivery = await reader.read()
            await cut_off(subscriber)
            await connects(subscriber, 2)
            await delivery.ack()  # the session holds it: its DUP brings nothing new
            await server.publish([Message("t", b"next", 2)])
            assert [m.payload for m in await collect(reader, 1)] == [b"next"]

    run(main())


def test_what_comes_while_nobody_reads_stays_at_the_broker() -> None:
    async def main() -> None:
        network = Network()
        async with broker(network) as server:
            async with client(network, "c") as subscriber, subscriber.subscribe(["t"]):
                await subscriber.connected()
                while not server.stats.subscriptions:
                    await asyncio.sleep(0)
            await server.publish([Message("t", b"%d" % n, 1) for n in range(10)])
            async with client(network, "c") as subscriber:
                async with subscriber.subscribe(["t"]):
                    await subscriber.connected()
                    while subscriber.status.received < 10:  # they arrive here, but are not settled
                        await asyncio.sleep(0.001)
            async with client(network, "c") as subscriber, subscriber.subscribe(["t"]) as reader:
                got = await collect(reader, 10)
                assert [m.payload for m in got] == [b"%d" % n for n in range(10)]

    run(main())


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_sources_of_one_connection_share_a_client(protocol: str) -> None:
    async def main() -> None:
        network = Network()
        async with broker(network) as server:
            connection = MqttConnection(
                "shared",
                Negotiator([network.transport()]),
                ClientOptions(client_id="one", protocol=protocol, reconnect=FAST),  # type: ignore[arg-type]
            )
            async with (
                connection.source_client() as first,
                connection.source_client() as second,
                connection.sink_client() as sink,
                first.subscribe(["a/+"]) as a,
                second.subscribe(["b/#"]) as b,
            ):
                assert first is second
                await first.connected()
                while server.stats.subscriptions < 2:
                    await asyncio.sleep(0)
                await sink.publish([Message(t, t.encode(), 1) for t in ("a/1", "b/1", "a/2", "b/2")])
                assert [m.topic for m in await collect(a, 2)] == ["a/1", "a/2"]
                assert [m.topic for m in await collect(b, 2)] == ["b/1", "b/2"]
                assert sink.status.client_id == "one-sink"
                assert server.stats.clients == 2

    run(main())


def test_a_reader_that_lags_stops_the_socket_not_the_memory() -> None:
    async def main() -> None:
        network = Network(buffer=4096)
        async with (
            broker(network, BrokerOptions(receive_maximum=65535, max_inflight=65535)) as server,
            client(network, "slow") as subscriber,
            subscriber.subscribe([Subscription("t", 1)], max_messages=50) as reader,
        ):
            await subscriber.connected()
            while not server.stats.subscriptions:
                await asyncio.sleep(0)
            await server.publish([Message("t", b"x" * 100, 1) for _ in range(5000)])
            for _ in range(200):
                await asyncio.sleep(0)
            held = subscriber.status.received
            assert held < 1000, "it read on although nobody took what it had"
            assert len(await collect(reader, 5000)) == 5000

    run(main())


def test_refused_messages_are_named_and_the_others_delivered() -> None:
    async def main() -> None:
        network = Network()
        options = BrokerOptions(deny_publish=("secret/#",), max_packet_size=2048)  # type: ignore[arg-type]
        async with broker(network, options), client(network) as publisher:
            batch = [
                Message("open", b"", 1),
                Message("secret/1", b"", 1),
                Message("open", b"x" * 4000, 1),
                Message("open", b"x" * 4000, 0),
                Message("open", b"", 2),
            ]
            with pytest.raises(PartialDelivery) as caught:
                await publisher.publish(batch)
            failures = caught.value.failures
            assert sorted(failures) == [1, 2, 3]
            assert all(isinstance(error, PublishRefused) for error in failures.values())
            assert "not authorized" in str(failures[1])
            assert "packet too large" in str(failures[2])

    run(main())


@attrs.frozen
class Doorman:
    """Lets nobody in without the right password."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        if credentials.password != b"right":
            raise Refused("bad password", reason_code=0x86, permanent=True)
        return Anybody()


@attrs.frozen
class Password:
    """An auth recipe, as a plugin would bring it."""

    password: bytes
    origin: str = "connections.x.auth.password"

    async def begin(self) -> Any:
        return _Login(Credentials(username="u", password=self.password, origin=self.origin))

    async def identity(self) -> None:
        return None


@attrs.frozen
class _Login:
    credentials: Credentials

    async def respond(self, data: bytes, /) -> bytes:
        raise AssertionError("no challenge is expected")

    async def finish(self, data: bytes, /) -> None:
        pass


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_refusal_names_where_the_credentials_are_set(protocol: str) -> None:
    async def main() -> None:
        network = Network()
        options = ClientOptions(protocol=protocol, reconnect=FAST)  # type: ignore[arg-type]
        async with broker(network, authenticator=Doorman()):
            async with Client(Negotiator([network.transport()]), options, auth=Password(b"wrong")) as refused:
                with pytest.raises(Refused, match=r"connections\.x\.auth\.password") as caught:
                    await refused.connected()
                assert caught.value.permanent
            async with Client(Negotiator([network.transport()]), options, auth=Password(b"right")) as allowed:
                await allowed.connected()

    run(main())


def test_a_refusal_without_an_origin_names_the_connection() -> None:
    async def main() -> None:
        network = Network()
        auth = attrs.evolve(Password(b"wrong"), origin="")
        async with broker(network, authenticator=Doorman()):
            dialer = Negotiator([network.transport()])
            async with Client(dialer, ClientOptions(reconnect=FAST), auth=auth, name="c") as refused:
                with pytest.raises(Refused, match="check the `auth` table of c"):
                    await refused.connected()
            async with client(network) as nameless:
                with pytest.raises(Refused, match="set `auth`"):
                    await nameless.connected()

    run(main())


def test_a_will_goes_to_a_topic_not_to_a_filter() -> None:
    with pytest.raises(ValueError, match="without wildcards"):
        WillOptions(topic="a/#")


def test_a_refused_filter_fails_its_reader() -> None:
    async def main() -> None:
        network = Network()
        async with (
            broker(network, BrokerOptions(deny_subscribe=("no/#",))),
            client(network) as subscriber,
            subscriber.subscribe(["no/way"]) as reader,
        ):
            with pytest.raises(Refused, match="no/way"):
                await reader.read()

    run(main())


def test_dialling_goes_on_until_the_broker_is_there() -> None:
    async def main() -> None:
        network = Network()
        async with client(network) as publisher:
            publishing = asyncio.create_task(publisher.publish([Message("t", b"", 1)]))
            while "nobody listens" not in publisher.status.last_error:
                await asyncio.sleep(0.001)
            async with broker(network) as server:
                await publishing
                assert server.stats.received == 1

    run(main())


def test_a_taken_over_session_says_who_to_look_for(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        network = Network()
        slow = Backoff(min=Duration(1e6), max=Duration(1e6))
        async with broker(network), client(network, "same", reconnect=slow) as first:
            await first.connected()
            async with client(network, "same", reconnect=slow) as second:
                await second.connected()
                while first.status.state != "waiting":
                    await asyncio.sleep(0.001)
                assert "another client uses the client_id 'same'" in first.status.last_error

    run(main())


def test_the_will_is_published_when_the_client_vanishes_and_only_then() -> None:
    async def main() -> None:
        network = Network()
        will = WillOptions(topic="gone", payload="bye")
        async with (
            broker(network) as server,
            client(network, "watcher") as watcher,
            watcher.subscribe(["gone"]) as reader,
        ):
            await watcher.connected()
            while not server.stats.subscriptions:
                await asyncio.sleep(0)
            async with client(network, "orderly", will=will) as orderly:
                await orderly.connected()
            async with client(network, "vanishing", will=will) as vanishing:
                await vanishing.connected()
                await cut_off(vanishing)
                assert [m.payload for m in await collect(reader, 1)] == [b"bye"]

    run(main())


def test_calls_on_a_closed_client_fail_instead_of_waiting() -> None:
    async def main() -> None:
        network = Network()
        one = client(network)
        with pytest.raises(Disconnected, match="not open"):
            await one.publish([Message("t", b"", 1)])
        async with one, one.subscribe(["t"]) as reader:
            reading = asyncio.create_task(reader.read())
            publishing = asyncio.create_task(one.publish([Message("t", b"", 1)]))
            await asyncio.sleep(0)
        for task in (reading, publishing):
            with pytest.raises(Disconnected, match="closed"):
                await task

    run(main())


def test_a_cancelled_publish_is_forgotten_and_blocks_nobody() -> None:
    async def main() -> None:
        network = Network()
        async with client(network) as publisher:
            lost = asyncio.create_task(publisher.publish([Message("t", b"lost", 1)]))
            await asyncio.sleep(0)
            lost.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await lost
            async with broker(network) as server:
                await publisher.publish([Message("t", b"kept", 1)])
                assert server.stats.received == 1

    run(main())
