"""Acknowledgements go out in order, and survive the connection they were owed on."""

from __future__ import annotations

import pytest
from engine_bytes import PUBLISH_Q1, PUBLISH_Q2, client, ended, raw, server, written

from tesaiot_connect.message import Message
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import (
    Acknowledged,
    Connected,
)
from tesaiot_connect.mqtt.packets import Connack, Connect
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import InFlight, Session


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
    assert not again.accepted
    session.settle_unconnected(event.token)
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


def test_a_server_sends_again_with_dup_to_a_client_that_comes_back():
    session = Session()
    engine = server(session=session)
    assert (
        engine.publish([Message("t", b"x", 1), Message("t", b"y", 2), Message("t", b"z", 2)], [1, 2, 3]) == 3
    )
    written(engine)
    engine.receive_data(raw("50 02 0002"), now=0.0)
    again = ServerEngine(ServerLimits(), now=0.0)
    again.receive_data(codec.encode_connect(Connect(client_id="c", version=4, clean_start=False)), now=0.0)
    again.accept(session, now=0.0, session_present=True)
    assert written(again) == raw("20 02 01 00 | 62 02 0002 | 3a 06 0001 74 0001 78 | 3c 06 0001 74 0003 7a")
    assert again.receive_data(raw("70 02 0002 40 02 0001"), now=0.0) == [Acknowledged(0, [2, 1], {})]
