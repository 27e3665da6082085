"""Sessions, wills and queues over time: the broker's decisions with a clock that the test moves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt.packets import Connect, Subscribe, Subscription, Unsubscribe, Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.protocols import Size
from tesaiot_connect.server import Anybody, BrokerOptions
from tesaiot_connect.server.hub import Hub
from tesaiot_connect.server.sessions import ClientSession
from tesaiot_connect.testing import ManualClock


class Wire:
    """A client that takes `room` messages and acknowledges nothing."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.got: list[Message] = []
        self.keys: list[int] = []

    def publish(self, stream: int, messages: Sequence[Message], keys: Sequence[int], /) -> int:
        count = min(self.room, len(messages))
        self.room -= count
        self.got += messages[:count]
        self.keys += keys[:count]
        return count

    def settle(self, token: int, reasons: Sequence[int] | None, /) -> None:
        raise AssertionError("nothing was received")

    def disconnect(self, reason_code: int, text: str, /) -> None:
        self.room = 0


class House:
    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock(1000.0)
        self.woken = 0
        self.hub = Hub(BrokerOptions(**options), None, None, clock=self.clock, wake=self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def connect(
        self, client_id: str, wire: Wire, *, expiry: int = 0, clean: bool = True, will: Will | None = None
    ) -> tuple[ClientSession, bool]:
        connect = Connect(
            client_id=client_id, clean_start=clean, will=will, properties={P.SESSION_EXPIRY: expiry}
        )
        session, present, _ = self.hub.connect(wire, connect, Anybody())
        session.outbox.pump(self.clock())
        return session, present

    def subscribe(self, session: ClientSession, *filters: str, qos: int = 1) -> None:
        packet = Subscribe(packet_id=1, subscriptions=tuple(Subscription(one, qos) for one in filters))
        codes, _ = self.hub.subscribe(session.outbox, Anybody(), packet)
        assert codes == [qos] * len(filters)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.hub.tick()


def test_a_session_expires_on_time() -> None:
    house, wire = House(), Wire()
    session, _ = house.connect("c", wire, expiry=60)
    house.subscribe(session, "t")
    house.hub.disconnected(session, wire)
    assert house.woken == 1
    assert house.hub.next_due() == 1060.0
    house.advance(59)
    assert house.connect("c", wire, expiry=60, clean=False)[1]
    house.advance(59)
    assert len(house.hub.sessions) == 1  # the earlier reminder means nothing now
    house.hub.disconnected(session, wire)
    house.hub.route([Message("t", b"", 1)])
    assert house.hub.usage.queued == 1
    house.advance(60)
    assert (len(house.hub.sessions), len(house.hub.router), house.hub.usage.bytes) == (0, 0, 0)
    assert not house.connect("c", wire, clean=False)[1]


def test_a_will_comes_after_its_delay_or_with_the_end_of_the_session() -> None:
    for delay, expiry, due in ((5, 60, 5), (60, 5, 5), (0, 60, 0), (5, 0, 0)):
        house, watcher, wire = House(), Wire(), Wire()
        watching, _ = house.connect("watcher", watcher)
        house.subscribe(watching, "will")
        session, _ = house.connect("c", wire, expiry=expiry, will=Will(Message("will", b""), delay))
        house.hub.disconnected(session, wire)
        if due:
            house.advance(due - 0.1)
            assert watcher.got == []
            house.advance(0.1)
        assert len(watcher.got) == 1
        house.advance(1000)
        assert len(watcher.got) == 1


def test_reminders_do_not_pile_up() -> None:
    house = House()
    for _ in range(5000):
        session, _ = house.connect(
            "c", wire := Wire(), expiry=3600, clean=False, will=Will(Message("w", b""), 9)
        )
        house.hub.disconnected(session, wire)
        house.advance(0.01)
    assert len(house.hub._due) < 500
    house.advance(3600)
    assert len(house.hub.sessions) == 0


def test_the_sweep_lets_go_of_what_is_over() -> None:
    house, wire = House(), Wire()
    session, _ = house.connect("c", wire, expiry=1000)
    house.subscribe(session, "t")
    house.hub.disconnected(session, wire)
    brief = Properties(message_expiry=10)
    house.hub.route([Message("t", b"x", 1, True, brief), Message("t", b"", 1)])
    assert (house.hub.usage.queued, len(house.hub.retained)) == (2, 1)
    house.clock.advance(10)
    house.hub.sweep()
    assert (house.hub.usage.queued, len(house.hub.retained)) == (1, 0)
    assert house.hub.usage.dropped == {"expired": 1}


def test_a_full_wire_queues_in_order_and_counts_what_is_left() -> None:
    house, wire = House(), Wire(room=3)
    session, _ = house.connect("c", wire)
    house.subscribe(session, "t")
    house.hub.route([Message("t", bytes([n]), 1) for n in range(10)])
    expiring = Properties(message_expiry=5)
    house.hub.route([Message("t", b"over", 1, False, expiring), Message("t", bytes([10]), 1)])
    house.clock.advance(5)
    for _ in range(20):
        wire.room = 1
        session.outbox.pump(house.clock())
    assert [message.payload for message in wire.got] == [bytes([n]) for n in range(11)]
    assert house.hub.usage.queued == 0
    assert house.hub.usage.bytes > 0
    session.outbox.acknowledged(wire.keys, [])
    assert house.hub.usage.bytes == 0


def test_bytes_and_counts_balance_whatever_happens() -> None:
    """Random lives of clients; at the end nothing may be left on the books."""
    for seed in range(30):
        rng = random.Random(seed)
        house = House(
            max_queue_messages=20, max_queue_bytes=8000, queue_full=rng.choice(["drop_oldest", "drop_newest"])
        )
        wires: dict[str, Wire] = {}
        for _ in range(300):
            client_id = rng.choice("abcd")
            session = house.hub.sessions.get(client_id)
            match rng.randrange(7):
                case 0:
                    wire = wires[client_id] = Wire(rng.randrange(10))
                    house.connect(client_id, wire, expiry=rng.choice([0, 5]), clean=rng.random() < 0.3)
                case 1 if session is not None and session.link is not None:
                    house.hub.disconnected(session, session.link)
                case 2 if session is not None:
                    house.subscribe(session, rng.choice(["t/#", "t/1", "$share/g/t/+"]), qos=rng.randrange(3))
                case 3 if session is not None and session.link is not None:
                    wires[client_id].room += 5
                    session.outbox.pump(house.clock())
                case 4 if session is not None and session.link is not None:
                    session.outbox.acknowledged(wires[client_id].keys, [])
                case 5:
                    house.advance(rng.random() * 3)
                case _:
                    properties = Properties(message_expiry=rng.choice([None, 1, 3]))
                    house.hub.route(
                        [
                            Message(f"t/{rng.randrange(3)}", bytes(200), rng.randrange(3), False, properties)
                            for _ in range(4)
                        ]
                    )
            boxes = [session.outbox for session in house.hub.sessions]
            assert house.hub.usage.queued == sum(len(box.queue) for box in boxes)
            held = [entry for box in boxes for entry in (*box.queue, *box.inflight.values())]
            assert house.hub.usage.bytes == sum(entry.size for entry in held)
            assert all(box.bytes <= 8000 and len(box.queue) + len(box.inflight) <= 20 + 10 for box in boxes)
        for session in house.hub.sessions:
            house.hub.end(session)
        assert (house.hub.usage.bytes, house.hub.usage.queued, len(house.hub.router)) == (0, 0, 0)


def test_more_at_once_than_the_queue_takes_does_not_stall_a_client_that_is_there() -> None:
    house, wire = House(max_queue_bytes=Size(3000)), Wire()
    session, _ = house.connect("c", wire)
    house.subscribe(session, "t")
    house.hub.route([Message("t", bytes(5000), 1), *(Message("t", b"%d" % n, 1) for n in range(50))])
    assert [message.payload for message in wire.got] == [b"%d" % n for n in range(50)][-len(wire.got) :]
    assert len(wire.got) >= 10
    assert not session.outbox.queue
    assert house.hub.usage.dropped["queue_full"] == 51 - len(wire.got)
    session.outbox.acknowledged(list(session.outbox.inflight), ())
    house.hub.route([Message("t", b"more", 1)])
    assert wire.got[-1].payload == b"more"
    assert house.hub.usage.bytes == session.outbox.bytes > 0


def test_the_levels_of_filters_are_bounded_for_a_client_and_for_all() -> None:
    house = House(max_subscriptions=20, max_total_subscriptions=30)
    hub = house.hub

    def ask(session: ClientSession, *filters: str) -> list[int]:
        packet = Subscribe(packet_id=1, subscriptions=tuple(Subscription(one, 1) for one in filters))
        return hub.subscribe(session.outbox, Anybody(), packet)[0]

    wires = Wire(), Wire()
    one, two = house.connect("one", wires[0])[0], house.connect("two", wires[1])[0]
    deep = [f"{number}" + "/+" * 99 for number in range(10)]
    assert ask(one, *deep) == [1, 1, 1, 1, R.QUOTA_EXCEEDED, *[R.QUOTA_EXCEEDED] * 5]
    assert ask(one, deep[0], "short") == [1, 0x97]  # it has the first already
    assert ask(two, *deep) == [1, *[0x97] * 9]
    hub.unsubscribe(one.outbox, Unsubscribe(packet_id=1, filters=(deep[0],)))
    assert ask(one, *(str(number) for number in range(20))) == [1] * 17 + [0x97] * 3
    assert ask(two, *(str(number) for number in range(20))) == [1] * 9 + [0x97] * 11
    hub.disconnected(one, wires[0])
    hub.disconnected(two, wires[1])
    assert (hub.usage.levels, len(hub.router)) == (0, 0)


def test_what_waits_by_many_shared_subscriptions_moves_in_order() -> None:
    house, away, there = House(), Wire(0), Wire()
    leaver, _ = house.connect("leaver", away, expiry=60)
    house.subscribe(leaver, "$share/a/t/+", "$share/b/u", "$share/alone/v", "own")
    for number in range(30):
        house.hub.route([Message(("t/1", "u", "v", "own")[number % 4], b"%d" % number, 1)])
    stayer, _ = house.connect("stayer", there, expiry=60)
    house.subscribe(stayer, "$share/a/t/+", "$share/b/u")
    house.hub.disconnected(leaver, away)
    moved = [int(message.payload) for message in there.got]
    assert moved == [number for number in range(30) if number % 4 < 2]
    kept = [int(entry.message.payload) for entry in leaver.outbox.queue]
    assert kept == [number for number in range(30) if number % 4 >= 2]
    assert house.hub.usage.bytes == leaver.outbox.bytes + stayer.outbox.bytes


def test_a_retained_message_that_changes_on_the_way_is_not_sent_after_the_newer_one() -> None:
    house, wire = House(), Wire()
    house.hub.route([Message(f"r/{number}", b"old", 1, True) for number in range(1200)])
    session, _ = house.connect("c", wire)
    packet = Subscribe(packet_id=1, subscriptions=(Subscription("r/#", 1),))
    _, wanting = house.hub.subscribe(session.outbox, Anybody(), packet)
    steps = house.hub.send_retained(session.outbox, wanting)
    next(steps)
    late = {f"r/{number}" for number in range(1200)} - {message.topic for message in wire.got}
    one, other = sorted(late)[:2]
    house.hub.route([Message(one, b"new", 1, True), Message(other, b"", 1, True)])
    assert len(list(steps)) == 2
    assert [message.payload for message in wire.got if message.topic == one] == [b"new"]
    assert [message.payload for message in wire.got if message.topic == other] == [b""]
    assert len(wire.got) == 1200


@pytest.mark.parametrize("front", [0, 1])
def test_qos0_messages_do_not_overtake_those_that_waited_for_the_client(front: int) -> None:
    """Also where the one that holds the queue up is of another QoS."""
    house, wire = House(queue_qos0=True), Wire()
    session, _ = house.connect("c", wire, expiry=60)
    house.subscribe(session, "t")
    house.hub.disconnected(session, wire)
    house.hub.route([Message("t", b"0", front), Message("t", b"1")])
    back = Wire(room=0)
    house.connect("c", back, expiry=60, clean=False)
    back.room = 1
    house.hub.route([Message("t", b"2")])
    house.hub.route([Message("t", b"3"), Message("t", b"4", 1), Message("t", b"5")])
    assert back.got == []
    for _ in range(6):
        back.room = 1
        session.outbox.pump(house.clock())
    assert [int(message.payload) for message in back.got] == list(range(6))
    # nothing waits any more: what finds no room is dropped as ever
    back.room = 1
    house.hub.route([Message("t", b"6"), Message("t", b"7")])
    assert (len(back.got), len(session.outbox.queue)) == (7, 0)


def test_a_retained_message_that_waits_for_room_is_not_overtaken() -> None:
    house, wire = House(), Wire(room=0)
    house.hub.route([Message("t", b"0", 0, True)])
    session, _ = house.connect("c", wire)
    packet = Subscribe(packet_id=1, subscriptions=(Subscription("t", 0),))
    _, wanting = house.hub.subscribe(session.outbox, Anybody(), packet)
    list(house.hub.send_retained(session.outbox, wanting))
    wire.room = 1
    house.hub.route([Message("t", b"1")])
    wire.room = 2
    session.outbox.pump(house.clock())
    assert [message.payload for message in wire.got] == [b"0", b"1"]


def test_qos0_messages_pass_what_waits_for_acknowledgements() -> None:
    house, wire = House(), Wire()
    session, _ = house.connect("c", wire, expiry=60)
    house.subscribe(session, "t")
    house.hub.disconnected(session, wire)
    house.hub.route([Message("t", b"waits", 1)])
    back = Wire(room=0)
    house.connect("c", back, expiry=60, clean=False)
    back.room = 1
    house.hub.route([Message("t", b"passes")])
    assert [message.payload for message in back.got] == [b"passes"]
