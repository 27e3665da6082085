"""Live figures of a run, on a terminal.

Owns: the table. Rule: rich is imported only here, and this module only where a terminal shows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..pipeline import PipelineStats, SinkStats

_COUNTS: Mapping[str, Callable[[SinkStats], int]] = {
    "written": lambda sink: sink.written,
    "retries": lambda sink: sink.retries,
    "dropped": lambda sink: sink.dropped + sink.refused,
    "dead": lambda sink: sink.dead_lettered,
}


@contextlib.contextmanager
def live_figures() -> Iterator[Callable[[Sequence[PipelineStats]], None]]:
    """While open, shows the stats given to the function that it yields, below the log."""
    with Live(table(()), console=Console(stderr=True), auto_refresh=False, redirect_stdout=False) as live:

        def update(stats: Sequence[PipelineStats]) -> None:
            live.update(table(stats), refresh=True)

        yield update


def table(stats: Sequence[PipelineStats]) -> Table:
    """One row for each sink of each pipeline; of what should not happen, only what did."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("pipeline")
    for name in ("received", "per s", "acked"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("sink")
    sinks = [sink for pipeline in stats for sink in pipeline.sinks]
    shown = [name for name, count in _COUNTS.items() if name == "written" or any(map(count, sinks))]
    for name in shown:
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("state")
    for pipeline in stats:
        first = [
            pipeline.name,
            f"{pipeline.received:,}",
            f"{pipeline.rate:,.0f}",
            f"{pipeline.acknowledged:,}",
        ]
        for sink in pipeline.sinks:
            counts = [f"{_COUNTS[name](sink):,}" for name in shown]
            made.add_row(*first, sink.name, *counts, _state(pipeline, sink))
            first = ["", "", "", ""]
    return made


def _state(pipeline: PipelineStats, sink: SinkStats) -> Text:
    if sink.failing:
        return _line(f"failing: {sink.last_error}", "red")
    if pipeline.last_error and not pipeline.received:
        return _line(f"waiting: {pipeline.last_error}", "yellow")
    return _line("ok", "green")


def _line(text: str, style: str) -> Text:
    """One line, cut where the terminal ends: the log has all of it."""
    return Text(" ".join(text.split()), style=style, no_wrap=True, overflow="ellipsis")
