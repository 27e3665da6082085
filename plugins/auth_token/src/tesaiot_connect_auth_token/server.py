"""The broker's half: who may come in by the token file.

Owns: looking a token up in the file as it is now, and noticing when it has ended. Rule: what does
not look like a token is for another authenticator.
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

from .store import Token, digest, token_file
from .tokens import PATTERN, check_pattern, is_token

log = logging.getLogger(__name__)

_BAD_USER_NAME_OR_PASSWORD, _NOT_AUTHORIZED = 0x86, 0x87


def _open(self: TokenFile) -> AccountFile[Token]:
    return token_file(self.file)


@attrs.frozen(kw_only=True)
class TokenFile:
    """Lets in who has a token of a token file, as username and password both. The file is read
    again when it changes; who uses a token that is revoked there is disconnected."""

    file: Path = attrs.field(
        metadata={
            "help": "Lines `sha256 of the token:organisation:valid until:name`. "
            "`python -m tesaiot_connect_auth_token` writes them."
        }
    )
    pattern: str = attrs.field(
        default=PATTERN,
        validator=check_pattern,
        metadata={"help": "Regular expression for a whole token: other usernames are not looked up here."},
    )
    access: Access = attrs.field(factory=Access, metadata={"help": "What the holders of tokens may do."})
    _tokens: AccountFile[Token] = attrs.field(
        init=False, eq=False, repr=False, default=attrs.Factory(_open, takes_self=True)
    )

    def __attrs_post_init__(self) -> None:
        """Raises ConnectorError, naming file and line, if the file cannot be read."""
        self._tokens.current()

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        """Raises Refused, NotApplicable where the username is no token."""
        text = credentials.username or ""
        if not is_token(text, self.pattern):
            raise NotApplicable("the username is not a token")
        # by its hash: how long the look-up takes tells nothing of use
        token = self._tokens.current().get(digest(text))
        if token is None or credentials.password != text.encode():
            why = "is not known" if token is None else "came with another password"
            log.info("%s: a token that %s", peer.address, why)
            raise Refused(
                "the token is not known, or is not username and password both",
                reason_code=_BAD_USER_NAME_OR_PASSWORD,
                permanent=True,
            )
        if (over := _over(token)) != "":
            raise Refused(over, reason_code=_NOT_AUTHORIZED, permanent=True)
        return self.access.principal(
            token.name,
            organisation=token.organisation,
            valid_until=token.valid_until,
            refusal=partial(self._refusal, token),
        )

    def _refusal(self, then: Token) -> str:
        """Why a client who logged in by this line of the file may not stay, "" if it may."""
        now = self._tokens.current().get(then.digest)
        if now is None:
            return f"the token {then.name} was revoked"
        if (now.name, now.organisation) != (then.name, then.organisation):
            return f"the token {then.name} has another name or organisation now"
        return _over(now)


def _over(token: Token) -> str:
    if token.valid_until is None or token.valid_until > time.time():
        return ""
    return f"the token {token.name} was valid until {format_date(token.valid_until)}"
