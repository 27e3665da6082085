"""What the client has said and the library has not brought to an end, in order.

Owns: the window of unacknowledged messages, the credit of packets and bytes handed to the library and not
sent yet, and the deadlines of both. Rules: a message counts as safe only when the library says that
the server acknowledged the very packet identifier it was sent with; no deadline runs while sending goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Literal, Protocol

import msgspec

from tesaiot_connect import Message
from tesaiot_connect.mqtt import Connect, SubscribeRequest, Subscription, UnsubscribeRequest

MOST_UNSENT = 64
"""Packets in the library that it has not sent yet; its queue drops the oldest beyond 256, silently."""
MOST_HELD = 8_388_608
"""Bytes of messages in the library, unsent or unacknowledged. Each is there twice; one may be larger."""
SLOWEST = 32_000
"""Bytes a second. Deadlines are later by the time that what the library holds takes at this rate: it calls a
message sent when it has given it to QUIC, and what is on its way then takes its time."""
_MOST_WAITING = 64
_MOST_WAITING_BYTES = 262_144
"""Beyond these the client is not read; one piece of its bytes may go over them."""


class Library(Protocol):
    """NanoSDK as a session uses it: a call returns at once, and what comes of it is told to the
    session's methods later, never from within the call.

    Of what is known at the same time, `Session.received` and `Session.acknowledged` are called before
    `Session.sent`: the packets that the library sends of its own accord count there too.
    """

    def connect(self, connect: Connect, /) -> None:
        """Send CONNECT; the answer goes to `Session.connack`, once."""

    def publish(self, messages: Sequence[Message], /) -> Sequence[int]:
        """Send them in order; gives the packet identifiers, parallel to the messages, 0 for QoS 0."""

    def subscribe(self, number: int, subscriptions: Sequence[Subscription], /) -> None:
        """Send SUBSCRIBE; the answer goes to `Session.suback` with that number."""

    def unsubscribe(self, number: int, filters: Sequence[str], /) -> None:
        """Send UNSUBSCRIBE; the answer goes to `Session.unsuback` with that number."""


class OutOfStep(Exception):
    """Library and session do not mean the same thing by a packet any more."""


class _Batch(msgspec.Struct):
    """Messages that came from the client together."""

    messages: Sequence[Message]
    token: int
    """Settles them at the client; 0 where nothing is to be settled."""
    left: int
    """Messages that are to be acknowledged and are not."""
    size: int
    next: int = 0
    """Index of the first that was not handed over."""


class _Sent(msgspec.Struct):
    """A message without its acknowledgement."""

    batch: _Batch
    qos: int
    size: int
    allowed: float
    """Seconds from its sending to its acknowledgement."""
    due: float | None = None
    """None while it is not sent."""


class _Asked(msgspec.Struct):
    """A SUBSCRIBE or UNSUBSCRIBE without its answer."""

    request: SubscribeRequest | UnsubscribeRequest
    allowed: float
    due: float | None = None


_Packet = tuple[int, _Sent | _Asked | None]
"""Bytes that are let go when it is sent, and what is answered then."""
_OWN: _Packet = (0, None)
"""CONNECT, and what the library sends of its own accord."""


class Outgoing:
    """Hands the client's packets to the library as window and credit allow. Raises OutOfStep where
    the library answers what was not asked. Times are in seconds on the clock of `now`."""

    def __init__(
        self, library: Library, *, window: int, ack_timeout: float, highest_qos: Literal[0, 1]
    ) -> None:
        """`highest_qos` is that of subscriptions. Never 2: the library keeps no such exchange across
        connections."""
        self._library = library
        self._highest_qos = highest_qos
        self._window = window
        self._ack_timeout = ack_timeout
        self.exactly_once = True
        """Whether QoS 2 goes out as such; as QoS 1 otherwise."""
        self._queue: deque[_Batch | SubscribeRequest | UnsubscribeRequest] = deque()
        self._waiting = 0
        """Messages and requests in the queue that were not handed over."""
        self._waiting_bytes = 0
        self._unacknowledged: dict[int, _Sent] = {}
        """By packet identifier, in sending order."""
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self._unsent = 0
        """Packets in the library, its own included. Below 0 while it has sent some of its own that
        the session does not know of yet."""
        self._unsent_packets: deque[_Packet] = deque()
        """In the order in which they go out, about: the library's own are known late."""
        self._held = 0
        """Bytes of messages in the library: of QoS 0 unsent, of QoS 1 and 2 unacknowledged."""
        self._send_due = 0.0
        """When sending must have gone on."""

    @property
    def full(self) -> bool:
        return self._waiting >= _MOST_WAITING or self._waiting_bytes >= _MOST_WAITING_BYTES

    @property
    def settled(self) -> bool:
        """Everything is sent, and acknowledged or answered where it ought to be."""
        return not self._queue and not self._unacknowledged and not self._asked and self._unsent <= 0

    @property
    def unknown(self) -> int:
        """Messages of QoS 1 and 2 that are not acknowledged, handed over or not."""
        waiting = sum(
            bool(message.qos)
            for one in self._queue
            if isinstance(one, _Batch)
            for message in one.messages[one.next :]
        )
        return len(self._unacknowledged) + waiting

    # --- from the client ------------------------------------------------------------------

    def connect(self, connect: Connect, now: float) -> None:
        self._count([_OWN], now)
        self._library.connect(connect)

    def add(self, messages: Sequence[Message], count: int, token: int, size: int) -> None:
        """Messages that came in `size` bytes and are settled by `token`; `count` have QoS 1 or 2."""
        if count and not self.exactly_once:
            messages = [
                Message(one.topic, one.payload, 1, one.retain) if one.qos == 2 else one for one in messages
            ]
        self._queue.append(_Batch(messages, token, count, size))
        self._waiting += len(messages)
        self._waiting_bytes += size

    def ask(self, request: SubscribeRequest | UnsubscribeRequest) -> None:
        self._queue.append(request)
        self._waiting += 1

    def hand_over(self, now: float) -> None:
        """As much as window and credit allow."""
        queue = self._queue
        while queue and self._unsent < MOST_UNSENT:
            head = queue[0]
            if isinstance(head, _Batch):
                messages, batches = self._gather()
                if not messages:
                    return
                self._publish(messages, batches, now)
            else:
                queue.popleft()
                self._waiting -= 1
                self._ask(head, now)

    def _gather(self) -> tuple[list[Message], list[_Batch]]:
        """The messages that may go now, and the batch of each that is to be acknowledged."""
        queue = self._queue
        room = MOST_UNSENT - self._unsent
        free = self._window - len(self._unacknowledged)
        held = self._held
        messages: list[Message] = []
        batches: list[_Batch] = []
        while queue and room:
            batch = queue[0]
            if not isinstance(batch, _Batch):
                break
            start = batch.next
            stop = min(len(batch.messages), start + room)
            for at in range(start, stop):
                message = batch.messages[at]
                size = _size(message)
                if (held and held + size > MOST_HELD) or (message.qos and not free):
                    stop = at
                    break
                held += size
                if message.qos:
                    free -= 1
                    batches.append(batch)
            messages += batch.messages[start:stop]
            room -= stop - start
            batch.next = stop
            if stop < len(batch.messages):
                break
            queue.popleft()
            self._waiting_bytes -= batch.size
        self._waiting -= len(messages)
        return messages, batches

    def _publish(self, messages: list[Message], batches: list[_Batch], now: float) -> None:
        ids = self._library.publish(messages)
        if len(ids) != len(messages):
            raise OutOfStep(f"{len(messages)} messages were published and {len(ids)} identifiers came back")
        unacknowledged = self._unacknowledged
        of = iter(batches)
        packets: list[_Packet] = []
        for message, packet_id in zip(messages, ids, strict=True):
            size = _size(message)
            self._held += size
            if not message.qos:
                packets.append((size, None))
                continue
            if not packet_id or packet_id in unacknowledged:
                raise OutOfStep(f"packet identifier {packet_id} was given to a second message")
            sent = unacknowledged[packet_id] = _Sent(next(of), message.qos, size, self._allowed)
            packets.append((0, sent))
        self._count(packets, now)

    def _ask(self, request: SubscribeRequest | UnsubscribeRequest, now: float) -> None:
        self._number += 1
        asked_for = self._asked[self._number] = _Asked(request, self._allowed)
        self._count([(0, asked_for)], now)
        if isinstance(request, SubscribeRequest):
            asked = [
                Subscription(one.topic_filter, min(one.qos, self._highest_qos))
                for one in request.packet.subscriptions
            ]
            self._library.subscribe(self._number, asked)
        else:
            self._library.unsubscribe(self._number, request.packet.filters)

    # --- from the library -----------------------------------------------------------------

    def _count(self, packets: Sequence[_Packet], now: float) -> None:
        if self._unsent <= 0:
            self._send_due = now + self._allowed
        self._unsent += len(packets)
        self._unsent_packets += packets
        self._let_go(now)

    def _let_go(self, now: float) -> None:
        """What has gone out, as far as it is counted."""
        packets = self._unsent_packets
        while len(packets) > max(self._unsent, 0):
            size, awaited = packets.popleft()
            self._held -= size
            if awaited is not None:
                awaited.due = now + awaited.allowed

    def sent_by_itself(self, packets: int, now: float) -> None:
        """The library has queued or sent these of its own accord."""
        self._count([_OWN] * packets, now)

    def sent(self, packets: int, now: float) -> None:
        self._unsent -= packets
        self._send_due = now + self._allowed  # with what has only just been given to QUIC
        self._let_go(now)

    def acknowledged(self, packet_ids: Sequence[int], now: float) -> list[int]:
        """Returns the tokens that are to be settled."""
        tokens: list[int] = []
        for packet_id in packet_ids:
            sent = self._unacknowledged.pop(packet_id, None)
            if sent is None:
                raise OutOfStep(f"packet identifier {packet_id} was acknowledged, which was not sent")
            self._held -= sent.size
            if sent.qos == 2:
                self._count([_OWN], now)  # PUBREL
            sent.batch.left -= 1
            if not sent.batch.left:
                tokens.append(sent.batch.token)
        return tokens

    def answered(self, number: int) -> SubscribeRequest | UnsubscribeRequest:
        asked = self._asked.pop(number, None)
        if asked is None:
            raise OutOfStep(f"SUBSCRIBE or UNSUBSCRIBE {number} was answered, which was not asked")
        return asked.request

    # --- time -----------------------------------------------------------------------------

    def next_timeout(self) -> float | None:
        """When `handle_timeout` wants to be called."""
        return min(self._deadlines(), default=None)

    def handle_timeout(self, now: float) -> str:
        """What did not come within the ack timeout; "" while all is well."""
        if all(now < due for due in self._deadlines()):
            return ""
        if self._unacknowledged:
            count = len(self._unacknowledged)
            return (
                "1 message was not acknowledged" if count == 1 else f"{count} messages were not acknowledged"
            )
        if self._asked:
            return "SUBSCRIBE or UNSUBSCRIBE was not answered"
        return f"none of {self._unsent} packets went out"

    @property
    def _allowed(self) -> float:
        """Seconds for what is the last of all that the library holds."""
        return self._ack_timeout + self._held // SLOWEST

    def _deadlines(self) -> list[float]:
        """Of the oldest acknowledgement and the oldest answer of what was sent, and of a packet to go out."""
        oldest: list[_Sent | _Asked] = [
            *islice(self._unacknowledged.values(), 1),
            *islice(self._asked.values(), 1),
        ]
        deadlines = [one.due for one in oldest if one.due is not None]
        if self._unsent > 0:
            deadlines.append(self._send_due)
        return deadlines


def _size(message: Message) -> int:
    return len(message.topic) + len(message.payload)
