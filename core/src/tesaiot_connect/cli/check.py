"""`check`: does every connection of a file work?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ..errors import ConnectorError, Refused
from . import UNREACHABLE, logs, options
from .target import aside, connections

if TYPE_CHECKING:
    from ..client import MqttConnection
    from ..dialing import Attempt


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

    Below a connection stands which endpoints failed before that one, and which are left out;
    `doctor` looks closer. As with `run`, what works and what fails is remembered
    for the next connection.

    Uses a client id of its own (the configured one with "-check" at its end), so that a
    pipeline that is running keeps its session. Exits 69 if a connection cannot be made.
    """
    found = list(connections([file], overrides, env_file).values())
    logs.configure("human", log_level, debug=ctx.obj["debug"])
    if not found:
        click.echo(f"{file}: right, and has no connections")
        return
    width = max(len(connection.name) for connection in found)
    failed = asyncio.run(_check_all(found, width))
    ctx.exit(UNREACHABLE if failed else 0)


async def _check_all(found: Sequence[MqttConnection], width: int) -> int:
    results = await asyncio.gather(*(_check(connection) for connection in found))
    for connection, (good, text, beside) in zip(found, results, strict=True):
        click.secho(f"{connection.name:{width}}  {text}", fg=None if good else "red")
        for line in beside:
            click.secho(f"{'':{width}}  {line}", fg="yellow")
    return sum(not good for good, _, _ in results)


async def _check(connection: MqttConnection) -> tuple[bool, str, list[str]]:
    """Whether it works, how, and what became of its other endpoints."""
    began = time.monotonic()
    mute: list[str] = []
    most = len(getattr(connection.dialer, "endpoints", ())) or 1
    while True:
        async with aside(connection, "check") as client:
            try:
                await client.connected(once=True)
            except ConnectorError as error:
                status = client.status
                # a broker that does not answer CONNECT: the next dial prefers another endpoint, as in a run
                if not error.attempts and not isinstance(error, Refused) and len(mute) < most - 1:
                    mute.append(f"{status.url} failed: {error}")
                    continue
                left_out = [one for one in status.attempts if one.outcome == "left out"]
                # the error has the reasons of the others, and of the only one
                new = [_told(one) for one in left_out if one.reason not in str(error)]
                return False, str(error), [*mute, *new]
            status = client.status
        elapsed = (time.monotonic() - began) * 1000
        how = f"ok  {status.endpoint} by {status.transport}, MQTT {status.version}, {elapsed:.0f} ms"
        return True, how, [*mute, *(_told(one) for one in status.attempts if one.outcome != "won")]


def _told(attempt: Attempt) -> str:
    reason = attempt.reason.removeprefix(f"{attempt.endpoint}: ")
    fix = f". {attempt.fix}" if attempt.fix else ""
    return f"{attempt.endpoint} {attempt.outcome}: {reason}{fix}"
