"""A client whose broker does what brokers should not: bad data streams, takeovers; and what its log
says of a connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
from many_streams import FAST, RULES, broker, client as plain, data_streams, run, until

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions, driver
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.packets import Connack, Subscription
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.protocols import ClientCertificate, Connection, Duration, QuicState, QuicStatus
from tesaiot_connect.testing import Network
from tesaiot_connect.testing.pair import BundleConnection, connected_bundle

SUBACK = bytes((0x90, 4, 0, 1, 0, 1))
MALFORMED = b"\x00\x00"

OnStream = Callable[[Any, int], Awaitable[None]]


class ByHand:
    """A dialer to a broker that accepts every client and then does with each data stream what the
    test says; it is called with the stream and how many came before on all connections."""

    def __init__(self, on_stream: OnStream) -> None:
        self._on_stream = on_stream
        self.data_streams = 0
        self.control: list[bytes] = []
        """What came on control streams."""
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        near, far = connected_bundle()
        self._tasks.append(asyncio.create_task(self._serve(far)))
        return near

    async def _serve(self, far: BundleConnection) -> None:
        control = await far.accept_stream()
        await control.receive()
        await control.send(codec.encode_connack(Connack(), 5))
        self._tasks.append(asyncio.create_task(self._listen(control)))
        while True:
            stream = await far.accept_stream()
            number, self.data_streams = self.data_streams, self.data_streams + 1
            self._tasks.append(asyncio.create_task(self._one(stream, number)))

    async def _listen(self, control: Any) -> None:
        while data := await control.receive():
            self.control.append(data)

    async def _one(self, stream: Any, number: int) -> None:
        await self._on_stream(stream, number)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def client(dialer: ByHand, **options: Any) -> Client:
    return Client(dialer, ClientOptions(reconnect=FAST, **options))


def suback(data: bytes) -> bytes:
    """To the SUBSCRIBE that begins there, of one filter."""
    return SUBACK[:2] + data[2:4] + SUBACK[4:]


def test_a_stream_that_breaks_right_behind_suback_costs_the_connection_nothing() -> None:
    async def main() -> None:
        async def on_stream(stream: Any, number: int) -> None:
            answer = suback(await stream.receive())
            await stream.send(answer + MALFORMED if number == 0 else answer)

        dialer = ByHand(on_stream)
        async with (
            client(dialer, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 1)]),
        ):
            await one.connected()
            await until(lambda: dialer.data_streams == 2 or one.status.connects > 1)
            await until(lambda: one.status.connects > 1 or list(data_streams(one)) == [2])
            await until(lambda: all(inbox.subscribed for inbox in one._switchboard.inboxes))
            assert one.status.connects == 1
        await dialer.aclose()

    run(main)


def test_a_subscription_whose_stream_never_lasts_goes_to_the_control_stream() -> None:
    async def main() -> None:
        async def on_stream(stream: Any, number: int) -> None:
            await stream.send(suback(await stream.receive()))
            await asyncio.sleep(0)
            stream.abort(7)

        dialer = ByHand(on_stream)
        async with (
            client(dialer, streams=RULES) as one,
            one.subscribe([Subscription("alarms/+", 1)]),
        ):
            await one.connected()
            await until(lambda: dialer.control or dialer.data_streams > 200)
            assert dialer.data_streams < 100
            assert one.status.connects == 1
        await dialer.aclose()

    run(main)


def test_a_takeover_gets_one_reconnect_and_not_a_fight(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once may be a CONNECT of our own that came late, or one that somebody replayed."""
    monkeypatch.setattr(driver, "_STABLE", 1000.0)
    caplog.set_level(logging.INFO)

    async def main() -> None:
        network = Network()
        patient = Backoff(min=Duration(0.001), max=Duration(1000))
        async with broker(network) as server, plain(network, "same", reconnect=patient) as one:
            await one.connected()
            for connects, state in (2, "connected"), (3, "waiting"):
                assert server._hub is not None
                session = server._hub.sessions.get("same")
                assert session is not None and session.link is not None
                session.link.disconnect(R.SESSION_TAKEN_OVER, "")
                await until(lambda most=connects: one.status.connects == most or "in 1000.0 s" in caplog.text)
                assert one.status.state == state

    run(main)


@pytest.mark.parametrize(
    ("quic", "said"),
    [
        (None, "by pair, new session"),
        (QuicStatus(QuicState.ONE_RTT), "by pair, new session"),
        (QuicStatus(QuicState.ONE_RTT, resumed=True), "by pair, resumed, new session"),
        (
            QuicStatus(QuicState.ONE_RTT, resumed=True, early_data_accepted=True),
            "by pair, resumed with 0-RTT, new session",
        ),
    ],
)
def test_the_log_tells_how_the_connection_came_about(
    quic: QuicStatus | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        network = Network()
        transport = network.transport()

        class Telling:
            url, races = transport.url, transport.races

            async def connect(self, **options: Any) -> Connection:
                connection: Any = await transport.connect(**options)
                status = connection.status
                connection.status = lambda: attrs.evolve(status(), quic=quic)
                return connection  # type: ignore[no-any-return]

        async with broker(network), plain(network, transport=Telling()) as one:
            await one.connected()

    run(main)
    assert said in caplog.text
