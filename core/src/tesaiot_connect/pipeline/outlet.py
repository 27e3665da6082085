"""One sink of one pipeline: its live writer, its retries, and what becomes of what it cannot write.

Owns: everything between "here is a batch" and "this sink is done with it". Rule: `deliver`
returns only when each element was written, or was given up the way `on_error` says; whatever
the sink raises, the flow goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

import attrs

from ..backoff import Backoff
from ..errors import ConnectorError, EndOfOutput, PartialDelivery, PayloadError, PublishRefused
from ..message import Batch, Message, Record
from ..protocols import Writer
from .specs import OnError, SinkSpec
from .stats import SinkStats

log = logging.getLogger("tesaiot_connect.pipeline")

Items = Batch | Sequence[Record]
Failure = tuple[Message, float, BaseException]
"""A message as it came, when it was received, and why it is given up."""
GiveUp = Callable[[Sequence[Failure]], Coroutine[Any, Any, None]]

PERMANENT = (PublishRefused, PayloadError)
"""Errors of one message that trying again cannot cure."""
_HURRIED = 1.0
"""Seconds between attempts, at most, while the run is ending."""


@runtime_checkable
class Ready(Protocol):
    """What a reader or writer may offer when opening it does not prove that it works."""

    async def ready(self, within: float, /) -> None:
        """Returns once the other side was reached. Raises Disconnected if that takes longer than
        `within` seconds, with the reason."""
        ...


@attrs.frozen(kw_only=True)
class Persistence:
    """How hard to try. `hurry` is set when the run is to end: waits are cut short from then on."""

    on_error: OnError
    retry: Backoff
    max_attempts: int
    hurry: asyncio.Event

    def exhausted(self, attempts: int) -> bool:
        return self.on_error != "retry" and attempts >= self.max_attempts

    def delay(self, delays: Iterator[float]) -> float:
        """Seconds to the next attempt: from `delays`, at most one while the run is ending."""
        return min(next(delays), _HURRIED) if self.hurry.is_set() else next(delays)

    async def pause(self, delay: float) -> None:
        if self.hurry.is_set():
            await asyncio.sleep(min(delay, _HURRIED))
            return
        try:
            async with asyncio.timeout(delay):
                await self.hurry.wait()
        except TimeoutError:
            pass


def explain(error: BaseException) -> str:
    """An error in one line; the class where its words alone would not do."""
    text = str(error)
    return text if isinstance(error, ConnectorError) and text else f"{type(error).__name__}: {text}"


def traceback_of(error: BaseException) -> BaseException | None:
    """The error where its traceback helps: it is a mistake in code, not something that happens."""
    return None if isinstance(error, ConnectorError | OSError) else error


class Outlet:
    """A sink, opened again as often as needed. All calls must come from one task."""

    def __init__(
        self,
        spec: SinkSpec,
        *,
        pipeline: str,
        encode: Callable[[Sequence[Any]], list[bytes]] | None,
        persistence: Persistence,
        stats: SinkStats,
        give_up: GiveUp,
    ) -> None:
        """`encode` turns records into messages, for a sink that reads those."""
        self._spec = spec
        self._label = f"sink {spec.name!r} of pipeline {pipeline!r}"
        self._encode = encode
        self._persistence = persistence
        self._stats = stats
        self._give_up = give_up
        self._context: AbstractAsyncContextManager[Writer] | None = None
        self._writer: Writer | None = None

    async def start(self, *, must: float | None) -> None:
        """Open the sink. A failure is raised if it `must` work (seconds it may take to be `ready`),
        else it is left to the first `deliver`."""
        try:
            await self._open()
        except Exception as error:
            if must is not None:
                raise
            self._failed(error)
            log.warning("%s cannot be opened: %s", self._label, explain(error), exc_info=traceback_of(error))

    async def ready(self, within: float) -> None:
        live: object = self._writer
        if isinstance(live, Ready):
            await live.ready(within)

    async def close(self) -> None:
        """Never raises."""
        context, self._context, self._writer = self._context, None, None
        if context is not None:
            try:
                await context.__aexit__(None, None, None)
            except Exception as error:  # noqa: BLE001 - a sink of anybody's
                log.warning("%s did not close well: %s", self._label, explain(error))

    async def deliver(self, items: Items) -> None:
        if self._encode is not None and not isinstance(items, Batch):
            items = await self._encoded(items, self._encode)
        if size(items):
            await self._deliver(items)

    async def _deliver(self, items: Items) -> None:
        persistence, stats = self._persistence, self._stats
        attempts = 0
        delays: Iterator[float] | None = None
        while True:
            try:
                writer = self._writer or await self._open()
            except Exception as failure:  # noqa: BLE001 - a sink of anybody's
                error: BaseException = failure
            else:
                try:
                    await writer.write(items)
                except PartialDelivery as partial:
                    items, failed = await self._part(items, partial)
                    if failed is None:
                        self._works()
                        return
                    error = failed
                except PERMANENT as refusal:
                    await self.close()
                    count = size(items)
                    if count == 1:
                        stats.refused += await self._lose(items, refusal)
                        return
                    await self._deliver(pick(items, range(count // 2)))
                    items = pick(items, range(count // 2, count))
                    continue
                except EndOfOutput:
                    raise
                except Exception as failure:  # noqa: BLE001 - a sink of anybody's
                    await self.close()
                    error = failure
                else:
                    stats.written += size(items)
                    stats.batches += 1
                    if stats.failing:
                        self._works()
                    return
            attempts += 1
            self._failed(error)
            if persistence.exhausted(attempts):
                lost = await self._lose(items, error)
                log.error("%s gave up %d messages after %d attempts: %s", self._label, lost, attempts, error)
                return
            delays = delays or persistence.retry.delays()
            delay = persistence.delay(delays)
            stats.retries += 1
            log.warning(
                "%s failed (attempt %d, next in %.1f s): %s",
                self._label, attempts, delay, explain(error), exc_info=traceback_of(error),
            )  # fmt: skip
            await persistence.pause(delay)

    async def _open(self) -> Writer:
        await self.close()
        context = self._spec.recipe.open()
        self._writer = await context.__aenter__()
        self._context = context
        return self._writer

    async def _part(self, items: Items, partial: PartialDelivery) -> tuple[Items, BaseException | None]:
        """What is left to try again, and why; nothing is left if all failures are permanent."""
        if strangers := partial.failures.keys() - set(range(size(items))):
            wrong = IndexError(f"it reports failures of what it was not given: {list(strangers)[:3]}")
            wrong.__cause__ = partial
            return items, wrong
        final = {i: e for i, e in partial.failures.items() if isinstance(e, PERMANENT)}
        again = sorted(partial.failures.keys() - final.keys())
        self._stats.written += size(items) - len(partial.failures)
        if final:
            failures = [failure for i in sorted(final) for failure in lost(pick(items, (i,)), final[i])]
            self._stats.refused += await self._account(failures)
        if not again:
            self._stats.batches += 1
            return items, None
        return pick(items, again), partial.failures[again[0]]

    async def _encoded(
        self, records: Sequence[Record], encode: Callable[[Sequence[Any]], list[bytes]]
    ) -> Batch:
        payloads: list[bytes]
        try:
            payloads = encode([record.value for record in records])
            whole = len(payloads) == len(records)
        except Exception:  # noqa: BLE001 - found one by one below
            whole = False
        if not whole:
            payloads, kept, failures = [], [], []
            for record in records:
                try:
                    (payload,) = encode([record.value])
                except Exception as error:  # noqa: BLE001 - a serializer of anybody's
                    failures.append((record.message, record.time, error))
                else:
                    payloads.append(payload)
                    kept.append(record)
            records = kept
            if failures:
                self._stats.refused += await self._account(failures)
        messages = [
            Message(record.route.topic, payload, was.qos, was.retain, was.properties)
            for record, payload in zip(records, payloads, strict=True)
            for was in (record.message,)
        ]
        return Batch(messages, records[0].time if records else 0.0)

    async def _lose(self, items: Items, error: BaseException) -> int:
        return await self._account(lost(items, error))

    async def _account(self, failures: Sequence[Failure]) -> int:
        """Give messages up; returns how many of them count as refused, and counts the others."""
        self._failed(failures[0][2])
        await self._give_up(failures)
        match self._persistence.on_error:
            case "drop":
                self._stats.dropped += len(failures)
            case "dead_letter":
                self._stats.dead_lettered += len(failures)
            case _:
                return len(failures)
        return 0

    def _failed(self, error: BaseException) -> None:
        self._stats.failing = True
        self._stats.last_error = explain(error)

    def _works(self) -> None:
        if self._stats.failing:
            self._stats.failing = False
            log.info("%s works", self._label)


class Worker:
    """Runs an outlet in a task of its own, for those that must not wait for each other."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._inbox: asyncio.Queue[tuple[Items, asyncio.Future[None]] | None] = asyncio.Queue()

    async def run(self, opened: asyncio.Barrier, *, must: float | None) -> None:
        try:
            await opened.wait()
            await self._outlet.start(must=must)
            await opened.wait()
            if must is not None:
                await self._outlet.ready(must)
            while (job := await self._inbox.get()) is not None:
                items, done = job
                await self._outlet.deliver(items)
                if not done.done():
                    done.set_result(None)
        finally:
            await self._outlet.close()

    def hand(self, items: Items) -> asyncio.Future[None]:
        """Done when the outlet is done with them. The caller waits, so the inbox stays short."""
        done = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((items, done))
        return done

    def finish(self) -> None:
        """There will be no more."""
        self._inbox.put_nowait(None)


def size(items: Items) -> int:
    return len(items.messages) if isinstance(items, Batch) else len(items)


def pick(items: Items, indexes: Sequence[int]) -> Items:
    if isinstance(items, Batch):
        return Batch([items.messages[i] for i in indexes], items.received)
    return [items[i] for i in indexes]


def lost(items: Items, error: BaseException) -> list[Failure]:
    if isinstance(items, Batch):
        return [(message, items.received, error) for message in items.messages]
    return [(record.message, record.time, error) for record in items]
