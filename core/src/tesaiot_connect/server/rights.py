"""What one client may do, as the broker enforces it.

Owns: remembered decisions about publishing, and telling of refusals. Rule: the principal decides;
what it said is remembered no longer than `[broker] recheck`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..access import Account, Anybody
from ..message import Message
from ..mqtt.reasons import R
from ..protocols import Principal, RevocablePrincipal, ScopedPrincipal
from .options import BrokerOptions, allows

log = logging.getLogger(__name__)

_REMEMBER = 500_000
"""Characters of the topics whose permission is remembered per connection."""
_TELL = 20
"""Refusals a connection may bring into the log."""
_SHOWN = 200
"""Characters of a topic that are worth showing."""

Scope = Callable[[str], bool]
"""Whether a message to a topic may be given to a client."""


def owner_of(principal: Principal) -> str:
    """Who a session belongs to: a name may stand for somebody else in another organisation."""
    organisation = principal.organisation
    return principal.name if organisation is None else f"{principal.name}\0{organisation}"


def scope_of(principal: Principal) -> Scope | None:
    """What must be asked before a message goes to the client; None where its subscriptions say it all."""
    if isinstance(principal, ScopedPrincipal) and getattr(principal, "scoped", True):
        return principal.may_receive
    return None


class Rights:
    """Of one connection, from an authentication to the next. `client` is its name in the log."""

    def __init__(self, options: BrokerOptions, principal: Principal, client: str) -> None:
        self.principal = principal
        self._options = options
        self._client = client
        self._all = type(principal) is Anybody and not options.deny_publish
        self._refusal = principal.refusal if isinstance(principal, RevocablePrincipal) else None
        self._allowed: dict[str, bool] = {}
        self._remembered = 0
        self._told: set[str] = set()

    def refusal(self) -> str:
        """Why the client may not stay, "" while it may; what was remembered is forgotten."""
        if self._allowed:
            self._forget()
        return self._refusal() if self._refusal is not None else ""

    def permitted(self, messages: list[Message]) -> tuple[list[Message], list[int] | None]:
        """The messages that may be published, and the reason codes of all if some may not."""
        if self._all:
            return messages, None
        if self._remembered > _REMEMBER:
            self._forget()
        allowed = self._allowed
        for message in messages:
            topic = message.topic
            if topic not in allowed:
                open_to_all = allows(self._options, topic)
                allowed[topic] = open_to_all and self.principal.may_publish(topic)
                self._remembered += len(topic)
                if not allowed[topic]:
                    self._tell("publish", topic, not open_to_all)
        if all(allowed[message.topic] for message in messages):
            return messages, None
        kept = [message for message in messages if allowed[message.topic]]
        return kept, [0 if allowed[message.topic] else R.NOT_AUTHORIZED for message in messages]

    def refused(self, filters: Sequence[str], codes: Sequence[int]) -> str:
        """Tell of subscriptions that were refused; a text for the client."""
        said = [
            self._tell("subscribe", topic_filter, code == R.UNSPECIFIED_ERROR)
            for topic_filter, code in zip(filters, codes, strict=True)
            if code in (R.NOT_AUTHORIZED, R.UNSPECIFIED_ERROR)
        ]
        return said[0] if said else ""

    def _forget(self) -> None:
        self._allowed.clear()
        self._remembered = 0

    def _tell(self, verb: str, topic: str, denied: bool) -> str:
        shown = topic if len(topic) <= _SHOWN else topic[:_SHOWN] + "..."
        if denied:
            said = f"[broker] deny_{verb} forbids to {verb} to {shown!r}"
        elif isinstance(self.principal, Account):
            said = f"no rule of [access] lets {self.principal.name!r} {verb} to {shown!r}"
        else:
            said = f"{self.principal.name!r} may not {verb} to {shown!r}"
        if len(self._told) <= _TELL and said not in self._told:
            self._told.add(said)
            if len(self._told) <= _TELL:
                log.warning("%s: %s", self._client, said)
            else:
                log.warning("%s: further refusals are not logged", self._client)
        return said
