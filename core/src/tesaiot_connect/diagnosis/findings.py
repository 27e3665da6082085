"""What was found of an endpoint and of a connection, and the same as a JSON document.

Owns: the steps of the way, and the document's names, which stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import attrs

from ..dialing import Attempt
from ..negotiation import Outlook
from ..protocols import QuicStatus
from .certificate import Certificate

Outcome = Literal["ok", "failed", "not allowed", "not reached", "none"]
""""not reached": an earlier step failed. "none": there is no such step here, or it was not asked for."""
StepName = Literal["name", "reach", "secure", "upgrade", "mqtt", "echo", "again", "throughput"]
STEPS: tuple[StepName, ...] = get_args(StepName)
WAY: tuple[StepName, ...] = ("name", "reach", "secure", "upgrade", "mqtt")
"""What an endpoint must do to be of use, in order."""


@attrs.frozen
class Step:
    """One part of the way to a working connection."""

    outcome: Outcome
    seconds: float | None = None
    what: str = ""
    fix: str = ""
    rate: float | None = None
    """Bytes per second, of "throughput"."""


NONE, NOT_REACHED, OK = Step("none"), Step("not reached"), Step("ok")


@attrs.frozen
class Accepted:
    """What the broker said in CONNACK."""

    version: Literal["5", "3.1.1"]
    client_id: str
    session_present: bool
    limits: Mapping[str, int | bool | str] = attrs.field(factory=dict)
    """What it announced, by the names of MQTT 5 section 3.2.2.3, in lower case with underscores."""


@attrs.frozen
class Problem:
    """Why an endpoint cannot be used."""

    step: StepName
    what: str
    cause: str = ""
    """What is likely behind it, as far as the endpoints together tell."""
    fix: str = ""
    reason_code: int | None = None
    """Of the broker's refusal."""
    left_out: bool = False
    """It takes no part, rather than that it failed."""


@attrs.frozen
class Finding:
    """One endpoint."""

    url: str
    scheme: str
    host: str
    server_name: str
    """The one that the server's certificate must have."""
    place: int
    """In order of preference, from 0."""
    steps: Mapping[StepName, Step]
    seconds: float = 0.0
    """How long the transport took until it was there, or failed."""
    addresses: tuple[str, ...] = ()
    transport: str = ""
    address: str = ""
    """The one that answered."""
    verified: bool = False
    """Whether the connection is encrypted, and the server's certificate and name were verified."""
    alpn: str | None = None
    tls_version: str | None = None
    """As "TLSv1.3"."""
    certificate: Certificate | None = None
    quic: QuicStatus | None = None
    """Of the first connection."""
    resumed: bool | None = None
    """Of the second; None where the transport does not tell."""
    early_accepted: bool | None = None
    accepted: Accepted | None = None
    problem: Problem | None = None
    cannot: tuple[str, ...] | None = None
    """What the transport says that it cannot do; None where it says nothing of that."""

    def bare(self, what: str) -> str:
        """Without the endpoint's name at its beginning, for where that stands already."""
        head, _, rest = what.partition(": ")
        return rest if rest and "://" in head and " " not in head else what

    @property
    def usable(self) -> bool:
        return self.steps["mqtt"].outcome == "ok"

    @property
    def secured(self) -> bool:
        """Whether the transport's part of the way works: what the race of endpoints is about."""
        return all(self.steps[one].outcome in ("ok", "none") for one in WAY[:-1])


@attrs.frozen
class Verdict:
    """What a client would do now."""

    place: int | None
    """The endpoint that it would use; None: there is none."""
    why: tuple[str, ...]


@attrs.frozen
class Diagnosis:
    """One connection."""

    name: str
    findings: tuple[Finding, ...]
    outlook: tuple[Outlook, ...]
    """By place."""
    left_out: tuple[Attempt, ...]
    verdict: Verdict

    @property
    def usable(self) -> bool:
        return any(one.usable for one in self.findings)


# --- as JSON ------------------------------------------------------------------------------


def document(diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """For machines; the guide describes it. Times are seconds since the epoch, others milliseconds."""
    return {
        "usable": all(one.usable for one in diagnoses),
        "connections": [_connection(one) for one in diagnoses],
    }


def _connection(found: Diagnosis) -> dict[str, Any]:
    place = found.verdict.place
    return {
        "name": found.name,
        "usable": found.usable,
        "uses": None if place is None else found.findings[place].url,
        "why": list(found.verdict.why),
        "endpoints": [_endpoint(one, found.outlook[one.place]) for one in found.findings],
        "left_out": [{"url": one.endpoint, "reason": one.reason, "fix": one.fix} for one in found.left_out],
    }


def _endpoint(found: Finding, outlook: Outlook) -> dict[str, Any]:
    problem, accepted = found.problem, found.accepted
    limits = {} if found.cannot is None else {"cannot": list(found.cannot)}
    return {
        "url": found.url,
        "usable": found.usable,
        "transport": found.transport or None,
        **limits,
        "addresses": list(found.addresses),
        "address": found.address or None,
        "steps": {name: _step(found.steps[name]) for name in STEPS},
        "verified": found.verified,
        "server_name": found.server_name or None,
        "alpn": found.alpn,
        "tls_version": found.tls_version,
        "certificate": None if found.certificate is None else attrs.asdict(found.certificate),
        "quic": None
        if found.quic is None
        else {
            "version": found.quic.version,
            "handshake_ms": _ms(found.quic.handshake_time),
            "rtt_ms": _ms(found.quic.rtt_smoothed),
            "path_mtu": found.quic.path_mtu,
        },
        "resumed": found.resumed,
        "early_data_accepted": found.early_accepted,
        "mqtt": None if accepted is None else attrs.asdict(accepted),
        "memory": _memory(outlook),
        "problem": None if problem is None else attrs.asdict(problem),
    }


def _step(step: Step) -> dict[str, Any]:
    made: dict[str, Any] = {"outcome": step.outcome, "ms": _ms(step.seconds)}
    if step.what:
        made |= {"what": step.what, "fix": step.fix}
    if step.rate is not None:
        made["bytes_per_second"] = round(step.rate)
    return made


def _memory(outlook: Outlook) -> dict[str, Any]:
    return {
        "turn": outlook.turn,
        "penalty_until": outlook.penalty_until or None,
        "reason": outlook.reason,
        "succeeded": outlook.succeeded or None,
        "handshake_ms": _ms(outlook.handshake or None),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
