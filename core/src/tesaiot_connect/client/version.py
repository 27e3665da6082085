"""Which version of MQTT a client speaks.

Owns: what was refused where, and what follows. Rules: a version that an endpoint refuses in words is not
asked of it again before the other was; what the change costs is avoided where another endpoint may, and
said where it is not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal

import msgspec

from ..errors import Disconnected, Refused
from ..message import NO_PROPERTIES, Message
from ..mqtt.packets import V3, V5, Subscription
from ..mqtt.reasons import R
from ..protocols import Credentials
from .options import ClientOptions

log = logging.getLogger(__name__)

Then = Literal["at once", "later", "elsewhere"]
"""Behind a refusal of the version: the other one now, or after the pause between attempts; or nothing that
this endpoint would take, so that others are tried first."""

WORDS = {V3: "3.1.1", V5: "5"}
_OPTIONS = ("no_local", "retain_as_published", "retain_handling")
"""Of a subscription, in MQTT 5 alone."""


class Version:
    """`current` is that of the next CONNECT, or of the present connection. `name` is for the log."""

    def __init__(self, name: str, options: ClientOptions, *, keep_session: bool) -> None:
        self.current = V3 if options.protocol == "3.1.1" else V5
        self._name = name
        self._options = options
        self._keep_session = keep_session
        self._auto = options.protocol == "auto"
        self._bound = False
        """The login is one of MQTT 5 alone."""
        self._guessed = False
        """Nobody has said in words that MQTT 5 is refused."""
        self._hurried = False
        """There was a change at once since the latest pause."""
        self._refused: dict[int, set[int]] = {}
        """Place of an endpoint to what it has refused, since a connection was accepted."""
        self._told: set[str] = set()

    @property
    def may_guess(self) -> bool:
        """Whether whatever may be a refusal of MQTT 5 is to count as one."""
        return self._auto and not self._bound and self.current == V5

    def choose(self, credentials: Credentials) -> int:
        """The version for a login: enhanced authentication is not left out for the sake of MQTT 3.1.1."""
        self._bound = credentials.method is not None
        if self._auto and self._bound:
            self.current = V5
        return self.current

    def refused(self, error: Disconnected, *, place: int, once_connected: bool, others: bool) -> Then | None:
        """What follows an end of an attempt at the endpoint of that place; None: it refuses no version.

        `once_connected`: ever. `others`: there may be more endpoints.
        """
        if not isinstance(error, Refused) or error.reason_code != R.UNSUPPORTED_PROTOCOL_VERSION:
            return None
        if not error.permanent and (once_connected or not self.may_guess):
            return None
        if not self._auto or self._bound:
            return "elsewhere"
        refused = self._refused.setdefault(place, set())
        again = self.current in refused
        refused.add(self.current)
        costs = once_connected and not self._keep_session and self.current == V5
        if costs and others and not again:
            return "elsewhere"
        self.current = V3 if self.current == V5 else V5
        self._guessed = not error.permanent
        if len(refused) == 2:
            del self._refused[place]
            return "elsewhere"
        if costs:
            log.warning(
                "%s: the session ends with the change to MQTT 3.1.1, and with it what waits at the broker; "
                "%s, to have it kept",
                self._name,
                self._keeping,
            )
        if self._hurried:
            return "later"
        self._hurried = True
        log.info("%s: %s; going on in MQTT %s", self._name, error.what, WORDS[self.current])
        return "at once"

    @property
    def advice(self) -> str:
        """For a move to an endpoint that refuses the version."""
        if not self._auto:
            kept = "" if self._keep_session else f", and {self._keeping}"
            return f'set `protocol = "auto"`{kept}'
        if self._bound:
            return "its `auth` needs MQTT 5: log in there with a password, a token or a certificate"
        return f"{self._keeping}, so that the session may be taken along in MQTT 3.1.1"

    @property
    def _keeping(self) -> str:
        wanted = [] if self._options.client_id else ["`client_id`"]
        wanted += ["`clean_session = false`"] if self._options.clean_session else []
        return f"set {' and '.join(wanted)}"

    def paused(self, *, once_connected: bool) -> None:
        """An attempt has failed, and there is a pause. What was only guessed is forgotten."""
        self._hurried = False
        if self._guessed and not once_connected:
            self.current = V5
        self._guessed = False

    def accepted(self) -> None:
        self._guessed = self._hurried = False
        self._refused.clear()

    def warn(self, subscriptions: Iterable[Subscription] = (), messages: Iterable[Message] = ()) -> None:
        """Says once of either what is lost of it while MQTT 3.1.1 is spoken, unless that was asked for."""
        if self.current != V3 or not self._auto:
            return
        if "subscription" not in self._told:
            for one in subscriptions:
                if options := [f"`{option}`" for option in _OPTIONS if getattr(one, option)]:
                    named = f"{' and '.join(options)} of the subscription to {one.topic_filter!r}"
                    self._lost("subscription", f"{named} can not be asked for")
                    break
        if "message" not in self._told:
            for message in messages:
                if _has_properties(message):
                    self._lost("message", f"the properties of the message on {message.topic!r} are left out")
                    break

    def _lost(self, kind: str, what: str) -> None:
        self._told.add(kind)
        log.warning(
            "%s: MQTT 3.1.1 is spoken, since MQTT 5 was refused: %s, and so it is with every %s; use "
            "endpoints that speak MQTT 5, or do without",
            self._name,
            what,
            kind,
        )


def _has_properties(message: Message) -> bool:
    """Of its publisher: the identifiers of subscriptions are not sent on in either version."""
    found = message.properties
    return found is not NO_PROPERTIES and msgspec.structs.replace(found, subscription_ids=()) != NO_PROPERTIES
