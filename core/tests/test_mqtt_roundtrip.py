"""Any packet survives encoding and decoding; any bytes give packets or one ProtocolError, nothing else."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tesaiot_connect.errors import ProtocolError
from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt import codec, properties as t
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.decoder import Acks, Decoder, Publishes
from tesaiot_connect.mqtt.events import (
    AuthChallenge,
    Close,
    Closed,
    ConnectRequest,
    Received,
    Send,
    SubscribeRequest,
    UnsubscribeRequest,
)
from tesaiot_connect.mqtt.flow import Flow, PeerLimits
from tesaiot_connect.mqtt.packets import (
    Auth,
    Connack,
    Connect,
    Disconnect,
    SubackPacket,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
)
from tesaiot_connect.mqtt.primitives import Cursor
from tesaiot_connect.mqtt.properties import P, read_properties, write_properties
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session


def prop(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize="CI" in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
topic = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0+#"), min_size=1, max_size=30)
level = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0+#/$"), max_size=5) | st.just(
    "+"
)
plain_filter = st.builds(
    lambda levels, deep: "/".join(levels) + ("/#" if deep else ""),
    st.lists(level, min_size=1, max_size=4),
    st.booleans(),
).filter(bool)
topic_filter = plain_filter | st.builds("$share/{}/{}".format, st.sampled_from(["g", "été"]), plain_filter)
packet_id = st.integers(1, 65535)
u8, u16, u32 = st.integers(0, 1), st.integers(0, 65535), st.integers(0, 0xFFFFFFFF)
pairs = st.lists(st.tuples(text, text), min_size=1, max_size=4)
VALUES = {
    P.PAYLOAD_FORMAT: u8,
    P.MESSAGE_EXPIRY: u32,
    P.CONTENT_TYPE: text,
    P.RESPONSE_TOPIC: topic,
    P.CORRELATION_DATA: st.binary(max_size=20),
    P.SUBSCRIPTION_ID: st.lists(st.integers(1, 268_435_455), min_size=1, max_size=1),
    P.SESSION_EXPIRY: u32,
    P.ASSIGNED_CLIENT_ID: text,
    P.SERVER_KEEP_ALIVE: u16,
    P.AUTH_METHOD: text,
    P.AUTH_DATA: st.binary(max_size=20),
    P.REQUEST_PROBLEM_INFO: u8,
    P.WILL_DELAY: u32,
    P.REQUEST_RESPONSE_INFO: u8,
    P.RESPONSE_INFO: text,
    P.SERVER_REFERENCE: text,
    P.REASON_STRING: text,
    P.RECEIVE_MAXIMUM: st.integers(1, 65535),
    P.TOPIC_ALIAS_MAXIMUM: u16,
    P.TOPIC_ALIAS: st.integers(1, 65535),
    P.MAXIMUM_QOS: u8,
    P.RETAIN_AVAILABLE: u8,
    P.USER: pairs,
    P.MAXIMUM_PACKET_SIZE: st.integers(1, 0xFFFFFFFF),
    P.WILDCARD_AVAILABLE: u8,
    P.SUBSCRIPTION_IDS_AVAILABLE: u8,
    P.SHARED_AVAILABLE: u8,
}
# section 2.2.2.2, table 2-4, written down a second time
PLACES = {
    t.CONNECT: "SESSION_EXPIRY AUTH_METHOD AUTH_DATA REQUEST_PROBLEM_INFO REQUEST_RESPONSE_INFO "
    "RECEIVE_MAXIMUM TOPIC_ALIAS_MAXIMUM USER MAXIMUM_PACKET_SIZE",
    t.CONNACK: "SESSION_EXPIRY ASSIGNED_CLIENT_ID SERVER_KEEP_ALIVE AUTH_METHOD AUTH_DATA RESPONSE_INFO "
    "SERVER_REFERENCE REASON_STRING RECEIVE_MAXIMUM TOPIC_ALIAS_MAXIMUM MAXIMUM_QOS RETAIN_AVAILABLE USER "
    "MAXIMUM_PACKET_SIZE WILDCARD_AVAILABLE SUBSCRIPTION_IDS_AVAILABLE SHARED_AVAILABLE",
    t.PUBLISH: "PAYLOAD_FORMAT MESSAGE_EXPIRY CONTENT_TYPE RESPONSE_TOPIC CORRELATION_DATA SUBSCRIPTION_ID "
    "TOPIC_ALIAS USER",
    t.WILL: "PAYLOAD_FORMAT MESSAGE_EXPIRY CONTENT_TYPE RESPONSE_TOPIC CORRELATION_DATA WILL_DELAY USER",
    t.PUBACK: "REASON_STRING USER",
    t.PUBREC: "REASON_STRING USER",
    t.PUBREL: "REASON_STRING USER",
    t.PUBCOMP: "REASON_STRING USER",
    t.SUBSCRIBE: "SUBSCRIPTION_ID USER",
    t.SUBACK: "REASON_STRING USER",
    t.UNSUBSCRIBE: "USER",
    t.UNSUBACK: "REASON_STRING USER",
    t.DISCONNECT: "SESSION_EXPIRY SERVER_REFERENCE REASON_STRING USER",
    t.AUTH: "AUTH_METHOD AUTH_DATA REASON_STRING USER",
}
PLACES = {place: [P[name] for name in names.split()] for place, names in PLACES.items()}


SAMPLES = {
    **dict.fromkeys(P, 1),
    **dict.fromkeys((P.CONTENT_TYPE, P.RESPONSE_TOPIC, P.ASSIGNED_CLIENT_ID, P.AUTH_METHOD), "x"),
    **dict.fromkeys((P.RESPONSE_INFO, P.SERVER_REFERENCE, P.REASON_STRING), "x"),
    P.CORRELATION_DATA: b"x",
    P.AUTH_DATA: b"x",
    P.SUBSCRIPTION_ID: [1],
    P.USER: [("k", "v")],
}


@pytest.mark.parametrize("key", P)
def test_each_property_stands_where_the_standard_puts_it_and_nowhere_else(key):
    found = {key: SAMPLES[key]}
    if key is P.AUTH_DATA:  # never alone
        found = {P.AUTH_METHOD: "m", **found}
    raw = write_properties(found)
    for place, allowed in PLACES.items():
        if key in allowed:
            assert read_properties(Cursor(raw, 0, len(raw)), place) == found
        else:
            with pytest.raises(ProtocolError) as error:
                read_properties(Cursor(raw, 0, len(raw)), place)
            assert error.value.reason_code == 0x81


def properties_of(place):
    def sane(found):
        if P.AUTH_DATA in found and P.AUTH_METHOD not in found:
            del found[P.AUTH_DATA]
        return found

    return st.fixed_dictionaries({}, optional={key: VALUES[key] for key in PLACES[place]}).map(sane)


message_properties = st.builds(
    Properties,
    payload_format=st.none() | u8,
    message_expiry=st.none() | u32,
    content_type=st.none() | text,
    response_topic=st.none() | topic,
    correlation_data=st.none() | st.binary(max_size=20),
    user=st.lists(st.tuples(text, text), max_size=3).map(tuple),
)
messages = st.builds(
    Message,
    topic,
    st.binary(max_size=300),
    st.integers(0, 2),
    st.booleans(),
    st.just(Properties()) | message_properties,
)
subscriptions = st.builds(
    Subscription, topic_filter, st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 2)
).map(
    lambda one: one if not one.topic_filter.startswith("$share/") else Subscription(one.topic_filter, one.qos)
)
connects = st.builds(
    Connect,
    client_id=text,
    version=st.just(5),
    clean_start=st.booleans(),
    keepalive=u16,
    username=st.none() | text,
    password=st.none() | st.binary(max_size=20),
    will=st.none() | st.builds(Will, messages, u32),
    properties=properties_of(t.CONNECT),
)


def bare(message):
    return Message(message.topic, message.payload, message.qos, message.retain)


def to_v3(connect, version):
    return Connect(
        client_id=connect.client_id,
        version=version,
        clean_start=connect.clean_start,
        keepalive=connect.keepalive,
        username=connect.username,
        password=connect.password if connect.username is not None else None,
        will=None if connect.will is None else Will(bare(connect.will.message)),
    )


acks = st.sampled_from(
    [
        (kind, code)
        for kind in (t.PUBACK, t.PUBREC, t.PUBREL, t.PUBCOMP)
        for code in sorted(codec.ACK_CODES[kind])
    ]
)


def encode_ack(kind, identifier, code, found):
    body = identifier.to_bytes(2)
    if code or found:
        body += bytes((code,))
    if found:
        body += write_properties(found)
    return bytes((kind << 4 | codec.FLAGS.get(kind, 0), len(body))) + body if len(body) < 128 else None


packets = st.one_of(
    connects.map(lambda one: (True, 5, codec.encode_connect(one), one)),
    st.builds(
        lambda one, version: (True, 4, codec.encode_connect(to_v3(one, version)), to_v3(one, version)),
        connects,
        st.sampled_from([3, 4]),
    ),
    st.builds(Connack, reason_code=st.sampled_from([0, 0x87, 0x9C]), properties=properties_of(t.CONNACK)).map(
        lambda one: (False, 5, codec.encode_connack(one, 5), one)
    ),
    st.sampled_from([0, 0x84, 0x85, 0x86, 0x87, 0x88]).map(
        lambda code: (False, 4, codec.encode_connack(Connack(reason_code=code), 4), Connack(reason_code=code))
    ),
    st.builds(
        Subscribe,
        packet_id=packet_id,
        subscriptions=st.lists(subscriptions, min_size=1, max_size=4).map(tuple),
        properties=properties_of(t.SUBSCRIBE),
    ).map(lambda one: (True, 5, codec.encode_subscribe(one, 5), one)),
    st.builds(
        Subscribe,
        packet_id=packet_id,
        subscriptions=st.lists(st.builds(Subscription, topic_filter, st.integers(0, 2)), min_size=1).map(
            tuple
        ),
    ).map(lambda one: (True, 4, codec.encode_subscribe(one, 4), one)),
    st.builds(
        Unsubscribe,
        packet_id=packet_id,
        filters=st.lists(topic_filter, min_size=1, max_size=4).map(tuple),
        properties=properties_of(t.UNSUBSCRIBE),
    ).map(lambda one: (True, 5, codec.encode_unsubscribe(one, 5), one)),
    st.builds(
        SubackPacket,
        packet_id=packet_id,
        codes=st.lists(st.sampled_from([0, 1, 2, 0x80, 0x97]), min_size=1).map(bytes),
        properties=properties_of(t.SUBACK),
    ).map(lambda one: (False, 5, codec.encode_suback(0x90, one, 5), one)),
    st.builds(
        SubackPacket,
        packet_id=packet_id,
        codes=st.lists(st.sampled_from([0, 0x11, 0x87]), min_size=1).map(bytes),
        properties=properties_of(t.UNSUBACK),
    ).map(lambda one: (False, 5, codec.encode_suback(0xB0, one, 5), one)),
    st.builds(
        Disconnect,
        reason_code=st.sampled_from([0, 4, 0x80, 0x9D, 0xA2]),
        properties=properties_of(t.DISCONNECT),
    ).map(lambda one: (True, 5, codec.encode_disconnect(one, 5), one)),
    st.builds(
        Auth,
        reason_code=st.sampled_from([0, 0x18, 0x19]),
        properties=properties_of(t.AUTH).map(lambda found: {P.AUTH_METHOD: "m", **found}),
    ).map(lambda one: (False, 5, codec.encode_auth(one), one)),
    st.builds(
        lambda ack, identifier, found: (
            True,
            5,
            encode_ack(*ack[:1], identifier, ack[1], found),
            Acks(ack[0], [identifier], {identifier: ack[1]} if ack[1] else {}),
        ),
        acks,
        packet_id,
        properties_of(t.PUBACK),
    ).filter(lambda one: one[2] is not None),
)


@prop(400)
@given(packets)
def test_control_packets_survive_the_wire(case):
    from_client, version, wire, packet = case
    found = Decoder(from_client=from_client, version=version, maximum_packet_size=1 << 20).feed(wire)
    assert found == [packet]


@prop(150)
@given(
    st.lists(messages, min_size=1, max_size=12),
    st.sampled_from([4, 5]),
    st.integers(0, 4),
    st.booleans(),
    st.lists(st.integers(1, 40), max_size=30),
)
def test_messages_survive_the_wire_in_any_chunks(batch, version, aliases, server, sizes):
    flow = Flow(0, Session(), Decoder(from_client=server), send_buffer=1 << 20, server=server)
    flow.start(version, PeerLimits(topic_alias_maximum=aliases))
    assert flow.publish(batch, range(len(batch))) == len(batch)
    assert flow.refused == {}
    decoder = Decoder(from_client=not server, version=version, topic_alias_maximum=aliases)
    found, ids = [], []
    for chunk in chunks(flow.take(), sizes):
        for item in decoder.feed(chunk):
            assert type(item) is Publishes
            assert item.qos2 == any(one.qos == 2 for one in item.messages)
            found += item.messages
            ids += item.ids
    assert found == (batch if version == 5 else [bare(one) for one in batch])
    assert ids == [*_numbered(batch)]


def _numbered(batch):
    last = 0
    for message in batch:
        if message.qos:
            last += 1
        yield last if message.qos else 0


def chunks(data, sizes):
    at = 0
    for size in sizes:
        if at >= len(data):
            return
        yield data[at : at + size]
        at += size
    yield data[at:]


LIMIT = 2048
noise = st.binary(max_size=200)


@st.composite
def spoilt(draw):
    """Valid packets of both sides with bytes changed, removed and added."""
    parts = draw(st.lists(packets, min_size=1, max_size=6))
    data = bytearray(b"".join(part[2] for part in parts))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 8))]
            case 2:
                data[at:at] = draw(st.binary(max_size=8))
            case _ if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@prop(300)
@given(noise | spoilt(), st.booleans(), st.sampled_from([4, 5]), st.lists(st.integers(1, 60), max_size=20))
def test_any_bytes_give_items_and_at_most_one_error_at_the_end(data, from_client, version, sizes):
    decoder = Decoder(
        from_client=from_client, version=version, maximum_packet_size=LIMIT, topic_alias_maximum=3
    )
    failed = False
    for chunk in chunks(data, sizes):
        items = decoder.feed(chunk)
        assert not (failed and items)
        for item in items:
            assert not failed
            failed = isinstance(item, ProtocolError)
            if failed:
                assert 0x80 <= item.reason_code <= 0xA2
        if not any(isinstance(item, Connect) for item in items):
            assert decoder.buffered < LIMIT + len(chunk)
    if failed:
        assert decoder.buffered == 0
        assert decoder.feed(b"\xc0\x00" * 10) == []


def test_a_large_packet_is_refused_at_its_header():
    for wire in (b"\x30\xff\xff\xff\x7f", b"\x82\xff\xff\xff\x7f", b"\x10\x80\x20"):
        decoder = Decoder(from_client=True, maximum_packet_size=LIMIT)
        items = [item for byte in wire for item in decoder.feed(bytes([byte]))]
        assert [type(item) for item in items] == [ProtocolError]
        assert items[0].reason_code == 0x95


def test_what_an_unfinished_packet_keeps_is_bounded_by_the_limit():
    decoder = Decoder(from_client=True, maximum_packet_size=LIMIT)
    wire = b"\x30\xf0\x0f" + bytes(3000)
    kept = 0
    for byte in wire[: LIMIT - 70]:
        assert decoder.feed(bytes([byte])) == []
        kept = max(kept, decoder.buffered)
    assert kept == LIMIT - 70


def test_long_topics_are_not_kept():
    """A peer that invents long topics must not fill the memory with them."""
    decoder = Decoder(from_client=True, version=4, maximum_packet_size=1 << 20)
    flow = Flow(0, Session(), Decoder(from_client=True), send_buffer=1 << 30, server=True)
    flow.start(4, PeerLimits())
    for number in range(300):
        name = f"{number:04}" * 4000
        raw = name.encode()
        body = len(raw).to_bytes(2) + raw
        [item] = decoder.feed(b"\x30\x82\x7d" + body)
        flow.publish(item.messages, [number])
        flow.take()
    assert sum(map(len, decoder._topics)) + sum(map(len, flow._topics)) < 100_000


def drive(engine, data, sizes, react):
    """Feeds chunks; checks that nothing comes after Closed, and that closing is said once."""
    closed = 0
    for chunk in chunks(data, sizes):
        for event in engine.receive_data(chunk, now=1.0):
            assert not closed
            closed += isinstance(event, Closed)
            react(event)
        for event in engine.take_events():
            assert not closed
            closed += isinstance(event, Closed)
            react(event)
        engine.next_timeout()
        outputs = engine.outputs()
        assert sum(isinstance(one, Close) for one in outputs) <= 1
        for one in outputs:
            if isinstance(one, Send):
                assert len(one.data) < 100_000
    if closed:
        assert engine.receive_data(b"\xc0\x00", now=1.0) == []
        assert engine.handle_timeout(1e9) == []
        assert engine.outputs() == []
        assert engine.next_timeout() is None


@prop(300)
@given(
    st.none() | connects,
    noise | spoilt(),
    st.lists(st.integers(1, 60), max_size=20),
    st.sampled_from(["accept", "refuse", "challenge", "wait"]),
)
def test_a_server_survives_any_bytes(connect, data, sizes, answer):
    engine = ServerEngine(ServerLimits(maximum_packet_size=LIMIT, receive_maximum=3), now=0.0)

    def react(event):
        if isinstance(event, ConnectRequest):
            if answer == "accept":
                engine.accept(Session(), now=1.0, session_present=False)
                engine.publish([Message("a", b"x", one) for one in (0, 1, 2)], [1, 2, 3])
            elif answer == "refuse":
                engine.refuse(0x87, text="no")
            elif answer == "challenge":
                engine.challenge("m", b"?")
        elif isinstance(event, AuthChallenge):
            engine.challenge(event.method, b"!", final=True)
            engine.accept(Session(), now=1.0, session_present=False)
        elif isinstance(event, Received):
            engine.settle(event.token)
        elif isinstance(event, SubscribeRequest):
            engine.suback(event, [0x80] * len(event.packet.subscriptions), text="no")
        elif isinstance(event, UnsubscribeRequest):
            engine.unsuback(event, [0x11] * len(event.packet.filters))

    head = codec.encode_connect(connect) if connect is not None else b""
    drive(engine, head + data, sizes, react)


@prop(300)
@given(st.sampled_from([4, 5]), st.booleans(), noise | spoilt(), st.lists(st.integers(1, 60), max_size=20))
def test_a_client_survives_any_bytes(version, accepted, data, sizes):
    found = {P.AUTH_METHOD: "m", P.TOPIC_ALIAS_MAXIMUM: 2, P.MAXIMUM_PACKET_SIZE: LIMIT, P.RECEIVE_MAXIMUM: 2}
    connect = Connect(client_id="c", version=version, properties=found if version == 5 else {})
    engine = ClientEngine(connect, Session(), now=0.0)
    engine.outputs()

    def react(event):
        if isinstance(event, AuthChallenge):
            if not event.final:
                engine.auth(b"!")
        elif isinstance(event, Received):
            engine.settle(event.token)

    if accepted:
        engine.receive_data(codec.encode_connack(Connack(), version), now=0.5)
        engine.subscribe([Subscription("a"), Subscription("b")])
        engine.publish([Message("a", b"x", one) for one in (0, 1, 2)], [1, 2, 3])
    drive(engine, data, sizes, react)
