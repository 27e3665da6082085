"""`lint`: is a file right, as far as can be known without connecting?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..errors import ConfigError, Problem
from . import INVALID_CONFIG, options

if TYPE_CHECKING:
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
    Python are imported. Exits 78 if anything is wrong; warnings alone are fine.
    """
    from ..plugins import load

    catalog = load()
    problems: list[Problem] = []
    for file in files:
        try:
            good, warnings = _lint(file, overrides, env_file, catalog)
        except ConfigError as error:
            problems += error.problems
            continue
        for warning in warnings:
            click.echo(f"warning: {warning}")
        click.echo(good)
    if problems:
        for problem in problems:
            click.echo(str(problem), err=True)
        if len(problems) > 1:
            click.echo(f"{len(problems)} problems", err=True)
        ctx.exit(INVALID_CONFIG)


def _lint(
    file: str, overrides: tuple[str, ...], env_file: str | None, catalog: Catalog
) -> tuple[str, tuple[Problem, ...]]:
    from ..config import load
    from ..config.document import Document

    tables = Document.read(file).data.keys()
    if tables & {"broker", "listeners"} and not tables & {"pipelines", "sources", "sinks"}:
        from ..config.serving import load_server

        server = load_server(file, overrides=overrides, env_file=env_file, catalog=catalog)
        return f"{file}: right, {_count(len(server.listeners), 'listener')}", ()
    config = load(file, overrides=overrides, env_file=env_file, catalog=catalog)
    return f"{file}: right, {_count(len(config.pipelines), 'pipeline')}", config.warnings


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
