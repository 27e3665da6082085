"""The sandbox while it runs.

Owns: the order folder -> broker -> bundles -> simulated devices, and its end. Rule: when `running`
yields, everything is in place: whoever reads the bundles can connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import attrs

from ..config.serving import load_server
from ..errors import ConnectorError
from ..plugins import Catalog, load as load_catalog
from ..protocols import Url
from ..server import Broker
from .bundles import write_bundles
from .files import alone
from .folder import Estate, SandboxOptions, check_own, prepare
from .routing import Routing
from .simulated import simulate


@attrs.frozen(kw_only=True)
class Simulation:
    """Simulated devices: all that there are."""

    over: str | None = None
    """The way in that they use; default: the best."""
    interval: float = 1.0
    """Seconds between two reports of a device."""


@attrs.frozen(kw_only=True)
class Sandbox:
    """A sandbox that runs."""

    estate: Estate
    urls: Mapping[str, str]
    """Way in to where it is, best first."""
    broker: Broker
    routing: Routing


def initialise(options: SandboxOptions, catalog: Catalog | None = None) -> tuple[Estate, Mapping[str, str]]:
    """Write everything, start nothing. The bundles name the ports of the options, the platform's
    own instead of 0. Raises ConnectorError."""
    check_own(options.folder.absolute())
    with alone(options.folder.absolute()):
        estate = prepare(options, catalog or load_catalog())
        urls = {
            way.name: _url(options, way.scheme, options.port(way) or way.port, way.path)
            for way in estate.ways
        }
        write_bundles(estate, urls)
    return estate, urls


@asynccontextmanager
async def running(
    options: SandboxOptions, *, simulation: Simulation | None = None, catalog: Catalog | None = None
) -> AsyncIterator[Sandbox]:
    """While open, the platform's stand-in runs. Raises ConnectorError."""
    catalog = catalog or load_catalog()
    check_own(options.folder.absolute())
    async with AsyncExitStack() as stack:
        stack.enter_context(alone(options.folder.absolute()))
        estate = await _prepared(options, catalog)
        config = load_server(estate.folder / "platform.toml", environ={}, catalog=catalog)
        routing = Routing()
        broker = Broker(config.options, derive=routing)
        try:
            addresses = await stack.enter_async_context(broker.serving(config.listeners))
        except ConnectorError as error:
            raise _taken(error, options, estate) from error
        bound = dict(zip((one.name for one in config.listeners), map(Url.parse, addresses), strict=True))
        urls: dict[str, str] = {
            way.name: _url(options, way.scheme, bound[way.name].port, way.path) for way in estate.ways
        }
        await asyncio.to_thread(write_bundles, estate, urls)
        if simulation is not None:
            over = simulation.over or estate.ways[0].name
            if over not in urls:
                raise ConnectorError(f"devices cannot be simulated over {over}: {'; '.join(estate.missing)}")
            task = asyncio.create_task(
                simulate(estate.devices, urls[over], catalog, interval=simulation.interval)
            )
            stack.push_async_callback(_cancelled, task)
        yield Sandbox(estate=estate, urls=urls, broker=broker, routing=routing)


async def _prepared(options: SandboxOptions, catalog: Catalog) -> Estate:
    """Passwords take a while for many devices; who does not want to wait that long stops it between two."""
    stop = threading.Event()
    made = asyncio.create_task(asyncio.to_thread(prepare, options, catalog, stop))
    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(ConnectorError):
            await made
        raise


def _url(options: SandboxOptions, scheme: str, port: int, path: str) -> str:
    """As clients on this machine say it; the certificate has these names."""
    host = options.host
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified or host in ("127.0.0.1", "::1"):
            host = "localhost"
    return str(Url(scheme, host, port, path))


def _taken(error: ConnectorError, options: SandboxOptions, estate: Estate) -> ConnectorError:
    """Says how to use other ports, where one is taken."""
    cause = error.__cause__
    if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
        return error
    at = next((way for way in estate.ways if f"port {options.port(way)}:" in error.what), estate.ways[0])
    return ConnectorError(
        error.what,
        fix=f"end what uses port {options.port(at)}, another sandbox perhaps, or use another one: "
        f"--{at.name}-port 0 takes any that is free",
    )


async def _cancelled(task: asyncio.Task[None]) -> None:
    """End a task; raises what it failed with."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
