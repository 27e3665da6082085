"""Which subscribers a topic reaches.

Owns: the subscription trie with its shared groups, and a cache from topic to subscribers. Rule:
a subscriber gets one copy of a message however many of its own filters match (MQTT 5 section 3.3.4);
a shared group gets one copy as a whole (section 4.8.2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

from ..mqtt.packets import Subscription
from ..mqtt.topics import split_shared

_CACHE_TOPICS = 20_000
_CACHE_LENGTH = 500
_CACHE_TARGETS = 2_000_000
"""Topics remembered, characters of one that is worth it, and targets of all of them: together the
bounds on the cache's memory."""


class Subscriber(Protocol):
    """What subscribes, told apart by identity: a client, or one stream of a client."""

    @property
    def online(self) -> bool: ...
    @property
    def congested(self) -> bool:
        """Whether what it gets now would have to wait."""
        ...

    @property
    def scope(self) -> Callable[[str], bool] | None:
        """Which topics it may get messages of, whatever it subscribed to; None is any."""
        ...


S = TypeVar("S", bound=Subscriber)


class Filter(NamedTuple):
    """One subscription as the server keeps it: its options, with the QoS that was granted."""

    options: Subscription
    identifier: int = 0
    """Subscription identifier, 0 is none."""


class Target(NamedTuple, Generic[S]):
    """A subscriber of a topic, with the filters that match merged into one."""

    subscriber: S
    qos: int
    """The highest granted QoS."""
    retain: bool
    """Whether a filter keeps the retain flag as published."""
    identifiers: tuple[int, ...]


class Member(NamedTuple, Generic[S]):
    """One subscription, and the target that it is where no other one of the subscriber matches."""

    filter: Filter
    target: Target[S]


class Group(Generic[S]):
    """The members of one shared subscription, taking turns."""

    __slots__ = ("_members", "_targets", "topic_filter")

    def __init__(self, topic_filter: str) -> None:
        self.topic_filter = topic_filter
        """As subscribed to: $share/<group>/<filter>."""
        self._members: dict[S, Target[S]] = {}
        self._targets: deque[Target[S]] = deque()
        """Whose turn it is, first."""

    def __len__(self) -> int:
        return len(self._members)

    def add(self, subscriber: S, subscription: Filter) -> None:
        self._members[subscriber] = _target(subscriber, [subscription])
        self._targets = deque(self._members.values())

    def remove(self, subscriber: S) -> None:
        self._members.pop(subscriber, None)
        self._targets = deque(self._members.values())

    def pick(self, topic: str, besides: S | None = None) -> Target[S] | None:
        """Whose turn it is: of the members who can take a message at once, else of those that
        are connected, else of all. `besides` is passed over, and who may not get messages to this
        topic. None when nobody is left."""
        best: Target[S] | None = None
        best_rank, place = 3, 0
        for index, target in enumerate(self._targets):
            subscriber = target.subscriber
            scope = subscriber.scope
            if subscriber is besides or (scope is not None and not scope(topic)):
                continue
            rank = (1 if subscriber.congested else 0) if subscriber.online else 2
            if rank < best_rank:
                best, best_rank, place = target, rank, index
                if rank == 0:
                    break
        if best is not None:
            del self._targets[place]
            self._targets.append(best)
        return best

    def others(self, topic: str, besides: S, *, online: bool) -> bool:
        """Whether a message to this topic could go to another member (who is connected, if `online`)."""
        return any(
            one is not besides
            and (one.online or not online)
            and ((scope := one.scope) is None or scope(topic))
            for one in self._members
        )


class Match(NamedTuple, Generic[S]):
    """Everybody a topic reaches. `no_local` holds, for the subscribers of `targets` with a no-local
    filter, what they get of messages they published themselves (None: nothing)."""

    targets: tuple[Target[S], ...]
    groups: tuple[Group[S], ...]
    no_local: dict[S, Target[S] | None]


class _Node(Generic[S]):
    __slots__ = ("children", "groups", "subscribers")

    def __init__(self) -> None:
        self.children: dict[str, _Node[S]] = {}
        self.subscribers: dict[S, Member[S]] = {}
        self.groups: dict[str, Group[S]] = {}


class Router(Generic[S]):
    """The subscriptions of everybody. Filters must be valid (`topics.check_filter`)."""

    def __init__(self) -> None:
        self._root: _Node[S] = _Node()
        self._cache: dict[str, Match[S]] = {}
        self._cached_targets = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, subscriber: S, subscription: Filter) -> bool:
        """Whether the subscription is new; an old one of the same filter is replaced."""
        group_name, topic_filter = split_shared(subscription.options.topic_filter)
        node = self._root
        for level in topic_filter.split("/"):
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node()
            node = child
        if group_name is None:
            new = subscriber not in node.subscribers
            node.subscribers[subscriber] = Member(subscription, _target(subscriber, [subscription]))
        else:
            group = node.groups.get(group_name)
            if group is None:
                group = node.groups[group_name] = Group(subscription.options.topic_filter)
            size = len(group)
            group.add(subscriber, subscription)
            new = len(group) > size
        self._count += new
        self._forget(topic_filter)
        return new

    def remove(self, subscriber: S, full_filter: str) -> bool:
        """Whether there was such a subscription."""
        group_name, topic_filter = split_shared(full_filter)
        path: list[tuple[_Node[S], str]] = []
        node = self._root
        for level in topic_filter.split("/"):
            child = node.children.get(level)
            if child is None:
                return False
            path.append((node, level))
            node = child
        if group_name is None:
            if node.subscribers.pop(subscriber, None) is None:
                return False
        else:
            group = node.groups.get(group_name)
            size = len(group) if group else 0
            if group is None:
                return False
            group.remove(subscriber)
            if len(group) == size:
                return False
            if not len(group):
                del node.groups[group_name]
        for parent, level in reversed(path):
            child = parent.children[level]
            if child.children or child.subscribers or child.groups:
                break
            del parent.children[level]
        self._count -= 1
        self._forget(topic_filter)
        return True

    def group(self, full_filter: str) -> Group[S] | None:
        """The members of a shared subscription, if it has any."""
        name, topic_filter = split_shared(full_filter)
        node: _Node[S] | None = self._root
        for level in topic_filter.split("/"):
            node = node.children.get(level) if node else None
        return node.groups.get(name or "") if node else None

    def match(self, topic: str) -> Match[S]:
        found = self._cache.get(topic)
        if found is None:
            found = self._match(topic)
            size = len(found.targets) + len(found.groups)
            if len(topic) <= _CACHE_LENGTH and size <= _CACHE_TARGETS // 10:
                if len(self._cache) >= _CACHE_TOPICS or self._cached_targets + size > _CACHE_TARGETS:
                    self._cache.clear()
                    self._cached_targets = 0
                self._cache[topic] = found
                self._cached_targets += size
        return found

    def _forget(self, topic_filter: str) -> None:
        if "+" in topic_filter or "#" in topic_filter:
            self._cache.clear()
            self._cached_targets = 0
        elif (old := self._cache.pop(topic_filter, None)) is not None:
            self._cached_targets -= len(old.targets) + len(old.groups)

    def _match(self, topic: str) -> Match[S]:
        nodes = [self._root]
        ends: list[_Node[S]] = []
        for depth, level in enumerate(topic.split("/")):
            names = (level,) if depth == 0 and topic.startswith("$") else (level, "+")
            below: list[_Node[S]] = []
            for node in nodes:
                if len(names) == 2 and (rest := node.children.get("#")) is not None:
                    ends.append(rest)
                below += [node.children[name] for name in names if name in node.children]
            nodes = below
            if not nodes:
                break
        for node in nodes:
            ends.append(node)
            if (rest := node.children.get("#")) is not None:
                ends.append(rest)
        matched: dict[S, Member[S]] = {}
        several: dict[S, list[Filter]] = {}
        groups: list[Group[S]] = []
        for node in ends:
            groups += node.groups.values()
            if not matched:
                matched = node.subscribers.copy()
                continue
            for subscriber, member in node.subscribers.items():
                first = matched.setdefault(subscriber, member)
                if first is not member:
                    several.setdefault(subscriber, [first.filter]).append(member.filter)
        no_local: dict[S, Target[S] | None] = {
            member.target.subscriber: None for member in matched.values() if member.filter.options.no_local
        }
        for subscriber, filters in several.items():
            matched[subscriber] = Member(filters[0], _target(subscriber, filters))
            own = [one for one in filters if not one.options.no_local]
            if len(own) < len(filters):
                no_local[subscriber] = _target(subscriber, own) if own else None
        targets = [member.target for member in matched.values()]
        return Match(tuple(targets), tuple(groups), no_local)


def _target(subscriber: S, filters: list[Filter]) -> Target[S]:
    return Target(
        subscriber,
        max(one.options.qos for one in filters),
        any(one.options.retain_as_published for one in filters),
        tuple(sorted({one.identifier for one in filters if one.identifier})),
    )
