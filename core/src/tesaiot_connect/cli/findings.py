"""What `doctor` prints.

Owns: the table and the sentences below it. Rule: 80 columns are enough for people; where no terminal shows
it, nothing is folded, so that other programs can read lines.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..diagnosis import Diagnosis, Finding, Step, StepName

_SOON = 14.0
"""Days before its end from which a certificate is a matter of concern."""
_ABREAST = 3
"""Endpoints in one table."""
_UNFOLDED = 500
_WORDS = 2000
"""Characters of a sentence."""
_LONGEST = 72
"""Characters of a URL above a column; below the table it is whole."""
_LABEL = 11

_STYLES = {"ok": "green", "failed": "red", "not allowed": "yellow", "not reached": "dim", "none": "dim"}
_BESIDE: tuple[StepName, ...] = ("echo", "again", "throughput")
"""Steps that an endpoint can do without."""
_Note = tuple[str, str, str, str]
"""Label, style, what, and fix."""
_FLAT = {"failed": "failed", "not allowed": "not allowed", "not reached": "-", "none": "-"}


def show(found: Sequence[Diagnosis]) -> None:
    """On standard output."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNFOLDED
    with console.capture() as captured:
        for index, diagnosis in enumerate(found):
            if index:
                console.print()
            _show(console, diagnosis, alone=len(found) == 1)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()), color=True)


def _show(console: Console, diagnosis: Diagnosis, *, alone: bool) -> None:
    if not alone or diagnosis.name != "command line":
        console.print(Text(diagnosis.name, style="bold"))
        console.print()
    for begin in range(0, len(diagnosis.findings), _ABREAST):
        abreast = diagnosis.findings[begin : begin + _ABREAST]
        console.print(_table(diagnosis, abreast, narrow=console.width < _UNFOLDED))
        console.print()
    console.print(_sentences(diagnosis))


# --- the table ----------------------------------------------------------------------------


def _table(diagnosis: Diagnosis, findings: Sequence[Finding], *, narrow: bool) -> Table:
    made = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    made.add_column("", style="dim", no_wrap=True, min_width=_LABEL)
    for one in findings:
        made.add_column(_heading(one) if narrow else _url(one), overflow="fold")
    now = time.time()
    for label, cell in _ROWS:
        cells = [cell(one, now) for one in findings]
        if any(one.plain not in ("", "-") for one in cells):
            made.add_row(label, *(one if one.plain else Text("-", "dim") for one in cells))
    memory = [_memory(diagnosis, one, now) for one in findings]
    if any(one.plain != "-" for one in memory):
        made.add_row("memory", *memory)
    return made


def _url(found: Finding) -> str:
    return f"{found.place + 1} {found.url}"


def _heading(found: Finding) -> str:
    url = _url(found)
    if len(url) > _LONGEST:
        url = f"{url[: _LONGEST - 12]}…{url[-11:]}"
    return url.replace("://", "://\n", 1)


def _step(step: Step, *more: str) -> Text:
    """Its outcome; where that is good, the time and what else there is to say."""
    flat = _FLAT.get(step.outcome)
    if flat is not None:
        return Text(flat, _STYLES[step.outcome])
    words = [] if step.seconds is None else [_time(step.seconds)]
    return Text(", ".join((*words, *(one for one in more if one))) or "ok", _STYLES["ok"])


def _name(found: Finding, _now: float) -> Text:
    first, rest = found.addresses[:1], len(found.addresses) - 1
    return _step(found.steps["name"], *first, f"{rest} more" if rest > 0 else "")


def _again(found: Finding, _now: float) -> Text:
    how = "" if found.resumed is None else "resumed" if found.resumed else "not resumed"
    return _step(found.steps["again"], "0-RTT" if found.early_accepted else how)


def _certificate(found: Finding, _now: float) -> Text:
    known = found.certificate
    if known is None:
        return Text("")
    if not known.subject and not known.issuer and not known.names:
        return Text(f"SHA-256 {known.sha256[:16]}… (install cryptography to see more)")
    issuers = known.chain or (known.issuer,)
    return Text(
        "\n".join(
            (f"for {', '.join(known.names) or known.subject}", *(f"from {_called(one)}" for one in issuers))
        )
    )


def _called(subject: str) -> str:
    name = re.search(r"CN=([^,]+)", subject)
    return name[1] if name else subject


def _secure(found: Finding, _now: float) -> Text:
    return _step(found.steps["secure"], (found.tls_version or "").replace("TLSv", "TLS "))


def _server(found: Finding, _now: float) -> Text:
    if found.verified:
        return Text(f"verified: {found.server_name}", "green")
    connected = found.transport and found.steps["secure"].outcome == "ok"
    return Text("not verified" if connected else "", "yellow")


def _valid(found: Finding, now: float) -> Text:
    known = found.certificate
    if known is None or known.not_after is None:
        return Text("")
    left = known.days_left(now) or 0.0
    until = time.strftime("%Y-%m-%d", time.gmtime(known.not_after))
    return Text(f"until {until}, {left:.0f} days", "yellow" if left < _SOON else "green")


def _mqtt(found: Finding, _now: float) -> Text:
    accepted = found.accepted
    if accepted is None:
        return _step(found.steps["mqtt"])
    kept = "session found" if accepted.session_present else ""
    return _step(found.steps["mqtt"], f"MQTT {accepted.version}", kept)


def _limits(found: Finding, _now: float) -> Text:
    if found.accepted is None:
        return Text("")
    shown = [
        f"{name.replace('_', ' ')} {('no' if value is False else value)}"
        for name, value in found.accepted.limits.items()
        if value is not True
    ]
    return Text("\n".join(shown), "default")


def _throughput(found: Finding, _now: float) -> Text:
    step = found.steps["throughput"]
    return Text(f"{step.rate / 1e6:.2f} MB/s", "green") if step.rate is not None else _step(step)


def _quic(found: Finding, _now: float) -> Text:
    if found.quic is None:
        return Text("")
    words = [f"version {found.quic.version}"] if found.quic.version else []
    words += [f"packets of {found.quic.path_mtu}"] if found.quic.path_mtu else []
    return Text(", ".join(words))


def _memory(diagnosis: Diagnosis, found: Finding, now: float) -> Text:
    known = diagnosis.outlook[found.place]
    if known.penalty_until > now:
        until = time.strftime("%H:%M", time.localtime(known.penalty_until))
        return Text(f"not tried first until {until}", "yellow")
    if not known.succeeded:
        return Text("-", "dim")
    return Text(f"worked {_span(now - known.succeeded)} ago, {_time(known.handshake)}")


_ROWS: tuple[tuple[str, Callable[[Finding, float], Text]], ...] = (
    ("name", _name),
    ("reach", lambda found, _: _step(found.steps["reach"])),
    ("handshake", _secure),
    ("again", _again),
    ("server", _server),
    ("certificate", _certificate),
    ("valid", _valid),
    ("ALPN", lambda found, _: Text(found.alpn or "")),
    ("QUIC", _quic),
    ("upgrade", lambda found, _: _step(found.steps["upgrade"])),
    ("CONNACK", _mqtt),
    ("limits", _limits),
    ("echo", lambda found, _: _step(found.steps["echo"])),
    ("throughput", _throughput),
)


# --- sentences ----------------------------------------------------------------------------


def _sentences(diagnosis: Diagnosis) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True, min_width=_LABEL)
    made.add_column(overflow="fold")
    place = diagnosis.verdict.place
    if place is not None:
        made.add_row(Text("uses now", "bold green"), Text(diagnosis.findings[place].url, "bold"))
    else:
        made.add_row(Text("uses now", "bold red"), Text("nothing", "bold"))
    for why in diagnosis.verdict.why:
        made.add_row("", f"{why}.")
    for (label, style, what, cause, fix), places in _problems(diagnosis.findings).items():
        made.add_row()
        made.add_row(Text(label, style), Text("\n".join(places), "bold"))
        _told(made, what, cause, fix)
    for (label, style, what, fix), where in _notes(diagnosis.findings).items():
        made.add_row()
        made.add_row(Text(label, style), Text("\n".join(where), "bold"))
        _told(made, what, "", fix)
    for limits, where in _lacking(diagnosis.findings).items():
        made.add_row()
        made.add_row(Text("cannot", "yellow"), Text("\n".join(where), "bold"))
        for limit in limits:
            made.add_row("", _printable(limit))
    for one in diagnosis.left_out:
        made.add_row()
        made.add_row(Text("left out", "yellow"), Text(one.endpoint, "bold"))
        _told(made, one.reason, "", one.fix)
    return made


def _problems(findings: Sequence[Finding]) -> dict[tuple[str, str, str, str, str], list[str]]:
    """Label, style, what, cause and fix, and at which endpoints."""
    problems: dict[tuple[str, str, str, str, str], list[str]] = {}
    for found in findings:
        if (problem := found.problem) is not None:
            label, style = ("left out", "yellow") if problem.left_out else ("failed", "red")
            told = (label, style, found.bare(problem.what), problem.cause, problem.fix)
            problems.setdefault(told, []).append(_url(found))
    return problems


def _notes(findings: Sequence[Finding]) -> dict[_Note, list[str]]:
    """What else went wrong, or will, and at which endpoints."""
    notes: dict[_Note, list[str]] = {}
    for found in findings:
        for name in _BESIDE:
            step = found.steps[name]
            if step.outcome in ("failed", "not allowed"):
                note: _Note = (name, _STYLES[step.outcome], step.what, step.fix)
                notes.setdefault(note, []).append(_url(found))
        left = None if found.certificate is None else found.certificate.days_left(time.time())
        if left is not None and left < _SOON:
            note = ("certificate", "yellow", f"it ends in {max(0.0, left):.0f} days", "have it renewed")
            notes.setdefault(note, []).append(_url(found))
    return notes


def _lacking(findings: Sequence[Finding]) -> dict[tuple[str, ...], list[str]]:
    """What transports cannot do, and at which endpoints."""
    limits: dict[tuple[str, ...], list[str]] = {}
    for found in findings:
        if found.cannot:
            limits.setdefault(found.cannot, []).append(_url(found))
    return limits


def _told(made: Table, what: str, cause: str, fix: str) -> None:
    made.add_row("", f"{_sentence(what)}.")
    if cause:
        made.add_row(Text("  likely", "dim"), f"{_sentence(cause)}.")
    if fix:
        made.add_row(Text("  fix", "dim"), f"{_sentence(fix)}.")


def _sentence(text: str) -> str:
    text = _printable(text)
    return (
        text[:1].upper() + text[1:] if text[:1].islower() and "://" not in text.split()[0] else text
    ).rstrip(".")


def _printable(text: str) -> str:
    """Some are the broker's."""
    return "".join(one if one.isprintable() else " " for one in text[:_WORDS])


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 129_600 else f"{seconds / 86400:.0f} days"
