"""Which stream a message or a subscription is on, and subscriptions on streams of their own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from many_streams import (
    RULES,
    broker,
    client,
    collect,
    data_streams,
    run,
    until,
)

from tesaiot_connect.client import ClientOptions, StreamRule
from tesaiot_connect.client.placement import Placement
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.server import BrokerOptions
from tesaiot_connect.testing import Network

# --- where messages go --------------------------------------------------------------------


def test_placement() -> None:
    def lanes(streams: Any, *messages: Message, most: int = 8) -> list[int]:
        placement = Placement(ClientOptions(streams=streams, max_streams=most), keep_session=False)
        return [placement.lane(message) for message in messages]

    topics = [Message(f"t/{n}", b"", n % 2) for n in range(200)]
    assert set(lanes("per-topic", *topics)) == set(range(1, 9))
    assert set(lanes("per-topic", *topics, most=1)) == {1}
    assert lanes("per-topic", *topics) == lanes("per-topic", *topics), "stable"
    assert lanes("per-topic", Message("t", b"", 2)) == [0]
    assert lanes("per-qos", Message("t", b"", 0), Message("t", b"", 1), Message("t", b"", 2)) == [1, 2, 0]
    assert lanes("per-qos", Message("t", b"", 0), Message("t", b"", 1), most=1) == [1, 1]
    by_rule = {"alarms/fire/1": 1, "alarms/x": 2, "alarms/x/test": 2, "log/a": 1, "log/a/b": 0, "x": 0}
    assert lanes(RULES, *(Message(topic, b"", 1) for topic in by_rule)) == list(by_rule.values())
    assert lanes(RULES, Message("alarms/x", b"", 2)) == [0]


def test_placement_remembers_a_bounded_number_of_topics() -> None:
    placement = Placement(ClientOptions(streams="per-topic"), keep_session=False)
    for n in range(10_000):
        placement.lane(Message(f"t/{n}", b""))
    assert len(placement._lanes) <= 4096


def test_priorities_and_filters_of_rules() -> None:
    placement = Placement(ClientOptions(streams=RULES), keep_session=False)
    assert [placement.priority(lane) for lane in range(4)] == [0, 10, 5, 0]
    assert placement.lane_of_filters(["alarms/#"]) == 2
    assert placement.lane_of_filters(["alarms/fire/#"]) == 1
    assert placement.lane_of_filters(["alarms/+/x", "alarms/b"]) == 2
    assert placement.lane_of_filters(["alarms/fire/x", "log/+"]) == 1
    assert placement.lane_of_filters(["log/#"]) == 0, "the rule does not cover it"
    assert placement.lane_of_filters(["#"]) == 0
    assert placement.lane_of_filters(["alarms/#", "alarms/fire/#"]) == 0, "two streams"
    assert Placement(ClientOptions(streams=RULES), keep_session=True).lane_of_filters(["alarms/#"]) == 0
    assert Placement(ClientOptions(streams="per-topic"), keep_session=False).lane_of_filters(["a"]) == 0


def test_rules_are_checked() -> None:
    with pytest.raises(ValueError, match="names 3 streams"):
        ClientOptions(streams=RULES, max_streams=2)
    with pytest.raises(ValueError, match="whole level"):
        StreamRule(filter="a+", stream="x")
    with pytest.raises(ValueError, match="group"):
        StreamRule(filter="$share/g/a", stream="x")
    with pytest.raises(ValueError, match="name"):
        StreamRule(filter="a", stream="")
    with pytest.raises(ValueError):
        ClientOptions(max_streams=17)


# --- subscriptions ------------------------------------------------------------------------


def test_subscriptions_of_rules_have_their_stream_and_survive_its_loss() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with (
            broker(network) as server,
            client(network, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 1)]) as alarms,
            one.subscribe([Subscription("other/#", 1)]) as other,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 2 and one.status.streams == 1)
            for round_ in range(5):
                payload = b"%d" % round_
                await server.publish([Message("alarms/1", payload, 1), Message("other/1", payload, 1)])
                assert [m.payload for m in await collect(alarms, {payload})] == [payload]
                assert [m.payload for m in await collect(other, {payload})] == [payload]
                [channel] = data_streams(one).values()
                assert one._live is not None
                assert {inbox.stream for inbox in one._switchboard.inboxes} == {0, channel.number}
                channel.stream.abort()
                await until(lambda gone=channel.number: gone not in data_streams(one))
                await until(lambda: all(inbox.subscribed for inbox in one._switchboard.inboxes))
                await until(lambda: server.stats.subscriptions == 2)
            assert one.status.connects == 1
            # and after a reconnect
            one._live.connection.abort()
            await until(lambda: one.status.connects == 2 and server.stats.subscriptions == 2)
            await server.publish([Message("alarms/1", b"again", 1), Message("other/1", b"again", 1)])
            assert [m.payload for m in await collect(alarms, {b"again"})] == [b"again"]
            assert [m.payload for m in await collect(other, {b"again"})] == [b"again"]

    run(main)


def test_overlapping_subscriptions_on_two_streams_each_get_a_message_once() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with (
            broker(network) as server,
            client(network, streams=RULES) as one,
            one.subscribe([Subscription("#", 1)]) as wide,
            one.subscribe([Subscription("alarms/#", 1)]) as narrow,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 2)
            await server.publish([Message(f"alarms/{n}", b"%d" % n, 1) for n in range(10)])
            await server.publish([Message("last", b"last", 1), Message("alarms/x", b"last", 1)])
            numbers = [b"%d" % n for n in range(10)]
            got = [m.payload for m in await collect(wide, {*numbers, b"last"}) if m.payload != b"last"]
            assert got == numbers
            assert [m.payload for m in await collect(narrow, {b"last"})][:10] == numbers

    run(main)


@pytest.mark.parametrize("options", [{"protocol": "3.1.1"}, {"client_id": "kept"}, {"streams": "per-topic"}])
def test_other_subscriptions_stay_on_the_control_stream(options: dict[str, Any]) -> None:
    async def main() -> None:
        network = Network(multistream=True)
        asked = {"streams": RULES, **options}
        async with (
            broker(network) as server,
            client(network, **asked) as one,
            one.subscribe([Subscription("alarms/+", 1)]) as reader,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 1)
            await server.publish([Message("alarms/1", b"x", 1)])
            await collect(reader, {b"x"})
            assert one.status.streams == 0

    run(main)


def test_subscriptions_go_on_the_control_stream_where_no_other_can_be_had() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with (
            broker(network, BrokerOptions(max_streams=1)) as server,
            client(network, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 1)]) as reader,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 1)
            await server.publish([Message("alarms/1", b"x", 1)])
            await collect(reader, {b"x"})
            assert one.status.streams == 0
            assert one.status.connects == 1

    run(main)


def test_settling_what_a_stream_brought_after_its_end_does_no_harm() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with (
            broker(network) as server,
            client(network, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 2)]) as reader,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 1)
            await server.publish([Message("alarms/1", b"a", 1), Message("alarms/1", b"b", 2)])
            old = await reader.read()
            [channel] = data_streams(one).values()
            channel.stream.abort()
            await until(lambda: list(data_streams(one)) == [2])
            await until(lambda: all(inbox.subscribed for inbox in one._switchboard.inboxes))
            assert server.stats.subscriptions == 1
            await old.ack()
            await server.publish([Message("alarms/1", b"c", 2)])
            await collect(reader, {b"c"})
            assert one.status.connects == 1

    run(main)


def test_a_nack_reconnects() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with (
            broker(network) as server,
            client(network, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 1)]) as reader,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 1)
            await server.publish([Message("alarms/1", b"a", 1)])
            await (await reader.read()).nack(RuntimeError("the sink is full"))
            await until(lambda: one.status.connects == 2)
            await until(lambda: all(inbox.subscribed for inbox in one._switchboard.inboxes))
            assert server.stats.subscriptions == 1
            await server.publish([Message("alarms/1", b"b", 1)])
            await collect(reader, {b"b"})

    run(main)


def test_a_reader_that_lags_stops_all_streams() -> None:
    async def main() -> None:
        network = Network(buffer=4096, multistream=True)
        async with (
            broker(network, BrokerOptions(receive_maximum=65535, max_inflight=65535)) as server,
            client(network, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 1)], max_messages=50) as reader,
            one.subscribe([Subscription("other", 1)], max_messages=50) as other,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 2)
            sent = [Message(("alarms/1", "other")[n % 2], b"%d" % n + b"x" * 100, 1) for n in range(5000)]
            await server.publish(sent)
            assert one._live is not None
            live, engine = one._live, one._live.engine
            await until(lambda: live._waiting == 2)
            for _ in range(500):
                await asyncio.sleep(0)
            held = one.status.received
            assert held < 1000, "it read on although nobody took what it had"
            assert engine._paused is not None, "that the broker is silent then proves nothing"
            halves = [{m.payload for m in sent[first::2]} for first in (0, 1)]
            await asyncio.gather(collect(reader, halves[0]), collect(other, halves[1]))
            await until(lambda: engine._paused is None)
            assert one.status.connects == 1

    run(main)


def test_silence_proves_nothing_while_one_of_several_readers_still_waits() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with (
            broker(network) as server,
            client(network, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 1)], max_messages=1) as _,
            one.subscribe([Subscription("other", 1)], max_messages=1) as _,
        ):
            await one.connected()
            await until(lambda: server.stats.subscriptions == 2)
            await server.publish([Message("alarms/1", b"x", 1), Message("other", b"x", 1)])
            live = one._live
            assert live is not None
            await until(lambda: live._waiting == 2)
            [channel] = data_streams(one).values()
            resumed: list[float] = []
            live.engine.resume_reading = resumed.append  # type: ignore[method-assign]
            live._lost(channel)
            await until(lambda: channel.number not in data_streams(one))
            assert not resumed

    run(main)
