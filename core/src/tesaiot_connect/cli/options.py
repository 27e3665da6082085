"""Options that several verbs have.

Owns: their spelling and meaning. Rule: an option means the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the file, for example sinks.archive.path=/tmp/a.db. May be repeated.",
)
env_file = click.option(
    "--env-file",
    metavar="FILE",
    help="Take variables that the environment does not have from NAME=value lines.",
)


def environment(env_file: str | None) -> Mapping[str, str]:
    """The variables with those of --env-file. Raises ConfigError."""
    if env_file is None:
        return os.environ
    from ..config.document import read_env_file

    return {**read_env_file(env_file), **os.environ}


def logging_options(function: F) -> F:
    """--log-format and --log-level."""
    choices = click.Choice(["debug", "info", "warning", "error"])
    function = click.option("--log-level", type=choices, default="info", show_default=True)(function)
    formats = click.Choice(["human", "json"])
    return click.option("--log-format", type=formats, default="human", show_default=True)(function)
