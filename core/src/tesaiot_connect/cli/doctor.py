"""`doctor`: which endpoints work, which one would be used, and what to do about the others."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import ProtocolError
from . import UNREACHABLE, logs, options
from .target import connections

if TYPE_CHECKING:
    from ..client import MqttConnection
    from ..diagnosis import Diagnosis, Plan

Progress = Callable[[str, str, str], None]


class _Seconds(click.ParamType):  # type: ignore[type-arg] # generic from click 8.3 on
    """A duration as in TOML, or a number of seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        import re

        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)?", str(value))
        seconds = float(found[1]) * {"ms": 0.001, "m": 60.0}.get(found[2] or "s", 1.0) if found else 0.0
        if not 0 < seconds <= 600:
            self.fail(f"{value!r} is no duration up to 10 minutes: write 5s, 500ms or 1m", param, ctx)
        return seconds


@click.command("doctor")
@click.argument("targets", metavar="FILE|DIR|URL...", nargs=-1, required=True)
@click.option("-c", "--connection", "name", metavar="NAME", help="Only this connection of FILE.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key of FILE; for URLs and bundles of the connection: --set tls.ca_file=ca.pem. May be repeated.",
)
@options.env_file
@click.option(
    "--topic",
    metavar="TOPIC",
    help="Send the echo through this topic: whoever subscribes to it gets one message. Default: a topic "
    "of its own, tesaiot-connect/doctor/<random>, which access rules may forbid.",
)
@click.option(
    "--throughput",
    is_flag=True,
    help="Send messages to the topic at QoS 1 for 2 s, 4 MiB at most, from each usable endpoint. Off by "
    "default: it is a load on the broker and on metered links, and counts against quotas.",
)
@click.option(
    "--timeout", type=_Seconds(), help="For each step, such as 5s. Default: what the connection has."
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON document.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="error")
@click.pass_context
def command(
    ctx: click.Context,
    targets: tuple[str, ...],
    name: str | None,
    overrides: tuple[str, ...],
    env_file: str | None,
    topic: str | None,
    throughput: bool,
    timeout: float | None,
    as_json: bool,
    log_level: str,
) -> None:
    """Try each endpoint alone, say what works and what to do about what does not.

    A target is a pipeline file, the folder of a bundle, or URLs, best first, as the endpoints of one
    connection. Tells of each endpoint: name, reach, handshake, certificate, upgrade to WebSocket, the
    broker's answer, and a message there and back; then which endpoint would be used now, and why.

    It disturbs nobody: it has client ids of its own, and leaves nothing at the broker. Exits 69 if a
    connection has no endpoint that can be used.
    """
    from ..mqtt.topics import check_topic

    if topic is not None:
        try:
            check_topic(topic)
        except ProtocolError as error:
            raise click.UsageError(str(error)) from error
    logs.configure("human", "critical" if log_level == "error" else log_level, debug=ctx.obj["debug"])
    chosen = connections(targets, overrides, env_file, name)
    if not chosen:
        click.echo("there are no connections to look at")
        return
    from ..diagnosis import Plan, document

    plan = Plan(timeout=timeout, throughput=throughput, **({"topic": topic} if topic else {}))
    with asyncio.Runner() as runner:
        with _shown_progress() as progress:
            found = runner.run(_diagnose(chosen, plan, progress))
        # before the runner ends: it waits for what a name server still owes
        if as_json:
            import msgspec

            click.echo(msgspec.json.format(msgspec.json.encode(document(found))).decode())
        else:
            from .findings import show

            show(found)
    ctx.exit(0 if all(one.usable for one in found) else UNREACHABLE)


async def _diagnose(chosen: Mapping[str, MqttConnection], plan: Plan, progress: Progress) -> list[Diagnosis]:
    from ..diagnosis import diagnose

    return await diagnose(chosen, plan, progress)


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """A line on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.markup import escape

    doing: dict[str, str] = {}
    with Console(stderr=True).status("looking") as status:

        def progress(connection: str, endpoint: str, what: str) -> None:
            doing[connection] = f"{endpoint}: {what}"
            status.update(escape("  ".join(doing.values())))

        yield progress
