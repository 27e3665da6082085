"""What goes out behind CONNECT, before CONNACK: engine against engine, with a manual clock."""

from __future__ import annotations

import pytest
from engine_bytes import raw

from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import Acknowledged, Closed, Connected, ConnectRequest, Received, Send
from tesaiot_connect.mqtt.packets import Connack, Connect
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session

VERSIONS = pytest.mark.parametrize("version", [5, 4])


def sent(engine):
    return b"".join(one.data for one in engine.outputs() if isinstance(one, Send))


def one(number, size=1, topic="t", qos=1, retain=False):
    return Message(topic, bytes([number]) * size, qos, retain)


def new(session, version=5, **options):
    return ClientEngine(Connect(client_id="c", version=version), session, now=0.0, **options)


def connack(engine, present=False, code=0, now=0.0, **properties):
    found = {P[name.upper()]: value for name, value in properties.items()}
    packet = Connack(reason_code=code, session_present=present, properties=found)
    return engine.receive_data(codec.encode_connack(packet, engine.connect.version), now=now)


@VERSIONS
@pytest.mark.parametrize("split", [0, 1, 25, 27, 40])
def test_they_arrive_once_and_are_acknowledged_right_behind_connack(version, split):
    session = Session()
    engine = new(session, version)
    messages = [one(number) for number in range(5)]
    assert engine.publish_early(messages, [10, 11, 12, 13, 14]) == 5
    data = sent(engine)
    server = ServerEngine(ServerLimits(), now=0.0)
    events = []
    for piece in (data[:split], data[split:]):
        events += server.receive_data(piece, now=0.0)
    assert [type(event) for event in events] == [ConnectRequest], "held until the client is known"
    server.accept(Session(), now=0.0, session_present=False)
    [received] = server.take_events()
    assert received.messages == messages
    server.settle(received.token)
    events = engine.receive_data(sent(server), now=1.0)
    assert [type(event) for event in events] == [Connected, Acknowledged]
    assert events[1] == Acknowledged(0, [10, 11, 12, 13, 14], {})
    assert not session.outbound
    assert sent(engine) == b""


@VERSIONS
@pytest.mark.parametrize("present", [True, False])
def test_they_are_not_sent_again_by_connack(version, present):
    engine = new(Session(), version)
    engine.connect = Connect(client_id="c", version=version, clean_start=False)
    assert engine.publish_early([one(1), one(2)], [1, 2]) == 2
    sent(engine)
    events = connack(engine, present)
    assert [type(event) for event in events] == [Connected]
    assert sent(engine) == b""
    assert engine.publish([one(3)], [3]) == 1
    assert sent(engine).endswith(b"\3")


def test_only_qos_1_from_the_front_and_only_a_little():
    assert new(Session()).publish_early([one(1), one(2, qos=0), one(3)], [1, 2, 3]) == 1
    assert new(Session()).publish_early([one(1, qos=2), one(3)], [1, 2]) == 0
    engine = new(Session())
    assert engine.publish_early([one(1)] * 10, range(10)) == 10
    assert engine.publish_early([one(1)] * 10, range(10, 20)) == 6
    assert engine.publish_early([one(1)], [30]) == 0
    engine = new(Session())
    before = len(sent(engine))
    engine = new(Session())
    assert engine.publish_early([one(1, 3000)] * 4, range(4)) == 2
    assert len(sent(engine)) - before == 2 * (3000 + 9)
    assert new(Session()).publish_early([one(1, 8184)], [1]) == 0
    assert new(Session()).publish_early([one(1, 8183)], [1]) == 1


def test_what_cannot_be_encoded_waits_for_its_refusal():
    engine = new(Session())
    assert engine.publish_early([one(1), one(2, topic="a/#"), one(3)], [1, 2, 3]) == 1
    connack(engine)
    assert engine.publish([one(2, topic="a/#")], [2]) == 1
    assert engine.take_events() == [Acknowledged(0, [], {2: R.TOPIC_NAME_INVALID})]


def test_nothing_goes_early_into_a_session_with_something_in_flight():
    session = Session()
    engine = new(session)
    assert engine.publish_early([one(1)], [1]) == 1
    again = new(session)
    assert again.publish_early([one(2)], [2]) == 0


def test_nothing_goes_early_with_enhanced_authentication_or_after_connack():
    connect = Connect(client_id="c", properties={P.AUTH_METHOD: "M"})
    assert ClientEngine(connect, Session(), now=0.0).publish_early([one(1)], [1]) == 0
    engine = new(Session())
    connack(engine)
    assert engine.publish_early([one(1)], [1]) == 0


def test_no_topic_alias_before_connack_and_the_first_one_after_it_names_its_topic():
    engine = new(Session())
    assert engine.publish_early([one(1), one(2)], [1, 2]) == 2
    assert sent(engine).endswith(raw("32 07 0001 74 0002 00 02"))
    connack(engine, topic_alias_maximum=5)
    assert engine.publish([one(3)], [3]) == 1
    assert sent(engine) == raw("32 0a 0001 74 0003 03 230001 03")


def test_they_count_against_the_window():
    engine = new(Session())
    assert engine.publish_early([one(number) for number in range(5)], range(5)) == 5
    sent(engine)
    connack(engine, receive_maximum=3)
    more = [one(number) for number in range(6, 12)]
    assert engine.publish(more, range(6, 12)) == 0
    engine.receive_data(raw("40 02 0001 40 02 0002"), now=0.0)
    assert engine.publish(more, range(6, 12)) == 0
    engine.receive_data(raw("40 02 0003"), now=0.0)
    assert engine.publish(more, range(6, 12)) == 1
    engine.receive_data(raw("40 02 0004 40 02 0005 40 02 0006"), now=0.0)
    assert engine.publish(more[1:], range(7, 12)) == 3


def test_more_than_the_window_go_again_as_the_window_allows_on_the_next_connection():
    session = Session()
    first = new(session)
    assert first.publish_early([one(number) for number in range(5)], range(5)) == 5
    second = new(session)
    sent(second)
    connack(second, present=False, receive_maximum=2)
    assert sent(second).count(b"\x32\x07") == 2
    second.receive_data(raw("40 02 0001"), now=0.0)
    assert sent(second).count(b"\x32\x07") == 1


def test_what_the_server_said_last_time_is_kept_to():
    known = Connack(properties={P.RECEIVE_MAXIMUM: 2, P.MAXIMUM_PACKET_SIZE: 100})
    assert new(Session()).publish_early([one(1)] * 3, range(3), known=known) == 2
    assert new(Session()).publish_early([one(1, 200)], [1], known=known) == 0
    for name, value in (("MAXIMUM_QOS", 0), ("RETAIN_AVAILABLE", 0)):
        known = Connack(properties={P[name]: value})
        assert new(Session()).publish_early([one(1, retain=True)], [1], known=known) == 0


@pytest.mark.parametrize(
    ("announced", "reason"),
    [
        ({"maximum_qos": 0}, R.QOS_NOT_SUPPORTED),
        ({"retain_available": 0}, R.RETAIN_NOT_SUPPORTED),
        ({"maximum_packet_size": 50}, R.PACKET_TOO_LARGE),
    ],
)
def test_what_connack_excludes_is_refused(announced, reason):
    session = Session()
    engine = new(session)
    assert engine.publish_early([one(1, 100, retain=True)], [7]) == 1
    events = connack(engine, **announced)
    assert events[1:] == [Acknowledged(0, [], {7: reason})]
    assert not session.outbound
    assert engine.receive_data(raw("40 02 0001"), now=0.0) == []


@VERSIONS
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("end", ["refused", "lost", "timeout"])
def test_they_go_again_on_the_next_connection_if_this_one_fails(version, present, end):
    session = Session()
    engine = new(session, version)
    message = Message("t", b"x", 1, True, Properties(content_type="a") if version == 5 else Properties())
    assert engine.publish_early([message], [7]) == 1
    if end == "refused":
        events = connack(engine, code=R.NOT_AUTHORIZED)
    elif end == "lost":
        events = engine.stream_eof(0, now=0.0)
    else:
        events = engine.handle_timeout(10.0)
    assert [type(event) for event in events] == [Closed]
    again = ClientEngine(Connect(client_id="c", version=version, clean_start=False), session, now=0.0)
    sent(again)
    connack(again, present)
    assert sent(again)[0] == (0x3B if present else 0x33)
    assert again.receive_data(raw("40 02 0001"), now=0.0) == [Acknowledged(0, [7], {})]


def test_a_connection_that_never_came_gives_them_back():
    session = Session()
    engine = new(session)
    assert engine.publish_early([one(1), one(2)], [1, 2]) == 2
    assert engine.withdraw() == [1, 2]
    assert not session.outbound
    assert new(session).publish_early([one(1), one(2)], [1, 2]) == 2


def test_the_time_for_connack_begins_with_the_connection():
    engine = new(Session(), connect_timeout=10.0)
    engine.opened(100.0)
    assert engine.next_timeout() == 110.0
    assert engine.handle_timeout(109.0) == []
    [closed] = engine.handle_timeout(110.0)
    assert "no CONNACK" in closed.text


def test_the_outputs_of_one_stream_can_be_taken_alone():
    engine = new(Session())
    assert engine.pending() == [0]
    sent(engine)
    connack(engine)
    engine.stream_opened(1, now=0.0)
    engine.stream_opened(2, now=0.0)
    for stream in (0, 1, 2):
        engine.publish([one(stream)], [stream], stream=stream)
    assert engine.pending() == [0, 1, 2]
    assert [output.stream for output in engine.take(1)] == [1]
    assert engine.take(1) == []
    engine.stream_eof(2, now=0.0)
    assert engine.pending() == [0, 2]
    [last] = engine.take(2)
    assert (last.stream, last.fin) == (2, True)
    engine.disconnect()
    assert [type(output).__name__ for output in engine.take(0)] == ["Send", "Close"]
    assert engine.pending() == []


def test_nothing_is_held_of_a_client_that_is_refused():
    engine = new(Session())
    engine.publish_early([one(1)], [1])
    server = ServerEngine(ServerLimits(), now=0.0)
    server.receive_data(sent(engine), now=0.0)
    server.refuse(R.NOT_AUTHORIZED)
    assert not any(isinstance(event, Received) for event in server.take_events())
