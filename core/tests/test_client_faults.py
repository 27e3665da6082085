"""The client against brokers, auths and transports that fail in the middle of things.

Every test also proves that no task is left behind and that no error goes unheard.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import attrs
import pytest

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions, MqttConnection, connection as live_room, driver
from tesaiot_connect.errors import ConnectorError, Disconnected, PartialDelivery, PublishRefused
from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt.events import (
    Acknowledged,
    Closed,
    ConnectRequest,
    Event,
    Received,
    Send,
    SubscribeRequest,
)
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import ClientCertificate, Connection, Credentials, Duration
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Faulty, Network
from tesaiot_connect.testing.pair import PairConnection, connected_pair

FAST = Backoff(min=Duration(0.001), max=Duration(0.01))
NEVER = Backoff(min=Duration(1e6), max=Duration(1e6))
E = TypeVar("E")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    unheard: list[dict[str, Any]] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        async with asyncio.timeout(100):
            await main()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(bounded())
    gc.collect()
    assert not unheard


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def broker(network: Network, options: BrokerOptions | None = None) -> AsyncIterator[Broker]:
    server = Broker(options)
    async with server.serving([ListenerSpec("pair", network.transport())]):
        yield server


def client(network: Network, client_id: str = "", **options: Any) -> Client:
    options.setdefault("reconnect", FAST)
    return Client(Negotiator([network.transport()]), ClientOptions(client_id=client_id, **options))


async def take(reader: Any, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        delivery = await reader.read()
        got += [message.payload for message in delivery.batch.messages]
        await delivery.ack()
    return got


async def round_trip(one: Client) -> None:
    """What the client asked for before has been answered."""
    await one.publish([Message("fence/nobody/listens", b"", 1)])


# --- a broker that does what the test says ------------------------------------------------


class Script:
    """A dialer whose broker ends come out of `accept`."""

    def __init__(self, buffer: int = 65536) -> None:
        self.buffer = buffer
        self.far: asyncio.Queue[PairConnection] = asyncio.Queue()
        self.dialled = 0

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.dialled += 1
        near, far = connected_pair(self.buffer)
        self.far.put_nowait(far)
        return near

    async def raw(self) -> PairConnection:
        return await self.far.get()

    async def accept(self, session: Session | None = None, **properties: Any) -> Scripted:
        """The next connection, with CONNACK."""
        scripted = await Scripted.open(await self.raw())
        await scripted.wait(ConnectRequest)
        found = {P[name.upper()]: value for name, value in properties.items()}
        now = asyncio.get_running_loop().time()
        scripted.engine.accept(
            session or Session(), now=now, session_present=session is not None, properties=found
        )
        await scripted.flush()
        return scripted


class Scripted:
    """The broker's end of one connection. Settles only what it is told to."""

    def __init__(self, connection: PairConnection, stream: Any) -> None:
        self.connection = connection
        self.stream = stream
        self.engine = ServerEngine(ServerLimits(), now=asyncio.get_running_loop().time())
        self.events: list[Event] = []

    @classmethod
    async def open(cls, connection: PairConnection) -> Scripted:
        return cls(connection, await connection.accept_stream())

    async def flush(self) -> None:
        for output in self.engine.outputs():
            if isinstance(output, Send):
                await self.stream.send(output.data)

    async def wait(self, kind: type[E]) -> E:
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            now = asyncio.get_running_loop().time()
            data = await self.stream.receive()
            if data:
                self.events += self.engine.receive_data(data, now=now)
            else:
                self.events += self.engine.stream_eof(0, now=now)
            await self.flush()

    async def subscribed(self, *codes: int) -> SubscribeRequest:
        request = await self.wait(SubscribeRequest)
        self.engine.suback(request, list(codes) or [one.qos for one in request.packet.subscriptions])
        await self.flush()
        return request

    async def takes_a_message_of(self, one: Client) -> None:
        """Then all that was said before, in both directions, was heard."""
        publishing = asyncio.create_task(one.publish([Message("fence", b"", 1)]))
        self.engine.settle((await self.wait(Received)).token)
        await self.flush()
        await publishing

    async def publish(self, *messages: Message) -> None:
        assert self.engine.publish(messages, range(1, len(messages) + 1)) == len(messages)
        await self.flush()


def scripted_client(script: Script, client_id: str = "c", *, auth: Any = None, **options: Any) -> Client:
    options.setdefault("reconnect", FAST)
    options.setdefault("connect_timeout", Duration(1000))
    return Client(script, ClientOptions(client_id=client_id, **options), auth=auth)


# --- subscriptions over connections that come and go --------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_subscription_made_while_disconnected_reaches_a_session_that_was_kept(protocol: str) -> None:
    async def main() -> None:
        network = Network()
        faults = Faulty(network.transport())
        options = ClientOptions(client_id="c", protocol=protocol, reconnect=FAST)  # type: ignore[arg-type]
        async with broker(network) as server, Client(Negotiator([faults]), options) as one:
            async with one.subscribe(["a"]):
                await round_trip(one)
                faults.refuse = 1_000_000
                assert one._live is not None
                one._live.connection.abort()
                await until(lambda: one.status.state == "waiting")
                async with one.subscribe(["b"]) as late:
                    faults.refuse = 0
                    await until(lambda: server.stats.subscriptions == 2)
                    await server.publish([Message("b", b"for the late one", 1)])
                    assert await take(late, 1) == [b"for the late one"]

    run(main)


def test_a_subscribe_that_was_not_answered_is_sent_again() -> None:
    async def main() -> None:
        script, session = Script(), Session()
        async with scripted_client(script) as one, one.subscribe(["a"]):
            connecting = asyncio.create_task(one.connected())
            first = await script.accept(session)
            await first.wait(SubscribeRequest)
            first.connection.abort()
            second = await script.accept(session)
            assert [s.topic_filter for s in (await second.subscribed()).packet.subscriptions] == ["a"]
            await second.takes_a_message_of(one)
            second.connection.abort()
            third = await script.accept(session)  # it has the answer now
            await third.takes_a_message_of(one)
            assert third.events == []
            await connecting

    run(main)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [1, 2])
def test_a_source_that_is_opened_again_gets_what_its_predecessor_left(protocol: str, qos: int) -> None:
    async def main() -> None:
        network = Network()
        connection = MqttConnection(
            "shared",
            Negotiator([network.transport()]),
            ClientOptions(client_id="one", protocol=protocol, reconnect=FAST),  # type: ignore[arg-type]
        )
        options = BrokerOptions(max_inflight=4)
        async with broker(network, options) as server, connection.source_client() as living:
            async with living.subscribe([Subscription("b", qos)]) as b:
                async with connection.source_client() as leaving:
                    async with leaving.subscribe([Subscription("a", qos)]) as a:
                        await round_trip(living)
                        await server.publish([Message("a", b"read, never settled", qos)])
                        lost = await a.read()
                        assert len(lost.batch.messages) == 1
                await server.publish([Message("a", b"came while closed", qos), Message("b", b"b1", qos)])
                assert await take(b, 1) == [b"b1"]
                async with connection.source_client() as again:
                    assert again is living
                    async with again.subscribe([Subscription("a", qos)]) as a:
                        got: set[bytes] = set()
                        while len(got) < 2:
                            got.update(await take(a, 1))
                        assert got == {b"read, never settled", b"came while closed"}
                        # the window is free again: many times what it holds passes
                        await server.publish([Message("a", b"%d" % n, qos) for n in range(40)])
                        await server.publish([Message("b", b"%d" % n, qos) for n in range(40)])
                        both = await asyncio.gather(seen(a, 40), seen(b, 40))
                        assert [m for m in both[0] if m in NUMBERS] == NUMBERS
                        assert [m for m in both[1] if m in NUMBERS] == NUMBERS

    run(main)


NUMBERS = [b"%d" % n for n in range(40)]


async def seen(reader: Any, count: int) -> list[bytes]:
    """Payloads up to the last number; what was not settled before may come first again."""
    got: list[bytes] = []
    while b"%d" % (count - 1) not in got:
        got += await take(reader, 1)
    return got


def test_what_a_closed_subscription_gets_is_not_acknowledged() -> None:
    async def main() -> None:
        script, session = Script(), Session()
        async with scripted_client(script) as one, one.subscribe(["b"]) as b:
            async with one.subscribe(["a"]):
                connecting = asyncio.create_task(one.connected())
                peer = await script.accept(session)
                await peer.subscribed()
                await peer.subscribed()
                await connecting
            await peer.publish(Message("a", b"", 1))
            await peer.publish(Message("b", b"", 1), Message("stranger", b"", 1))
            delivery = await b.read()
            await delivery.ack()
            publishing = asyncio.create_task(one.publish([Message("t", b"", 1)]))
            await peer.wait(Received)
            assert peer.events == [], "PUBACKs keep their order, so none can overtake that of a"
            publishing.cancel()
            await asyncio.wait([publishing])

    run(main)


def test_overlapping_subscriptions_each_get_every_message_once() -> None:
    """The second one joins a connection on which the first has no identifier yet."""

    async def main() -> None:
        network = Network()
        async with broker(network) as server, client(network, "c") as one:
            async with one.subscribe(["t/#"]) as wide:
                await round_trip(one)
                async with one.subscribe(["t/1"]) as narrow:
                    await round_trip(one)
                    await server.publish([Message(f"t/{n % 2}", b"%d" % n, 1) for n in range(10)])
                    assert await take(wide, 10) == [b"%d" % n for n in range(10)]
                    assert await take(narrow, 5) == [b"1", b"3", b"5", b"7", b"9"]
                    await server.publish([Message("t/1", b"last", 1)])
                    assert await take(wide, 1) == await take(narrow, 1) == [b"last"]

    run(main)


def test_identifiers_of_an_earlier_run_mislead_nobody() -> None:
    async def main() -> None:
        script, session = Script(), Session()
        async with scripted_client(script) as one, one.subscribe(["a"]) as a, one.subscribe(["b"]) as b:
            connecting = asyncio.create_task(one.connected())
            peer = await script.accept(session)
            await peer.subscribed()
            await peer.subscribed()
            await connecting
            # the engine of a server takes identifiers as they are: 1 was b's in that run
            properties = Properties(subscription_ids=(1,))
            await peer.publish(Message("b", b"for b", 1, False, properties))
            assert await take(b, 1) == [b"for b"]
            await peer.publish(Message("a", b"for a", 1, False, properties))
            assert await take(a, 1) == [b"for a"]

    run(main)


def test_a_filter_the_broker_cannot_take_fails_its_reader_alone() -> None:
    async def main() -> None:
        script = Script()
        async with (
            scripted_client(script) as one,
            one.subscribe(["x" * 500]) as hopeless,
            one.subscribe(["a"]) as a,
        ):
            reading = asyncio.create_task(hopeless.read())
            peer = await script.accept(maximum_packet_size=100)
            await peer.subscribed()
            with pytest.raises(ConnectorError, match="larger than the server takes"):
                await reading
            await peer.publish(Message("a", b"fine", 1))
            assert await take(a, 1) == [b"fine"]

    run(main)


def test_a_reader_whose_subscription_was_left_does_not_wait_for_ever() -> None:
    async def main() -> None:
        network = Network()
        async with broker(network), client(network) as one:
            async with one.subscribe(["a"]) as reader:
                reading = asyncio.create_task(reader.read())
                await one.connected()
            with pytest.raises(Disconnected, match="was closed"):
                await reading
            with pytest.raises(Disconnected, match="was closed"):
                await reader.read()

    run(main)


def test_a_nack_keeps_what_was_acknowledged_before_it() -> None:
    async def main() -> None:
        script, session = Script(), Session()
        async with scripted_client(script) as one, one.subscribe(["a"]) as reader:
            reading = asyncio.create_task(reader.read())
            peer = await script.accept(session)
            await peer.subscribed()
            await peer.publish(Message("a", b"good", 1))
            good = await reading
            await peer.publish(Message("a", b"bad", 1))
            bad = await reader.read()
            await good.ack()
            await bad.nack(RuntimeError("the sink is full"))
            assert len((await peer.wait(Acknowledged)).keys) == 1
            assert (await peer.wait(Closed)).orderly
            peer.connection.abort()
            again = await script.accept(session)
            assert await take(reader, 1) == [b"bad"]
            await again.wait(Acknowledged)

    run(main)


@pytest.mark.parametrize("qos", [1, 2])
def test_a_nack_of_an_earlier_connection_ends_the_present_one_only_if_that_helps(qos: int) -> None:
    async def main() -> None:
        script, session = Script(), Session()
        async with scripted_client(script) as one, one.subscribe([Subscription("a", 2)]) as reader:
            reading = asyncio.create_task(reader.read())
            first = await script.accept(session)
            await first.subscribed()
            await first.publish(Message("a", b"again", qos))
            old = await reading
            first.connection.abort()
            second = await script.accept(session)
            await until(lambda: one.status.connects == 2)
            if qos == 1:  # it has come again already
                await old.nack(RuntimeError("no"))
                assert await take(reader, 1) == [b"again"]
                await second.wait(Acknowledged)
            else:
                await until(lambda: second.engine.outputs() == [] and not second.stream._out.data)
                await old.nack(RuntimeError("no"))
                await second.wait(Closed)
                second.connection.abort()
                third = await script.accept(session)
                assert await take(reader, 1) == [b"again"]
                await third.wait(Acknowledged)

    run(main)


def test_nothing_is_said_after_disconnect() -> None:
    async def main() -> None:
        script, session = Script(), Session()
        async with scripted_client(script) as one:
            async with one.subscribe(["a"]) as reader:
                reading = asyncio.create_task(reader.read())
                peer = await script.accept(session)
                await peer.subscribed()
                await peer.publish(Message("a", b"", 1), Message("a", b"", 1))
                delivery = await reading
            leaving = asyncio.create_task(one.__aexit__(None, None, None))
            await asyncio.sleep(0)  # DISCONNECT is with the engine, not yet written
            await delivery.ack()
            said = await peer.stream.receive()
            with contextlib.suppress(Disconnected):
                while more := await peer.stream.receive():
                    said += more
            assert said == b"\xe0\x00", "DISCONNECT, and no PUBACK behind it"
            peer.connection.abort()
            await leaving

    run(main)


# --- publishing ---------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_message_that_is_too_large_is_refused_even_alone(qos: int) -> None:
    async def main() -> None:
        network = Network()
        options = BrokerOptions(max_packet_size=2048)  # type: ignore[arg-type]
        async with broker(network, options), client(network) as one:
            await one.connected()
            with pytest.raises(PartialDelivery) as caught:
                await one.publish([Message("t", b"x" * 4000, qos)])
            assert isinstance(caught.value.failures[0], PublishRefused)
            assert one.status.published == 0
            await one.publish([Message("t", b"x", qos)])
            assert one.status.published == 1

    run(main)


def test_a_message_that_is_none_fails_its_call_and_nobody_else() -> None:
    async def main() -> None:
        network = Network()
        async with broker(network), client(network) as one:
            waiting = asyncio.create_task(one.publish([Message("t", b"", 1), Message(None, b"", 1)]))  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="payload must be bytes, not str"):
                await one.publish([Message("t", "text", 1)])  # type: ignore[arg-type]
            with pytest.raises((TypeError, AttributeError)):
                await waiting
            with pytest.raises((TypeError, AttributeError)):
                await one.publish([Message("t", b"", "1")])  # type: ignore[arg-type]
            await one.publish([Message("t", b"", 1)])
            assert one.status.connects == 1

    run(main)


def test_many_messages_pass_a_window_of_twenty_in_calls_of_any_size() -> None:
    async def main() -> None:
        network = Network()
        options = BrokerOptions(receive_maximum=20)
        async with broker(network, options) as server, client(network) as one:
            single = [one.publish([Message("t", b"", 1)]) for _ in range(5_000)]
            await asyncio.gather(one.publish([Message("t", b"", 1)] * 15_000), *single)
            assert one.status.published == server.stats.received == 20_000

    run(main)


def test_acknowledgements_reach_their_calls_when_connecting_fails_halfway() -> None:
    """A new session finishes what had PUBREC, and the same CONNACK is then rejected by the auth."""

    async def main() -> None:
        script = Script()
        login = Login(answers=[b"", ConnectorError("this server is not the right one")])
        async with scripted_client(script, auth=login, protocol="5") as one:
            publishing = asyncio.create_task(one.publish([Message("t", b"", 2)]))
            first = await script.accept(Session(), auth_data=b"1")
            first.engine.settle((await first.wait(Received)).token)
            await first.flush()
            await until(lambda: any(entry.released for entry in one._session.outbound.values()))
            first.connection.abort()
            await script.accept(None, auth_data=b"2")
            await publishing

    run(main)


# --- auths and dialers --------------------------------------------------------------------


@attrs.define
class Login:
    """An auth and its own login; `answers` are for `finish` and `respond`, in order, then b""."""

    answers: list[Any] = attrs.Factory(list)
    begins: list[Callable[[], Awaitable[None]]] = attrs.Factory(list)
    method: str | None = "M"

    async def begin(self) -> Login:
        if self.begins:
            await self.begins.pop(0)()
        return self

    async def identity(self) -> None:
        return None

    @property
    def credentials(self) -> Credentials:
        return Credentials(method=self.method, data=b"" if self.method else None)

    async def respond(self, data: bytes, /) -> bytes:
        answer = self.answers.pop(0) if self.answers else b""
        if isinstance(answer, BaseException):
            raise answer
        if answer is None:
            await asyncio.Event().wait()
        return bytes(answer)

    async def finish(self, data: bytes, /) -> None:
        await self.respond(data)


async def hang() -> None:
    await asyncio.Event().wait()


async def surprise() -> None:
    raise KeyError("token")


async def cancelled_inside() -> None:
    raise asyncio.CancelledError


def hurries(one: Client) -> None:
    """Its auth has no time to answer, while the broker has a lot."""
    one._logins._options = attrs.evolve(one._logins._options, connect_timeout=Duration(0.01))


@pytest.mark.parametrize("trouble", [hang, surprise, cancelled_inside])
def test_an_auth_in_trouble_is_asked_again(
    trouble: Callable[[], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        network = Network()
        auth = Login(begins=[trouble, trouble, trouble], method=None)
        options = ClientOptions(connect_timeout=Duration(1000), reconnect=FAST)
        async with broker(network), Client(Negotiator([network.transport()]), options, auth=auth) as one:
            hurries(one)
            with pytest.raises(Disconnected):
                await one.connected(once=True)
            await one.connected()
            assert auth.begins == []
        traces = [record for record in caplog.records if record.exc_info]
        assert len(traces) <= 1, "the same surprise is not explained twice"

    run(main)


def test_an_auth_that_does_not_answer_a_challenge_does_not_hold_the_client() -> None:
    async def main() -> None:
        script = Script()
        auth = Login(answers=[None])
        async with scripted_client(script, auth=auth, protocol="5") as one:
            hurries(one)
            connecting = asyncio.create_task(one.connected())
            first = await Scripted.open(await script.raw())
            await first.wait(ConnectRequest)
            first.engine.challenge("M", b"riddle")
            await first.flush()
            await script.accept()
            await connecting

    run(main)


def test_a_dialer_that_raises_what_it_must_not_is_tried_again() -> None:
    @attrs.define
    class Wild:
        inner: Script
        left: int = 3

        async def connect(
            self, *, identity: ClientCertificate | None = None, early: bytes = b""
        ) -> Connection:
            if self.left:
                self.left -= 1
                raise OSError(99, "no such luck")
            return await self.inner.connect()

    async def main() -> None:
        script = Script()
        async with Client(Wild(script), ClientOptions(reconnect=FAST)) as one, one.subscribe(["a"]) as reader:
            reading = asyncio.create_task(reader.read())
            with pytest.raises(Disconnected, match="no such luck"):
                await one.connected(once=True)
            peer = await script.accept()
            await peer.subscribed()
            await peer.publish(Message("a", b"", 0))
            assert len((await reading).batch.messages) == 1

    run(main)


# --- versions -----------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [b"\x20\x02\x00\x01", b"\x20\x02\x00\x84", b"\x20\x03\x00\x84\x00", b""])
def test_a_broker_that_refuses_mqtt_5_is_spoken_to_in_3_1_1(refusal: bytes) -> None:
    async def main() -> None:
        script = Script()
        async with scripted_client(script) as one:
            connecting = asyncio.create_task(one.connected())
            old = await script.raw()
            stream = await old.accept_stream()
            assert await stream.receive()
            if refusal:
                await stream.send(refusal)
            await old.aclose()
            peer = await script.accept()
            assert peer.engine.version == 4
            await connecting
            assert one.status.version == "3.1.1"

    run(main)


# --- silence, floods and full sockets -----------------------------------------------------


@contextlib.contextmanager
def movable_time() -> Iterator[Callable[[float], None]]:
    """Gives a function that lets so many seconds pass for the running loop."""
    loop = asyncio.get_running_loop()
    real, offset = loop.time, 0.0

    def advance(seconds: float) -> None:
        nonlocal offset
        offset += seconds

    loop.time = lambda: real() + offset  # type: ignore[method-assign]
    try:
        yield advance
    finally:
        loop.time = real  # type: ignore[method-assign]


def test_a_dead_peer_is_noticed_while_the_writer_is_stuck() -> None:
    async def main() -> None:
        with movable_time() as advance:
            script = Script(buffer=1024)
            async with scripted_client(script, keepalive=Duration(100)) as one:
                publishing = asyncio.create_task(one.publish([Message("t", b"x" * 10_000, 1)]))
                peer = await script.accept()
                await until(lambda: len(peer.stream._in.data) == 1024)  # and nobody reads on
                for seconds in (101, 11):  # PINGREQ, which nobody gets; then its answer is missed
                    advance(seconds)
                    await asyncio.sleep(0.01)
                advance(live_room._FLUSH)
                await until(lambda: "no PINGRESP" in one.status.last_error)
                script.buffer = 100_000
                again = await script.accept()
                again.engine.settle((await again.wait(Received)).token)
                await again.flush()
                await publishing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "timeout", _unhurried)  # the test's own limit is not to pass
        run(main)


@contextlib.asynccontextmanager
async def _unhurried(_seconds: float | None) -> AsyncIterator[Any]:
    yield None


def test_a_broker_that_says_nothing_is_left_after_the_connect_timeout() -> None:
    async def main() -> None:
        script = Script()
        async with scripted_client(script, connect_timeout=Duration(0.01)) as one:
            with pytest.raises(Disconnected, match="sent no CONNACK"):
                await one.connected(once=True)
            await until(lambda: script.dialled > 2)

    run(main)


def test_a_broker_that_says_nothing_is_not_asked_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not answer that either, and the next connection would wait for it."""
    asked: list[PairConnection] = []

    async def aclose(connection: PairConnection, *_: object) -> None:
        asked.append(connection)

    monkeypatch.setattr(PairConnection, "aclose", aclose)

    async def main() -> None:
        script = Script()
        async with scripted_client(script, connect_timeout=Duration(0.01)) as one:
            with pytest.raises(Disconnected, match="sent no CONNACK"):
                await one.connected(once=True)
            await until(lambda: script.dialled > 2)
            assert not asked

    run(main)


def test_delays_grow_until_a_connection_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the attempts take: what counts is the time after CONNACK."""
    monkeypatch.setattr(driver, "_STABLE", -1.0)

    class Counting:
        max = Duration(0.0)
        started = 0

        def delays(self) -> Iterator[float]:
            self.started += 1
            while True:
                yield 0.0

    async def main() -> None:
        script, reconnect = Script(), Counting()
        async with scripted_client(script, reconnect=reconnect, protocol="5") as one:
            connecting = asyncio.create_task(one.connected())
            for _ in range(5):
                (await script.raw()).abort()
            assert reconnect.started == 1
            peer = await script.accept()
            await connecting
            peer.connection.abort()
            await script.accept()
            assert reconnect.started == 2

    run(main)


def test_the_last_word_of_the_broker_counts_though_a_write_failed_first() -> None:
    async def main() -> None:
        script = Script()
        async with scripted_client(script, reconnect=NEVER) as one:
            await asyncio.gather(one.connected(), script.accept())
            live = one._live
            assert live is not None
            goodbye = b"\xe0\x01\x97"  # DISCONNECT, quota exceeded

            async def broken(_data: bytes) -> None:
                raise Disconnected("the connection was reset by the peer")

            live.stream.send = broken  # type: ignore[method-assign]
            live.stream._in.data += goodbye  # type: ignore[attr-defined]
            publishing = asyncio.create_task(one.publish([Message("t", b"", 1)]))
            await asyncio.sleep(0)
            live.stream._in.notify()  # type: ignore[attr-defined]
            await until(lambda: one.status.state == "waiting")
            assert "quota exceeded" in one.status.last_error
            publishing.cancel()
            await asyncio.wait([publishing])

    run(main)


def test_a_writer_that_fails_unexpectedly_takes_the_connection_along() -> None:
    async def main() -> None:
        script = Script()
        async with scripted_client(script) as one:
            await asyncio.gather(one.connected(), script.accept())
            live = one._live
            assert live is not None

            async def broken(_data: bytes) -> None:
                raise ValueError("a transport of somebody's")

            live.stream.send = broken  # type: ignore[method-assign]
            publishing = asyncio.create_task(one.publish([Message("t", b"", 1)]))
            peer = await script.accept()
            peer.engine.settle((await peer.wait(Received)).token)
            await peer.flush()
            await publishing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_room, "_FLUSH", 0.01)
        run(main)


# --- leaving ------------------------------------------------------------------------------


def test_leaving_while_the_broker_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LEAVE", 0.05)

    async def main() -> None:
        script = Script(buffer=1024)
        async with scripted_client(script) as one:
            publishing = asyncio.create_task(one.publish([Message("t", b"x" * 10_000, 1)]))
            peer = await script.accept()
            await until(lambda: len(peer.stream._in.data) == 1024)
        with pytest.raises(Disconnected, match="closed"):
            await publishing
        assert one.status.state == "closed"
        with pytest.raises(Disconnected):
            await peer.stream.send(b"")

    run(main)


def test_leaving_while_an_inbox_is_full_says_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LEAVE", 1000)

    async def main() -> None:
        script = Script()
        one = scripted_client(script)
        await one.__aenter__()
        async with one.subscribe(["a"], max_messages=1) as reader:
            connecting = asyncio.create_task(one.connected())
            peer = await script.accept()
            await peer.subscribed()
            await connecting
            await peer.publish(Message("a", b"", 1))
            await until(lambda: one.status.received)
            await one.__aexit__(None, None, None)
            assert (await peer.wait(Closed)).orderly
            assert not [event for event in peer.events if isinstance(event, Acknowledged)]
            with pytest.raises(Disconnected):
                await reader.read()

    run(main)


def test_leaving_may_be_cancelled() -> None:
    async def main() -> None:
        script = Script(buffer=1024)
        one = scripted_client(script)
        await one.__aenter__()
        publishing = asyncio.create_task(one.publish([Message("t", b"x" * 10_000, 1)]))
        peer = await script.accept()
        await until(lambda: len(peer.stream._in.data) == 1024)
        leaving = asyncio.create_task(one.__aexit__(None, None, None))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        with pytest.raises(Disconnected, match="closed"):
            await publishing

    run(main)


@pytest.mark.parametrize("when", ["dialling", "silence", "waiting", "auth"])
def test_leaving_while_connecting(when: str) -> None:
    @attrs.define
    class Never:
        async def connect(
            self, *, identity: ClientCertificate | None = None, early: bytes = b""
        ) -> Connection:
            await asyncio.Event().wait()
            raise AssertionError

    async def main() -> None:
        network, script = Network(), Script()
        dialer: Any = {"dialling": Never(), "silence": script}.get(when, Negotiator([network.transport()]))
        auth = Login(begins=[hang]) if when == "auth" else None
        options = ClientOptions(reconnect=NEVER, connect_timeout=Duration(1000))
        async with Client(dialer, options, auth=auth) as one, one.subscribe(["a"]) as reader:
            waiting = [
                asyncio.create_task(call)
                for call in (one.connected(), reader.read(), one.publish([Message("t", b"", 1)]))
            ]
            if when == "silence":
                await script.raw()
            await until(lambda: one.status.state == ("waiting" if when == "waiting" else "connecting"))
            await asyncio.sleep(0.01)
        for task in waiting:
            with pytest.raises(Disconnected, match="closed"):
                await task

    run(main)


def test_a_client_waits_for_the_one_that_is_just_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LEAVE", 1000)

    async def main() -> None:
        script = Script(buffer=1024)
        options = ClientOptions(client_id="c", reconnect=FAST, connect_timeout=Duration(1000))
        connection = MqttConnection("c", script, options)
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(connection.source_client())
            publishing = asyncio.create_task(first.publish([Message("t", b"x" * 10_000, 1)]))
            peer = await script.accept()
            await until(lambda: len(peer.stream._in.data) == 1024)  # DISCONNECT will be behind this
            leaving = asyncio.create_task(stack.aclose())
            await asyncio.sleep(0)

            async def reopen() -> None:
                async with connection.source_client() as second:
                    assert second is not first
                    await second.connected()

            reopening = asyncio.create_task(reopen())
            for _ in range(20):
                await asyncio.sleep(0)
            assert script.dialled == 1
            assert (await peer.wait(Closed)).orderly
            await script.accept()
            await asyncio.gather(leaving, reopening)
            with pytest.raises(Disconnected, match="closed"):
                await publishing

    run(main)
