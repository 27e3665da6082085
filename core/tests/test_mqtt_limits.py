"""What either side announced is kept by the other, and so are the deadlines."""

from __future__ import annotations

import pytest
from engine_bytes import PUBLISH_Q1, PUBLISH_Q2, client, closing, disconnect_code, ended, raw, server, written

from tesaiot_connect.errors import ProtocolError
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import (
    Acknowledged,
    Closed,
    Received,
    Suback,
)
from tesaiot_connect.mqtt.packets import Connack, Connect, Subscription, Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import InFlight, Session


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
    assert engine.publish([Message("t", b"", 1)], [3]) == 1
    assert list(session.outbound) == [1, 2, 65534]


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


# --- time --------------------------------------------------------------------------------------


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


def test_a_stranger_may_send_less_than_a_client():
    limits = ServerLimits(maximum_packet_size=1 << 20, maximum_connect_size=1000)
    will = Will(Message("t", bytes(2000)))
    engine = ServerEngine(limits, now=0.0)
    [closed] = engine.receive_data(codec.encode_connect(Connect(client_id="c", will=will)), now=0.0)
    assert closed.reason_code == R.PACKET_TOO_LARGE
    engine = ServerEngine(limits, now=0.0)
    engine.receive_data(codec.encode_connect(Connect(client_id="c")), now=0.0)
    engine.accept(Session(), now=0.0, session_present=False)
    engine.outputs()
    [received] = engine.receive_data(raw("30 d3 0f 0001 74 00") + bytes(2000 - 1), now=0.0)
    assert len(received.messages[0].payload) == 1999
