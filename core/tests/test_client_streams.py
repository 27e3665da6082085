"""The client publishes on several streams, some of which break."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from many_streams import (
    RULES,
    Watched,
    broker,
    client,
    collect,
    data_streams,
    firsts,
    listening,
    mixed,
    run,
    until,
)

from tesaiot_connect.client import StreamRule, connection as live_room, driver, streams as streams_room
from tesaiot_connect.errors import Disconnected, PartialDelivery, Unsupported
from tesaiot_connect.message import Message
from tesaiot_connect.server import BrokerOptions
from tesaiot_connect.testing import Faulty, Network

# --- publishing ---------------------------------------------------------------------------


def test_fifty_topics_share_eight_streams_and_keep_their_order() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        sent = mixed(5000, 50)
        async with (
            broker(network) as server,
            listening(network) as reader,
            client(network, "w", streams="per-topic") as one,
        ):
            publishing = asyncio.create_task(one.publish(sent))
            got = await collect(reader, {message.payload for message in sent})
            await publishing
            assert one.status.published == 5000
            assert one.status.streams == 8
            assert one.status.connects == 1
            for topic in {message.topic for message in sent}:
                assert firsts(got, topic) == [m.payload for m in sent if m.topic == topic]
            assert len(got) == len(sent), "nothing came twice"
        assert server is not None

    run(main)


def test_messages_of_every_qos_in_calls_of_every_size() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        sent = [Message(f"t/{n % 13}", b"%d" % n, n % 3) for n in range(3000)]
        async with (
            broker(network),
            listening(network) as reader,
            client(network, "w", streams="per-topic", max_streams=3) as one,
        ):
            await one.connected()
            collecting = asyncio.create_task(collect(reader, {message.payload for message in sent}))
            await asyncio.gather(
                one.publish(sent[:2000]), *(one.publish([message]) for message in sent[2000:])
            )
            got = await collecting
            assert one.status.published == 3000
            assert sorted(m.payload for m in got) == sorted(m.payload for m in sent)
            for topic in {message.topic for message in sent}:
                for qos in (0, 1, 2):
                    mine = [m.payload for m in sent if (m.topic, m.qos) == (topic, qos)]
                    assert [m.payload for m in got if (m.topic, m.qos) == (topic, qos)] == mine

    run(main)


def test_a_full_window_on_one_stream_holds_back_no_other() -> None:
    """The broker reads one of the streams no more; the others go on."""

    async def main() -> None:
        network = Network(buffer=4096, multistream=True)
        rules = (StreamRule(filter="stuck", stream="a"), StreamRule(filter="free", stream="b"))
        async with broker(network), client(network, "w", streams=rules) as one:
            await one.publish([Message("stuck", b"", 1), Message("free", b"", 1)])
            stuck = data_streams(one)[1].stream
            send = stuck.send
            gate = asyncio.Event()

            async def held(data: bytes) -> None:
                await gate.wait()
                await send(data)

            stuck.send = held
            waiting = asyncio.create_task(one.publish([Message("stuck", b"x" * 1000, 1)] * 3000))
            for _ in range(5):
                await one.publish([Message("free", b"x" * 1000, 1)] * 1000)
            await one.publish([Message("control", b"", 2)])
            assert not waiting.done()
            gate.set()
            await waiting

    run(main)


def test_each_qos_has_its_stream() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with broker(network), listening(network) as reader:
            async with client(network, "w", streams="per-qos") as one:
                await one.publish([Message("t", b"a", 2)])
                assert one.status.streams == 0
                await one.publish([Message("t", b"b", 1)])
                assert one.status.streams == 1
                await one.publish([Message("t", b"c", 0)])
                await until(lambda: one.status.streams == 2)
            await collect(reader, {b"a", b"b", b"c"})

    run(main)


def test_rules_open_streams_with_their_priority() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        opened: list[int] = []
        async with (
            broker(network),
            client(network, "w", transport=Watched(network.transport(), opened), streams=RULES) as one,
        ):
            await one.connected()
            assert opened == [0]
            await one.publish([Message("elsewhere", b"", 1)])
            assert opened == [0]
            await one.publish([Message("alarms/1", b"", 1)])
            await one.publish([Message("alarms/fire/1", b"", 1), Message("log/1", b"", 1)])
            assert opened == [0, 5, 10]
            assert one.status.streams == 2

    run(main)


@pytest.mark.parametrize("streams", ["per-topic", "per-qos", RULES])
def test_on_a_transport_with_one_stream_everything_goes_on_it(
    streams: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tesaiot_connect.client")

    async def main() -> None:
        network = Network()
        sent = [Message(f"alarms/{n % 5}", b"%d" % n, n % 3) for n in range(900)]
        async with (
            broker(network),
            listening(network) as reader,
            client(network, "w", streams=streams) as one,
        ):
            await one.publish(sent[:450])
            got = await collect(reader, {message.payload for message in sent[:450]})
            assert one._live is not None
            one._live.connection.abort()
            await until(lambda: one.status.connects == 2)
            await one.publish(sent[450:])
            got += await collect(reader, {message.payload for message in sent[450:]})
            by_qos = [[m.payload for m in got if m.qos == qos] for qos in (1, 2)]
            assert by_qos == [[m.payload for m in sent if m.qos == qos] for qos in (1, 2)]
            assert one.status.streams == 0
        assert caplog.text.count("has one stream only") == 1

    run(main)


def test_a_refused_message_is_named_whatever_its_stream() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        options = BrokerOptions(deny_publish=("no/#",), max_packet_size=2000)  # type: ignore[arg-type]
        async with broker(network, options), client(network, "w", streams="per-topic") as one:
            batch = [Message(f"t/{n}", b"", 1) for n in range(20)]
            batch[7] = Message("no/way", b"", 1)
            batch[13] = Message("t/13", b"x" * 4000, 1)
            batch[17] = Message("t/17", b"x" * 4000, 0)
            with pytest.raises(PartialDelivery) as caught:
                await one.publish(batch)
            assert sorted(caught.value.failures) == [7, 13, 17]
            assert one.status.published == 17

    run(main)


def test_a_message_that_is_none_fails_its_call_alone() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with broker(network), client(network, "w", streams="per-topic") as one:
            await one.connected()
            for wrong in (Message(None, b"", 1), Message("t", b"", "1")):  # type: ignore[arg-type]
                with pytest.raises((TypeError, AttributeError)):
                    await one.publish([Message("a", b"", 1), wrong])
            await one.publish([Message("a", b"", 1), Message("b", b"", 1)])
            assert one.status.connects == 1

    run(main)


def test_what_was_written_at_qos_0_has_arrived_when_the_client_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live_room, "_FLUSH", 1000.0)
    monkeypatch.setattr(driver, "_LEAVE", 1000.0)

    async def main() -> None:
        network = Network(buffer=1024, multistream=True)
        async with broker(network) as server, listening(network) as reader:
            before = server.stats.received
            sent = [Message(f"t/{n % 11}", b"%d" % n, 0) for n in range(2000)]
            async with client(network, "w", streams="per-topic") as one:
                await one.publish(sent)
            await until(lambda: server.stats.clients == 1)
            assert server.stats.received - before == 2000
            await collect(reader, {message.payload for message in sent})

    run(main)


# --- streams and connections that break ---------------------------------------------------


def test_a_stream_that_is_lost_in_the_middle_loses_nothing() -> None:
    async def main() -> None:
        network = Network(buffer=2048, multistream=True)
        sent = mixed(4000, 10, qos=None)
        async with (
            broker(network) as server,
            listening(network) as reader,
            client(network, "w", streams="per-topic", max_streams=4) as one,
        ):
            publishing = asyncio.create_task(one.publish(sent))
            collecting = asyncio.create_task(collect(reader, {message.payload for message in sent}))
            for number in range(20):
                await until(lambda number=number: one.status.published > 150 * number or publishing.done())
                if channels := list(data_streams(one).values()):
                    channels[number % len(channels)].stream.abort(7)
            await publishing
            got = await collecting
            assert one.status.connects == 1
            assert one.status.streams <= 4
            for topic in {message.topic for message in sent}:
                mine = [m.payload for m in sent if m.topic == topic and m.qos == 1]
                assert firsts([m for m in got if m.qos == 1], topic) == mine
            twice = [m.payload for m in got if m.qos == 2]
            assert len(set(twice)) == len(twice)
        assert server is not None

    run(main)


@pytest.mark.parametrize("allowed", [1, 2, 5])
def test_a_broker_that_allows_fewer_streams_gets_all_on_fewer(
    allowed: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        network = Network(multistream=True)
        sent = mixed(2000, 50)
        async with (
            broker(network, BrokerOptions(max_streams=allowed)),
            listening(network) as reader,
            client(network, "w", streams="per-topic") as one,
        ):
            publishing = asyncio.create_task(one.publish(sent))
            got = await collect(reader, {message.payload for message in sent})
            await publishing
            assert one.status.streams == allowed - 1
            assert one.status.connects == 1
            for topic in {message.topic for message in sent}:
                assert firsts(got, topic) == [m.payload for m in sent if m.topic == topic]
        warnings = [r for r in caplog.records if "allows fewer streams" in r.getMessage()]
        assert len(warnings) == 1
        assert "max_streams" in warnings[0].getMessage()

    run(main)


@pytest.mark.parametrize("how", ["raises", "hangs", "waits"])
def test_a_stream_that_cannot_be_opened(
    how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_room, "_OPENING", 0.05)

    async def main() -> None:
        network = Network(multistream=True, max_streams=3 if how == "waits" else None)
        refusal = [Unsupported("no more streams")] * 100 if how == "raises" else []
        transport = Watched(network.transport(), refuse=refusal, hang=how == "hangs")  # type: ignore[arg-type]
        sent = mixed(500, 50)
        async with broker(network):
            async with client(network, "w", transport=transport, streams="per-topic") as one:
                await one.publish(sent)
                assert one.status.streams == (2 if how == "waits" else 0)
                assert one.status.connects == 1
        assert caplog.text.count("allows fewer streams") == 1

    run(main)


@pytest.mark.parametrize("early_publish", [True, False])
def test_connections_that_break_again_and_again_lose_nothing(early_publish: bool) -> None:
    async def main() -> None:
        network = Network(multistream=True, early=early_publish)
        cut = Faulty(network.transport(), drop_after=300_000)
        sent = mixed(3000, 20, qos=None)
        async with (
            broker(network),
            listening(network) as reader,
            client(network, "w", transport=cut, streams="per-topic", early_publish=early_publish) as one,
        ):
            publishing = asyncio.gather(*(one.publish(sent[n : n + 500]) for n in range(0, 3000, 500)))
            got = await collect(reader, {message.payload for message in sent})
            await publishing
            assert one.status.connects > 5
            assert one.status.published == 3000
            for topic in {message.topic for message in sent}:
                mine = [m.payload for m in sent if m.topic == topic and m.qos == 1]
                assert firsts([m for m in got if m.qos == 1], topic) == mine
            twice = [m.payload for m in got if m.qos == 2]
            assert len(set(twice)) == len(twice), "QoS 2 is exactly once"

    run(main)


def test_from_many_streams_to_one_and_back_nothing_is_lost() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        cut = Faulty(network.transport(), drop_after=200_000)
        sent = mixed(3000, 20)
        async with (
            broker(network),
            listening(network) as reader,
            client(network, "w", transport=cut, streams="per-topic") as one,
        ):
            publishing = asyncio.create_task(one.publish(sent))
            collecting = asyncio.create_task(collect(reader, {message.payload for message in sent}))
            while not publishing.done():
                before = one.status.connects
                network.multistream = not network.multistream
                await until(lambda before=before: one.status.connects > before or publishing.done())
            got = await collecting
            assert one.status.connects > 5
            for topic in {message.topic for message in sent}:
                assert firsts(got, topic) == [m.payload for m in sent if m.topic == topic]

    run(main)


@pytest.mark.parametrize("how", ["abort", "disconnect", "timeout"])
def test_the_end_of_a_connection_has_its_streams_published_again(how: str) -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with broker(network) as server, client(network, "w", streams="per-topic") as one:
            await one.publish([Message("t", b"first", 1)])
            [channel] = data_streams(one).values()
            live = one._live
            assert live is not None

            async def lost(_data: bytes) -> None:
                await asyncio.Event().wait()

            channel.stream.send = lost
            before = server.stats.received
            publishing = asyncio.create_task(one.publish([Message("t", b"%d" % n, 1) for n in range(100)]))
            await asyncio.sleep(0)
            assert live.engine._link.flows[1].session.outbound, "in flight on the data stream"
            if how == "abort":
                live.connection.abort()
            elif how == "disconnect":
                one._reconnect(live, "the test says so")
            else:
                live.engine._deadline = 0.0
                live._on_time()
            await publishing
            assert one.status.connects == 2
            assert server.stats.received - before == 100

    run(main)


def test_calls_that_were_cancelled_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_room, "_FLUSH", 0.01)

    async def main() -> None:
        network = Network(multistream=True)
        async with broker(network) as server, client(network, "w", streams="per-topic") as one:
            await one.publish([Message("t", b"first", 1)])
            [channel] = data_streams(one).values()

            async def lost(_data: bytes) -> None:
                await asyncio.Event().wait()

            channel.stream.send = lost
            before = server.stats.received
            given_up = asyncio.create_task(one.publish([Message("t", b"no", 1)] * 5))
            kept = asyncio.create_task(one.publish([Message("t", b"yes", 1)]))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.wait([given_up])
            channel.stream.abort()
            await kept
            assert server.stats.received - before == 1

    run(main)


def test_an_unexpected_error_on_a_data_stream_reconnects() -> None:
    async def main() -> None:
        network = Network(multistream=True)
        async with broker(network), client(network, "w", streams="per-topic") as one:
            await one.publish([Message("t", b"first", 1)])
            [channel] = data_streams(one).values()

            async def broken(_data: bytes) -> None:
                raise ValueError("a transport of somebody's")

            channel.stream.send = broken
            await one.publish([Message("t", b"second", 1)])
            assert one.status.connects == 2

    run(main)


# --- leaving ------------------------------------------------------------------------------


def test_leaving_a_broker_that_does_not_end_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_room, "_FLUSH", 0.02)

    async def main() -> None:
        network = Network(multistream=True)
        async with broker(network):
            one = client(network, "w", streams="per-topic")
            async with one:
                await one.publish([Message("t", b"", 1)])
                [channel] = data_streams(one).values()

                async def never() -> None:
                    await asyncio.Event().wait()

                channel.stream.send_eof = never
                waiting = asyncio.create_task(one.publish([Message("t", b"", 1), Message("u", b"", 1)]))
            with contextlib.suppress(Disconnected):
                await waiting
            assert one.status.state == "closed"
            assert one.status.streams == 0

    run(main)
