"""The built-in components: they come in through the same hooks as anybody's.

Owns: their names. Rule: the core treats none of them in a special way.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..hookspecs import hookimpl
from ..protocols import Serializer, Sink, Source
from .generator import GeneratorSource
from .jsonl_sink import JsonlSink
from .jsonl_source import JsonlSource
from .memory import MemorySink, MemorySource
from .mqtt import MqttSink, MqttSource
from .serializers import JsonSerializer, MsgpackSerializer, RawPayload
from .sqlite import SqliteSink
from .stdio import NullSink, StdoutSink


@hookimpl
def tesaiot_serializers() -> Mapping[str, type[Serializer]]:
    return {"json": JsonSerializer, "msgpack": MsgpackSerializer, "raw": RawPayload}


@hookimpl
def tesaiot_sources() -> Mapping[str, type[Source]]:
    return {"mqtt": MqttSource, "generator": GeneratorSource, "jsonl": JsonlSource}


@hookimpl
def tesaiot_sinks() -> Mapping[str, type[Sink]]:
    return {
        "jsonl": JsonlSink,
        "sqlite": SqliteSink,
        "mqtt": MqttSink,
        "stdout": StdoutSink,
        "null": NullSink,
    }


__all__ = [
    "GeneratorSource",
    "JsonSerializer",
    "JsonlSink",
    "JsonlSource",
    "MemorySink",
    "MemorySource",
    "MqttSink",
    "MqttSource",
    "MsgpackSerializer",
    "NullSink",
    "RawPayload",
    "SqliteSink",
    "StdoutSink",
]
