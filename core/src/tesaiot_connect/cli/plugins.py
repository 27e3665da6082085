"""`plugins`: what is installed, what it brings, what it cannot do or lacks, and what is broken."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConnectorError, PluginError

if TYPE_CHECKING:
    from ..plugins import Implementation

_INDENT = " " * 15
_UNFOLDED = 100_000
"""Columns where no terminal limits them: other programs read lines."""


@click.command("plugins")
@click.option("--all", "everything", is_flag=True, help="Built-ins too, and packages that are not installed.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON document.")
def command(everything: bool, as_json: bool) -> None:
    """List installed plugins, what each brings, and why one is broken.

    Of a transport it tells too what it cannot do, and what it needs besides its package and does not find
    on this machine. A broken plugin stops nothing but the files that ask for it.
    """
    from ..plugins import PACKAGES, load

    with _silenced():
        catalog = load()
    broken = [
        {"plugin": plugin.name, "package": plugin.dist, "version": plugin.version, "problem": reason}
        for plugin, reason in catalog.failures()
    ]
    rows: list[dict[str, Any]] = []
    for one in catalog.implementations:
        if not everything and one.plugin.name == "builtin":
            continue
        missing: ConnectorError | None = None
        try:
            with _silenced():
                missing = one.missing()
        except PluginError as error:
            plugin = one.plugin
            broken.append(
                {
                    "plugin": plugin.name,
                    "package": plugin.dist,
                    "version": plugin.version,
                    "problem": error.what,
                }
            )
        rows.append(_row(one, missing))
    installed = {plugin.dist for plugin in catalog.plugins}
    absent = sorted(set(PACKAGES.values()) - installed) if everything else []
    if as_json:
        import msgspec

        document = {"implementations": rows, "broken": broken, "not_installed": absent}
        click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())
        return
    for row in sorted(rows, key=lambda row: (row["kind"], row["name"])):
        schemes = f"  ({', '.join(row['schemes'])})" if row["schemes"] else ""
        click.echo(f"{row['kind']:14} {row['name']:16} {_from(row)}{schemes}")
        for style, text in _below(row, rows):
            click.secho(_folded(text), fg=style)
    if not rows:
        click.echo("no plugins are installed; --all shows the built-in components")
    for failure in broken:
        click.secho(f"broken         {failure['plugin']:16} {_from(failure)}: {failure['problem']}", fg="red")
    for package in absent:
        click.echo(f"not installed  {package}")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """What plugins and their libraries print goes to standard error: ours is for the answer alone."""
    sys.stdout.flush()
    kept = -1
    with contextlib.suppress(OSError):  # one of them is closed
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if kept >= 0:
            os.dup2(kept, 1)
            os.close(kept)


def _row(one: Implementation, missing: ConnectorError | None) -> dict[str, Any]:
    recipe, transport = one.recipe, one.kind == "transport"
    return {
        "kind": one.kind,
        "name": one.name,
        "schemes": sorted(recipe.schemes) if transport else [],
        "rank": recipe.rank if transport and isinstance(recipe.rank, int) else None,
        "races": recipe.races if transport and isinstance(recipe.races, bool) else None,
        "cannot": list(one.cannot),
        "missing": None if missing is None else {"what": _text(missing.what), "fix": _text(missing.fix)},
        "package": one.plugin.dist,
        "version": one.plugin.version,
        "built_in": one.plugin.name == "builtin",
    }


def _text(told: str) -> str:
    """With names of files in it that are no UTF-8."""
    return told.encode(errors="backslashreplace").decode()


def _below(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str | None, str]]:
    """What else there is to say of a transport: style and text."""
    rivals = [other for other in rows if other is not row and set(other["schemes"]) & set(row["schemes"])]
    words = [f"rank {row['rank']}"] if rivals else []
    if row["races"] is False:
        words.append("tried alone")
    if words:
        yield None, ", ".join(words)
    if row["cannot"]:
        yield None, f"cannot: {'; '.join(row['cannot'])}"
    if row["missing"] is not None:
        yield "yellow", f"not usable here: {_told(row['missing'])}"


def _told(missing: dict[str, str]) -> str:
    return str(ConnectorError(missing["what"], fix=missing["fix"]))


def _folded(text: str) -> str:
    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    return textwrap.fill(
        " ".join(text.split()),
        width=max(40, shutil.get_terminal_size().columns) if limited else _UNFOLDED,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _from(row: dict[str, Any]) -> str:
    return "built in" if row.get("built_in") else f"{row['package'] or '?'} {row['version']}".strip()
