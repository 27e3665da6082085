"""The queue of what goes to one client, and the bounds on it.

Owns: outboxes, and the figures that all of them share. Rule: what is queued or in flight counts
in messages and bytes until it is acknowledged, and is in the state file as long.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import attrs
import msgspec

from ..message import NO_PROPERTIES, Message
from .options import BrokerOptions
from .rights import Scope
from .router import Filter
from .store import Store

if TYPE_CHECKING:
    from .sessions import ClientSession

_OVERHEAD = 250
"""Bytes of memory a queued message costs beside its topic and payload, measured roughly."""
_PUMP = 256
"""Messages given to the engine in one call."""


def footprint(message: Message) -> int:
    """About how many bytes of memory a message holds."""
    size = _OVERHEAD + len(message.topic) + len(message.payload)
    properties = message.properties
    if properties is not NO_PROPERTIES:
        size += 200 + sum(200 + len(name) + len(value) for name, value in properties.user)
        size += len(properties.correlation_data or b"") + len(properties.response_topic or "")
        size += len(properties.content_type or "")
    return size


def levels(topic_filter: str) -> int:
    return topic_filter.count("/") + 1


def expiry(message: Message, now: float) -> float | None:
    """When a message that was published now is over, in the clock of `now`."""
    seconds = message.properties.message_expiry
    return None if seconds is None else now + seconds


def remaining(message: Message, expires_at: float, now: float) -> Message:
    """The message with the lifetime it has left (MQTT 5 section 3.3.2.3.3)."""
    left = max(1, math.ceil(expires_at - now))
    properties = msgspec.structs.replace(message.properties, message_expiry=left)
    return msgspec.structs.replace(message, properties=properties)


class Entry(NamedTuple):
    """One message on its way to one client."""

    key: int
    message: Message
    expires_at: float | None
    size: int
    shared: str | None
    """The shared subscription it came by."""


class Link(Protocol):
    """The connected client, as its session sees it."""

    def publish(self, stream: int, messages: Sequence[Message], keys: Sequence[int], /) -> int:
        """How many were taken, from the front."""
        ...

    def settle(self, token: int, reasons: Sequence[int] | None, /) -> None: ...
    def disconnect(self, reason_code: int, text: str, /) -> None: ...


@attrs.define
class Usage:
    """What all sessions share: keys, the bytes they hold together, and the count of the dropped."""

    options: BrokerOptions
    store: Store | None
    keys: itertools.count[int] = attrs.field(factory=lambda: itertools.count(1))
    bytes: int = 0
    queued: int = 0
    dropped: Counter[str] = attrs.field(factory=Counter)
    sent: int = 0
    levels: int = 0
    """Of the filters of all sessions."""


class Outbox:
    """What goes to one client on one of its streams: a `router.Subscriber`.

    Stream 0 is the control stream: its outbox lives as long as the session.
    """

    __slots__ = (
        "_last_zero", "_usage", "bytes", "filters", "inflight", "levels", "queue", "session", "stream",
    )  # fmt: skip

    def __init__(self, session: ClientSession, stream: int, usage: Usage) -> None:
        self.session = session
        self.stream = stream
        self.filters: dict[str, Filter] = {}
        self.levels = 0
        """Of all filters together."""
        self.queue: deque[Entry] = deque()
        self.inflight: dict[int, Entry] = {}
        """By key: given to the engine and not acknowledged, QoS 1 and 2 only."""
        self.bytes = 0
        """Of queue and in-flight together."""
        self._last_zero = 0
        """Key of the QoS 0 message that was queued last: keys ascend in the queue."""
        self._usage = usage

    @property
    def online(self) -> bool:
        return self.session.link is not None

    @property
    def durable(self) -> bool:
        """Whether its QoS 1 and 2 messages are in the state file."""
        return self.stream == 0 and self.session.durable

    @property
    def congested(self) -> bool:
        return bool(self.queue)

    @property
    def scope(self) -> Scope | None:
        return self.session.scope

    def add_filter(self, subscription: Filter) -> None:
        topic_filter = subscription.options.topic_filter
        if topic_filter not in self.filters:
            self.levels += levels(topic_filter)
            self._usage.levels += levels(topic_filter)
        self.filters[topic_filter] = subscription

    def remove_filter(self, topic_filter: str) -> bool:
        """Whether there was one."""
        if self.filters.pop(topic_filter, None) is None:
            return False
        self.levels -= levels(topic_filter)
        self._usage.levels -= levels(topic_filter)
        return True

    def deliver(
        self, messages: Sequence[Message], now: float, *, shared: str | None = None, keep_qos0: bool = False
    ) -> bool:
        """Send what can be sent, queue the rest, drop what has no place. Whether the state file
        has something to commit before the messages may be acknowledged to their publisher.

        `keep_qos0` queues QoS 0 messages too (retained messages, which nobody sends twice). Others pass
        what waits for acknowledgements, and wait behind QoS 0 messages that were queued.
        """
        usage, link, scope = self._usage, self.session.link, self.session.scope
        if scope is not None:
            messages = [message for message in messages if scope(message.topic)]
            if not messages:
                return False
        if link is None:
            keep_qos0 = keep_qos0 or usage.options.queue_qos0
            self._enqueue(self._entries(messages, now, shared), keep_qos0)
            return self.durable
        if not self.queue:
            if all(message.qos == 0 for message in messages):
                done = link.publish(self.stream, messages, [0] * len(messages))
                usage.sent += done
                if done < len(messages):
                    if keep_qos0:
                        self._enqueue(self._entries(messages[done:], now, shared), True)
                    else:
                        usage.dropped["send_buffer_full"] += len(messages) - done
                return False
            entries = self._entries(messages, now, shared)
            if self.bytes + sum(entry.size for entry in entries) <= usage.options.max_queue_bytes:
                entries = entries[self._send(entries) :]
            else:  # too much at once: what the bounds leave is sent from the queue
                self._enqueue(entries, True)
                self.pump(now)
                return self.durable
        else:
            entries = self._entries(messages, now, shared)
            keep_qos0 = keep_qos0 or self.queue[0].key <= self._last_zero
        if entries and not keep_qos0:
            zero = [entry.message for entry in entries if entry.message.qos == 0]
            if zero:
                done = link.publish(self.stream, zero, [0] * len(zero))
                usage.sent += done
                usage.dropped["send_buffer_full"] += len(zero) - done
        self._enqueue(entries, keep_qos0)
        return self.durable

    def pump(self, now: float) -> None:
        """Send from the queue what can be sent now, and may be now."""
        scope = self.session.scope
        while self.queue and self.session.link is not None:
            batch: list[Entry] = []
            for entry in itertools.islice(self.queue, _PUMP):
                if scope is not None and not scope(entry.message.topic):
                    if not batch:
                        self._forget(self.queue.popleft())
                        self._usage.queued -= 1
                    break
                if entry.expires_at is not None:
                    if entry.expires_at <= now:
                        if batch:
                            break
                        self._forget(self.queue.popleft())
                        self._usage.queued -= 1
                        self._usage.dropped["expired"] += 1
                        break
                    entry = entry._replace(message=remaining(entry.message, entry.expires_at, now))
                batch.append(entry)
            if not batch:
                continue
            held = [self.queue.popleft() for _ in batch]
            self._usage.queued -= len(held)
            for entry in held:
                self._release(entry)
            sent = self._send(batch, stored=True)
            for entry in reversed(held[sent:]):
                self.queue.appendleft(entry)
                self._hold(entry)
            self._usage.queued += len(held) - sent
            if sent < len(held):
                return

    def acknowledged(self, keys: Iterable[int], refused: Iterable[int]) -> None:
        """The client has these messages, or never will have them."""
        for key in keys:
            entry = self.inflight.pop(key, None)
            if entry is not None:
                self._forget(entry)
        for key in refused:
            entry = self.inflight.pop(key, None)
            if entry is not None:
                self._forget(entry)
                self._usage.dropped["refused_by_client"] += 1

    def take(self, which: Callable[[Entry], bool], *, sent: bool) -> list[Entry]:
        """Take out such messages: what waits, and with `sent` also QoS 1 in flight (QoS 2 in flight
        never: the client may have begun to take it)."""
        taken: list[Entry] = []
        kept: deque[Entry] = deque()
        for entry in self.queue:
            (taken if which(entry) else kept).append(entry)
        if taken:
            self.queue = kept
            self._usage.queued -= len(taken)
        if sent:
            moving = [e for e in self.inflight.values() if e.message.qos == 1 and which(e)]
            for entry in moving:
                del self.inflight[entry.key]
            taken = moving + taken
        for entry in taken:
            self._forget(entry)
        return taken

    def disconnected(self) -> None:
        """The client went; QoS 0 does not wait for it, unless told to."""
        if self._usage.options.queue_qos0:
            return
        kept = deque(entry for entry in self.queue if entry.message.qos)
        for entry in self.queue:
            if not entry.message.qos:
                self._forget(entry)
                self._usage.dropped["client_gone"] += 1
        self._usage.queued -= len(self.queue) - len(kept)
        self.queue = kept
        self._last_zero = 0

    def discard(self) -> None:
        """Forget everything, on disk too."""
        for entry in (*self.queue, *self.inflight.values()):
            self._forget(entry)
        self._usage.queued -= len(self.queue)
        self.queue.clear()
        self.inflight.clear()

    def expire(self, now: float) -> None:
        """Drop what is over in the queue of a client that is away."""
        if any(entry.expires_at is not None and entry.expires_at <= now for entry in self.queue):
            kept: deque[Entry] = deque()
            for entry in self.queue:
                if entry.expires_at is not None and entry.expires_at <= now:
                    self._forget(entry)
                    self._usage.queued -= 1
                    self._usage.dropped["expired"] += 1
                else:
                    kept.append(entry)
            self.queue = kept

    def save(self) -> None:
        """Put all that is queued or in flight in the state file: the session became durable."""
        if (store := self._usage.store) is not None:
            for entry in (*self.inflight.values(), *self.queue):
                if entry.message.qos:
                    self._put(store, entry)

    def unsave(self) -> None:
        """Take all of it out of the state file: the session ends with its connection."""
        if (store := self._usage.store) is not None:
            for entry in (*self.inflight.values(), *self.queue):
                if entry.message.qos:
                    store.delete(entry.key)

    def restore(self, entries: Sequence[Entry]) -> None:
        """What the state file had: in flight if the session says so, queued otherwise."""
        sent = {item.key for item in self.session.state.outbound.values()}
        for entry in entries:
            self._hold(entry)
            if entry.key in sent:
                self.inflight[entry.key] = entry
            else:
                self.queue.append(entry)
                self._usage.queued += 1

    def _entries(self, messages: Sequence[Message], now: float, shared: str | None) -> list[Entry]:
        keys = self._usage.keys
        return [
            Entry(
                next(keys),
                message,
                expiry(message, now) if message.properties is not NO_PROPERTIES else None,
                footprint(message),
                shared,
            )
            for message in messages
        ]

    def _send(self, entries: Sequence[Entry], *, stored: bool = False) -> int:
        link = self.session.link
        if link is None:
            return 0
        count = link.publish(
            self.stream, [entry.message for entry in entries], [entry.key for entry in entries]
        )
        self._usage.sent += count
        store = self._usage.store if self.durable else None
        for entry in entries[:count]:
            if entry.message.qos:
                self.inflight[entry.key] = entry
                self._hold(entry)
                if store is not None and not stored:
                    self._put(store, entry)
        return count

    def _enqueue(self, entries: Iterable[Entry], keep_qos0: bool) -> None:
        usage, options = self._usage, self._usage.options
        store = usage.store if self.durable else None
        for entry in entries:
            if not entry.message.qos and not keep_qos0:
                if self.session.link is None:
                    usage.dropped["client_gone"] += 1
                continue
            while (
                len(self.queue) + len(self.inflight) >= options.max_queue_messages
                or self.bytes + entry.size > options.max_queue_bytes
                or usage.bytes + entry.size > options.max_total_queue_bytes
            ):
                if options.queue_full == "drop_newest" or not self.queue:
                    usage.dropped["queue_full"] += 1
                    break
                self._forget(self.queue.popleft())
                usage.queued -= 1
                usage.dropped["queue_full"] += 1
            else:
                self.queue.append(entry)
                usage.queued += 1
                self._hold(entry)
                if not entry.message.qos:
                    self._last_zero = entry.key
                elif store is not None:
                    self._put(store, entry)

    def _put(self, store: Store, entry: Entry) -> None:
        store.put(entry.key, self.session.client_id, entry.expires_at, entry.shared, entry.message)

    def _hold(self, entry: Entry) -> None:
        self.bytes += entry.size
        self._usage.bytes += entry.size

    def _release(self, entry: Entry) -> None:
        self.bytes -= entry.size
        self._usage.bytes -= entry.size

    def _forget(self, entry: Entry) -> None:
        self._release(entry)
        if self._usage.store is not None and entry.message.qos and self.durable:
            self._usage.store.delete(entry.key)
