"""What a client was given, from its arrival until somebody has settled it.

Owns: the way of messages from a connection to the inboxes, and of their settlement back, to that
connection or to the one that followed. Rule: nothing is acknowledged before it is settled, except what
nobody subscribed to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..message import Batch, Delivery
from ..mqtt.events import Received
from ..mqtt.session import Session
from .connection import Live
from .inbox import Inbox, Switchboard

log = logging.getLogger(__name__)


class Deliveries:
    """`current` gives the connection there is now; `again` ends one so that the broker sends what is
    not acknowledged again, and is told why."""

    def __init__(
        self,
        name: str,
        session: Session,
        switchboard: Switchboard,
        *,
        current: Callable[[], Live | None],
        again: Callable[[Live, str], None],
    ) -> None:
        self._name = name
        self._session = session
        self._switchboard = switchboard
        self._current = current
        self._again = again
        self._unsettled: dict[int, tuple[Inbox, ...]] = {}
        """Tokens of what was received, and who was given it."""

    @property
    def awaited(self) -> bool:
        """Whether anything is unsettled that those who were given it can still settle."""
        return not all(any(one.closed for one in inboxes) for inboxes in self._unsettled.values())

    @property
    def left(self) -> bool:
        """Whether anything is unsettled that nobody will settle any more."""
        return any(one.closed for inboxes in self._unsettled.values() for one in inboxes)

    def deliver(self, live: Live, event: Received, size: int) -> None:
        """`size` in bytes, of what the event came from."""
        token = event.token

        async def settle(error: BaseException | None) -> None:
            if token:
                self._settle(live, token, error)

        delivery = Delivery(Batch(event.messages, time.time()), settle)
        news = not self._switchboard.unrouted
        inboxes = self._switchboard.dispatch(delivery, size)
        if token and inboxes:
            self._unsettled[token] = inboxes
        elif token:
            live.engine.settle(token)
            live.notify()
        if news and self._switchboard.unrouted:
            log.warning(
                "%s: messages come that no source of this connection subscribes to, first on %s or after; "
                "they are counted and dropped",
                self._name,
                event.messages[0].topic,
            )

    def _settle(self, live: Live, token: int, error: BaseException | None) -> None:
        """`live` brought it; the connection may be another one now."""
        self._unsettled.pop(token, None)
        current = self._current()
        if error is not None:
            # QoS 2 messages of an earlier connection have come again unnoticed
            again = self._session.forget(token) or current is live
            if again and current is not None:
                self._again(current, f"a batch was refused downstream: {error}")
        elif current is None or not current.up:
            self._session.settle_unconnected(token)
        else:
            if current is live or self._session.unsettled:
                current.engine.settle(token)
            current.notify()

    def forget_dropped(self) -> None:
        """Between connections: QoS 2 messages that nobody will settle are new when they come again."""
        self._unsettled = {
            token: inboxes
            for token, inboxes in self._unsettled.items()
            if not any(inbox.closed for inbox in inboxes)
        }
        unsettled = self._session.unsettled
        for packet_id in [one for one, token in unsettled.items() if token not in self._unsettled]:
            del unsettled[packet_id]
