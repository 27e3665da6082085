"""`lint`: is a file right, as far as can be known without connecting?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..errors import ConfigError, Problem
from . import INVALID_CONFIG, options

if TYPE_CHECKING:
    from ..config import Config
    from ..config.serving import ServerConfig
    from ..plugins import Catalog


@click.command("lint")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@options.overrides
@options.env_file
@click.pass_context
def command(
    ctx: click.Context, files: tuple[str, ...], overrides: tuple[str, ...], env_file: str | None
) -> None:
    """Check files for `run` or `serve`, without connecting to anything.

    Shows everything that is wrong, with its line and what to write instead. Steps written in
    Python are imported. Says too which security levels (ncsa-1, ncsa-2) the file meets, and what is
    in the way of the others; that is an error only where `[security] policy` asks for the level.
    Exits 78 if anything is wrong; warnings alone are fine.
    """
    from ..plugins import load

    catalog = load()
    problems: list[Problem] = []
    for file in files:
        try:
            checked = _lint(file, overrides, env_file, catalog)
        except ConfigError as error:
            problems += error.problems
            continue
        for warning in checked.warnings:
            click.echo(f"warning: {warning}")
        click.echo(f"{file}: right, {_count(checked)}")
        _security(file, checked)
    if problems:
        for problem in problems:
            click.echo(str(problem), err=True)
        if len(problems) > 1:
            click.echo(f"{len(problems)} problems", err=True)
        ctx.exit(INVALID_CONFIG)


def _lint(
    file: str, overrides: tuple[str, ...], env_file: str | None, catalog: Catalog
) -> Config | ServerConfig:
    from ..config import load
    from ..config.document import Document

    tables = Document.read(file).data.keys()
    if tables & {"broker", "listeners"} and not tables & {"pipelines", "sources", "sinks"}:
        from ..config.serving import load_server

        return load_server(file, overrides=overrides, env_file=env_file, catalog=catalog)
    return load(file, overrides=overrides, env_file=env_file, catalog=catalog)


def _security(file: str, checked: Config | ServerConfig) -> None:
    """Which security levels the connections or listeners meet; no failure, whatever they are."""
    from ..config import Config
    from ..config.security import report

    if isinstance(checked, Config) and not checked.connections:
        return
    words, missing = report(checked.findings)
    click.echo(f"{file}: {words}")
    for problem in missing:
        click.echo(f"  {problem}")


def _count(checked: Config | ServerConfig) -> str:
    from ..config import Config

    number, what = (
        (len(checked.pipelines), "pipeline")
        if isinstance(checked, Config)
        else (len(checked.listeners), "listener")
    )
    return f"{number} {what}" + ("" if number == 1 else "s")
