"""The data that flows: messages, batches, records, and who waits to hear about them.

Owns: the shapes every room and plugin shares. Rule: the unit is the batch; nothing here is
called once per message. Hot types are msgspec structs: measured, half the cost of slots classes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import msgspec


class Properties(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """MQTT 5 PUBLISH properties (section 3.3.2.3), passed end to end.

    The topic alias is not among them: it belongs to one hop and the engine resolves it.
    """

    payload_format: int | None = None
    """1 says the payload is UTF-8 text, 0 or None says nothing."""
    message_expiry: int | None = None
    """Seconds the message has left to live."""
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user: tuple[tuple[str, str], ...] = ()
    subscription_ids: tuple[int, ...] = ()
    """Set by a server on delivery: the identifiers of the subscriptions that matched."""


NO_PROPERTIES = Properties()


class Message(msgspec.Struct, frozen=True, gc=False):
    """One application message, as MQTT carries it."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = NO_PROPERTIES


class Batch(msgspec.Struct, frozen=True):
    """What came together and is handed on together."""

    messages: Sequence[Message]
    received: float
    """When it came, in seconds since the epoch."""


class Route(msgspec.Struct, frozen=True):
    """A topic and the fields parsed from it; one object per topic, cached."""

    topic: str
    fields: Mapping[str, str] = {}


class Undecodable(msgspec.Struct, frozen=True):
    """Stands where a decoded value would, for a payload that could not be decoded."""

    error: BaseException
    payload: bytes


class Record(msgspec.Struct, gc=False):
    """What a database or a process step reads: a message with its topic parsed and its payload decoded."""

    route: Route
    time: float
    """When the message was received, in seconds since the epoch."""
    value: Any
    """The decoded payload. For sinks with `reads = "raw_records"` it may be a `msgspec.Raw`
    that holds one valid JSON document in UTF-8."""
    message: Message


class Records(Sequence[Record]):
    """The records of one batch, held by column: `routes`, `values` and `messages` are parallel,
    `time` is that of all.

    A sink that writes whole batches may read the columns, which spares it the `Record` objects;
    they are made when the first is asked for, and then kept.
    """

    __slots__ = ("_rows", "messages", "routes", "time", "values")

    def __init__(
        self, routes: Sequence[Route], time: float, values: Sequence[Any], messages: Sequence[Message]
    ) -> None:
        self.routes = routes
        self.time = time
        self.values = values
        self.messages = messages
        self._rows: list[Record] | None = None

    def _records(self) -> list[Record]:
        if self._rows is None:
            time = self.time
            self._rows = [
                Record(route, time, value, message)
                for route, value, message in zip(self.routes, self.values, self.messages, strict=True)
            ]
        return self._rows

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records())

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return self._records()[index]


Settle = Callable[[BaseException | None], Awaitable[None]]


async def _nobody_waits(_error: BaseException | None) -> None:
    return None


class Delivery:
    """A batch somebody waits to hear about. Settle it exactly once: `ack` or `nack`, or hand
    that duty on with `split` or `join`.

    `settle` is awaited once, with None for an ack or the error of a nack.
    """

    __slots__ = ("_settle", "_settled", "batch")

    def __init__(self, batch: Batch, settle: Settle = _nobody_waits) -> None:
        self.batch = batch
        self._settle = settle
        self._settled = False

    async def ack(self) -> None:
        """The batch is where it was promised to be."""
        self._consume()
        await self._settle(None)

    async def nack(self, error: BaseException) -> None:
        """The batch will not be delivered; the source decides (MQTT: disconnect and resume)."""
        self._consume()
        await self._settle(error)

    def split(self, batches: Iterable[Batch]) -> list[Delivery]:
        """Hand the duty to one child for each batch; consumes this delivery.

        The last child to settle settles this one: with the first error if any child was
        nacked. No batches at all leave nobody to do it, so then it is acked on the caller's
        behalf by a single child with no messages.
        """
        self._consume()
        parts = list(batches) or [Batch((), self.batch.received)]
        left = len(parts)
        first_error: BaseException | None = None

        async def settle(error: BaseException | None) -> None:
            nonlocal left, first_error
            left -= 1
            first_error = first_error or error
            if left == 0:
                await self._settle(first_error)

        return [Delivery(part, settle) for part in parts]

    @classmethod
    def join(cls, deliveries: Sequence[Delivery]) -> Delivery:
        """One delivery with the messages of all, in order; settling it settles all of them."""
        if len(deliveries) == 1:
            return deliveries[0]
        settles = []
        messages: list[Message] = []
        for delivery in deliveries:
            delivery._consume()
            settles.append(delivery._settle)
            messages += delivery.batch.messages

        async def settle(error: BaseException | None) -> None:
            for one in settles:
                await one(error)

        return cls(Batch(messages, deliveries[0].batch.received), settle)

    def _consume(self) -> None:
        if self._settled:
            raise RuntimeError("this delivery was settled, split or joined before")
        self._settled = True
