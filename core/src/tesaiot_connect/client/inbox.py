"""Where a client's messages wait for their reader.

Owns: the hand-over from a connection to its readers, routing included. Rules: one delivery per
chunk and reader; everything that waits is bounded, and beyond the bound the socket is not read;
what nobody reads any more stays unsettled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from ..errors import ConnectorError, Disconnected
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
        self.subscribed = False
        """The session at the broker is known to have the subscriptions."""
        self.stream = 0
        """The stream of the present connection that it was asked for on."""
        self.tagged = False
        """The broker was told the identifier with them."""
        self.closed = False
        self.error: ConnectorError | None = None
        self.grants = 0
        """SUBACKs so far."""
        self._codes: tuple[int, ...] = ()
        self._granted = asyncio.Event()
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._deliveries: deque[Delivery] = deque()
        self._messages = 0
        self._bytes = 0
        self._readable = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def read(self) -> Delivery:
        """All that waits, as one delivery. Cancel-safe. Raises what `fail` was given."""
        while not self._deliveries:
            if self.error is not None:
                raise self.error
            self._readable.clear()
            await self._readable.wait()
        deliveries = list(self._deliveries)
        self._deliveries.clear()
        self._messages = self._bytes = 0
        self._room.set()
        return Delivery.join(deliveries)

    def granted(self, codes: Sequence[int]) -> None:
        """SUBACK came, with a QoS or a reason code for every subscription."""
        self.grants += 1
        self._codes = tuple(codes)
        self._granted.set()

    async def grant(self, seen: int = 0) -> tuple[int, ...]:
        """What the latest SUBACK says, once more than `seen` came. Raises what `fail` was given."""
        while self.error is None and self.grants <= seen:
            self._granted.clear()
            await self._granted.wait()
        if self.error is not None:
            raise self.error
        return self._codes

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
        """Reading raises this, once what came before is read. The first error stays."""
        self.error = self.error or error
        self._readable.set()
        self._granted.set()

    def close(self, error: ConnectorError | None = None) -> None:
        """Nobody reads any more. What waits is dropped unsettled."""
        self.closed = True
        self._deliveries.clear()
        self._room.set()
        self.fail(error or Disconnected("this subscription was closed"))


class LazyReader:
    """An inbox whose first read makes the client dial: `start`."""

    def __init__(self, start: Callable[[], None], inbox: Inbox) -> None:
        self._start = start
        self._inbox = inbox

    async def read(self) -> Delivery:
        self._start()
        return await self._inbox.read()

    @property
    def grants(self) -> int:
        """How often the broker was asked for the subscriptions and granted them."""
        return self._inbox.grants

    async def grant(self, seen: int = 0) -> tuple[int, ...]:
        """The QoS granted for each subscription, once the broker was asked more than `seen` times.
        Cancel-safe, for one caller at a time. Raises what `read` raises."""
        self._start()
        return await self._inbox.grant(seen)


class Switchboard:
    """The inboxes of a client, and which message goes to which of them.

    A closed inbox stays, because what the broker still sends for it must not be acknowledged,
    until one with the same filters is opened or the session is gone.
    """

    def __init__(self) -> None:
        self.inboxes: list[Inbox] = []
        self.unrouted = 0
        self._last_identifier = 0
        self._routes: dict[tuple[str, tuple[int, ...]], tuple[Inbox, ...]] = {}

    def open(self, subscriptions: Sequence[Subscription], *, max_messages: int, max_bytes: int) -> Inbox:
        """A new inbox. It takes the place of closed ones whose filters are all among its own."""
        filters = {one.topic_filter for one in subscriptions}
        identifier = 0
        for old in tuple(self.inboxes):
            theirs = {one.topic_filter for one in old.subscriptions}
            if old.closed and theirs <= filters:
                self.inboxes.remove(old)
                if theirs == filters:
                    identifier = old.identifier
        if not identifier:
            identifier = self._last_identifier = self._last_identifier + 1
        inbox = Inbox(subscriptions, identifier, max_messages=max_messages, max_bytes=max_bytes)
        self.inboxes.append(inbox)
        self._routes.clear()
        return inbox

    def session_lost(self) -> None:
        """The broker has no subscriptions and nothing for closed inboxes any more."""
        self.inboxes = [inbox for inbox in self.inboxes if not inbox.closed]
        self._routes.clear()
        for inbox in self.inboxes:
            inbox.subscribed = False

    def dispatch(self, delivery: Delivery, size: int) -> tuple[Inbox, ...]:
        """Puts the messages where they belong and says where that was. If nowhere, the delivery is
        still the caller's to settle."""
        inboxes = self.inboxes
        if len(inboxes) == 1:
            inboxes[0].put(delivery, size)
            return (inboxes[0],)
        routed: dict[Inbox, list[Message]] = {}
        for message in delivery.batch.messages:
            found = self._route(message)
            for inbox in found:
                routed.setdefault(inbox, []).append(message)
            self.unrouted += not found
        if routed:
            children = delivery.split(Batch(part, delivery.batch.received) for part in routed.values())
            share = size // len(children)
            for inbox, child in zip(routed, children, strict=True):
                inbox.put(child, share)
        return tuple(routed)

    def _route(self, message: Message) -> tuple[Inbox, ...]:
        """By topic, which identifiers narrow down: in a session of an earlier run they were given
        to others. A broker that renames topics is trusted with its identifiers."""
        topic, identifiers = key = message.topic, message.properties.subscription_ids
        found = self._routes.get(key)
        if found is None:
            matching = [inbox for inbox in self.inboxes if any(matches(one, topic) for one in inbox.filters)]
            meant = [inbox for inbox in self.inboxes if inbox.identifier in identifiers]
            found = tuple([inbox for inbox in meant if inbox in matching] or matching or meant)
            if len(self._routes) >= _CACHE_LIMIT:
                self._routes.clear()
            self._routes[key] = found
        return found

    async def room(self) -> None:
        """Returns when no inbox is full."""
        for inbox in tuple(self.inboxes):
            await inbox.room()

    @property
    def full(self) -> bool:
        return any(inbox.full for inbox in self.inboxes)
