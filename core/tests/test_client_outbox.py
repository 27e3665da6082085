"""What waits to be published: on lanes or not, it goes in order and is not forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import pytest

from tesaiot_connect.client.outbox import Outbox
from tesaiot_connect.errors import PartialDelivery
from tesaiot_connect.message import Message


class Engine:
    """Takes so many messages, and remembers them with their keys."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.keys: list[int] = []
        self.payloads: list[bytes] = []

    def publish(self, messages: Sequence[Message], keys: Sequence[int]) -> tuple[int, Mapping[int, int]]:
        taken = min(self.room, len(messages))
        self.room -= taken
        self.keys += keys[:taken]
        self.payloads += [message.payload for message in messages[:taken]]
        return taken, {}


def batch(first: int, last: int, topic: str = "t", qos: int = 1) -> list[Message]:
    return [Message(topic, b"%d" % number, qos) for number in range(first, last)]


def payloads(first: int, last: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, last)]


def odd(message: Message) -> int:
    return 1 + int(message.payload) % 2


def in_a_loop(test: Callable[[Outbox], None]) -> None:
    async def main() -> None:
        test(Outbox())

    asyncio.run(main())


def test_calls_go_in_order_through_windows_of_any_size() -> None:
    def check(box: Outbox) -> None:
        calls = [box.add(batch(0, 3000)), box.add(batch(3000, 3001)), box.add(batch(3001, 4000))]
        engine = Engine()
        for room in (1, 1023, 1, 1500, 2000):
            engine.room = room
            box.offer(engine.publish)
        assert engine.payloads == payloads(0, 4000)
        box.acknowledged(engine.keys[:3001], {})
        assert [call.done() for call in calls] == [True, True, False]
        box.acknowledged(engine.keys[3001:], {})
        assert calls[2].done()
        assert box.published == 4000

    in_a_loop(check)


def test_lanes_are_offered_each_for_itself_and_a_call_ends_with_the_last_of_them() -> None:
    def check(box: Outbox) -> None:
        call = box.add(batch(0, 10))
        box.route(odd)
        assert sorted(box.lanes) == [1, 2]
        first, second = Engine(), Engine(room=2)
        box.offer(second.publish, 2)
        box.offer(first.publish, 1)
        assert first.payloads == [b"0", b"2", b"4", b"6", b"8"]
        assert second.payloads == [b"1", b"3"]
        assert box.lanes == (2,)
        second.room = 100
        box.offer(second.publish, 2)
        assert second.payloads == [b"1", b"3", b"5", b"7", b"9"]
        box.acknowledged(first.keys, {})
        assert not call.done()
        box.acknowledged(second.keys[1:], {second.keys[0]: 0x87})
        with pytest.raises(PartialDelivery) as caught:
            call.result()
        assert list(caught.value.failures) == [1]

    in_a_loop(check)


def test_what_comes_back_goes_before_what_waits_in_its_old_order() -> None:
    def check(box: Outbox) -> None:
        for first in range(0, 20, 5):
            box.add(batch(first, first + 5))
        box.route(lambda _: 3)
        engine = Engine(room=12)
        box.offer(engine.publish, 3)
        assert engine.payloads == payloads(0, 12)
        box.acknowledged(engine.keys[:2], {})
        box.put_back(engine.keys[2:], 3)
        again = Engine()
        box.offer(again.publish, 3)
        assert again.payloads == payloads(2, 20)
        assert again.keys[:10] == engine.keys[2:], "by their old names"

    in_a_loop(check)


def test_without_a_lane_too() -> None:
    def check(box: Outbox) -> None:
        box.add(batch(0, 5))
        box.add(batch(5, 10))
        engine = Engine(room=7)
        box.offer_early(engine.publish)
        box.put_back(engine.keys)
        again = Engine()
        box.offer(again.publish)
        assert again.payloads == payloads(0, 10)

    in_a_loop(check)


def test_what_lanes_have_left_goes_before_what_came_later_and_nothing_overtakes_it_early() -> None:
    def check(box: Outbox) -> None:
        box.add(batch(0, 10))
        box.route(odd)
        box.add(batch(10, 20))
        early = Engine()
        box.offer_early(early.publish)
        assert early.payloads == []
        engine = Engine(room=7)
        box.offer(engine.publish)
        assert engine.payloads == [b"0", b"2", b"4", b"6", b"8", b"1", b"3"]
        engine.room = 100
        box.offer(engine.publish)
        assert engine.payloads[7:] == [b"5", b"7", b"9", *payloads(10, 20)]
        assert box.lanes == ()

    in_a_loop(check)


def test_what_the_window_does_not_hold_back_overtakes_nothing_on_a_lane() -> None:
    def check(box: Outbox) -> None:
        box.add(batch(0, 2))
        box.route(lambda _: 1)
        box.add(batch(2, 4, qos=0))
        engine = Engine()

        def without_window(messages: Sequence[Message], keys: Sequence[int]) -> tuple[int, Mapping[int, int]]:
            return engine.publish(messages, keys) if not messages[0].qos else (0, {})

        box.offer(without_window)
        assert engine.payloads == []
        box.offer(engine.publish)
        assert engine.payloads == payloads(0, 4)

    in_a_loop(check)


def test_what_was_sent_in_part_is_routed_from_there_on() -> None:
    def check(box: Outbox) -> None:
        box.add(batch(0, 2000))
        engine = Engine(room=1500)
        box.offer(engine.publish)
        box.route(lambda _: 1)
        box.offer(engine.publish, 1)
        assert engine.payloads == payloads(0, 1500), "there is no room"
        engine.room = 1000
        box.offer(engine.publish, 1)
        assert engine.payloads == payloads(0, 2000)

    in_a_loop(check)


def test_cancelled_calls_neither_go_nor_come_back() -> None:
    async def main() -> None:
        box, engine = Outbox(), Engine(room=3)
        sent, waiting, kept = box.add(batch(0, 3)), box.add(batch(3, 6)), box.add(batch(6, 9))
        box.route(lambda _: 1)
        box.offer(engine.publish, 1)
        sent.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
        box.put_back(engine.keys, 1)
        again = Engine()
        box.offer(again.publish, 1)
        assert again.payloads == payloads(6, 9)
        assert box.lanes == ()
        assert not kept.done()

    asyncio.run(main())


def test_a_message_that_cannot_be_placed_fails_its_call_alone() -> None:
    async def main() -> None:
        def lane_of(message: Message) -> int:
            if message.payload == b"2":
                raise TypeError("no")
            return 1

        box = Outbox()
        wrong, right = box.add(batch(0, 5)), box.add(batch(5, 7))
        box.route(lane_of)
        with pytest.raises(TypeError):
            await wrong
        engine = Engine()
        box.offer(engine.publish, 1)
        assert engine.payloads == payloads(5, 7)
        assert not right.done()

    asyncio.run(main())
