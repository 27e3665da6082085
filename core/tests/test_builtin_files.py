"""JSON lines both ways, on real files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tesaiot_connect.builtin import (
    JsonlSink,
    JsonlSource,
    JsonSerializer,
    NullSink,
    StdoutSink,
    jsonl_sink as sink_module,
    jsonl_source,
)
from tesaiot_connect.builtin.jsonl_sink import Lines
from tesaiot_connect.errors import ConnectorError, EndOfInput, EndOfOutput, PartialDelivery, PayloadError
from tesaiot_connect.message import Batch, Message, Record, Route
from tesaiot_connect.pipeline import Routes
from tesaiot_connect.protocols import Duration, Sink, Size, Source

TOPIC = "device/d1/telemetry/t"


def record(
    value: Any, topic: str = TOPIC, fields: dict[str, str] | None = None, time: float = 1000.5
) -> Record:
    return Record(Route(topic, fields or {}), time, value, Message(topic, b""))


def raw(text: bytes, topic: str = TOPIC) -> Record:
    (value,) = JsonSerializer().decode_raw([text])
    return record(value, topic)


def within_30_s(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 30))


def write(sink: Any, *batches: Sequence[Record]) -> None:
    async def main() -> None:
        async with sink.open() as writer:
            for batch in batches:
                await writer.write(batch)

    within_30_s(main)


def lines(path: Path) -> list[Any]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [msgspec.json.decode(line) for line in data.splitlines()]


def test_a_line_has_topic_fields_time_and_value(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fields = {"device_id": 'd"1\\', "kind": "é"}
    write(JsonlSink(path=path), [record(msgspec.Raw(b'{"v": 1.0}'), fields=fields), record([1, None])])
    first, second = path.read_bytes().splitlines()
    assert (
        first
        == (
            '{"topic":"device/d1/telemetry/t","device_id":"d\\"1\\\\","kind":"é",'
            '"time":1000.500000,"value":{"v": 1.0}}'
        ).encode()
    )
    assert list(msgspec.json.decode(first)) == ["topic", "device_id", "kind", "time", "value"]
    assert msgspec.json.decode(second)["value"] == [1, None]


def test_a_topics_fields_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    batch = [raw(b"%d" % n, f"t/{n % 7}") for n in range(50)]
    write(JsonlSink(path=path), batch, batch)
    assert [(line["topic"], line["value"]) for line in lines(path)] == [
        (f"t/{n % 7}", n) for n in range(50)
    ] * 2


def test_times_may_differ_within_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(JsonlSink(path=path), [record(n, time=float(n)) for n in range(5)])
    assert [(line["time"], line["value"]) for line in lines(path)] == [(float(n), n) for n in range(5)]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_line_ends_inside_a_payload_do_not_break_lines(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "out.jsonl"
    write(JsonlSink(path=path), [raw(b'{"a":' + end + b"  [1," + end + b'2], "b": "x\\ny  z"}'), raw(b"3")])
    assert path.read_bytes().count(b"\n") == 2
    assert b"\r" not in path.read_bytes()
    assert [line["value"] for line in lines(path)] == [{"a": [1, 2], "b": "x\ny  z"}, 3]


def test_bytes_are_text_or_base64(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(JsonlSink(path=path), [record(b"t\xc3\xa9xt\n"), record(b"\xff")])
    assert [line["value"] for line in lines(path)] == ["téxt\n", {"base64": "/w=="}]


def test_a_value_without_json_form_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(PartialDelivery) as caught:
        write(JsonlSink(path=path), [record(1), record(object()), raw(b"3"), record("\ud800")])
    assert list(caught.value.failures) == [1, 3]
    assert all(isinstance(error, PayloadError) for error in caught.value.failures.values())
    assert [line["value"] for line in lines(path)] == [1, 3]


def test_appending_goes_on_where_a_run_ended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for number in range(3):
        write(JsonlSink(path=path), [record(number)])
    assert [line["value"] for line in lines(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (b'{"value":1}\n{"val', [1]),
        (b'{"value":1}\n{"value":2}', [1, 2]),
        (b'{"val', []),
        (b'{"value":1}\n' + b'{"value":"' + b"x" * 200_000, [1]),
        (b"", []),
    ],
)
def test_a_torn_last_line_is_repaired(tmp_path: Path, found: bytes, kept: list[int]) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(found)
    write(JsonlSink(path=path), [record(9)])
    assert [line["value"] for line in lines(path)] == [*kept, 9]


class Disk:
    """`os` with a disk that takes so many bytes more."""

    def __init__(self, room: int, step: int = 1 << 30) -> None:
        self.room = room
        self.step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, file: int, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = os.write(file, data[: min(self.room, self.step)])
        self.room -= done
        return done


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "os", Disk(1 << 30, step=7))
    path = tmp_path / "out.jsonl"
    write(JsonlSink(path=path), [record(n) for n in range(20)])
    assert [line["value"] for line in lines(path)] == list(range(20))


def test_a_full_disk_leaves_whole_lines_and_an_error_that_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    disk = Disk(150)
    monkeypatch.setattr(sink_module, "os", disk)

    async def main() -> None:
        async with JsonlSink(path=path).open() as writer:
            await writer.write([record(1)])
            with pytest.raises(ConnectorError, match=r"out\.jsonl.*free space on the disk"):
                await writer.write([record(n) for n in range(10)])
            assert [line["value"] for line in lines(path)] == [1]
            disk.room = 1 << 30
            await writer.write([record(2)])

    within_30_s(main)
    assert [line["value"] for line in lines(path)] == [1, 2]


def test_rotation_by_size_keeps_so_many_files(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    batches = [[record(n)] for n in range(30)]
    write(JsonlSink(path=path, rotate_size=Size(200), keep=3), *batches)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "out.jsonl", "out.jsonl.1", "out.jsonl.2", "out.jsonl.3",
    ]  # fmt: skip
    values: list[int] = []
    for name in ("out.jsonl.3", "out.jsonl.2", "out.jsonl.1", "out.jsonl"):
        assert (tmp_path / name).stat().st_size <= 200
        values += [line["value"] for line in lines(tmp_path / name)]
    assert values == list(range(30 - len(values), 30))


def test_a_batch_larger_than_the_size_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(JsonlSink(path=path, rotate_size=Size(10)), [record(n) for n in range(5)], [record(5)])
    assert [line["value"] for line in lines(tmp_path / "out.jsonl.1")] == list(range(5))
    assert [line["value"] for line in lines(path)] == [5]


def test_rotation_by_age_counts_from_the_first_line_also_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(sink_module.time, "time", lambda: 1100.0)
    sink = JsonlSink(path=path, rotate_age=Duration(150.0))
    write(sink, [record(1, time=1000.0)])
    write(sink, [record(2, time=1100.0)])
    monkeypatch.setattr(sink_module.time, "time", lambda: 1160.0)
    write(sink, [record(3, time=1160.0)])
    assert [line["value"] for line in lines(tmp_path / "out.jsonl.1")] == [1, 2]
    assert [line["value"] for line in lines(path)] == [3]


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    async def main() -> None:
        async with JsonlSink(path=path).open() as writer:
            await writer.write([record(1)])
            path.rename(tmp_path / "moved")
            await writer.write([record(2)])

    within_30_s(main)
    assert [line["value"] for line in lines(path)] == [2]


def test_two_writers_rotate_one_file_together(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    sink = JsonlSink(path=path, rotate_size=Size(300), keep=100)

    async def main() -> None:
        async with sink.open() as one, sink.open() as two:
            for number in range(100):
                await (one if number % 3 else two).write([record(number)])

    within_30_s(main)
    values = sorted(line["value"] for file in tmp_path.iterdir() for line in lines(file))
    assert values == list(range(100))


@pytest.mark.parametrize("policy", ["never", "batch", "interval"])
def test_fsync_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    synced: list[int] = []
    there = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    class Watched(Disk):
        def fsync(self, file: int) -> None:
            os.fsync(file)
            synced.append(os.fstat(file).st_size)
            loops[0].call_soon_threadsafe(there.set)

    monkeypatch.setattr(sink_module, "os", Watched(1 << 30))
    path = tmp_path / "out.jsonl"

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        async with JsonlSink(path=path, fsync=policy, fsync_interval=Duration(0.001)).open() as writer:
            await writer.write([record(1)])
            if policy == "batch":
                assert synced == [path.stat().st_size]
            elif policy == "interval":
                await there.wait()

    within_30_s(main)
    assert bool(synced) == (policy != "never")


def test_a_sync_that_is_under_way_at_the_end_is_made_sure_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may come too late, when the file is closed."""
    begun, go, calls = threading.Event(), threading.Event(), 0

    class Late(Disk):
        def fsync(self, file: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                begun.set()
                go.wait(60)
            else:
                os.fsync(file)
                go.set()

    monkeypatch.setattr(sink_module, "os", Late(1 << 30))
    path = tmp_path / "out.jsonl"

    async def main() -> None:
        try:
            async with JsonlSink(
                path=path, fsync="interval", fsync_interval=Duration(0.001)
            ).open() as writer:
                await writer.write([record(1)])
                assert await asyncio.to_thread(begun.wait, 20)
            assert calls == 2
        finally:
            go.set()

    within_30_s(main)


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match="create the folder"):
        write(JsonlSink(path=tmp_path / "no" / "out.jsonl"), [record(1)])


# --- the source ---------------------------------------------------------------------------


def read(source: Any) -> list[Message]:
    async def main() -> list[Message]:
        messages: list[Message] = []
        async with source.open() as reader:
            with contextlib.suppress(EndOfInput):
                while True:
                    messages += (await reader.read()).batch.messages
        return messages

    result: list[Message] = within_30_s(main)
    return result


def test_what_the_sink_wrote_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    batch = [raw(b'{"n": %d}' % n, f"t/{n}") for n in range(5000)]
    write(JsonlSink(path=path), batch)
    messages = read(JsonlSource(path=path))
    assert [(one.topic, one.payload) for one in messages] == [
        (f"t/{n}", b'{"n": %d}' % n) for n in range(5000)
    ]
    assert messages[0].qos == 1


def test_lines_of_other_makers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_source, "LOG_INTERVAL", 0.0)
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"topic":"a","payload":"text"}\n\n'
        b'{"topic":"b","payload_base64":"/w=="}\r\n'
        b"rubbish\n"
        b'{"topic":"#","value":1}\n{"value":1}\n{"topic":"c"}\n{"topic":"c","payload_base64":"!"}\n'
        b'{"topic":"d","value":null}'
    )
    messages = read(JsonlSource(path=path, qos=0))
    assert messages == [Message("a", b"text"), Message("b", b"\xff"), Message("d", b"null")]
    for number in (4, 5, 6, 7, 8):
        assert f"x.jsonl:{number} " in caplog.text
    assert "x.jsonl:3 " not in caplog.text


def test_any_lines_with_a_topic(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"topic":"not mine"}\n\n 2\n{')
    assert read(JsonlSource(path=path, topic="t")) == [
        Message("t", b'{"topic":"not mine"}', 1), Message("t", b"2", 1), Message("t", b"{", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [2_000, 70_000, 131_072, 300_000])
@pytest.mark.parametrize("end", [b"\n", b'\n{"topic":"t","value":3}\n', b""])
def test_a_line_that_is_too_long_is_passed_over_and_no_other(
    tmp_path: Path, length: int, end: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.jsonl"
    good = b'{"topic":"t","value":1}\n{"topic":"t","value":2}\n'
    path.write_bytes(good + b"x" * length + end)
    messages = read(JsonlSource(path=path, max_line=Size(1000)))
    assert [message.payload for message in messages] == [b"1", b"2", b"3"][: 3 if len(end) > 1 else 2]
    assert "x.jsonl:3 is passed over" in caplog.text


def test_a_flood_of_bad_lines_is_not_a_flood_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"rubbish\n" * 20_000)
    assert read(JsonlSource(path=path)) == []
    assert len(caplog.records) < 20  # one a second


def test_topics_of_hostile_length_are_not_remembered(tmp_path: Path) -> None:
    lines, routes = Lines(), Routes("a/{rest...}")
    for start in range(0, 200, 20):
        messages = [Message(f"a/{n}/" + "x" * 60_000, b"1") for n in range(start, start + 20)]
        messages.append(Message("a/short", b"1"))
        records = routes.records(messages, 1.0, [1] * 21)
        assert records[20].route.fields == {"rest": "short"}
        data, failures = lines.encode(records)
        assert data.count(b"\n") == 21
        assert not failures
    assert sum(map(len, lines._prefixes)) + sum(map(len, routes._known)) < 1000


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match="follow = true"):
        read(JsonlSource(path=tmp_path / "x.jsonl"))


def test_follow_sees_what_comes_rotation_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    got: list[bytes] = []

    async def main() -> None:
        async with JsonlSource(path=path, topic="t", follow=True, poll=Duration(0.001)).open() as reader:

            async def expect(*payloads: bytes) -> None:
                while len(got) < len(payloads):
                    got.extend(message.payload for message in (await reader.read()).batch.messages)
                assert got == list(payloads)
                got.clear()

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(), 0.01)  # there is no file yet
            path.write_bytes(b"1\n2")
            await expect(b"1")
            with path.open("ab") as file:
                file.write(b"2\n3\n")
            await expect(b"22", b"3")
            with path.open("ab") as file:
                file.write(b"4\n")
                path.rename(tmp_path / "x.1")
                path.write_bytes(b"5\n")
            await expect(b"4", b"5")
            path.write_bytes(b"")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(), 0.01)
            path.write_bytes(b"6\n")
            await expect(b"6")

    within_30_s(main)


def test_follow_from_the_end_and_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"1\n")
    source = JsonlSource(path=path, topic="t", follow=True, start_at="end", poll=Duration(0.001))

    async def main() -> None:
        async with source.open() as reader:
            with path.open("ab") as file:
                file.write(b"2\n")
            assert (await reader.read()).batch.messages[0].payload == b"2"

    within_30_s(main)
    assert read(source.once()) == []
    assert len(read(JsonlSource(path=path, topic="t", follow=True).once())) == 2


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as stream, os.fdopen(theirs, "wb") as feeder:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))

        async def main() -> None:
            async with JsonlSource(path=Path("/somewhere/-"), topic="t").open() as reader:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.read(), 0.01)
                feeder.write(b"1\n2\n")
                feeder.flush()
                assert [one.payload for one in (await reader.read()).batch.messages] == [b"1", b"2"]
                feeder.write(b"3")
                feeder.close()
                assert [one.payload for one in (await reader.read()).batch.messages] == [b"3"]
                with pytest.raises(EndOfInput):
                    await reader.read()

        within_30_s(main)


# --- standard output, and nowhere ---------------------------------------------------------


def test_stdout_as_json_and_as_text(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    batch = [raw(b'{"a":1}'), record({"b": [1]}), record("text"), record(b"\xff")]
    write(StdoutSink(), batch[:2])
    assert [msgspec.json.decode(line)["value"] for line in capfdbinary.readouterr().out.splitlines()] == [
        {"a": 1}, {"b": [1]},
    ]  # fmt: skip
    write(StdoutSink(format="{time} {topic}: {payload}!"), batch)
    head = b"1000.500000 device/d1/telemetry/t: "
    assert capfdbinary.readouterr().out.splitlines() == [
        head + b'{"a":1}!', head + b'{"b":[1]}!', head + b"text!", head + b"\xff!",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="braces"):
        StdoutSink(format="{device}")


def test_a_closed_stdout_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    stream = io.TextIOWrapper(os.fdopen(theirs, "wb", buffering=0))
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(EndOfOutput):
        write(StdoutSink(), [record(1)])
    stream.close()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a program there")
def test_a_stalled_reader_of_stdout_does_not_keep_the_program_from_ending() -> None:
    program = (
        "from tesaiot_connect.builtin import *; from tesaiot_connect.pipeline import *;"
        "from tesaiot_connect.runner import run_blocking;"
        "source = SourceSpec(name='s', recipe=GeneratorSource(rate=0), serializer=JsonSerializer());"
        "sink = SinkSpec(name='o', recipe=StdoutSink());"
        "found = run_blocking([PipelineSpec(name='p', source=source, sinks=(sink,))], drain_timeout=0.1);"
        "raise SystemExit(7 if not found.drained else 8)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)  # it runs; nobody reads the rest
        child.terminate()
        try:
            assert child.wait(30) == 7
        finally:
            child.kill()


def test_null_takes_everything() -> None:
    async def main() -> None:
        async with NullSink().open() as writer:
            await writer.write(Batch([Message("t", b"")], 0.0))

    within_30_s(main)


def test_they_keep_the_contracts(tmp_path: Path) -> None:
    for sink in (JsonlSink(path=tmp_path), StdoutSink(), NullSink()):
        assert isinstance(sink, Sink)
    assert isinstance(JsonlSource(path=tmp_path), Source)
