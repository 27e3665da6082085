"""Messages of the client: order, window, credit, acknowledgements, and what becomes of lost ones."""

from __future__ import annotations

import struct
from itertools import cycle
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from nng_dialogue import Dialogue

from tesaiot_connect import Message
from tesaiot_connect.mqtt import Connect, Event, ServerEngine, Subscription
from tesaiot_connect_quic_nng.outgoing import MOST_HELD, SLOWEST

MOST_UNSENT = 64


def connected(*, session_present: bool = False, **options: object) -> Dialogue:
    connect = Connect(client_id="device", version=4, keepalive=0, clean_start=not session_present)
    dialogue = Dialogue(connect, **options)  # type: ignore[arg-type]
    dialogue.accept(session_present=session_present)
    return dialogue


def publish(count: int, *, qos: int = 1, payload: bytes = b"") -> bytes:
    """PUBLISH packets of a client that keeps no window of its own, with identifiers from 1."""
    body = b"\0\1a"
    return b"".join(
        bytes((0x30 | qos << 1,))
        + struct.pack("B", len(body) + (2 if qos else 0) + len(payload))
        + body
        + (struct.pack(">H", n) if qos else b"")
        + payload
        for n in range(1, count + 1)
    )


def pubacks(data: bytes) -> list[int]:
    assert data[0::4].count(0x40) == len(data) // 4
    return [packet_id for _, packet_id in struct.iter_unpack(">HH", data)]


# --- order and bounds ---------------------------------------------------------------------


def test_messages_go_in_order_with_all_their_fields() -> None:
    dialogue = connected()
    messages = [Message(f"t/{n}", bytes([n]), n % 3, n % 2 == 0) for n in range(16)]
    keys = dialogue.publish(messages)
    dialogue.exchange()
    assert dialogue.library.published == messages
    assert not dialogue.acknowledged
    dialogue.server_does_all()
    assert dialogue.acknowledged == {key for key, one in zip(keys, messages, strict=True) if one.qos}
    assert dialogue.session.settled


def test_a_batch_is_one_call() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"x")] * 60)
    dialogue.exchange()
    assert [len(call) for call in dialogue.library.calls] == [60]


@pytest.mark.parametrize("window", [1, 16, 32])
def test_no_more_than_the_window_is_unacknowledged(window: int) -> None:
    dialogue = connected(window=window)
    dialogue.session.receive_data(publish(500), now=dialogue.now)
    assert len(dialogue.library.published) == window
    answers = b""
    while dialogue.library.qos:
        dialogue.acknowledge(list(dialogue.library.qos)[:1])
        dialogue.finish()
        answers += dialogue.session.outputs()
    assert dialogue.library.most_unacknowledged == window
    assert pubacks(answers) == list(range(1, 501))


def test_no_more_than_the_credit_is_unsent() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", str(n).encode()) for n in range(1000)])
    dialogue.exchange()
    assert len(dialogue.library.published) == MOST_UNSENT
    dialogue.finish(10)
    assert len(dialogue.library.published) == MOST_UNSENT + 10
    dialogue.server_does_all()
    assert dialogue.library.most_unsent == MOST_UNSENT
    assert [one.payload for one in dialogue.library.published] == [str(n).encode() for n in range(1000)]


def test_requests_need_credit_too() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"")] * MOST_UNSENT)
    dialogue.exchange()
    dialogue.client.subscribe([Subscription("a")])
    dialogue.exchange()
    assert not dialogue.library.subscribed
    dialogue.finish(1)
    assert dialogue.library.subscribed


def test_many_requests_leave_reading_as_it_was() -> None:
    dialogue = connected()
    for _ in range(200):
        dialogue.client.unsubscribe(["a"])
        dialogue.exchange()
        dialogue.finish()
        dialogue.session.unsuback(dialogue.library.unsubscribed[-1][0], now=dialogue.now)
    dialogue.exchange()
    assert len(dialogue.subacks) == 200
    assert dialogue.session.settled


def test_what_the_library_sends_by_itself_counts() -> None:
    dialogue = connected()
    session, library = dialogue.session, dialogue.library
    session.received([Message("x", b"", 1)] * 40 + [Message("x", b"", 2)] * 7, now=dialogue.now)
    library.unsent += 54  # PUBACK of each, PUBREC and PUBCOMP of each
    dialogue.publish([Message("a", b"")] * 100)
    dialogue.exchange()
    assert len(library.published) == 10
    dialogue.finish(54)
    assert len(library.published) == 64
    dialogue.server_does_all()
    assert session.settled
    assert len(library.published) == 100


def test_pubrel_counts() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"", 2)])
    dialogue.exchange()
    dialogue.finish()
    dialogue.acknowledge([1])
    dialogue.exchange()
    assert dialogue.acknowledged == {0}
    assert not dialogue.session.settled, "PUBREL is in the library"
    dialogue.finish()
    assert dialogue.session.settled


def test_completions_may_come_before_their_message_is_known() -> None:
    """PUBREC goes out when a message of QoS 2 comes; the message is given after PUBREL only."""
    dialogue = connected()
    dialogue.session.sent(1, now=dialogue.now)
    dialogue.session.received([Message("x", b"", 2)], now=dialogue.now)
    assert not dialogue.session.settled
    dialogue.session.sent(1, now=dialogue.now)
    assert dialogue.session.settled


def test_reading_stops_and_goes_on() -> None:
    dialogue = connected()
    size = 0
    while dialogue.session.reading:
        dialogue.session.receive_data(publish(2000, qos=0, payload=b"x" * 100), now=dialogue.now)
        size += 2000
        assert size < 20_000
    dialogue.server_does_all()
    assert dialogue.session.reading
    assert len(dialogue.library.published) == size


def test_large_messages_stop_reading_by_their_size() -> None:
    dialogue = connected()
    while dialogue.session.reading:
        dialogue.publish([Message("a", bytes(400_000))])
        dialogue.exchange()
        dialogue.unread.clear()
        if len(dialogue.library.published) > 70:
            break
    assert len(dialogue.library.published) == MOST_HELD // 400_001
    assert not dialogue.session.reading


@pytest.mark.parametrize("qos", [0, 1])
def test_the_library_holds_few_bytes_or_one_message(qos: int) -> None:
    dialogue = connected(max_packet_size=20_000_000)
    sizes = [3_000_000] * 6 + [12_000_000] * 2 + [1]
    keys = dialogue.publish([Message("a", bytes(size), qos) for size in sizes])
    handed: list[int] = []
    while len(handed) < len(sizes):
        dialogue.exchange()
        new = [len(one.payload) for one in dialogue.library.published[len(handed) :]]
        handed += new
        assert new
        assert len(new) == 1 or sum(new) <= MOST_HELD
        dialogue.finish()
        if qos:
            dialogue.exchange()
            assert len(dialogue.library.published) == len(handed), "sent is not acknowledged"
            dialogue.acknowledge(list(dialogue.library.qos))
    dialogue.server_does_all()
    assert handed == sizes
    assert dialogue.acknowledged == (set(keys) if qos else set())


def test_a_message_larger_than_a_piece_passes_whole() -> None:
    dialogue = connected(max_packet_size=2_000_000)
    messages = [Message("a", b"s", 1), Message("b", b"l" * 1_500_000, 1), Message("c", b"s", 1)]
    dialogue.publish(messages)
    dialogue.server_does_all()
    assert dialogue.library.published == messages
    assert len(dialogue.acknowledged) == 3


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize(("count", "size"), [(1, 1_000_000), (5000, 100)])
def test_much_is_decoded_in_large_pieces(
    qos: int, count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    receive = ServerEngine.receive_data

    def counting(self: ServerEngine, data: bytes, **rest: Any) -> list[Event]:
        taken.append(len(data))
        return receive(self, data, **rest)

    monkeypatch.setattr(ServerEngine, "receive_data", counting)
    dialogue = connected()
    taken.clear()
    dialogue.publish([Message("a", bytes(size), qos)] * count)
    dialogue.server_does_all()
    assert len(dialogue.library.published) == count
    if qos and count > 1:
        assert max(taken) < 2000, "few messages that wait for each other"
    else:
        assert len(taken) < 100


# --- acknowledgements ---------------------------------------------------------------------


def test_an_acknowledgement_is_handed_on_before_those_of_the_whole_burst() -> None:
    dialogue = connected(window=32)
    dialogue.session.receive_data(publish(500, payload=b"x" * 50), now=dialogue.now)
    seen = [0]
    for _ in range(500):
        dialogue.acknowledge(list(dialogue.library.qos)[:1])
        dialogue.finish()
        seen.append(len(dialogue.session.outputs()) // 4)
    assert sum(seen) == 500
    assert max(seen[100:]) <= 8, "a lost acknowledgement holds up a few others, not hundreds"


def test_the_first_burst_is_acknowledged_in_parts() -> None:
    dialogue = connected()
    keys = dialogue.publish([Message("a", bytes(50), 1)] * 12)
    dialogue.exchange()
    dialogue.acknowledge([*range(1, 12)])
    dialogue.exchange()
    assert set(keys[:8]) <= dialogue.acknowledged < set(keys)


def test_acknowledgements_may_come_in_any_order() -> None:
    dialogue = connected()
    keys = dialogue.publish([Message("a", str(n).encode(), 1) for n in range(3)])
    dialogue.exchange()
    dialogue.acknowledge([3, 1])
    dialogue.exchange()
    assert not dialogue.acknowledged
    dialogue.acknowledge([2])
    dialogue.exchange()
    assert dialogue.acknowledged == set(keys)


@pytest.mark.parametrize("wrong", [[9], [1, 1], [0], [2, 1, 2]])
def test_an_acknowledgement_of_what_was_not_sent_ends(wrong: list[int]) -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"", 1)] * 2 + [Message("a", b"", 0)])
    dialogue.exchange()
    dialogue.session.acknowledged(wrong, now=dialogue.now)
    dialogue.exchange()
    ended = dialogue.session.ended
    assert ended is not None
    assert "acknowledged" in ended.what
    assert str(wrong[-1]) in ended.what
    assert not dialogue.acknowledged


@pytest.mark.parametrize("answer", [[1], [1, 2, 3], [0, 1], [1, 1], []])
def test_identifiers_that_cannot_be_end(answer: list[int]) -> None:
    dialogue = connected()
    dialogue.library.answers.append(answer)
    dialogue.publish([Message("a", b"", 1)] * 2)
    dialogue.exchange()
    assert dialogue.session.ended is not None
    assert "out of step" in dialogue.session.ended.what


def test_identifiers_wrap() -> None:
    dialogue = connected()
    dialogue.library.next_id = 65_530
    dialogue.publish([Message("a", b"", 1)] * 40)
    dialogue.server_does_all()
    assert len(dialogue.acknowledged) == 40
    assert dialogue.library.next_id < 100


@pytest.mark.parametrize(("present", "qos"), [(False, [0, 1, 2, 2]), (True, [0, 1, 1, 1])])
def test_qos_2_is_exact_only_in_a_new_session(present: bool, qos: list[int]) -> None:
    dialogue = connected(session_present=present)
    messages = [Message("a", str(n).encode(), min(n, 2), n == 3) for n in range(4)]
    dialogue.publish(messages)
    dialogue.exchange()
    sent = dialogue.library.published
    assert [one.qos for one in sent] == qos
    assert [(one.topic, one.payload, one.retain) for one in sent] == [
        (one.topic, one.payload, one.retain) for one in messages
    ]
    assert not dialogue.acknowledged
    for packet_id in (1, 2, 3):
        assert b"\x50" not in dialogue.session.outputs()
        dialogue.acknowledge([packet_id])
    dialogue.server_does_all()
    assert len(dialogue.acknowledged) == 3
    assert dialogue.client.in_flight == 0


# --- time ---------------------------------------------------------------------------------


def test_messages_that_stay_unacknowledged_end_as_unknown() -> None:
    dialogue = connected()
    start = dialogue.now
    keys = dialogue.publish([Message("a", str(n).encode(), 1) for n in range(5)])
    dialogue.exchange()
    dialogue.finish()
    dialogue.now += 6
    dialogue.acknowledge([1, 2])
    dialogue.publish([Message("a", b"later", 1)])
    dialogue.exchange()
    dialogue.finish()
    dialogue.session.handle_timeout(start + 9.9)
    assert dialogue.session.ended is None
    dialogue.session.handle_timeout(start + 10)
    ended = dialogue.session.ended
    assert ended is not None
    assert ended.silent
    assert "4 messages were not acknowledged within 10 s" in ended.what
    assert "sent again" in ended.fix
    dialogue.session.acknowledged([3, 4, 5, 6], now=start + 11)
    dialogue.exchange()
    assert dialogue.acknowledged.isdisjoint(keys[2:])


@pytest.mark.parametrize("qos", [0, 1])
def test_packets_that_do_not_go_out_end(qos: int) -> None:
    dialogue = connected()
    start = dialogue.now
    dialogue.publish([Message("a", b"", qos)])
    dialogue.exchange()
    if qos:
        dialogue.acknowledge([1])
    dialogue.session.handle_timeout(start + 9.9)
    assert dialogue.session.ended is None
    assert dialogue.session.next_timeout() == start + 10
    dialogue.session.handle_timeout(start + 10)
    assert dialogue.session.ended is not None
    assert dialogue.session.ended.silent


def test_slow_sending_is_no_end_as_long_as_it_goes_on() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"")] * 20)
    dialogue.exchange()
    for _ in range(20):
        dialogue.now += 9
        dialogue.session.handle_timeout(dialogue.now)
        dialogue.finish(1)
    assert dialogue.session.ended is None
    assert dialogue.session.settled
    assert dialogue.session.next_timeout() is None


def test_a_large_message_has_time_to_go_out() -> None:
    dialogue = connected(max_packet_size=4_000_000)
    start = dialogue.now
    dialogue.publish([Message("a", bytes(100 * SLOWEST), 1)])
    dialogue.exchange()
    assert dialogue.session.next_timeout() == start + 110
    dialogue.now += 100
    dialogue.finish()
    assert dialogue.session.next_timeout() == dialogue.now + 110, "QUIC may have all of it still"
    dialogue.session.handle_timeout(dialogue.now + 109)
    assert dialogue.session.ended is None
    dialogue.session.handle_timeout(dialogue.now + 110)
    assert dialogue.session.ended is not None
    assert "1 message was not acknowledged" in dialogue.session.ended.what


def test_the_time_to_acknowledge_begins_when_it_is_sent() -> None:
    """Behind a large message, and for an answer too."""
    dialogue = connected(max_packet_size=4_000_000)
    dialogue.publish([Message("a", bytes(40 * SLOWEST)), Message("a", b"small", 1)])
    dialogue.exchange()
    dialogue.client.subscribe([Subscription("x")])
    dialogue.exchange()
    for _ in range(2):
        dialogue.now += 45
        dialogue.session.handle_timeout(dialogue.now)
        dialogue.finish(1)
    assert dialogue.session.ended is None
    dialogue.acknowledge([1])
    dialogue.now += 9
    dialogue.finish(1)
    dialogue.session.handle_timeout(dialogue.now + 45)
    assert dialogue.session.ended is None, "the large one may be on its way"
    dialogue.session.handle_timeout(dialogue.now + 50)
    assert dialogue.session.ended is not None
    assert "SUBSCRIBE or UNSUBSCRIBE was not answered" in dialogue.session.ended.what


def test_small_messages_have_no_more_than_the_ack_timeout() -> None:
    dialogue = connected(window=32)
    dialogue.publish([Message("a", bytes(900), 1)] * 32)
    dialogue.exchange()
    dialogue.now += 3
    dialogue.finish()
    assert dialogue.session.next_timeout() == dialogue.now + 10


def test_the_time_to_send_begins_when_there_is_something_to_send() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"")])
    dialogue.exchange()
    for _ in range(3):
        dialogue.now += 4
        dialogue.publish([Message("a", b"")])
        dialogue.exchange()
        dialogue.session.handle_timeout(dialogue.now)
    assert dialogue.session.ended is not None, "more to send is no progress"


def test_a_quiet_connection_has_no_deadline() -> None:
    dialogue = connected()
    dialogue.publish([Message("a", b"", 2), Message("a", b"", 1), Message("a", b"")])
    dialogue.server_does_all()
    assert dialogue.session.next_timeout() is None
    dialogue.session.handle_timeout(dialogue.now + 1e6)
    assert dialogue.session.ended is None


# --- any schedule -------------------------------------------------------------------------

KINDS = st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 40, 1500]))
MESSAGES = st.builds(
    lambda kinds, count: [
        Message(f"t/{n % 3}", f"{n}:".encode() + bytes(size), qos, n % 2 == 0)
        for n, (qos, size) in zip(range(count), cycle(kinds), strict=False)
    ],
    st.lists(KINDS, min_size=1, max_size=12),
    st.integers(0, 250),
)
CUTS = st.lists(st.sampled_from([1, 2, 3, 10, 47, 500, 5000]), min_size=1, max_size=6)


@given(
    messages=MESSAGES,
    cuts=CUTS,
    window=st.integers(1, 32),
    present=st.booleans(),
    seed=st.integers(0, 2**32),
    leave=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_schedule_delivers_all_in_order_and_comes_to_rest(
    messages: list[Message], cuts: list[int], window: int, present: bool, seed: int, leave: bool
) -> None:
    schedule = Random(seed)
    random = schedule.random
    dialogue = connected(window=window, session_present=present)
    library, session = dialogue.library, dialogue.session
    keys = dialogue.publish(messages)
    asked: set[int] = set()
    answered = 0
    safe = 0
    for turn in range(10_000):
        dialogue.exchange(cuts)
        if random() < 0.1 and not asked and turn:
            asked.add(dialogue.client.subscribe([Subscription("x")]))
        if library.qos and random() < 0.7:
            some = [one for one in library.qos if random() < 0.5]
            schedule.shuffle(some)
            dialogue.acknowledge(some)
            safe += len(some)
        if random() < 0.7:
            dialogue.finish(int(random() * 70))
        if len(library.subscribed) > answered and random() < 0.5:
            session.suback(library.subscribed[answered][0], [0], now=dialogue.now)
            answered += 1
        assert session.ended is None
        assert len(library.qos) <= window
        assert len(dialogue.acknowledged) <= safe
        if not (dialogue.waiting or dialogue.unread or dialogue.client.has_output or not session.settled):
            break
    else:
        raise AssertionError("it does not come to rest")
    dialogue.exchange()
    assert library.most_unsent <= MOST_UNSENT + window, "ours, and a PUBREL for each PUBCOMP"
    expected = [min(one.qos, 1) if present else one.qos for one in messages]
    assert [one.qos for one in library.published] == expected
    assert [one.payload for one in library.published] == [one.payload for one in messages]
    assert dialogue.acknowledged == {key for key, one in zip(keys, messages, strict=True) if one.qos}
    assert dialogue.client.in_flight == 0
    assert len(dialogue.subacks) == len(asked)
    if leave:
        session.eof(now=dialogue.now)
        assert session.ended is not None
        assert session.ended.orderly


@given(messages=MESSAGES, cuts=CUTS, lost=st.sets(st.integers(1, 200)), window=st.integers(1, 32))
@settings(max_examples=60, deadline=None)
def test_a_lost_acknowledgement_ends_and_never_counts_as_safe(
    messages: list[Message], cuts: list[int], lost: set[int], window: int
) -> None:
    dialogue = connected(window=window)
    library, session = dialogue.library, dialogue.session
    keys = dialogue.publish(messages)
    safe: list[int] = []
    for _ in range(1000):
        dialogue.exchange(cuts)
        come = [one for one in library.qos if one not in lost]
        if not come and not library.unsent and not dialogue.unread:
            break
        dialogue.acknowledge(come)
        safe += come
        dialogue.finish()
    waited = [key for key, one in zip(keys, messages, strict=True) if one.qos]
    if len(waited) > len(safe):
        dialogue.now += 11
        session.handle_timeout(dialogue.now)
        assert session.ended is not None
        assert session.ended.silent
        assert f"{len(library.qos)} message" in session.ended.what
    else:
        assert session.ended is None
        assert session.settled
    dialogue.exchange()
    known = {waited[packet_id - 1] for packet_id in safe}
    assert dialogue.acknowledged <= known
    if len(known) == len(waited):
        assert dialogue.acknowledged == known
