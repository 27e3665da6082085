"""Who a client of our broker is, and what it may do.

Owns: the `[access]` table, the principal that authenticators make of it, and trying several
authenticators. Rule: what no rule allows is forbidden; what a client may do is asked of its
principal, never of the broker.
"""

from __future__ import annotations

import logging
import re
import time
import tomllib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from .accounts import file_stamp
from .errors import ConnectorError, NotApplicable, ProtocolError, Refused
from .mqtt.reasons import R
from .mqtt.topics import check_filter
from .protocols import Authenticator, Challenge, Credentials, Peer, Principal

log = logging.getLogger(__name__)

_PLACEHOLDERS = ("{username}", "{organisation}", "{device}")
_LOOK = 1.0
"""Seconds between looks at the organisations file."""
_DECISIONS = 100_000
_DECISION_LENGTH = 500
"""Decisions remembered, and characters of a topic that is worth it: the bounds on their memory."""


@attrs.frozen
class Anybody:
    """A principal that may do everything."""

    name: str = "anonymous"
    organisation: str | None = None
    valid_until: float | None = None

    def may_publish(self, topic: str, /) -> bool:
        return True

    def may_subscribe(self, topic_filter: str, /) -> bool:
        return True


@attrs.frozen
class Anonymous:
    """Lets every client in, whatever credentials it brings: for loopback and closed networks."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Anybody:
        return Anybody()


def _patterns(_rule: object, _attribute: object, value: tuple[str, ...]) -> None:
    for pattern in value:
        if pattern.startswith("$share/"):
            raise ValueError(
                f"{pattern!r}: a shared subscription is judged by its filter: leave out $share/<group>/"
            )
        levels = pattern.split("/")
        for level in levels:
            if level not in _PLACEHOLDERS and ("{" in level or "}" in level):
                known = ", ".join(_PLACEHOLDERS)
                raise ValueError(
                    f"{pattern!r}: {level!r} is no placeholder: there are {known}, and each takes a"
                    " whole level"
                )
        try:
            check_filter(pattern)
        except ProtocolError as error:
            raise ValueError(str(error)) from error


@attrs.frozen(kw_only=True)
class AccessRule:
    """What some principals may do. A rule only ever allows."""

    principals: tuple[str, ...] = ()
    """Names the rule is for; `*` in a name stands for anything. Empty: everybody."""
    organisations: tuple[str, ...] = ()
    """Organisations the rule is for, likewise. Empty: all, and those without one."""
    publish: tuple[str, ...] = attrs.field(default=(), validator=_patterns)
    """Topic filters. `{username}` is the principal's name, `{organisation}` its organisation,
    `{device}` any device of its organisation; each takes a whole level."""
    subscribe: tuple[str, ...] = attrs.field(default=(), validator=_patterns)
    """Likewise. A subscription may be as wide as the pattern with `+` for `{device}`: it brings
    only what the devices of the organisation publish."""

    def applies(self, name: str, organisation: str | None) -> bool:
        return _named(self.principals, name) and _named(self.organisations, organisation)


def _devices(_access: object, _attribute: object, value: Mapping[str, Sequence[str]]) -> None:
    for organisation, names in value.items():
        for name in (organisation, *names):
            if not _fills_a_level(name):
                raise ValueError(
                    f"{name!r} (of organisation {organisation!r}) is no name of a topic level: it must"
                    ' not be empty nor hold "/", "+", "#" or NUL'
                )


@attrs.frozen(kw_only=True)
class Access:
    """The `[access]` table: rules, and which devices are an organisation's."""

    rules: tuple[AccessRule, ...] = ()
    """What is allowed; everything else is not."""
    organisations: Mapping[str, Sequence[str]] = attrs.field(factory=dict, validator=_devices)
    """Organisation to the names of its devices."""
    organisations_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """TOML file with the same, `acme = ["device-1", "device-2"]`; read again when it changes."""
    _now: _Organisations = attrs.field(init=False, repr=False, eq=False)

    @_now.default
    def _begin(self) -> _Organisations:
        return _Organisations(self.organisations, self.organisations_file)

    def check(self) -> None:
        """Raises ConnectorError if there is an organisations file that cannot be read."""
        self._now.read()

    def principal(
        self,
        name: str,
        *,
        organisation: str | None = None,
        valid_until: float | None = None,
        refusal: Callable[[], str] = lambda: "",
    ) -> Account:
        """The principal of a client that proved who it is: what authenticators return.

        `refusal` says why the client may not stay connected any more (its account was removed),
        "" while it may; it is asked every few seconds, so it must be quick. Raises Refused while
        the organisations file could not be read once.
        """
        self._now.look()
        if not self._now.known:
            raise Refused(
                "the broker does not know its organisations: its log says why",
                reason_code=R.SERVER_UNAVAILABLE,
            )
        rules = [rule for rule in self.rules if rule.applies(name, organisation)]
        return Account(
            name,
            organisation,
            valid_until,
            _filled((one for rule in rules for one in rule.publish), name, organisation),
            _filled((one for rule in rules for one in rule.subscribe), name, organisation),
            self._now,
            refusal,
        )


@attrs.frozen(eq=False)
class Account:
    """A principal whose rights are rules of an `[access]` table."""

    name: str
    organisation: str | None
    valid_until: float | None
    _publish: tuple[_Pattern, ...]
    _subscribe: tuple[_Pattern, ...]
    _now: _Organisations = attrs.field(repr=False)
    _refusal: Callable[[], str] = attrs.field(repr=False)

    @property
    def scoped(self) -> bool:
        """Whether a subscription of it may match more than it may receive."""
        return any(_DEVICE in pattern for pattern in self._subscribe)

    def may_publish(self, topic: str, /) -> bool:
        self._now.look()
        parts, devices = topic.split("/"), self._now.of(self.organisation)
        return any(_covers(pattern, parts, devices) for pattern in self._publish)

    def may_subscribe(self, topic_filter: str, /) -> bool:
        """Whether one pattern covers the filter, which comes without `$share/<group>/`."""
        self._now.look()
        parts, devices = topic_filter.split("/"), self._now.of(self.organisation)
        return any(_covers(pattern, parts, devices, any_device=True) for pattern in self._subscribe)

    def may_receive(self, topic: str, /) -> bool:
        decisions = self._now.decisions
        found = decisions.get((self, topic))
        if found is None:
            parts, devices = topic.split("/"), self._now.of(self.organisation)
            found = any(_covers(pattern, parts, devices) for pattern in self._subscribe)
            if len(topic) <= _DECISION_LENGTH:
                if len(decisions) >= _DECISIONS:
                    decisions.clear()
                decisions[self, topic] = found
        return found

    def refusal(self) -> str:
        self._now.look()
        return self._refusal()


@attrs.frozen
class FirstOf:
    """Several authenticators: the first one that the credentials are meant for decides."""

    authenticators: tuple[Authenticator, ...] = attrs.field(validator=attrs.validators.min_len(1))

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        """Raises Refused of the one that decided, or one that holds what each of them wants."""
        wants: list[NotApplicable] = []
        for authenticator in self.authenticators:
            try:
                return await authenticator.begin(peer, credentials)
            except NotApplicable as error:
                wants.append(error)
        raise Refused(
            "no credentials that this listener takes: " + "; ".join(error.what for error in wants),
            fix=" or ".join(dict.fromkeys(error.fix for error in wants if error.fix)),
            reason_code=R.BAD_AUTHENTICATION_METHOD if credentials.method else wants[0].reason_code,
            permanent=True,
        )


# --- organisations ------------------------------------------------------------------------


class _Organisations:
    """Who has which devices, now: the table's and the file's. What was decided by it is forgotten
    when it changes."""

    def __init__(self, table: Mapping[str, Sequence[str]], file: Path | None) -> None:
        self._table = {name: frozenset(devices) for name, devices in table.items()}
        self._file = file
        self._all = self._table
        self._next_look = 0.0
        self._seen: Hashable = None
        self._told = ""
        self.known = file is None
        """Whether the file was read once."""
        self.decisions: dict[tuple[Account, str], bool] = {}

    def of(self, organisation: str | None) -> frozenset[str]:
        return self._all.get(organisation or "", frozenset())

    def look(self) -> None:
        """Read the file if it changed; at most one look a second."""
        now = time.monotonic()
        if self._file is None or now < self._next_look:
            return
        self._next_look = now + _LOOK
        seen = file_stamp(self._file)
        if seen is not None and seen == self._seen:
            return
        try:
            self.read()
        except ConnectorError as error:
            if (told := str(error)) != self._told:
                log.error("%s%s", error, "; what it said before holds" if self.known else "")
            if isinstance(error.__cause__, OSError):  # it may pass without a change of the file
                seen = None
            self._seen, self._told = seen, told if seen is None else ""
        else:
            log.info("organisations read from %s", self._file)

    def read(self) -> None:
        """Raises ConnectorError, and changes nothing then."""
        if self._file is None:
            return
        seen = file_stamp(self._file)
        found = _read(self._file)
        both = {*self._table, *found}
        self._all = {name: self._table.get(name, frozenset()) | set(found.get(name, ())) for name in both}
        self._seen, self._told, self.known = seen, "", True
        self.decisions.clear()


def _read(file: Path) -> dict[str, list[str]]:
    fix = 'write one line for each organisation: acme = ["device-1", "device-2"]'
    try:
        found: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
        for organisation, devices in found.items():
            if not isinstance(devices, list) or not all(isinstance(one, str) for one in devices):
                raise ValueError(f"{organisation} is not a list of names")
        _devices(None, None, found)
    except OSError as error:
        raise ConnectorError(
            f"the organisations file {file} cannot be read: {error.strerror or error}",
            fix="create it, or mend [access] organisations_file",
        ) from error
    except ValueError as error:
        raise ConnectorError(f"the organisations file {file} is damaged: {error}", fix=fix) from error
    return found


# --- patterns -----------------------------------------------------------------------------


class _AnyDevice:
    def __repr__(self) -> str:
        return "{device}"


_DEVICE = _AnyDevice()
"""A level of a pattern that no text can be taken for."""
_Pattern = tuple[str | _AnyDevice, ...]
"""Levels, placeholders filled in."""


def _fills_a_level(name: str | None) -> bool:
    """Whether a name may stand for a level of a topic: one that could be more must match nothing."""
    return bool(name) and not any(sign in name for sign in "/+#\0")  # type: ignore[operator]


def _filled(patterns: Collection[str] | Any, name: str, organisation: str | None) -> tuple[_Pattern, ...]:
    """The patterns that mean something for this principal, each once."""
    values: dict[str, Any] = {}
    if _fills_a_level(name):
        values["{username}"] = name
    if _fills_a_level(organisation):
        values["{organisation}"] = organisation
        values["{device}"] = _DEVICE
    filled: dict[_Pattern, None] = {}
    for pattern in patterns:
        levels = pattern.split("/")
        made: tuple[Any, ...] = tuple(
            values.get(level) if level in _PLACEHOLDERS else level for level in levels
        )
        dollar = levels[0] in _PLACEHOLDERS and str(made[0]).startswith("$")  # no way into $SYS
        if None not in made and not dollar:
            filled[made] = None
    return tuple(filled)


def _covers(
    pattern: _Pattern, parts: Sequence[str], devices: Collection[str], *, any_device: bool = False
) -> bool:
    """Whether the pattern matches the topic, or all that a topic filter does, of these levels.

    `any_device` lets a `+` of the filter stand where the pattern has any device.
    """
    if parts[0].startswith("$") and not isinstance(pattern[0], str):
        return False
    if parts[0].startswith("$") and pattern[0] in ("+", "#"):
        return False
    for index, level in enumerate(pattern):
        if level == "#":
            return True
        if index >= len(parts):
            return False
        part = parts[index]
        if level is _DEVICE:
            if part not in devices and not (any_device and part == "+"):
                return False
        elif part == "#" or level not in ("+", part):
            return False
    return len(pattern) == len(parts)


def _named(names: Collection[str], name: str | None) -> bool:
    """Whether a name is among these, `*` standing for anything; no names are all."""
    return not names or (
        name is not None
        and any(re.fullmatch(".*".join(map(re.escape, one.split("*"))), name, re.DOTALL) for one in names)
    )
