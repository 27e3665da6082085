"""`check`: does every connection of a file work?"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import click

from ..errors import ConnectorError
from . import UNREACHABLE, logs, options
from .target import aside, bundle, is_bundle

if TYPE_CHECKING:
    from ..client import MqttConnection


@click.command("check")
@click.argument("file", metavar="FILE")
@options.overrides
@options.env_file
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="error")
@click.pass_context
def command(
    ctx: click.Context, file: str, overrides: tuple[str, ...], env_file: str | None, log_level: str
) -> None:
    """Connect every connection of FILE, move no data, and say how it went.

    FILE is a pipeline file, or the folder of a bundle.

    Uses a client id of its own (the configured one with "-check" at its end), so that a
    pipeline that is running keeps its session. Exits 69 if a connection cannot be made.
    """
    connections = _connections(file, overrides, env_file)
    logs.configure("human", log_level, debug=ctx.obj["debug"])
    if not connections:
        click.echo(f"{file}: right, and has no connections")
        return
    width = max(len(connection.name) for connection in connections)
    failed = asyncio.run(_check_all(connections, width))
    ctx.exit(UNREACHABLE if failed else 0)


def _connections(file: str, overrides: tuple[str, ...], env_file: str | None) -> list[MqttConnection]:
    if is_bundle(file):
        return [bundle(file, overrides, env_file)]
    from ..config import load

    found = load(file, overrides=overrides, env_file=env_file, need_pipelines=False)
    return list(found.connections.values())


async def _check_all(connections: list[MqttConnection], width: int) -> int:
    results = await asyncio.gather(*(_check(connection) for connection in connections))
    for connection, (good, text) in zip(connections, results, strict=True):
        click.secho(f"{connection.name:{width}}  {text}", fg=None if good else "red")
    return sum(not good for good, _ in results)


async def _check(connection: MqttConnection) -> tuple[bool, str]:

    began = time.monotonic()
    try:
        async with aside(connection, "check") as client:
            await client.connected(once=True)
            status = client.status
    except ConnectorError as error:
        return False, str(error)
    elapsed = (time.monotonic() - began) * 1000
    return True, f"ok  {status.endpoint} by {status.transport}, MQTT {status.version}, {elapsed:.0f} ms"
