"""What the standard forbids is answered with the right DISCONNECT, CONNACK or close; limits hold."""

from __future__ import annotations

import pytest

from tesaiot_connect.errors import ProtocolError
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import (
    Acknowledged,
    AuthChallenge,
    Close,
    Closed,
    Connected,
    ConnectRequest,
    Received,
    Send,
    Suback,
    SubscribeRequest,
)
from tesaiot_connect.mqtt.packets import Connack, Connect, Subscription, Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import InFlight, Session


def raw(text):
    return bytes.fromhex(text.replace("|", ""))


def written(engine):
    return b"".join(one.data for one in engine.outputs() if isinstance(one, Send))


def closing(engine):
    """The bytes that still go out, and whether the transport is closed behind them."""
    outputs = engine.outputs()
    assert not any(isinstance(one, Close) for one in outputs[:-1])
    return b"".join(one.data for one in outputs if isinstance(one, Send)), bool(outputs) and isinstance(
        outputs[-1], Close
    )


def client(
    version=5, *, session=None, connack=None, clean_start=True, keepalive=60, announced=None, **options
):
    """A connected client."""
    connect = Connect(
        client_id="c",
        version=version,
        clean_start=clean_start,
        keepalive=keepalive,
        properties=announced or {},
    )
    engine = ClientEngine(connect, Session() if session is None else session, now=0.0, **options)
    assert written(engine) == codec.encode_connect(connect)
    found = Connack(session_present=False, properties={}) if connack is None else connack
    events = engine.receive_data(codec.encode_connack(found, version), now=0.0)
    assert isinstance(events[0], Connected)
    return engine


def server(version=5, *, limits=None, session=None, present=False, announced=None, **connect):
    """A server with a client that was accepted."""
    engine = ServerEngine(limits or ServerLimits(), now=0.0)
    packet = Connect(client_id="c", version=version, properties=announced or {}, **connect)
    [request] = engine.receive_data(codec.encode_connect(packet), now=0.0)
    assert request == ConnectRequest(packet)
    engine.accept(Session() if session is None else session, now=0.0, session_present=present)
    assert written(engine)[:1] == b"\x20"
    assert engine.take_events() == []
    return engine


def ended(events, code=None):
    """The Closed with which these events end; checks its reason if one is given."""
    assert isinstance(events[-1], Closed), events
    assert not any(isinstance(one, Closed) for one in events[:-1])
    if code is not None:
        assert events[-1].reason_code == code, events[-1]
    return events[-1]


def disconnect_code(data):
    """The reason code of the DISCONNECT that these bytes end with."""
    at = data.rindex(b"\xe0")
    assert len(data) == at + 2 + data[at + 1]
    return data[at + 2] if data[at + 1] else 0


PUBLISH_Q1 = "32 07 0001 74 {:04x} 00 78"
PUBLISH_Q2 = "34 07 0001 74 {:04x} 00 78"


# --- violations, and how they are answered --------------------------------------------------


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


# --- limits of the other side are kept ------------------------------------------------------


def test_a_client_refuses_with_its_key_what_the_server_does_not_take():
    found = {P.MAXIMUM_QOS: 1, P.RETAIN_AVAILABLE: 0, P.MAXIMUM_PACKET_SIZE: 20, P.TOPIC_ALIAS_MAXIMUM: 1}
    engine = client(connack=Connack(properties=found))
    batch = [
        Message("t", b"", 2),
        Message("t", b"", 0, True),
        Message("t", bytes(20), 1),
        Message("t", bytes(20), 0),
        Message("t", b"", 1),
    ]
    assert engine.publish(batch, [1, 2, 3, 4, 5]) == 5
    assert written(engine) == raw("32 09 0001 74 0003 03 230001")
    [told] = engine.take_events()
    too_large = R.PACKET_TOO_LARGE
    assert told == Acknowledged(
        0, [], {1: R.QOS_NOT_SUPPORTED, 2: R.RETAIN_NOT_SUPPORTED, 3: too_large, 4: too_large}
    )
    assert engine.take_events() == []
    [told] = engine.receive_data(raw("40 02 0003"), now=0.0)
    assert told == Acknowledged(0, [5], {})


def test_refused_keys_come_back_before_the_end():
    engine = client(connack=Connack(properties={P.MAXIMUM_QOS: 0}))
    assert engine.publish([Message("t", b"", 1)], [1]) == 1
    first, second = engine.stream_reset(0, now=0.0)
    assert first == Acknowledged(0, [], {1: R.QOS_NOT_SUPPORTED})
    assert isinstance(second, Closed)


def test_a_packet_of_exactly_the_maximum_passes():
    engine = client(connack=Connack(properties={P.MAXIMUM_PACKET_SIZE: 20}))
    assert engine.publish([Message("t", bytes(14)), Message("t", bytes(15))], [1, 2]) == 2
    assert len(written(engine)) == 20
    assert engine.take_events() == [Acknowledged(0, [], {2: R.PACKET_TOO_LARGE})]
    peer = server(limits=ServerLimits(maximum_packet_size=20))
    assert peer.receive_data(b"\x30\x12\x00\x01t\x00" + bytes(14), now=0.0)[0].messages[0].payload == bytes(
        14
    )
    ended(peer.receive_data(b"\x30\x13\x00\x01t\x00" + bytes(15), now=0.0), R.PACKET_TOO_LARGE)


def test_a_subscribe_the_server_does_not_take_is_not_sent():
    engine = client(connack=Connack(properties={P.MAXIMUM_PACKET_SIZE: 20}))
    with pytest.raises(ProtocolError) as error:
        engine.subscribe([Subscription("a" * 20)])
    assert error.value.reason_code == R.PACKET_TOO_LARGE
    assert written(engine) == b""
    engine.subscribe([Subscription("a")])
    assert len(written(engine)) == 9


def test_a_server_keeps_within_the_clients_maximum_packet_size():
    engine = server(announced={P.MAXIMUM_PACKET_SIZE: 40})
    assert engine.publish([Message("t", bytes(40), 1), Message("t", b"", 1)], [1, 2]) == 2
    assert engine.take_events() == [Acknowledged(0, [], {1: R.PACKET_TOO_LARGE})]
    assert written(engine) == raw("32 06 0001 74 0002 00")
    # reason strings give way (section 3.9.2.1.2)
    [request] = engine.receive_data(raw("82 07 0001 00 0001 61 00"), now=0.0)
    engine.suback(request, [0x80], text="no" * 50)
    assert written(engine) == raw("90 04 0001 00 80")
    [request] = engine.receive_data(raw("82 07 0001 00 0001 61 00"), now=0.0)
    engine.suback(request, [0x80], text="no")
    assert written(engine) == raw("90 09 0001 05 1f 0002 6e6f 80")
    engine.disconnect(R.SERVER_SHUTTING_DOWN, text="a long explanation of why this has to be now")
    assert closing(engine) == (raw("e0 01 8b"), True)


def test_a_client_too_small_for_connack_is_let_go():
    engine = ServerEngine(ServerLimits(), now=0.0)
    wire = codec.encode_connect(Connect(client_id="c", properties={P.MAXIMUM_PACKET_SIZE: 4}))
    engine.receive_data(wire, now=0.0)
    engine.accept(Session(), now=0.0, session_present=False)
    ended(engine.take_events(), R.PACKET_TOO_LARGE)
    assert closing(engine) == (b"", True)


def test_no_reason_string_where_the_client_wants_none():
    engine = server(announced={P.REQUEST_PROBLEM_INFO: 0})
    [request] = engine.receive_data(raw("82 07 0001 00 0001 61 00"), now=0.0)
    engine.suback(request, [0x80], text="no")
    assert written(engine) == raw("90 04 0001 00 80")


def test_a_sender_stops_at_receive_maximum_and_goes_on_as_it_is_acknowledged():
    engine = client(connack=Connack(properties={P.RECEIVE_MAXIMUM: 2}))
    batch = [Message("t", b"x", qos) for qos in (1, 0, 2, 0, 1)]
    assert engine.publish(batch, [1, 2, 3, 4, 5]) == 4
    assert engine.publish(batch[4:], [5]) == 0
    assert engine.publish([Message("t", b"x")], [6]) == 1
    written(engine)
    assert engine.receive_data(raw("50 02 0002"), now=0.0) == []
    assert written(engine) == raw("62 02 0002")
    assert engine.publish(batch[4:], [5]) == 0  # PUBREC frees nothing
    assert engine.receive_data(raw("70 02 0002"), now=0.0) == [Acknowledged(0, [3], {})]
    assert engine.publish(batch[4:], [5]) == 1
    assert written(engine) == raw("32 07 0001 74 0003 00 78")
    assert engine.publish(batch[4:], [7]) == 0
    # a refusing PUBREC ends the exchange (section 4.9)
    assert engine.receive_data(raw("40 02 0001 40 03 0003 97"), now=0.0) == [Acknowledged(0, [1], {5: 0x97})]
    assert engine.publish([batch[2]] * 3, [8, 9, 10]) == 2
    written(engine)
    assert engine.receive_data(raw("50 03 0004 97"), now=0.0) == [Acknowledged(0, [], {8: 0x97})]
    assert written(engine) == b""
    assert engine.publish([batch[2]] * 3, [10, 11, 12]) == 1


def test_publish_stops_when_the_send_buffer_is_full():
    engine = client(send_buffer=1000)
    batch = [Message("t", bytes(300))] * 10
    assert engine.publish(batch, range(10)) == 4
    assert engine.publish(batch[4:], range(4, 10)) == 0
    assert len(written(engine)) == 4 * 307
    assert engine.publish(batch[4:], range(4, 10)) == 4


def test_the_window_is_bounded_whatever_the_peer_allows():
    engine = client(4, window=3)
    assert engine.publish([Message("t", b"", 1)] * 10, range(10)) == 3
    engine = server(4, limits=ServerLimits(outbound_window=5))
    assert engine.publish([Message("t", b"", 2)] * 10, range(10)) == 5


def test_a_packet_identifier_in_use_is_not_taken_again():
    session = Session()
    session.last_id = 65533
    engine = client(session=session)
    first = engine.subscribe([Subscription("a")])
    second = engine.unsubscribe(["b"])
    assert (first, second) == (65534, 65535)
    session.last_id = 65533
    assert engine.publish([Message("t", b"", 1)] * 2, [1, 2]) == 2
    assert list(session.outbound) == [1, 2]
    session.last_id = 65533
    assert engine.subscribe([Subscription("c")]) == 3
    [event] = engine.receive_data(raw("90 04 fffe 00 01"), now=0.0)
    assert event == Suback(65534, (1,), "")
    session.last_id = 65533
    assert engine.subscribe([Subscription("c")]) == 65534


def test_identifiers_never_run_out_when_a_session_is_full_of_released_messages():
    session = Session()
    for packet_id in range(1, 64_991):
        session.outbound[packet_id] = InFlight(packet_id, Message("t", b"", 2), True)
    engine = client(session=session, clean_start=False, connack=Connack(session_present=True))
    assert len(written(engine)) == 4 * 64_990
    assert engine.publish([Message("t", b"", 1)] * 20, range(20)) == 10
    assert engine.publish([Message("t", b"", 1)] * 20, range(20)) == 0


def test_more_than_receive_maximum_is_a_violation():
    engine = server(limits=ServerLimits(receive_maximum=2))
    first = engine.receive_data(raw(PUBLISH_Q1.format(1) + PUBLISH_Q2.format(2)), now=0.0)
    assert sum(len(one.messages) for one in first) == 2
    # the identifier of a QoS 2 message counts until PUBREL
    for one in first:
        engine.settle(one.token)
    assert written(engine) == raw("40 02 0001 50 02 0002")
    assert isinstance(engine.receive_data(raw(PUBLISH_Q1.format(3)), now=0.0)[0], Received)
    ended(engine.receive_data(raw(PUBLISH_Q1.format(4)), now=0.0), R.RECEIVE_MAXIMUM_EXCEEDED)
    assert disconnect_code(closing(engine)[0]) == R.RECEIVE_MAXIMUM_EXCEEDED


def test_qos_2_beyond_receive_maximum_is_not_forgotten_by_the_session():
    """What was refused with the connection comes again on the next one, and then counts."""
    session = Session()
    engine = server(limits=ServerLimits(receive_maximum=1), session=session)
    events = engine.receive_data(raw(PUBLISH_Q2.format(1) + PUBLISH_Q2.format(2)), now=0.0)
    ended(events, R.RECEIVE_MAXIMUM_EXCEEDED)
    assert session.unsettled == {}
    engine = server(session=session, present=True)
    [event] = engine.receive_data(raw("3c 07 0001 74 0001 00 78"), now=0.0)
    assert event.ids == [1]


def test_receive_maximum_does_not_count_what_an_earlier_connection_left_open():
    session = Session()
    session.inbound = {7, 8}
    engine = server(limits=ServerLimits(receive_maximum=2), session=session, present=True)
    [event] = engine.receive_data(raw(PUBLISH_Q1.format(1) + PUBLISH_Q1.format(2)), now=0.0)
    assert event.ids == [1, 2]
    engine.settle(event.token)
    written(engine)
    assert engine.receive_data(raw("62 02 0007 62 02 0008"), now=0.0) == []
    assert written(engine) == raw("70 02 0007 70 02 0008")


def test_pubrel_sent_again_neither_takes_nor_frees_the_window():
    session = Session()
    session.outbound[1] = InFlight(11, Message("t", b"", 2), True)
    session.outbound[2] = InFlight(12, Message("t", b"b", 1))
    session.last_id = 2
    found = Connack(session_present=True, properties={P.RECEIVE_MAXIMUM: 1})
    engine = client(session=session, clean_start=False, connack=found)
    assert written(engine) == raw("62 02 0001 3a 07 0001 74 0002 00 62")
    assert engine.receive_data(raw("70 02 0001"), now=0.0) == [Acknowledged(0, [11], {})]
    assert engine.publish([Message("t", b"", 1)], [13]) == 0
    engine.receive_data(raw("40 02 0002"), now=0.0)
    assert engine.publish([Message("t", b"", 1)], [13]) == 1


# --- acknowledgements -----------------------------------------------------------------------


def test_acknowledgements_go_out_in_the_order_of_arrival():
    engine = server()
    tokens = []
    for wire in (PUBLISH_Q1.format(1), PUBLISH_Q2.format(2), PUBLISH_Q1.format(3) + PUBLISH_Q2.format(4)):
        tokens += [one.token for one in engine.receive_data(raw(wire), now=0.0)]
    first, second, third = tokens
    engine.settle(third)
    assert written(engine) == b""
    engine.settle(second)
    assert written(engine) == b""
    engine.settle(first)
    assert written(engine) == raw("40 02 0001 50 02 0002 40 02 0003 50 02 0004")
    engine.settle(first)
    engine.settle(0)
    engine.settle(999)
    assert written(engine) == b""


def test_reasons_go_into_the_acknowledgements_of_mqtt_5():
    for version, wire in (
        (5, "40 02 0001 40 03 0002 10 50 03 0003 87"),
        (4, "40 02 0001 40 02 0002 50 02 0003"),
    ):
        engine = server(version)
        gap = "00" if version == 5 else ""
        size = "07" if version == 5 else "06"
        data = raw(
            f"30 {4 + len(gap) // 2:02x} 0001 74 {gap} 78 | 32 {size} 0001 74 0001 {gap} 78 |"
            f"32 {size} 0001 74 0002 {gap} 78 | 34 {size} 0001 74 0003 {gap} 78"
        )
        [event] = engine.receive_data(data, now=0.0)
        assert event.ids == [0, 1, 2, 3]
        engine.settle(event.token, [0, 0, 0x10, 0x87])
        assert written(engine) == raw(wire)


def test_a_refused_qos_2_identifier_is_free_again():
    engine = server()
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(3)), now=0.0)
    engine.settle(event.token, [0x97])
    assert written(engine) == raw("50 03 0003 97")
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(3)), now=0.0)
    assert event.ids == [3]


def test_a_known_qos_2_message_emits_nothing_and_is_answered_again():
    engine = server()
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(3)), now=0.0)
    dup = raw("3c 07 0001 74 0003 00 78")
    assert engine.receive_data(dup, now=0.0) == []
    assert written(engine) == b""
    engine.settle(event.token)
    assert written(engine) == raw("50 02 0003")
    assert engine.receive_data(dup, now=0.0) == []
    assert written(engine) == raw("50 02 0003")
    engine.receive_data(raw("62 02 0003"), now=0.0)
    assert written(engine) == raw("70 02 0003")
    engine.receive_data(raw("62 02 0003"), now=0.0)
    assert written(engine) == raw("70 03 0003 92")
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(3)), now=0.0)
    assert event.ids == [3]


def test_an_unsettled_qos_2_message_of_an_earlier_connection():
    """Its DUP emits nothing; PUBREC goes out when the first connection's token is settled, in its turn."""
    session = Session()
    engine = server(session=session)
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(3) + PUBLISH_Q1.format(4)), now=0.0)
    engine.stream_reset(0, now=0.0)

    again = server(session=session, present=True)
    [redelivered] = again.receive_data(
        raw("3c 07 0001 74 0003 00 78 | 3a 07 0001 74 0004 00 78" + PUBLISH_Q2.format(5)), now=0.0
    )
    assert redelivered.ids == [4, 5]
    assert redelivered.token > event.token
    again.settle(redelivered.token)
    assert written(again) == b""  # 5 came behind 3
    again.settle(event.token)
    assert written(again) == raw("50 02 0003 40 02 0004 50 02 0005")
    assert session.inbound == {3, 5}
    assert session.unsettled == {}


def test_what_is_settled_without_a_connection_is_answered_on_the_next():
    session = Session()
    engine = server(session=session)
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(3)), now=0.0)
    assert session.settle_unconnected(event.token) == [3]
    again = server(session=session, present=True)
    assert again.receive_data(raw("3c 07 0001 74 0003 00 78"), now=0.0) == []
    assert written(again) == raw("50 02 0003")


def test_what_is_settled_while_the_next_connection_waits_for_connack_counts():
    session = Session()
    engine = server(session=session)
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(3)), now=0.0)
    again = ServerEngine(ServerLimits(), now=0.0)
    again.receive_data(codec.encode_connect(Connect(client_id="c", clean_start=False)), now=0.0)
    again.settle(event.token)
    again.accept(session, now=0.0, session_present=True)
    written(again)
    assert again.receive_data(raw("3c 07 0001 74 0003 00 78"), now=0.0) == []
    assert written(again) == raw("50 02 0003")


def test_what_was_settled_out_of_order_survives_the_connection():
    session = Session()
    engine = server(session=session)
    engine.receive_data(raw(PUBLISH_Q1.format(1)), now=0.0)
    [second] = engine.receive_data(raw(PUBLISH_Q2.format(2)), now=0.0)
    engine.settle(second.token)
    assert written(engine) == b""
    again = server(session=session, present=True)
    [event] = again.receive_data(raw("3a 07 0001 74 0001 00 78 | 3c 07 0001 74 0002 00 78"), now=0.0)
    assert event.ids == [1]
    assert written(again) == raw("50 02 0002")


def test_what_was_not_taken_is_new_when_it_comes_again():
    session = Session()
    engine = server(session=session)
    [event] = engine.receive_data(raw(PUBLISH_Q2.format(2)), now=0.0)
    session.forget(event.token)
    again = server(session=session, present=True)
    [event] = again.receive_data(raw("3c 07 0001 74 0002 00 78"), now=0.0)
    assert event.ids == [2]


def test_a_new_session_publishes_as_new_and_finishes_what_was_taken_over():
    session = Session()
    session.outbound[5] = InFlight(15, Message("t", b"", 2), True)
    session.outbound[6] = InFlight(16, Message("t", b"", 2))
    session.outbound[7] = InFlight(17, Message("t", b"", 1))
    session.inbound, session.unsettled = {1}, {2: 1}
    connect = Connect(client_id="c", clean_start=False)
    engine = ClientEngine(connect, session, now=0.0)
    written(engine)
    events = engine.receive_data(raw("20 03 00 00 00"), now=0.0)
    assert [type(one) for one in events] == [Connected, Acknowledged]
    assert events[1] == Acknowledged(0, [15], {})
    assert written(engine) == raw("34 06 0001 74 0006 00 32 06 0001 74 0007 00")
    assert (session.inbound, session.unsettled) == (set(), {})


def test_a_kept_session_is_sent_again_with_dup_in_order_before_anything_new():
    session = Session()
    engine = client(session=session, clean_start=False)
    batch = [Message("t", b"x", qos) for qos in (1, 2, 1)]
    assert engine.publish(batch, [1, 2, 3]) == 3
    written(engine)
    engine.receive_data(raw("40 02 0001 50 02 0002"), now=0.0)
    found = Connack(session_present=True, properties={P.RECEIVE_MAXIMUM: 1, P.TOPIC_ALIAS_MAXIMUM: 1})
    again = client(session=session, clean_start=False, connack=found)
    assert written(again) == raw("62 02 0002 3a 0a 0001 74 0003 03 230001 78")
    assert again.publish([Message("n", b"")], [4]) == 1
    again.receive_data(raw("70 02 0002 40 02 0003"), now=0.0)
    assert session.outbound == {}

    engine = client(session=session, clean_start=False)
    assert engine.publish([Message("t", b"x", 1)] * 3, [5, 6, 7]) == 3
    again = client(session=session, clean_start=False, connack=found)
    for packet_id in (4, 5, 6):
        assert written(again)[:1] == b"\x3a"
        assert again.publish([Message("n", b"")], [8]) == (packet_id == 6)
        again.receive_data(raw(f"40 02 {packet_id:04x}"), now=0.0)
    assert session.outbound == {}


def test_a_message_that_the_next_server_does_not_take_comes_back_refused():
    session = Session()
    engine = client(session=session, clean_start=False)
    engine.publish([Message("t", b"x" * 50, 1), Message("t", b"y", 1)], [1, 2])
    found = Connack(session_present=True, properties={P.MAXIMUM_PACKET_SIZE: 30})
    connect = Connect(client_id="c", clean_start=False)
    again = ClientEngine(connect, session, now=0.0)
    events = again.receive_data(codec.encode_connack(found, 5), now=0.0)
    assert Acknowledged(0, [], {1: R.PACKET_TOO_LARGE}) in events
    assert list(session.outbound) == [2]


@pytest.mark.parametrize(
    ("qos", "wire"), [(1, "50 02 0001"), (1, "70 02 0001"), (2, "40 02 0001"), (2, "70 02 0001")]
)
def test_the_wrong_kind_of_acknowledgement_is_a_violation(qos, wire):
    engine = client()
    engine.publish([Message("t", b"", qos)], [1])
    written(engine)
    ended(engine.receive_data(raw(wire), now=0.0), R.PROTOCOL_ERROR)


def test_acknowledgements_of_unknown_identifiers_do_no_harm():
    engine = client()
    assert engine.receive_data(raw("40 02 0009 70 02 0009"), now=0.0) == []
    assert written(engine) == b""
    assert engine.receive_data(raw("50 02 0009 50 03 000a 97"), now=0.0) == []
    assert written(engine) == raw("62 03 0009 92")
    old = client(4)
    old.receive_data(raw("50 02 0009"), now=0.0)
    assert written(old) == raw("62 02 0009")


# --- time -----------------------------------------------------------------------------------


def test_a_server_lets_go_of_a_client_that_says_nothing():
    engine = ServerEngine(ServerLimits(connect_timeout=5), now=10.0)
    assert engine.next_timeout() == 15.0
    assert engine.handle_timeout(14.9) == []
    closed = ended(engine.handle_timeout(15.0))
    assert closed.reason_code is None
    assert closing(engine) == (b"", True)
    assert engine.next_timeout() is None


def test_a_server_closes_after_one_and_a_half_keepalives():
    for version in (4, 5):
        engine = server(version, keepalive=10)
        assert engine.next_timeout() == 15.0
        engine.receive_data(b"\xc0\x00", now=8.0)
        assert written(engine) == b"\xd0\x00"
        assert engine.next_timeout() == 23.0
        assert engine.handle_timeout(22.9) == []
        assert not ended(engine.handle_timeout(23.0), R.KEEP_ALIVE_TIMEOUT).orderly
        data, shut = closing(engine)
        assert shut
        assert (disconnect_code(data) == R.KEEP_ALIVE_TIMEOUT) if version == 5 else data == b""
    assert server(keepalive=0).next_timeout() is None


def test_the_servers_keepalive_replaces_the_clients():
    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c", keepalive=100)), now=0.0)
    engine.accept(Session(), now=0.0, session_present=False, properties={P.SERVER_KEEP_ALIVE: 20})
    assert engine.next_timeout() == 30.0
    peer = client(keepalive=100, connack=Connack(properties={P.SERVER_KEEP_ALIVE: 20}))
    assert peer.next_timeout() == 20.0
    assert client(keepalive=100, connack=Connack(properties={P.SERVER_KEEP_ALIVE: 0})).next_timeout() is None


def test_a_client_pings_and_notices_when_nobody_answers():
    engine = client(keepalive=10, ping_timeout=3)
    assert engine.next_timeout() == 10.0
    assert engine.handle_timeout(9.9) == []
    assert written(engine) == b""
    engine.handle_timeout(10.0)
    assert written(engine) == b"\xc0\x00"
    assert engine.next_timeout() == 13.0
    assert engine.receive_data(b"\xd0\x00", now=11.0) == []
    assert engine.next_timeout() == 20.0
    engine.handle_timeout(20.0)
    closed = ended(engine.handle_timeout(23.0))
    assert not closed.orderly
    assert closing(engine)[1]


def test_any_traffic_answers_a_ping():
    engine = client(keepalive=10, ping_timeout=3)
    engine.handle_timeout(10.0)
    engine.receive_data(raw("30 04 0001 61 00"), now=12.0)
    assert engine.next_timeout() == 20.0


def test_while_reading_is_paused_silence_proves_nothing():
    engine = client(keepalive=10, ping_timeout=3)
    engine.handle_timeout(10.0)
    engine.pause_reading(11.0)
    assert engine.next_timeout() == 20.0
    assert engine.handle_timeout(19.0) == []
    engine.handle_timeout(20.0)
    assert written(engine) == b"\xc0\x00\xc0\x00"  # still alive for the server
    engine.resume_reading(25.0)
    assert engine.next_timeout() == 27.0  # the two seconds that were left
    ended(engine.handle_timeout(27.0))


def test_a_ping_sent_while_paused_gets_its_full_time_afterwards():
    engine = client(keepalive=10, ping_timeout=3)
    engine.pause_reading(1.0)
    engine.handle_timeout(10.0)
    engine.resume_reading(12.0)
    assert engine.next_timeout() == 15.0
    ended(engine.handle_timeout(15.0))


def test_a_client_gives_up_waiting_for_connack():
    engine = ClientEngine(Connect(client_id="c"), Session(), now=100.0, connect_timeout=5)
    written(engine)
    assert engine.next_timeout() == 105.0
    assert engine.handle_timeout(104.0) == []
    assert ended(engine.handle_timeout(105.0)).reason_code is None
    assert closing(engine) == (b"", True)


def test_the_end_of_the_transport_ends_the_connection_once():
    for engine in (client(), server()):
        closed = ended(engine.stream_eof(0, now=1.0))
        assert closed.by_peer
        assert closed.reason_code is None
        assert not closed.orderly
        assert engine.stream_reset(0, now=1.0) == []
        assert engine.publish([Message("t", b"")], [1]) == 0


# --- DISCONNECT and AUTH --------------------------------------------------------------------


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


# --- SUBSCRIBE ------------------------------------------------------------------------------


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
