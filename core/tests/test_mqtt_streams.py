"""Several streams on one connection: each has its identifiers, window and aliases; one may fail alone."""

from __future__ import annotations

import pytest
from engine_bytes import raw

from tesaiot_connect.message import Message
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import (
    Acknowledged,
    Close,
    Closed,
    ConnectRequest,
    Received,
    Reset,
    Send,
    StreamLost,
    Suback,
    SubscribeRequest,
)
from tesaiot_connect.mqtt.packets import Connack, Connect, Subscription
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session


def sent(engine):
    """Stream to bytes, and all other outputs."""
    data, others = {}, []
    for one in engine.outputs():
        if isinstance(one, Send):
            assert not one.fin
            data[one.stream] = data.get(one.stream, b"") + one.data
        else:
            others.append(one)
    return data, others


def server(*, limits=None, session=None, announced=None):
    engine = ServerEngine(limits or ServerLimits(), now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c", properties=announced or {})), now=0.0)
    engine.accept(session or Session(), now=0.0, session_present=False)
    engine.outputs()
    return engine


def client(*streams, connack=None):
    engine = ClientEngine(Connect(client_id="c"), Session(), now=0.0)
    engine.receive_data(codec.encode_connack(connack or Connack(), 5), now=0.0)
    engine.outputs()
    for stream in streams:
        assert engine.stream_opened(stream, now=0.0) == []
    return engine


Q1 = "32 07 0001 74 {:04x} 00 78"
Q2 = "34 07 0001 74 {:04x} 00 78"


def test_each_stream_has_its_own_packet_identifiers_and_window():
    engine = client(4, 8, connack=Connack(properties={P.RECEIVE_MAXIMUM: 2}))
    batch = [Message("t", b"x", 1)] * 3
    for number, stream in enumerate((0, 4, 8)):
        assert engine.publish(batch, [number * 10 + one for one in range(3)], stream=stream) == 2
    data, others = sent(engine)
    assert data == dict.fromkeys((0, 4, 8), raw(Q1.format(1) + Q1.format(2)))
    assert others == []
    assert engine.receive_data(raw("40 02 0002"), stream=4, now=0.0) == [Acknowledged(4, [11], {})]
    assert engine.publish(batch, [1, 2, 3]) == 0
    assert engine.publish(batch, [12, 13, 14], stream=4) == 1
    assert engine.publish(batch, [1, 2, 3], stream=12) == 0  # was never opened


def test_acknowledgements_return_on_the_stream_of_the_message():
    engine = server()
    engine.stream_opened(4, now=0.0)
    [control] = engine.receive_data(raw(Q1.format(1)), now=0.0)
    [other] = engine.receive_data(raw(Q2.format(1)), stream=4, now=0.0)
    assert (control.stream, other.stream) == (0, 4)
    assert control.token != other.token
    engine.settle(other.token)
    assert sent(engine)[0] == {4: raw("50 02 0001")}
    engine.settle(control.token)
    assert sent(engine)[0] == {0: raw("40 02 0001")}
    assert engine.receive_data(raw("62 02 0001"), stream=4, now=0.0) == []
    assert sent(engine)[0] == {4: raw("70 02 0001")}


def test_receive_maximum_counts_per_stream():
    engine = server(limits=ServerLimits(receive_maximum=1))
    engine.stream_opened(4, now=0.0)
    assert isinstance(engine.receive_data(raw(Q1.format(1)), now=0.0)[0], Received)
    assert isinstance(engine.receive_data(raw(Q1.format(1)), stream=4, now=0.0)[0], Received)
    events = engine.receive_data(raw(Q1.format(2)), stream=4, now=0.0)
    assert events == [StreamLost(4, [])]
    assert sent(engine)[1] == [Reset(4, R.RECEIVE_MAXIMUM_EXCEEDED)]


def test_aliases_belong_to_one_stream():
    engine = server(announced={P.TOPIC_ALIAS_MAXIMUM: 1})
    engine.stream_opened(4, now=0.0)
    for stream in (0, 4):
        assert engine.publish([Message("t", b"x")] * 2, [1, 2], stream=stream) == 2
    first_and_second = raw("30 08 0001 74 03 230001 78 | 30 07 0000 03 230001 78")
    assert sent(engine)[0] == {0: first_and_second, 4: first_and_second}
    engine.receive_data(raw("30 08 0001 74 03 230001 78"), now=0.0)
    assert engine.receive_data(raw("30 07 0000 03 230001 78"), stream=4, now=0.0) == [StreamLost(4, [])]


def test_a_subscribe_is_answered_on_its_stream_with_identifiers_free_there():
    engine, peer = client(4), server()
    peer.stream_opened(4, now=0.0)
    assert engine.publish([Message("t", b"x", 1)] * 2, [1, 2], stream=4) == 2
    packet_id = engine.subscribe([Subscription("a")], stream=4)
    assert packet_id not in (1, 2)
    assert engine.publish([Message("t", b"x", 1)] * 2, [3, 4], stream=4) == 2
    data, _ = sent(engine)
    assert list(data) == [4]
    events = peer.receive_data(data[4], stream=4, now=0.0)
    request = next(one for one in events if isinstance(one, SubscribeRequest))
    assert request.stream == 4
    ids = [one for event in events if isinstance(event, Received) for one in event.ids]
    assert len({*ids, packet_id}) == 5
    peer.suback(request, [1])
    data, _ = sent(peer)
    assert data == {4: raw(f"90 04 {packet_id:04x} 00 01")}
    assert engine.receive_data(data[4], stream=4, now=0.0) == [Suback(packet_id, (1,), "")]

    packet_id = engine.subscribe([Subscription("a")], stream=4)
    events = engine.receive_data(raw(f"90 04 {packet_id:04x} 00 01"), now=0.0)
    assert isinstance(events[-1], Closed)  # on the control stream nobody asked


def test_a_malformed_packet_resets_only_its_stream():
    engine = client(4, 8)
    batch = [Message("t", b"x", 1), Message("t", b"y", 2), Message("t", b"z", 2), Message("t", b"0")]
    for number, stream in enumerate((0, 4, 8)):
        assert engine.publish(batch, [number * 10 + one for one in range(4)], stream=stream) == 4
    sent(engine)
    events = engine.receive_data(raw("50 02 0002 | 30 01 00"), stream=4, now=0.0)
    # what the server has taken over (PUBREC) is done, the others are to be published again
    assert events == [Acknowledged(4, [11], {}), StreamLost(4, [10, 12])]
    data, others = sent(engine)
    assert data == {}
    assert others == [Reset(4, R.MALFORMED_PACKET)]
    assert engine.connected
    assert engine.receive_data(raw("40 02 0001"), stream=4, now=0.0) == []
    assert engine.receive_data(raw("40 02 0001"), stream=8, now=0.0) == [Acknowledged(8, [20], {})]
    assert engine.receive_data(raw("40 02 0001"), now=0.0) == [Acknowledged(0, [0], {})]
    assert engine.publish(batch, [1, 2, 3, 4], stream=4) == 0


def test_a_stream_that_ends_gives_its_keys_back_and_ends_on_this_side_too():
    engine = client(4, 8)
    engine.publish([Message("t", b"x", 1)], [1], stream=4)
    engine.publish([Message("t#", b"x", 1)], [2], stream=8)
    assert engine.stream_eof(4, now=0.0) == [
        StreamLost(4, [1]),
        Acknowledged(8, [], {2: R.TOPIC_NAME_INVALID}),
    ]
    assert engine.outputs() == [Send(4, raw(Q1.format(1)), True)]
    engine.publish([Message("t#", b"x", 1)], [3], stream=8)
    assert engine.stream_reset(8, now=0.0) == [
        Acknowledged(8, [], {3: R.TOPIC_NAME_INVALID}),
        StreamLost(8, []),
    ]
    assert engine.stream_reset(8, now=0.0) == []
    assert engine.connected


@pytest.mark.parametrize("control", ["eof", "reset", "disconnect", "violation"])
def test_the_end_of_the_control_stream_is_the_end_of_all(control):
    engine = client(4)
    engine.publish([Message("t", b"x", 1)], [1])
    engine.publish([Message("t", b"x", 1), Message("t", b"y", 1)], [2, 3], stream=4)
    if control == "eof":
        events = engine.stream_eof(0, now=0.0)
    elif control == "reset":
        events = engine.stream_reset(0, now=0.0)
    elif control == "disconnect":
        engine.disconnect()
        events = engine.take_events()
    else:
        events = engine.receive_data(raw("d0 01 00"), now=0.0)
    assert events[0] == StreamLost(4, [2, 3])
    assert isinstance(events[1], Closed)
    assert len(events) == 2
    data, others = sent(engine)
    assert [type(one) for one in others] == [Close]
    assert list(data) == [0, 4]
    assert engine.receive_data(raw("40 02 0001"), stream=4, now=0.0) == []


@pytest.mark.parametrize(
    "wire",
    [
        "10 0d 0004 4d515454 05 02 003c 00 0000",
        "f0 06 18 04 15 0001 4d",
        "e0 00",
        "e0 01 04",
        "20 03 00 00 00",
    ],
)
def test_control_packets_on_a_data_stream_kill_it(wire):
    engine = server(announced={P.AUTH_METHOD: "M"})
    engine.stream_opened(4, now=0.0)
    assert engine.receive_data(raw(wire), stream=4, now=0.0) == [StreamLost(4, [])]
    assert sent(engine)[1] == [Reset(4, R.PROTOCOL_ERROR)]
    assert isinstance(engine.receive_data(raw(Q1.format(1)), now=0.0)[0], Received)


@pytest.mark.parametrize("wire", ["20 03 00 00 00", "f0 06 18 04 15 0001 4d", "e0 01 8b"])
def test_a_client_takes_control_packets_on_the_control_stream_only(wire):
    engine = client(4)
    assert engine.receive_data(raw(wire), stream=4, now=0.0) == [StreamLost(4, [])]
    assert sent(engine)[1] == [Reset(4, R.PROTOCOL_ERROR)]
    assert engine.connected


def test_a_pingreq_on_a_data_stream_gets_no_reply():
    engine = server()
    engine.stream_opened(4, now=0.0)
    assert engine.receive_data(b"\xc0\x00", stream=4, now=0.0) == []
    assert engine.outputs() == []


def test_data_on_any_stream_keeps_the_connection_alive():
    engine = server()
    engine.stream_opened(4, now=0.0)
    engine.receive_data(raw("30 04 0001 61 00"), stream=4, now=50.0)
    assert engine.next_timeout() == 50.0 + 90.0
    peer = client(4)
    peer.handle_timeout(60.0)
    peer.receive_data(raw("30 04 0001 61 00"), stream=4, now=61.0)
    assert peer.next_timeout() == 120.0


@pytest.mark.parametrize("before_connect", [True, False])
def test_streams_may_open_before_connack_and_are_processed_afterwards(before_connect):
    engine = ServerEngine(ServerLimits(), now=0.0)
    connect = codec.encode_connect(Connect(client_id="c"))
    if not before_connect:
        engine.receive_data(connect, now=0.0)
    for stream in (4, 8, 12):
        engine.stream_opened(stream, now=0.0)
    for byte in raw(Q1.format(1) + Q1.format(2)):
        assert engine.receive_data(bytes([byte]), stream=4, now=0.0) == []
    assert engine.receive_data(raw("82 07 0001 00 0001 61 00"), stream=8, now=0.0) == []
    # a stream may even end before the server got to it
    assert engine.receive_data(raw("30 04 0001 65 00"), stream=12, now=0.0) == []
    assert engine.stream_eof(12, now=0.0) == []
    if before_connect:
        assert [type(one) for one in engine.receive_data(connect, now=0.0)] == [ConnectRequest]
    assert engine.outputs() == []
    engine.accept(Session(), now=0.0, session_present=False)
    events = engine.take_events()
    assert [type(one) for one in events] == [Received, SubscribeRequest, Received, StreamLost]
    assert (events[0].stream, events[0].ids) == (4, [1, 2])
    assert events[1].stream == 8
    assert [one.topic for one in events[2].messages] == ["e"]
    assert events[3] == StreamLost(12, [])


def test_what_a_stream_brings_before_connack_is_bounded():
    engine = ServerEngine(ServerLimits(maximum_packet_size=100), now=0.0)
    engine.stream_opened(4, now=0.0)
    assert engine.receive_data(bytes(100), stream=4, now=0.0) == []
    assert engine.receive_data(bytes(1), stream=4, now=0.0) == [StreamLost(4, [])]
    assert sent(engine)[1] == [Reset(4, R.PACKET_TOO_LARGE)]


def test_streams_waiting_for_a_connection_that_ends_say_nothing_after_its_end():
    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.stream_opened(4, now=0.0)
    engine.receive_data(raw(Q1.format(1)), stream=4, now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c")) + b"\xe0\x00", now=0.0)
    engine.accept(Session(), now=0.0, session_present=False)
    assert [type(one) for one in engine.take_events()] == [StreamLost, Closed]


def test_more_streams_than_allowed_are_reset():
    engine = server(limits=ServerLimits(maximum_streams=3))
    for stream in (4, 8, 12):
        assert engine.stream_opened(stream, now=0.0) == []
    assert engine.outputs() == [Reset(12, R.QUOTA_EXCEEDED)]
    assert engine.receive_data(raw(Q1.format(1)), stream=12, now=0.0) == []
    engine.stream_eof(4, now=0.0)
    engine.outputs()
    assert engine.stream_opened(16, now=0.0) == []
    assert isinstance(engine.receive_data(raw(Q1.format(1)), stream=16, now=0.0)[0], Received)


def test_settling_what_a_lost_stream_brought_is_harmless():
    session = Session()
    engine = server(session=session)
    engine.stream_opened(4, now=0.0)
    [event] = engine.receive_data(raw(Q2.format(1)), stream=4, now=0.0)
    engine.stream_reset(4, now=0.0)
    engine.outputs()
    [control] = engine.receive_data(raw(Q2.format(1)), now=0.0)
    engine.settle(event.token)
    assert engine.outputs() == []
    assert session.unsettled == {1: control.token}
    engine.settle(control.token)
    assert sent(engine)[0] == {0: raw("50 02 0001")}


def test_a_stream_of_3_1_1_speaks_3_1_1():
    engine = ServerEngine(ServerLimits(), now=0.0)
    engine.stream_opened(4, now=0.0)
    engine.receive_data(raw("32 06 0001 74 0001 78"), stream=4, now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c", version=4)), now=0.0)
    engine.accept(Session(), now=0.0, session_present=False)
    [event] = engine.take_events()
    assert event.messages == [Message("t", b"x", 1)]
    engine.stream_opened(8, now=0.0)
    [event] = engine.receive_data(raw("32 06 0001 74 0001 78"), stream=8, now=0.0)
    assert event.messages == [Message("t", b"x", 1)]
    assert engine.publish([Message("t", b"x")], [1], stream=8) == 1
    assert sent(engine)[0][8] == raw("30 04 0001 74 78")
