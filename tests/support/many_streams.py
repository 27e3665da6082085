"""For tests of clients on connections with many streams: a broker, clients, and what they got."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import attrs

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions, StreamRule
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import ByteStream, ClientCertificate, Connection, Duration
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Network

FAST = Backoff(min=Duration(0.001), max=Duration(0.01))
RULES = (
    StreamRule(filter="alarms/fire/#", stream="fire", priority=10),
    StreamRule(filter="alarms/#", stream="alarms", priority=5),
    StreamRule(filter="alarms/+/test", stream="never"),
    StreamRule(filter="log/+", stream="fire", priority=1),
)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    unheard: list[dict[str, Any]] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        async with asyncio.timeout(60):
            await main()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(bounded())
    gc.collect()
    assert not unheard, unheard


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def broker(network: Network, options: BrokerOptions | None = None) -> AsyncIterator[Broker]:
    server = Broker(options)
    async with server.serving([ListenerSpec("pair", network.transport())]):
        yield server


def client(network: Network, client_id: str = "", *, transport: Any = None, **options: Any) -> Client:
    options.setdefault("reconnect", FAST)
    dialer = Negotiator([transport or network.transport()])
    return Client(dialer, ClientOptions(client_id=client_id, **options))


@contextlib.asynccontextmanager
async def listening(network: Network, topic_filter: str = "#", qos: int = 2) -> AsyncIterator[Any]:
    """A plain client's reader of everything."""
    options = {"receive_maximum": 65535}
    async with client(network, "listener", **options) as one:
        async with one.subscribe([Subscription(topic_filter, qos)]) as reader:
            await one.publish([Message("fence/before", b"", 1)])
            await (await reader.read()).ack()
            yield reader


async def collect(reader: Any, wanted: set[bytes]) -> list[Message]:
    """Until each payload has come."""
    got: list[Message] = []
    missing = set(wanted)
    while missing:
        delivery = await reader.read()
        got += delivery.batch.messages
        missing -= {message.payload for message in delivery.batch.messages}
        await delivery.ack()
    return got


def firsts(got: list[Message], topic: str) -> list[bytes]:
    """What came on a topic, in order, without what came again."""
    return list(dict.fromkeys(message.payload for message in got if message.topic == topic))


def mixed(count: int, topics: int, qos: int | None = 1) -> list[Message]:
    """Payloads of all sizes on many topics, each with its number; `qos` None mixes 1 and 2."""
    return [
        Message(f"t/{n % topics}", b"%d " % n + b"x" * (n * 37 % 3000), 1 + n % 2 if qos is None else qos)
        for n in range(count)
    ]


def data_streams(one: Client) -> dict[int, Any]:
    """Number to channel of the data streams that are open."""
    assert one._live is not None
    assert one._live._data is not None
    return one._live._data.channels


@attrs.frozen
class Watched:
    """A transport that tells the priorities of streams, and may refuse to open data streams."""

    inner: Any
    opened: list[int] = attrs.field(factory=list)
    refuse: list[BaseException] = attrs.field(factory=list)
    hang: bool = False
    races: bool = True

    @property
    def url(self) -> Any:
        return self.inner.url

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        connection = await self.inner.connect(identity=identity, early=early)
        open_stream = connection.open_stream

        async def watched(*, priority: int = 0) -> ByteStream:
            self.opened.append(priority)
            if len(self.opened) > 1 and self.hang:
                await asyncio.Event().wait()
            if len(self.opened) > 1 and self.refuse:
                raise self.refuse.pop()
            stream: ByteStream = await open_stream(priority=priority)
            return stream

        connection.open_stream = watched
        return connection  # type: ignore[no-any-return]
