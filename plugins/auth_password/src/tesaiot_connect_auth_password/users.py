"""The password file: its format, and changing it.

Owns: the line `username:argon2-hash[:organisation[:valid until]]`, and the cost of a hash. Rules: a
password is only in memory, and only while it is hashed; a hash is never shown.

The cost is argon2id with 19 MiB, 2 passes, 1 lane: the least that OWASP's password storage
cheat sheet asks for, and what a Raspberry Pi with 512 MiB can pay for several clients at once
(about 30 ms on a PC). A hash carries its own cost, so hashes made elsewhere at another one work.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

import attrs

from tesaiot_connect import AccountFile, check_account_name, format_date, parse_date

MEMORY, PASSES, LANES = 19 * 1024, 2, 1
"""KiB, and counts."""
COST = f"$argon2id$v=19$m={MEMORY},t={PASSES},p={LANES}"
"""How a hash of ours begins."""
_MOST_MEMORY = 1024 * 1024
"""KiB a hash may ask for: more would be a way to stop the broker."""

_HASH = re.compile(r"\$argon2(id|i|d)\$v=19\$m=(\d+),t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+")
COMMAND = "python -m tesaiot_connect_auth_password"


@attrs.frozen
class User:
    """One line. `valid_until` is in seconds since the epoch."""

    name: str
    hash: str = attrs.field(repr=False)
    organisation: str | None = None
    valid_until: float | None = None


def password_file(path: Path) -> AccountFile[User]:
    """The users of a file by name."""
    return AccountFile(path, parse, what="password file", fix=f"make it: {COMMAND} {path} USER")


def parse(line: str) -> tuple[str, User]:
    """Name and user of a line. Raises ValueError, which does not show the hash."""
    name, *rest = line.rstrip().split(":", 3)
    if not rest:
        raise ValueError("it is not username:hash, as `" + COMMAND + " FILE USER` writes it")
    encoded, organisation, until = (*rest, "", "")[:3]
    check_account_name(name, "the username")
    match = _HASH.fullmatch(encoded)
    if match is None:
        raise ValueError(f"what follows the username is no argon2 hash: make it with {COMMAND} FILE USER")
    if int(match[2]) > _MOST_MEMORY:
        raise ValueError("its hash asks for more than 1 GiB of memory")
    if organisation:
        check_account_name(organisation, "the organisation")
    valid_until = parse_date(until, end=True) if until else None
    return name, User(name, encoded, organisation or None, valid_until)


def add_user(
    file: Path | str,
    username: str,
    password: str,
    *,
    organisation: str | None = None,
    valid_until: str | None = None,
) -> bool:
    """Add a user, or change the one of this name; returns whether it is a new one.

    `valid_until` is a date ("2026-12-31": to its end, UTC) or RFC 3339 time. None leaves
    organisation and date of a user as they are, "" removes them. Makes the file if there is none.
    Raises ValueError for what cannot stand in the file, ConnectorError where it cannot be
    read or written.
    """
    check_account_name(username, "the username")
    if organisation:
        check_account_name(organisation, "the organisation")
    if not password:
        raise ValueError("the password must not be empty")
    if valid_until and parse_date(valid_until, end=True) <= time.time():
        raise ValueError(f"the date {valid_until} is over: the user could not log in")
    encoded = _hashed(password)  # before the file is locked: it takes a while
    added: list[bool] = []

    def change(users: Mapping[str, User]) -> Mapping[str, str]:
        old = users.get(username)
        added.append(old is None)
        kept, until = organisation, valid_until
        if old is not None and kept is None:
            kept = old.organisation
        if old is not None and until is None and old.valid_until is not None:
            until = format_date(old.valid_until)
        return {username: f"{username}:{encoded}:{kept or ''}:{until or ''}".rstrip(":")}

    password_file(Path(file)).rewrite(change)
    return added[0]


def remove_user(file: Path | str, username: str) -> bool:
    """Remove a user; returns whether there was one of this name. Raises ConnectorError."""
    found: list[bool] = []

    def change(users: Mapping[str, User]) -> Mapping[str, None]:
        found.append(username in users)
        return dict.fromkeys([username] if found[0] else [])

    users = password_file(Path(file))
    users.read()  # a file that is not there is a mistake here, and is not made
    users.rewrite(change)
    return found[0]


def _hashed(password: str) -> str:
    from argon2 import PasswordHasher

    return PasswordHasher(PASSES, MEMORY, LANES).hash(password)
