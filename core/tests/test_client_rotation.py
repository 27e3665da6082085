"""A client that waits tries again soon when its auth has other credentials."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import attrs
import pytest

from tesaiot_connect.access import Anybody
from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions
from tesaiot_connect.errors import Refused
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import Credentials, Duration, Peer, Principal, RotatingAuth
from tesaiot_connect.server import Broker, ListenerSpec
from tesaiot_connect.testing import Network

SLOW = Backoff(min=Duration(0.01), max=Duration(1000))


class Doorman:
    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        if credentials.password != b"right":
            raise Refused("bad password", reason_code=0x86, permanent=True)
        return Anybody()


@attrs.define
class Rotating:
    """An auth and its own login, whose password a test changes."""

    password: bytes = b"wrong"
    begun: int = 0
    wait: Any = attrs.Factory(asyncio.Event)

    async def begin(self) -> Rotating:
        self.begun += 1
        return self

    async def identity(self) -> None:
        return None

    async def changed(self) -> None:
        if isinstance(self.wait, BaseException):
            raise self.wait
        await self.wait.wait()
        self.wait.clear()

    @property
    def credentials(self) -> Credentials:
        return Credentials("u", self.password)

    async def respond(self, data: bytes, /) -> bytes:
        raise AssertionError

    async def finish(self, data: bytes, /) -> None:
        raise AssertionError


@asynccontextmanager
async def client(auth: Rotating) -> AsyncIterator[Client]:
    assert isinstance(auth, RotatingAuth)
    network = Network()
    async with (
        asyncio.timeout(100),
        Broker().serving([ListenerSpec("pair", network.transport(), Doorman())]),
        Client(Negotiator([network.transport()]), ClientOptions(reconnect=SLOW), auth=auth, name="c") as one,
    ):
        yield one


async def refused(one: Client) -> None:
    with pytest.raises(Refused):
        await one.connected()
    while one.status.state != "waiting":
        await asyncio.sleep(0)


def test_new_credentials_end_the_wait() -> None:
    async def main() -> None:
        auth = Rotating()
        async with client(auth) as one:
            await refused(one)
            assert auth.begun == 1, "a refused login waits for the longest delay"
            auth.password = b"right"
            auth.wait.set()
            while not one.status.connects:
                await asyncio.sleep(0.001)
            assert auth.begun == 2
            await one.connected()

    asyncio.run(main())


class Always:
    """What a file that changes all the time looks like."""

    async def wait(self) -> None:
        pass

    def clear(self) -> None:
        pass


def test_credentials_that_change_all_the_time_do_not_make_a_hot_loop() -> None:
    begun: list[float] = []

    class Noted(Rotating):
        async def begin(self) -> Rotating:
            begun.append(asyncio.get_running_loop().time())
            return await super().begin()

    async def main() -> None:
        async with client(Noted(wait=Always())) as one:
            await refused(one)
            while len(begun) < 5:
                await asyncio.sleep(0.001)

    asyncio.run(main())
    assert min(later - sooner for sooner, later in pairwise(begun)) > SLOW.min * 0.9


@pytest.mark.parametrize("trouble", [KeyError("x"), asyncio.CancelledError(), TimeoutError()])
def test_an_auth_that_cannot_tell_only_waits(trouble: BaseException) -> None:
    async def main() -> None:
        auth = Rotating(wait=trouble)
        async with client(auth) as one:
            await refused(one)
            for _ in range(100):
                await asyncio.sleep(0)
            assert auth.begun == 1
            assert one.status.state == "waiting"

    asyncio.run(main())


def test_leaving_does_not_wait_for_a_change() -> None:
    async def main() -> None:
        auth = Rotating()
        async with client(auth) as one:
            await refused(one)
        assert one.status.state == "closed"

    asyncio.run(main())
