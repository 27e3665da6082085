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

_FIXES = {
    R.NOT_AUTHORIZED: "ask the broker's operator for the right to publish to this topic",
    R.TOPIC_NAME_INVALID: "publish to a topic without wildcards, at most 65535 bytes long",
    R.PACKET_TOO_LARGE: "send a smaller payload, or raise the broker's maximum packet size",
    R.QOS_NOT_SUPPORTED: "set a lower `qos`: the broker does not support this one",
    R.RETAIN_NOT_SUPPORTED: "set `retain = false`: the broker keeps no retained messages",
    R.QUOTA_EXCEEDED: "wait, or raise the broker's quota",
}


class _Call:
    """One `publish`: keys `start` to `stop` are its messages."""

    def __init__(self, messages: Sequence[Message], start: int) -> None:
        self.messages = messages
        self.start = start
        self.stop = start + len(messages)
        self.sent = 0
        self.left = len(messages)
        self.failures: dict[int, BaseException] = {}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish(self) -> None:
        if self.left == 0 and not self.done.done():
            if self.failures:
                self.done.set_exception(PartialDelivery(self.failures))
            else:
                self.done.set_result(None)


class Outbox:
    """Calls in the order they came. `published` counts the messages that are done."""

    def __init__(self) -> None:
        self.published = 0
        self._next_key = 1
        self._unsent: deque[_Call] = deque()
        self._open: deque[_Call] = deque()

    def add(self, messages: Sequence[Message]) -> asyncio.Future[None]:
        """The future ends with None or PartialDelivery. Cancel it to take back what is unsent."""
        call = _Call(messages, self._next_key)
        self._next_key = call.stop
        self._unsent.append(call)
        self._open.append(call)
        return call.done

    def offer(self, publish: Callable[[Sequence[Message], Sequence[int]], int]) -> None:
        """Gives messages to an engine's `publish` until it takes no more."""
        while self._unsent:
            call = self._unsent[0]
            if call.done.done():
                self._unsent.popleft()
                self._close()
                continue
            part = call.messages[call.sent : call.sent + _SLICE]
            start = call.start + call.sent
            taken = publish(part, range(start, start + len(part)))
            call.sent += taken
            self._done(call, sum(1 for message in part[:taken] if not message.qos))
            if call.sent == len(call.messages):
                self._unsent.popleft()
                self._close()
            if taken < len(part):
                return

    def acknowledged(self, keys: Sequence[int], refused: Mapping[int, int]) -> None:
        """The engine's news: these are taken over, those never will be (key to reason code)."""
        call: _Call | None = None
        for key in keys:
            if call is None or not call.start <= key < call.stop:
                call = self._find(key)
            if call is not None:
                self._done(call, 1)
        for key, reason in refused.items():
            call = self._find(key)
            if call is None:
                continue
            index = key - call.start
            message = call.messages[index]
            call.failures[index] = PublishRefused(
                f"the broker does not take a message on {message.topic!r}: {words(reason)}",
                reason_code=reason,
                fix=_FIXES.get(R(reason), "") if reason in R._value2member_map_ else "",
            )
            if message.qos:
                self._done(call, 1)
            else:
                call.finish()
        self._close()

    def fail(self, error: ConnectorError) -> None:
        """Nothing more will be sent."""
        for call in self._open:
            if not call.done.done():
                call.done.set_exception(error)
        self._open.clear()
        self._unsent.clear()

    def _done(self, call: _Call, count: int) -> None:
        if count:
            call.left -= count
            self.published += count
            if not call.left:
                call.finish()

    def _find(self, key: int) -> _Call | None:
        for call in self._open:
            if call.start <= key < call.stop:
                return call
        return None

    def _close(self) -> None:
        while self._open and self._open[0].done.done() and self._open[0].sent == len(self._open[0].messages):
            self._open.popleft()
        if self._open and self._open[0].done.cancelled():
            self._open.popleft()
