"""`[security]`: which policy every connection and listener of a file must keep, and which they do.

Owns: what the levels ask for, and the words for what falls short. Rule: a recipe is judged by what it
says of itself (`url`, `secure`, `tls`, `verify_hostname`, `server_tls`), and what it does not say counts as
not so, but for `verify_hostname`; the recipe that a policy let through cannot connect in another way.

ncsa-1 asks for an encrypted transport and a server that is verified by its CA; ncsa-2 for TLS 1.3 too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import attrs

from ..errors import Problem
from ..tls import ServerTls, TlsOptions
from .lines import Path

Policy = Literal["ncsa-1", "ncsa-2"]
LEVELS: Mapping[Policy, int] = {"ncsa-1": 1, "ncsa-2": 2}
T = TypeVar("T")

_ENCRYPTED = {"mqtt": "mqtts", "ws": "wss"}


@attrs.frozen(kw_only=True)
class SecurityOptions:
    """`[security]`: what every connection and every listener of the file must keep."""

    policy: Policy | None = None
    """"ncsa-1": encrypted, and the server verified by its CA. "ncsa-2": TLS 1.3 at least, too; where no
    `minimum_version` is set, it is raised. An endpoint that does not keep it is left out, with a warning;
    it is an error where no other endpoint of the connection keeps it, and for a listener."""

    @property
    def level(self) -> int:
        return LEVELS[self.policy] if self.policy else 0


@attrs.frozen
class Shortfall:
    """What keeps a recipe from a level, and from those above it."""

    level: int
    key: Path
    """In the recipe's table."""
    message: str
    fix: str


@attrs.frozen
class Finding:
    """A shortfall, with its place in the file. Not an error where no policy asks for the level."""

    level: int
    problem: Problem


def raised(recipe: T, table: Mapping[str, Any], level: int) -> T:
    """The recipe as the policy has it: TLS 1.3 at least from level 2 on, where its table says nothing."""
    if level < 2:
        return recipe
    for name in ("tls", "server_tls"):
        found = getattr(recipe, name, None)
        written = table.get(name)
        said = isinstance(written, Mapping) and "minimum_version" in written
        if isinstance(found, TlsOptions | ServerTls) and not said:
            better = attrs.evolve(found, minimum_version="1.3")
            recipe = attrs.evolve(recipe, **{name: better})  # type: ignore[misc]
    return recipe


def judge(recipe: Any, *, listener: bool) -> Iterator[Shortfall]:
    """Everything that keeps a transport's recipe from a level, as a client or as a listener."""
    name = "server_tls" if listener else "tls"
    tls = getattr(recipe, name, None)
    if not getattr(recipe, "secure", False):
        yield Shortfall(1, (), *_plain(recipe.url.scheme, listener=listener))
        return
    if not listener and isinstance(tls, TlsOptions) and tls.verify == "none":
        fix = "Remove `verify` and `insecure`; put the CA that issued its certificate into `ca_file`"
        yield Shortfall(1, (name, "verify"), "the server is not verified", fix)
    elif not listener and getattr(recipe, "verify_hostname", True) is False:
        fix = "Use a transport that checks the name, without `verify_hostname`"
        yield Shortfall(1, ("verify_hostname",), "the server's name is not verified", fix)
    if recipe.url.scheme == "quic":  # RFC 9001 section 4.2: never below TLS 1.3
        return
    if not isinstance(tls, TlsOptions | ServerTls):
        what = "its transport does not say which TLS versions it accepts"
        yield Shortfall(2, (), what, "Use a transport with a `tls` table")
    elif tls.minimum_version != "1.3":
        what = f"TLS {tls.minimum_version} is accepted"
        yield Shortfall(2, (name, "minimum_version"), what, f'Set {name}.minimum_version = "1.3"')


def _plain(scheme: str, *, listener: bool) -> tuple[str, str]:
    encrypted = _ENCRYPTED.get(scheme)
    if encrypted is None:
        return f"{scheme}:// does not say that it is encrypted", "Use mqtts://, wss:// or quic://"
    fix = f"Use {encrypted}://"
    if listener:
        fix += ", with server_tls = { certificate = ..., key = ... }"
    return f"{scheme}:// is not encrypted", fix


def is_loopback(host: str) -> bool:
    """Whether a listener's address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def report(findings: Iterable[Finding]) -> tuple[str, tuple[Problem, ...]]:
    """Which levels a file meets, in words, and what is in the way of the others."""
    findings = sorted(findings, key=lambda one: (one.level, one.problem.line))
    lowest = min((one.level for one in findings), default=max(LEVELS.values()) + 1)
    met = [name for name, level in LEVELS.items() if level < lowest]
    unmet = [name for name in LEVELS if name not in met]
    parts = [f"meets {' and '.join(met)}"] if met else []
    parts += [f"{' and '.join(unmet)} {'is' if len(unmet) == 1 else 'are'} not met:"] if unmet else []
    return "; ".join(parts), tuple(one.problem for one in findings)
