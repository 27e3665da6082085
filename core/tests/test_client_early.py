"""CONNECT, and QoS 1 messages behind it, that go along with the transport's handshake."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import attrs
import pytest

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions
from tesaiot_connect.errors import ConnectFailed, Disconnected, PartialDelivery, Refused
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.events import ConnectRequest, Event, Received, Send
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import ClientCertificate, Connection, Credentials, Duration
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Network
from tesaiot_connect.testing.pair import BundleConnection, PairConnection, connected_bundle, connected_pair

FAST = Backoff(min=Duration(0.001), max=Duration(0.01))
FOREVER = Backoff(min=Duration(1000), max=Duration(1000))


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await main()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def broker(network: Network, options: BrokerOptions | None = None) -> AsyncIterator[Broker]:
    server = Broker(options)
    async with server.serving([ListenerSpec("pair", network.transport())]):
        yield server


@contextlib.asynccontextmanager
async def publishing(one: Client, *messages: Message) -> AsyncIterator[asyncio.Task[None]]:
    """A publish that has begun; what it raises is the test's."""
    task = asyncio.create_task(one.publish(messages))
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def numbered(count: int, qos: int = 1) -> list[Message]:
    return [Message("t", b"%d" % number, qos) for number in range(count)]


class Dialled:
    """A dialer whose connections wait at the other end, each with its early bytes."""

    def __init__(self, *, early_sent: bool = False, multistream: bool = False, failures: int = 0) -> None:
        self.early_sent = early_sent
        self.multistream = multistream
        self.failures = failures
        self.offered: list[bytes] = []
        self.far: asyncio.Queue[PairConnection | BundleConnection] = asyncio.Queue()

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.offered.append(early)
        if self.failures:
            self.failures -= 1
            raise ConnectFailed("the path is down", fix="wait")
        near, far = connected_bundle() if self.multistream else connected_pair()
        if self.early_sent:
            near.send_early(early)
        self.far.put_nowait(far)
        return near

    async def accept(self) -> Far:
        far = await self.far.get()
        return Far(await far.accept_stream(), far)


class Far:
    """The broker's end of a control stream, which does what the test says."""

    def __init__(self, stream: Any, connection: Any) -> None:
        self.stream = stream
        self.connection = connection
        self.engine = ServerEngine(ServerLimits(), now=0.0)
        self.heard = b""

    async def next(self, kind: type[Event] | tuple[type[Event], ...]) -> Any:
        while True:
            for event in self.engine.take_events():
                if isinstance(event, kind):
                    return event
            data = await self.stream.receive()
            self.heard += data
            assert data, "the client has closed"
            for event in self.engine.receive_data(data, now=0.0):
                if isinstance(event, kind):
                    return event

    async def accept(self, session: Session | None = None, **properties: Any) -> None:
        await self.next(ConnectRequest)
        found = {P[name.upper()]: value for name, value in properties.items()}
        self.engine.accept(
            session or Session(), now=0.0, session_present=session is not None, properties=found
        )
        await self.flush()

    async def flush(self) -> None:
        for output in self.engine.outputs():
            if isinstance(output, Send):
                await self.stream.send(output.data)


def client(dialer: Any, **options: Any) -> Client:
    options.setdefault("reconnect", FAST)
    options.setdefault("client_id", "c")
    return Client(dialer, ClientOptions(**options))


# --- CONNECT ------------------------------------------------------------------------------


@pytest.mark.parametrize("multistream", [True, False])
@pytest.mark.parametrize("early_sent", [True, False])
def test_connect_is_always_offered_and_sent_exactly_once(early_sent: bool, multistream: bool) -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=early_sent, multistream=multistream)
        async with client(dialer) as one:
            connecting = asyncio.create_task(one.connected())
            far = await dialer.accept()
            await far.accept()
            await connecting
            assert dialer.offered == [far.heard]
            assert far.heard[0] == 0x10

    run(main)


def test_the_broker_serves_clients_whose_connect_came_early() -> None:
    async def main() -> None:
        network = Network(early=True, multistream=True)
        async with broker(network), client(Negotiator([network.transport()])) as one:
            async with one.subscribe([Subscription("t", 1)]) as reader:
                await one.connected()
                await one.publish([Message("t", b"x", 1)])
                assert [m.payload for m in (await reader.read()).batch.messages] == [b"x"]

    run(main)


def test_the_time_for_connack_begins_when_the_connection_is_there() -> None:
    @attrs.define
    class Slow:
        inner: Dialled

        async def connect(
            self, *, identity: ClientCertificate | None = None, early: bytes = b""
        ) -> Connection:
            loop = asyncio.get_running_loop()
            real = loop.time
            loop.time = lambda: real() + 15  # type: ignore[method-assign]
            return await self.inner.connect(early=early)

    async def main() -> None:
        dialer = Dialled()
        async with client(Slow(dialer), reconnect=FOREVER) as one:
            connecting = asyncio.create_task(one.connected(once=True))
            far = await dialer.accept()
            await far.accept()
            await connecting
            assert one.status.connects == 1

    run(main)


# --- messages behind it -------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("early_sent", [True, False])
def test_waiting_messages_go_right_behind_connect(early_sent: bool, protocol: str) -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=early_sent)
        async with (
            client(dialer, early_publish=True, protocol=protocol) as one,
            publishing(one, *numbered(40)) as task,
        ):
            far = await dialer.accept()
            await far.next(ConnectRequest)
            assert far.heard == dialer.offered[0]
            far.engine.accept(Session(), now=0.0, session_present=False)
            [received] = far.engine.take_events()
            assert isinstance(received, Received)
            assert received.messages == numbered(16)
            far.engine.settle(received.token)
            await far.flush()
            got = list(received.messages)
            while len(got) < 40:
                more = await far.next(Received)
                got += more.messages
                far.engine.settle(more.token)
                await far.flush()
            assert got == numbered(40)
            await task
            assert one.status.published == 40

    run(main)


@pytest.mark.parametrize("options", [{}, {"early_publish": True}])
def test_nothing_goes_early_unasked_or_at_another_qos(options: dict[str, Any]) -> None:
    async def main() -> None:
        dialer = Dialled()
        qos = 2 if options else 1
        async with client(dialer, **options) as one, publishing(one, *numbered(3, qos)):
            far = await dialer.accept()
            await far.accept()
            assert (await far.next(Received)).messages == numbered(3, qos)
            assert len(dialer.offered[0]) == 2 + dialer.offered[0][1], "CONNECT and no more"

    run(main)


def test_a_dial_that_fails_loses_nothing_and_the_next_sends_them_early_again() -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=True, failures=3)
        async with client(dialer, early_publish=True) as one, publishing(one, *numbered(3)) as task:
            far = await dialer.accept()
            await far.accept()
            received = await far.next(Received)
            assert received.messages == numbered(3)
            assert {len(early) for early in dialer.offered} == {len(far.heard)}
            far.engine.settle(received.token)
            await far.flush()
            await task

    run(main)


def test_a_connection_without_a_stream_loses_nothing() -> None:
    @attrs.define
    class Broken:
        inner: Dialled
        left: int = 1

        async def connect(
            self, *, identity: ClientCertificate | None = None, early: bytes = b""
        ) -> Connection:
            connection = await self.inner.connect(early=early)
            if self.left:
                self.left -= 1
                connection.abort()
            return connection

    async def main() -> None:
        dialer = Dialled(multistream=True)
        async with client(Broken(dialer), early_publish=True) as one, publishing(one, *numbered(3)):
            await dialer.far.get()
            far = await dialer.accept()
            await far.accept()
            assert (await far.next(Received)).messages == numbered(3)

    run(main)


@pytest.mark.parametrize("kept", [True, False])
def test_a_connection_that_dies_before_connack_has_them_sent_again(kept: bool) -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=True)
        async with (
            client(dialer, early_publish=True, protocol="5") as one,
            publishing(one, *numbered(3)) as task,
        ):
            first = await dialer.accept()
            await first.next(ConnectRequest)
            first.stream.abort()
            again = await dialer.accept()
            assert dialer.offered[1] == dialer.offered[0][: 2 + dialer.offered[0][1]], "nothing early"
            await again.accept(Session() if kept else None)
            received = await again.next(Received)
            assert received.messages == numbered(3)
            assert again.heard[len(dialer.offered[1])] == (0x3A if kept else 0x32)
            again.engine.settle(received.token)
            await again.flush()
            await task

    run(main)


def test_a_refusal_keeps_them_for_later() -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=True)
        async with client(dialer, early_publish=True) as one, publishing(one, *numbered(3)):
            first = await dialer.accept()
            await first.next(ConnectRequest)
            first.engine.refuse(0x89)  # server busy
            await first.flush()
            await until(lambda: one.status.last_error)
            with pytest.raises(Refused):
                await one.connected(once=True) if one.status.state == "waiting" else _fail(one)
            again = await dialer.accept()
            await again.accept()
            assert (await again.next(Received)).messages == numbered(3)

    def _fail(one: Client) -> Any:
        assert one._failure is not None
        raise one._failure

    run(main)


def test_what_connack_excludes_is_refused() -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=True)
        large = Message("t", b"x" * 1000, 1)
        async with client(dialer, early_publish=True) as one, publishing(one, large, *numbered(2)) as task:
            far = await dialer.accept()
            await far.accept(maximum_packet_size=500)
            received = await far.next(Received)
            far.engine.settle(received.token)
            await far.flush()
            with pytest.raises(PartialDelivery) as caught:
                await task
            assert list(caught.value.failures) == [0]

    run(main)


def test_the_next_connection_keeps_to_what_the_broker_said_on_the_last() -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=True)
        async with client(dialer, early_publish=True) as one:
            connecting = asyncio.create_task(one.connected())
            first = await dialer.accept()
            await first.accept(receive_maximum=2)
            await connecting
            dialer.failures = 1_000_000
            first.connection.abort()
            await until(lambda: len(dialer.offered) > 1)
            async with publishing(one, *numbered(5)):
                dialer.failures = 0
                again = await dialer.accept()
                early = dialer.offered[-1]
                assert early.count(b"\x32\x07") == 2
                await again.accept(receive_maximum=2)
                assert (await again.next(Received)).messages == numbered(2)

    run(main)


def test_with_enhanced_authentication_nothing_goes_early() -> None:
    class Login:
        credentials = Credentials(method="M", data=b"1")

        async def begin(self) -> Any:
            return self

        async def identity(self) -> None:
            return None

        async def respond(self, data: bytes, /) -> bytes:
            return data

        async def finish(self, data: bytes, /) -> None:
            pass

    async def main() -> None:
        dialer = Dialled(early_sent=True)
        options = ClientOptions(client_id="c", early_publish=True, reconnect=FAST)
        async with Client(dialer, options, auth=Login()) as one, publishing(one, *numbered(3)):
            far = await dialer.accept()
            await far.accept()
            assert len(dialer.offered[0]) == 2 + dialer.offered[0][1]
            assert (await far.next(Received)).messages == numbered(3)

    run(main)


def test_a_message_that_is_none_fails_its_call_alone() -> None:
    async def main() -> None:
        dialer = Dialled(early_sent=True)
        async with client(dialer, early_publish=True) as one:
            wrong = asyncio.create_task(one.publish([Message(None, b"", 1)]))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            async with publishing(one, *numbered(3)):
                far = await dialer.accept()
                with pytest.raises((TypeError, AttributeError)):
                    await wrong
                await far.accept()
                assert (await far.next(Received)).messages == numbered(3)

    run(main)


def test_leaving_while_dialling_with_early_messages() -> None:
    class Never:
        async def connect(
            self, *, identity: ClientCertificate | None = None, early: bytes = b""
        ) -> Connection:
            await asyncio.Event().wait()
            raise AssertionError

    async def main() -> None:
        async with client(Never(), early_publish=True) as one:
            task = asyncio.create_task(one.publish(numbered(3)))
            await until(lambda: one.status.state == "connecting")
        with pytest.raises(Disconnected, match="closed"):
            await task

    run(main)


@pytest.mark.parametrize("streams", ["single", "per-topic"])
@pytest.mark.parametrize("multistream", [True, False])
def test_nothing_is_lost_over_connections_that_break_right_away(multistream: bool, streams: str) -> None:
    """Early or not, each message arrives; what goes one way arrives in order."""

    async def main() -> None:
        network = Network(early=True, multistream=multistream)
        seen: list[bytes] = []
        async with (
            broker(network),
            client(Negotiator([network.transport()]), client_id="reader") as subscriber,
            subscriber.subscribe([Subscription("t", 1)]) as reader,
        ):
            await reader.grant()
            async with client(
                Negotiator([network.transport()]), client_id="w", early_publish=True, streams=streams
            ) as one:
                for round_ in range(20):
                    messages = [Message("t", b"%d" % (10 * round_ + n), 1) for n in range(10)]
                    task = asyncio.create_task(one.publish(messages))
                    for _ in range(round_ % 7):
                        await asyncio.sleep(0)
                    if one._live is not None:
                        one._live.connection.abort()
                    await task
                    live = one._live
                    if live is not None:
                        live.connection.abort()
                    await until(lambda live=live: one._live is not live)
                while b"199" not in seen:
                    delivery = await reader.read()
                    seen += [message.payload for message in delivery.batch.messages]
                    await delivery.ack()
        firsts = list(dict.fromkeys(seen))
        assert firsts == [b"%d" % n for n in range(200)]

    run(main)
