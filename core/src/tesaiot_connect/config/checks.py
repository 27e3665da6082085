"""What the tables mean together: loops that would never end, and what should be known.

Owns: judgements over whole pipelines. Rule: an error only where no setting elsewhere could make
it right; everything else is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

from ..client import MqttConnection
from ..errors import Problem
from ..mqtt.topics import split_shared
from ..pipeline import PipelineSpec, SinkSpec, SourceSpec
from .document import Document
from .lines import Path


def find_loops(doc: Document, pipelines: Sequence[PipelineSpec]) -> None:
    """Report every circle of pipelines in which a message would go round for ever.

    Only where it is sure: the same connection (or the same file), topics as they come, and no
    step of the integrator's own in between.
    """
    feeds = {
        pipeline.name: [
            (place, other)
            for place, sink in _sinks(pipeline)
            for other in pipelines
            if pipeline.process is None and _feeds(pipeline.source, sink, other.source)
        ]
        for pipeline in pipelines
    }
    reported: set[frozenset[str]] = set()

    def follow(name: str, trail: tuple[str, ...], first: Path) -> None:
        for place, other in feeds[name]:
            if other.name == trail[0]:
                circle = frozenset(trail)
                if circle not in reported:
                    reported.add(circle)
                    way = " -> ".join((*trail, trail[0]))
                    fix = "Write to another topic or connection, or read a narrower one"
                    doc.problem(first or place, f"what it writes comes back to it ({way})", fix)
            elif other.name not in trail:
                follow(other.name, (*trail, other.name), first or place)

    for pipeline in pipelines:
        follow(pipeline.name, (pipeline.name,), ())


def find_warnings(doc: Document, pipelines: Sequence[PipelineSpec]) -> Iterator[Problem]:
    """What is allowed, and easily not meant."""
    used = {place for pipeline in pipelines for place in _used(pipeline)}
    for section, what in (("sources", "pipeline reads it"), ("sinks", "pipeline writes to it")):
        for name in doc.data.get(section, {}):
            if (section, name) not in used:
                yield doc.note((section, name), f"no {what}", "Name it in a pipeline, or remove it")
    for name in doc.data.get("connections", {}):
        if ("connections", name) not in used:
            fix = "Name it in a source or sink, or remove it"
            yield doc.note(("connections", name), "no source or sink of a pipeline uses it", fix)
    sources = {id(c): c for p in pipelines if (c := _connection(p.source.recipe))}
    yield from _takeovers(doc, pipelines)
    for pipeline in pipelines:
        for _place, sink in _sinks(pipeline):
            folder = getattr(getattr(sink.recipe, "path", None), "parent", None)
            if isinstance(folder, FilePath) and not folder.is_dir():
                message = f"there is no folder {folder}"
                yield doc.note(
                    ("sinks", sink.name, "path"), message, "Make it before the run, or correct the path"
                )
            connection = _connection(sink.recipe)
            if connection is not None and id(connection) in sources:
                message = "writes to a connection that is read too: it gets a client id of its own there"
                fix = 'The broker sees "<client_id>-sink"; allow it, or give the sink its own connection'
                note = doc.note(("sinks", sink.name), message, fix)
                yield note


def _takeovers(doc: Document, pipelines: Sequence[PipelineSpec]) -> Iterator[Problem]:
    """Connections that would throw each other out: one client id, at one broker."""
    used = {place[1] for pipeline in pipelines for place in _used(pipeline) if place[0] == "connections"}
    first: dict[tuple[str, str], Any] = {}
    for name, table in doc.data.get("connections", {}).items():
        client_id = table.get("client_id")
        if name not in used or not client_id:
            continue
        for endpoint in table["endpoints"]:
            url = str(endpoint["url"] if isinstance(endpoint, dict) else endpoint)
            other = first.setdefault((client_id, url), name)
            if other != name:
                message = f"has the client_id of {other!r}, at the same broker: each throws the other out"
                fix = "Give each its own, or use one connection"
                yield doc.note(("connections", name, "client_id"), message, fix)
                break


def _used(pipeline: PipelineSpec) -> Iterator[Path]:
    yield ("sources", pipeline.source.name)
    recipes: list[Any] = [pipeline.source.recipe]
    for _place, sink in _sinks(pipeline):
        yield ("sinks", sink.name)
        recipes.append(sink.recipe)
    for recipe in recipes:
        connection = _connection(recipe)
        if connection is not None:
            yield ("connections", connection.name)


def _sinks(pipeline: PipelineSpec) -> Iterator[tuple[Path, SinkSpec]]:
    for index, sink in enumerate(pipeline.sinks):
        yield ("pipelines", pipeline.name, "to", index), sink
    if pipeline.dead_letter is not None:
        yield ("pipelines", pipeline.name, "dead_letter"), pipeline.dead_letter


def _connection(recipe: Any) -> MqttConnection | None:
    found = getattr(recipe, "connection", None)
    return found if isinstance(found, MqttConnection) else None


def _feeds(source: SourceSpec, sink: SinkSpec, reader: SourceSpec) -> bool:
    """Whether what `source` brings, written to `sink`, is what `reader` reads."""
    target, origin = _connection(sink.recipe), _connection(reader.recipe)
    if target is None or origin is None:
        path = getattr(sink.recipe, "path", None)
        return path is not None and path == getattr(reader.recipe, "path", None) and str(path) != "-"
    if target is not origin:
        return False
    topic = getattr(sink.recipe, "topic", None) or "{topic}"
    # a fixed topic is written even where the source's own topics are not known (a file)
    origins = _filters(source) if "{topic}" in topic else ["-"]
    written = [topic.replace("{topic}", one) for one in origins]
    return any(_overlap(one, two) for one in written for two in _filters(reader))


def _filters(source: SourceSpec) -> list[str]:
    found = getattr(source.recipe, "subscribe", ())
    return [split_shared(getattr(one, "topic_filter", one))[1] for one in found]


def _overlap(one: str, two: str) -> bool:
    """Whether some topic matches both filters."""
    left, right = one.split("/"), two.split("/")
    for depth, (a, b) in enumerate(zip(left, right, strict=False), 1):
        if a == "#" or b == "#":
            return a == b or depth == (len(left) if a == "#" else len(right))
        if a != b and a != "+" and b != "+":
            return False
    if len(left) == len(right):
        return True
    longer = left if len(left) > len(right) else right
    return longer[min(len(left), len(right))] == "#"
