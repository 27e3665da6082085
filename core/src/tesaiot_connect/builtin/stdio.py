"""Standard output, and nowhere.

Owns: the two sinks for looking and measuring. Rule: a slow terminal or pipe holds the pipeline
back, never the event loop nor the end of the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, BinaryIO, ClassVar, Literal

import attrs
import msgspec

from ..errors import ConnectorError, EndOfOutput, PartialDelivery
from ..message import Batch, Record
from ..protocols import Writer
from .jsonl_sink import Lines

PLACES = ("{topic}", "{payload}", "{time}")


def _places(_instance: Any, _field: Any, format: str) -> None:
    rest = format
    for place in PLACES:
        rest = rest.replace(place, "")
    if "{" in rest or "}" in rest:
        raise ValueError(f"{format!r} may use {', '.join(PLACES)}, and no other braces")


@attrs.frozen(kw_only=True)
class StdoutSink:
    """Prints each record on a line."""

    reads: ClassVar[Literal["raw_records"]] = "raw_records"

    format: str = attrs.field(
        default="json",
        validator=_places,
        metadata={
            "help": '"json" for the lines of the jsonl sink, or a template with {topic}, {payload} and '
            '{time}, for example "{topic} {payload}".'
        },
    )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        with contextlib.suppress(OSError, ValueError):  # a write will tell
            sys.stdout.flush()
        yield _StdoutWriter(self.format, sys.stdout.buffer)


class _StdoutWriter:
    def __init__(self, format: str, stream: BinaryIO) -> None:
        self._format = format
        # not the buffer: a thread stuck in a write would hold its lock when the program ends
        self._stream = getattr(stream, "raw", stream)
        self._lines = Lines()

    async def write(self, batch: Sequence[Record], /) -> None:
        failures: dict[int, BaseException] = {}
        if self._format == "json":
            data, failures = self._lines.encode(batch)
        else:
            data = b"".join(map(self._line, batch))
        try:
            await self._printed(data)
        except BrokenPipeError as error:
            raise EndOfOutput("standard output was closed by its reader") from error
        except (OSError, ValueError) as error:
            raise ConnectorError(f"cannot write to standard output: {error}") from error
        if failures:
            raise PartialDelivery(failures)

    async def _printed(self, data: bytes) -> None:
        """In a daemon thread: a reader that has stalled must not keep the program from ending."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def work() -> None:
            error = None
            try:
                self._print(data)
            except Exception as failure:  # noqa: BLE001 - told to whoever waits
                error = failure
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, error)

        threading.Thread(target=work, name="tesaiot-stdout", daemon=True).start()
        await done

    def _print(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            written = self._stream.write(left)
            if written is None:  # standard output was set not to block, and is full
                time.sleep(0.01)
            else:
                left = left[written:]
        self._stream.flush()

    def _line(self, record: Record) -> bytes:
        value = record.value
        if isinstance(value, msgspec.Raw | bytes):
            payload = bytes(value)
        elif isinstance(value, str):
            payload = value.encode()
        else:
            payload = msgspec.json.encode(value)
        before, place, after = self._format.partition("{payload}")
        parts = [self._fill(before, record)]
        while place:
            parts.append(payload)
            before, place, after = after.partition("{payload}")
            parts.append(self._fill(before, record))
        return b"".join((*parts, b"\n"))

    def _fill(self, text: str, record: Record) -> bytes:
        return text.replace("{topic}", record.route.topic).replace("{time}", f"{record.time:.6f}").encode()


@attrs.frozen(kw_only=True)
class NullSink:
    """Takes everything and keeps nothing; the figures of the run still count it."""

    reads: ClassVar[Literal["messages"]] = "messages"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        yield _NullWriter()


class _NullWriter:
    async def write(self, batch: Batch, /) -> None:
        return None
