"""What a pipeline has done so far.

Owns: the counters. Rule: they are updated once per batch, count messages unless they say
otherwise, and only ever grow while a run lasts.
"""

from __future__ import annotations

import attrs


@attrs.define
class SinkStats:
    """One sink of one pipeline."""

    name: str
    written: int = 0
    """Messages (records behind a process step) the sink has confirmed."""
    batches: int = 0
    retries: int = 0
    """Attempts that failed and were made again."""
    refused: int = 0
    """Messages that can never be written (the broker refused them, the value has no such form)
    and were logged and passed over, with `on_error = "retry"`."""
    dropped: int = 0
    dead_lettered: int = 0
    failing: bool = False
    last_error: str = ""


@attrs.define
class PipelineStats:
    """One pipeline and its sinks. `rate` is in messages per second, over the last interval."""

    name: str
    source: str
    sinks: list[SinkStats] = attrs.field(factory=list)
    received: int = 0
    bytes: int = 0
    """Payload bytes received."""
    batches: int = 0
    acknowledged: int = 0
    undecodable: int = 0
    dropped: int = 0
    """Messages given up before any sink: undecodable, or the process step failed on them."""
    dead_lettered: int = 0
    """As `dropped`, where they went to the dead-letter sink."""
    retries: int = 0
    """Attempts of the process step that failed and were made again."""
    reopened: int = 0
    """Times the source was opened again after it was lost."""
    rate: float = 0.0
    last_error: str = ""
