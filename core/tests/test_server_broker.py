"""The broker over connections in memory: what clients see of it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_peer import EnginePeer

from tesaiot_connect.errors import ConnectFailed, ConnectorError, Refused
from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt.packets import Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.protocols import Challenge, Credentials, Duration, Peer, Principal, Size
from tesaiot_connect.server import (
    Anonymous,
    Anybody,
    Broker,
    BrokerOptions,
    ListenerSpec,
    store as store_module,
)
from tesaiot_connect.testing import Network, PairTransport


@asynccontextmanager
async def broker(
    authenticator: Any = None, *, buffer: int = 65536, **options: Any
) -> AsyncIterator[tuple[Broker, PairTransport]]:
    transport = Network(buffer).transport()
    live = Broker(BrokerOptions(**options))
    async with live.serving([ListenerSpec("pair", transport, authenticator or Anonymous())]):
        yield live, transport


def run(test: Callable[[Broker, PairTransport], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), broker(**options) as (live, transport):
            await test(live, transport)

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_message_reaches_who_subscribed(version: int, qos: int) -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        reader = await EnginePeer.open(transport, "reader", version=version)
        writer = await EnginePeer.open(transport, "writer", version=version)
        await reader.connack()
        await writer.connack()
        assert await reader.subscribe("a/+", "b", qos=2) == (2, 2)
        await writer.publish(
            *(Message("a/b", str(n).encode(), qos) for n in range(500)), Message("c", b"", qos)
        )
        found = await reader.received(500)
        assert [message.payload for message in found] == [str(n).encode() for n in range(500)]
        assert {message.qos for message in found} == {qos}
        await reader.nothing_more()
        await until(lambda: live.stats.queued_bytes == 0)
        assert live.stats.clients == 2

    run(test)


def test_the_ten_lines_of_an_embedder() -> None:
    async def main() -> list[Message]:
        transport = Network().transport()
        broker = Broker(BrokerOptions(max_connections=10))
        async with broker.serving([ListenerSpec("here", transport)]) as addresses:
            assert addresses == ["pair://broker"]
            peer = await EnginePeer.open(transport, "c")
            await peer.connack()
            await peer.subscribe("#")
            await broker.publish([Message("a", b"1", 1)])
            return await peer.received(1)

    assert asyncio.run(main()) == [Message("a", b"1", 1)]


def test_a_second_connection_takes_the_session_over() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        one = await EnginePeer.open(transport, "same", expiry=100, settle=False)
        await one.connack()
        await one.subscribe("t")
        await live.publish([Message("t", b"1", 1)])
        await one.received(1)
        two = await EnginePeer.open(transport, "same", clean=False, expiry=100)
        assert (await two.connack()).session_present
        assert (await one.closed()).reason_code == R.SESSION_TAKEN_OVER
        assert await two.received(1) == [Message("t", b"1", 1)]
        await two.nothing_more()
        assert live.stats.sessions == 1

    run(test)


def test_session_present_and_expiry() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        for expiry, clean, present in (
            (0, True, False),
            (9, False, False),
            (9, False, True),
            (9, True, False),
        ):
            peer = await EnginePeer.open(transport, "c", expiry=expiry, clean=clean)
            assert (await peer.connack()).session_present is present, (expiry, clean)
            await peer.disconnect()
        peer = await EnginePeer.open(transport, "c", expiry=9, clean=False)
        assert (await peer.connack()).session_present
        await peer.disconnect(session_expiry=0)
        assert live.stats.sessions == 0
        for clean, present in ((False, False), (False, True), (True, False), (False, False)):
            peer = await EnginePeer.open(transport, "old", version=4, clean=clean)
            assert (await peer.connack()).session_present is present
            await peer.disconnect()

    run(test)


def test_connack_says_what_the_server_decided() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        asked = {P.REQUEST_RESPONSE_INFO: 1}
        peer = await EnginePeer.open(transport, "", expiry=5000, keepalive=120, properties=asked)
        found = (await peer.connack()).properties
        client_id = found[P.ASSIGNED_CLIENT_ID]
        assert found[P.SERVER_KEEP_ALIVE] == 60
        assert found[P.SESSION_EXPIRY] == 1000
        assert found[P.RESPONSE_INFO] == f"reply/{client_id}/"
        again = await EnginePeer.open(transport, client_id, expiry=5, keepalive=60, clean=False)
        connack = await again.connack()
        assert connack.session_present
        assert P.SERVER_KEEP_ALIVE not in connack.properties
        assert P.RESPONSE_INFO not in connack.properties

    run(test, max_keepalive=Duration(60), max_session_expiry=Duration(1000), response_prefix="reply/")


def test_messages_wait_for_a_session_and_count_down() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", expiry=100)
        await peer.connack()
        await peer.subscribe("t", identifier=5)
        await peer.disconnect()
        long, over = Properties(message_expiry=100), Properties(message_expiry=0)
        await live.publish(
            [
                Message("t", b"0"),
                Message("t", b"1", 1, properties=long),
                Message("t", b"2", 2, properties=over),
            ]
        )
        assert live.stats.queued == 2
        peer = await EnginePeer.open(transport, "c", clean=False)
        await peer.connack()
        (found,) = await peer.received(1)
        assert (found.payload, found.qos, found.properties.subscription_ids) == (b"1", 1, (5,))
        assert 90 <= (found.properties.message_expiry or 0) <= 100
        await peer.nothing_more()
        assert live.stats.dropped == {"client_gone": 1, "expired": 1}

    run(test)


@pytest.mark.parametrize(("policy", "kept"), [("drop_oldest", [2, 3, 4]), ("drop_newest", [0, 1, 2])])
def test_a_queue_is_bounded(policy: str, kept: list[int]) -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", expiry=100)
        await peer.connack()
        await peer.subscribe("t")
        await peer.disconnect()
        await live.publish([Message("t", bytes([n]), 1) for n in range(5)])
        assert live.stats.queued == 3
        assert live.stats.dropped == {"queue_full": 2}
        peer = await EnginePeer.open(transport, "c", clean=False)
        assert [message.payload for message in await peer.received(3)] == [bytes([n]) for n in kept]

    run(test, max_queue_messages=3, queue_full=policy)


def test_a_queue_is_bounded_in_bytes_too() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", expiry=100)
        await peer.connack()
        await peer.subscribe("t")
        await peer.disconnect()
        await live.publish([Message("t", bytes(1000), 1) for n in range(50)])
        assert live.stats.queued_bytes <= 10_000
        assert live.stats.queued + live.stats.dropped["queue_full"] == 50

    run(test, max_queue_bytes=Size(10_000))


def test_a_client_that_does_not_read_costs_bounded_memory() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        deaf = await EnginePeer.open(transport, "deaf")
        await deaf.connack()
        await deaf.subscribe("t")
        writer = await EnginePeer.open(transport, "writer")
        await writer.connack()
        for _ in range(20):
            await writer.publish(
                *(Message("t", bytes(10_000), 0) for _ in range(10)), Message("t", bytes(10_000), 1)
            )
        stats = live.stats
        assert stats.dropped["send_buffer_full"] > 100
        assert stats.queued_bytes <= 20 * 11_000
        deaf.messages.clear()
        await deaf.until(lambda: sum(message.qos for message in deaf.messages) == 20)
        assert len(deaf.messages) < 100

    run(test, send_buffer=Size(65536), buffer=4096)


def test_a_client_that_only_asks_is_not_read_for_ever() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c")
        await peer.connack()
        flood = asyncio.create_task(peer.stream.send(b"\xc0\x00" * 200_000))
        (client,) = live._connections
        await until(lambda: client._paused)
        assert client._streams[0].size < 100_000
        assert not flood.done()
        answers = 0
        while answers < 400_000:
            answers += len(await peer.stream.receive())
        await flood

    run(test, send_buffer=Size(16384), buffer=4096)


def test_retained_messages() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c")
        await peer.connack()
        await peer.publish(
            Message("r/0", b"0", 0, True), Message("r/1", b"1", 1, True), Message("r/2", b"2", 2, True)
        )
        await peer.subscribe("r/+", qos=1, identifier=9, retain_handling=1)
        found = await peer.received(3)
        assert {(m.payload, m.qos, m.retain) for m in found} == {
            (b"0", 0, True),
            (b"1", 1, True),
            (b"2", 1, True),
        }
        assert {m.properties.subscription_ids for m in found} == {(9,)}
        await peer.subscribe("r/+", retain_handling=1)
        await peer.subscribe("r/1", retain_handling=2)
        await peer.subscribe("$share/g/r/1")
        await peer.nothing_more()
        await peer.subscribe("r/1")
        assert await peer.received(1) == [Message("r/1", b"1", 1, True)]
        await peer.unsubscribe("$share/g/r/1", "r/+", "r/1")
        await peer.publish(Message("r/0", b"", 0, True), Message("r/1", b"", 1, True))
        await peer.subscribe("r/#", retain_as_published=True)
        assert await peer.received(1) == [Message("r/2", b"2", 2, True)]
        await peer.publish(Message("r/2", b"new", 1, True), Message("r/2", b"plain", 1))
        assert [(m.payload, m.retain) for m in await peer.received(2)] == [(b"new", True), (b"plain", False)]
        assert live.stats.retained == 1

    run(test)


def test_many_retained_messages_reach_a_slow_subscriber() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        await live.publish([Message(f"r/{n}", bytes(500), 0, True) for n in range(2000)])
        peer = await EnginePeer.open(transport, "c")
        await peer.connack()
        await peer.subscribe("r/+")
        assert len({message.topic for message in await peer.received(2000)}) == 2000
        assert live.stats.dropped == {}

    run(test, send_buffer=Size(16384), buffer=4096)


def test_wills() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        watcher = await EnginePeer.open(transport, "watcher")
        await watcher.connack()
        await watcher.subscribe("will/#")

        async def client(name: str, delay: int = 0, **options: Any) -> EnginePeer:
            peer = await EnginePeer.open(
                transport, "c", will=Will(Message(f"will/{name}", b"x", 1), delay), **options
            )
            await peer.connack()
            return peer

        await (await client("vanished")).vanish()
        assert [m.topic for m in await watcher.received(1)] == ["will/vanished"]
        await (await client("orderly")).disconnect()
        await (await client("asked-for")).disconnect(R.DISCONNECT_WITH_WILL)
        assert [m.topic for m in await watcher.received(1)] == ["will/asked-for"]
        await client("taken-over", expiry=100)
        resumed = await client("delayed", 50, expiry=100, clean=False)
        assert [m.topic for m in await watcher.received(1)] == ["will/taken-over"]
        await resumed.vanish()
        await until(lambda: live.stats.clients == 1)
        await (await client("delayed", 50, expiry=100, clean=False)).vanish()  # in time: no will
        await until(lambda: live.stats.clients == 1)
        await watcher.nothing_more()
        last = await client("last", expiry=0)  # a clean start ends the session, so the delay too
        assert [m.topic for m in await watcher.received(1)] == ["will/delayed"]
        await last.disconnect()
        await (await client("session-over", 50, expiry=0)).vanish()
        assert [m.topic for m in await watcher.received(1)] == ["will/session-over"]
        await watcher.nothing_more()

    run(test)


def test_a_will_waits_for_its_delay() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        watcher = await EnginePeer.open(transport, "watcher")
        await watcher.connack()
        await watcher.subscribe("will")
        peer = await EnginePeer.open(transport, "c", expiry=100, will=Will(Message("will", b"", 1), 1))
        await peer.connack()
        began = asyncio.get_running_loop().time()
        await peer.vanish()
        await watcher.received(1)
        assert asyncio.get_running_loop().time() - began >= 0.9

    run(test)


def test_no_local_and_overlapping_subscriptions() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c")
        await peer.connack()
        await peer.subscribe("own", no_local=True)
        await peer.subscribe("a/#", qos=0, identifier=1)
        await peer.subscribe("a/+", qos=2, identifier=2)
        await peer.publish(Message("own", b"", 1), Message("a/b", b"", 2))
        (found,) = await peer.received(1)
        assert (found.topic, found.qos, found.properties.subscription_ids) == ("a/b", 2, (1, 2))
        await peer.nothing_more()
        await live.publish([Message("own", b"", 1)])
        await peer.received(1)

    run(test)


def test_shared_subscriptions_share() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        members = [await EnginePeer.open(transport, f"m{n}") for n in range(3)]
        for member in members:
            await member.connack()
            await member.subscribe("$share/g/t/#", "plain")
        await live.publish([Message("t/x", str(n).encode(), 1) for n in range(300)])
        await live.publish([Message("plain", b"", 1)])
        got = [await member.received(101) for member in members]
        assert sorted(m.payload for one in got for m in one if m.topic == "t/x") == sorted(
            str(n).encode() for n in range(300)
        )

    run(test)


@pytest.mark.parametrize("leave", ["vanish", "unsubscribe"])
def test_what_a_leaving_member_did_not_take_goes_to_another(leave: str) -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        deaf = await EnginePeer.open(transport, "deaf", settle=False, properties={P.RECEIVE_MAXIMUM: 2})
        await deaf.connack()
        await deaf.subscribe("$share/g/t")
        await live.publish([Message("t", str(n).encode(), 1) for n in range(10)])
        await deaf.received(2)
        other = await EnginePeer.open(transport, "other")
        await other.connack()
        await other.subscribe("$share/g/t")
        if leave == "vanish":
            await deaf.vanish()  # its session ends: what it had in flight moves too
            assert [m.payload for m in await other.received(10)] == [str(n).encode() for n in range(10)]
        else:
            await deaf.unsubscribe("$share/g/t")
            assert [m.payload for m in await other.received(8)] == [str(n).encode() for n in range(2, 10)]
        await other.nothing_more()

    run(test)


def test_refusals_of_subscriptions_and_messages() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c")
        await peer.connack()
        codes = await peer.subscribe("no/subscribe", "no/#", "/".join("x" * 300), "a", "b", "c")
        assert codes == (0x80, 2, R.TOPIC_FILTER_INVALID, 2, 2, R.QUOTA_EXCEEDED)
        assert await peer.unsubscribe("a", "never") == (0, R.NO_SUBSCRIPTION_EXISTED)
        keys = await peer.send(
            Message("no/publish/x", b"", 1), Message("b", b"", 1), Message("no/publish/y", b"", 2)
        )
        await peer.until(lambda: len(peer.refused) + len(peer.acknowledged) == 3)
        assert peer.refused == {keys[0]: R.NOT_AUTHORIZED, keys[2]: R.NOT_AUTHORIZED}
        assert [m.topic for m in await peer.received(1)] == ["b"]
        assert live.stats.dropped == {"not_authorized": 2}

    run(test, deny_subscribe=("no/subscribe",), deny_publish=("no/publish/#",), max_subscriptions=3)


def test_limits_on_connections_and_sessions() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        one = await EnginePeer.open(transport, "1", expiry=100)
        await one.connack()
        await one.disconnect()
        await until(lambda: live.stats.connections == 0)
        two = await EnginePeer.open(transport, "2")
        assert (await two.closed()).reason_code == R.QUOTA_EXCEEDED
        await until(lambda: live.stats.connections == 0)
        one = await EnginePeer.open(transport, "1", clean=False)
        await one.connack()
        three = await EnginePeer.open(transport, "3")
        assert (await three.closed()).reason_code is None
        assert live.stats.refused_connections == 1

    run(test, max_connections=1, max_sessions=1)


def test_a_client_that_says_nothing_is_closed() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", send=False)
        assert (await peer.closed()).reason_code is None

    run(test, connect_timeout=Duration(0.05))


@attrs.frozen
class Tenant:
    name: str
    organisation: str | None = None
    valid_until: float | None = None

    def may_publish(self, topic: str, /) -> bool:
        return topic.startswith(self.name + "/")

    def may_subscribe(self, topic_filter: str, /) -> bool:
        return topic_filter.startswith(self.name + "/")


@attrs.define
class Countdown:
    """A challenge that wants `left` answers."""

    data: bytes
    left: int

    async def respond(self, data: bytes, /) -> Challenge | Principal:
        if data != self.data[::-1]:
            raise Refused("the answer is wrong", reason_code=R.NOT_AUTHORIZED)
        return Countdown(self.data + b"!", self.left - 1) if self.left > 1 else Anybody()


class Gate:
    """Knows users by their names, and the method "reverse"."""

    def __init__(self) -> None:
        self.seen: list[Peer] = []

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        self.seen.append(peer)
        if credentials.method == "reverse":
            return Countdown(b"abc", 2)
        if not credentials.username:
            raise Refused("who are you", reason_code=R.BAD_USER_NAME_OR_PASSWORD)
        return Tenant(credentials.username)


def test_a_principal_limits_what_a_client_may_do() -> None:
    gate = Gate()

    async def test(live: Broker, transport: PairTransport) -> None:
        stranger = await EnginePeer.open(transport, "c")
        assert (await stranger.closed()).reason_code == R.BAD_USER_NAME_OR_PASSWORD

        async def user(name: str, client_id: str, **options: Any) -> EnginePeer:
            peer = await EnginePeer.open(transport, client_id, send=False, **options)
            peer.engine = type(peer.engine)(
                attrs_replace(peer.engine.connect, username=name),
                Session(),
                now=asyncio.get_running_loop().time(),
            )
            await peer.flush()
            return peer

        ann = await user("ann", "shared-id", expiry=100)
        await ann.connack()
        assert await ann.subscribe("ann/#", "bob/#", "$share/g/bob/x") == (2, 0x87, 0x87)
        keys = await ann.send(Message("ann/a", b"", 1), Message("bob/a", b"", 1))
        await ann.until(lambda: ann.refused)
        assert ann.refused == {keys[1]: R.NOT_AUTHORIZED}
        bob = await user("bob", "shared-id")
        assert (await bob.closed()).reason_code == R.CLIENT_IDENTIFIER_NOT_VALID
        await ann.publish(Message("ann/a", b"", 1))
        bob = await user("bob", "b", will=Will(Message("ann/will", b"")))
        assert (await bob.closed()).reason_code == R.NOT_AUTHORIZED
        assert gate.seen[0].transport == "pair"

    run(test, authenticator=gate)


def attrs_replace(connect: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(connect, **changes)


def test_enhanced_authentication_goes_to_and_fro() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(
            transport, "c", properties={P.AUTH_METHOD: "reverse", P.AUTH_DATA: b"hi"}
        )
        first = await peer.challenge()
        peer.engine.auth(first.data[::-1])
        await peer.flush()
        second = await peer.challenge()
        peer.engine.auth(second.data[::-1])
        await peer.flush()
        connack = await peer.connack()
        assert connack.properties[P.AUTH_METHOD] == "reverse"
        await peer.publish(Message("a", b"", 1))
        peer = await EnginePeer.open(
            transport, "c", properties={P.AUTH_METHOD: "reverse", P.AUTH_DATA: b"hi"}
        )
        await peer.challenge()
        peer.engine.auth(b"wrong")
        await peer.flush()
        assert (await peer.closed()).reason_code == R.NOT_AUTHORIZED

    run(test, authenticator=Gate())


def test_a_principal_that_runs_out_is_disconnected() -> None:
    class Brief:
        async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
            return Anybody(valid_until=1.0)

    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c")
        assert (await peer.closed()).reason_code == R.NOT_AUTHORIZED
        assert live.stats.clients == 0

    run(test, authenticator=Brief())


def test_stopping_says_goodbye() -> None:
    async def main() -> None:
        transport = Network().transport()
        live = Broker()
        async with live.serving([ListenerSpec("pair", transport)]):
            five = await EnginePeer.open(transport, "5")
            four = await EnginePeer.open(transport, "4", version=4)
            await five.connack()
            await four.connack()
        assert (await five.closed()).reason_code == R.SERVER_SHUTTING_DOWN
        assert (await four.closed()).reason_code is None
        with pytest.raises(ConnectFailed):
            await transport.connect()
        with pytest.raises(ConnectorError, match="not serving"):
            _ = live.stats

    asyncio.run(main())


def test_options_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="deny_subscribe"):
        BrokerOptions(deny_subscribe=("a/#/b",))
    with pytest.raises(ValueError):
        BrokerOptions(receive_maximum=0)
    with pytest.raises(ConnectorError, match="cannot listen"):
        ListenerSpec("x", object())  # type: ignore[arg-type]


# --- the state file -----------------------------------------------------------------------------


def durable(path: Path) -> dict[str, Any]:
    return {"state_file": str(path / "state.db"), "synchronous": "normal"}


def test_sessions_queues_and_retained_survive_a_restart(tmp_path: Path) -> None:
    async def before(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", expiry=100)
        await peer.connack()
        await peer.subscribe("t/#", identifier=3)
        await peer.subscribe("u", "$share/g/s")
        await peer.unsubscribe("u")
        await peer.disconnect()
        writer = await EnginePeer.open(transport, "w")
        await writer.connack()
        await writer.publish(*(Message("t/x", str(n).encode(), 1 + n % 2) for n in range(100)))
        await writer.publish(Message("s", b"shared", 1), Message("u", b"", 1), Message("r", b"kept", 1, True))
        await writer.publish(Message("gone", b"1", 1, True))
        await writer.publish(Message("gone", b"", 1, True))

    async def after(live: Broker, transport: PairTransport) -> None:
        assert (live.stats.queued, live.stats.retained, live.stats.subscriptions) == (101, 1, 2)
        peer = await EnginePeer.open(transport, "c", clean=False, expiry=100)
        assert (await peer.connack()).session_present
        found = await peer.received(101)
        assert [m.payload for m in found] == [*(str(n).encode() for n in range(100)), b"shared"]
        assert found[0].properties.subscription_ids == (3,)
        await live.publish([Message("t/y", b"", 1)])
        assert await peer.subscribe("r") == (2,)
        assert [m.topic for m in await peer.received(2)] == ["t/y", "r"]
        await until(lambda: live.stats.queued_bytes == 0)

    async def at_last(live: Broker, transport: PairTransport) -> None:
        assert (live.stats.queued, live.stats.sessions) == (0, 1)

    for test in (before, after, at_last):
        run(test, **durable(tmp_path))


def test_qos_2_stays_exactly_once_over_a_restart(tmp_path: Path) -> None:
    ours, theirs = Session(), Session()
    tokens: list[int] = []

    async def before(live: Broker, transport: PairTransport) -> None:
        reader = await EnginePeer.open(transport, "r", expiry=100, session=theirs, settle=False)
        await reader.connack()
        await reader.subscribe("t")
        writer = await EnginePeer.open(transport, "w", expiry=100, session=ours)
        await writer.connack()
        # the writer's PUBREL never goes out, the reader's PUBREC neither
        await writer.send(Message("t", b"1", 2), Message("t", b"2", 2))
        writer.flush = no_flush  # type: ignore[method-assign]
        await writer.until(lambda: all(item.released for item in ours.outbound.values()))
        await reader.received(2)
        tokens.extend(reader.tokens)

    async def after(live: Broker, transport: PairTransport) -> None:
        writer = await EnginePeer.open(transport, "w", expiry=100, clean=False, session=ours)
        assert (await writer.connack()).session_present
        reader = await EnginePeer.open(transport, "r", expiry=100, clean=False, session=theirs)
        assert (await reader.connack()).session_present
        await writer.until(lambda: not ours.outbound)
        await reader.nothing_more()
        assert live.stats.queued_bytes
        for token in tokens:
            reader.engine.settle(token)
        await reader.flush()
        await reader.until(lambda: not theirs.inbound)
        assert reader.messages == []
        await until(lambda: live.stats.queued_bytes == 0)

    async def no_flush() -> None:
        pass

    run(before, **durable(tmp_path))
    run(after, **durable(tmp_path))


def test_wills_survive_a_restart(tmp_path: Path) -> None:
    async def before(live: Broker, transport: PairTransport) -> None:
        watcher = await EnginePeer.open(transport, "watcher", expiry=100)
        await watcher.connack()
        await watcher.subscribe("will/#")
        await watcher.disconnect()
        for name, delay in (("now", 0), ("later", 1)):
            peer = await EnginePeer.open(
                transport, name, expiry=100, will=Will(Message(f"will/{name}", b"", 1), delay)
            )
            await peer.connack()
        gone = await EnginePeer.open(transport, "gone", expiry=100, will=Will(Message("will/gone", b"", 1)))
        await gone.connack()
        await gone.disconnect()

    async def after(live: Broker, transport: PairTransport) -> None:
        watcher = await EnginePeer.open(transport, "watcher", clean=False)
        await watcher.connack()
        assert [m.topic for m in await watcher.received(2)] == ["will/now", "will/later"]
        await watcher.nothing_more()

    run(before, **durable(tmp_path))
    run(after, **durable(tmp_path))


def test_an_acknowledgement_waits_for_the_commit(tmp_path: Path) -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", expiry=100)
        await peer.connack()
        await peer.subscribe("t")
        await peer.disconnect()
        hub = live._hub
        assert hub is not None and hub.store is not None
        held: list[Callable[[], None]] = []
        hub.store.when_committed = held.append  # type: ignore[method-assign]
        writer = await EnginePeer.open(transport, "w", version=4)
        await writer.connack()
        await writer.send(*(Message("t", b"", 1) for _ in range(10)))
        await writer.send(Message("nobody", b"", 1))
        await until(lambda: held)
        (client,) = live._connections
        await until(lambda: client._paused)
        assert writer.acknowledged == []
        # more than four are not safe: what follows is not read
        routed = live.stats.received
        await writer.send(*(Message("t", b"", 1) for _ in range(5)))
        bystander = await EnginePeer.open(transport, "bystander")
        await bystander.connack()
        await bystander.disconnect()
        assert live.stats.received == routed
        assert writer.acknowledged == []
        del hub.store.when_committed
        while held:
            held.pop()()
        await writer.until(lambda: len(writer.acknowledged) == 16)

    run(test, receive_maximum=4, **durable(tmp_path))


def test_a_session_that_ends_leaves_nothing_behind(tmp_path: Path) -> None:
    async def before(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", expiry=100)
        await peer.connack()
        await peer.subscribe("t")
        await peer.disconnect()
        await live.publish([Message("t", b"", 1)] * 10)
        peer = await EnginePeer.open(
            transport, "c", clean=False, settle=False
        )  # expiry 0: ends with the connection
        await peer.connack()
        await peer.received(10)
        await live.publish([Message("t", b"", 2)])

    async def after(live: Broker, transport: PairTransport) -> None:
        stats = live.stats
        assert (stats.sessions, stats.queued, stats.subscriptions, stats.queued_bytes) == (0, 0, 0, 0)

    run(before, **durable(tmp_path))
    run(after, **durable(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE queue SET message = x'c1'",
        "UPDATE queue SET message = x'01'",
        "UPDATE retained SET message = substr(message, 1, 3)",
        "UPDATE subscription SET options = x''",
        "UPDATE session SET expiry = 'long'",
    ],
)
def test_a_damaged_state_file_is_named(tmp_path: Path, damage: str) -> None:
    async def before(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c", expiry=100)
        await peer.connack()
        await peer.subscribe("t")
        await peer.disconnect()
        await live.publish([Message("t", b"1", 1, True)])

    async def after(live: Broker, transport: PairTransport) -> None:
        raise AssertionError("it started")

    run(before, **durable(tmp_path))
    options = durable(tmp_path)
    with contextlib.closing(sqlite3.connect(options["state_file"])) as database, database:
        assert database.execute(damage).rowcount == 1
    with pytest.raises(ConnectorError, match="state file"):
        run(after, **options)


def test_while_the_disk_refuses_retained_messages_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True
    write = store_module._Batch.run

    def refusing(batch: store_module._Batch, database: sqlite3.Connection) -> None:
        if full:
            raise sqlite3.OperationalError("database or disk is full")
        write(batch, database)

    monkeypatch.setattr(store_module, "_BEHIND", 200)
    monkeypatch.setattr(store_module, "_RETRY", 0.01)
    monkeypatch.setattr(store_module._Batch, "run", refusing)

    async def test(live: Broker, transport: PairTransport) -> None:
        nonlocal full
        hub = live._hub
        assert hub is not None and hub.store is not None
        writer = await EnginePeer.open(transport, "w")
        await writer.connack()
        (client,) = live._connections
        sent = 0
        while not client._paused:
            for payload in (b"x", b""):  # one comes and goes: nothing stays but the work for the disk
                await writer.send(*(Message(f"t/{n}", payload, 0, True) for n in range(sent, sent + 50)))
            sent += 50
            await asyncio.sleep(0.001)
            assert sent < 100_000
        await until(lambda: live.stats.state_file_error)
        full = False
        await writer.publish(Message("t/0", b"kept", 1, True))
        assert live.stats.state_file_error is None
        assert live.stats.retained == 1

    run(test, **durable(tmp_path))


def test_a_client_identifier_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        for _ in range(2):
            peer = await EnginePeer.open(transport, "x\nERROR forged", expiry=1)
            await peer.connack()
        await peer.disconnect()

    with caplog.at_level("DEBUG"):
        run(test)
    assert "forged" in caplog.text
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_what_is_remembered_of_permissions_is_bounded() -> None:
    async def test(live: Broker, transport: PairTransport) -> None:
        peer = await EnginePeer.open(transport, "c")
        await peer.connack()
        (client,) = live._connections
        for start in range(0, 60, 10):
            topics = [f"{'no' if n % 2 else 'ok'}/{n}/" + "x" * 30_000 for n in range(start, start + 10)]
            await peer.publish(*(Message(topic, b"", 1) for topic in topics))
            rights = client._rights
            assert rights is not None
            assert sum(map(len, rights._allowed)) == rights._remembered < 900_000
        assert set(peer.refused.values()) == {R.NOT_AUTHORIZED}
        assert len(peer.refused) == 30
        assert live.stats.dropped["not_authorized"] == 30

    run(test, deny_publish=("no/#",))
