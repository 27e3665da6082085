"""The client's half: username and password, read anew for every connection.

Owns: where the two come from, and the words for it. Rule: neither is kept from one connection to
the next, and the password is never shown.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import attrs

from tesaiot_connect import (
    ClientCertificate,
    ConnectorError,
    Credentials,
    Secret,
    SecretFrom,
    read_secret,
    secret_changed,
    secret_stamp,
)

_SOURCES = '{ file = "..." }, { env = "NAME" } or { command = ["program", "argument"] }'


def _given(_instance: Any, field: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, str) and not len(value):
        raise ValueError(f"`{field.name}` is empty: give the text, {_SOURCES}")


@attrs.frozen
class _Login:
    credentials: Credentials

    async def respond(self, data: bytes, /) -> bytes:
        raise ConnectorError(
            "the broker asks for enhanced authentication, and this connection logs in with a password",
            fix="set the broker to plain username and password",
        )

    async def finish(self, data: bytes, /) -> None:
        pass


@attrs.frozen(kw_only=True)
class AuthPassword:
    """Logs in with username and password. Both may be kept elsewhere, and are read anew for every
    connection: { file = "..." }, { env = "NAME" } or { command = ["program", "argument"] }."""

    username: str | SecretFrom = attrs.field(
        validator=_given, metadata={"help": "Name of the user or device, or a table that says where it is."}
    )
    password: Secret | SecretFrom = attrs.field(
        validator=_given, metadata={"help": "The password, or a table that says where it is."}
    )
    _stamp: list[Hashable] = attrs.field(factory=list, init=False, eq=False, repr=False)
    """What the files of the two looked like before they were read last."""

    async def begin(self) -> _Login:
        """Raises ConnectorError, naming the key, where it is kept and what to do."""
        self._stamp[:] = [secret_stamp(self.username, self.password)]
        username = await read_secret(self.username, "username")
        password = await read_secret(self.password, "password")
        return _Login(Credentials(username, password.encode(), origin=self._origin()))

    async def identity(self) -> ClientCertificate | None:
        return None

    async def changed(self) -> None:
        """Returns when the file of one of the two is not as it was at the latest `begin`."""
        since = self._stamp[0] if self._stamp else secret_stamp(self.username, self.password)
        await secret_changed(since, self.username, self.password)

    def _origin(self) -> str:
        pairs = {"username": self.username, "password": self.password}
        kept = [f"`{key}` is {one}" for key, one in pairs.items() if isinstance(one, SecretFrom)]
        where = f" ({', '.join(kept)})" if kept else ""
        return f"`username` and `password` of this connection's `auth`{where}"
