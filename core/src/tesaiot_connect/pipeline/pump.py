"""The pump itself: one reader, several outlets, one acknowledgement.

Owns: reading (and opening the source again), decoding, the process step, and the order of
things: every outlet is done before the delivery is acknowledged. Rule: one batch at a time for
each pipeline; while the sinks write, the source gathers the next one.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import logging
import math
import time
from collections.abc import AsyncIterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import attrs
import msgspec

from ..backoff import Backoff
from ..errors import EndOfInput, PayloadError
from ..message import Batch, Delivery, Message, Record, Route, Undecodable
from ..protocols import RawSerializer, Reader
from .outlet import PERMANENT, Failure, Outlet, Persistence, Ready, Worker, explain, traceback_of
from .routes import Routes
from .specs import PipelineSpec, SinkSpec, SourceSpec
from .stats import PipelineStats, SinkStats

log = logging.getLogger("tesaiot_connect.pipeline")

LOG_INTERVAL = 1.0
"""Seconds; messages that are given up are logged at most this often for each pipeline."""


class Readable(Protocol):
    """What a pump reads from: a feed, or a share of one."""

    async def start(self, *, must: float | None) -> None: ...
    async def ready(self, within: float) -> None: ...
    async def read(self) -> Delivery | None:
        """None when there will be no more."""
        ...

    async def close(self) -> None: ...


class Feed:
    """A source, opened again as often as needed. All calls but `stop` must come from one task."""

    def __init__(
        self, spec: SourceSpec, *, retry: Backoff, hurry: asyncio.Event, stats: Sequence[PipelineStats]
    ) -> None:
        self._spec = spec
        self._label = f"source {spec.name!r}"
        self._persistence = Persistence(on_error="retry", retry=retry, max_attempts=1, hurry=hurry)
        self._stats = stats
        self._delays = retry.delays()
        self._stopped = False
        self._reading: asyncio.Task[Any] | None = None
        self._context: AbstractAsyncContextManager[Reader] | None = None
        self._reader: Reader | None = None

    async def start(self, *, must: float | None) -> None:
        try:
            await self._open()
        except Exception as error:
            if must is not None:
                raise
            self._lost(error)
            log.warning("%s cannot be opened: %s", self._label, explain(error), exc_info=traceback_of(error))

    async def ready(self, within: float) -> None:
        live: object = self._reader
        if isinstance(live, Ready):
            await live.ready(within)

    async def read(self) -> Delivery | None:
        task = self._reading = asyncio.current_task()
        try:
            while not self._stopped:
                try:
                    reader = self._reader or await self._open()
                    return await reader.read()
                except EndOfInput:
                    return None
                except Exception as error:  # noqa: BLE001 - a source of anybody's
                    await self._recover(error)
            return None
        except asyncio.CancelledError:
            if self._stopped and task is not None and task.uncancel() == 0:
                return None
            raise
        finally:
            self._reading = None

    def stop(self) -> None:
        """Let the present or next `read` end. What was read before stays to be settled."""
        if not self._stopped:
            self._stopped = True
            if self._reading is not None:
                self._reading.cancel()

    async def close(self) -> None:
        """Never raises."""
        context, self._context, self._reader = self._context, None, None
        if context is not None:
            try:
                await context.__aexit__(None, None, None)
            except Exception as error:  # noqa: BLE001 - a source of anybody's
                log.warning("%s did not close well: %s", self._label, explain(error))

    async def _open(self) -> Reader:
        await self.close()
        context = self._spec.recipe.open()
        self._reader = await context.__aenter__()
        self._context = context
        return self._reader

    async def _recover(self, error: Exception) -> None:
        """After a loss: close, wait; the next turn opens the source again."""
        if self._reader is not None:
            self._delays = self._persistence.retry.delays()
            for stats in self._stats:
                stats.reopened += 1
        await self.close()
        self._lost(error)
        delay = self._persistence.delay(self._delays)
        log.warning(
            "%s failed (next attempt in %.1f s): %s",
            self._label, delay, explain(error), exc_info=traceback_of(error),
        )  # fmt: skip
        await self._persistence.pause(delay)

    def _lost(self, error: BaseException) -> None:
        for stats in self._stats:
            stats.last_error = explain(error)


class Share:
    """What one of several pipelines sees of a feed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Delivery | None] = asyncio.Queue(1)
        self._taken = False

    async def start(self, *, must: float | None) -> None:
        return None

    async def ready(self, within: float) -> None:
        return None

    async def read(self) -> Delivery | None:
        if self._taken:
            self.queue.task_done()
            self._taken = False
        delivery = await self.queue.get()
        if delivery is None:
            self.queue.task_done()
        else:
            self._taken = True
        return delivery

    async def close(self) -> None:
        return None


class Tee:
    """Reads one feed for several pipelines. The slowest holds the source back."""

    def __init__(self, feed: Feed, pipelines: int) -> None:
        self._feed = feed
        self.shares = tuple(Share() for _ in range(pipelines))
        self.parties = 1

    async def run(self, opened: asyncio.Barrier, *, must: float | None) -> None:
        feed, shares = self._feed, self.shares
        try:
            await feed.start(must=must)
            await opened.wait()
            await opened.wait()
            if must is not None:
                await feed.ready(must)
            while (delivery := await feed.read()) is not None:
                parts = delivery.split([delivery.batch] * len(shares))
                for share, part in zip(shares, parts, strict=True):
                    await share.queue.put(part)
            for share in shares:
                await share.queue.put(None)
            for share in shares:
                await share.queue.join()
        finally:
            await feed.close()


class Pump:
    """One pipeline at work."""

    def __init__(
        self, spec: PipelineSpec, source: Readable, stats: PipelineStats, hurry: asyncio.Event
    ) -> None:
        self._spec = spec
        self._source = source
        self._stats = stats
        self._persistence = Persistence(
            on_error=spec.on_error, retry=spec.retry, max_attempts=spec.max_attempts, hurry=hurry
        )
        self._routes = Routes(spec.source.topic_fields)
        self._logged = -math.inf
        serializer = spec.source.serializer
        self._wants_values = [spec.process is not None or _wants_records(sink, spec) for sink in spec.sinks]
        decode = serializer.decode
        if (
            spec.process is None
            and isinstance(serializer, RawSerializer)
            and all(
                sink.recipe.reads == "raw_records"
                for sink, wants in zip(spec.sinks, self._wants_values, strict=True)
                if wants
            )
        ):
            decode = serializer.decode_raw
        self._decode = decode
        outlets = []
        for sink in spec.sinks:
            sink_stats = SinkStats(sink.name)
            stats.sinks.append(sink_stats)
            outlets.append(
                Outlet(
                    sink,
                    pipeline=spec.name,
                    encode=(sink.serializer or serializer).encode
                    if sink.recipe.reads == "messages"
                    else None,
                    persistence=self._persistence,
                    stats=sink_stats,
                    give_up=self._give_up,
                )
            )
        self._first = outlets[0]
        self._others = [Worker(outlet) for outlet in outlets[1:]]
        self._dead = self._dead_letters(spec.dead_letter) if spec.dead_letter else None

    @property
    def parties(self) -> int:
        """How many tasks of this pump come to the barrier."""
        return 1 + len(self._workers)

    @property
    def _workers(self) -> list[Worker]:
        return [*self._others, self._dead] if self._dead else self._others

    async def run(self, opened: asyncio.Barrier, *, must: float | None) -> None:
        """Until the source has no more or is stopped. Meets the others at `opened` twice: when the
        sources are open, and when the sinks are; only then it moves data. With `must`, what is
        not `ready` in that many seconds raises."""
        async with asyncio.TaskGroup() as group:
            for worker in self._workers:
                group.create_task(worker.run(opened, must=must))
            try:
                await self._source.start(must=must)
                await opened.wait()
                await self._first.start(must=must)
                await opened.wait()
                if must is not None:
                    await self._source.ready(must)
                    await self._first.ready(must)
                await self._flow()
            finally:
                await self._source.close()
                await self._first.close()
            for worker in self._workers:
                worker.finish()

    async def _flow(self) -> None:
        source, stats = self._source, self._stats
        while (delivery := await source.read()) is not None:
            batch = delivery.batch
            payloads = [message.payload for message in batch.messages]
            stats.received += len(payloads)
            stats.bytes += sum(map(len, payloads))
            stats.batches += 1
            if payloads:
                await self._move(batch, payloads)
            try:
                await delivery.ack()
            except Exception as error:
                log.warning(
                    "pipeline %r could not acknowledge %d messages, so they may come again: %s",
                    stats.name, len(payloads), explain(error), exc_info=traceback_of(error),
                )  # fmt: skip
            else:
                stats.acknowledged += len(payloads)

    async def _move(self, batch: Batch, payloads: list[bytes]) -> None:
        wants = self._wants_values
        records: Sequence[Record] = ()
        if True in wants:
            records = await self._records(batch, payloads)
            if self._spec.process is not None:
                records = await self._processed(list(records))
        others = [
            worker.hand(records if values else batch)
            for worker, values in zip(self._others, wants[1:], strict=True)
            if records or not values
        ]
        if records or not wants[0]:
            await self._first.deliver(records if wants[0] else batch)
        for done in others:
            await done

    async def _records(self, batch: Batch, payloads: list[bytes]) -> Sequence[Record]:
        """The decodable messages; the others are given up."""
        values = self._decoded(payloads)
        records = self._routes.records(batch.messages, batch.received, values)
        if Undecodable not in set(map(type, values)):
            return records
        bad = [record for record in records if type(record.value) is Undecodable]
        self._stats.undecodable += len(bad)
        await self._lose([(record.message, record.time, record.value.error) for record in bad])
        return [record for record in records if type(record.value) is not Undecodable]

    def _decoded(self, payloads: list[bytes]) -> list[Any]:
        """A value for each payload, whatever the serializer does."""
        try:
            values = self._decode(payloads)
        except Exception as failure:  # noqa: BLE001 - a serializer of anybody's
            error: Exception = failure
        else:
            if len(values) == len(payloads):
                return values
            error = PayloadError(f"the serializer made {len(values)} values of {len(payloads)} payloads")
        if len(payloads) == 1:
            return [Undecodable(error, payloads[0])]
        return [value for payload in payloads for value in self._decoded([payload])]

    async def _processed(self, records: list[Record], attempts: int = 0) -> list[Record]:
        """The records to go on with. A step that raises is treated as a sink that fails: tried
        again, and in the end one record at a time, so that only those it fails on are given up."""
        persistence, stats = self._persistence, self._stats
        delays = persistence.retry.delays()
        originals = [(record.message, record.time) for record in records]
        while records:
            try:
                return await self._call_process(records)
            except Exception as failure:  # noqa: BLE001 - a user's function
                error = failure
            attempts += 1
            stats.last_error = explain(error)
            if isinstance(error, PERMANENT) or persistence.exhausted(attempts):
                break
            delay = persistence.delay(delays)
            stats.retries += 1
            log.warning(
                "process step of pipeline %r failed (attempt %d, next in %.1f s): %s",
                stats.name, attempts, delay, explain(error), exc_info=traceback_of(error),
            )  # fmt: skip
            await persistence.pause(delay)
            records = self._again(originals)
        if len(originals) == 1:
            message, received = originals[0]
            await self._lose([(message, received, error)])
            return []
        kept: list[Record] = []
        for original in originals:
            kept += await self._processed(self._again([original]), persistence.max_attempts - 1)
        return kept

    async def _call_process(self, records: list[Record]) -> list[Record]:
        process = self._spec.process
        assert process is not None
        try:
            result = process(records)
            if inspect.isawaitable(result):
                result = await result
            if result is None:
                return []
            out = [record async for record in result] if isinstance(result, AsyncIterable) else list(result)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RuntimeError("the process step was cancelled from within") from error
        if strangers := set(map(type, out)) - {Record}:
            raise TypeError(f"the process step must return records, it returned a {strangers.pop().__name__}")
        for name, kind in (("route", Route), ("message", Message)):
            if strangers := {type(getattr(record, name)) for record in out} - {kind}:
                raise TypeError(
                    f"the process step must return records whose {name} is a {kind.__name__}, "
                    f"it returned one with a {strangers.pop().__name__}"
                )
        return out

    def _again(self, originals: Sequence[tuple[Message, float]]) -> list[Record]:
        """Fresh records: the step may have changed those it was given before it raised."""
        values = self._decoded([message.payload for message, _ in originals])
        return [
            Record(self._routes.route(message.topic), received, value, message)
            for (message, received), value in zip(originals, values, strict=True)
        ]

    async def _lose(self, failures: Sequence[Failure]) -> None:
        """Give up messages that no sink has seen."""
        self._stats.last_error = explain(failures[0][2])
        await self._give_up(failures)
        if self._dead is None:
            self._stats.dropped += len(failures)
        else:
            self._stats.dead_lettered += len(failures)

    async def _give_up(self, failures: Sequence[Failure]) -> None:
        """Log, and hand to the dead-letter sink where there is one: returns when it has them."""
        message, _, error = failures[0]
        now = time.monotonic()
        if now - self._logged >= LOG_INTERVAL:
            self._logged = now
            kept = 'To keep such messages: on_error = "dead_letter"'
            log.warning(
                "pipeline %r %s %d of a batch, the first on topic %r: %s%s",
                self._stats.name, "puts aside" if self._dead else "drops", len(failures), message.topic,
                explain(error), "" if self._dead else f". {kept}", exc_info=traceback_of(error),
            )  # fmt: skip
        if self._dead is not None:
            await self._dead.hand([self._letter(*failure) for failure in failures])

    def _dead_letters(self, spec: SinkSpec) -> Worker:
        stats = SinkStats(spec.name)
        self._stats.sinks.append(stats)

        async def give_up(failures: Sequence[Failure]) -> None:
            log.error(
                "dead-letter sink %r refuses %d messages, the first on topic %r: %s",
                spec.name, len(failures), failures[0][0].topic, explain(failures[0][2]),
            )  # fmt: skip

        encode = spec.serializer.encode if spec.serializer else _encode_json
        return Worker(
            Outlet(
                spec,
                pipeline=self._spec.name,
                encode=encode if spec.recipe.reads == "messages" else None,
                persistence=attrs.evolve(self._persistence, on_error="retry"),
                stats=stats,
                give_up=give_up,
            )
        )

    def _letter(self, message: Message, received: float, error: BaseException) -> Record:
        """A dead letter: a record with the message's topic and time; where the sink takes
        messages, these two are in the value as well."""
        reason = explain(error).encode(errors="backslashreplace").decode()
        value: dict[str, Any] = {"pipeline": self._stats.name, "error": reason}
        if self._spec.dead_letter is not None and self._spec.dead_letter.recipe.reads == "messages":
            value |= {"topic": message.topic, "time": received}
        try:
            value["payload"] = message.payload.decode()
        except UnicodeDecodeError:
            value["payload_base64"] = base64.b64encode(message.payload).decode()
        return Record(Route(message.topic), received, value, message)


def _encode_json(values: Sequence[Any]) -> list[bytes]:
    return [msgspec.json.encode(value) for value in values]


def _wants_records(sink: SinkSpec, spec: PipelineSpec) -> bool:
    if sink.recipe.reads == "messages":
        return sink.serializer is not None and sink.serializer != spec.source.serializer
    return True
