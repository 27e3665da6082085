"""Transports that do as they are told, and what must be true when a test with them is over."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from tesaiot_connect import ClientCertificate, Connection, State, Url
from tesaiot_connect.testing import connected_pair

T = TypeVar("T")
Manner = Literal["connect", "hang", "late", "deaf", "slow to go"]
""""hang": until it is cancelled. "late": then it has a connection. "deaf": it is not told by a cancellation,
and has a connection at `release`. "slow to go": it ends at `release` only."""


class Endpoint:
    """`outcome` is an error to raise, an event to wait for before it connects, or a manner."""

    schemes: ClassVar[Mapping[str, int]] = {"test": 1}
    rank: ClassVar[int] = 0

    def __init__(
        self, host: str, outcome: BaseException | asyncio.Event | Manner = "connect", *, races: bool = True
    ) -> None:
        self.url = Url("test", host, 1)
        self.races = races  # type: ignore[misc]
        self.outcome = outcome
        self.began = asyncio.Event()
        self.release = asyncio.Event()
        self.early: list[bytes] = []
        """Of each attempt."""
        self.identities: list[ClientCertificate | None] = []
        self.trying = 0
        """Attempts that run now."""
        self.most = 0
        self.connections: list[Connection] = []

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.early.append(early)
        self.identities.append(identity)
        self.began.set()
        self.trying += 1
        self.most = max(self.most, self.trying)
        try:
            return await self._connect()
        finally:
            self.trying -= 1

    async def _connect(self) -> Connection:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if isinstance(self.outcome, asyncio.Event):
            await self.outcome.wait()
        elif self.outcome in ("hang", "late", "slow to go"):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if self.outcome == "slow to go":
                    await self._released()
                if self.outcome != "late":
                    raise
        elif self.outcome == "deaf":
            await self._released()
        connection = connected_pair()[0]
        self.connections.append(connection)
        return connection

    async def _released(self) -> None:
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                continue

    @property
    def tries(self) -> int:
        return len(self.early)

    @property
    def open(self) -> list[Connection]:
        return [one for one in self.connections if one.status().state is State.OPEN]


def opened(*endpoints: Endpoint) -> list[Connection]:
    return [connection for endpoint in endpoints for connection in endpoint.open]


async def until(true: Any, seconds: float = 100.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.001)


def run(main: Coroutine[Any, Any, T]) -> T:
    """On a loop of its own, on which no task may be left."""

    async def checked() -> T:
        result = await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        return result

    return asyncio.run(checked())
