"""Moves that are cut short: by who uses the client, and by brokers that take their time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from typing import Any

import pytest
from many_streams import run, until
from stairs import NEVER, Login, Stairs, client, scripts, two_listeners

from tesaiot_connect.client import WillOptions, connection, driver, moving
from tesaiot_connect.errors import Disconnected
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.events import Closed, ConnectRequest
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.testing import Network


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker and a reader are waited for, however long they take: the tests that want an end of that set
    one."""
    monkeypatch.setattr(moving, "_ANSWERS", 1000.0)
    monkeypatch.setattr(moving, "_SETTLING", 1000.0)
    monkeypatch.setattr(connection, "_FLUSH", 1000.0)
    monkeypatch.setattr(driver, "_LEAVE", 1000.0)
    monkeypatch.setattr(driver, "_PARTING", 1000.0)


class Slow(Login):
    """An auth that takes some turns of the loop to answer, and to be given up."""

    async def begin(self) -> Login:
        self.begun += 1
        try:
            await turns(3)
        except asyncio.CancelledError:
            await turns(3)
            raise
        return self


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("again", [None, 0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("read", ["settles", "holds"])
def test_cancelled_after_any_number_of_turns_it_leaves_nothing_behind(
    again: int | None, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No task, no connection, and no will, unless who leaves is cancelled in that too."""
    if read == "holds":
        for name in ("_MOMENT", "_ANSWERS", "_SETTLING"):
            monkeypatch.setattr(moving, name, 0.0)
    moved = 0

    async def main() -> None:
        nonlocal moved
        async with two_listeners() as (_, high, low):
            async with client(low, "witness") as witness, witness.subscribe(["will", "fence"]) as reader:
                await witness.publish([Message("x", b"", 1)])
                for count in range(140):
                    moved += await cut(high, low, count)
                    await witness.publish([Message("fence", b"%d" % count, 1)])
                    seen = [(one.topic, one.payload) for one in (await reader.read()).batch.messages]
                    if again is None:
                        assert seen == [("fence", b"%d" % count)]

    async def cut(high: Any, low: Any, count: int) -> int:
        dialer = Stairs(high, low)
        mover = client(dialer, auth=Slow(), will=WillOptions(topic="will", payload="gone"))

        async def body() -> None:
            async with mover, mover.subscribe(["t"]) as reader:
                await mover.publish([Message("t", b"", 1)])
                delivery = await reader.read()
                if read == "settles":
                    await delivery.ack()
                started.set()
                await asyncio.Event().wait()

        started = asyncio.Event()
        task = asyncio.create_task(body())
        await started.wait()
        dialer.allowed.release()
        await turns(count)
        task.cancel()
        if again is not None:
            await turns(again)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await turns(20)
        assert [str(task.get_name()) for task in asyncio.all_tasks() if "mover" in task.get_name()] == []
        for one in dialer.dialled + dialer.prepared:
            assert one.status().close_reason, (count, dialer.prepared)
        assert mover.status.state == "closed"
        return mover.status.moves

    run(main)
    assert moved or read == "holds", "the last ones are cut when they have moved"


def test_many_moves_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing to complain about in the debug mode of asyncio."""
    caplog.set_level(logging.CRITICAL, logger="tesaiot_connect")  # what is captured is kept

    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        single, many = Network(), Network(multistream=True)
        async with two_listeners(better=many, fallback=single) as (broker, high, low):
            dialer = Stairs(high, low)
            async with client(dialer, streams="per-topic") as mover, mover.subscribe(["t/#"]) as reader:
                got: set[tuple[str, bytes]] = set()

                async def read() -> None:
                    while True:
                        delivery = await reader.read()
                        got.update((one.topic, one.payload) for one in delivery.batch.messages)
                        await delivery.ack()

                async def there_and_back(times: int) -> tuple[int, int]:
                    for _ in range(times):
                        moves = mover.status.moves
                        dialer.allowed.release()
                        await until(lambda: mover.status.moves > moves)  # noqa: B023
                        wanted = {(f"t/{qos}", b"%d" % moves) for qos in (0, 1, 2)}
                        await mover.publish(
                            [Message(topic, b"%d" % moves, int(topic[2:])) for topic, _ in wanted]
                        )
                        await until(lambda: wanted <= got)  # noqa: B023
                        got.clear()
                        dialer.prepared.pop().abort()
                        dialer.dialled.clear()
                        await until(lambda: dialer.dialled and mover.status.state == "connected")
                    # the tasks of both ends, once the old ones have gone
                    await until(lambda: broker.stats.connections == 1)
                    gc.collect()
                    return len(gc.get_objects()), len(asyncio.all_tasks())

                reading = asyncio.create_task(read())
                await mover.connected()
                await there_and_back(20)
                asyncio.get_running_loop().set_debug(False)
                objects, tasks = await there_and_back(20)
                later, now = await there_and_back(160)
                assert now == tasks
                assert later - objects < 3 * 160, "timers that were cancelled stay a while in the loop"
                assert mover.status.connects == 401
                reading.cancel()
                await asyncio.wait([reading])

    run(main)


def test_what_is_on_data_streams_arrives_before_the_connection_is_left() -> None:
    """QoS 0 messages that nobody would send again."""

    async def main() -> None:
        network = Network(buffer=1024, multistream=True)
        async with two_listeners(fallback=network) as (_, high, low):
            dialer = Stairs(high, low)
            async with (
                client(high, "other") as other,
                other.subscribe([Subscription("up/#", 0)]) as up,
                client(dialer, streams="per-topic") as mover,
            ):
                await other.publish([Message("x", b"", 1)])
                await mover.publish([Message(f"up/{number}", b"", 0) for number in range(4)])
                await until(lambda: mover.status.streams)
                sent = [Message(f"up/{number % 4}", b"%d" % number * 100, 0) for number in range(400)]
                await mover.publish(sent)
                dialer.allowed.release()
                await until(lambda: mover.status.moves)
                got: list[Message] = []
                while len(got) < 404:
                    got += (await up.read()).batch.messages
                assert sorted(one.payload for one in got[4:]) == sorted(one.payload for one in sent)

    run(main)


@pytest.mark.parametrize("end", ["never", "takeover"])
def test_a_broker_that_does_not_close_what_was_left(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for for ever, and what it says there later harms nobody."""
    monkeypatch.setattr(connection, "_FLUSH", 0.05)
    states: list[tuple[str, object]] = []

    async def main() -> None:
        high, low, dialer = scripts()
        async with client(
            dialer, protocol="5", reconnect=NEVER, on_state=lambda state, error: states.append((state, error))
        ) as mover:
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept(session := Session())
            await connecting
            dialer.allowed.release()
            await old.wait(Closed)
            new = await high.next()
            new.request = await new.wait(ConnectRequest)
            if end == "takeover":
                with contextlib.suppress(Disconnected):
                    await old.stream.send(b"\xe0\x01\x8e")
            new.engine.accept(session, now=0.0, session_present=True)
            await new.flush()
            await until(lambda: mover.status.moves)
            publishing = asyncio.create_task(mover.publish([Message("t", b"", 1)]))
            await new.takes()
            await publishing
            assert dialer.blamed == []
            assert mover.status.last_error == ""
            assert old.connection.status().close_reason

    run(main)
    assert states == [
        (state, None) for state in ("connecting", "connected", "connecting", "connected", "closed")
    ]


def test_a_takeover_that_is_told_before_the_old_connection_is_closed() -> None:
    """The broker has the DISCONNECT, closes late, and says 0x8E there: it is no failure."""

    async def main() -> None:
        high, low, dialer = scripts()
        async with client(dialer, protocol="5", reconnect=NEVER) as mover:
            connecting = asyncio.create_task(mover.connected())
            old = await low.accept(session := Session())
            await connecting
            dialer.allowed.release()
            await old.wait(Closed)
            await old.stream.send(b"\xe0\x01\x8e")
            await old.connection.aclose()
            await high.accept(session)
            await until(lambda: mover.status.moves)
            assert (dialer.blamed, mover.status.last_error, len(dialer.dialled)) == ([], "", 1)

    run(main)
