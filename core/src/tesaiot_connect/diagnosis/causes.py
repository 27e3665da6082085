"""What is behind a failure, as far as the endpoints of a connection together tell, without I/O.

Owns: those causes and what to do about them. Rule: what a transport or the broker said of its own endpoint
stands; a cause is added only where another endpoint, the clock or the environment makes it likely.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from ..mqtt.reasons import R
from .findings import Finding, Problem

_DAY = 86400.0

# what transports and the client say of certificates, of silence, and of what is no MQTT
_EXPIRED = "server's certificate has expired"
_NOT_YET = "server's certificate is not valid yet"
_UNTRUSTED = "not from a trusted authority"
_SILENT = "nothing came back"
_LATE = "gave no connection within"
_CLOSED = ("the peer closed the connection, before CONNACK", "ended during the upgrade")
_TLS = "packet type 1 with the reserved flags 5"  # the first byte of an alert (RFC 8446 section 5.1)
_HTTP = "packet type 4 with the reserved flags 8"  # "H"

_ENCRYPTED = {"mqtt": "mqtts", "ws": "wss"}

_LOGIN = (R.BAD_USER_NAME_OR_PASSWORD, R.NOT_AUTHORIZED, R.BANNED, R.BAD_AUTHENTICATION_METHOD)

Told = tuple[str, str]
"""Cause and fix; with "" the fix stays as the endpoint's own error has it."""


@attrs.frozen
class Surroundings:
    """What is known of this machine. Times are seconds since the epoch."""

    now: float
    installed: float
    """When this program was put here: no right clock is before that."""
    proxies: tuple[str, ...] = ()
    """Kinds of proxies that the environment names."""

    @classmethod
    def here(cls, file: Path) -> Surroundings:
        """`file` is one of this program's."""
        proxies = urllib.request.getproxies().keys() - {"no"}
        try:
            installed = file.stat().st_mtime
        except OSError:  # from an archive
            installed = 0.0
        return cls(time.time(), installed, tuple(sorted(proxies)))


@attrs.frozen
class _Case:
    """One endpoint's problem, and what is known beside it."""

    found: Finding
    problem: Problem
    others: tuple[Finding, ...]
    around: Surroundings

    def others_say(self, *words: str) -> bool:
        """Whether another endpoint has a problem that is described so."""
        return any(
            one.problem is not None and word in one.problem.what for one in self.others for word in words
        )

    @property
    def verified(self) -> Finding | None:
        """Another endpoint whose server was verified."""
        return next((one for one in self.others if one.verified), None)


def explain(findings: Sequence[Finding], around: Surroundings) -> list[Finding]:
    """The same findings, whose problems have their likely cause."""
    explained = []
    for found in findings:
        if (problem := found.problem) is not None:
            others = tuple(one for one in findings if one is not found)
            problem = _explained(_Case(found, problem, others, around))
        explained.append(attrs.evolve(found, problem=problem))
    return explained


def _explained(case: _Case) -> Problem:
    for rule in _RULES:
        told = rule(case)
        if told is not None:
            cause, fix = told
            return attrs.evolve(case.problem, cause=cause, fix=fix or case.problem.fix)
    return case.problem


def _no_names(case: _Case) -> Told | None:
    failed = [one for one in case.others if one.problem is not None and one.problem.step == "name"]
    if case.problem.step != "name" or not failed or len(failed) < len(case.others):
        return None
    cause = "no name can be resolved: this machine is offline, or its name server does not answer"
    return cause, "check the network and the name server of this machine (resolv.conf, VPN)"


def _udp(case: _Case) -> Told | None:
    """QUIC is silent, TCP to the same machine is not."""
    found = case.found
    if found.scheme != "quic" or case.problem.step != "reach" or _SILENT not in case.problem.what:
        return None
    beside = [one for one in case.others if one.scheme != "quic" and _near(found, one)]
    if not beside:
        return None
    near = next((one for one in beside if one.usable), beside[0])
    if all(one.problem is not None and _LATE in one.problem.what for one in beside):
        cause = (
            f"not UDP alone: {near.url} takes the connection, and then nothing comes back either. The broker "
            "hangs, or something in front of it answers for it"
        )
        return cause, "look at the broker: its log, its load, and whether it has to be started again"
    port = found.url.rpartition(":")[2]
    which = f"UDP port {port}" if port.isdigit() else "its UDP port"
    cause = (
        f"{which} is blocked on the way, or nothing listens there: {near.url} reaches the same machine over "
        "TCP. A path with an MTU under 1280, as some VPNs and tunnels have, looks the same"
    )
    fix = f"have {which} opened in the firewall (outgoing, and at the server)"
    return cause, f"{fix}; until then connections go over {near.url}" if near.usable else fix


def _clock(case: _Case) -> Told | None:
    around, expired = case.around, _EXPIRED in case.problem.what
    if not expired and _NOT_YET not in case.problem.what:
        return None
    date, keep = _date(around.now), "set the clock, and have it kept right (NTP)"
    if around.now < around.installed - _DAY:
        cause = f"this machine's clock is wrong: it says {date}, and this program was installed on "
        return cause + _date(around.installed), keep
    if case.verified is not None:
        cause = f"the clock is right, for the certificate of {case.verified.url} is valid now"
        if expired:
            return cause, "have it renewed on the server, or its listener restarted with the new one"
        return cause, "the server's certificate was issued for later: have it use one that is valid now"
    if case.others_say(_EXPIRED, _NOT_YET):
        cause = f"no certificate is valid on {date}, as this machine's clock says: it is probably the clock"
        return cause, f"{keep}; if the date is right, renew the certificates"
    return f"this machine's clock says {date}", ""


def _authority(case: _Case) -> Told | None:
    if _UNTRUSTED not in case.problem.what:
        return None
    if case.verified is not None:
        proxy = (
            " (the environment names a proxy)" if case.around.proxies and case.found.scheme == "wss" else ""
        )
        cause = (
            f"the same settings verify {case.verified.url}: this server has a certificate of another "
            f"authority, or something in between answers for it, as a proxy that opens TLS does{proxy}"
        )
        return cause, "compare the two issuers; add this one to `ca_file` only if you know it"
    if case.others_say(_UNTRUSTED):
        cause = (
            "no endpoint's certificate is trusted: `ca_file` is probably that of another platform, or there "
            "is none and the platform has an authority of its own"
        )
        return cause, ""
    return None


def _login(case: _Case) -> Told | None:
    code = case.problem.reason_code
    if code == R.CLIENT_IDENTIFIER_NOT_VALID:
        cause = (
            "doctor connects with a client id of its own, so as to disturb nobody: a broker that allows "
            "certain ones only may refuse just that"
        )
        return cause, ""
    if code not in _LOGIN:
        return None
    accepted = next((one for one in case.others if one.usable), None)
    if accepted is not None:
        cause = f"{accepted.url} accepts the same login: this listener has other accounts or rules"
        return cause, "compare the two listeners' authentication at the broker"
    if any(one.problem is not None and one.problem.reason_code in _LOGIN for one in case.others):
        return "every endpoint that answers refuses this login: the network is not the matter", ""
    return None


def _other_protocol(case: _Case) -> Told | None:
    """Plain where TLS is spoken, or MQTT where HTTP is."""
    found, what = case.found, case.problem.what
    if _HTTP in what:
        return "it answers in HTTP: this is a port of WebSocket, or of a web server", (
            "use ws:// or wss:// with the broker's path, mostly /mqtt, or the port of its MQTT listener"
        )
    secure = _ENCRYPTED.get(found.scheme)
    if secure is None or not any(one in what for one in (*_CLOSED, _TLS)):
        return None
    cause = f"this port may speak TLS, and {found.scheme}:// is plain: a server of TLS hangs up on that"
    return cause, f"try {secure}:// with the same port. If it is not that: {case.problem.fix}"


def _proxy(case: _Case) -> Told | None:
    """The environment names a proxy, which transports over HTTP take."""
    found, problem = case.found, case.problem
    answered = problem.step == "mqtt" or "(404" in problem.what
    if found.scheme not in ("ws", "wss") or not case.around.proxies or answered:
        return None
    past = 'to go past the proxy: NO_PROXY, or proxy = "none" on the endpoint'
    near = next((one for one in case.others if _near(found, one)), None)
    if "the proxy " in problem.what:
        cause = f"the environment names that proxy ({_variables(case.around.proxies)}), or the endpoint does"
        cause += f"; {near.url} reaches the same host without it" if near is not None else ""
        return cause, f"correct that, or see that the proxy runs; {past}"
    if near is None:
        return None
    cause = f"{near.url} reaches the same host: the proxy that the environment names may be in the way"
    return cause, f"{problem.fix}; {past}" if problem.fix else past


def _variables(proxies: Sequence[str]) -> str:
    return ", ".join(f"{kind.upper()}_PROXY" for kind in proxies)


def _near(found: Finding, other: Finding) -> bool:
    """Whether the other one reaches the machine that this one is about."""
    same = other.host == found.host or set(other.addresses) & set(found.addresses)
    return bool(same) and other.steps["reach"].outcome == "ok"


_RULES: tuple[Callable[[_Case], Told | None], ...] = (
    _no_names,
    _udp,
    _clock,
    _authority,
    _login,
    _other_protocol,
    _proxy,
)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
