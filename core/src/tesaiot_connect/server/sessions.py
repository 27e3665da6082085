"""Sessions: what a client leaves with the broker.

Owns: client sessions, and their rows in the state file. Rule: a session that outlives its
connection is in the file with all it has, any other only with its will.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import msgspec

from ..mqtt.packets import Will
from ..mqtt.session import InFlight, Session
from ..protocols import Principal
from .outbox import Entry, Link, Outbox, Usage, footprint
from .rights import Scope
from .router import Filter
from .store import Rows, pack, unpack


class _SavedState(msgspec.Struct, array_like=True):
    """The packet identifiers of a session whose client is away, as the state file has them."""

    outbound: list[tuple[int, int, bool]]
    """Packet identifier, key, released."""
    inbound: list[int]
    last_id: int


class ClientSession:
    """What the broker knows of one client identifier, connected or not."""

    __slots__ = (
        "client_id", "durable", "expires_at", "expiry", "link", "outboxes", "owner", "principal",
        "saved", "scope", "state", "will", "will_due",
    )  # fmt: skip

    def __init__(self, client_id: str, owner: str, usage: Usage) -> None:
        self.client_id = client_id
        self.owner = owner
        """`rights.owner_of` the principal it belongs to; nobody else gets it."""
        self.principal: Principal | None = None
        """The last one that was connected; None if that was before the broker's start."""
        self.scope: Scope | None = None
        """Judges what is given to it; kept while the client is away."""
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
        for client_id, _filter, options in rows.subscriptions:
            subscription = msgspec.msgpack.decode(options, type=Filter)
            self._sessions[client_id].outbox.add_filter(subscription)
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
