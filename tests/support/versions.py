"""Endpoints that speak one version of MQTT alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import ClassVar

import attrs
from stairs import Far, two_listeners

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.errors import ConnectFailed
from tesaiot_connect.mqtt.events import ConnectRequest
from tesaiot_connect.negotiation import NegotiationOptions, Negotiator
from tesaiot_connect.protocols import ByteStream, ClientCertificate, Connection, Duration, Transport, Url
from tesaiot_connect.server import BrokerOptions
from tesaiot_connect.testing import connected_pair

REFUSALS = [b"\x20\x02\x00\x01", b"\x20\x02\x00\x84", b"\x20\x03\x00\x84\x00"]
"""In words: of MQTT 3.1.1, and both forms of MQTT 5."""
SOON = Backoff(min=Duration(0.01), max=Duration(0.1))


async def refuse(far: Far, refusal: bytes = REFUSALS[0], version: int = 5) -> None:
    request = await far.wait(ConnectRequest)
    assert request.connect.version == version
    await far.stream.send(refusal)
    await far.connection.aclose()


@attrs.define
class Speaks:
    """In front of a transport: it refuses every version but `only`, and 0 is both."""

    url: Url
    inner: Transport
    group: asyncio.TaskGroup
    only: int = 0
    up: bool = True
    versions: list[int] = attrs.field(factory=list)
    live: list[Connection] = attrs.field(factory=list)
    schemes: ClassVar[Mapping[str, int]] = {"old": 1}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    def drop(self) -> None:
        for one in self.live:
            one.abort()
        self.live.clear()

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        if not self.up:
            raise ConnectFailed(f"{self.url} is down", fix="wait")
        near, far = connected_pair(4096)
        self.live.append(far)
        self.group.create_task(self._serve(far))
        return near

    async def _serve(self, far: Connection) -> None:
        with contextlib.suppress(Exception):
            stream = await far.accept_stream()
            first = await stream.receive()
            self.versions.append(first[first.index(b"MQTT") + 4])
            if self.only not in (0, self.versions[-1]):
                await stream.send(REFUSALS[2 if self.versions[-1] == 5 else 0])
                await far.aclose()
                return
            onward = await self.inner.connect()
            there = await onward.open_stream()
            await there.send(first)
            flows = [asyncio.create_task(_flow(*ends)) for ends in ((stream, there), (there, stream))]
            await asyncio.wait(flows, return_when=asyncio.FIRST_COMPLETED)
            for flow in flows:
                flow.cancel()
            await asyncio.gather(*flows, return_exceptions=True)
            onward.abort()
        far.abort()


async def _flow(source: ByteStream, target: ByteStream) -> None:
    while data := await source.receive():
        await target.send(data)


@contextlib.asynccontextmanager
async def speaking(*only: int) -> AsyncIterator[list[Speaks]]:
    """Endpoints of one broker, called a, b, ..."""
    async with two_listeners(BrokerOptions()) as (_, inner, _other), asyncio.TaskGroup() as group:
        yield [Speaks(Url("old", chr(97 + place)), inner, group, one) for place, one in enumerate(only)]


def negotiator(*endpoints: Speaks) -> Negotiator:
    """Which tries again soon what has failed."""
    return Negotiator(
        endpoints, NegotiationOptions(race_delay=Duration(0.05), penalty=Duration(0.1), memory=False)
    )
