"""Which endpoint a client would use now, and why, without I/O.

Owns: that. Rule: the race is run by its own rules (`negotiation.race`), over the times that were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..negotiation import Outlook
from ..negotiation.race import Command, Do, Lane, Race
from .findings import Finding, Verdict


def judge(findings: Sequence[Finding], outlook: Iterable[Outlook], now: float) -> Verdict:
    """`findings` are by place; of each there is one outlook."""
    turns = sorted(outlook, key=lambda one: one.turn)
    order = [findings[one.place] for one in turns]
    lanes = [Lane(one.head_start, one.alone) for one in turns]
    won = forecast(lanes, [(one.seconds, one.secured) for one in order])
    if won is None:
        return Verdict(None, ("no endpoint can be used",))
    winner = order[won]
    why = [
        _passed_over(findings[known.place], known, winner, now)
        for known in sorted(turns, key=lambda one: one.place)
        if known.place < winner.place
    ]
    if not why:
        why.append(
            f"it is the {'first in order of preference' if len(order) > 1 else 'only endpoint'}, and works"
        )
    if winner.usable:
        return Verdict(winner.place, tuple(why))
    problem = winner.problem
    refused = problem is not None and problem.reason_code is not None
    then = next((one for one in order if one.usable), None)
    if refused:
        return Verdict(
            None, (f"{winner.url} is there first, and its broker refuses: no other one is asked then",)
        )
    if then is None:
        return Verdict(None, ("no endpoint can be used",))
    what = f"{winner.url} is there first, but its broker does not answer CONNECT: then others go before it"
    return Verdict(then.place, (what,))


def forecast(lanes: Sequence[Lane], ends: Sequence[tuple[float, bool]]) -> int | None:
    """Who wins a race in which each lane takes so many seconds, and succeeds or not."""
    race, now = Race(lanes), 0.0
    running: dict[int, float] = {}

    def obey(commands: Sequence[Command]) -> None:
        for do, lane in commands:
            if do is Do.START:
                running[lane] = now + ends[lane][0]

    obey(race.begin(now))
    while not race.decided and not race.over:
        due = race.next_timeout()
        lane = min(running, key=running.__getitem__)
        if due is not None and due < running[lane]:
            now = due
            obey(race.handle_timeout(now))
            continue
        now = running.pop(lane)
        obey(race.succeeded(lane, now) if ends[lane][1] else race.failed(lane, now))
    return race.winner


def _passed_over(found: Finding, known: Outlook, winner: Finding, now: float) -> str:
    if known.penalty_until > now:
        left = _span(known.penalty_until - now)
        return f"{found.url} is preferred, but not tried first for another {left}: {known.reason}"
    if found.problem is not None and found.problem.left_out:
        return f"{found.url} is left out: {found.bare(found.problem.what)}"
    if not found.secured:
        return f"{found.url} is preferred, but fails"
    return (
        f"{found.url} is preferred, but takes {found.seconds:.2f} s, longer than its head start of "
        f"{known.head_start:.2f} s: {winner.url} is there first"
    )


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
