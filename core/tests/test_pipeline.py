"""The pump with real components and sinks that fail on purpose."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import msgspec
import pytest

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.builtin import JsonSerializer, MemorySink, MemorySource, MsgpackSerializer, RawPayload
from tesaiot_connect.errors import (
    Disconnected,
    EndOfInput,
    EndOfOutput,
    PartialDelivery,
    PayloadError,
    PublishRefused,
)
from tesaiot_connect.message import Batch, Delivery, Message, Properties, Record, Route
from tesaiot_connect.pipeline import PipelineSpec, SinkSpec, SourceSpec
from tesaiot_connect.protocols import Duration
from tesaiot_connect.runner import Summary, run

FAST = Backoff(min=Duration(0.0001), max=Duration(0.001))


def message(number: int, payload: bytes | None = None) -> Message:
    return Message(f"device/d{number % 3}/telemetry/t", payload or b'{"n":%d}' % number, 1)


def batches(count: int, size: int = 5) -> list[list[Message]]:
    return [[message(n) for n in range(start, start + size)] for start in range(0, count, size)]


def numbers(records: Sequence[Record]) -> list[int]:
    return [record.value["n"] for record in records]


@attrs.frozen
class Tracked:
    """A source whose deliveries report how they were settled, in order."""

    batches: Sequence[Sequence[Message]]
    settled: list[int | BaseException] = attrs.field(factory=list)
    endless: bool = False
    opened: list[int] = attrs.field(factory=list)
    lose_after: int = 0
    """Raise Disconnected once, after this many reads."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        self.opened.append(len(self.settled))
        left = iter(list(enumerate(self.batches))[len(self.settled) :])
        reads = itertools.count(1)
        source = self

        class Reader:
            async def read(self) -> Delivery:
                await asyncio.sleep(0)
                if source.lose_after and len(source.opened) == 1 and next(reads) > source.lose_after:
                    raise Disconnected("pulled the plug")
                for number, messages in left:

                    async def settle(error: BaseException | None, number: int = number) -> None:
                        source.settled.append(number if error is None else error)

                    return Delivery(Batch(messages, 1000.0), settle)
                if source.endless:
                    await asyncio.Event().wait()
                raise EndOfInput

        yield Reader()


@attrs.frozen
class Faulty:
    """A sink that asks `fault` before each write: it may raise, or hold the write back."""

    fault: Callable[[int, Any], Any]
    reads: str = "records"
    into: list[Any] = attrs.field(factory=list)
    opened: list[int] = attrs.field(factory=list)
    closed: list[int] = attrs.field(factory=list)
    fail_open: int = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        self.opened.append(len(self.opened))
        if len(self.opened) <= self.fail_open:
            raise Disconnected("nobody home")
        writes = self.opened, itertools.count()
        sink = self

        class Writer:
            async def write(self, batch: Any) -> None:
                number = next(writes[1]) + 1000 * (len(sink.opened) - 1)
                result = sink.fault(number, batch)
                if asyncio.iscoroutine(result):
                    await result
                sink.into.extend(batch.messages if isinstance(batch, Batch) else batch)

        try:
            yield Writer()
        finally:
            self.closed.append(len(self.closed))


def fine(_number: int, _batch: Any) -> None:
    return None


def raising(errors: dict[int, BaseException]) -> Callable[[int, Any], None]:
    """Writes are numbered over the whole life of the sink."""
    calls = itertools.count()

    def fault(_number: int, _batch: Any) -> None:
        if error := errors.get(next(calls)):
            raise error

    return fault


def pipeline(source: Any, *sinks: Any, **options: Any) -> PipelineSpec:
    serializer = options.pop("serializer", JsonSerializer())
    fields = options.pop("topic_fields", None)
    spec = (
        source
        if isinstance(source, SourceSpec)
        else SourceSpec(name="in", recipe=source, serializer=serializer, topic_fields=fields)
    )
    return PipelineSpec(
        name=options.pop("name", "p"),
        source=spec,
        sinks=tuple(
            sink if isinstance(sink, SinkSpec) else SinkSpec(name=f"out{n}", recipe=sink)
            for n, sink in enumerate(sinks)
        ),
        retry=FAST,
        **options,
    )


def within_30_s(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 30))


def go(*pipelines: PipelineSpec, **options: Any) -> Summary:
    return within_30_s(lambda: run(pipelines, **options))


def test_everything_arrives_in_order_decoded_and_acknowledged() -> None:
    source, sink = Tracked(batches(20)), MemorySink()
    summary = go(pipeline(source, sink, topic_fields="device/{device_id}/telemetry/{kind}"))
    assert numbers(sink.into) == list(range(20))
    assert source.settled == [0, 1, 2, 3]
    first = sink.into[0]
    assert first.route == Route("device/d0/telemetry/t", {"device_id": "d0", "kind": "t"})
    assert first.time == 1000.0
    assert first.message.payload == b'{"n":0}'
    stats = summary.pipelines[0]
    assert (stats.received, stats.acknowledged, stats.batches) == (20, 20, 4)
    assert stats.bytes == sum(len(m.payload) for b in source.batches for m in b)
    assert (stats.sinks[0].written, stats.sinks[0].batches) == (20, 4)
    assert summary.lost == 0
    assert summary.drained
    assert not summary.stopped


def test_nothing_is_acknowledged_before_every_sink_has_it() -> None:
    source = Tracked(batches(5))
    gate = asyncio.Event()
    slow = Faulty(lambda _n, _b: gate.wait())
    quick = MemorySink()

    async def main() -> None:
        task = asyncio.create_task(run([pipeline(source, slow, quick)]))
        while not quick.into:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert source.settled == []
        gate.set()
        await task

    within_30_s(main)
    assert source.settled == [0]
    assert numbers(slow.into) == numbers(quick.into) == list(range(5))


def test_message_sinks_get_the_batch_as_it_came() -> None:
    original = [
        Message("a/b", b"\xff not json", 2, True, Properties(content_type="x")),
        Message("a/c", b'{ "n" : 1 }', 0),
    ]
    sink = Faulty(fine, "messages")
    summary = go(pipeline(MemorySource([original]), sink))
    assert [id(one) for one in sink.into] == [id(one) for one in original]
    assert summary.pipelines[0].undecodable == 0


def test_values_travel_raw_where_nobody_looks_into_them() -> None:
    sink = Faulty(fine, "raw_records")
    go(pipeline(MemorySource(batches(5)), sink))
    assert {type(record.value) for record in sink.into} == {msgspec.Raw}
    assert bytes(sink.into[3].value) == b'{"n":3}'


def test_values_are_decoded_once_somebody_looks() -> None:
    raw, decoded = Faulty(fine, "raw_records"), MemorySink()
    go(pipeline(MemorySource(batches(5)), raw, decoded))
    assert numbers(raw.into) == numbers(decoded.into) == [0, 1, 2, 3, 4]


def test_a_message_sink_with_a_serializer_of_its_own_transcodes() -> None:
    sink = Faulty(fine, "messages")
    go(pipeline(MemorySource(batches(2)), SinkSpec(name="out", recipe=sink, serializer=MsgpackSerializer())))
    assert [msgspec.msgpack.decode(one.payload) for one in sink.into] == [{"n": n} for n in range(5)]
    assert sink.into[1].topic == "device/d1/telemetry/t"
    assert sink.into[1].qos == 1


def test_an_acknowledgement_that_fails_does_not_end_the_run() -> None:
    @attrs.frozen
    class Deaf:
        @asynccontextmanager
        async def open(self) -> AsyncIterator[Any]:
            left = iter(batches(10))

            class Reader:
                async def read(self) -> Delivery:
                    async def settle(_error: BaseException | None) -> None:
                        raise OSError("gone")

                    for messages in left:
                        return Delivery(Batch(messages, 0.0), settle)
                    raise EndOfInput

            yield Reader()

    sink = MemorySink()
    summary = go(pipeline(Deaf(), sink))
    assert numbers(sink.into) == list(range(10))
    assert (summary.received, summary.acknowledged) == (10, 0)


# --- sinks that fail ----------------------------------------------------------------------


def test_retry_opens_the_sink_again_and_loses_nothing() -> None:
    source = Tracked(batches(20))
    sink = Faulty(raising({1: Disconnected("gone"), 2: OSError(5, "broken"), 3: RuntimeError("bug")}))
    summary = go(pipeline(source, sink))
    assert numbers(sink.into) == list(range(20))
    assert source.settled == [0, 1, 2, 3]
    assert len(sink.opened) == 4
    assert len(sink.closed) == 4
    out = summary.pipelines[0].sinks[0]
    assert (out.retries, out.written, out.failing) == (3, 20, False)
    assert out.last_error == "RuntimeError: bug"


def test_a_sink_that_cannot_be_opened_at_first_is_waited_for() -> None:
    sink = Faulty(fine, fail_open=3)
    other = MemorySink()
    go(pipeline(Tracked(batches(10)), other, sink))
    assert numbers(sink.into) == numbers(other.into) == list(range(10))
    assert len(sink.opened) == 4


def test_a_failing_sink_holds_the_source_back_and_not_its_siblings_batch() -> None:
    source = Tracked(batches(10))
    failing = Faulty(raising({n: Disconnected("down") for n in range(5)}))
    other = MemorySink()
    seen: list[int] = []
    failing_write = failing.fault

    def fault(number: int, batch: Any) -> None:
        seen.append(len(other.into))
        failing_write(number, batch)

    go(pipeline(source, other, attrs.evolve(failing, fault=fault)))
    assert numbers(failing.into) == numbers(other.into) == list(range(10))
    assert max(seen[:6]) == 5  # while it failed on the first batch, the source gave no second one


def test_partial_delivery_writes_only_the_rest_again() -> None:
    sink = Faulty(raising({0: PartialDelivery({1: Disconnected("x"), 3: Disconnected("y")})}))
    got: list[list[int]] = []
    fault = sink.fault

    def remember(number: int, batch: Any) -> None:
        got.append(numbers(batch))
        fault(number, batch)

    summary = go(pipeline(Tracked(batches(5)), attrs.evolve(sink, fault=remember)))
    assert got == [[0, 1, 2, 3, 4], [1, 3]]
    assert len(sink.opened) == 1
    assert summary.pipelines[0].sinks[0].written == 5


def test_what_can_never_be_written_does_not_block_the_flow(caplog: pytest.LogCaptureFixture) -> None:
    refused = PartialDelivery({2: PublishRefused("not authorized"), 4: Disconnected("x")})
    sink = Faulty(raising({0: refused}))
    source = Tracked(batches(10))
    with caplog.at_level(logging.WARNING):
        summary = go(pipeline(source, sink))
    out = summary.pipelines[0].sinks[0]
    assert (out.refused, out.written, out.dropped) == (1, 9, 0)
    assert source.settled == [0, 1]
    assert "device/d2/telemetry/t" in caplog.text
    assert "not authorized" in caplog.text
    assert summary.lost == 1


def test_a_batch_refused_as_a_whole_is_halved_until_the_culprit_is_alone() -> None:
    def fault(_number: int, batch: Any) -> None:
        if 7 in numbers(batch):
            raise PayloadError("seven")

    sink = Faulty(fault)
    summary = go(pipeline(Tracked(batches(10, 10)), sink))
    assert numbers(sink.into) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert summary.pipelines[0].sinks[0].refused == 1


def test_drop_gives_up_after_max_attempts() -> None:
    source = Tracked(batches(10))
    sink = Faulty(raising({n: Disconnected("down") for n in range(3)}))
    summary = go(pipeline(source, sink, on_error="drop", max_attempts=3))
    assert numbers(sink.into) == [5, 6, 7, 8, 9]
    assert source.settled == [0, 1]
    out = summary.pipelines[0].sinks[0]
    assert (out.dropped, out.retries, out.written) == (5, 2, 5)


def test_dead_letters_keep_topic_payload_error_and_time() -> None:
    source = Tracked([[message(0), message(1, b"\xff\x00")], [message(2)]])
    sink = Faulty(raising({0: Disconnected("down"), 1: Disconnected("still down")}), "messages")
    dead = MemorySink()
    summary = go(
        pipeline(
            source,
            sink,
            on_error="dead_letter",
            max_attempts=2,
            dead_letter=SinkSpec(name="dead", recipe=dead),
        )
    )
    assert [one.topic for one in sink.into] == ["device/d2/telemetry/t"]
    assert source.settled == [0, 1]
    assert [record.route.topic for record in dead.into] == ["device/d0/telemetry/t", "device/d1/telemetry/t"]
    assert dead.into[0].time == 1000.0
    assert dead.into[0].value == {"pipeline": "p", "error": "still down", "payload": '{"n":0}'}
    assert dead.into[1].value["payload_base64"] == "/wA="
    stats = summary.pipelines[0]
    assert (stats.sinks[0].dead_lettered, stats.sinks[1].name, stats.sinks[1].written) == (2, "dead", 2)
    assert summary.lost == 0


def test_the_dead_letter_sink_is_retried_for_ever() -> None:
    source = Tracked(batches(5))
    dead = Faulty(raising({n: Disconnected("dead, too") for n in range(20)}), "messages")
    go(
        pipeline(
            source,
            Faulty(raising({0: Disconnected("down")})),
            on_error="dead_letter",
            max_attempts=1,
            dead_letter=SinkSpec(name="dead", recipe=dead),
        )
    )
    assert len(dead.into) == 5
    letter = msgspec.json.decode(dead.into[0].payload)
    assert letter["topic"] == dead.into[0].topic == "device/d0/telemetry/t"
    assert letter["time"] == 1000.0
    assert source.settled == [0]


def test_two_failing_sinks_share_the_dead_letter_sink() -> None:
    dead = MemorySink()
    down = [Faulty(raising({n: Disconnected(f"down {k}") for n in range(2)})) for k in range(2)]
    go(
        pipeline(
            Tracked(batches(10)),
            *down,
            on_error="dead_letter",
            max_attempts=1,
            dead_letter=SinkSpec(name="dead", recipe=dead),
        )
    )
    assert sorted(record.value["error"] for record in dead.into) == ["down 0"] * 10 + ["down 1"] * 10


# --- payloads that cannot be decoded ------------------------------------------------------

BAD = [message(0), message(1, b"{"), message(2), message(3, b"\xff")]


def test_undecodable_payloads_never_stop_the_flow(caplog: pytest.LogCaptureFixture) -> None:
    source, sink = Tracked([BAD, [message(4)]]), MemorySink()
    with caplog.at_level(logging.WARNING):
        summary = go(pipeline(source, sink))
    assert numbers(sink.into) == [0, 2, 4]
    assert source.settled == [0, 1]
    stats = summary.pipelines[0]
    assert (stats.undecodable, stats.dropped) == (2, 2)
    assert "device/d1/telemetry/t" in caplog.text


def test_undecodable_payloads_go_to_the_dead_letter_sink_and_bridges_still_get_them() -> None:
    sink, bridge, dead = MemorySink(), Faulty(fine, "messages"), MemorySink()
    summary = go(
        pipeline(
            Tracked([BAD]),
            sink,
            bridge,
            on_error="dead_letter",
            dead_letter=SinkSpec(name="dead", recipe=dead),
        )
    )
    assert numbers(sink.into) == [0, 2]
    assert bridge.into == BAD
    assert dead.into[0].value["payload"] == "{"
    assert dead.into[1].value["payload_base64"] == "/w=="
    assert summary.pipelines[0].dead_lettered == 2
    assert summary.lost == 0


def test_a_batch_of_nothing_but_rubbish_is_acknowledged() -> None:
    source, sink = Tracked([[message(1, b"{")]]), Faulty(fine)
    go(pipeline(source, sink))
    assert source.settled == [0]
    assert sink.into == []


# --- the process step ---------------------------------------------------------------------


def test_process_changes_drops_and_multiplies() -> None:
    def process(records: list[Record]) -> Any:
        for record in records:
            if record.value["n"] % 2 == 0:
                yield record
                yield Record(Route("made/up"), record.time, {"n": record.value["n"] * 100}, record.message)

    source, sink, bridge = Tracked(batches(5)), MemorySink(), Faulty(fine, "messages")
    go(pipeline(source, sink, bridge, process=process))
    assert numbers(sink.into) == [0, 0, 2, 200, 4, 400]
    assert [(one.topic, one.payload) for one in bridge.into[2:4]] == [
        ("device/d2/telemetry/t", b'{"n":2}'),
        ("made/up", b'{"n":200}'),
    ]
    assert source.settled == [0]


def test_process_may_be_async_a_generator_or_return_nothing() -> None:
    async def coroutine(records: list[Record]) -> list[Record]:
        await asyncio.sleep(0)
        return records[:1]

    async def generator(records: list[Record]) -> Any:
        for record in records[:2]:
            await asyncio.sleep(0)
            yield record

    for process, expected in ((coroutine, [0]), (generator, [0, 1]), (lambda records: None, [])):
        source, sink = Tracked(batches(5)), MemorySink()
        go(pipeline(source, sink, process=process))
        assert numbers(sink.into) == expected
        assert source.settled == [0]


def test_a_process_that_raises_is_tried_again_on_fresh_records() -> None:
    calls = itertools.count()

    def process(records: list[Record]) -> list[Record]:
        for record in records:
            record.value["n"] += 1000
        records.append(records[0])
        if next(calls) < 3:
            raise RuntimeError("not yet")
        return records[:-1]

    source, sink = Tracked(batches(5)), MemorySink()
    summary = go(pipeline(source, sink, process=process))
    assert numbers(sink.into) == [1000, 1001, 1002, 1003, 1004]
    assert summary.pipelines[0].retries == 3
    assert source.settled == [0]


@pytest.mark.parametrize("on_error", ["drop", "dead_letter"])
def test_a_process_that_keeps_raising_loses_only_what_it_raises_on(on_error: Any) -> None:
    def process(records: list[Record]) -> list[Record]:
        if 3 in numbers(records):
            raise RuntimeError("three")
        return records

    source, sink, dead = Tracked(batches(10)), MemorySink(), MemorySink()
    letters = SinkSpec(name="dead", recipe=dead) if on_error == "dead_letter" else None
    summary = go(
        pipeline(source, sink, process=process, on_error=on_error, max_attempts=2, dead_letter=letters)
    )
    assert numbers(sink.into) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert source.settled == [0, 1]
    stats = summary.pipelines[0]
    if letters:
        assert [record.value["payload"] for record in dead.into] == ['{"n":3}']
        assert (stats.dead_lettered, stats.dropped) == (1, 0)
    else:
        assert (stats.dead_lettered, stats.dropped) == (0, 1)


def test_a_process_can_say_that_a_record_is_bad_for_good() -> None:
    def process(records: list[Record]) -> list[Record]:
        if 3 in numbers(records):
            raise PayloadError("three is no number")
        return records

    source, sink = Tracked(batches(5)), MemorySink()
    summary = go(pipeline(source, sink, process=process))
    assert numbers(sink.into) == [0, 1, 2, 4]
    assert summary.pipelines[0].dropped == 1


def test_what_a_process_returns_is_checked() -> None:
    source, sink = Tracked(batches(5)), MemorySink()
    summary = go(pipeline(source, sink, process=lambda records: ["no"], on_error="drop", max_attempts=1))
    assert summary.pipelines[0].dropped == 5
    assert "must return records" in summary.pipelines[0].last_error
    assert source.settled == [0]


def test_a_process_that_cancels_itself_loses_no_acknowledgement() -> None:
    async def process(_records: list[Record]) -> list[Record]:
        raise asyncio.CancelledError

    source = Tracked(batches(5))
    go(pipeline(source, MemorySink(), process=process, on_error="drop", max_attempts=1))
    assert source.settled == [0]


def test_a_process_that_makes_records_of_strange_parts_is_told() -> None:
    def no_message(records: list[Record]) -> list[Record]:
        return [Record(one.route, one.time, one.value, None) for one in records]  # type: ignore[arg-type]

    def no_route(records: list[Record]) -> list[Record]:
        return [Record("a/b", one.time, one.value, one.message) for one in records]  # type: ignore[arg-type]

    for process, words in ((no_message, "message is a Message"), (no_route, "route is a Route")):
        sink = Faulty(fine, reads="messages")
        summary = go(pipeline(Tracked(batches(5)), sink, process=process, on_error="drop", max_attempts=1))
        assert summary.lost == 5
        assert words in summary.pipelines[0].last_error
        assert sink.into == []


class Clumsy(JsonSerializer):
    """A serializer that breaks its contract on some payloads."""

    def decode(self, payloads: Sequence[bytes], /) -> list[Any]:
        if b'{"n":2}' in payloads:
            raise RuntimeError("two!")
        values = super().decode(payloads)
        return values + values if b'{"n":3}' in payloads else values

    decode_raw = decode

    def encode(self, values: Sequence[Any], /) -> list[bytes]:
        if {"n": 5} in values:
            raise RuntimeError("five!")
        return super().encode(values)[: len([value for value in values if value != {"n": 6}])]


def test_a_serializer_that_breaks_its_contract_loses_only_what_it_breaks_on() -> None:
    source, sink = Tracked(batches(10, 10)), Faulty(fine, reads="messages")
    summary = go(
        pipeline(source, sink, serializer=Clumsy(), process=lambda records: records, on_error="drop")
    )
    assert source.settled == [0]
    assert [msgspec.json.decode(one.payload)["n"] for one in sink.into] == [0, 1, 4, 7, 8, 9]
    assert (summary.pipelines[0].undecodable, summary.lost) == (2, 4)


def test_a_partial_delivery_of_what_was_not_given_is_a_failed_write() -> None:
    source = Tracked(batches(10))
    sink = Faulty(raising({0: PartialDelivery({99: Disconnected("far off")})}))
    summary = go(pipeline(source, sink))
    assert source.settled == [0, 1]
    assert numbers(sink.into) == list(range(10))
    assert summary.pipelines[0].sinks[0].retries == 1


def test_values_without_a_form_are_given_up_alone() -> None:
    def process(records: list[Record]) -> list[Record]:
        records[1].value = object()
        return records

    bridge = Faulty(fine, "messages")
    summary = go(pipeline(Tracked(batches(5)), bridge, process=process))
    assert [one.payload for one in bridge.into] == [b'{"n":0}', b'{"n":2}', b'{"n":3}', b'{"n":4}']
    assert summary.pipelines[0].sinks[0].refused == 1


# --- sources ------------------------------------------------------------------------------


def test_a_lost_source_is_opened_again() -> None:
    source, sink = Tracked(batches(20), lose_after=2), MemorySink()
    summary = go(pipeline(source, sink))
    assert numbers(sink.into) == list(range(20))
    assert source.opened == [0, 2]
    assert summary.pipelines[0].reopened == 1


def test_pipelines_that_share_a_source_share_one_reader() -> None:
    recipe = Tracked(batches(50))
    source = SourceSpec(name="in", recipe=recipe, serializer=JsonSerializer())
    one, two = MemorySink(), Faulty(raising({3: Disconnected("x"), 4: Disconnected("y")}))
    summary = go(pipeline(source, one, name="a"), pipeline(source, two, name="b"))
    assert numbers(one.into) == numbers(two.into) == list(range(50))
    assert recipe.opened == [0]
    assert recipe.settled == list(range(10))
    assert [stats.acknowledged for stats in summary.pipelines] == [50, 50]


def test_a_slow_pipeline_holds_a_shared_source_back() -> None:
    recipe = Tracked(batches(500))
    source = SourceSpec(name="in", recipe=recipe, serializer=JsonSerializer())
    gate = asyncio.Event()
    slow, quick = Faulty(lambda _n, _b: gate.wait()), MemorySink()

    async def main() -> None:
        task = asyncio.create_task(run([pipeline(source, slow, name="a"), pipeline(source, quick, name="b")]))
        for _ in range(500):
            await asyncio.sleep(0)
        assert 0 < len(quick.into) <= 20
        assert recipe.settled == []
        gate.set()
        await task

    within_30_s(main)
    assert numbers(slow.into) == numbers(quick.into) == list(range(500))


def test_sources_are_opened_before_sinks_and_both_before_anything_is_read() -> None:
    order: list[str] = []

    @attrs.frozen
    class Recorded:
        kind: str
        reads: str = "records"

        @asynccontextmanager
        async def open(self) -> AsyncIterator[Any]:
            for _ in range(10 if self.kind == "source" else 3):
                await asyncio.sleep(0)
            order.append(self.kind)

            class Live:
                async def read(self) -> Delivery:
                    order.append("read")
                    raise EndOfInput

            yield Live()

    source, sink = Recorded("source"), Recorded("sink")
    shared = SourceSpec(name="in", recipe=source, serializer=JsonSerializer())
    go(
        pipeline(source, sink, sink, name="a"),
        pipeline(shared, sink, name="b"),
        pipeline(shared, sink, name="c"),
    )
    assert order == ["source"] * 2 + ["sink"] * 4 + ["read"] * 2


# --- stopping -----------------------------------------------------------------------------


def test_a_stop_settles_what_was_read_and_reads_no_more() -> None:
    source = Tracked(batches(50), endless=True)
    gate = asyncio.Event()
    sink = Faulty(lambda number, _b: gate.wait() if number == 4 else None)

    async def main() -> Summary:
        stop = asyncio.Event()
        task = asyncio.create_task(run([pipeline(source, sink)], stop=stop))
        while len(sink.into) < 20:
            await asyncio.sleep(0)
        stop.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        return await task

    summary = within_30_s(main)
    assert numbers(sink.into) == list(range(25))
    assert source.settled == [0, 1, 2, 3, 4]
    assert summary.stopped
    assert summary.drained


def test_a_stop_ends_a_read_that_waits() -> None:
    source, sink = Tracked(batches(10), endless=True), MemorySink()

    async def main() -> Summary:
        stop = asyncio.Event()
        task = asyncio.create_task(run([pipeline(source, sink)], stop=stop))
        while len(source.settled) < 2:
            await asyncio.sleep(0)
        stop.set()
        return await task

    summary = within_30_s(main)
    assert summary.drained
    assert numbers(sink.into) == list(range(10))


def test_a_stop_drains_a_shared_source() -> None:
    recipe = Tracked(batches(1000), endless=True)
    source = SourceSpec(name="in", recipe=recipe, serializer=JsonSerializer())
    one, two = MemorySink(), MemorySink()

    async def main() -> Summary:
        stop = asyncio.Event()
        task = asyncio.create_task(
            run([pipeline(source, one, name="a"), pipeline(source, two, name="b")], stop=stop)
        )
        while len(one.into) < 50:
            await asyncio.sleep(0)
        stop.set()
        return await task

    summary = within_30_s(main)
    assert numbers(one.into) == numbers(two.into)
    assert len(recipe.settled) == summary.pipelines[0].batches == len(one.into) // 5
    assert summary.drained


def test_a_sink_that_is_down_cannot_hold_a_stop_for_ever() -> None:
    source = Tracked(batches(5), endless=True)

    def fault(_number: int, _batch: Any) -> None:
        raise Disconnected("down")

    async def main() -> Summary:
        stop = asyncio.Event()
        stop.set()
        return await run([pipeline(source, Faulty(fault))], stop=stop, drain_timeout=0.05)

    summary = within_30_s(main)
    assert source.settled == []
    assert summary.stopped


def test_cancelling_stops_at_once_and_closes_everything() -> None:
    source = Tracked(batches(5))
    sink = Faulty(lambda _n, _b: asyncio.Event().wait())

    async def main() -> None:
        before = asyncio.all_tasks()
        task = asyncio.create_task(run([pipeline(source, sink, MemorySink())]))
        while not sink.opened:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before

    within_30_s(main)
    assert source.settled == []
    assert len(sink.closed) == 1


def test_the_end_of_the_output_ends_the_run() -> None:
    sink = Faulty(raising({1: EndOfOutput("closed by its reader")}))
    with pytest.raises(EndOfOutput, match="closed by its reader"):
        go(pipeline(Tracked(batches(50)), sink))
    assert len(sink.into) == 5


def test_require_healthy_raises_what_is_wrong() -> None:
    with pytest.raises(Disconnected, match="nobody home"):
        go(pipeline(Tracked(batches(5)), MemorySink(), Faulty(fine, fail_open=1)), require_healthy=True)


def test_the_figures_are_reported() -> None:
    seen: list[int] = []
    go(pipeline(Tracked(batches(5)), MemorySink()), on_stats=lambda stats: seen.append(stats[0].received))
    assert seen[-1] == 5


def test_raw_payloads_are_values_as_they_are() -> None:
    sink = MemorySink()
    go(pipeline(MemorySource([[Message("t", b"\xff")]]), sink, serializer=RawPayload()))
    assert sink.into[0].value == b"\xff"


def test_specs_refuse_what_cannot_work() -> None:
    source = SourceSpec(name="in", recipe=MemorySource([]), serializer=JsonSerializer())
    with pytest.raises(ValueError, match="sinks"):
        PipelineSpec(name="p", source=source, sinks=())
    with pytest.raises(ValueError, match="go together"):
        pipeline(source, MemorySink(), on_error="dead_letter")
    with pytest.raises(ValueError, match="go together"):
        pipeline(source, MemorySink(), dead_letter=SinkSpec(name="d", recipe=MemorySink()))
