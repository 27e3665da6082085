"""`sandbox`: a stand-in of the platform on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import logs, options

if TYPE_CHECKING:
    from ..sandbox import Estate, Sandbox, SandboxOptions, Simulation

log = logging.getLogger("tesaiot_connect.sandbox")

_PORT = click.IntRange(0, 65535)
_USUAL = {"quic": 14567, "tls": 8883, "wss": 8085}


@click.command("sandbox")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--devices", type=click.IntRange(1, 1000), default=3, show_default=True, help="Of each organisation."
)
@click.option(
    "--organisation",
    "organisations",
    multiple=True,
    default=("acme",),
    show_default=True,
    metavar="NAME",
    help="May be repeated, to see that one cannot read another's devices.",
)
@click.option("--simulate", is_flag=True, help="Let all devices send telemetry.")
@click.option(
    "--simulate-over",
    type=click.Choice(list(_USUAL)),
    help="What simulated devices use. Default: the first of these that is installed.",
)
@click.option(
    "--interval", default="1s", show_default=True, metavar="TIME", help="Between two reports of a device."
)
@click.option("--quic-port", type=_PORT, default=_USUAL["quic"], show_default=True, help="0 is any.")
@click.option("--tls-port", type=_PORT, default=_USUAL["tls"], show_default=True, help="0 is any.")
@click.option("--wss-port", type=_PORT, default=_USUAL["wss"], show_default=True, help="0 is any.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--expose", is_flag=True, help="Allow a --host that other machines can reach.")
@click.option("--init-only", is_flag=True, help="Write the files, and end.")
@click.option("--json", "as_json", is_flag=True, help="Say what there is as one line of JSON.")
@options.logging_options
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    devices: int,
    organisations: tuple[str, ...],
    simulate: bool,
    simulate_over: str | None,
    interval: str,
    quic_port: int,
    tls_port: int,
    wss_port: int,
    host: str,
    expose: bool,
    init_only: bool,
    as_json: bool,
    log_format: str,
    log_level: str,
) -> None:
    """Run a stand-in of the platform on this machine, until SIGINT or SIGTERM.

    DIR gets everything: a CA, certificates, accounts, and a bundle for each device and for the
    organisation. A second start goes on with what is there; delete DIR to begin anew.

    For example: tesaiot-connect sandbox playground --simulate
    """
    from ..config.structure import Wrong, converter
    from ..protocols import Duration
    from ..sandbox import SandboxOptions, Simulation, initialise

    host = host.removeprefix("[").removesuffix("]")
    if not expose and not _loopback(host):
        raise click.UsageError(f"--host {host} lets other machines in: give --expose too, if that is meant")
    try:
        seconds = converter({}).structure(interval, Duration)
    except Wrong as error:
        raise click.UsageError(f"--interval: {error.message}. {error.fix}") from error
    logs.configure(log_format, log_level, debug=ctx.obj["debug"])
    asked = SandboxOptions(
        folder=folder,
        devices=devices,
        organisations=tuple(dict.fromkeys(organisations)),
        host=host,
        ports={"quic": quic_port, "tls": tls_port, "wss": wss_port},
    )
    if init_only:
        _say(*initialise(asked), as_json=as_json, runs=False)
        return
    simulation = None
    if simulate or simulate_over:
        simulation = Simulation(over=simulate_over, interval=seconds)
    asyncio.run(_run(asked, simulation, as_json, figures=log_format == "human"))


async def _run(asked: SandboxOptions, simulation: Simulation | None, as_json: bool, *, figures: bool) -> None:
    from ..sandbox import running
    from ..signals import stopping_on_signals

    stop = asyncio.Event()
    async with running(asked, simulation=simulation) as sandbox:
        with stopping_on_signals(stop):  # a signal before that ends the start
            _say(sandbox.estate, sandbox.urls, as_json=as_json, simulated=simulation is not None)
            if figures and sys.stderr.isatty():
                await _figures(sandbox, stop)
            await stop.wait()
            log.info("stopping; the next start on %s goes on from here", asked.folder)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(
    estate: Estate, urls: Mapping[str, str], *, as_json: bool, simulated: bool = False, runs: bool = True
) -> None:
    """On standard output: what there is, and what to do with it."""
    if as_json:
        said = {
            "folder": str(estate.folder),
            "urls": dict(urls),
            "organisations": {one.name: list(one.devices) for one in estate.organisations},
            "bundles": {
                **{one.name: str(one.folder) for one in estate.organisations},
                **{one.name: str(one.folder) for one in estate.devices},
            },
            "missing": list(estate.missing),
        }
        click.echo(json.dumps(said))
        return
    click.echo(_words(estate, urls, simulated, runs))


def _words(estate: Estate, urls: Mapping[str, str], simulated: bool, runs: bool) -> str:
    from ..sandbox import next_steps, start_command

    lines = [click.style(f"The platform's stand-in is in {_short(estate.folder)}", bold=True), ""]
    lines += [f"  {name:<6}{url}" for name, url in urls.items()]
    lines += [f"  {'':<6}{why}" for why in estate.missing]
    lines += [""]
    for one in estate.organisations:
        shown = ", ".join(one.devices[:4]) + (f" ... {one.devices[-1]}" if len(one.devices) > 4 else "")
        talk = ", which send telemetry now" if simulated else ""
        lines += [f"  {one.name:<6}{len(one.devices)} devices ({shown}){talk}"]
        lines += [f"  {'':<6}its bundle: {_short(one.folder)}"]
    lines += [f"  {'':<6}theirs:     {_short(estate.folder / 'devices')}{os.sep}<name>", ""]
    if not runs:
        start = _typed(start_command(estate.folder))
        lines += [click.style("Next, start it:", bold=True), "", f"  {start}", ""]
    lines += [click.style(f"{'Next' if runs else 'Then'}, in another terminal:", bold=True), ""]
    for what, line in next_steps(estate, urls):
        lines += [f"  # {what}", f"  {_typed(line)}", ""]
    lines += [
        f"In Python: {_short(estate.organisations[0].folder / 'QUICKSTART.md')}."
        + (" Ctrl-C stops." if runs else "")
    ]
    return "\n".join(lines)


def _typed(line: str) -> str:
    """A command line that works in this shell, where the program may not be on the PATH."""
    name, _, rest = line.partition(" ")
    program = Path(sys.argv[0]).absolute()
    if program.stem != name or shutil.which(name) is not None:
        return line
    return f"{shlex.quote(_short(program))} {rest}"


def _short(path: Path) -> str:
    """As one would type it from here."""
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return str(path)


async def _figures(sandbox: Sandbox, stop: asyncio.Event) -> None:
    """A live line on a terminal, below the log."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def table(received: float, sent: float) -> Table:
        stats = sandbox.broker.stats
        made = Table(box=None, pad_edge=False, header_style="bold")
        row = {
            "clients": stats.clients,
            "sessions": stats.sessions,
            "received": stats.received,
            "per s": received,
            "readings": sandbox.routing.readings,
            "sent": stats.sent,
            "per s ": sent,
            "waiting": stats.queued,
        }
        if dropped := sum(stats.dropped.values()):
            row["dropped"] = dropped
        for name in row:
            made.add_column(name, justify="right", no_wrap=True)
        made.add_row(*(f"{value:,.0f}" for value in row.values()))
        return made

    with Live(table(0, 0), console=Console(stderr=True), auto_refresh=False, redirect_stdout=False) as live:
        then, before = time.monotonic(), sandbox.broker.stats
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await stop.wait()
            now, stats = time.monotonic(), sandbox.broker.stats
            passed = max(now - then, 0.001)
            rates = (stats.received - before.received) / passed, (stats.sent - before.sent) / passed
            then, before = now, stats
            live.update(table(*rates), refresh=True)
