"""Where a client's messages wait for their reader.

Owns: the hand-over from a connection to its readers, routing included. Rules: one delivery per
chunk and reader; everything that waits is bounded, and beyond the bound the socket is not read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..errors import ConnectorError
from ..message import Batch, Delivery, Message
from ..mqtt.packets import Subscription
from ..mqtt.topics import matches, split_shared

_CACHE_LIMIT = 4096


class Inbox:
    """A `Reader` of the messages of some subscriptions. `identifier` is theirs at the broker."""

    def __init__(
        self, subscriptions: Sequence[Subscription], identifier: int, *, max_messages: int, max_bytes: int
    ) -> None:
        self.subscriptions = tuple(subscriptions)
        self.filters = tuple(split_shared(one.topic_filter)[1] for one in subscriptions)
        self.identifier = identifier
        self.closed = False
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._deliveries: deque[Delivery] = deque()
        self._messages = 0
        self._bytes = 0
        self._error: ConnectorError | None = None
        self._readable = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def read(self) -> Delivery:
        """All that waits, as one delivery. Cancel-safe. Raises what `fail` was given."""
        await self._readable.wait()
        if not self._deliveries and self._error is not None:
            raise self._error
        deliveries = list(self._deliveries)
        self._deliveries.clear()
        self._messages = self._bytes = 0
        if self._error is None:
            self._readable.clear()
        self._room.set()
        return Delivery.join(deliveries)

    def put(self, delivery: Delivery, size: int) -> None:
        """`size` in bytes. A closed inbox lets go of it unsettled, so the broker keeps it."""
        if self.closed:
            return
        self._deliveries.append(delivery)
        self._messages += len(delivery.batch.messages)
        self._bytes += size
        self._readable.set()
        if self._messages >= self._max_messages or self._bytes >= self._max_bytes:
            self._room.clear()

    @property
    def full(self) -> bool:
        return not self._room.is_set()

    async def room(self) -> None:
        await self._room.wait()

    def fail(self, error: ConnectorError) -> None:
        self._error = error
        self._readable.set()

    def close(self) -> None:
        """Nobody reads any more. What waits is dropped unsettled."""
        self.closed = True
        self._deliveries.clear()
        self._room.set()


class Switchboard:
    """The inboxes of a client, and which message goes to which of them."""

    def __init__(self) -> None:
        self.inboxes: list[Inbox] = []
        self.unrouted = 0
        self._by_topic: dict[str, tuple[Inbox, ...]] = {}
        self._by_identifiers: dict[tuple[int, ...], tuple[Inbox, ...]] = {}

    def add(self, inbox: Inbox) -> None:
        self.inboxes.append(inbox)
        self._by_topic.clear()
        self._by_identifiers.clear()

    def dispatch(self, delivery: Delivery, size: int) -> Delivery | None:
        """Puts the messages where they belong. What belongs nowhere comes back, to be settled."""
        inboxes = self.inboxes
        if len(inboxes) == 1:
            inboxes[0].put(delivery, size)
            return None
        routed: dict[int, list[Message]] = {}
        messages = delivery.batch.messages
        for message in messages:
            for inbox in self._route(message):
                routed.setdefault(inbox.identifier, []).append(message)
        if not routed:
            self.unrouted += len(messages)
            return delivery
        children = delivery.split(Batch(part, delivery.batch.received) for part in routed.values())
        share = size // len(children)
        for identifier, child in zip(routed, children, strict=True):
            inboxes[identifier - 1].put(child, share)
        return None

    def _route(self, message: Message) -> tuple[Inbox, ...]:
        identifiers = message.properties.subscription_ids
        if identifiers:
            found = self._by_identifiers.get(identifiers)
            if found is None:
                known = [
                    self.inboxes[one - 1] for one in dict.fromkeys(identifiers) if one <= len(self.inboxes)
                ]
                found = tuple(known)
                _remember(self._by_identifiers, identifiers, found)
            if found:
                return found
        topic = message.topic
        found = self._by_topic.get(topic)
        if found is None:
            known = [inbox for inbox in self.inboxes if any(matches(one, topic) for one in inbox.filters)]
            found = tuple(known)
            _remember(self._by_topic, topic, found)
        return found

    async def room(self) -> None:
        """Returns when no inbox is full."""
        for inbox in self.inboxes:
            await inbox.room()

    @property
    def full(self) -> bool:
        return any(inbox.full for inbox in self.inboxes)

    def fail(self, error: ConnectorError) -> None:
        for inbox in self.inboxes:
            inbox.fail(error)


def _remember(cache: dict[Any, tuple[Inbox, ...]], key: Any, found: tuple[Inbox, ...]) -> None:
    if len(cache) >= _CACHE_LIMIT:
        cache.clear()
    cache[key] = found
