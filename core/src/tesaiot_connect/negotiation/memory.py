"""What is remembered of an endpoint on a network, and what follows from it: without I/O.

Owns: penalties, head starts and the order of endpoints. Rules: a failure counts against an endpoint only
where another one worked meanwhile, since otherwise it says nothing about the path; a penalty doubles when
what follows it is a failure again, and ends with a success. Times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import attrs
import msgspec

LONGEST = 6 * 3600.0
"""Seconds of the longest penalty, before its spread."""
LASTED = 60.0
"""Seconds after which a success counts for good: a failure then is a first one again."""
LATELY = 7 * 86400.0
"""Seconds for which a success speaks for sending early data; the longest life of a session ticket, too."""
_SPREAD = 0.1
_MOST = 64
_WIDEST = 5.0
_NARROWEST = 0.5
"""Bounds of an adapted head start, as multiples of the configured one."""

Kind = Literal["", "failed", "unanswered", "lost"]
"""What counted against an endpoint. Not in words: those of a transport name hosts."""
_WORDS: dict[Kind, str] = {
    "": "",
    "failed": "it failed while another endpoint worked",
    "unanswered": "it had not answered yet when another endpoint had",
    "lost": "a connection by it was lost while another endpoint worked",
}

_Some = Annotated[float, msgspec.Meta(ge=0.0)]


class Record(msgspec.Struct, frozen=True):
    """One endpoint on one network. Nothing in it tells which."""

    succeeded: _Some = 0.0
    """When it last gave a connection, 0 never."""
    handshake: _Some = 0.0
    """Seconds that took; 0 is unknown."""
    failures: Annotated[int, msgspec.Meta(ge=0, le=_MOST)] = 0
    """In a row, those of one penalty counted once."""
    penalty_until: _Some = 0.0
    """Until then it is neither tried first nor in the background; 0 when it worked since."""
    kind: Kind = ""
    """Of what that penalty is for."""


@attrs.frozen
class Outlook:
    """What is remembered of an endpoint on this network, and what follows from it."""

    place: int
    """Which endpoint, in order of preference, from 0."""
    turn: int
    """Which one a race would start it as, from 0."""
    head_start: float
    """Seconds until the race would start the next one."""
    alone: bool = False
    """Whether it runs alone."""
    penalty_until: float = 0.0
    """Seconds since the epoch; 0 where no penalty lasts."""
    reason: str = ""
    """Of that penalty."""
    succeeded: float = 0.0
    """When it last gave a connection, in seconds since the epoch; 0 is not known."""
    handshake: float = 0.0
    """Seconds that took; 0 is not known."""


UNKNOWN = Record()


def after_success(record: Record, now: float, handshake: float) -> Record:
    """Its penalty is over. The count of failures waits until the success has lasted."""
    return msgspec.structs.replace(
        record, succeeded=now, handshake=max(0.0, handshake), penalty_until=0.0, kind=""
    )


def after_failure(
    record: Record, now: float, kind: Kind = "failed", *, penalty: float, luck: float
) -> Record:
    """The same record while a penalty lasts: of many that share an endpoint, one failure counts.

    `penalty` is that of a first failure, in seconds; `luck` in [0, 1) spreads it by a tenth each way, so
    that a thousand clients do not come back in the same instant.
    """
    if penalised(record, now):
        return record
    forgiven = not record.penalty_until and now - record.succeeded >= LASTED
    failures = 1 if forgiven else min(record.failures + 1, _MOST)
    length = min(penalty * 2.0 ** (failures - 1), LONGEST) * (1 - _SPREAD + 2 * _SPREAD * luck)
    return msgspec.structs.replace(record, failures=failures, penalty_until=now + length, kind=kind)


def penalised(record: Record, now: float) -> bool:
    """Whether its penalty lasts. One that ends later than any can was written by a clock that ran ahead."""
    return now < record.penalty_until <= now + (1 + _SPREAD) * LONGEST


def order(records: Sequence[Record], now: float, suspects: Collection[int] = ()) -> list[int]:
    """Places in the order in which to try them: as preferred, those under a penalty or suspicion last."""
    return sorted(range(len(records)), key=lambda place: place in suspects or penalised(records[place], now))


def head_start(record: Record, delay: float) -> float:
    """Seconds until the next endpoint starts: what this one should need, within bounds about `delay`."""
    if not record.handshake:
        return delay
    return min(max(2 * record.handshake, _NARROWEST * delay), _WIDEST * delay)


def reason(record: Record, now: float) -> str:
    """Of its penalty, as the end of a sentence; empty where none lasts."""
    return _WORDS[record.kind] if penalised(record, now) else ""


def outlook(record: Record, now: float, *, place: int, turn: int, delay: float, alone: bool) -> Outlook:
    """`delay` is the configured head start, in seconds."""
    until, why = record.penalty_until if penalised(record, now) else 0.0, reason(record, now)
    return Outlook(
        place, turn, head_start(record, delay), alone, until, why, record.succeeded, record.handshake
    )


def trusted(record: Record, now: float, delay: float) -> bool:
    """Whether early data may be sent: it worked lately, nothing has counted against it since, and its head
    start should do, so that no rival is on its way meanwhile."""
    worked = not record.penalty_until and 0 < record.succeeded <= now < record.succeeded + LATELY
    return worked and delay > 0 and head_start(record, delay) >= record.handshake
