"""Which stream of a connection a message or a subscription belongs on.

Owns: that choice, as numbers of lanes: 0 is the control stream, each other lane gets a data
stream when it is first needed. Rules: one topic has one lane; what must outlive a stream, QoS 2
and the subscriptions of a session that is kept, stays on the control stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from ..message import Message
from ..mqtt.topics import matches
from .options import ClientOptions

_CACHE_LIMIT = 4096


class Placement:
    """The `streams` of the options, which are not "single". `keep_session`: beyond this run."""

    def __init__(self, options: ClientOptions, *, keep_session: bool) -> None:
        self._streams = options.streams
        self._most = options.max_streams
        self._keep_session = keep_session
        rules = () if isinstance(options.streams, str) else options.streams
        names = list(dict.fromkeys(rule.stream for rule in rules))
        self._names = dict(enumerate(names, 1))
        self._rules = tuple((rule.filter, names.index(rule.stream) + 1) for rule in rules)
        self._priorities = {
            lane: max(rule.priority for rule in rules if rule.stream == name)
            for lane, name in self._names.items()
        }
        self._lanes: dict[str, int] = {}

    def lane(self, message: Message) -> int:
        """Raises what a message that is none raises."""
        if message.qos == 2:
            return 0
        if self._streams == "per-qos":
            return 1 + message.qos % self._most
        topic = message.topic
        lane = self._lanes.get(topic)
        if lane is None:
            if len(self._lanes) >= _CACHE_LIMIT:
                self._lanes.clear()
            lane = self._lanes[topic] = self._find(topic)
        return lane

    def _find(self, topic: str) -> int:
        if self._streams == "per-topic":
            return 1 + crc32(topic.encode()) % self._most
        return next((lane for one, lane in self._rules if matches(one, topic)), 0)

    def lane_of_filters(self, filters: Sequence[str]) -> int:
        """Of a subscription: where rules put all that its filters (unshared) can bring, if that is
        one stream and the session need not outlive it."""
        if self._keep_session:
            return 0
        lanes = {next((lane for one, lane in self._rules if _covers(one, each)), 0) for each in filters}
        return lanes.pop() if len(lanes) == 1 else 0

    def priority(self, lane: int) -> int:
        """The higher goes first."""
        return self._priorities.get(lane, 0)

    def name(self, lane: int) -> str:
        """For messages to the user."""
        return repr(self._names.get(lane, f"{self._streams} {lane}"))


def _covers(rule: str, topic_filter: str) -> bool:
    """Whether every topic that matches the filter matches the rule."""
    return matches(rule, topic_filter) and (rule.endswith("#") or not topic_filter.endswith("#"))
