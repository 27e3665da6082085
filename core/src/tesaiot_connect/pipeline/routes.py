"""Topics and the fields in them.

Owns: the pattern of `topic_fields` and the cache of parsed topics. Rule: a topic is parsed once;
the cache has a bound, so that topics that never repeat cannot fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from ..message import Message, Records, Route

RESERVED = frozenset({"topic", "time", "value", "extra"})
"""Names that records and tables already use."""


@attrs.frozen
class TopicFields:
    """A parsed `topic_fields` pattern.

    Levels are separated by "/". `{name}` takes one level, `{name...}` at the end takes the rest
    (at least one level). A literal level must be equal, `+` matches any level, `#` at the end
    any rest (none, too), as in a topic filter. A topic that does not match gets no fields.
    """

    levels: tuple[tuple[str | None, str | None], ...]
    """For each level: what it must be equal to, or None; the field it gives, or None."""
    tail: str | None
    """The field that takes the rest, "" for a rest without a name, None for no rest."""

    @classmethod
    def parse(cls, pattern: str) -> TopicFields:
        """Raises ValueError, saying what is wrong with the pattern."""
        levels: list[tuple[str | None, str | None]] = []
        tail: str | None = None
        names: set[str] = set()
        parts = pattern.split("/")
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            if part == "#":
                if not last:
                    raise ValueError(f"{pattern!r}: # stands only at the end")
                tail = ""
            elif part == "+":
                levels.append((None, None))
            elif part.startswith("{") and part.endswith("}"):
                name, rest = part[1:-1], False
                if name.endswith("..."):
                    name, rest = name[:-3], True
                if not name.isidentifier():
                    raise ValueError(
                        f"{pattern!r}: {part} is not a field: write a name of letters, digits and _ in braces"
                    )
                if name in RESERVED:
                    raise ValueError(f"{pattern!r}: {name!r} is the name of a column of every record")
                if name in names:
                    raise ValueError(f"{pattern!r}: the field {name!r} stands there twice")
                names.add(name)
                if rest and not last:
                    raise ValueError(f"{pattern!r}: {part} takes the rest, so it stands only at the end")
                if rest:
                    tail = name
                else:
                    levels.append((None, name))
            elif "{" in part or "}" in part or "+" in part or "#" in part:
                raise ValueError(
                    f"{pattern!r}: a field or wildcard takes a whole level, not a part of {part!r}"
                )
            else:
                levels.append((part, None))
        return cls(tuple(levels), tail)

    @property
    def names(self) -> tuple[str, ...]:
        """The fields a matching topic has, in order."""
        named = tuple(name for _, name in self.levels if name)
        return (*named, self.tail) if self.tail else named

    def match(self, topic: str) -> dict[str, str]:
        parts = topic.split("/")
        count = len(self.levels)
        if len(parts) < count or (self.tail is None and len(parts) > count):
            return {}
        if self.tail and len(parts) == count:
            return {}
        fields: dict[str, str] = {}
        for part, (literal, name) in zip(parts, self.levels, strict=False):
            if literal is not None and literal != part:
                return {}
            if name is not None:
                fields[name] = part
        if self.tail:
            fields[self.tail] = "/".join(parts[count:])
        return fields


_LONG = 512
"""Characters beyond which a topic is not worth remembering; with the limit, the bound on the memory."""


class Routes:
    """The routes of the topics seen lately."""

    def __init__(self, pattern: str | None, limit: int = 65536) -> None:
        self._fields = TopicFields.parse(pattern) if pattern else None
        self._known: dict[str, Route] = {}
        self._limit = limit

    def route(self, topic: str) -> Route:
        route = self._known.get(topic)
        return route if route is not None else self._learn((topic,))[topic]

    def records(self, messages: Sequence[Message], received: float, values: Sequence[Any]) -> Records:
        """A record for each message; `values` are its decoded payloads, in the same order."""
        topics = [message.topic for message in messages]
        try:
            known: Mapping[str, Route] = self._known
            routes = [known[topic] for topic in topics]
        except KeyError:
            known = self._learn(topics)
            routes = [known[topic] for topic in topics]
        return Records(routes, received, values, messages)

    def _learn(self, topics: Iterable[str]) -> Mapping[str, Route]:
        """A map that holds at least `topics`; the cache, unless they alone exceed its bound."""
        wanted = set(topics)
        known = self._known
        if len(known) + len(wanted) > self._limit:
            known.clear()
        if len(wanted) > self._limit or max(map(len, wanted)) > _LONG:
            known = {topic: known[topic] for topic in wanted & known.keys()}
        for topic in wanted - known.keys():
            known[topic] = Route(topic, self._fields.match(topic) if self._fields else {})
        return known
