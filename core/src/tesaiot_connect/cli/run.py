"""`run`: the pipelines of a file, until they end or are stopped."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from . import FAILED, logs, options

if TYPE_CHECKING:
    from ..runner import Summary

log = logging.getLogger("tesaiot_connect.run")


@click.command("run")
@click.argument("file", metavar="FILE")
@options.overrides
@options.env_file
@click.option("--once", is_flag=True, help="Move what is there now, then end.")
@click.option(
    "--require-healthy",
    is_flag=True,
    help="Exit 69 if a source or sink cannot be reached within 30 s, instead of trying for ever.",
)
@options.logging_options
@click.pass_context
def command(
    ctx: click.Context,
    file: str,
    overrides: tuple[str, ...],
    env_file: str | None,
    once: bool,
    require_healthy: bool,
    log_format: str,
    log_level: str,
) -> None:
    """Run the pipelines of FILE.

    The first SIGINT or SIGTERM drains: reading stops, what was read is written and
    acknowledged, connections are ended. A second one stops at once; what was not
    acknowledged will be sent again by the broker.
    """
    from ..config import load
    from ..runner import run_blocking

    config = load(file, overrides=overrides, env_file=env_file)
    logs.configure(log_format, log_level, debug=ctx.obj["debug"])
    for warning in config.warnings:
        log.info("note: %s", warning)
    with _figures(log_format) as on_stats:
        try:
            summary = run_blocking(
                config.pipelines, uvloop=True, once=once, require_healthy=require_healthy, on_stats=on_stats
            )
        except KeyboardInterrupt:
            log.warning("stopped at once: a broker sends again what was not acknowledged")
            raise
    _report(summary)
    if not summary.drained:
        log.error("stopped before everything was written; a broker sends the rest again")
        ctx.exit(FAILED)


@contextlib.contextmanager
def _figures(log_format: str) -> Iterator[Callable[[Any], None] | None]:
    """A live table where a person looks at a terminal, else nothing."""
    if log_format != "human" or not sys.stderr.isatty():
        yield None
        return
    from .figures import live_figures

    with live_figures() as update:
        yield update


def _report(summary: Summary) -> None:
    for pipeline in summary.pipelines:
        sinks = ", ".join(f"{sink.name} {sink.written}" for sink in pipeline.sinks)
        log.info(
            "%s: received %d, acknowledged %d, written: %s",
            pipeline.name,
            pipeline.received,
            pipeline.acknowledged,
            sinks,
        )
    if summary.lost:
        log.warning("given up without a dead-letter sink: %d", summary.lost)
