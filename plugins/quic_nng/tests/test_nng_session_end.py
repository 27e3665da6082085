"""How a session ends: keepalive, an orderly end, a broken protocol, a loss."""

from __future__ import annotations

import pytest
from nng_dialogue import Dialogue

from tesaiot_connect import Message
from tesaiot_connect.mqtt import Connect, Session as MqttSession, Subscription
from tesaiot_connect_quic_nng.control import Ended


def connect(**fields: object) -> Connect:
    return Connect(**{"client_id": "device", "version": 4, "keepalive": 0, **fields})  # type: ignore[arg-type]


def connected(**options: object) -> Dialogue:
    dialogue = Dialogue(**options)  # type: ignore[arg-type]
    dialogue.accept()
    return dialogue


def test_pingreq_is_answered_here() -> None:
    dialogue = Dialogue(connect(keepalive=10))
    dialogue.accept()
    dialogue.now += 11
    dialogue.client.handle_timeout(dialogue.now)
    dialogue.exchange()
    dialogue.now += 9
    dialogue.client.handle_timeout(dialogue.now)
    assert dialogue.client.connected
    assert dialogue.library.order == []


def test_a_silent_client_ends_but_not_one_without_keepalive() -> None:
    dialogue = Dialogue(connect(keepalive=10))
    dialogue.accept()
    assert dialogue.session.next_timeout() == dialogue.now + 15
    dialogue.session.handle_timeout(dialogue.now + 14.9)
    assert dialogue.session.ended is None
    dialogue.session.handle_timeout(dialogue.now + 15)
    assert dialogue.session.ended is not None
    assert "keepalive" in dialogue.session.ended.what

    quiet = connected()
    assert quiet.session.next_timeout() is None
    quiet.session.handle_timeout(quiet.now + 1e6)
    assert quiet.session.ended is None


def test_a_client_that_is_not_read_is_not_silent() -> None:
    dialogue = Dialogue(connect(keepalive=2))
    dialogue.accept()
    while dialogue.session.reading:
        dialogue.session.receive_data(b"\x30\x03\0\1a" * 10_000, now=dialogue.now)
    for _ in range(5):
        dialogue.now += 3
        dialogue.finish(1)
        dialogue.session.handle_timeout(dialogue.now)
        assert not dialogue.session.reading
    assert dialogue.session.ended is None
    dialogue.server_does_all()
    assert dialogue.session.reading
    due = dialogue.session.next_timeout()
    assert due == dialogue.now + 3, "silent since its last bytes were taken"


@pytest.mark.parametrize("how", ["disconnect", "eof"])
def test_an_orderly_end_waits_for_everything(how: str) -> None:
    dialogue = connected(window=2)
    messages = [Message("a", str(n).encode(), n % 3) for n in range(15)]
    dialogue.publish(messages)
    dialogue.client.subscribe([Subscription("x")])
    dialogue.exchange()
    if how == "disconnect":
        dialogue.client.disconnect()
        dialogue.exchange()
    else:
        dialogue.session.eof(now=dialogue.now)
    session, library = dialogue.session, dialogue.library
    assert not session.reading
    assert not session.settled
    while library.qos:
        assert session.ended is None
        dialogue.acknowledge(list(library.qos)[:1])
    assert library.published == messages
    assert session.ended is None, "SUBACK and sending are awaited"
    session.suback(library.subscribed[0][0], [0], now=dialogue.now)
    assert session.ended is None
    dialogue.finish()
    assert session.ended == Ended(what="the client closed the connection", orderly=True)
    assert session.settled


def test_the_orderly_end_has_its_time() -> None:
    dialogue = connected(window=2)
    dialogue.publish([Message("a", b"", 1)] * 18)
    dialogue.exchange()
    dialogue.finish()
    dialogue.acknowledge([1])
    dialogue.session.eof(now=dialogue.now)
    for packet_id in range(2, 11):  # always a little, never all
        dialogue.now += 1
        dialogue.acknowledge([packet_id])
        dialogue.finish()
        dialogue.session.handle_timeout(dialogue.now)
    assert dialogue.session.ended is None
    dialogue.now += 1
    dialogue.acknowledge([11])
    due = dialogue.session.next_timeout()
    assert due is not None
    assert due <= dialogue.now
    dialogue.session.handle_timeout(dialogue.now)
    ended = dialogue.session.ended
    assert ended is not None
    assert ended.silent
    assert not ended.orderly
    assert "the client has left" in ended.what
    assert "7 messages" in ended.what


def test_a_client_that_says_nothing_and_goes() -> None:
    dialogue = Dialogue()
    dialogue.session.eof(now=dialogue.now)
    assert dialogue.session.ended is not None
    assert dialogue.session.ended.orderly


def test_a_client_that_goes_before_connack() -> None:
    dialogue = Dialogue()
    dialogue.client.publish_early([Message("a", b"1", 1)], [1])
    dialogue.exchange()
    dialogue.session.eof(now=dialogue.now)
    assert dialogue.session.ended is None
    dialogue.finish()
    dialogue.session.connack(0, False, now=dialogue.now)
    assert len(dialogue.library.published) == 1
    dialogue.acknowledge([1])
    dialogue.finish()
    assert dialogue.session.ended is not None
    assert dialogue.session.ended.orderly


def test_a_client_that_left_does_not_hold_memory() -> None:
    dialogue = connected(memory=1000)
    dialogue.publish([Message("a", b"", 1)])
    dialogue.exchange()
    dialogue.session.eof(now=dialogue.now)
    dialogue.session.received([Message("b", bytes(400_000), 1)] * 3, now=dialogue.now)
    dialogue.library.unsent += 3  # its PUBACKs
    assert dialogue.session.ended is None
    dialogue.acknowledge([1])
    dialogue.finish()
    assert dialogue.session.ended is not None
    assert dialogue.session.ended.orderly


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x36\x05\0\1a\0\1", "QoS 3"),
        (b"\x10\x0d\0\4MQTT\4\2\0\0\0\1a", "second CONNECT"),
        (b"\x30\xff\xff\xff\x7f", "larger"),
        (b"\x00\x00", "packet type 0"),
    ],
)
def test_a_client_that_breaks_the_protocol_ends(raw: bytes, said: str) -> None:
    dialogue = connected()
    dialogue.session.receive_data(raw, now=dialogue.now)
    ended = dialogue.session.ended
    assert ended is not None
    assert said in ended.what
    assert not ended.orderly
    assert not ended.silent


def test_garbage_instead_of_connect_ends() -> None:
    dialogue = Dialogue()
    dialogue.session.receive_data(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" * 3, now=dialogue.now)
    assert dialogue.session.ended is not None
    assert not dialogue.library.connects


def test_the_first_reason_stays_and_nothing_is_settled_after_it() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"", 1)])
    dialogue.client.subscribe([Subscription("x")])
    dialogue.exchange()
    session = dialogue.session
    session.lost("the peer closed the connection", "see its log", silent=True, by_peer=True)
    expected = Ended(what="the peer closed the connection", fix="see its log", silent=True, by_peer=True)
    assert session.ended == expected
    now = dialogue.now
    dialogue.acknowledge([1])
    dialogue.acknowledge([99])
    session.suback(1, [0], now=now)
    session.connack(5, False, now=now)
    session.received([Message("late", b"")], now=now)
    session.sent(5, now=now)
    session.receive_data(b"\0", now=now)
    session.eof(now=now)
    session.lost("again")
    session.handle_timeout(now + 1000)
    dialogue.exchange()
    assert session.ended == expected
    assert not session.reading
    assert not dialogue.acknowledged
    assert not dialogue.subacks
    assert not dialogue.messages


def test_a_loss_before_connack_says_so() -> None:
    dialogue = Dialogue()
    dialogue.exchange()
    dialogue.session.lost("the server closed the connection", by_peer=True)
    assert dialogue.session.ended is not None
    assert dialogue.session.ended.what == "the server closed the connection"


def test_a_kept_session_of_the_client_goes_on() -> None:
    """What an earlier connection left unacknowledged is sent again and settled now."""
    state = MqttSession()
    first = Dialogue(connect(clean_start=False), state=state)
    first.accept()
    (key,) = first.publish([Message("a", b"1", 1)])
    first.exchange()
    first.session.lost("killed")
    second = Dialogue(connect(clean_start=False), state=state)
    second.accept(session_present=True)
    assert second.library.published == [Message("a", b"1", 1)]
    second.acknowledge([1])
    second.exchange()
    assert second.acknowledged == {key}
