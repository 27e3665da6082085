"""The pump: reads deliveries, writes them to every sink, acknowledges them.

Owns: the way of a batch from a source to its sinks, retry, and when a delivery is settled.
Rule: a delivery is acknowledged after every sink has it (or its `on_error` says what became of
it), and the unit is the batch: nothing here is awaited or called once per message.

It runs from plain objects: it knows no TOML, no plugin and no signal.
"""

from __future__ import annotations

from .outlet import Ready
from .pump import Feed, Pump, Tee
from .routes import Routes, TopicFields
from .specs import OnError, PipelineSpec, SinkSpec, SourceSpec
from .stats import PipelineStats, SinkStats

__all__ = [
    "Feed",
    "OnError",
    "PipelineSpec",
    "PipelineStats",
    "Pump",
    "Ready",
    "Routes",
    "SinkSpec",
    "SinkStats",
    "SourceSpec",
    "Tee",
    "TopicFields",
]
