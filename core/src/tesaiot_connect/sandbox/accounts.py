"""The accounts of the sandbox: devices with passwords, and tokens of organisations.

Owns: which accounts there are. Rules: the files `users` and `tokens` are written by the packages
that read them (their authenticators' own functions), never here; a secret in clear text is in the
bundle of whom it belongs to, and nowhere else.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PluginError
from ..plugins import Catalog
from .files import read

_DAYS = 90
"""How long a token is good for: what the platform gives by default."""


def names(file: Path) -> set[str]:
    """Who has a password. Raises ConnectorError."""
    return {line.partition(":")[0] for line in _lines(file)}


def add_password(catalog: Catalog, file: Path, device: str, organisation: str, known: str | None) -> str:
    """Give the device an account, with the password known of it or a new one. Raises ConnectorError."""
    password = known or secrets.token_urlsafe(18)
    _writer(catalog, "password", "add_user")(file, device, password, organisation=organisation)
    return password


def token(catalog: Catalog, file: Path, organisation: str, known: str | None) -> str:
    """The organisation's token: the known one while it is good, else a new one."""
    if known is not None:
        digest = hashlib.sha256(known.encode()).hexdigest()
        entry = next((line for line in _lines(file) if line.startswith(f"{digest}:")), None)
        if entry is not None and not _over(entry):
            return known
    made: str = _writer(catalog, "token", "add_token")(file, organisation=organisation, days=_DAYS)
    return made


def _lines(file: Path) -> list[str]:
    return [line for line in (read(file) or "").splitlines() if line and not line.startswith("#")]


def _over(entry: str) -> bool:
    """Whether the day on which a token's line says that it ends has come."""
    day = re.search(r":(\d{4}-\d\d-\d\d)", entry)
    return day is not None and day[1] <= datetime.datetime.now(datetime.UTC).date().isoformat()


def _writer(catalog: Catalog, authenticator: str, function: str) -> Callable[..., Any]:
    """A function of the package that an authenticator comes from. Raises PluginError."""
    found = catalog.get("authenticator", authenticator)
    package = importlib.import_module(found.recipe.__module__.partition(".")[0])
    try:
        writer: Callable[..., Any] = getattr(package, function)
    except AttributeError as error:
        raise PluginError(
            f"{found.plugin} cannot make accounts: it has no function `{function}`",
            fix=f"Install it anew: pip install -U {found.plugin.dist}",
        ) from error
    return writer
