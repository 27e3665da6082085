"""Our client over WebSocket as tests across packages want it: made, subscribed, and read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs

from tesaiot_connect import (
    Backoff,
    Client,
    ClientOptions,
    Duration,
    Message,
    Negotiator,
    Reader,
    Subscription,
    TlsOptions,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_wss import Wss

QUICK = Backoff(min=Duration(0.05), max=Duration(0.3))


def client(
    url: str, certificates: Certificates, version: Any = "5", *, transport: Any = None, **options: Any
) -> Client:
    """`transport` are more options of the recipe, `options` those of the client."""
    recipe = Wss(Url.parse(url), tls=TlsOptions(ca_file=certificates.ca_file), **(transport or {}))
    return Client(Negotiator([recipe]), ClientOptions(protocol=version, reconnect=QUICK, **options))


@attrs.frozen
class Dialogue:
    """A client that writes, and one that reads what it writes."""

    topic: str
    writer: Client
    subscriber: Client
    reader: Reader

    async def there_and_back(self, messages: list[Message]) -> list[Message]:
        """Publishes them, and gives what comes of them."""
        publishing = asyncio.create_task(self.writer.publish(messages))
        found = await self.read(len(messages))
        await publishing
        return found

    async def read(self, count: int) -> list[Message]:
        """The next `count` messages or more, acknowledged."""
        messages: list[Message] = []
        while len(messages) < count:
            delivery = await self.reader.read()
            messages += delivery.batch.messages
            await delivery.ack()
        return messages

    async def ready(self) -> None:
        """Returns when the subscription is in force: a message of ours has come through it."""
        first = asyncio.create_task(self.read(1))
        await self.subscriber.connected()
        while not first.done():
            await self.writer.publish([Message(self.topic, b"ready?", qos=1)])
            await asyncio.wait([first], timeout=0.05)
        await self.writer.publish([Message(self.topic, b"ready!", qos=1)])
        while (await self.read(1))[-1].payload != b"ready!":
            pass


@asynccontextmanager
async def dialogue(topic: str, writer: Client, subscriber: Client) -> AsyncIterator[Dialogue]:
    """Both on the topic, which must be theirs alone."""
    async with (
        asyncio.timeout(200),
        writer,
        subscriber,
        subscriber.subscribe([Subscription(topic, qos=2)]) as reader,
    ):
        made = Dialogue(topic, writer, subscriber, reader)
        await made.ready()
        yield made


async def last_error(one: Client) -> str:
    """What a client that cannot connect says of it."""
    async with asyncio.timeout(60), one:
        trying = asyncio.create_task(one.connected())
        while not one.status.last_error:
            await asyncio.wait([trying], timeout=0.01)
        trying.cancel()
        await asyncio.wait([trying])
        assert not one.status.connects
        return one.status.last_error
