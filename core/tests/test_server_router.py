"""The subscription trie and the retained messages against a plain model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.mqtt.topics import matches
from tesaiot_connect.server import router as router_module
from tesaiot_connect.server.options import covers
from tesaiot_connect.server.retained import Retained
from tesaiot_connect.server.router import Filter, Router

LEVELS = st.sampled_from(["a", "b", "", "$SYS", "device"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = st.builds(
    lambda levels, rest: "/".join([*levels, "#"] if rest else levels),
    st.lists(st.one_of(LEVELS, st.just("+")), min_size=1, max_size=4),
    st.booleans(),
).filter(bool)


class Client:
    def __init__(self, name: str, *, online: bool = True, congested: bool = False) -> None:
        self.name = name
        self.online = online
        self.congested = congested
        self.scope: Callable[[str], bool] | None = None

    def __repr__(self) -> str:
        return self.name


def subscription(topic_filter: str, qos: int = 1, identifier: int = 0, **options: bool) -> Filter:
    return Filter(Subscription(topic_filter, qos, **options), identifier)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3), FILTERS, st.integers(0, 2)), max_size=25),
    st.lists(TOPICS, min_size=1, max_size=6),
)
def test_matches_what_a_list_of_filters_matches(
    steps: list[tuple[bool, int, str, int]], topics: list[str]
) -> None:
    clients = [Client(str(index)) for index in range(4)]
    router: Router[Client] = Router()
    model: dict[tuple[Client, str], int] = {}
    for add, index, topic_filter, qos in steps:
        client = clients[index]
        if add:
            assert router.add(client, subscription(topic_filter, qos)) == (
                (client, topic_filter) not in model
            )
            model[client, topic_filter] = qos
        else:
            assert router.remove(client, topic_filter) == (
                model.pop((client, topic_filter), None) is not None
            )
        assert len(router) == len(model)
        for topic in topics:  # after every step, so that a stale cache shows
            expected: dict[Client, int] = {}
            for (who, one), granted in model.items():
                if matches(one, topic):
                    expected[who] = max(granted, expected.get(who, 0))
            assert {t.subscriber: t.qos for t in router.match(topic).targets} == expected
    for client, topic_filter in model:
        assert router.remove(client, topic_filter)
    assert not router._root.children


def test_overlapping_filters_merge_into_one_target() -> None:
    router: Router[Client] = Router()
    client = Client("c")
    router.add(client, subscription("a/#", 0, 7))
    router.add(client, subscription("a/+", 2, 3, retain_as_published=True))
    router.add(client, subscription("a/b", 1))
    (target,) = router.match("a/b").targets
    assert target == (client, 2, True, (3, 7))


def test_no_local_leaves_the_other_filters_of_the_client() -> None:
    router: Router[Client] = Router()
    one, two = Client("1"), Client("2")
    router.add(one, subscription("a/#", 2, no_local=True))
    router.add(one, subscription("a/b", 1))
    router.add(two, subscription("a/b", 1, no_local=True))
    found = router.match("a/b")
    assert {target.subscriber: target.qos for target in found.targets} == {one: 2, two: 1}
    own = found.no_local[one]
    assert own is not None
    assert own.qos == 1
    assert found.no_local[two] is None


def test_a_group_takes_turns_and_prefers_who_is_there() -> None:
    router: Router[Client] = Router()
    members = [Client("1"), Client("2"), Client("3", online=False), Client("4", congested=True)]
    for member in members:
        router.add(member, subscription("$share/g/a/#"))
    (group,) = router.match("a/b").groups

    def turns(count: int) -> list[str]:
        return [target.subscriber.name for _ in range(count) if (target := group.pick("t"))]

    assert sorted(turns(10)) == ["1"] * 5 + ["2"] * 5
    members[0].congested = members[1].congested = True
    assert set(turns(6)) == {"1", "2", "4"}
    for member in members:
        member.online = False
    assert set(turns(8)) == {"1", "2", "3", "4"}
    for member in members[1:]:
        router.remove(member, "$share/g/a/#")
    assert turns(2) == ["1", "1"]
    assert group.pick("t", members[0]) is None
    router.remove(members[0], "$share/g/a/#")
    assert router.match("a/b").groups == ()
    assert not router._root.children


def test_groups_of_one_filter_are_separate() -> None:
    router: Router[Client] = Router()
    client = Client("1")
    for topic_filter in ("$share/g/a", "$share/h/a", "a"):
        router.add(client, subscription(topic_filter))
    found = router.match("a")
    assert len(found.groups) == 2
    assert len(found.targets) == 1
    assert router.remove(client, "$share/g/a")
    assert not router.remove(client, "$share/g/a")
    assert [group.topic_filter for group in router.match("a").groups] == ["$share/h/a"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(TOPICS, st.booleans()), max_size=20), FILTERS)
def test_retained_finds_what_the_filter_matches(steps: list[tuple[str, bool]], topic_filter: str) -> None:
    retained = Retained(1000, 10_000_000)
    model: dict[str, Message] = {}
    for number, (topic, keep) in enumerate(steps):
        if keep:
            message = Message(topic, str(number).encode(), retain=True)
            assert retained.put(message, None)
            model[topic] = message
        else:
            assert retained.remove(topic) == (model.pop(topic, None) is not None)
    found = {message.topic: message for message, _ in retained.matching(topic_filter, 0.0)}
    assert found == {topic: one for topic, one in model.items() if matches(topic_filter, topic)}
    assert len(retained) == len(model)
    for topic in model:
        retained.remove(topic)
    assert retained.bytes == 0
    assert not retained._root.children


def test_retained_is_bounded_in_messages_and_bytes() -> None:
    retained = Retained(2, 5000)
    assert retained.put(Message("a", b"x"), None)
    assert retained.put(Message("b", b"x"), None)
    assert not retained.put(Message("c", b"x"), None)
    assert retained.put(Message("a", b"y" * 100), None)
    assert not retained.put(Message("a", b"z" * 5000), None)
    assert [message.payload for message, _ in retained.matching("a", 0)] == [b"y" * 100]


def test_retained_messages_expire() -> None:
    retained = Retained(10, 10_000)
    retained.put(Message("a", b"1", properties=Properties(message_expiry=5)), 105.0)
    retained.put(Message("b", b"2"), None)
    assert len(retained.matching("#", 104.9)) == 2
    assert [message.topic for message, _ in retained.matching("#", 105.0)] == ["b"]
    retained.put(Message("c", b"3"), 110.0)
    assert retained.expire(109.0) == ["a"]
    assert retained.expire(109.0) == []
    assert retained.expire(110.0) == ["c"]
    assert len(retained) == 1


def test_deep_topics_count_with_the_memory_of_their_levels() -> None:
    retained = Retained(100_000, 1_000_000)
    topics = [f"{number}" + "/a" * 199 for number in range(1000)]
    kept = [topic for topic in topics if retained.put(Message(topic, b"x"), None)]
    nodes = sum(1 for _ in retained._root.all_below(with_dollar=True))
    assert len(kept) * 200 < nodes < 1_000_000 / 200
    for topic in kept:
        assert retained.remove(topic)
    assert retained.bytes == 0
    assert retained.put(Message(topics[-1], b"x"), None)


def test_the_cache_is_bounded_in_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_CACHE_TARGETS", 10_000)
    router: Router[Client] = Router()
    everybody = [Client(str(number)) for number in range(100)]
    for someone in everybody:
        router.add(someone, Filter(Subscription("#", 0)))
        router.add(someone, Filter(Subscription(f"t/{someone.name}", 1)))
    for number in range(1000):
        assert len(router.match(f"t/{number}").targets) == 100
        held = sum(len(match.targets) for match in router._cache.values())
        assert held == router._cached_targets <= 10_000
    assert {target.qos for target in router.match("t/5").targets} == {0, 1}
    router.remove(everybody[0], "t/0")
    router.match("t/1")
    for someone in everybody:
        router.remove(someone, f"t/{someone.name}")
    assert router._cached_targets == sum(len(match.targets) for match in router._cache.values())


@settings(max_examples=300, deadline=None)
@given(FILTERS, FILTERS, st.lists(TOPICS, min_size=1, max_size=10))
def test_a_filter_that_covers_another_matches_all_it_matches(
    wide: str, narrow: str, topics: list[str]
) -> None:
    if covers(wide, narrow):
        assert all(matches(wide, topic) for topic in topics if matches(narrow, topic))


def test_covers() -> None:
    assert covers("a/#", "a/+/b")
    assert covers("a/#", "a")
    assert covers("+/b", "$share/g/x/b")
    assert not covers("a/+", "a/#")
    assert not covers("a/b", "a/+")
    assert not covers("#", "$SYS/#")
