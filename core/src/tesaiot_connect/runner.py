"""Runs pipelines from start to end.

Owns: opening everything before data moves, stopping (drain, then at once), and the figures of a
run. Rule: `run` belongs to whoever embeds it: it installs no signal handler, starts no thread
and leaves nothing behind. Signals are the business of `run_blocking` alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs

from .errors import ConnectorError
from .pipeline import Feed, PipelineSpec, PipelineStats, Pump, SourceSpec, Tee
from .protocols import Source
from .signals import stopping_on_signals

log = logging.getLogger("tesaiot_connect.runner")

OnStats = Callable[[Sequence[PipelineStats]], None]


@runtime_checkable
class EndsWhenEmpty(Protocol):
    """A source that can also be read to its present end, for `once`."""

    def once(self) -> Source:
        """The recipe that ends when what is there now has been read."""
        ...


@attrs.frozen
class Summary:
    """What a run did."""

    pipelines: tuple[PipelineStats, ...]
    seconds: float
    stopped: bool
    """Whether it was asked to stop; else its sources came to their end."""
    drained: bool
    """Whether all that was read is settled. If not, a broker will send it again."""

    @property
    def received(self) -> int:
        return sum(pipeline.received for pipeline in self.pipelines)

    @property
    def acknowledged(self) -> int:
        return sum(pipeline.acknowledged for pipeline in self.pipelines)

    @property
    def lost(self) -> int:
        """Messages that were given up without a dead-letter sink."""
        return sum(
            pipeline.dropped + sum(sink.dropped + sink.refused for sink in pipeline.sinks)
            for pipeline in self.pipelines
        )


async def run(
    pipelines: Sequence[PipelineSpec],
    *,
    once: bool = False,
    require_healthy: bool = False,
    healthy_within: float = 30.0,
    stop: asyncio.Event | None = None,
    drain_timeout: float = 30.0,
    on_stats: OnStats | None = None,
    stats_interval: float = 1.0,
) -> Summary:
    """Run until every source has ended, or until `stop` is set and what was read is settled.

    `once` ends when what is there now has been moved. With `require_healthy` a source or sink
    that cannot be opened, or not be reached within `healthy_within` seconds, raises its error;
    without it, that is tried again for ever. After `stop`, what is not settled within
    `drain_timeout` seconds is left unsettled (a broker sends it again). Cancelling is a stop
    without a drain. `on_stats` is called every `stats_interval` seconds and at the end.

    Raises Disconnected (`require_healthy`), EndOfOutput, and whatever a mistake in a plugin raises
    outside of its reads and writes.
    """
    if once:
        pipelines = _ending(pipelines)
    stop = stop or asyncio.Event()
    hurry = asyncio.Event()
    must = healthy_within if require_healthy else None
    stats = [PipelineStats(pipeline.name, pipeline.source.name) for pipeline in pipelines]
    feeds, live = _assemble(pipelines, stats, hurry)
    opened = asyncio.Barrier(max(1, sum(part.parties for part in live)))

    async def flow() -> None:
        async with asyncio.TaskGroup() as group:
            for part in live:
                group.create_task(part.run(opened, must=must))

    started = time.monotonic()
    flowing = asyncio.create_task(flow(), name="tesaiot-pipelines")
    asked = asyncio.create_task(stop.wait(), name="tesaiot-stop")
    try:
        await _watch((flowing, asked), stats, on_stats, stats_interval)
        if not flowing.done():
            log.info("stopping: what was read is being settled, for at most %.0f s", drain_timeout)
            hurry.set()
            for feed in feeds:
                feed.stop()
            await _watch((flowing,), stats, on_stats, stats_interval, drain_timeout)
        drained = flowing.done()
    finally:
        asked.cancel()
        flowing.cancel()
        await asyncio.wait((flowing, asked))
        error = None if flowing.cancelled() else flowing.exception()
    if error is not None:
        raise _first(error)
    if on_stats is not None:
        on_stats(stats)
    return Summary(tuple(stats), time.monotonic() - started, stop.is_set(), drained)


def run_blocking(
    pipelines: Sequence[PipelineSpec],
    *,
    uvloop: bool = False,
    once: bool = False,
    require_healthy: bool = False,
    drain_timeout: float = 30.0,
    on_stats: OnStats | None = None,
) -> Summary:
    """`run` for a program that is nothing else: SIGINT and SIGTERM drain, a second one stops at
    once (KeyboardInterrupt). `uvloop` is used if asked for and installed."""

    async def main() -> Summary:
        stop = asyncio.Event()
        with stopping_on_signals(stop):
            return await run(
                pipelines,
                once=once,
                require_healthy=require_healthy,
                stop=stop,
                drain_timeout=drain_timeout,
                on_stats=on_stats,
            )

    try:
        with asyncio.Runner(loop_factory=_uvloop() if uvloop else None) as runner:
            return runner.run(main())
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error


def _assemble(
    pipelines: Sequence[PipelineSpec], stats: Sequence[PipelineStats], hurry: asyncio.Event
) -> tuple[list[Feed], list[Pump | Tee]]:
    """A feed for each source; pipelines that share one read it through a tee."""
    groups: dict[int, list[tuple[PipelineSpec, PipelineStats]]] = {}
    for pipeline, figures in zip(pipelines, stats, strict=True):
        groups.setdefault(id(pipeline.source), []).append((pipeline, figures))
    feeds: list[Feed] = []
    live: list[Pump | Tee] = []
    for group in groups.values():
        first = group[0][0]
        feed = Feed(first.source, retry=first.retry, hurry=hurry, stats=[figures for _, figures in group])
        feeds.append(feed)
        if len(group) == 1:
            live.append(Pump(first, feed, group[0][1], hurry))
        else:
            tee = Tee(feed, len(group))
            live.append(tee)
            for (pipeline, figures), share in zip(group, tee.shares, strict=True):
                live.append(Pump(pipeline, share, figures, hurry))
    return feeds, live


def _ending(pipelines: Sequence[PipelineSpec]) -> list[PipelineSpec]:
    """The same pipelines over sources that end; those that shared a source still do."""
    ending: dict[int, SourceSpec] = {}
    out = []
    for pipeline in pipelines:
        source = pipeline.source
        if id(source) not in ending:
            recipe = source.recipe
            ending[id(source)] = (
                attrs.evolve(source, recipe=recipe.once()) if isinstance(recipe, EndsWhenEmpty) else source
            )
        out.append(attrs.evolve(pipeline, source=ending[id(source)]))
    return out


async def _watch(
    tasks: Sequence[asyncio.Task[Any]],
    stats: Sequence[PipelineStats],
    on_stats: OnStats | None,
    interval: float,
    limit: float = math.inf,
) -> None:
    """Until one of the tasks is done, at most `limit` seconds."""
    before = [figures.received for figures in stats]
    then = time.monotonic()
    end = then + limit
    while True:
        left = end - time.monotonic()
        wait = min(left, interval) if on_stats else left
        done, _ = await asyncio.wait(
            tasks, timeout=None if wait == math.inf else max(0, wait), return_when=asyncio.FIRST_COMPLETED
        )
        if done or time.monotonic() >= end:
            return
        now = time.monotonic()
        for figures, received in zip(stats, before, strict=True):
            figures.rate = (figures.received - received) / (now - then)
        before, then = [figures.received for figures in stats], now
        if on_stats is not None:
            on_stats(stats)


def _first(error: BaseException) -> BaseException:
    """The error a person should read, out of a group of errors."""
    leaves: list[BaseException] = []
    todo = [error]
    while todo:
        one = todo.pop(0)
        if isinstance(one, BaseExceptionGroup):
            todo = [*one.exceptions, *todo]
        else:
            leaves.append(one)
    return next((leaf for leaf in leaves if isinstance(leaf, ConnectorError)), leaves[0])


def _uvloop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
