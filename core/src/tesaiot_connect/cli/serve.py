"""`serve`: the embedded broker."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import click

from . import logs, options

if TYPE_CHECKING:
    from ..config.serving import ServerConfig

log = logging.getLogger("tesaiot_connect.serve")


@click.command("serve")
@click.argument("file", metavar="FILE")
@options.overrides
@options.env_file
@options.logging_options
@click.pass_context
def command(
    ctx: click.Context,
    file: str,
    overrides: tuple[str, ...],
    env_file: str | None,
    log_format: str,
    log_level: str,
) -> None:
    """Run the broker that FILE describes, until SIGINT or SIGTERM.

    For example: tesaiot-connect serve broker.toml --set listeners.tcp.port=18830
    """
    from ..config.serving import load_server

    config = load_server(file, overrides=overrides, env_file=env_file)
    logs.configure(log_format, log_level, debug=ctx.obj["debug"])
    for warning in config.warnings:
        log.warning("%s", warning)
    asyncio.run(_serve(config))


async def _serve(config: ServerConfig) -> None:
    from ..server import Broker
    from ..signals import stopping_on_signals

    stop = asyncio.Event()
    with stopping_on_signals(stop):
        async with Broker(config.options).serving(config.listeners):
            await stop.wait()
            log.info("stopping")
