"""`schema`: the JSON Schema of pipeline.toml."""

from __future__ import annotations

import click


@click.command("schema")
@click.option("--serve", is_flag=True, help="Of a file for `serve` instead.")
def command(serve: bool) -> None:
    """Print the JSON Schema of a pipeline file, for the plugins that are installed.

    Editors complete and check TOML with it: start the file with a line
    `#:schema ./pipeline.schema.json`.
    """
    from ..config.schema import pipeline_schema, render, serve_schema
    from ..plugins import load

    click.echo(render((serve_schema if serve else pipeline_schema)(load())), nl=False)
