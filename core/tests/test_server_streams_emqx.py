"""The broker and a client with several streams, packet by packet: what belongs to a stream stays on
it, as EMQX does it, and a stream that breaks, ends or is stuck costs no other anything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from engine_peer import EnginePeer
from stream_bundle import Bundle, OneBundle

from tesaiot_connect.errors import Disconnected
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.packets import Connect, Disconnect, Subscribe, Subscription, Unsubscribe, Will
from tesaiot_connect.mqtt.primitives import string, varint
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.protocols import (
    BoundUrl,
    ByteStream,
    Challenge,
    Credentials,
    Duration,
    ListenerStatus,
    Peer,
    Principal,
    QuicState,
    QuicStatus,
)
from tesaiot_connect.server import Anonymous, Anybody, Broker, BrokerOptions, ListenerSpec, connection
from tesaiot_connect.testing import Network

PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"


def publish(topic: str, payload: bytes = b"", packet_id: int = 0) -> bytes:
    """QoS 1 with a packet identifier, QoS 0 without."""
    body = string(topic) + (packet_id.to_bytes(2) if packet_id else b"") + b"\0" + payload
    return bytes((0x32 if packet_id else 0x30,)) + varint(len(body)) + body


def subscribe(packet_id: int, *filters: str, qos: int = 1) -> bytes:
    asked = tuple(Subscription(one, qos) for one in filters)
    return codec.encode_subscribe(Subscribe(packet_id=packet_id, subscriptions=asked), 5)


def unsubscribe(packet_id: int, *filters: str) -> bytes:
    return codec.encode_unsubscribe(Unsubscribe(packet_id=packet_id, filters=filters), 5)


def puback(packet_id: int) -> bytes:
    return b"\x40\x02" + packet_id.to_bytes(2)


async def exactly(stream: ByteStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive(size - len(data))
        assert piece, f"the stream ended after {data!r}"
        data += piece
    return data


async def packet(stream: ByteStream) -> bytes:
    """The next packet, whole."""
    data = await exactly(stream, 2)
    size, shift = data[1] & 0x7F, 7
    while data[-1] & 0x80:
        data += await exactly(stream, 1)
        size |= (data[-1] & 0x7F) << shift
        shift += 7
    return data + await exactly(stream, size)


async def reset(stream: ByteStream) -> bytes:
    """What still came before the stream was reset."""
    data = b""
    try:
        while piece := await stream.receive():
            data += piece
    except Disconnected:
        return data
    raise AssertionError(f"the stream ended in order, after {data!r}")


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


class Rig:
    """A broker, the connection of one client, and its control stream once it is up."""

    def __init__(self, live: Broker, bundle: Bundle, network: Network) -> None:
        self.live = live
        self.bundle = bundle
        self.network = network
        self.control: Any = None

    async def connect(self, **options: Any) -> bytes:
        self.control = self.control or await self.bundle.dial()
        await self.control.send(codec.encode_connect(Connect(client_id="c", keepalive=0, **options)))
        connack = await packet(self.control)
        assert connack[0] == 0x20 and connack[3] == 0, connack
        return connack

    async def stream(self, *packets: bytes) -> ByteStream:
        stream = await self.bundle.dial()
        if packets:
            await stream.send(b"".join(packets))
        return stream

    async def subscribed(self, *filters: str, qos: int = 1) -> ByteStream:
        stream = await self.stream(subscribe(1, *filters, qos=qos))
        assert (await packet(stream))[0] == 0x90
        return stream

    async def ping(self) -> None:
        await self.control.send(PINGREQ)
        assert await packet(self.control) == PINGRESP

    @property
    def client(self) -> connection.ClientConnection:
        (found,) = self.live._connections
        return found


def run(
    test: Callable[[Rig], Awaitable[None]], *, buffer: int = 65536, authenticator: Any = None, **options: Any
) -> None:
    async def main() -> None:
        listener, network = OneBundle(Bundle(buffer)), Network()
        live = Broker(BrokerOptions(**options))
        specs = [
            ListenerSpec("bundle", listener, authenticator or Anonymous()),
            ListenerSpec("pair", network.transport()),
        ]
        async with asyncio.timeout(60), live.serving(specs):
            await test(Rig(live, listener.bundle, network))

    asyncio.run(main())


# --- what a stream may do -----------------------------------------------------------------


def test_a_client_that_opens_all_its_streams_before_connack() -> None:
    """NanoMQ's client does: CONNECT on the first stream, SUBSCRIBE and PUBLISH on others."""

    async def test(rig: Rig) -> None:
        rig.control = await rig.bundle.dial()
        reading = await rig.stream(subscribe(1, "t/#"))
        writing = [await rig.stream(publish(f"t/{one}", b"early", 7)) for one in range(3)]
        await rig.control.send(codec.encode_connect(Connect(client_id="nano", keepalive=60)))
        assert (await packet(rig.control))[0] == 0x20
        assert await packet(reading) == b"\x90\x04\x00\x01\x00\x01"
        for stream in writing:
            assert await packet(stream) == puback(7)
            await stream.send(publish("t/later", b"late", 7))
        payloads = [(await packet(reading))[-5:] for _ in range(6)]
        assert sum(payload == b"early" for payload in payloads) == 3
        await rig.ping()
        assert rig.bundle.keepalive == 60

    run(test)


class Slow:
    """Lets everybody in once told to."""

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def begin(self, peer: Peer, credentials: Credentials) -> Challenge | Principal:
        self.asked.set()
        await self.go.wait()
        return Anybody("anybody")


def test_before_authentication_other_streams_are_not_read_and_afterwards_their_order_holds() -> None:
    slow, count = Slow(), 10_000

    async def test(rig: Rig) -> None:
        rig.control = await rig.bundle.dial()
        stream: Any = await rig.stream(subscribe(1, "t", qos=0))
        flood = b"".join(publish("t", b"%06d" % number) for number in range(count))
        sending = asyncio.create_task(stream.send(flood))
        connecting = asyncio.create_task(rig.connect())
        await slow.asked.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert stream.bytes_sent == 65536  # its window, and nothing more
        slow.go.set()
        await connecting
        assert (await packet(stream))[0] == 0x90
        numbers = [int((await packet(stream))[-6:]) for _ in range(count)]
        assert numbers == list(range(count))
        await sending

    run(test, authenticator=slow, connect_timeout=Duration(600))


def test_a_stranger_opens_no_more_streams_than_a_client() -> None:
    slow = Slow()

    async def test(rig: Rig) -> None:
        connecting = asyncio.create_task(rig.connect())
        await slow.asked.wait()
        streams = [await rig.stream(PINGREQ) for _ in range(100)]
        await until(lambda: len(rig.bundle.resets) == 91)
        assert set(rig.bundle.resets) == {R.QUOTA_EXCEEDED}
        slow.go.set()
        await connecting
        for stream in streams[9:]:
            assert await reset(stream) == b""
        assert len(rig.client._streams) <= 20

    run(test, authenticator=slow, connect_timeout=Duration(600))


def test_more_streams_than_allowed_are_reset_and_one_that_ends_makes_room() -> None:
    async def test(rig: Rig) -> None:
        await rig.connect()
        streams = [await rig.subscribed("t") for _ in range(2)]
        assert await reset(await rig.stream(subscribe(1, "t"))) == b""
        assert rig.bundle.resets == [R.QUOTA_EXCEEDED]
        await streams[0].send_eof()
        assert await streams[0].receive() == b""
        await rig.subscribed("t")
        assert rig.live.stats.subscriptions == 2
        await rig.ping()

    run(test, max_streams=3)


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        pytest.param(b"\xf7\x00", R.MALFORMED_PACKET, id="malformed"),
        pytest.param(
            codec.encode_connect(Connect(client_id="again")), R.PROTOCOL_ERROR, id="a second CONNECT"
        ),
        pytest.param(codec.encode_disconnect(Disconnect(), 5), R.PROTOCOL_ERROR, id="DISCONNECT"),
        pytest.param(publish("t", bytes(2000)), R.PACKET_TOO_LARGE, id="too large"),
    ],
)
def test_a_bad_data_stream_is_reset_alone(wire: bytes, code: int) -> None:
    async def test(rig: Rig) -> None:
        await rig.connect()
        sibling, bad = await rig.subscribed("t"), await rig.subscribed("t")
        await bad.send(publish("t", b"before", 9) + wire)
        await reset(bad)
        assert rig.bundle.resets == [code]
        assert (await packet(sibling)).endswith(b"before")
        assert rig.live.stats.subscriptions == 1
        await sibling.send(publish("t", b"after", 9))
        answers = {(await packet(sibling))[0] for _ in range(2)}
        assert answers == {0x40, 0x32}
        await rig.ping()
        assert len(rig.client._streams) == 2

    run(test, max_packet_size=1024)


def test_a_pingreq_on_a_data_stream_gets_no_reply_and_counts_for_the_keepalive() -> None:
    async def test(rig: Rig) -> None:
        await rig.connect()
        stream = await rig.stream()
        rig.client._engine.keepalive = 60
        before = rig.client._engine.next_timeout()
        assert before is not None
        await stream.send(PINGREQ + publish("t", b"", 1))
        assert (await packet(stream))[0] == 0x40
        after = rig.client._engine.next_timeout()
        assert after is not None and after > before

    run(test)


def test_unsubscribe_on_another_stream_finds_no_subscription() -> None:
    async def test(rig: Rig) -> None:
        await rig.connect()
        subscribed, never = await rig.subscribed("t"), await rig.stream()
        for stream, code in ((rig.control, 0x11), (never, 0x11), (subscribed, 0x00)):
            await stream.send(unsubscribe(3, "t"))
            assert await packet(stream) == b"\xb0\x04\x00\x03\x00" + bytes((code,))
        assert rig.live.stats.subscriptions == 0

    run(test)


def test_acknowledgements_come_on_the_stream_of_the_message_also_when_the_client_has_ended_it(
    tmp_path: Path,
) -> None:
    """With a state file an acknowledgement waits for the disk."""

    async def test(rig: Rig) -> None:
        await rig.connect(properties={P.SESSION_EXPIRY: 100})
        await rig.control.send(subscribe(1, "t"))
        assert (await packet(rig.control))[0] == 0x90
        for _ in range(20):
            stream = await rig.stream(publish("t", b"", 1), publish("t", b"", 2))
            await stream.send_eof()
            assert await exactly(stream, 8) == puback(1) + puback(2)
            assert await stream.receive() == b""
        await until(lambda: len(rig.client._streams) == 1)

    run(test, state_file=tmp_path / "state.db")


# --- a stream that is stuck ---------------------------------------------------------------


def test_a_stream_whose_deliveries_are_not_read_holds_back_no_other() -> None:
    async def test(rig: Rig) -> None:
        await rig.connect()
        stuck, sibling = await rig.subscribed("flood"), await rig.subscribed("t")
        await rig.live.publish([Message("flood", bytes(1000), 1) for _ in range(200)])
        await until(lambda: rig.client._streams[1].size > 50_000)
        for number in range(10):
            await sibling.send(publish("t", b"%d" % number, 1))
            assert {(await packet(sibling))[0] for _ in range(2)} == {0x40, 0x32}
            await sibling.send(puback(number + 1))
            await rig.ping()
        # what is stuck is reset: its writer waits, and is woken
        stuck.abort()
        await until(lambda: len(rig.client._streams) == 2)
        assert rig.live.stats.subscriptions == 1
        await until(lambda: rig.live.stats.queued_bytes == 0)
        await rig.ping()

    run(test, buffer=1024, send_buffer=65536)


def test_a_stream_whose_answers_are_not_read_is_held_back_alone() -> None:
    async def test(rig: Rig) -> None:
        await rig.connect()
        stuck: Any = await rig.stream()
        flood = asyncio.create_task(stuck.send(publish("t", b"", 1) * 20_000))
        await until(lambda: rig.client._paused)
        assert not flood.done()
        assert rig.client._streams[1].size < 65536
        sibling = await rig.subscribed("t")
        await rig.live.publish([Message("t", b"", 0)])
        assert (await packet(sibling))[0] == 0x30
        await rig.ping()
        answers = asyncio.create_task(exactly(stuck, 4 * 20_000))
        await flood
        await answers

    run(test, buffer=4096, send_buffer=4096)


def test_a_stuck_stream_does_not_keep_the_others_from_the_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_GOODBYE", 0.05)

    async def test(rig: Rig) -> None:
        await rig.connect()
        await rig.subscribed("flood")
        await rig.live.publish([Message("flood", bytes(1000), 1) for _ in range(200)])
        peer = await EnginePeer.open(rig.network.transport(), "c")
        await peer.connack()
        assert await packet(rig.control) == codec.encode_disconnect(
            Disconnect(
                reason_code=R.SESSION_TAKEN_OVER,
                properties={P.REASON_STRING: "another connection with the same client identifier"},
            ),
            5,
        )
        await rig.bundle.over.wait()
        await until(lambda: len(rig.live._connections) == 1)

    run(test, buffer=1024, send_buffer=65536)


def test_a_stream_that_takes_nothing_any_more_is_read_a_while_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "_GOODBYE", 0.05)

    async def test(rig: Rig) -> None:
        await rig.connect()
        stream: Any = await rig.subscribed("t")
        stream._in.refused = True  # as STOP_SENDING does; the other direction lives
        await rig.live.publish([Message("t", b"", 1)])
        await reset(stream)
        await until(lambda: len(rig.client._streams) == 1)
        assert rig.live.stats.subscriptions == 0
        await rig.ping()

    run(test)


def test_a_stream_that_ended_and_whose_rest_is_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LINGER", 0.05)

    async def test(rig: Rig) -> None:
        await rig.connect()
        stuck = await rig.subscribed("flood")
        await rig.live.publish([Message("flood", bytes(1000), 1) for _ in range(200)])
        await stuck.send_eof()
        await until(lambda: len(rig.client._streams) == 1)
        assert rig.bundle.resets == [0]
        await rig.ping()

    run(test, buffer=1024, send_buffer=65536)


# --- the ends -----------------------------------------------------------------------------


def test_streams_that_ended_are_forgotten() -> None:
    async def test(rig: Rig) -> None:
        await rig.connect()
        await rig.ping()
        before = len(asyncio.all_tasks())
        for number in range(300):
            stream = await rig.stream(subscribe(1, "t"), publish("nobody", b"", 2))
            assert (await packet(stream))[0] == 0x90
            assert (await packet(stream))[0] == 0x40
            match number % 4:
                case 0:
                    await stream.send_eof()
                    assert await stream.receive() == b""
                case 1:
                    await stream.aclose()
                case 2:
                    stream.abort()
                case _:
                    await stream.send(b"\xff\x00")
                    await reset(stream)
        await until(lambda: len(rig.client._streams) == 1 and len(asyncio.all_tasks()) <= before)
        session = rig.client.session
        assert session is not None and list(session.outboxes) == [0]
        assert rig.live.stats.subscriptions == 0
        await rig.ping()

    run(test)


def test_disconnect_is_read_though_the_connection_has_ended() -> None:
    """The last packets and the end of the connection come together: nothing takes the answers any
    more, and still all is read; the will must not be published."""

    async def test(rig: Rig) -> None:
        watcher = await EnginePeer.open(rig.network.transport(), "watcher")
        await watcher.connack()
        await watcher.subscribe("will", "t")
        await rig.connect(will=Will(Message("will", b"")))
        await rig.stream()
        count = 30_000  # more than one read brings
        wire = publish("t", b"", 1) + publish("t") * count + codec.encode_disconnect(Disconnect(), 5)
        await rig.control.send(wire)
        rig.bundle.end()
        await rig.control.aclose()
        await until(lambda: rig.live.stats.connections == 1)
        assert {message.topic for message in await watcher.received(1 + count)} == {"t"}
        await watcher.nothing_more()

    run(test, buffer=1 << 20)


def test_a_connection_that_ends_before_its_first_stream() -> None:
    async def test(rig: Rig) -> None:
        await until(lambda: rig.live.stats.connections)
        rig.bundle.end()
        await until(lambda: not rig.live.stats.connections)

    run(test)


def test_a_takeover_by_another_transport_keeps_what_is_on_the_control_stream() -> None:
    async def test(rig: Rig) -> None:
        await rig.connect(clean_start=False, properties={P.SESSION_EXPIRY: 100})
        await rig.control.send(subscribe(1, "kept"))
        assert (await packet(rig.control))[0] == 0x90
        await rig.live.publish([Message("kept", b"1", 1)])
        assert (await packet(rig.control)).endswith(b"1")  # in flight, not acknowledged
        await rig.subscribed("gone", "kept")
        peer = await EnginePeer.open(rig.network.transport(), "c", clean=False, expiry=100)
        assert (await peer.connack()).session_present
        assert rig.live.stats.subscriptions == 1
        await rig.live.publish([Message("kept", b"2", 1), Message("gone", b"", 1)])
        assert [message.payload for message in await peer.received(2)] == [b"1", b"2"]
        await peer.nothing_more()
        await rig.bundle.over.wait()

    run(test)


# --- what is told -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quic", "words"),
    [
        (None, "over bundle"),
        (QuicStatus(QuicState.ONE_RTT), "over bundle"),
        (QuicStatus(QuicState.ONE_RTT, resumed=True), "over bundle, resumed"),
        (QuicStatus(QuicState.ONE_RTT, resumed=True, early_data_accepted=True), "resumed with 0-RTT"),
        (QuicStatus(QuicState.HANDSHAKE), "resumed with 0-RTT"),  # it is not complete yet
    ],
)
def test_the_log_tells_how_a_client_came(
    quic: QuicStatus | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(rig: Rig) -> None:
        rig.bundle.quic = quic
        await rig.connect()

    with caplog.at_level(logging.INFO):
        run(test)
    (line,) = [one for one in caplog.messages if "connected from" in one]
    assert line.endswith(words)


def test_what_a_listener_counts_can_be_seen_and_is_logged_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    status = ListenerStatus(accepted=12, resumed=3, refused={"max_connections": 2}, retries=4)

    async def main() -> None:
        live = Broker()
        specs = [
            ListenerSpec("quic", OneBundle(url=BoundUrl("bundle://here", lambda: status))),
            ListenerSpec("pair", Network().transport()),
        ]
        async with live.serving(specs) as addresses:
            assert addresses == ["bundle://here", "pair://broker"]
            assert live.listeners() == {"quic": status, "pair": None}

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert (
        "listener quic: 12 connections accepted, 3 resumed, 4 address validations, "
        "2 refused (max_connections 2)" in caplog.messages
    )
