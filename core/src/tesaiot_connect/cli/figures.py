"""Live figures of a run, on a terminal.

Owns: the table. Rule: rich is imported only here, and this module only where a terminal shows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..pipeline import PipelineStats, SinkStats


@contextlib.contextmanager
def live_figures() -> Iterator[Callable[[Sequence[PipelineStats]], None]]:
    """While open, shows the stats given to the function that it yields, below the log."""
    with Live(table(()), console=Console(stderr=True), auto_refresh=False, redirect_stdout=False) as live:

        def update(stats: Sequence[PipelineStats]) -> None:
            live.update(table(stats), refresh=True)

        yield update


def table(stats: Sequence[PipelineStats]) -> Table:
    """One row for each sink of each pipeline."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("pipeline")
    for name in ("received", "per s", "acked"):
        made.add_column(name, justify="right")
    made.add_column("sink")
    for name in ("written", "retries", "dropped", "dead"):
        made.add_column(name, justify="right")
    made.add_column("state")
    for pipeline in stats:
        first = [
            pipeline.name,
            f"{pipeline.received:,}",
            f"{pipeline.rate:,.0f}",
            f"{pipeline.acknowledged:,}",
        ]
        for sink in pipeline.sinks:
            made.add_row(*first, sink.name, *_counts(sink), _state(pipeline, sink))
            first = ["", "", "", ""]
    return made


def _counts(sink: SinkStats) -> list[str]:
    dropped = sink.dropped + sink.refused
    return [f"{number:,}" for number in (sink.written, sink.retries, dropped, sink.dead_lettered)]


def _state(pipeline: PipelineStats, sink: SinkStats) -> str:
    if sink.failing:
        return f"[red]failing: {_short(sink.last_error)}[/]"
    if pipeline.last_error and not pipeline.received:
        return f"[yellow]waiting: {_short(pipeline.last_error)}[/]"
    return "[green]ok[/]"


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("[", r"\[")
    return line if len(line) <= 60 else line[:57] + "..."
