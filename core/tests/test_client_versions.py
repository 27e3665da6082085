"""A client among endpoints that do not all speak MQTT 5."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from many_streams import FAST, run, until
from stairs import NEVER, Stairs, client, scripts, two_listeners
from versions import REFUSALS, Speaks, refuse

from tesaiot_connect.client import Client, ClientOptions, MqttConnection, moving
from tesaiot_connect.diagnosis import Plan, diagnose
from tesaiot_connect.errors import Refused
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.events import Closed, ConnectRequest, Received
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import Transport, Url
from tesaiot_connect.server import BrokerOptions

# --- what was under way --------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=bytes.hex)
def test_a_refusal_in_words_counts_at_any_time_and_nothing_is_lost(refusal: bytes, early: bool) -> None:
    told: list[str] = []

    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, early_publish=early, on_state=lambda state, _: told.append(state)) as one:

            async def sends(topic: str, qos: int) -> tuple[asyncio.Task[None], Received]:
                publishing = asyncio.create_task(one.publish([Message(topic, b"x", qos)]))
                return publishing, await old.wait(Received)

            connecting = asyncio.create_task(one.connected())
            old = await low.accept(session := Session())
            await connecting
            assert one.status.version == "5"
            halfway, received = await sends("halfway", 2)
            old.engine.settle(received.token)
            await old.flush()
            assert await old.stream.receive() == b"\x62\x02\x00\x01", "PUBREL"
            at_least_once, _ = await sends("a", 1)
            exactly_once, held = await sends("e", 2)
            old.connection.abort()
            later = asyncio.create_task(one.publish([Message("l", b"x", 1)]))
            await refuse(await low.next(), refusal)

            new = await low.accept(session)
            assert (new.request.connect.version, new.request.connect.clean_start) == (4, False)
            again = b"\x62\x02\x00\x01\x3a\x06\x00\x01a\x00\x02x\x3c\x06\x00\x01e\x00\x03x"
            data = b""
            while len(data) < len(again):
                data += await new.stream.receive()
            assert data.startswith(again)
            new.events += new.engine.receive_data(data, now=0.0)
            new.engine.settle(held.token)
            while not later.done():
                got: Received = await new.wait(Received)
                assert {one.topic for one in got.messages} <= {"a", "l"}
                new.engine.settle(got.token)
                await new.flush()
                if [one.topic for one in got.messages][-1] == "l":
                    break
            handling = asyncio.create_task(new.wait(Closed))
            await asyncio.gather(halfway, at_least_once, exactly_once, later)
            await one.connected()
            assert (one.status.version, one.status.last_error) == ("3.1.1", "")
            assert dialer.blamed == []
            new.connection.abort()
            await asyncio.wait([handling])
            handling.exception()
            assert (await low.accept(session)).request.connect.version == 4, "as long as it is spoken"

    run(main)
    assert told[:6] == ["connecting", "connected", "waiting", "connecting", "connecting", "connected"]


def test_silence_counts_only_before_anything_was_accepted() -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer) as one:
            connecting = asyncio.create_task(one.connected())
            (await low.next()).connection.abort()
            for version in (4, 5):
                mute = await low.next()
                assert (await mute.wait(ConnectRequest)).connect.version == version
                if version == 5:
                    mute.engine.accept(Session(), now=0.0, session_present=False)
                    await mute.flush()
                    await connecting
                mute.connection.abort()
            await (await low.next()).connection.aclose()
            assert (await low.accept()).request.connect.version == 5

    run(main)


def test_what_was_said_in_words_stays_said_though_nothing_was_accepted() -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer) as one:
            connecting = asyncio.create_task(one.connected())
            await refuse(await low.next())
            mute = await low.next()
            assert (await mute.wait(ConnectRequest)).connect.version == 4
            mute.connection.abort()
            assert (await low.accept()).request.connect.version == 4
            await connecting

    run(main)


@pytest.mark.parametrize(("protocol", "version"), [("5", 5), ("auto", 4)])
def test_a_version_that_is_refused_and_has_no_other_is_a_refusal_for_good(
    protocol: str, version: int
) -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, protocol=protocol, reconnect=NEVER) as one:
            connecting = asyncio.create_task(one.connected())
            if version == 4:
                await refuse(await low.next())
            last = await low.next()
            assert (await last.wait(ConnectRequest)).connect.version == version
            last.engine.refuse(0x84)
            await last.flush()
            with pytest.raises(Refused, match="version"):
                await connecting

    run(main)


# --- a move --------------------------------------------------------------------------------


def test_a_move_to_an_endpoint_that_speaks_3_1_1_alone() -> None:
    """The way is good, and so is not spoken against."""

    async def main() -> None:
        high, low, dialer = scripts()
        async with (
            client(dialer, reconnect=NEVER) as mover,
            mover.subscribe([Subscription("t", 1)]) as reader,
        ):
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept(session := Session())
            await connecting
            await old.subscribed()
            dialer.allowed.release()
            await old.wait(Closed)
            publishing = asyncio.create_task(mover.publish([Message("x", b"", 1)]))
            await old.connection.aclose()
            dialer.ways = (high,)  # as a dialer that tries the best one first
            await refuse(await high.next())
            new = await high.accept(session)
            assert (new.request.connect.version, new.request.connect.clean_start) == (4, False)
            new.engine.settle((await new.wait(Received)).token)
            await new.publish(Message("t", b"kept", 1))
            await publishing
            assert [one.payload for one in (await reader.read()).batch.messages] == [b"kept"]
            assert dialer.blamed == []
            assert (mover.status.connects, mover.status.url) == (2, "script://better")

    run(main)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"client_id": ""}, "set `client_id`, so that"),
        ({"clean_session": True}, "set `clean_session = false`, so that"),
        ({"protocol": "5"}, 'set `protocol = "auto"`, or take it out'),
        ({"protocol": "5", "client_id": ""}, 'set `protocol = "auto"`, and set `client_id`, or take it out'),
    ],
)
def test_no_move_costs_the_session(
    options: dict[str, Any], fix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the other version would end it, the old way is taken again, and there are no more moves."""

    async def main() -> None:
        high, low, dialer = scripts()
        async with client(dialer, **{"client_id": "mover", **options}, reconnect=NEVER) as mover:
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept()
            await connecting
            dialer.allowed.release()
            await old.wait(Closed)
            await old.connection.aclose()
            await refuse(await high.next())
            again = await low.accept(Session())
            assert (again.request.connect.version, again.request.connect.clean_start) == (5, False)
            await mover.connected()
            assert [name for name, _ in dialer.blamed] == ["script://better"]
            assert mover.status.better_after is None

    run(main)
    assert "script://better does not speak MQTT 5, in which" in caplog.text
    assert fix in caplog.text


def test_a_session_of_this_run_alone_ends_with_the_change_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, "") as one:
            connecting = asyncio.create_task(one.connected())
            old = await low.accept()
            await connecting
            publishing = asyncio.create_task(one.publish([Message("a", b"x", 1)]))
            await old.wait(Received)
            old.connection.abort()
            for _ in range(2):  # there is no other endpoint that would speak MQTT 5
                await refuse(await low.next())
            new = await low.accept()
            assert (new.request.connect.version, new.request.connect.clean_start) == (4, True)
            assert len(dialer.blamed) == 1
            new.engine.settle((await new.wait(Received)).token)
            await new.flush()
            await publishing

    run(main)
    assert [one.levelname for one in caplog.records if "ends with the change" in one.message] == ["WARNING"]


# --- with a broker -------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def old_and_new() -> AsyncIterator[tuple[Speaks, Transport]]:
    """Two ways to a broker."""
    options = BrokerOptions(max_queue_messages=100_000)
    async with two_listeners(options) as (_, one, other), asyncio.TaskGroup() as group:
        yield Speaks(Url("old", "endpoint"), one, group, 4), other


async def flood(one: Client, topic: str, numbers: range) -> None:
    for start in range(numbers.start, numbers.stop, 50):
        await one.publish([Message(topic, b"%d" % n, 1 + n % 2) for n in range(start, start + 50)])


async def collect(reader: Any, wanted: int, got: list[bytes]) -> None:
    while len(set(got)) < wanted:
        delivery = await reader.read()
        got += [message.payload for message in delivery.batch.messages]
        await delivery.ack()


@pytest.mark.parametrize("way", ["breaks", "moves"])
def test_a_stream_of_messages_goes_on_in_the_other_version(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways at once, QoS 1 and 2; what is of QoS 2 comes once."""
    monkeypatch.setattr(moving, "_SETTLING", 1000.0)
    count = 3000

    async def main() -> None:
        async with old_and_new() as (old, new):
            dialer = Stairs(old, new)
            up: list[bytes] = []
            down: list[bytes] = []
            async with (
                client(dialer) as one,
                client(new, "other") as other,
                one.subscribe([Subscription("down", 2)]) as below,
                other.subscribe([Subscription("up", 2)]) as above,
            ):
                await asyncio.gather(*(each.publish([Message("x", b"", 1)]) for each in (one, other)))

                async def change() -> None:
                    await until(lambda: min(len(up), len(down)) > count // 3)
                    dialer.ways = (old,)
                    if way == "moves":
                        dialer.ways = (old, new)
                        dialer.allowed.release()
                        await until(lambda: old.versions)
                    else:
                        dialer.dialled[-1].abort()
                    await until(lambda: one.status.version == "3.1.1" and one.status.state == "connected")

                await asyncio.gather(
                    flood(one, "up", range(count)),
                    flood(other, "down", range(count)),
                    collect(below, count, down),
                    collect(above, count, up),
                    change(),
                )
                assert one.status.session_present
                for got in (up, down):
                    assert {int(payload) for payload in got} == set(range(count))
                    twice = [payload for payload in set(got) if got.count(payload) > 1]
                    assert not [payload for payload in twice if int(payload) % 2], "QoS 2"
            assert old.versions[0] == 5 or way == "breaks"

    run(main)


def test_the_doctor_finds_the_version_that_an_endpoint_speaks() -> None:
    async def main() -> None:
        async with old_and_new() as (old, new):
            connection = MqttConnection("both", Negotiator([old, new]), ClientOptions(reconnect=FAST))
            (found,) = await diagnose({"both": connection}, Plan())
            assert [one.accepted and one.accepted.version for one in found.findings] == ["3.1.1", "5"]
            assert [one.problem for one in found.findings] == [None, None]
            assert [one.steps["echo"].outcome for one in found.findings] == ["ok", "ok"]
            assert old.versions == [5, 4, 5, 4]

    run(main)
