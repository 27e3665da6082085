"""A run as a program: signals, sudden death, and what is in the files afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tesaiot_connect import runner as runner_module, signals as signals_module
from tesaiot_connect.builtin import GeneratorSource, JsonlSource, JsonSerializer, MemorySink
from tesaiot_connect.errors import ConnectorError
from tesaiot_connect.pipeline import PipelineSpec, PipelineStats, SinkSpec, SourceSpec
from tesaiot_connect.runner import run, run_blocking
from tesaiot_connect.signals import SecondSignal, stopping_on_signals

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals between processes are POSIX")

PROGRAM = """
import asyncio, sys, time
from contextlib import asynccontextmanager
from pathlib import Path

from tesaiot_connect.builtin import JsonlSink, JsonSerializer, SqliteSink
from tesaiot_connect.message import Batch, Delivery, Message
from tesaiot_connect.pipeline import PipelineSpec, SinkSpec, SourceSpec
from tesaiot_connect.runner import run_blocking

folder, start = Path(sys.argv[1]), int(sys.argv[2])

class Counter:
    '''Numbers without end; prints the last one of each acknowledged batch.'''

    @asynccontextmanager
    async def open(self):
        yield self

    def __init__(self):
        self.next = start

    async def read(self):
        await asyncio.sleep(0)
        numbers = range(self.next, self.next + 50)
        self.next += 50
        async def settle(error):
            if error is None:
                print(numbers[-1], flush=True)
        return Delivery(Batch([Message("t/x", b'{"n":%d}' % n) for n in numbers], time.time()), settle)

source = SourceSpec(name="in", recipe=Counter(), serializer=JsonSerializer())
sinks = (
    SinkSpec(name="file", recipe=JsonlSink(path=folder / "x.jsonl")),
    SinkSpec(name="db", recipe=SqliteSink(path=folder / "x.db")),
)
try:
    summary = run_blocking([PipelineSpec(name="p", source=source, sinks=sinks)], uvloop="uvloop" in sys.argv)
except KeyboardInterrupt:
    sys.exit(7)
print("drained" if summary.drained and summary.stopped else "not drained", flush=True)
"""


def start(folder: Path, first: int = 0, *options: str) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    return subprocess.Popen(
        [sys.executable, program, folder, str(first), *options], stdout=subprocess.PIPE, text=True
    )


def stored(folder: Path) -> tuple[list[int], list[int]]:
    data = (folder / "x.jsonl").read_bytes()
    in_file = [
        msgspec.json.decode(line)["value"]["n"]
        for line in data.splitlines(keepends=True)
        if line[-1:] == b"\n"
    ]
    with closing(sqlite3.connect(folder / "x.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return in_file, [row[0] for row in db.execute("SELECT n FROM telemetry ORDER BY rowid")]


@POSIX
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    acknowledged: set[int] = set()
    first = 0
    for turn in range(4):
        with start(tmp_path, first) as process:
            assert process.stdout is not None
            for _ in range(3 + 7 * turn):
                process.stdout.readline()
            process.kill()
            numbers = [int(line) for line in process.stdout.read().split()]
        last = max(numbers, default=first)
        acknowledged |= set(range(first, last + 1))
        first = last + 1
    with start(tmp_path, first) as process:  # repairs what the last kill left
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        process.stdout.read()
        assert process.wait(30) == 0
    in_file, in_db = stored(tmp_path)
    assert acknowledged
    assert acknowledged <= set(in_file)
    assert acknowledged <= set(in_db)
    assert (tmp_path / "x.jsonl").read_bytes().endswith(b"\n")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("uvloop",)])
def test_a_signal_drains(tmp_path: Path, number: int, options: tuple[str, ...]) -> None:
    with start(tmp_path, 0, *options) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        *acknowledged, end = process.stdout.read().splitlines()
        assert process.wait(30) == 0
    assert end == "drained"
    in_file, in_db = stored(tmp_path)
    count = int(acknowledged[-1] if acknowledged else 49) + 1
    assert in_file == in_db == list(range(count))


@POSIX
@pytest.mark.parametrize("portable", [False, True])
def test_a_second_signal_stops_at_once(portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[bool] = []
    counts = SecondSignal.counts

    def watched(signals: SecondSignal, number: int) -> bool:
        counted.append(counts(signals, number))
        return counted[-1]

    monkeypatch.setattr(signals_module, "_TWICE", 3600.0)
    monkeypatch.setattr(SecondSignal, "counts", watched)

    async def main() -> None:
        stop = asyncio.Event()

        async def body() -> None:
            with stopping_on_signals(stop, portable=portable):
                ready.set()
                await asyncio.Event().wait()

        ready = asyncio.Event()
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        task = asyncio.create_task(body())
        await ready.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGTERM)  # as timeout(1) does: it counts once
        while not counted:
            await asyncio.sleep(0.001)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait((task,))
        assert task.cancelled()
        assert counted == [False, True]
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    asyncio.run(asyncio.wait_for(main(), 30))


def spec(recipe: object, sink: Any) -> PipelineSpec:
    return PipelineSpec(
        name="p",
        source=SourceSpec(name="in", recipe=recipe, serializer=JsonSerializer()),  # type: ignore[arg-type]
        sinks=(SinkSpec(name="out", recipe=sink),),
    )


def test_an_embedded_run_touches_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a signal handler was set")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", never)
            patch.setattr(asyncio.get_running_loop(), "add_signal_handler", never)
            await run([spec(GeneratorSource(rate=0, count=5), MemorySink())])

    asyncio.run(asyncio.wait_for(main(), 30))


def test_once_moves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"topic":"t","value":1}\n')
    follow, generated = MemorySink(), MemorySink()
    summary = run_blocking(
        [
            spec(JsonlSource(path=path, follow=True), follow),
            spec(GeneratorSource(devices=2, rate=1000), generated),
        ],
        once=True,
    )
    assert [record.value for record in follow.into] == [1]
    assert len(generated.into) == 6
    assert (summary.received, summary.acknowledged, summary.stopped) == (7, 7, False)


class Stuck:
    """A sink that never gets a write done."""

    reads = "records"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        yield self

    async def write(self, _batch: object) -> None:
        raise ConnectorError("still full")


def test_a_signal_counts_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    signals = SecondSignal()
    signals.first(signal.SIGTERM)
    now[0] += 0.25
    assert not signals.counts(signal.SIGTERM)
    assert signals.counts(signal.SIGINT)
    now[0] += 0.01
    assert signals.counts(signal.SIGTERM)


def test_figures_go_on_during_a_drain_that_comes_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now, after = 0.0, 0

    def clock() -> float:
        """Its hours pass when the figures were told often enough."""
        nonlocal now
        now += 3600.0 if after > 2 else 0.001
        return now

    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=clock))

    async def main() -> None:
        nonlocal after
        stop = asyncio.Event()

        def on_stats(stats: Sequence[PipelineStats]) -> None:
            nonlocal after
            after += stop.is_set()
            if stats[0].received:
                stop.set()

        summary = await run(
            [spec(GeneratorSource(rate=0, count=5), Stuck())],
            stop=stop,
            on_stats=on_stats,
            stats_interval=0.01,
            drain_timeout=1000.0,
        )
        assert not summary.drained
        assert after == 4  # the last call is the one at the end

    asyncio.run(asyncio.wait_for(main(), 30))


def test_no_pipelines_are_soon_done() -> None:
    assert run_blocking([]).received == 0
