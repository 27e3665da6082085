"""What a pipeline is made of, as plain frozen objects.

Owns: the names other rooms compose a pipeline with. Rule: nothing here is live.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs

from ..backoff import Backoff
from ..protocols import Process, Serializer, Sink, Source
from .routes import TopicFields

OnError = Literal["retry", "drop", "dead_letter"]


def _valid_pattern(_instance: Any, _field: Any, pattern: str | None) -> None:
    if pattern is not None:
        TopicFields.parse(pattern)


@attrs.frozen(kw_only=True)
class SourceSpec:
    """A source to read. Pipelines that hold the same object share one reader."""

    name: str
    recipe: Source
    serializer: Serializer
    """Decodes the payloads, where a sink or a process step wants values."""
    topic_fields: str | None = attrs.field(default=None, validator=_valid_pattern)
    """Pattern such as "device/{device_id}/telemetry/{sensor_type}"; ValueError if it is not one."""


@attrs.frozen(kw_only=True)
class SinkSpec:
    """A sink to write."""

    name: str
    recipe: Sink
    serializer: Serializer | None = None
    """For a sink that reads messages: encodes its payloads anew, from the decoded values. None,
    the default, leaves payloads as they came, or behind a process step encodes them with the
    source's serializer. A sink that reads records has no use for it."""


@attrs.frozen(kw_only=True)
class PipelineSpec:
    """One source, its sinks, and what happens when a sink fails."""

    name: str
    source: SourceSpec
    sinks: tuple[SinkSpec, ...] = attrs.field(validator=attrs.validators.min_len(1))
    process: Process | None = None
    on_error: OnError = "retry"
    dead_letter: SinkSpec | None = attrs.field(default=None)
    """Where failed messages go with `on_error = "dead_letter"`, and only then."""
    retry: Backoff = attrs.field(factory=Backoff)
    max_attempts: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    """Tries before "drop" and "dead_letter" give up; "retry" never does."""

    @dead_letter.validator
    def _goes_with_on_error(self, _field: object, value: SinkSpec | None) -> None:
        if (self.on_error == "dead_letter") != (value is not None):
            raise ValueError('on_error = "dead_letter" and a dead_letter sink go together')
