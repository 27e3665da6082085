"""A transport that misbehaves on request, around any other.

Owns: the faults a network really has. Rule: within the contract; what breaks is the path, so a
program that keeps its promises over `Faulty` keeps them over a bad network.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs

from ..errors import ConnectFailed, Disconnected
from ..protocols import (
    ByteStream,
    ClientCertificate,
    CloseReason,
    Connection,
    ConnectionStatus,
    Peer,
    Transport,
    Url,
)


@attrs.define
class Faulty:
    """A `Transport` whose faults may be changed while it runs.

    `refuse`: so many connects fail first. `drop_after`: each connection breaks once so many
    bytes went through it, both directions together. `piece`: nothing longer than so many
    bytes is sent or received at once. `delay`: seconds before each send.
    `connects` counts the attempts.
    """

    inner: Transport
    refuse: int = 0
    drop_after: int | None = None
    piece: int | None = None
    delay: float = 0.0
    connects: int = 0

    @property
    def url(self) -> Url | None:
        return getattr(self.inner, "url", None)

    if TYPE_CHECKING:  # what the contract has on the class is the inner transport's here
        schemes: ClassVar[Mapping[str, int]]
        rank: ClassVar[int]
        races: ClassVar[bool]
    else:
        schemes = property(lambda self: self.inner.schemes)
        rank = property(lambda self: self.inner.rank)
        races = property(lambda self: self.inner.races)

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.connects += 1
        if self.refuse > 0:
            self.refuse -= 1
            raise ConnectFailed("refused by fault injection", fix="try again")
        return _FaultyConnection(await self.inner.connect(identity=identity, early=early), self)


class _FaultyConnection:
    def __init__(self, inner: Connection, faults: Faulty) -> None:
        self._inner = inner
        self.faults = faults
        self._passed = 0

    @property
    def peer(self) -> Peer:
        return self._inner.peer

    @property
    def multistream(self) -> bool:
        return self._inner.multistream

    @property
    def early_sent(self) -> bool:
        return self._inner.early_sent

    async def open_stream(self, *, priority: int = 0) -> ByteStream:
        return _FaultyStream(await self._inner.open_stream(priority=priority), self)

    async def accept_stream(self) -> ByteStream:
        return _FaultyStream(await self._inner.accept_stream(), self)

    def status(self) -> ConnectionStatus:
        return self._inner.status()

    def set_keepalive(self, seconds: float) -> None:
        self._inner.set_keepalive(seconds)

    async def probe(self) -> None:
        await self._inner.probe()

    async def migrate(self) -> None:
        await self._inner.migrate()

    async def wait_closed(self) -> CloseReason:
        return await self._inner.wait_closed()

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        await self._inner.aclose(code, reason)

    def abort(self, code: int = 0) -> None:
        self._inner.abort(code)

    def allowance(self) -> int | None:
        """Bytes that may pass before the connection breaks; None is no limit."""
        limit = self.faults.drop_after
        return None if limit is None else max(0, limit - self._passed)

    def passed(self, count: int) -> None:
        self._passed += count

    def drop(self) -> Disconnected:
        self._inner.abort()
        return Disconnected("dropped by fault injection")


class _FaultyStream:
    def __init__(self, inner: ByteStream, connection: _FaultyConnection) -> None:
        self._inner = inner
        self._connection = connection

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        left = self._connection.allowance()
        if left == 0:
            raise self._connection.drop()
        bounds = (max_bytes, left, self._connection.faults.piece)
        data = await self._inner.receive(min(bound for bound in bounds if bound is not None))
        self._connection.passed(len(data))
        return data

    async def send(self, data: bytes, /) -> None:
        faults = self._connection.faults
        if faults.delay:
            await asyncio.sleep(faults.delay)
        left = self._connection.allowance()
        passing = data if left is None else data[:left]
        step = faults.piece or max(1, len(passing))
        for begin in range(0, len(passing), step):
            await self._inner.send(passing[begin : begin + step])
            if faults.piece:
                await asyncio.sleep(0)  # let the loop send what it has
        self._connection.passed(len(passing))
        if len(passing) < len(data):
            raise self._connection.drop()

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def abort(self, code: int = 0) -> None:
        self._inner.abort(code)
