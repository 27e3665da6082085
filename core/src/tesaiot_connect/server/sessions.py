"""Sessions: what a client leaves with the broker, and the queues of what it still has to get.

Owns: client sessions, their outboxes and the bounds on them. Rule: what is queued or in flight
counts in messages and bytes until it is acknowledged, and is in the state file as long.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import attrs
import msgspec

from ..message import NO_PROPERTIES, Message
from ..mqtt.packets import Will
from ..mqtt.session import InFlight, Session
from .options import BrokerOptions
from .router import Filter
from .store import Rows, Store, pack, unpack

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


class Outbox:
    """What goes to one client on one of its streams: a `router.Subscriber`.

    Stream 0 is the control stream: its outbox lives as long as the session.
    """

    __slots__ = (
        "_usage", "bytes", "filters", "inflight", "queue", "session", "stream",
    )  # fmt: skip

    def __init__(self, session: ClientSession, stream: int, usage: Usage) -> None:
        self.session = session
        self.stream = stream
        self.filters: dict[str, Filter] = {}
        self.queue: deque[Entry] = deque()
        self.inflight: dict[int, Entry] = {}
        """By key: given to the engine and not acknowledged, QoS 1 and 2 only."""
        self.bytes = 0
        """Of queue and in-flight together."""
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

    def deliver(
        self, messages: Sequence[Message], now: float, *, shared: str | None = None, keep_qos0: bool = False
    ) -> bool:
        """Send what can be sent, queue the rest, drop what has no place. Whether the state file
        has something to commit before the messages may be acknowledged to their publisher.

        `keep_qos0` queues QoS 0 messages too (retained messages, which nobody sends twice).
        """
        usage, link = self._usage, self.session.link
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
        else:
            entries = self._entries(messages, now, shared)
        if entries and not keep_qos0:
            zero = [entry.message for entry in entries if entry.message.qos == 0]
            if zero:
                done = link.publish(self.stream, zero, [0] * len(zero))
                usage.sent += done
                usage.dropped["send_buffer_full"] += len(zero) - done
        self._enqueue(entries, keep_qos0)
        return self.durable

    def pump(self, now: float) -> None:
        """Send from the queue what can be sent now."""
        while self.queue and self.session.link is not None:
            batch: list[Entry] = []
            for entry in itertools.islice(self.queue, _PUMP):
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

    def take_shared(self, topic_filter: str, *, sent: bool) -> list[Entry]:
        """Take out what came by a shared subscription and may go to another member: what waits,
        and with `sent` also QoS 1 in flight (QoS 2 in flight never: MQTT 5 section 4.8.2)."""
        taken = [entry for entry in self.queue if entry.shared == topic_filter]
        if taken:
            self.queue = deque(entry for entry in self.queue if entry.shared != topic_filter)
            self._usage.queued -= len(taken)
        if sent:
            moving = [e for e in self.inflight.values() if e.shared == topic_filter and e.message.qos == 1]
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
                if store is not None and entry.message.qos:
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


class _SavedState(msgspec.Struct, array_like=True):
    """The packet identifiers of a session whose client is away, as the state file has them."""

    outbound: list[tuple[int, int, bool]]
    """Packet identifier, key, released."""
    inbound: list[int]
    last_id: int


class ClientSession:
    """What the broker knows of one client identifier, connected or not."""

    __slots__ = (
        "client_id", "durable", "expires_at", "expiry", "link", "outboxes", "owner", "saved",
        "state", "will", "will_due",
    )  # fmt: skip

    def __init__(self, client_id: str, owner: str, usage: Usage) -> None:
        self.client_id = client_id
        self.owner = owner
        """Name of the principal it belongs to; nobody else gets it."""
        self.expiry = 0
        """Seconds it outlives its connection."""
        self.expires_at: float | None = None
        """Set while the client is away."""
        self.durable = False
        """Whether it is in the state file."""
        self.saved = False
        """Whether its packet identifiers are there too."""
        self.state = Session()
        self.link: Link | None = None
        self.outboxes = {0: Outbox(self, 0, usage)}
        self.will: Will | None = None
        self.will_due: float | None = None
        """Set while the client is away and the will waits."""

    @property
    def outbox(self) -> Outbox:
        return self.outboxes[0]

    def settle(self, token: int, reasons: Sequence[int] | None) -> None:
        """What the token stands for is safe: say so, now or when the client sends it again."""
        if self.link is not None:
            self.link.settle(token, reasons)
        else:
            self.state.settle_unconnected(token)


class Sessions:
    """All sessions by client identifier, kept in step with the state file."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._store = usage.store
        self._sessions: dict[str, ClientSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[ClientSession]:
        return iter(list(self._sessions.values()))

    def get(self, client_id: str) -> ClientSession | None:
        return self._sessions.get(client_id)

    def create(self, client_id: str, owner: str) -> ClientSession:
        session = self._sessions[client_id] = ClientSession(client_id, owner, self._usage)
        return session

    def remove(self, session: ClientSession) -> None:
        """The session is over. Its subscriptions must be out of the router before."""
        for outbox in session.outboxes.values():
            outbox.discard()
        self._forget(session)
        if self._store is not None and session.will is not None:
            self._store.execute("DELETE FROM will WHERE client_id = ?", session.client_id)
        del self._sessions[session.client_id]

    def set_expiry(self, session: ClientSession, seconds: int, *, expires_at: float | None) -> None:
        """How long it outlives its connection; `expires_at` if that ended already."""
        durable = seconds > 0 and self._store is not None
        changed = (session.expiry, session.expires_at) != (seconds, expires_at)
        session.expiry, session.expires_at = seconds, expires_at
        if durable and self._store is not None and (changed or not session.durable):
            self._store.execute(
                "REPLACE INTO session VALUES (?, ?, ?, ?)",
                session.client_id, session.owner, seconds, expires_at,
            )  # fmt: skip
        if durable and not session.durable:
            session.durable = True
            for subscription in session.outbox.filters.values():
                self.save_subscription(session, subscription)
            session.outbox.save()
        elif session.durable and not durable:
            session.outbox.unsave()
            self._forget(session)

    def save_subscription(self, session: ClientSession, subscription: Filter) -> None:
        if self._store is not None and session.durable:
            self._store.execute(
                "REPLACE INTO subscription VALUES (?, ?, ?)",
                session.client_id, subscription.options.topic_filter, msgspec.msgpack.encode(subscription),
            )  # fmt: skip

    def forget_subscription(self, session: ClientSession, topic_filter: str) -> None:
        if self._store is not None and session.durable:
            self._store.execute(
                "DELETE FROM subscription WHERE client_id = ? AND topic_filter = ?",
                session.client_id, topic_filter,
            )  # fmt: skip

    def set_will(self, session: ClientSession, will: Will | None, *, due: float | None = None) -> None:
        """Any session's will is in the state file, so that a killed broker publishes it at its return."""
        if self._store is not None and (will, due) != (session.will, session.will_due):
            if will is None:
                self._store.execute("DELETE FROM will WHERE client_id = ?", session.client_id)
            else:
                self._store.execute(
                    "REPLACE INTO will VALUES (?, ?, ?, ?)",
                    session.client_id, will.delay, due, pack(will.message),
                )  # fmt: skip
        session.will, session.will_due = will, due

    def save_state(self, session: ClientSession) -> None:
        """Put the packet identifiers in use in the state file: the client is away.

        Identifiers whose messages are being committed count as received: the same commit, or
        an earlier one, has their messages.
        """
        state = session.state
        inbound = [*state.inbound, *state.unsettled]
        if self._store is not None and session.durable and (state.outbound or inbound):
            outbound = [(packet_id, item.key, item.released) for packet_id, item in state.outbound.items()]
            self._store.execute(
                "REPLACE INTO inflight VALUES (?, ?)",
                session.client_id, msgspec.msgpack.encode(_SavedState(outbound, inbound, state.last_id)),
            )  # fmt: skip
            session.saved = True

    async def forget_state(self, session: ClientSession) -> None:
        """The client is back. Returns when that is on disk: an old identifier that a crash brought
        back would hide a new message that uses it."""
        if self._store is not None and session.saved:
            self._store.execute("DELETE FROM inflight WHERE client_id = ?", session.client_id)
            session.saved = False
            await self._store.commit()

    def load(self, rows: Rows, now: float) -> None:
        """Everything the state file had. Who was connected when the broker died went just now."""
        for client_id, owner, seconds, expires_at in rows.sessions:
            session = self.create(client_id, owner)
            session.durable = True
            self.set_expiry(session, seconds, expires_at=now + seconds if expires_at is None else expires_at)
        for client_id, topic_filter, options in rows.subscriptions:
            filters = self._sessions[client_id].outbox.filters
            filters[topic_filter] = msgspec.msgpack.decode(options, type=Filter)
        queues: dict[str, list[Entry]] = {}
        for key, client_id, expires_at, shared, packed in rows.queue:
            message = unpack(packed)
            entry = Entry(key, message, expires_at, footprint(message), shared)
            queues.setdefault(client_id, []).append(entry)
        self._usage.keys = itertools.count(rows.queue[-1][0] + 1 if rows.queue else 1)
        for client_id, packed in rows.inflight:
            session = self._sessions[client_id]
            saved = msgspec.msgpack.decode(packed, type=_SavedState)
            known = {entry.key: entry.message for entry in queues.get(client_id, ())}
            session.saved = True
            session.state.inbound.update(saved.inbound)
            session.state.last_id = saved.last_id
            for packet_id, key, released in saved.outbound:
                if key in known:
                    session.state.outbound[packet_id] = InFlight(key, known[key], released)
        for client_id, entries in queues.items():
            self._sessions[client_id].outbox.restore(entries)
        for client_id, delay, due, packed in rows.wills:
            session = self._sessions.get(client_id) or self.create(client_id, "")
            session.will = Will(unpack(packed), delay)
            session.will_due = now + min(delay, session.expiry) if due is None else due

    def _forget(self, session: ClientSession) -> None:
        """Out of the state file, but for the will."""
        if self._store is not None and session.durable:
            self._store.execute("DELETE FROM session WHERE client_id = ?", session.client_id)
            self._store.execute("DELETE FROM subscription WHERE client_id = ?", session.client_id)
            self._store.execute("DELETE FROM inflight WHERE client_id = ?", session.client_id)
        session.durable = session.saved = False
