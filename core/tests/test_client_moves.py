"""A client that moves to a better way, and what it tells its dialer of the ways it went."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
from many_streams import run, until
from stairs import NEVER, Far, Login, Script, Stairs, client, go_silent, scripts, two_listeners

from tesaiot_connect.client import Client, StreamRule, WillOptions, connection as live_room, moving
from tesaiot_connect.dialing import Attempt, Dialed
from tesaiot_connect.errors import ConnectFailed, Disconnected
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.events import Closed, ConnectRequest, Received, SubscribeRequest
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.protocols import Credentials, Duration
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Network


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker and a reader are waited for, however long they take: the tests that want an end of that set
    one."""
    monkeypatch.setattr(moving, "_ANSWERS", 1000.0)
    monkeypatch.setattr(moving, "_SETTLING", 1000.0)
    monkeypatch.setattr(live_room, "_FLUSH", 1000.0)


# --- in the middle of streams -------------------------------------------------------------


async def collect(reader: Any, wanted: int, got: list[Message]) -> None:
    while len(got) < wanted:
        delivery = await reader.read()
        got += delivery.batch.messages
        await delivery.ack()


def check(got: list[Message], sent: list[Message], ordered: set[int]) -> None:
    """Nothing lost, nothing twice, and these QoS in order on each topic."""
    assert sorted(one.payload for one in got) == sorted(one.payload for one in sent)
    for key in {(one.topic, one.qos) for one in sent if one.qos in ordered}:
        mine = [one.payload for one in got if (one.topic, one.qos) == key]
        assert mine == [one.payload for one in sent if (one.topic, one.qos) == key]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("streams", ["single", "up", "down", "both"])
@pytest.mark.parametrize("moment", ["natural", "forced"])
def test_moves_in_the_middle_of_streams_of_every_qos(
    protocol: str, streams: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways at once. The broker keeps QoS 0 for who is away, so nothing at all may be missing."""
    if moment == "forced":
        monkeypatch.setattr(moving, "_MOMENT", 0.0)

    async def main() -> None:
        single, many = Network(buffer=4096), Network(buffer=4096, multistream=True)
        options = BrokerOptions(queue_qos0=True, max_queue_messages=100_000)
        better = many if streams in ("up", "both") else single
        fallback = many if streams in ("down", "both") else single
        async with two_listeners(options, better=better, fallback=fallback) as (broker, high, low):
            dialer = Stairs(high, low, high, low, high, low)
            async with (
                client(
                    dialer,
                    protocol=protocol,
                    streams="single" if streams == "single" else "per-topic",
                    receive_maximum=50,
                ) as mover,
                client(low, "other") as other,
                mover.subscribe([Subscription("down/#", 2)]) as down,
                other.subscribe([Subscription("up/#", 2)]) as up,
            ):
                await other.publish([Message("down/kept", b"kept", 1, retain=True)])
                await asyncio.gather(
                    mover.publish([Message("x", b"", 1)]), other.publish([Message("x", b"", 1)])
                )
                downward = [Message(f"down/{n % 3}", b"%d" % n, n % 3) for n in range(6000)]
                upward = [Message(f"up/{n % 3}", b"%d" % n, n % 3) for n in range(6000)]
                came_down: list[Message] = []
                came_up: list[Message] = []

                async def moves() -> None:
                    for move in range(1, 6):
                        await until(lambda: min(len(came_down), len(came_up)) > 800 * move)  # noqa: B023
                        dialer.allowed.release()
                        await until(lambda: mover.status.moves == move)  # noqa: B023

                async def publish(one: Client, messages: list[Message]) -> None:
                    for start in range(0, len(messages), 100):
                        await one.publish(messages[start : start + 100])

                await asyncio.gather(
                    publish(mover, upward),
                    publish(other, downward),
                    collect(down, len(downward) + 1, came_down),
                    collect(up, len(upward), came_up),
                    moves(),
                )
                assert came_down.pop(0).payload == b"kept", "once, though there were five moves"
                check(came_down, downward, {0, 1, 2})
                check(came_up, upward, {0, 1, 2})
                assert (mover.status.connects, other.status.connects) == (6, 1)
                assert dialer.blamed == []
                assert broker.stats.subscriptions == 2

    run(main)


def test_a_reader_that_is_never_done_gets_a_pause_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It settles what it was given after more has come: only a stop of reading makes it quiet."""
    monkeypatch.setattr(moving, "_MOMENT", 0.0)

    async def main() -> None:
        async with two_listeners(BrokerOptions(max_queue_messages=1_000_000)) as (broker, high, low):
            dialer = Stairs(high, low)
            async with client(dialer) as mover, mover.subscribe(["t"]) as reader:
                await mover.publish([Message("x", b"", 1)])
                sent = 0
                got: list[bytes] = []

                async def feed() -> None:
                    nonlocal sent
                    while not mover.status.moves:
                        await broker.publish([Message("t", b"%d" % sent, 1)])
                        sent += 1
                        await asyncio.sleep(0)

                async def read() -> None:
                    while not (mover.status.moves and len(got) == sent):
                        delivery = await reader.read()
                        got.extend(one.payload for one in delivery.batch.messages)
                        before = mover.status.received
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(0.05):
                                await until(lambda: mover.status.received > before)  # noqa: B023
                        await delivery.ack()

                feeding = asyncio.create_task(feed())
                reading = asyncio.create_task(read())
                await until(lambda: len(got) > 10)
                dialer.allowed.release()
                await asyncio.gather(feeding, reading)
                assert got == [b"%d" % number for number in range(sent)]

    run(main)


def test_a_move_at_a_natural_moment_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, it takes as long as CONNECT; nothing has to time out for it."""
    monkeypatch.setattr(moving, "_MOMENT", 1000.0)
    told: list[str] = []

    async def main() -> None:
        async with two_listeners() as (_, high, low):
            dialer = Stairs(high, low)
            async with client(dialer, on_state=lambda state, _: told.append(state)) as mover:
                async with mover.subscribe(["t"]) as reader:
                    await mover.publish([Message("t", b"before", 1)])
                    await (await reader.read()).ack()
                    dialer.allowed.release()
                    await until(lambda: mover.status.moves)
                    await mover.publish([Message("t", b"after", 1)])
                    assert [one.payload for one in (await reader.read()).batch.messages] == [b"after"]

    run(main)
    assert told == ["connecting", "connected", "connecting", "connected", "closed"]


def test_the_status_and_the_log_tell_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tesaiot_connect.client")

    async def main() -> None:
        async with two_listeners() as (_, high, low):
            dialer = Stairs(high, low)
            async with client(dialer) as mover:
                assert (mover.status.url, mover.status.attempts, mover.status.better_after) == ("", (), None)
                await mover.connected()
                status = mover.status
                assert (status.url, status.endpoint) == ("pair://fallback", "listener")
                assert (status.moves, status.better_after) == (0, 5e9)
                assert [(one.endpoint, one.outcome, one.fix) for one in status.attempts] == [
                    ("pair://better", "failed", "switch it on"),
                    ("pair://fallback", "won", ""),
                ]
                dialer.allowed.release()
                await until(lambda: mover.status.moves)
                status = mover.status
                assert (status.url, status.connects, status.better_after) == ("pair://better", 2, None)
                assert [one.endpoint for one in status.attempts] == ["pair://better"]
                assert status.last_error == ""
                assert status.since >= status.attempts[0].began
            assert mover.status.state == "closed"

    run(main)
    told = "connected to listener by pair, new session; pair://better failed: it is off; it is tried again in"
    assert f"mover: {told}" in caplog.text
    assert "mover: moved from pair://fallback by pair to pair://better by pair, session kept" in caplog.text


def test_a_failed_dial_is_in_the_status() -> None:
    class Nowhere(Stairs):
        async def dial(self, **_: Any) -> Dialed:
            error = ConnectFailed("no endpoint gave a connection")
            error.attempts = (Attempt("pair://better", "failed", 1.0, 2.0, "it is off"),)
            raise error

    async def main() -> None:
        async with client(Nowhere(), reconnect=NEVER) as mover:
            with pytest.raises(ConnectFailed):
                await mover.connected(once=True)
            assert [one.reason for one in mover.status.attempts] == ["it is off"]
            assert mover.status.url == ""

    run(main)


def test_the_will_is_not_published_by_a_move() -> None:
    async def main() -> None:
        async with two_listeners() as (_, high, low):
            dialer = Stairs(high, low)
            async with (
                client(low, "witness") as witness,
                witness.subscribe(["will", "fence"]) as reader,
                client(dialer, will=WillOptions(topic="will", payload="gone")) as mover,
            ):
                await witness.publish([Message("x", b"", 1)])
                await mover.connected()
                dialer.allowed.release()
                await until(lambda: mover.status.moves)
                await mover.publish([Message("fence", b"", 1)])
                assert [one.topic for one in (await reader.read()).batch.messages] == ["fence"]

    run(main)


# --- what keeps a client where it is ------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"protocol": "3.1.1", "client_id": ""}, {"protocol": "5", "session_expiry": Duration(0)}]
)
def test_no_move_without_a_session_that_outlives_it(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tesaiot_connect.client")

    async def main() -> None:
        async with two_listeners() as (_, high, low):
            dialer = Stairs(high, low)
            dialer.allowed.release()
            async with client(dialer, **options) as mover:
                await mover.publish([Message("x", b"", 1)])
                assert (mover.status.better_after, mover.status.moves, dialer.identities) == (None, 0, [])

    run(main)
    assert "no move to it meanwhile, since the session would not be kept" in caplog.text


def test_no_move_while_a_subscription_has_a_stream_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(moving, "_AGAIN", 0.01)
    monkeypatch.setattr(moving, "_LONGEST", 0.01)

    async def main() -> None:
        many = Network(multistream=True)
        async with two_listeners(fallback=many) as (broker, high, low):
            dialer = Stairs(high, low)
            rules = (StreamRule(filter="own/#", stream="own"),)
            async with client(dialer, "", streams=rules) as mover, mover.subscribe(["own/#"]) as reader:
                await mover.connected()
                await until(lambda: mover._live and mover._live.fixed)
                await until(lambda: broker.stats.subscriptions)
                dialer.allowed.release()
                await until(lambda: caplog.text.count("a subscription has a stream of its own") > 1)
                await mover.publish([Message("own/1", b"still here", 1)])
                assert [one.payload for one in (await reader.read()).batch.messages] == [b"still here"]
                assert all(one.status().close_reason for one in dialer.prepared)
                assert mover.status.connects == 1

    caplog.set_level(logging.INFO, logger="tesaiot_connect.client")
    run(main)


def test_a_sink_that_is_slow_keeps_it_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MOMENT", "_ANSWERS", "_SETTLING", "_AGAIN", "_LONGEST"):
        monkeypatch.setattr(moving, name, 0.02)

    async def main() -> None:
        async with two_listeners() as (broker, high, low):
            dialer = Stairs(high, low)
            async with client(dialer) as mover, mover.subscribe([Subscription("t", 2)]) as reader:
                await mover.publish([Message("t", b"1", 1), Message("t", b"2", 2)])
                first = await reader.read()
                while len(first.batch.messages) < 2:
                    first = type(first).join([first, await reader.read()])
                for _ in range(10_000):  # while nobody has settled, each one fails
                    dialer.allowed.release()
                await until(lambda: len(dialer.prepared) >= 2)
                assert dialer.prepared[0].status().close_reason, "it was given up"
                assert mover.status.connects == 1
                # what waited for the move goes on where it was
                await mover.publish([Message("t", b"3", 1)])
                second = await reader.read()
                assert [one.payload for one in second.batch.messages] == [b"3"]
                await first.ack()
                await second.ack()
                await until(lambda: mover.status.moves)
                await mover.publish([Message("t", b"4", 2)])
                assert [one.payload for one in (await reader.read()).batch.messages] == [b"4"], (
                    "and nothing again"
                )
                assert dialer.blamed == []
                assert broker.stats.subscriptions == 1

    run(main)


@pytest.mark.parametrize(
    "trouble", [ConnectFailed("the vault is sealed"), KeyError("x"), asyncio.CancelledError()]
)
def test_credentials_that_cannot_be_had_cost_no_connection(
    trouble: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "_AGAIN", 0.01)

    async def main() -> None:
        async with two_listeners() as (_, high, low):
            dialer, auth = Stairs(high, low), Login(None, trouble)
            async with client(dialer, auth=auth) as mover:
                await mover.connected()
                dialer.allowed.release()
                await until(lambda: auth.begun == 2)
                await until(lambda: dialer.prepared[0].status().close_reason)
                assert mover.status.connects == 1
                dialer.allowed.release()
                await until(lambda: mover.status.moves)
                assert auth.begun == 3
                assert [one and one.certificate for one in dialer.identities] == [
                    "certificate 1",
                    "certificate 2",
                ]

    run(main)


def test_endpoints_of_different_brokers_are_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        network = Network()
        elsewhere, here = network.transport("pair://elsewhere"), network.transport("pair://here")
        async with (
            Broker().serving([ListenerSpec("a", elsewhere)]),
            Broker().serving([ListenerSpec("b", here)]),
        ):
            dialer = Stairs(here, elsewhere, here)
            async with client(dialer) as mover, mover.subscribe(["t"]) as reader:
                await mover.publish([Message("x", b"", 1)])
                dialer.allowed.release()
                dialer.allowed.release()
                await until(lambda: mover.status.moves)
                await mover.publish([Message("t", b"subscribed again", 1)])
                assert [one.payload for one in (await reader.read()).batch.messages] == [b"subscribed again"]
                assert (mover.status.moves, mover.status.better_after) == (1, None)

    run(main)
    assert "so there are no more moves" in caplog.text


# --- a broker that does what the test says ------------------------------------------------


def test_connack_may_say_that_no_session_is_kept() -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, protocol="5") as mover:
            await asyncio.gather(mover.connected(), low.accept(session_expiry=0))
            assert mover.status.better_after is None

    run(main)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_old_connection_is_left_in_order_and_the_session_goes_on(protocol: str) -> None:
    """QoS 0 that was on its way still counts; QoS 1 comes again, and nobody sees it twice."""

    async def main() -> None:
        high, low, dialer = scripts()
        session = Session()
        async with (
            client(dialer, protocol=protocol) as mover,
            mover.subscribe([Subscription("t", 2)]) as reader,
        ):
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept(session)
            await connecting
            await old.subscribed()
            await old.publish(Message("t", b"first", 1))
            first = await reader.read()
            dialer.allowed.release()
            await until(lambda: dialer.prepared)
            await first.ack()
            ended = await old.wait(Closed)
            assert ended.orderly, "so no will"
            assert P.SESSION_EXPIRY not in ended.properties
            assert high.far.qsize() == 1
            late = b"\x30\x05\x00\x01t\x00q" if protocol == "5" else b"\x30\x04\x00\x01tq"
            again = b"\x32\x07\x00\x01t\x00\x09\x00a" if protocol == "5" else b"\x32\x06\x00\x01t\x00\x09a"
            await old.stream.send(late + again)
            assert [one.payload for one in (await reader.read()).batch.messages] == [b"q"]
            assert not mover.status.moves, "the broker has not closed yet"
            publishing = asyncio.create_task(mover.publish([Message("up", b"waits", 1)]))
            await old.connection.aclose()
            new = await high.accept(session)
            assert not new.request.connect.clean_start
            assert (await new.wait(Received)).messages[0].payload == b"waits"
            publishing.cancel()
            await new.publish(Message("t", b"a", 1))
            assert [one.payload for one in (await reader.read()).batch.messages] == [b"a"]
            assert not [one for one in new.events if isinstance(one, SubscribeRequest)]

    run(main)


def test_what_is_in_flight_is_waited_for_and_what_is_new_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_MOMENT", 0.01)

    async def main() -> None:
        high, low, dialer = scripts()
        session = Session()
        async with client(dialer, protocol="5") as mover:
            first = asyncio.create_task(mover.publish([Message("t", b"first", 2)]))
            old = await low.accept(session)
            await old.wait(Received)
            dialer.allowed.release()
            await until(lambda: mover._live and mover._live._held)
            second = asyncio.create_task(mover.publish([Message("t", b"second", 1)]))
            async with mover.subscribe(["late"]):
                old.engine.settle(1)
                await old.flush()
                await old.wait(Closed)
                assert first.done(), "PUBCOMP came"
                assert not [one for one in old.events if isinstance(one, (Received, SubscribeRequest))]
                await old.connection.aclose()
                new = await high.accept(session)
                await new.subscribed()
                await new.takes()
                await second

    run(main)


def test_answers_that_do_not_come_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_MOMENT", 0.01)
    monkeypatch.setattr(moving, "_ANSWERS", 0.01)

    async def main() -> None:
        high, low, dialer = scripts()
        session = Session()
        async with client(dialer, protocol="5") as mover:
            publishing = asyncio.create_task(mover.publish([Message("t", b"1", 1), Message("t", b"2", 2)]))
            old = await low.accept(session)
            await old.wait(Received)
            dialer.allowed.release()
            await old.wait(Closed)
            await old.connection.aclose()
            new = await high.accept(Session())
            assert [one.payload for one in (await new.wait(Received)).messages] == [b"1", b"2"]
            new.engine.settle(1)
            await new.flush()
            reading = asyncio.create_task(new.wait(Closed))
            await publishing
            reading.cancel()

    run(main)


# --- ends in the middle of it -------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "silent", "eof"])
@pytest.mark.parametrize("phase", ["auth", "waiting"])
def test_the_old_connection_dies_and_the_prepared_one_is_used(phase: str, how: str) -> None:
    async def main() -> None:
        high, low, dialer = scripts()
        gate = asyncio.Event()
        auth = Login(None, gate) if phase == "auth" else None
        states: list[tuple[str, str]] = []
        async with client(
            dialer,
            auth=auth,
            protocol="5",
            reconnect=NEVER,
            on_state=lambda s, e: states.append((s, e and e.what)),
        ) as mover:
            async with mover.subscribe(["t"]) as reader:
                connecting = asyncio.create_task(mover.connected())
                old = await low.accept(session := Session())
                await connecting
                await old.subscribed()
                await old.publish(Message("t", b"held", 1))
                held = await reader.read()
                dialer.allowed.release()
                await until(lambda: dialer.prepared)
                if how == "silent":
                    go_silent(dialer.dialled[0])
                elif how == "reset":
                    old.connection.abort()
                else:
                    await old.connection.aclose()
                new = await high.accept(session)
                await until(lambda: mover.status.moves)
                await held.ack()
                assert len(dialer.dialled) == 1
                assert [name for name, _ in dialer.blamed] == (
                    ["script://fallback"] if how == "silent" else []
                )
                assert [state for state, _ in states] == [
                    *("connecting", "connected", "waiting", "connecting", "connected")
                ]
                assert states[2][1]
                await new.connection.aclose()

    run(main)


def test_who_is_sent_away_does_not_come_back_at_once_by_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_MOMENT", 1000.0)  # behind it, what the broker says waits for the reader

    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, protocol="5", reconnect=NEVER) as mover, mover.subscribe(["t"]) as reader:
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept()
            await connecting
            await old.subscribed()
            await old.publish(Message("t", b"held", 1))
            await reader.read()
            dialer.allowed.release()
            await until(lambda: dialer.prepared)
            old.engine.disconnect(0x97)
            await old.flush()
            await until(lambda: mover.status.state == "waiting")
            assert "quota" in mover.status.last_error
            assert dialer.prepared[0].status().close_reason

    run(main)


def test_a_prepared_connection_that_ends_unused_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_AGAIN", 0.01)

    async def main() -> None:
        high, low, dialer = scripts()
        async with client(dialer, protocol="5") as mover, mover.subscribe(["t"]) as reader:
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept()
            await connecting
            await old.subscribed()
            await old.publish(Message("t", b"held", 1))
            held = await reader.read()
            dialer.allowed.release()
            (await high.next()).connection.abort()
            await held.ack()
            dialer.allowed.release()
            await until(lambda: len(dialer.prepared) == 2)
            await old.wait(Closed)
            assert mover.status.connects == 1

    run(main)


@pytest.mark.parametrize("phase", ["searching", "auth", "waiting", "departing", "connecting"])
def test_closing_in_every_phase(phase: str) -> None:
    """Nothing is left of it: no task, no connection."""

    async def main() -> None:
        high, low, dialer = scripts()
        auth = Login(None, asyncio.Event()) if phase == "auth" else None
        async with client(dialer, auth=auth, protocol="5") as mover, mover.subscribe(["t"]) as reader:
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept()
            await connecting
            await old.subscribed()
            if phase == "waiting":
                await old.publish(Message("t", b"held", 1))
                await reader.read()
            if phase != "searching":
                dialer.allowed.release()
                await until(lambda: dialer.prepared)
            if phase in ("departing", "connecting"):
                await old.wait(Closed)
            if phase == "connecting":
                await old.connection.aclose()
                await (await high.next()).wait(ConnectRequest)
            await asyncio.sleep(0)
        assert mover.status.state == "closed"
        for connection in dialer.dialled + dialer.prepared:
            assert connection.status().close_reason
        assert dialer.blamed == []
        if phase in ("searching", "auth", "waiting"):
            assert (await old.wait(Closed)).orderly

    run(main)


def out_of_time(mover: Client) -> None:
    """The broker has not answered CONNECT for as long as it may."""
    assert mover._live is not None
    mover._live.engine._deadline = 0.0
    mover._live._on_time()


@pytest.mark.parametrize("how", ["refused", "silent", "gone", "reset"])
def test_a_broker_that_does_not_want_the_new_connection(how: str) -> None:
    """The old way is taken again, at once, and the new one is spoken against."""

    async def main() -> None:
        high, low, dialer = scripts()
        async with client(dialer, protocol="5", reconnect=NEVER) as mover:
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept(session := Session())
            await connecting
            dialer.allowed.release()
            await old.wait(Closed)
            if how == "gone":
                dialer.prepared[0].abort()
            await old.connection.aclose()
            if how != "gone":
                new = await high.next()
                await new.wait(ConnectRequest)
                if how == "refused":
                    new.engine.refuse(0x87)
                    await new.flush()
                elif how == "reset":
                    new.connection.abort()
                else:
                    out_of_time(mover)
            again = await low.accept(session)
            assert not again.request.connect.clean_start
            await mover.connected()
            assert (mover.status.connects, mover.status.moves) == (2, 0)
            # one that was over before it was used says nothing
            assert [name for name, _ in dialer.blamed] == ([] if how == "gone" else ["script://better"])

    run(main)


# --- what is told of ways -----------------------------------------------------------------


def test_a_path_that_went_silent_is_followed_by_another_at_once_but_only_once() -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, protocol="5", reconnect=NEVER) as mover:
            connecting = asyncio.create_task(mover.connected())
            for accepted in (1, 2):
                await low.accept()
                await until(lambda: mover.status.connects == accepted)  # noqa: B023
                go_silent(dialer.dialled[-1])
            await connecting
            await until(lambda: mover.status.state == "waiting" and len(dialer.blamed) == 2)
            assert dialer.blamed == [("script://fallback", "nothing came for 5 s")] * 2
            await asyncio.sleep(0.01)
            assert len(dialer.dialled) == 2

    run(main)


def test_haste_is_allowed_again_once_a_connection_has_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    from tesaiot_connect.client import driver

    monkeypatch.setattr(driver, "_STABLE", -1.0)

    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, protocol="5", reconnect=NEVER) as mover:
            connecting = asyncio.create_task(mover.connected())
            for accepted in range(1, 5):
                await low.accept()
                await until(lambda: mover.status.connects == accepted)  # noqa: B023
                go_silent(dialer.dialled[-1])
            await connecting

    run(main)


def test_a_plain_dialer_is_fine_too() -> None:
    async def main() -> None:
        low = Script("script://only")
        async with client(low, protocol="5", reconnect=NEVER) as mover:
            connecting = asyncio.create_task(mover.connected())
            await low.accept()
            await connecting
            assert (mover.status.url, mover.status.attempts) == ("script://only", ())
            assert mover._live is not None
            go_silent(mover._live.connection)
            await low.accept()

    run(main)


async def _silence(far: Far, mover: Client) -> None:
    pass


async def _eof(far: Far, mover: Client) -> None:
    await far.connection.aclose()


async def _refusal(far: Far, mover: Client) -> None:
    await far.wait(ConnectRequest)
    far.engine.refuse(0x87)
    await far.flush()


async def _garbage(far: Far, mover: Client) -> None:
    await far.stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9)


async def _leaving(far: Far, mover: Client) -> None:
    await far.wait(ConnectRequest)
    await mover.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("end", "blamed"),
    [(_silence, True), (_eof, True), (_garbage, True), (_refusal, False), (_leaving, False)],
)
def test_a_way_on_which_nobody_answers_is_spoken_against(end: Callable[..., Any], blamed: bool) -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        timeout = Duration(0.05 if end is _silence else 1000)
        async with client(dialer, protocol="5", reconnect=NEVER, connect_timeout=timeout) as mover:
            connecting = asyncio.create_task(mover.connected(once=True))
            await end(await low.next(), mover)
            with pytest.raises(Disconnected):
                await connecting
            assert bool(dialer.blamed) is blamed

    run(main)


def test_an_orderly_end_and_a_nack_say_nothing_against_a_way() -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, protocol="5") as mover, mover.subscribe(["t"]) as reader:
            connecting = asyncio.create_task(mover.connected())
            far = await low.accept()
            await connecting
            await far.subscribed()
            await far.publish(Message("t", b"", 1))
            await (await reader.read()).nack(RuntimeError("full"))
            far = await low.accept()
            far.engine.disconnect(0x8B)
            await far.flush()
            far = await low.accept()
            await until(lambda: mover.status.connects == 3)
            far.connection.abort()
            await low.accept()
            assert dialer.blamed == []

    run(main)


def test_an_auth_that_fails_says_nothing_against_a_way() -> None:
    class Suspicious(Login):
        credentials = Credentials(method="X", data=b"hello")

        async def finish(self, data: bytes, /) -> None:
            raise ConnectFailed("this is not our server")

    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, auth=Suspicious(ConnectFailed("no token")), protocol="5") as mover:
            connecting = asyncio.create_task(mover.connected())
            await low.accept(auth_method="X", auth_data=b"imposter")
            await until(lambda: mover.status.last_error == "this is not our server")
            assert dialer.blamed == []
            connecting.cancel()
            await asyncio.wait([connecting])

    run(main)
