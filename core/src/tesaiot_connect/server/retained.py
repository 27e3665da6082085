"""Retained messages: the last one of each topic.

Owns: the trie they are found in, their bounds and their expiry. Rule: expired messages are never
given out, and go with the next `expire`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..message import Message
from .outbox import footprint

_NODE = 300
"""Bytes of memory a level of a topic costs where no other topic shares it, measured roughly."""


class Retained:
    """At most `max_messages` and about `max_bytes` of them."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._root = _Node()
        self._entries: dict[str, _Node] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, message: Message, expires_at: float | None) -> bool:
        """Keep `message` in the place of the one before. False when a bound forbids it; the
        one before stays then."""
        old = self._entries.get(message.topic)
        size = footprint(message)
        new = 0 if old else self._root.missing(message.topic)
        grown = size - (old.size if old else 0) + new * _NODE
        if (old is None and len(self._entries) >= self._max_messages) or (
            grown > 0 and self.bytes + grown > self._max_bytes
        ):
            return False
        node = old or self._root.descend(message.topic)
        node.message, node.expires_at, node.size = message, expires_at, size
        self._entries[message.topic] = node
        self.bytes += grown
        return True

    def remove(self, topic: str) -> bool:
        """Whether there was one."""
        node = self._entries.pop(topic, None)
        if node is None:
            return False
        self.bytes -= node.size
        node.message = None
        path = [self._root]
        levels = topic.split("/")
        for level in levels:
            path.append(path[-1].children[level])
        for parent, level in zip(reversed(path[:-1]), reversed(levels), strict=True):
            child = parent.children[level]
            if child.children or child.message is not None:
                break
            del parent.children[level]
            self.bytes -= _NODE
        return True

    def current(self, message: Message) -> bool:
        """Whether this very message is still the one of its topic."""
        node = self._entries.get(message.topic)
        return node is not None and node.message is message

    def matching(self, topic_filter: str, now: float) -> list[tuple[Message, float | None]]:
        """The messages, with their expiry, whose topics match a valid, unshared filter."""
        return [
            (node.message, node.expires_at)
            for node in self._find(topic_filter)
            if node.message is not None and (node.expires_at is None or node.expires_at > now)
        ]

    def expire(self, now: float) -> list[str]:
        """Let go of everything that is over; gives the topics."""
        topics = [
            topic
            for topic, node in self._entries.items()
            if node.expires_at is not None and node.expires_at <= now
        ]
        for topic in topics:
            self.remove(topic)
        return topics

    def _find(self, topic_filter: str) -> Iterator[_Node]:
        nodes = [self._root]
        for depth, level in enumerate(topic_filter.split("/")):
            if level == "#":
                for node in nodes:
                    yield from node.all_below(with_dollar=depth > 0)
                return
            if level == "+":
                nodes = [
                    child
                    for node in nodes
                    for name, child in node.children.items()
                    if depth or not name.startswith("$")
                ]
            else:
                nodes = [node.children[level] for node in nodes if level in node.children]
        yield from nodes


class _Node:
    __slots__ = ("children", "expires_at", "message", "size")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.message: Message | None = None
        self.expires_at: float | None = None
        self.size = 0

    def missing(self, topic: str) -> int:
        """How many levels of the topic have no node yet."""
        node = self
        levels = topic.split("/")
        for index, level in enumerate(levels):
            child = node.children.get(level)
            if child is None:
                return len(levels) - index
            node = child
        return 0

    def descend(self, topic: str) -> _Node:
        node = self
        for level in topic.split("/"):
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node()
            node = child
        return node

    def all_below(self, *, with_dollar: bool) -> Iterator[_Node]:
        """This node and those below it, without recursion: a topic may have thousands of levels."""
        yield self
        rest = [child for name, child in self.children.items() if with_dollar or not name.startswith("$")]
        while rest:
            node = rest.pop()
            yield node
            rest += node.children.values()
