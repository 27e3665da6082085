"""What a client was asked to publish and has not finished publishing.

Owns: the hand-over from `publish` calls to an engine, across reconnects. Rule: a call ends when
the broker has taken over every one of its messages, or said that it never will.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence

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
    """One `publish`; keys count from `start`."""

    def __init__(self, messages: Sequence[Message], start: int) -> None:
        self.messages = messages
        self.start = start
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


class Outbox:
    """Calls in the order they came. `published` counts the messages that were taken over."""

    def __init__(self) -> None:
        self.published = 0
        self._calls = 0
        self._unsent: deque[_Call] = deque()
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

    def offer(self, publish: Publish) -> None:
        """Gives messages to an engine until it takes no more."""
        while self._unsent:
            call = self._unsent[0]
            if call.done.done():
                self._unsent.popleft()
                continue
            part = call.messages[call.sent : call.sent + _SLICE]
            start = call.start + call.sent
            keys = range(start, start + len(part))
            try:
                taken, refused = publish(part, keys)
            except Exception as error:  # noqa: BLE001 - a message that is none fails its call, not the client
                call.done.set_exception(error)
                continue
            self._refuse(refused)
            call.sent += taken
            written = part[:taken]
            if refused:
                written = [one for key, one in zip(keys, written, strict=False) if key not in refused]
            if count := sum(1 for message in written if not message.qos):
                self.published += count
                call.finish(count)
            if call.sent == len(call.messages):
                self._unsent.popleft()
            if taken < len(part):
                return

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

    def _refuse(self, refused: Mapping[int, int]) -> None:
        for key, reason in refused.items():
            call = self._open.get(key >> _INDEX_BITS)
            if call is None:
                continue
            index = key - call.start
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
