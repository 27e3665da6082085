"""What a client was asked to publish and has not finished publishing.

Owns: the hand-over from `publish` calls to an engine, across reconnects. Rules: a call ends when
the broker has taken over every one of its messages, or said that it never will; what goes the
same way keeps its order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

from ..errors import ConnectorError, PartialDelivery, PublishRefused
from ..message import Message
from ..mqtt.reasons import R, words

_SLICE = 1024
"""Messages offered to the engine at a time."""
_INDEX_BITS = 40
"""A key is the number of its call, then that many bits of the message's index in it."""

_FIXES = {
    R.NOT_AUTHORIZED: "ask the broker's operator for the right to publish to this topic",
    R.TOPIC_NAME_INVALID: "publish to a topic without wildcards, at most 65535 bytes long",
    R.PACKET_TOO_LARGE: "send a smaller payload, or raise the broker's maximum packet size",
    R.QOS_NOT_SUPPORTED: "set a lower `qos`: the broker does not support this one",
    R.RETAIN_NOT_SUPPORTED: "set `retain = false`: the broker keeps no retained messages",
    R.QUOTA_EXCEEDED: "wait, or raise the broker's quota",
}

Publish = Callable[[Sequence[Message], Sequence[int]], tuple[int, Mapping[int, int]]]
"""Messages and their keys to how many were taken, and which of them (key to reason code) refused."""


class _Call:
    """One `publish`. Until it is routed it waits as what it is, one `_Part`."""

    def __init__(self, messages: Sequence[Message], start: int) -> None:
        self.messages = messages
        self.keys = range(start, start + len(messages))
        self.sent = 0
        self.left = len(messages)
        self.failures: dict[int, BaseException] = {}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish(self, count: int) -> None:
        """So many more are done."""
        self.left -= count
        if self.left == 0 and not self.done.done():
            if self.failures:
                self.done.set_exception(PartialDelivery(self.failures))
            else:
                self.done.set_result(None)


class _Part:
    """Messages of a call that go one way and wait, from `sent` on; `keys` are parallel."""

    __slots__ = ("call", "done", "finish", "keys", "messages", "sent")

    def __init__(self, call: _Call, messages: Sequence[Message], keys: Sequence[int]) -> None:
        self.call = call
        self.done = call.done
        self.finish = call.finish
        self.messages = messages
        self.keys = keys
        self.sent = 0


class Outbox:
    """Calls in the order they came. `published` counts the messages that were taken over.

    While a connection has several streams, `route` puts what waits on lanes, one for each
    stream; what is left on them when such a connection is over goes first on the next.
    """

    def __init__(self) -> None:
        self.published = 0
        self._calls = 0
        self._unsent: deque[_Call | _Part] = deque()
        self._lanes: dict[int, deque[_Call | _Part]] = {}
        self._open: dict[int, _Call] = {}
        """Number to call, of those that are not done."""

    def add(self, messages: Sequence[Message]) -> asyncio.Future[None]:
        """The future ends with None or PartialDelivery. Cancel it to take back what is unsent."""
        self._calls += 1
        number = self._calls
        call = self._open[number] = _Call(messages, number << _INDEX_BITS)
        call.done.add_done_callback(lambda _: self._open.pop(number, None))
        self._unsent.append(call)
        return call.done

    def offer(self, publish: Publish, lane: int | None = None) -> None:
        """Gives messages to an engine until it takes no more: those of a lane; without one, all."""
        if self._lanes and lane is None:
            for one in self.lanes:
                self.offer(publish, one)
            if self._lanes:
                return
        queue = self._unsent if lane is None else self._lanes[lane]
        while queue:
            part = queue[0]
            messages, keys = part.messages, part.keys
            if part.done.done():
                queue.popleft()
                continue
            if part.sent or len(messages) > _SLICE:
                end = part.sent + _SLICE
                messages, keys = messages[part.sent : end], keys[part.sent : end]
            try:
                taken, refused = publish(messages, keys)
            except Exception as error:  # noqa: BLE001 - a message that is none fails its call, not the client
                part.done.set_exception(error)
                continue
            self._refuse(refused)
            part.sent += taken
            written = messages[:taken]
            if refused:
                written = [one for key, one in zip(keys, written, strict=False) if key not in refused]
            if count := sum(1 for message in written if not message.qos):
                self.published += count
                part.finish(count)
            if part.sent == len(part.messages):
                queue.popleft()
            if taken < len(messages):
                break
        if lane is not None and not queue:
            del self._lanes[lane]

    def offer_early(self, publish: Publish) -> None:
        """The same, where nothing may overtake what waits on lanes."""
        if not self._lanes:
            self.offer(publish)

    @property
    def unfinished(self) -> Iterator[Message]:
        """The messages of all calls that are not done."""
        return (message for call in self._open.values() for message in call.messages)

    @property
    def lanes(self) -> Sequence[int]:
        """Those on which something waits."""
        return tuple(self._lanes)

    def route(self, lane_of: Callable[[Message], int]) -> None:
        """Puts all that waits on the lanes that `lane_of` gives."""
        while self._unsent:
            part = self._unsent.popleft()
            call = part.call if isinstance(part, _Part) else part
            messages, keys = part.messages[part.sent :], part.keys[part.sent :]
            if call.done.done():
                continue
            try:
                lanes = [lane_of(message) for message in messages]
            except Exception as error:  # noqa: BLE001 - a message that is none fails its call, not the client
                call.done.set_exception(error)
                continue
            if lanes.count(lanes[0]) == len(lanes):
                self._lanes.setdefault(lanes[0], deque()).append(_Part(call, messages, keys))
                continue
            split: dict[int, tuple[list[Message], list[int]]] = {lane: ([], []) for lane in lanes}
            for lane, message, key in zip(lanes, messages, keys, strict=True):
                split[lane][0].append(message)
                split[lane][1].append(key)
            for lane, (some, theirs) in split.items():
                self._lanes.setdefault(lane, deque()).append(_Part(call, some, theirs))

    def put_back(self, keys: Sequence[int], lane: int | None = None) -> None:
        """These, in this order, were sent and not taken over: they go again, as new messages,
        before all that waits on the lane; without one, before all that is on none."""
        parts: list[_Part] = []
        for number, run in groupby(keys, lambda key: key >> _INDEX_BITS):
            call = self._open.get(number)
            if call is not None:
                theirs = list(run)
                parts.append(_Part(call, [call.messages[key - call.keys.start] for key in theirs], theirs))
        if parts:
            queue = self._unsent if lane is None else self._lanes.setdefault(lane, deque())
            queue.extendleft(reversed(parts))

    def acknowledged(self, keys: Sequence[int], refused: Mapping[int, int]) -> None:
        """The engine's news: these are taken over, those never will be (key to reason code)."""
        self.published += len(keys)
        number = count = 0
        for key in keys:
            if key >> _INDEX_BITS != number:
                self._finish(number, count)
                number, count = key >> _INDEX_BITS, 0
            count += 1
        self._finish(number, count)
        self._refuse(refused)

    def fail(self, error: ConnectorError) -> None:
        """Nothing more will be sent."""
        for call in self._open.values():
            if not call.done.done():
                call.done.set_exception(error)
        self._unsent.clear()
        self._lanes.clear()

    def _refuse(self, refused: Mapping[int, int]) -> None:
        for key, reason in refused.items():
            call = self._open.get(key >> _INDEX_BITS)
            if call is None:
                continue
            index = key - call.keys.start
            call.failures[index] = PublishRefused(
                f"the broker does not take a message on {call.messages[index].topic!r}: {words(reason)}",
                reason_code=reason,
                fix=_FIXES.get(R(reason), "") if reason in R._value2member_map_ else "",
            )
            call.finish(1)

    def _finish(self, number: int, count: int) -> None:
        call = self._open.get(number)
        if call is not None:
            call.finish(count)
