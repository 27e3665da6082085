"""What becomes of clients, their messages, subscriptions and wills.

Owns: sessions, router and retained messages, and every decision about them. Rule: no I/O but the
state file's queue, no tasks: each method is done when it returns, so nothing interleaves.
"""

from __future__ import annotations

import heapq
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from ..errors import Refused
from ..message import Message
from ..mqtt.packets import V5, Connect, Subscribe, Unsubscribe, Will
from ..mqtt.properties import P
from ..mqtt.reasons import R
from ..mqtt.topics import split_shared
from ..protocols import Principal, ScopedPrincipal
from .options import BrokerOptions, allows, covers
from .outbox import Entry, Link, Outbox, Usage, expiry, levels, remaining
from .retained import Retained
from .rights import Scope, owner_of, scope_of
from .router import Filter, Router, Target
from .sessions import ClientSession, Sessions
from .store import Rows, Store, unpack

log = logging.getLogger(__name__)

_NEVER = 0xFFFFFFFF
_LEVELS = 200
"""Levels of a filter or a retained topic: each one costs a node of a trie, and may cost a step of
the search for the subscribers of each message."""
_STEP = 500
"""Retained messages that are sent before others have their turn."""
_AVERAGE = 10
"""Levels that a filter may have on average where the number of subscriptions is at its bound."""


Derive = Callable[[Sequence[Message]], Sequence[Message]]
"""Further messages that these bring about. Must not raise; what it returns is not asked about again."""


class Hub:
    """The broker without its connections. `clock` gives seconds since the epoch; `wake` is called
    when something is due earlier than `next_due` said before."""

    def __init__(
        self,
        options: BrokerOptions,
        store: Store | None,
        rows: Rows | None,
        *,
        clock: Callable[[], float],
        wake: Callable[[], None],
        derive: Derive | None = None,
    ) -> None:
        self.options = options
        self.store = store
        self.clock = clock
        self.usage = Usage(options, store)
        self.sessions = Sessions(self.usage)
        self.router: Router[Outbox] = Router()
        self.retained = Retained(options.max_retained, options.max_retained_bytes)
        self.received = 0
        self._wake = wake
        self._derive = derive
        self._due: list[tuple[float, str]] = []
        if rows is not None:
            self._load(rows)

    # --- clients --------------------------------------------------------------------------

    def connect(
        self, link: Link, connect: Connect, principal: Principal
    ) -> tuple[ClientSession, bool, dict[P, Any]]:
        """Give the client its session: whether it had one, and what CONNACK must say.

        Ends another connection of the same client identifier. Raises Refused.
        """
        options, now = self.options, self.clock()
        will = connect.will
        if will is not None and not self.may_publish(principal, will.message.topic):
            raise Refused(
                f"the will's topic {will.message.topic!r} is not allowed", reason_code=R.NOT_AUTHORIZED
            )
        properties: dict[P, Any] = {}
        client_id = connect.client_id
        if not client_id:
            client_id = properties[P.ASSIGNED_CLIENT_ID] = f"auto-{uuid.uuid4().hex}"
        seconds = self._session_expiry(connect, properties)
        if options.max_keepalive and not 0 < connect.keepalive <= options.max_keepalive:
            properties[P.SERVER_KEEP_ALIVE] = max(1, min(65535, int(options.max_keepalive)))
        if options.response_prefix and connect.properties.get(P.REQUEST_RESPONSE_INFO):
            properties[P.RESPONSE_INFO] = f"{options.response_prefix}{client_id}/"

        session = self.sessions.get(client_id)
        if session is not None and session.expires_at is not None and session.expires_at <= now:
            self.end(session)
            session = None
        if session is not None and session.owner != owner_of(principal):
            raise Refused(
                f"the client identifier {client_id!r} belongs to somebody else",
                reason_code=R.CLIENT_IDENTIFIER_NOT_VALID,
            )
        if session is not None and session.link is not None:
            log.info("client %r connected again: its earlier connection ends", client_id)
            earlier = session.link
            self.disconnected(session, earlier)
            earlier.disconnect(R.SESSION_TAKEN_OVER, "another connection with the same client identifier")
            session = self.sessions.get(client_id)
        if session is not None and connect.clean_start:
            self.end(session)
            session = None
        present = session is not None
        if session is None:
            if len(self.sessions) >= options.max_sessions:
                raise Refused("there are too many sessions", reason_code=R.QUOTA_EXCEEDED)
            session = self.sessions.create(client_id, owner_of(principal))
        session.link = link
        self.sessions.set_expiry(session, seconds, expires_at=None)
        self.sessions.set_will(session, will)
        self.authorise(session, principal, resumed=present)
        return session, present, properties

    def authorise(self, session: ClientSession, principal: Principal, *, resumed: bool = False) -> None:
        """Let go of what the principal may not have (any more); `resumed` before the client is told
        anything: what was on its way to it is not sent again then."""
        session.principal, session.scope = principal, scope_of(principal)
        for outbox in session.outboxes.values():
            for topic_filter in list(outbox.filters):
                if self._refusal(principal, topic_filter):
                    self._drop_filter(outbox, topic_filter)
            if isinstance(principal, ScopedPrincipal):
                self._withdraw(outbox, principal.may_receive, resumed)

    def disconnected(
        self, session: ClientSession, link: Link, *, orderly: bool = False, expiry: int | None = None
    ) -> None:
        """The client's connection is over; `orderly` cancels its will, `expiry` is the session
        expiry its DISCONNECT asked for. Nothing if another connection has the session by now."""
        if session.link is not link:
            return
        now = self.clock()
        session.link = None
        for stream in [stream for stream in session.outboxes if stream]:
            self.stream_lost(session, stream)
        seconds = session.expiry
        if expiry is not None and seconds:
            seconds = int(min(expiry, self.options.max_session_expiry))
        session.outbox.disconnected()
        if seconds:
            shared = [one for one in session.outbox.filters if one.startswith("$share/")]
            self._requeue(session.outbox, shared, sent=False, online=True)
        will = None if orderly else session.will
        due = None if will is None else now + min(will.delay, seconds)
        self.sessions.set_will(session, will, due=due)
        if seconds:
            self.sessions.set_expiry(session, seconds, expires_at=now + seconds)
            self.sessions.save_state(session)
            self._remind(now + seconds, session)
            if due is not None:
                self._remind(due, session)
                self._settle_will(session, now)
        else:
            self.end(session)

    def stream_lost(self, session: ClientSession, stream: int) -> None:
        """A data stream ended, with its subscriptions and what was on its way by it."""
        outbox = session.outboxes.pop(stream, None)
        if outbox is not None:
            self._close(outbox)

    def end(self, session: ClientSession) -> None:
        """The session is over (MQTT 5 section 4.1); a will that waits is published."""
        for outbox in session.outboxes.values():
            self._close(outbox)
        will = session.will if session.will_due is not None else None
        self.sessions.remove(session)
        if will is not None:
            self._publish_will(session, will)

    def next_due(self) -> float | None:
        return self._due[0][0] if self._due else None

    def tick(self) -> None:
        """Do what is due: wills, and sessions that expired."""
        now = self.clock()
        while self._due and self._due[0][0] <= now:
            session = self.sessions.get(heapq.heappop(self._due)[1])
            if session is None or session.link is not None:
                continue
            if session.expires_at is None or session.expires_at <= now:
                log.info("the session of %r expired", session.client_id)
                self.end(session)
            else:
                self._settle_will(session, now)

    def sweep(self) -> None:
        """Let go of retained and queued messages that are over; costs time in proportion to them."""
        now = self.clock()
        for topic in self.retained.expire(now):
            self._forget_retained(topic)
        for session in self.sessions:
            if session.link is None:
                session.outbox.expire(now)

    # --- messages -------------------------------------------------------------------------

    def may_publish(self, principal: Principal, topic: str) -> bool:
        return allows(self.options, topic) and principal.may_publish(topic)

    def route(self, messages: Sequence[Message], session: ClientSession | None = None) -> bool:
        """Bring messages to everybody who subscribes. Whether the state file must commit before
        they may be acknowledged to their publisher, whose session is `session`."""
        now = self.clock()
        self.received += len(messages)
        if self._derive is not None:
            messages = [*messages, *self._derive(messages)]
        boxes: dict[Outbox, list[Message]] = {}
        shared: dict[tuple[Outbox, str], list[Message]] = {}
        wait = False
        match = self.router.match
        variants: dict[tuple[int, bool, tuple[int, ...]], Message] = {}
        for message in messages:
            if message.retain and self._retain(message, now):
                wait = True
            targets, groups, no_local = match(message.topic)
            if not targets and not groups:
                continue
            variants.clear()
            for target in targets:
                box = target.subscriber
                if no_local and box.session is session and box in no_local:
                    own = no_local[box]
                    if own is None:
                        continue
                    target = own
                copy = _copy(message, target, variants)
                batch = boxes.get(box)
                if batch is None:
                    boxes[box] = [copy]
                else:
                    batch.append(copy)
            for group in groups:
                chosen = group.pick(message.topic)
                if chosen is not None:
                    key = (chosen.subscriber, group.topic_filter)
                    shared.setdefault(key, []).append(_copy(message, chosen, variants))
        for box, batch in boxes.items():
            if box.deliver(batch, now):
                wait = True
        for (box, topic_filter), batch in shared.items():
            if box.deliver(batch, now, shared=topic_filter):
                wait = True
        return wait

    # --- subscriptions --------------------------------------------------------------------

    def subscribe(
        self, outbox: Outbox, principal: Principal, packet: Subscribe
    ) -> tuple[list[int], list[Filter]]:
        """The reason code of each filter, and the subscriptions that get retained messages now
        (`send_retained`, after SUBACK)."""
        identifier = next(iter(packet.properties.get(P.SUBSCRIPTION_ID, ())), 0)
        codes: list[int] = []
        wanting: list[Filter] = []
        for asked in packet.subscriptions:
            refusal = self._refusal(principal, asked.topic_filter)
            if not refusal and asked.topic_filter not in outbox.filters:
                refusal = self._no_room(outbox.session, asked.topic_filter)
            if refusal:
                codes.append(refusal)
                continue
            qos = min(asked.qos, self.options.maximum_qos)
            subscription = Filter(msgspec.structs.replace(asked, qos=qos), identifier)
            new = self.router.add(outbox, subscription)
            outbox.add_filter(subscription)
            if outbox.stream == 0:
                self.sessions.save_subscription(outbox.session, subscription)
            if asked.retain_handling == 0 or (asked.retain_handling == 1 and new):
                wanting.append(subscription)
            codes.append(qos)
        return codes, wanting

    def send_retained(self, outbox: Outbox, subscriptions: Sequence[Filter]) -> Iterator[None]:
        """Send the retained messages that match (MQTT 5 section 3.3.1.3); none for shared subscriptions.

        Each step sends some. Between two steps anything may happen: a message that is not the one
        of its topic any more is left out, since the subscriber got the newer one.
        """
        for options, identifier in subscriptions:
            group, topic_filter = split_shared(options.topic_filter)
            if group is not None:
                continue
            ids = (identifier,) if identifier else ()
            matching = self.retained.matching(topic_filter, self.clock())
            for start in range(0, len(matching), _STEP):
                now = self.clock()
                found: list[Message] = []
                for message, expires_at in matching[start : start + _STEP]:
                    if not self.retained.current(message):
                        continue
                    qos = min(message.qos, options.qos)
                    if expires_at is not None:
                        message = remaining(message, expires_at, now)
                    found.append(_changed(message, qos, True, ids))
                if found:
                    outbox.deliver(found, now, keep_qos0=True)
                yield

    def unsubscribe(self, outbox: Outbox, packet: Unsubscribe) -> list[int]:
        return [
            R.SUCCESS if self._drop_filter(outbox, topic_filter) else R.NO_SUBSCRIPTION_EXISTED
            for topic_filter in packet.filters
        ]

    # --- inside ---------------------------------------------------------------------------

    def _session_expiry(self, connect: Connect, properties: dict[P, Any]) -> int:
        longest = int(self.options.max_session_expiry)
        if connect.version != V5:
            return 0 if connect.clean_start else longest
        asked = int(connect.properties.get(P.SESSION_EXPIRY, 0))
        if asked > longest:
            properties[P.SESSION_EXPIRY] = longest
        return min(asked, longest)

    def _refusal(self, principal: Principal, topic_filter: str) -> int:
        """The reason code against a subscription, 0 if there is none."""
        if topic_filter.count("/") >= _LEVELS:
            return R.TOPIC_FILTER_INVALID
        if any(covers(denied, topic_filter) for denied in self.options.deny_subscribe):
            return R.UNSPECIFIED_ERROR
        return 0 if principal.may_subscribe(split_shared(topic_filter)[1]) else R.NOT_AUTHORIZED

    def _no_room(self, session: ClientSession, topic_filter: str) -> int:
        options, more = self.options, levels(topic_filter)
        boxes = session.outboxes.values()
        if (
            sum(len(box.filters) for box in boxes) >= options.max_subscriptions
            or sum(box.levels for box in boxes) + more > _LEVELS + _AVERAGE * options.max_subscriptions
            or len(self.router) >= options.max_total_subscriptions
            or self.usage.levels + more > _LEVELS + _AVERAGE * options.max_total_subscriptions
        ):
            return R.QUOTA_EXCEEDED
        return 0

    def _drop_filter(self, outbox: Outbox, topic_filter: str) -> bool:
        if not outbox.remove_filter(topic_filter):
            return False
        self.router.remove(outbox, topic_filter)
        if outbox.stream == 0:
            self.sessions.forget_subscription(outbox.session, topic_filter)
        if topic_filter.startswith("$share/"):
            self._requeue(outbox, [topic_filter], sent=False)
        return True

    def _close(self, outbox: Outbox) -> None:
        """The outbox gets nothing any more; what it got by turns goes to other members."""
        filters = list(outbox.filters)
        for topic_filter in filters:
            outbox.remove_filter(topic_filter)
            self.router.remove(outbox, topic_filter)
        self._requeue(outbox, [one for one in filters if one.startswith("$share/")], sent=True)
        outbox.discard()

    def _requeue(self, outbox: Outbox, filters: Sequence[str], *, sent: bool, online: bool = False) -> None:
        """Give what waits for one member of shared subscriptions to the others, if there are any
        (and, with `online`, one of them is connected)."""
        groups = {one: group for one in filters if (group := self.router.group(one)) is not None}
        if not groups:
            return

        def other(entry: Entry) -> bool:
            group = groups.get(entry.shared or "")
            return group is not None and group.others(entry.message.topic, outbox, online=online)

        self._pass_on(outbox, outbox.take(other, sent=sent))

    def _withdraw(self, outbox: Outbox, may_receive: Scope, resumed: bool) -> None:
        """Take back what waits for a client and may not be given to it."""
        entries = outbox.take(lambda entry: not may_receive(entry.message.topic), sent=resumed)
        if resumed:
            gone, outbound = {entry.key for entry in entries}, outbox.session.state.outbound
            for packet_id, item in list(outbound.items()):
                if item.key in gone:
                    del outbound[packet_id]
                elif not may_receive(item.message.topic):
                    item.released = True  # QoS 2: PUBREL ends it on both sides
        self._pass_on(outbox, entries)

    def _pass_on(self, outbox: Outbox, entries: Sequence[Entry]) -> None:
        """Give what came by shared subscriptions to other members who may have it, if there are any."""
        now = self.clock()
        for entry in entries:
            group = self.router.group(entry.shared) if entry.shared is not None else None
            target = group.pick(entry.message.topic, outbox) if group is not None else None
            if target is not None:
                message = entry.message
                if entry.expires_at is not None:
                    message = remaining(message, entry.expires_at, now)
                message = _changed(message, min(message.qos, target.qos), message.retain, target.identifiers)
                target.subscriber.deliver([message], now, shared=entry.shared)

    def _publish_will(self, session: ClientSession, will: Will) -> None:
        """Unless its client may not publish it any more."""
        if session.principal is None or self.may_publish(session.principal, will.message.topic):
            self.route([will.message])
        else:
            self.usage.dropped["not_authorized"] += 1

    def _settle_will(self, session: ClientSession, now: float) -> None:
        will = session.will
        if will is not None and session.will_due is not None and session.will_due <= now:
            self.sessions.set_will(session, None)
            self._publish_will(session, will)

    def _retain(self, message: Message, now: float) -> bool:
        """Whether the state file has something to commit."""
        if not message.payload:
            if not self.retained.remove(message.topic):
                return False
            self._forget_retained(message.topic)
            return self.store is not None
        expires_at = expiry(message, now)
        if message.topic.count("/") >= _LEVELS or not self.retained.put(message, expires_at):
            self.usage.dropped["retained_full"] += 1
            return False
        if self.store is None:
            return False
        self.store.retain(message.topic, expires_at, message)
        return True

    def _forget_retained(self, topic: str) -> None:
        if self.store is not None:
            self.store.retain(topic, None, None)

    def _remind(self, when: float, session: ClientSession) -> None:
        head = self.next_due()
        heapq.heappush(self._due, (when, session.client_id))
        if len(self._due) > 4 * len(self.sessions) + 100:
            # clients that come and go leave reminders behind that mean nothing any more
            self._due = [
                (due, one.client_id)
                for one in self.sessions
                for due in (one.expires_at, one.will_due)
                if due is not None
            ]
            heapq.heapify(self._due)
        if head is None or when < head:
            self._wake()

    def _load(self, rows: Rows) -> None:
        now = self.clock()
        for _topic, expires_at, packed in rows.retained:
            self.retained.put(unpack(packed), expires_at)
        self.sessions.load(rows, now)
        for session in self.sessions:
            for subscription in session.outbox.filters.values():
                self.router.add(session.outbox, subscription)
            if session.expires_at is not None:
                self._remind(session.expires_at, session)
            if session.will_due is not None:
                self._remind(session.will_due, session)


def _copy(
    message: Message, target: Target[Outbox], variants: dict[tuple[int, bool, tuple[int, ...]], Message]
) -> Message:
    """The message as the target gets it; targets that get the same share one object."""
    qos = min(message.qos, target.qos)
    retain = message.retain and target.retain
    if qos == message.qos and retain == message.retain and not target.identifiers:
        return message
    key = (qos, retain, target.identifiers)
    copy = variants.get(key)
    if copy is None:
        copy = variants[key] = _changed(message, qos, retain, target.identifiers)
    return copy


def _changed(message: Message, qos: int, retain: bool, identifiers: tuple[int, ...]) -> Message:
    properties = message.properties
    if properties.subscription_ids != identifiers:
        properties = msgspec.structs.replace(properties, subscription_ids=identifiers)
    return Message(message.topic, message.payload, qos, retain, properties)
