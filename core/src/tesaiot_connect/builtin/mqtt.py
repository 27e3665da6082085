"""MQTT as a source and as a sink, on a connection that the configuration names.

Owns: which subscriptions a source makes and what a sink changes in a message. Rule: the client
belongs to the connection; sources of one connection share one client, sinks another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal

import attrs
import msgspec

from ..client import Client, MqttConnection
from ..errors import ConnectorError, Disconnected, EndOfInput
from ..message import Batch, Delivery, Message
from ..mqtt.packets import Subscription
from ..mqtt.topics import check_filter, check_topic
from ..protocols import Duration, Reader, Size, Writer


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _valid_filters(_instance: Any, _field: Any, filters: Sequence[str]) -> None:
    if not filters:
        raise ValueError("name at least one topic filter")
    for topic_filter in filters:
        try:
            check_filter(topic_filter)
        except ConnectorError as error:
            raise ValueError(str(error)) from error


def _valid_template(_instance: Any, _field: Any, template: str) -> None:
    try:
        check_topic(template.replace("{topic}", "t"))
    except ConnectorError as error:
        raise ValueError(str(error)) from error
    if "{" in template.replace("{topic}", "") or "}" in template.replace("{topic}", ""):
        raise ValueError(f"{template!r} may use {{topic}}, and no other braces")


@attrs.frozen(kw_only=True)
class MqttSource:
    """Subscribes to topics of a broker."""

    connection: MqttConnection = attrs.field(metadata=_help("Name of the connection."))
    subscribe: tuple[str, ...] = attrs.field(
        validator=_valid_filters, metadata=_help("Topic filters; $share/<group>/<filter> shares the load.")
    )
    qos: Literal[0, 1, 2] = attrs.field(
        default=1,
        metadata=_help(
            "Highest QoS the broker may deliver with. At 0, what is under way is lost with a connection."
        ),
    )
    no_local: bool = attrs.field(
        default=False,
        metadata=_help("Leave out what the same client published (MQTT 5; not for shared subscriptions)."),
    )
    retain_as_published: bool = attrs.field(
        default=False, metadata=_help("Keep the retain flag as it was published (MQTT 5); for a bridge.")
    )
    retain_handling: Literal[0, 1, 2] = attrs.field(
        default=0,
        metadata=_help(
            "Retained messages: 0 send them, 1 only if the subscription is new, 2 never (MQTT 5)."
        ),
    )
    max_messages: int = attrs.field(
        default=16_384,
        validator=attrs.validators.ge(1),
        metadata=_help("Beyond this many waiting messages the socket is not read."),
    )
    max_bytes: Size = attrs.field(
        default=Size(8 * 1024 * 1024),
        validator=attrs.validators.ge(Size(1)),
        metadata=_help("Beyond this many waiting bytes the socket is not read."),
    )
    idle_timeout: Duration = attrs.field(
        default=Duration(0.0),
        validator=attrs.validators.ge(Duration(0)),
        metadata=_help(
            "End after this long without a message while connected; 0 is never, and --once sets 3 s."
        ),
    )

    def once(self) -> MqttSource:
        """The same, ending when nothing has come for a while."""
        return self if self.idle_timeout else attrs.evolve(self, idle_timeout=Duration(3.0))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Reader]:
        subscriptions = [
            Subscription(
                topic_filter,
                self.qos,
                no_local=self.no_local,
                retain_as_published=self.retain_as_published,
                retain_handling=self.retain_handling,
            )
            for topic_filter in self.subscribe
        ]
        async with (
            self.connection.source_client() as client,
            client.subscribe(
                subscriptions, max_messages=self.max_messages, max_bytes=self.max_bytes
            ) as reader,
        ):
            yield _MqttReader(client, reader, self.idle_timeout)


class _MqttReader:
    def __init__(self, client: Client, reader: Reader, idle_timeout: float) -> None:
        self._client = client
        self._reader = reader
        self._idle_timeout = idle_timeout

    async def read(self) -> Delivery:
        if not self._idle_timeout:
            return await self._reader.read()
        while True:
            await self._client.connected()
            try:
                async with asyncio.timeout(self._idle_timeout):
                    return await self._reader.read()
            except TimeoutError as error:
                if self._client.status.state == "connected":
                    raise EndOfInput("no message came for a while") from error

    async def ready(self, within: float, /) -> None:
        await _reach(self._client, within)


@attrs.frozen(kw_only=True)
class MqttSink:
    """Publishes messages to a broker: a bridge, or the way back."""

    reads: ClassVar[Literal["messages"]] = "messages"

    connection: MqttConnection = attrs.field(metadata=_help("Name of the connection."))
    topic: str = attrs.field(
        default="{topic}",
        validator=_valid_template,
        metadata=_help('Where to publish; {topic} is the topic the message came on, as in "site1/{topic}".'),
    )
    qos: Literal[0, 1, 2] | None = attrs.field(
        default=None,
        metadata=_help(
            "QoS to publish with; without it each message keeps its own. At 0 nothing is confirmed."
        ),
    )
    retain: bool | None = attrs.field(
        default=None, metadata=_help("Retain flag to publish with; without it each message keeps its own.")
    )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        async with self.connection.sink_client() as client:
            yield _MqttWriter(client, self)


class _MqttWriter:
    def __init__(self, client: Client, recipe: MqttSink) -> None:
        self._client = client
        self._before, place, self._after = recipe.topic.partition("{topic}")
        self._keeps_topic = bool(place)
        self._qos = recipe.qos
        self._retain = recipe.retain
        self._changes = recipe.topic != "{topic}" or recipe.qos is not None or recipe.retain is not None

    async def write(self, batch: Batch, /) -> None:
        messages = batch.messages
        if self._changes or any(message.properties.subscription_ids for message in messages):
            messages = [self._outgoing(message) for message in messages]
        await self._client.publish(messages)

    async def ready(self, within: float, /) -> None:
        await _reach(self._client, within)

    def _outgoing(self, message: Message) -> Message:
        """Subscription identifiers belong to the hop the message came by (MQTT 5 section 3.3.4)."""
        properties = message.properties
        if properties.subscription_ids:
            properties = msgspec.structs.replace(properties, subscription_ids=())
        topic = self._before
        if self._keeps_topic:
            topic = f"{topic}{message.topic}{self._after}"
        return Message(
            topic,
            message.payload,
            message.qos if self._qos is None else self._qos,
            message.retain if self._retain is None else self._retain,
            properties,
        )


async def _reach(client: Client, within: float) -> None:
    try:
        async with asyncio.timeout(within):
            await client.connected()
    except TimeoutError as error:
        status = client.status
        raise Disconnected(
            f"no connection {status.name!r} within {within:g} s: {status.last_error or 'no answer'}",
            fix="see that the broker runs and its address is right",
        ) from error
