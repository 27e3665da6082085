"""Messages there and back: does an accepted connection carry any, and how fast?

Owns: the echo through a topic, and the sample of throughput. Rules: QoS 1, nothing retained, bounded in time
and bytes; that a broker does not allow it is an answer, not a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..client import Client, ClientState
from ..errors import ConnectorError, Disconnected, PartialDelivery, Refused
from ..message import Message
from ..mqtt.packets import Subscription
from ..mqtt.reasons import R
from .findings import Step

MOST_BYTES = 4 * 1024 * 1024
MOST_SECONDS = 2.0
_PAYLOAD = 1024
_BATCH = 64
_LANES = 4
"""Batches under way at a time."""
_NOT_ALLOWED = (
    R.NOT_AUTHORIZED,
    R.UNSPECIFIED_ERROR,  # all that a SUBACK of 3.1.1 can say
    R.IMPLEMENTATION_SPECIFIC,
    R.TOPIC_FILTER_INVALID,
    R.TOPIC_NAME_INVALID,
    R.QUOTA_EXCEEDED,
    R.ADMINISTRATIVE_ACTION,
    R.QOS_NOT_SUPPORTED,
)
_RIGHTS = (
    "the endpoint works without it; to see a message go through, name a topic with --topic that this login "
    "may both send to and read"
)

T = TypeVar("T")


class Fate:
    """When a client loses its connection: `told` is its `on_state`."""

    def __init__(self) -> None:
        self._lost: asyncio.Future[ConnectorError] = asyncio.get_running_loop().create_future()

    def told(self, state: ClientState, error: ConnectorError | None) -> None:
        if state == "waiting" and not self._lost.done():
            self._lost.set_result(error or Disconnected("the connection ended"))

    async def unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of `work`. Raises the error of the connection if that ends before."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._lost.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait((task,))


async def echo(client: Client, fate: Fate, topic: str, timeout: float) -> Step:
    """One message to the topic and back; seconds are from PUBLISH until it is here."""
    try:
        async with asyncio.timeout(timeout):
            return await fate.unless_lost(_echo(client, topic))
    except TimeoutError:
        what = f"nothing came back from {topic} within {timeout:g} s, though the broker granted both ways"
        return Step("failed", what=what, fix="it may drop in silence what is not allowed: " + _RIGHTS)
    except ConnectorError as error:
        return _refused(error, topic)


async def _echo(client: Client, topic: str) -> Step:
    payload = secrets.token_hex(16).encode()
    async with client.subscribe([Subscription(topic, 1, retain_handling=2)]) as reader:
        await reader.grant()
        began = time.monotonic()
        await client.publish([Message(topic, payload, 1)])
        while True:
            delivery = await reader.read()
            seconds = time.monotonic() - began
            await delivery.ack()
            if any(message.payload == payload for message in delivery.batch.messages):
                return Step("ok", seconds)


async def throughput(client: Client, fate: Fate, topic: str) -> Step:
    """Messages of 1 KiB until `MOST_BYTES` are acknowledged or `MOST_SECONDS` are over."""
    message = Message(topic, bytes(_PAYLOAD), 1)
    left, acknowledged = MOST_BYTES // _PAYLOAD, 0

    async def lane() -> None:
        nonlocal left, acknowledged
        while left > 0:
            left -= _BATCH
            await client.publish([message] * _BATCH)
            acknowledged += _BATCH

    began = time.monotonic()
    lanes = [asyncio.create_task(fate.unless_lost(lane())) for _ in range(_LANES)]
    try:
        await asyncio.wait(lanes, timeout=MOST_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        seconds = time.monotonic() - began
        for one in lanes:
            one.cancel()
        await asyncio.wait(lanes)
    for one in lanes:
        with contextlib.suppress(asyncio.CancelledError):
            if isinstance(error := one.exception(), ConnectorError):
                return _refused(error, topic)
            if error is not None:
                raise error
    if not acknowledged:
        return Step("failed", seconds, f"the broker acknowledged nothing within {MOST_SECONDS:g} s")
    return Step("ok", seconds, rate=acknowledged * _PAYLOAD / seconds)


def _refused(error: ConnectorError, topic: str) -> Step:
    """The broker said no, or the connection ended over it."""
    if isinstance(error, PartialDelivery):
        first = next(iter(error.failures.values()))
        return Step("not allowed", what=f"publishing to {topic}: {_what(first)}", fix=_RIGHTS)
    if isinstance(error, Refused) and error.reason_code in _NOT_ALLOWED:
        return Step("not allowed", what=error.what, fix=_RIGHTS)
    return Step("failed", what=error.what, fix=error.fix or _RIGHTS)


def _what(error: BaseException) -> str:
    return error.what if isinstance(error, ConnectorError) else str(error)
