"""The token file: its format, and changing it.

Owns: the line `sha256 of the token:organisation:valid until:name`. Rule: a token is told once, when
it is made; the file does not hold it.

SHA-256 is enough here, where a password needs a slow hash: the secret part of a token is 32 random
characters of 36, about 165 bits, so there is nothing to guess from its hash; and a login costs a
microsecond. That holds for tokens this module makes, or others as random as they.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import time
from collections.abc import Mapping
from pathlib import Path

import attrs

from tesaiot_connect import AccountFile, check_account_name, format_date, parse_date

from .tokens import LENGTH, START

COMMAND = "python -m tesaiot_connect_auth_token"
_TIME = r"[Tt ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:[Zz]|[+-]\d\d:\d\d)?"
_LINE = re.compile(rf"([0-9a-f]{{64}}):([^:]*):(\d{{4}}-\d\d-\d\d(?:{_TIME})?)?:(.+)")
_DAY = 86400
_ID = 8


@attrs.frozen
class Token:
    """One line. `valid_until` is in seconds since the epoch."""

    digest: str = attrs.field(repr=False)
    organisation: str
    valid_until: float | None
    name: str

    @property
    def id(self) -> str:
        """What to call this token where several have one name."""
        return self.digest[:_ID]


def token_file(path: Path) -> AccountFile[Token]:
    """The tokens of a file by the SHA-256 of each."""
    fix = f"make it: {COMMAND} new {path} --organisation X"
    return AccountFile(path, parse, what="token file", fix=fix)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def parse(line: str) -> tuple[str, Token]:
    """Digest and token of a line. Raises ValueError, which does not show the digest."""
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(
            "it is not sha256:organisation:valid until:name, as `" + COMMAND + " new FILE` writes it"
        )
    hashed, organisation, until, name = match.groups()
    check_account_name(organisation, "the organisation")
    _check_name(name)
    return hashed, Token(hashed, organisation, parse_date(until, end=True) if until else None, name)


def add_token(file: Path | str, organisation: str, *, name: str = "", days: float | None = 90) -> str:
    """Make a token and add it; returns it, and nothing else will ever tell it again.

    `name` is the name of its clients' principal, "token:<organisation>:<n>" if it is "". A second
    token of the same name replaces the first without an interruption: both are valid until one
    is revoked or over. `days` is how long it is valid, None for ever. Makes the file if there is
    none. Raises ValueError for what cannot stand in the file, ConnectorError where it cannot be
    read or written.
    """
    check_account_name(organisation, "the organisation")
    if name:
        _check_name(name)
    if days is not None and not 0 < days < 36_500:
        raise ValueError("a token is valid for more than 0 days, and at most 100 years")
    letters = string.ascii_lowercase + string.digits
    prefix = re.sub("[^a-z0-9-]", "", organisation.lower())[:16] or "org"
    token = f"{START}{prefix}_{''.join(secrets.choice(letters) for _ in range(LENGTH))}"
    until = "" if days is None else format_date(time.time() + days * _DAY)

    def change(tokens: Mapping[str, Token]) -> Mapping[str, str]:
        for one in tokens.values():
            if one.name == name and one.organisation != organisation:
                raise ValueError(f"there is a token {name!r} of the organisation {one.organisation!r}")
        called = name or _next_name(organisation, tokens)
        return {digest(token): f"{digest(token)}:{organisation}:{until}:{called}"}

    token_file(Path(file)).rewrite(change)
    return token


def revoke_token(file: Path | str, name: str) -> int:
    """Revoke all tokens of a name, or the one of an id (the first 8 characters of its SHA-256).

    Returns how many there were. Raises ConnectorError.
    """
    found: list[str] = []

    def change(tokens: Mapping[str, Token]) -> Mapping[str, None]:
        found.extend(key for key, one in tokens.items() if name in (one.name, one.id))
        return dict.fromkeys(found)

    tokens = token_file(Path(file))
    tokens.read()  # a file that is not there is a mistake here, and is not made
    tokens.rewrite(change)
    return len(found)


def _check_name(name: str) -> None:
    check_account_name(name.replace(":", "-"), "the name of a token")


def _next_name(organisation: str, tokens: Mapping[str, Token]) -> str:
    start = f"token:{organisation}:"
    numbers = [one.name.removeprefix(start) for one in tokens.values() if one.name.startswith(start)]
    return f"{start}{max((int(one) for one in numbers if one.isdecimal()), default=0) + 1}"
