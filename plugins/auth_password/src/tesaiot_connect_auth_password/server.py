"""The broker's half: who may come in by the password file.

Owns: checking a login against the file as it is now, and noticing when an account has ended. Rule:
a client cannot tell an unknown user from a wrong password, neither by the words nor by the time.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import attrs

from tesaiot_connect import (
    Access,
    AccountFile,
    Credentials,
    NotApplicable,
    Peer,
    Principal,
    Refused,
    format_date,
)

from .users import User, password_file
from .verify import Verifier

log = logging.getLogger(__name__)

_BAD_USER_NAME_OR_PASSWORD, _NOT_AUTHORIZED = 0x86, 0x87


def _open(self: PasswordFile) -> AccountFile[User]:
    return password_file(self.file)


@attrs.frozen(kw_only=True)
class PasswordFile:
    """Lets in who is in a password file. The file is read again when it changes; who is removed
    from it, or has another password there, is disconnected."""

    file: Path = attrs.field(
        metadata={
            "help": "Lines `username:argon2-hash[:organisation[:valid until]]`. "
            "`python -m tesaiot_connect_auth_password FILE USER` writes them."
        }
    )
    access: Access = attrs.field(factory=Access, metadata={"help": "What users may do."})
    _users: AccountFile[User] = attrs.field(
        init=False, eq=False, repr=False, default=attrs.Factory(_open, takes_self=True)
    )
    _verifier: Verifier = attrs.field(init=False, eq=False, repr=False, factory=Verifier)

    def __attrs_post_init__(self) -> None:
        """Raises ConnectorError, naming file and line, if the file cannot be read."""
        self._users.current()

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        """Raises Refused, with 0x89 (server busy) when too many logins wait already."""
        name, password = credentials.username, credentials.password
        if not name or password is None:
            raise NotApplicable("a username and a password are needed")
        users = self._users.current()
        user = users.get(name)
        hashed = user.hash if user else self._verifier.decoy(name, users)
        if not await self._verifier.verify(hashed, password) or user is None:
            log.info("%s: %s", peer.address, f"wrong password of {name!r}" if user else "unknown user")
            raise Refused(
                "wrong username or password", reason_code=_BAD_USER_NAME_OR_PASSWORD, permanent=True
            )
        if user.valid_until is not None and user.valid_until <= time.time():
            raise Refused(
                f"the account {name} was valid until {format_date(user.valid_until)}",
                reason_code=_NOT_AUTHORIZED,
                permanent=True,
            )
        return self.access.principal(
            name,
            organisation=user.organisation,
            valid_until=user.valid_until,
            refusal=partial(self._refusal, user),
        )

    def _refusal(self, then: User) -> str:
        """Why a user who logged in by this line of the file may not stay, "" if it may."""
        now = self._users.current().get(then.name)
        if now is None:
            return f"the account {then.name} was removed"
        if now.hash != then.hash:
            return f"the password of {then.name} was changed"
        if now.organisation != then.organisation:
            return f"the account {then.name} is of another organisation now"
        if now.valid_until is not None and now.valid_until <= time.time():
            return f"the account {then.name} was valid until {format_date(now.valid_until)}"
        return ""
