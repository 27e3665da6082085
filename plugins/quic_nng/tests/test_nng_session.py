"""What the client says and hears: CONNECT to CONNACK, subscriptions, messages to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from nng_dialogue import Dialogue

from tesaiot_connect import Message
from tesaiot_connect.mqtt import Connect, R, Subscription, Will


def connect(**fields: object) -> Connect:
    return Connect(**{"client_id": "device", "version": 4, "keepalive": 0, **fields})  # type: ignore[arg-type]


def connected(**options: object) -> Dialogue:
    dialogue = Dialogue(**options)  # type: ignore[arg-type]
    dialogue.accept()
    return dialogue


# --- CONNECT and CONNACK ------------------------------------------------------------------


def test_mqtt_5_is_refused_without_a_word_to_the_library() -> None:
    dialogue = Dialogue(Connect(client_id="device", version=5))
    dialogue.exchange()
    assert dialogue.closed.reason_code == R.UNSUPPORTED_PROTOCOL_VERSION
    assert not dialogue.library.connects
    ended = dialogue.session.ended
    assert ended is not None
    assert "3.1.1" in ended.what
    assert not ended.orderly


@pytest.mark.parametrize("version", [3, 4])
def test_connect_goes_through_with_all_it_says(version: int) -> None:
    asked = connect(
        version=version,
        clean_start=False,
        keepalive=77,
        username="müller",
        password=b"\xff geheim",
        will=Will(Message("gone/device", b"\0binary\0", 2, True)),
    )
    dialogue = Dialogue(asked)
    dialogue.exchange()
    assert dialogue.library.connects == [asked]
    assert not dialogue.events
    dialogue.session.connack(0, True, now=dialogue.now)
    dialogue.exchange()
    assert dialogue.connected.connack.session_present


@pytest.mark.parametrize("size", [1, 2, 7])
def test_connect_may_come_in_pieces(size: int) -> None:
    dialogue = Dialogue()
    dialogue.exchange([size])
    assert len(dialogue.library.connects) == 1


def test_a_password_with_a_zero_byte_ends_with_its_name() -> None:
    dialogue = Dialogue(connect(username="me", password=b"ab\0cd"))
    dialogue.exchange()
    assert not dialogue.library.connects
    assert dialogue.session.ended is not None
    assert "password" in dialogue.session.ended.what
    assert "password" in dialogue.session.ended.fix


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"username": ""}, "user name"),
        ({"username": "me", "password": b""}, "password"),
        ({"will": Will(Message("gone", b""))}, "payload of the will"),
    ],
)
def test_what_the_library_cannot_send_empty_ends_with_its_name(more: dict[str, object], named: str) -> None:
    dialogue = Dialogue(connect(**more))
    dialogue.exchange()
    assert not dialogue.library.connects
    assert dialogue.session.ended is not None
    assert named in dialogue.session.ended.what
    assert named in dialogue.session.ended.fix


@pytest.mark.parametrize(
    ("field", "raw"),
    [
        ("client", b"\x10\x0f\0\4MQTT\4\2\0\0\0\3a\0b"),
        ("user name", b"\x10\x11\0\4MQTT\4\x82\0\0\0\1a\0\2b\0"),
        ("will topic", b"\x10\x13\0\4MQTT\4\6\0\0\0\1a\0\2b\0\0\0"),
    ],
)
def test_a_zero_byte_in_a_string_never_reaches_the_library(field: str, raw: bytes) -> None:
    dialogue = Dialogue()
    dialogue.session.receive_data(raw, now=dialogue.now)
    assert not dialogue.library.connects, field
    assert dialogue.session.ended is not None
    assert "null character" in dialogue.session.ended.what


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (1, R.UNSUPPORTED_PROTOCOL_VERSION, "version"),
        (2, R.CLIENT_IDENTIFIER_NOT_VALID, "identifier"),
        (3, R.SERVER_UNAVAILABLE, "unavailable"),
        (4, R.BAD_USER_NAME_OR_PASSWORD, "password"),
        (5, R.NOT_AUTHORIZED, "authorized"),
        (77, R.SERVER_UNAVAILABLE, "unavailable"),
    ],
)
def test_a_refusal_is_handed_on(code: int, reason: R, said: str) -> None:
    dialogue = Dialogue()
    dialogue.exchange()
    dialogue.session.connack(code, False, now=dialogue.now)
    dialogue.exchange()
    assert dialogue.closed.reason_code == reason
    assert dialogue.session.ended is not None
    assert said in dialogue.session.ended.what
    assert dialogue.session.ended.by_peer


def test_what_follows_connect_waits_for_connack() -> None:
    dialogue = Dialogue()
    client = dialogue.client
    assert client.publish_early([Message("a", b"1", 1), Message("b", b"2", 1)], [1, 2]) == 2
    dialogue.exchange()
    assert not dialogue.library.published
    assert not dialogue.session.settled
    dialogue.accept()
    assert [one.topic for one in dialogue.library.published] == ["a", "b"]
    dialogue.acknowledge([1, 2])
    dialogue.exchange()
    assert dialogue.acknowledged == {1, 2}


def test_what_follows_connect_is_bounded() -> None:
    dialogue = Dialogue()
    dialogue.exchange()
    for _ in range(100):
        if not dialogue.session.reading:
            break
        dialogue.session.receive_data(b"\x30\x83\x20\0\1a" + bytes(4096), now=dialogue.now)
    else:
        raise AssertionError("it reads without end")
    assert dialogue.session.ended is None
    dialogue.session.connack(0, False, now=dialogue.now)
    dialogue.server_does_all()
    assert {len(one.payload) for one in dialogue.library.published} == {4096}
    assert dialogue.session.reading


def test_a_second_connack_means_that_the_library_went_its_own_way() -> None:
    dialogue = connected()
    dialogue.session.connack(0, False, now=dialogue.now)
    assert dialogue.session.ended is not None
    assert "CONNACK" in dialogue.session.ended.what


def test_no_connack_in_time() -> None:
    dialogue = Dialogue()
    dialogue.exchange()
    dialogue.finish()
    due = dialogue.session.next_timeout()
    assert due == dialogue.now + 10
    dialogue.session.handle_timeout(due - 0.1)
    assert dialogue.session.ended is None
    dialogue.session.handle_timeout(due)
    ended = dialogue.session.ended
    assert ended is not None
    assert ended.silent
    assert "CONNACK" in ended.what
    assert dialogue.session.next_timeout() is None


# --- subscriptions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("early", "qos", "codes"),
    [(False, (0, 0, 0, 0, 0), (0, 0, 0, 0, 0x80)), (True, (0, 1, 1, 1, 1), (0, 1, 1, 0, 0x80))],
)
def test_subscriptions_are_asked_and_granted_as_far_as_can_be_kept(
    early: bool, qos: tuple[int, ...], codes: tuple[int, ...]
) -> None:
    dialogue = connected(early_acks=early)
    filters = ["zero", "one", "two", "less", "never"]
    asked = [Subscription(name, qos) for name, qos in zip(filters, (0, 1, 2, 1, 2), strict=True)]
    packet_id = dialogue.client.subscribe(asked)
    dialogue.exchange()
    ((number, subscriptions),) = dialogue.library.subscribed
    assert [(one.topic_filter, one.qos) for one in subscriptions] == list(zip(filters, qos, strict=True))
    assert not dialogue.subacks
    dialogue.session.suback(number, (1, 1, 1, 0, 0x80), now=dialogue.now)
    dialogue.exchange()
    (suback,) = dialogue.subacks
    assert suback.packet_id == packet_id
    assert suback.codes == codes


def test_several_requests_are_under_way_and_answered_in_any_order() -> None:
    dialogue = connected()
    one = dialogue.client.subscribe([Subscription("a/#", 1)])
    two = dialogue.client.unsubscribe(["b/#", "c"])
    three = dialogue.client.subscribe([Subscription("d", 0)])
    dialogue.exchange()
    first, third = (number for number, _ in dialogue.library.subscribed)
    ((second, filters),) = dialogue.library.unsubscribed
    assert list(filters) == ["b/#", "c"]
    assert dialogue.library.order == ["subscribe", "unsubscribe", "subscribe"]
    dialogue.session.suback(third, [0], now=dialogue.now)
    dialogue.session.unsuback(second, now=dialogue.now)
    dialogue.session.suback(first, [0x80], now=dialogue.now)
    dialogue.exchange()
    found = {event.packet_id: event.codes for event in dialogue.subacks}
    assert found == {three: (0,), two: (), one: (0x80,)}


def test_requests_and_messages_keep_their_order() -> None:
    dialogue = connected(window=1)
    dialogue.publish([Message("a", b"", 1), Message("b", b"", 1)])
    dialogue.exchange()
    dialogue.client.subscribe([Subscription("a")])
    dialogue.exchange()
    assert dialogue.library.order == ["publish"]
    dialogue.acknowledge([1])
    assert dialogue.library.order == ["publish", "publish", "subscribe"]
    assert dialogue.library.next_id == 4


@pytest.mark.parametrize("how", ["unknown", "twice", "other"])
def test_an_answer_that_was_not_asked_for_ends(how: str) -> None:
    dialogue = connected()
    dialogue.client.subscribe([Subscription("a")])
    dialogue.exchange()
    ((number, _),) = dialogue.library.subscribed
    if how == "unknown":
        dialogue.session.unsuback(number + 1, now=dialogue.now)
    else:
        dialogue.session.suback(number, [0], now=dialogue.now)
        dialogue.session.suback(number, [0], now=dialogue.now)
    assert dialogue.session.ended is not None
    assert "out of step" in dialogue.session.ended.what


def test_suback_must_answer_every_filter() -> None:
    dialogue = connected()
    dialogue.client.subscribe([Subscription("a"), Subscription("b")])
    dialogue.exchange()
    dialogue.session.suback(dialogue.library.subscribed[0][0], [0], now=dialogue.now)
    assert dialogue.session.ended is not None
    assert "1 of 2" in dialogue.session.ended.what
    assert not dialogue.subacks


def test_no_suback_in_time() -> None:
    dialogue = connected()
    dialogue.client.subscribe([Subscription("a")])
    dialogue.exchange()
    dialogue.finish()
    assert dialogue.session.next_timeout() == dialogue.now + 10
    dialogue.session.handle_timeout(dialogue.now + 10)
    assert dialogue.session.ended is not None
    assert dialogue.session.ended.silent
    assert "SUBSCRIBE" in dialogue.session.ended.what


# --- messages to the client ---------------------------------------------------------------

INCOMING = [
    Message("a", b"0", 0, True),
    Message("b", b"1", 1, False),
    Message("c", b"2", 2, True),
    Message("d", b"", 1, True),
]


def test_messages_come_as_qos_0_because_the_library_has_acknowledged_them() -> None:
    dialogue = connected()
    dialogue.session.received(INCOMING, now=dialogue.now)
    dialogue.exchange()
    assert dialogue.messages == [Message(one.topic, one.payload, 0, one.retain) for one in INCOMING]


def test_messages_come_as_they_came_where_early_acknowledgement_was_accepted() -> None:
    dialogue = connected(early_acks=True)
    dialogue.session.received(INCOMING, now=dialogue.now)
    dialogue.exchange()
    assert dialogue.messages == INCOMING


def test_messages_before_connack_reach_the_client_behind_it() -> None:
    dialogue = Dialogue()
    dialogue.exchange()
    dialogue.session.received(INCOMING[:1], now=dialogue.now)
    dialogue.exchange()
    assert not dialogue.messages
    dialogue.accept(session_present=False)
    assert dialogue.messages == INCOMING[:1]


@given(st.lists(st.lists(st.integers(0, 40_000), max_size=30), max_size=12), st.booleans())
@settings(max_examples=40, deadline=None)
def test_all_that_waits_arrives_in_order(sizes: list[list[int]], early: bool) -> None:
    dialogue = connected(early_acks=early, memory=20_000_000)
    expected = []
    for number, batch in enumerate(sizes):
        messages = [Message(f"t/{number}", bytes(size), size % 2 if early else 0) for size in batch]
        expected += messages
        dialogue.session.received(messages, now=dialogue.now)
    dialogue.exchange()
    for token in range(1, 2000):  # the client acknowledges as it goes
        dialogue.client.settle(token)
    dialogue.exchange()
    assert dialogue.messages == expected


def test_qos_1_beyond_the_window_waits_until_the_client_acknowledges() -> None:
    dialogue = connected(early_acks=True)
    dialogue.session.received([Message("a", str(n).encode(), 1) for n in range(3000)], now=dialogue.now)
    dialogue.exchange()
    before = len(dialogue.messages)
    assert before < 3000
    for event in dialogue.events[1:]:
        dialogue.client.settle(event.token)  # type: ignore[union-attr]
    dialogue.exchange()
    assert [one.payload for one in dialogue.messages] == [
        str(n).encode() for n in range(len(dialogue.messages))
    ]
    assert len(dialogue.messages) > before


def test_more_than_memory_ends() -> None:
    dialogue = connected(memory=100_000)
    for _ in range(10):
        dialogue.session.received([Message("a", bytes(30_000))], now=dialogue.now)
        dialogue.exchange()
    assert dialogue.session.ended is None
    assert len(dialogue.messages) == 10
    for _ in range(100):
        dialogue.session.received([Message("a", bytes(30_000))], now=dialogue.now)
    ended = dialogue.session.ended
    assert ended is not None
    assert "100000 bytes" in ended.what
    assert "memory" in ended.fix


def test_messages_without_payload_count_too() -> None:
    dialogue = connected(memory=100_000)
    for _ in range(80):  # as packets they fit
        dialogue.session.received([Message("a", b"")] * 1000, now=dialogue.now)
    assert dialogue.session.ended is not None


def test_what_came_before_the_loss_is_still_delivered() -> None:
    dialogue = connected()
    dialogue.session.received([Message("a", bytes(50_000))] * 15, now=dialogue.now)
    dialogue.session.lost("the connection broke")
    assert dialogue.session.ended is not None
    dialogue.exchange()
    assert len(dialogue.messages) == 15
