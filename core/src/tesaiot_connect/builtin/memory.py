"""Batches from and to memory, for tests and for programs that embed the framework.

Owns: two components without a TOML table. Rule: they take no shortcut: what they deliver is
settled, what they take was written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Literal

import attrs

from ..errors import EndOfInput
from ..message import Batch, Delivery, Message, Record
from ..protocols import Reader, Writer


@attrs.frozen
class MemorySource:
    """Gives each list of messages as one delivery, then ends."""

    batches: Iterable[Sequence[Message]]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Reader]:
        yield _MemoryReader(iter(self.batches))


class _MemoryReader:
    def __init__(self, batches: Iterable[Sequence[Message]]) -> None:
        self._batches = iter(batches)

    async def read(self) -> Delivery:
        await asyncio.sleep(0)
        for messages in self._batches:
            return Delivery(Batch(messages, time.time()))
        raise EndOfInput


@attrs.frozen
class MemorySink:
    """Appends decoded records to `into`."""

    reads: ClassVar[Literal["records"]] = "records"

    into: list[Record] = attrs.field(factory=list)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        yield _MemoryWriter(self.into)


class _MemoryWriter:
    def __init__(self, into: list[Record]) -> None:
        self._into = into

    async def write(self, batch: Sequence[Record], /) -> None:
        self._into += batch
