"""The mqtt source and sink against our own broker, over connections in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal

import attrs
import pytest

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.builtin import JsonSerializer, MemorySink, MqttSink, MqttSource, mqtt as mqtt_module
from tesaiot_connect.client import Client, ClientOptions, MqttConnection
from tesaiot_connect.errors import Disconnected
from tesaiot_connect.message import Batch, Message, Properties, Record
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.pipeline import PipelineSpec, SinkSpec, SourceSpec
from tesaiot_connect.protocols import Duration, Size
from tesaiot_connect.runner import Summary, run
from tesaiot_connect.server import Broker, ListenerSpec
from tesaiot_connect.testing import Faulty, Network

FAST = Backoff(min=Duration(0.001), max=Duration(0.01))


@asynccontextmanager
async def broker() -> AsyncIterator[Network]:
    network = Network()
    async with Broker().serving([ListenerSpec("pair", network.transport())]):
        yield network


def connection(network: Network, client_id: str, *, drop_after: int = 0, **options: Any) -> MqttConnection:
    transport = network.transport()
    dialer = Negotiator([Faulty(transport, drop_after=drop_after) if drop_after else transport])
    return MqttConnection(client_id, dialer, ClientOptions(client_id=client_id, reconnect=FAST, **options))


def client(network: Network, client_id: str) -> Client:
    return Client(Negotiator([network.transport()]), ClientOptions(client_id=client_id, reconnect=FAST))


def source(network: Network, *filters: str, **options: Any) -> SourceSpec:
    recipe = MqttSource(connection=connection(network, "reader"), subscribe=filters or ("t/#",), **options)
    return SourceSpec(name="in", recipe=recipe, serializer=JsonSerializer())


def pipeline(spec: SourceSpec, *sinks: Any, **options: Any) -> PipelineSpec:
    specs = tuple(SinkSpec(name=f"out{n}", recipe=sink) for n, sink in enumerate(sinks))
    return PipelineSpec(name=options.pop("name", "p"), source=spec, sinks=specs, retry=FAST, **options)


def numbered(count: int, topic: str = "t/{}", qos: int = 1) -> list[Message]:
    return [Message(topic.format(n % 5), b"%d" % n, qos) for n in range(count)]


def within_60_s(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@asynccontextmanager
async def running(*pipelines: PipelineSpec) -> AsyncIterator[asyncio.Task[Summary]]:
    """Pipelines that run until the body ends, drained then."""
    stop = asyncio.Event()
    task = asyncio.create_task(run(pipelines, stop=stop))
    try:
        yield task
        stop.set()
        await task
    finally:
        task.cancel()
        await asyncio.wait((task,))


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_telemetry_arrives_and_is_acknowledged(qos: int) -> None:
    async def main() -> None:
        async with broker() as network:
            sink = MemorySink()
            spec = source(network, qos=2)
            async with running(pipeline(spec, sink)) as task, client(network, "writer") as writer:
                await publish_until_seen(writer, sink)
                await writer.publish(numbered(3000, qos=qos))
                await until(lambda: len(values(sink)) >= 3000)
            assert values(sink) == list(range(3000))
            assert {record.message.qos for record in sink.into if record.value != "probe"} == {qos}
            summary = task.result()
            assert summary.drained
            assert summary.acknowledged == len(sink.into)

    within_60_s(main)


async def publish_until_seen(writer: Client, sink: MemorySink) -> None:
    """The subscription has no sign of its own to the outside: probe until one comes through."""
    while not sink.into:
        await writer.publish([Message("t/probe", b'"probe"', 1)])
        await asyncio.sleep(0.001)


def values(sink: MemorySink) -> list[int]:
    return [record.value for record in sink.into if record.value != "probe"]


@attrs.frozen
class Gate:
    """A sink that keeps what it is given waiting until it may go on."""

    reads: ClassVar[Literal["records"]] = "records"
    open_gate: asyncio.Event = attrs.field(factory=asyncio.Event)
    offered: list[Record] = attrs.field(factory=list)
    into: list[Record] = attrs.field(factory=list)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        yield self

    async def write(self, batch: list[Record]) -> None:
        self.offered.extend(batch)
        await self.open_gate.wait()
        self.into.extend(batch)


def test_what_no_sink_has_is_delivered_again_to_the_next_run() -> None:
    async def main() -> None:
        async with broker() as network:
            first, second = Gate(), MemorySink()
            async with client(network, "writer") as writer:
                task = asyncio.create_task(run([pipeline(source(network), first)]))
                while not first.offered:
                    await writer.publish([Message("t/probe", b'"probe"', 1)])
                    await asyncio.sleep(0.001)
                await writer.publish(numbered(500))
                task.cancel()
                await asyncio.wait((task,))
                assert first.into == []
                async with running(pipeline(source(network), second)):
                    await until(lambda: len(set(values(second))) == 500)
            assert values(second) == list(range(500))

    within_60_s(main)


def test_connections_that_break_lose_nothing() -> None:
    async def main() -> None:
        async with broker() as network:
            sink = MemorySink()
            recipe = MqttSource(
                connection=connection(network, "reader", drop_after=30_000), subscribe=("t/#",)
            )
            spec = SourceSpec(name="in", recipe=recipe, serializer=JsonSerializer())
            async with running(pipeline(spec, sink)), client(network, "writer") as writer:
                await publish_until_seen(writer, sink)
                await writer.publish(numbered(5000))
                await until(lambda: len(set(values(sink))) == 5000)

    within_60_s(main)


def test_a_bridge_passes_everything_on() -> None:
    async def main() -> None:
        async with broker() as here, broker() as there:
            bridge = MqttSink(connection=connection(there, "bridge"), topic="site1/{topic}")
            properties = Properties(content_type="x/y", user=(("k", "v"),), message_expiry=100)
            async with client(there, "reader") as other, other.subscribe([Subscription("#", 2)]) as reader:
                await other.connected()
                async with running(pipeline(source(here, qos=2), bridge)), client(here, "writer") as writer:
                    got: list[Message] = []
                    while not got:
                        await writer.publish([Message("t/probe", b"", 1)])
                        try:
                            delivery = await asyncio.wait_for(reader.read(), 0.02)
                        except TimeoutError:
                            continue
                        got += delivery.batch.messages
                        await delivery.ack()
                    sent = [Message("t/x", b"\xff%d" % n, 2, properties=properties) for n in range(200)]
                    await writer.publish(sent)
                    got.clear()
                    while len(got) < 200:
                        delivery = await reader.read()
                        got += [one for one in delivery.batch.messages if one.topic != "site1/t/probe"]
                        await delivery.ack()
            assert [one.payload for one in got] == [one.payload for one in sent]
            assert {(one.topic, one.qos) for one in got} == {("site1/t/x", 2)}
            assert got[0].properties.user == (("k", "v"),)
            assert got[0].properties.content_type == "x/y"

    within_60_s(main)


def test_a_sink_may_use_the_connection_of_its_source() -> None:
    async def main() -> None:
        async with broker() as network:
            shared = connection(network, "both")
            spec = SourceSpec(
                name="in",
                recipe=MqttSource(
                    connection=shared, subscribe=("t/#",), max_messages=64, max_bytes=Size(4096)
                ),
                serializer=JsonSerializer(),
            )
            back = MqttSink(connection=shared, topic="back/{topic}", qos=1)
            reader_spec = SourceSpec(
                name="check",
                recipe=MqttSource(connection=connection(network, "reader"), subscribe=("back/#",)),
                serializer=JsonSerializer(),
            )
            sink = MemorySink()
            pipelines = pipeline(spec, back, name="loop"), pipeline(reader_spec, sink, name="check")
            async with running(*pipelines), client(network, "writer") as writer:
                await publish_until_seen(writer, sink)
                await writer.publish(numbered(2000))
                await until(lambda: len(values(sink)) >= 2000)
            assert values(sink) == list(range(2000))

    within_60_s(main)


def test_qos_and_retain_can_be_set() -> None:
    async def main() -> None:
        async with broker() as network:
            recipe = MqttSink(connection=connection(network, "w"), topic="fixed", qos=2, retain=True)
            async with client(network, "r") as reading, reading.subscribe([Subscription("#", 2)]) as reader:
                await reading.connected()
                async with recipe.open() as writer:
                    await writer.write(Batch([Message("a", b"1", 0)], 0.0))
            async with client(network, "late") as late, late.subscribe([Subscription("#", 2)]) as reader:
                (message,) = (await reader.read()).batch.messages
                assert (message.topic, message.payload, message.qos, message.retain) == (
                    "fixed",
                    b"1",
                    2,
                    True,
                )

    within_60_s(main)


class Waits:
    """`asyncio` for the source, whose waits are over when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: list[float] = []
        self._begun: list[asyncio.Timeout] = []
        monkeypatch.setattr(mqtt_module, "asyncio", self)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        self.seconds.append(seconds)
        self._begun.append(asyncio.timeout(None))
        return self._begun[-1]

    def end(self) -> None:
        self._begun[-1].reschedule(0)


def test_once_ends_when_nothing_comes_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with broker() as network:
            async with client(network, "writer") as writer:
                await writer.publish([Message("t/kept", b"7", 1, retain=True)])
            sink, waits = MemorySink(), Waits(monkeypatch)
            spec = source(network, idle_timeout=Duration(0.3))
            task = asyncio.create_task(run([pipeline(spec, sink)], once=True))
            await until(lambda: (values(sink) == [7] and len(waits.seconds) == 2) or task.done())
            assert not task.done()
            waits.end()
            assert not (await task).stopped
            assert values(sink) == [7]
            assert waits.seconds == [0.3, 0.3]
            assert source(network).recipe.once().idle_timeout == 3.0  # type: ignore[attr-defined]

    within_60_s(main)


def test_time_without_a_connection_is_not_time_without_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        network, sink, waits = Network(), MemorySink(), Waits(monkeypatch)
        reading = connection(network, "reader")
        recipe = MqttSource(connection=reading, subscribe=("t/#",), idle_timeout=Duration(1))
        spec = SourceSpec(name="in", recipe=recipe, serializer=JsonSerializer())
        async with Broker().serving([ListenerSpec("pair", network.transport())]):
            async with client(network, "writer") as writer:
                await writer.publish([Message("t/kept", b"7", 1, retain=True)])
            task = asyncio.create_task(run([pipeline(spec, sink)]))
            await until(lambda: (values(sink) == [7] and len(waits.seconds) == 2) or task.done())
        (reader,) = reading.clients()
        await until(lambda: reader.status.state != "connected" or task.done())
        waits.end()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        async with Broker().serving([ListenerSpec("pair", network.transport())]):
            await until(lambda: len(waits.seconds) == 3 or task.done())
            assert not task.done()
            waits.end()
            await task

    within_60_s(main)


def test_require_healthy_says_what_is_wrong() -> None:
    async def main() -> None:
        spec = source(Network())  # where nobody listens
        with pytest.raises(Disconnected, match="no connection 'reader' within"):
            await run([pipeline(spec, MemorySink())], require_healthy=True, healthy_within=0.05)

    within_60_s(main)


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (MqttSource, {"subscribe": ()}, "at least one"),
        (MqttSource, {"subscribe": ("a/#/b",)}, "only at the end"),
        (MqttSink, {"topic": "a/+"}, "invalid topic"),
        (MqttSink, {"topic": "{device}"}, "no other braces"),
    ],
)
def test_wrong_recipes_are_explained(recipe: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(connection=connection(Network(), "c"), **options)
