"""The client's half: a token that is username and password both.

Owns: its form, its age, and the words for both. Rules: what cannot be right is never sent; a token
is read anew for every connection, so that it may be replaced under a running program; it is
never shown.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Hashable
from typing import Any

import attrs

from tesaiot_connect import (
    ClientCertificate,
    ConnectorError,
    Credentials,
    Duration,
    Refused,
    Secret,
    SecretFrom,
    format_date,
    parse_date,
    read_secret,
    secret_changed,
    secret_origin,
    secret_stamp,
)

from .tokens import PATTERN, check_pattern, is_token, what_is_wrong

log = logging.getLogger(__name__)

RENEW = "make a new one in Admin UI > Organization Settings > MQTT Tokens"
_DAY = 86400.0
_FILE = "file"
_BAD_USER_NAME_OR_PASSWORD, _NOT_AUTHORIZED = 0x86, 0x87


def _date(_instance: Any, field: attrs.Attribute[Any], value: str) -> None:
    if value and (field.name, value) != ("issued", _FILE):
        try:
            parse_date(value)
        except ValueError as error:
            raise ValueError(f"`{field.name}`: {error}") from error


def _not_negative(_instance: Any, field: attrs.Attribute[Any], value: float) -> None:
    if value < 0:
        raise ValueError(f"`{field.name}` must not be negative")


@attrs.frozen
class _Login:
    credentials: Credentials

    async def respond(self, data: bytes, /) -> bytes:
        raise ConnectorError(
            "the broker asks for enhanced authentication, and this connection logs in with a token",
            fix="set the broker to plain username and password",
        )

    async def finish(self, data: bytes, /) -> None:
        pass


@attrs.define
class _Memory:
    """What one `begin` leaves for the next."""

    stamp: Hashable = None
    """What the token's file looked like before it was read last."""
    first: str = ""
    """The token that the dates in the configuration are about."""
    warned: float = 0.0
    reminder: asyncio.TimerHandle | None = None


@attrs.frozen(kw_only=True)
class AuthToken:
    """Logs in with a token of the platform, which is username and password both. It is read anew for
    every connection, so a new one in the same place is taken without a restart."""

    token: Secret | SecretFrom = attrs.field(
        metadata={"help": "The token, or a table that says where it is: `file`, `env` or `command`."}
    )
    pattern: str = attrs.field(
        default=PATTERN,
        validator=check_pattern,
        metadata={"help": "Regular expression for the whole token, checked before anything is sent."},
    )
    issued: str = attrs.field(
        default="",
        validator=_date,
        metadata={
            "help": 'Date of issue, "2026-01-31"; "file" is when the file of the token was written. '
            "With it, the token's end is known: `lifetime` later."
        },
    )
    expires: str = attrs.field(
        default="",
        validator=_date,
        metadata={
            "help": "Last day of the token, instead of `issued`. A token that replaces it during a run "
            "is taken to have no known end."
        },
    )
    lifetime: Duration = attrs.field(
        default=Duration(90 * _DAY),
        validator=_not_negative,
        metadata={"help": "How long a token is valid from `issued` on."},
    )
    warn: Duration = attrs.field(
        default=Duration(14 * _DAY),
        validator=_not_negative,
        metadata={"help": "How long before its end the log says so, once a day."},
    )
    _memory: _Memory = attrs.field(factory=_Memory, init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Raises ConnectorError for a token that cannot be right, ValueError for other keys."""
        if self.issued and self.expires:
            raise ValueError("give `issued` or `expires`, not both")
        if self.issued == _FILE and not (isinstance(self.token, SecretFrom) and self.token.file):
            raise ValueError(
                'issued = "file" is for a token that is kept in a file: token = { file = "..." }'
            )
        if not isinstance(self.token, SecretFrom):
            self._check(str.__str__(self.token), "the `token`")

    async def begin(self) -> _Login:
        """Raises Refused, without any traffic, for a token that has the wrong form or is over;
        ConnectorError where it cannot be read."""
        memory = self._memory
        memory.stamp = secret_stamp(self.token)
        end = self._end_by_file()  # before it is read: a newer one has at most more time
        token = await read_secret(self.token, "token")
        self._check(token, secret_origin(self.token, "token"))
        memory.first = memory.first or token
        if end is None and token == memory.first:
            end = self._end_by_date()
        if end is not None and end <= time.time():
            raise Refused(
                f"the token of this connection's `auth` expired on {format_date(end)}: nothing was sent",
                fix=f"{RENEW}, and {self._put}",
                reason_code=_NOT_AUTHORIZED,
                permanent=True,
            )
        login = _Login(Credentials(Secret(token), token.encode(), origin=self._origin()))
        if memory.reminder is not None:
            memory.reminder.cancel()
        if end is not None:
            _remind(self, end, weakref.ref(login))
        return login

    async def identity(self) -> ClientCertificate | None:
        return None

    async def changed(self) -> None:
        """Returns when the token's file is not as it was at the latest `begin`."""
        await secret_changed(self._memory.stamp, self.token)

    def _check(self, token: str, where: str) -> None:
        if not is_token(token, self.pattern):
            form = "" if self.pattern != PATTERN else " (tesa_mqtt_<organisation>_<32 characters>)"
            raise Refused(
                f"{where} has not the form of a token{form}: it {what_is_wrong(token, self.pattern)}",
                fix="copy all of it from Admin UI > Organization Settings > MQTT Tokens; for the tokens of "
                "another platform set `pattern`",
                reason_code=_BAD_USER_NAME_OR_PASSWORD,
                permanent=True,
            )

    def _end_by_file(self) -> float | None:
        if self.issued != _FILE or not isinstance(self.token, SecretFrom) or self.token.file is None:
            return None
        try:
            return self.token.file.stat().st_mtime + self.lifetime
        except OSError:
            return None  # reading it will say why

    def _end_by_date(self) -> float | None:
        if self.expires:
            return parse_date(self.expires, end=True)
        return parse_date(self.issued) + self.lifetime if self.issued not in ("", _FILE) else None

    def warn_of(self, end: float) -> None:
        """Logs how many days are left, if they are few, once a day at most."""
        now = time.time()
        if now < end - self.warn or now < self._memory.warned + _DAY:
            return
        self._memory.warned = now
        days = max(0, int((end - now) // _DAY))
        log.warning(
            "the token of %s expires in %d day%s, on %s: %s, and %s",
            secret_origin(self.token, "token"), days, "" if days == 1 else "s",
            format_date(end), RENEW, self._put,
        )  # fmt: skip

    @property
    def _put(self) -> str:
        dates = "`issued`" if self.issued and self.issued != _FILE else "`expires`" if self.expires else ""
        also = f", and correct {dates}" if dates else ""
        if isinstance(self.token, SecretFrom) and self.token.file is not None:
            return f"put it into {self.token}{also}; a restart is not needed"
        return f"set it in {secret_origin(self.token, 'token')}{also}"

    def _origin(self) -> str:
        where = secret_origin(self.token, "token")
        return f"{where}: if it has expired or was revoked, {RENEW}, and {self._put}"


def _remind(auth: AuthToken, end: float, login: weakref.ref[_Login]) -> None:
    """Warn now and then each day, for as long as the connection of this login is there."""
    if login() is not None:
        auth.warn_of(end)
        loop = asyncio.get_running_loop()
        auth._memory.reminder = loop.call_later(_DAY, _remind, auth, end, login)
