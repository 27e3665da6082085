"""What the standard forbids is answered with the right DISCONNECT, CONNACK or close."""

from __future__ import annotations

import pytest
from engine_bytes import PUBLISH_Q1, client, closing, disconnect_code, ended, raw, server, written

from tesaiot_connect.errors import ProtocolError
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import (
    AuthChallenge,
    Closed,
    Received,
    Suback,
    SubscribeRequest,
)
from tesaiot_connect.mqtt.packets import Connack, Connect, Subscription, Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        ("30 04 0001 23 00", R.TOPIC_NAME_INVALID),
        ("30 07 0001 61 03 230000", R.TOPIC_ALIAS_INVALID),
        ("30 07 0001 61 03 230003", R.TOPIC_ALIAS_INVALID),
        ("30 06 0000 03 230001", R.PROTOCOL_ERROR),
        ("30 06 0001 61 02 0b01", R.PROTOCOL_ERROR),
        ("82 06 0001 00 0000 00", R.TOPIC_FILTER_INVALID),
        ("82 06 0001 00 0001 61", R.MALFORMED_PACKET),
        ("10 0d 0004 4d515454 05 02 003c 00 0000", R.PROTOCOL_ERROR),
        ("10 0d 0004 4d515454 07 02 003c 00 0000", R.PROTOCOL_ERROR),
        ("20 03 00 00 00", R.PROTOCOL_ERROR),
        ("30 ff ff 7f", R.PACKET_TOO_LARGE),
        ("40 02 0000", R.PROTOCOL_ERROR),
        ("60 02 0001", R.MALFORMED_PACKET),
        ("f0 07 18 05 15 0002 6162", R.PROTOCOL_ERROR),
    ],
)
def test_a_server_says_why_it_ends_a_connection_and_a_3_1_1_server_just_closes(wire, code):
    limits = ServerLimits(topic_alias_maximum=2, maximum_packet_size=1000)
    engine = server(limits=limits)
    # what came before the violation still counts
    good = raw(PUBLISH_Q1.format(9))
    events = engine.receive_data(good + raw(wire) + good, now=1.0)
    assert [type(one) for one in events] == [Received, Closed]
    assert events[0].ids == [9]
    closed = ended(events, code)
    assert not closed.orderly
    assert not closed.by_peer
    assert closed.text
    data, shut = closing(engine)
    assert shut
    assert disconnect_code(data) == code
    assert engine.receive_data(good, now=1.0) == []

    engine = server(4, limits=limits)
    ended(engine.receive_data(b"\xf0\x00", now=1.0), R.PROTOCOL_ERROR)
    assert closing(engine) == (b"", True)


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        ("20 03 00 00 00", R.PROTOCOL_ERROR),
        ("90 04 0001 00 00", R.PROTOCOL_ERROR),
        ("c0 00", R.PROTOCOL_ERROR),
        ("e0 07 00 05 11 00000001", R.PROTOCOL_ERROR),
        ("f0 06 00 04 15 0001 61", R.PROTOCOL_ERROR),
        ("30 07 0001 61 03 230001", R.TOPIC_ALIAS_INVALID),
    ],
)
def test_a_client_says_why_it_ends_a_connection(wire, code):
    engine = client()
    ended(engine.receive_data(raw(wire), now=1.0), code)
    data, shut = closing(engine)
    assert shut
    assert disconnect_code(data) == code


def test_a_3_1_1_client_does_not_say_disconnect_when_all_is_not_well():
    """DISCONNECT would discard the will (3.1.1 section 3.14.4)."""
    engine = client(4)
    ended(engine.receive_data(b"\xe0\x00", now=1.0), R.PROTOCOL_ERROR)
    assert closing(engine) == (b"", True)
    engine = client(4)
    engine.disconnect(R.DISCONNECT_WITH_WILL)
    assert closing(engine) == (b"", True)
    engine = client(4)
    engine.disconnect()
    assert closing(engine) == (b"\xe0\x00", True)
    assert ended(engine.take_events(), 0).orderly


@pytest.mark.parametrize(
    "wire",
    ["30 04 0001 61 00", "40 02 0001", "62 02 0001", "c0 00", "82 07 0001 00 0001 61 00", "e0 00", "f0 00"],
)
def test_the_first_packet_must_be_connect(wire):
    engine = ServerEngine(ServerLimits(), now=0.0)
    ended(engine.receive_data(raw(wire), now=0.0))
    assert closing(engine) == (b"", True)


@pytest.mark.parametrize(
    "wire", ["30 04 0001 61 00", "40 02 0001", "50 02 0001", "d0 00", "90 04 0001 00 00", "e0 00"]
)
def test_a_client_takes_nothing_before_connack(wire):
    engine = ClientEngine(Connect(client_id="c"), Session(), now=0.0)
    written(engine)
    ended(engine.receive_data(raw(wire), now=0.0), R.PROTOCOL_ERROR)
    assert closing(engine) == (b"", True)


@pytest.mark.parametrize("level", [0, 2, 6, 0x7F])
def test_an_unknown_protocol_level_is_refused(level):
    engine = ServerEngine(ServerLimits(), now=0.0)
    wire = raw(f"10 0d 0004 4d515454 {level:02x} 02 003c 00 0000")
    ended(engine.receive_data(wire, now=0.0), R.UNSUPPORTED_PROTOCOL_VERSION)
    assert closing(engine) == (raw("20 03 00 84 00"), True)


def test_a_3_1_1_client_without_name_cannot_keep_a_session():
    engine = ServerEngine(ServerLimits(), now=0.0)
    wire = codec.encode_connect(Connect(client_id="", version=4, clean_start=False))
    ended(engine.receive_data(wire, now=0.0), R.CLIENT_IDENTIFIER_NOT_VALID)
    assert closing(engine) == (raw("20 02 00 02"), True)


@pytest.mark.parametrize(
    ("will", "limits", "code"),
    [
        (Message("w", b"", 2), ServerLimits(maximum_qos=1), R.QOS_NOT_SUPPORTED),
        (Message("w", b"", 0, True), ServerLimits(retain_available=False), R.RETAIN_NOT_SUPPORTED),
    ],
)
def test_a_will_the_server_does_not_take_is_refused(will, limits, code):
    engine = ServerEngine(limits, now=0.0)
    ended(engine.receive_data(codec.encode_connect(Connect(client_id="c", will=Will(will))), now=0.0), code)
    data, shut = closing(engine)
    assert shut
    assert data[:1] + data[2:4] == bytes((0x20, 0, code))


def test_a_server_can_refuse_and_redirect():
    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c")), now=0.0)
    engine.refuse(R.USE_ANOTHER_SERVER, properties={P.SERVER_REFERENCE: "b:1"})
    ended(engine.take_events(), R.USE_ANOTHER_SERVER)
    data, shut = closing(engine)
    assert shut
    assert data.startswith(raw("20 09 00 9c 06 1c 0003 623a31"))
    peer = ClientEngine(Connect(client_id="c"), Session(), now=0.0)
    closed = ended(peer.receive_data(data, now=0.0), R.USE_ANOTHER_SERVER)
    assert closed.by_peer
    assert closed.properties[P.SERVER_REFERENCE] == "b:1"

    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c", version=4)), now=0.0)
    engine.refuse(R.BANNED)
    assert closing(engine) == (raw("20 02 00 05"), True)


def test_a_session_that_was_to_start_clean_must_not_be_present():
    engine = ClientEngine(Connect(client_id="c", clean_start=True), Session(), now=0.0)
    ended(engine.receive_data(raw("20 03 01 00 00"), now=0.0), R.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    ("qos", "retain", "code"), [(2, False, R.QOS_NOT_SUPPORTED), (0, True, R.RETAIN_NOT_SUPPORTED)]
)
def test_a_server_enforces_what_it_announced(qos, retain, code):
    engine = server(limits=ServerLimits(maximum_qos=1, retain_available=False))
    peer = client(connack=Connack())
    peer.publish([Message("t", b"", qos, retain)], [1])
    ended(engine.receive_data(written(peer), now=0.0), code)
    assert disconnect_code(closing(engine)[0]) == code


# --- DISCONNECT and AUTH -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "code", "orderly"),
    [("e0 00", 0, True), ("e0 01 00", 0, True), ("e0 01 04", 4, False), ("e0 01 80", 0x80, False)],
)
def test_only_a_normal_disconnect_discards_the_will(wire, code, orderly):
    engine = server()
    closed = ended(engine.receive_data(raw(wire), now=0.0), code)
    assert closed.by_peer
    assert closed.orderly == orderly
    assert closing(engine) == (b"", True)


def test_session_expiry_cannot_be_set_by_disconnect_where_connect_had_none():
    wire = raw("e0 07 00 05 11 00000005")
    closed = ended(server().receive_data(wire, now=0.0), R.PROTOCOL_ERROR)
    assert not closed.orderly
    closed = ended(server(announced={P.SESSION_EXPIRY: 9}).receive_data(wire, now=0.0), 0)
    assert closed.properties == {P.SESSION_EXPIRY: 5}
    ended(server().receive_data(raw("e0 07 00 05 11 00000000"), now=0.0), 0)
    engine = client()
    with pytest.raises(ProtocolError):
        engine.disconnect(properties={P.SESSION_EXPIRY: 5})
    assert engine.connected
    engine = client(announced={P.SESSION_EXPIRY: 9})
    engine.disconnect(properties={P.SESSION_EXPIRY: 5})
    assert closing(engine) == (wire, True)


def test_disconnect_is_said_once():
    engine = client()
    engine.disconnect()
    engine.disconnect(R.UNSPECIFIED_ERROR)
    assert closing(engine) == (b"\xe0\x00", True)
    assert engine.outputs() == []
    assert len(engine.take_events()) == 1


AUTH_CONNECT = codec.encode_connect(
    Connect(client_id="c", properties={P.AUTH_METHOD: "M", P.AUTH_DATA: b"1"})
)


def test_while_authenticating_only_auth_and_disconnect_may_come():
    for wire, by_peer in (
        ("c0 00", False),
        ("30 04 0001 61 00", False),
        ("82 07 0001 00 0001 61 00", False),
        ("f0 07 00 05 15 0002 4d4d", False),
        ("f0 06 19 04 15 0001 4d", False),
        ("e0 01 80", True),
    ):
        engine = ServerEngine(ServerLimits(), now=0.0)
        engine.receive_data(AUTH_CONNECT, now=0.0)
        engine.challenge("M", b"?")
        assert written(engine) == raw("f0 0a 18 08 15 0001 4d 16 0001 3f")
        closed = ended(engine.receive_data(raw(wire), now=0.0))
        assert closed.by_peer == by_peer
        assert closing(engine) == (b"", True)


def test_what_came_before_the_challenge_is_judged_with_it():
    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.receive_data(AUTH_CONNECT + raw("30 04 00"), now=0.0)
    assert engine.receive_data(raw("01 61 00"), now=0.0) == []
    engine.challenge("M", b"?")
    ended(engine.take_events(), R.PROTOCOL_ERROR)
    assert closing(engine)[1]
    engine.challenge("M", b"?")
    assert engine.outputs() == []


def test_auth_with_another_method_or_unasked_is_a_violation():
    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.receive_data(AUTH_CONNECT, now=0.0)
    engine.challenge("M", b"?")
    ended(engine.receive_data(raw("f0 06 18 04 15 0001 4e"), now=0.0), R.PROTOCOL_ERROR)

    engine = server(announced={P.AUTH_METHOD: "M"})
    ended(engine.receive_data(raw("f0 06 18 04 15 0001 4d"), now=0.0), R.PROTOCOL_ERROR)
    engine = server()
    ended(engine.receive_data(raw("f0 06 19 04 15 0001 4d"), now=0.0), R.PROTOCOL_ERROR)
    engine = server(announced={P.AUTH_METHOD: "M"})
    [event] = engine.receive_data(raw("f0 06 19 04 15 0001 4d"), now=0.0)
    assert event == AuthChallenge("M", b"", False)
    engine.challenge("M", b"", final=True)
    assert written(engine) == raw("f0 09 00 07 15 0001 4d 16 0000")

    peer = client(announced={P.AUTH_METHOD: "M"})
    ended(peer.receive_data(raw("f0 06 18 04 15 0001 4d"), now=0.0), R.PROTOCOL_ERROR)


def test_connack_repeats_the_method_and_no_other():
    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.receive_data(AUTH_CONNECT, now=0.0)
    engine.accept(Session(), now=0.0, session_present=False)
    assert raw("15 0001 4d") in written(engine)
    for connect in (Connect(client_id="c"), Connect(client_id="c", properties={P.AUTH_METHOD: "N"})):
        peer = ClientEngine(connect, Session(), now=0.0)
        ended(peer.receive_data(raw("20 07 00 00 04 15 0001 4d"), now=0.0), R.PROTOCOL_ERROR)


def test_what_comes_between_connect_and_accept_is_held_within_bounds():
    engine = ServerEngine(ServerLimits(maximum_packet_size=100), now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c")), now=0.0)
    publish = raw("30 04 0001 61 00")
    for _ in range(16):
        assert engine.receive_data(publish, now=0.0) == []
    ended(engine.receive_data(publish, now=0.0), R.PACKET_TOO_LARGE)
    data, shut = closing(engine)
    assert shut
    assert data[:1] + data[3:4] == b"\x20\x95"
    assert engine.receive_data(publish * 1000, now=0.0) == []


# --- SUBSCRIBE ---------------------------------------------------------------------------------


def test_subscriptions_arrive_with_all_their_options():
    engine = server()
    wanted = [Subscription("a/+", 2, True, True, 1), Subscription("$share/g/#", 0, False, True, 2)]
    peer = client()
    packet_id = peer.subscribe(wanted, properties={P.SUBSCRIPTION_ID: [268_435_455]})
    [request] = engine.receive_data(written(peer), now=0.0)
    assert isinstance(request, SubscribeRequest)
    assert request.packet.subscriptions == tuple(wanted)
    assert request.packet.properties[P.SUBSCRIPTION_ID] == [268_435_455]
    engine.suback(request, [2, 0x97], text="too many")
    assert peer.receive_data(written(engine), now=0.0) == [Suback(packet_id, (2, 0x97), "too many")]


@pytest.mark.parametrize(
    "bad",
    [
        Subscription(""),
        Subscription("a/#/b"),
        Subscription("$share/g"),
        Subscription("$share/g/a", no_local=True),
    ],
)
def test_an_invalid_subscription_is_refused_where_it_is_made(bad):
    engine = client()
    with pytest.raises(ProtocolError):
        engine.subscribe([Subscription("good"), bad])
    with pytest.raises(ProtocolError):
        engine.subscribe([])
    assert written(engine) == b""
    assert engine.connected


def test_a_suback_must_answer_every_filter_of_a_subscribe_that_was_sent():
    engine = client()
    packet_id = engine.subscribe([Subscription("a"), Subscription("b")])
    written(engine)
    ended(engine.receive_data(raw(f"90 04 {packet_id:04x} 00 00"), now=0.0), R.PROTOCOL_ERROR)
    engine = client()
    ended(engine.receive_data(raw("b0 04 0001 00 00"), now=0.0), R.PROTOCOL_ERROR)


def test_topic_aliases_live_as_long_as_the_connection():
    engine = server(limits=ServerLimits(topic_alias_maximum=2))
    events = engine.receive_data(
        raw("30 07 0001 61 03 230002 | 30 06 0000 03 230002 | 30 07 0001 62 03 230002"), now=0.0
    )
    events += engine.receive_data(raw("30 06 0000 03 230002"), now=0.0)
    assert [message.topic for one in events for message in one.messages] == ["a", "a", "b", "b"]
    again = server(limits=ServerLimits(topic_alias_maximum=2))
    ended(again.receive_data(raw("30 06 0000 03 230002"), now=0.0), R.PROTOCOL_ERROR)
