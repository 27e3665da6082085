"""Messages from JSON lines: a file, a file that grows, or standard input.

Owns: turning lines into messages, and following a file through rotation. Rule: a line is read
when it is complete; a line that is no message is logged with its place (one of them a second) and
passed over.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import math
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs
import msgspec

from ..errors import ConnectorError, EndOfInput
from ..message import Batch, Delivery, Message
from ..mqtt.topics import check_topic
from ..protocols import Duration, Reader, Size

log = logging.getLogger("tesaiot_connect.jsonl")

CHUNK = 65536
LOG_INTERVAL = 1.0
"""Seconds; lines that are passed over are logged at most this often."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _valid_topic(_instance: Any, _field: Any, topic: str) -> None:
    if topic:
        try:
            check_topic(topic)
        except ConnectorError as error:
            raise ValueError(str(error)) from error


class _Line(msgspec.Struct):
    """What our own jsonl sink writes, or a line made for this source."""

    topic: str
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    payload: str | None = None
    payload_base64: str | None = None


@attrs.frozen(kw_only=True)
class JsonlSource:
    """Reads a message from each line."""

    path: Path = attrs.field(metadata=_help('The file, or "-" for standard input.'))
    topic: str = attrs.field(
        default="",
        validator=_valid_topic,
        metadata=_help(
            "Publish every line as it is to this topic. Without it each line is an object with topic and "
            "value (as the jsonl sink writes them), payload (text) or payload_base64."
        ),
    )
    follow: bool = attrs.field(
        default=False,
        metadata=_help(
            "Wait at the end of the file for more, also after it was rotated. It may be missing at first."
        ),
    )
    start_at: Literal["beginning", "end"] = attrs.field(
        default="beginning", metadata=_help("Where to begin in a file that is there when the run starts.")
    )
    poll: Duration = attrs.field(
        default=Duration(0.25),
        validator=attrs.validators.gt(Duration(0)),
        metadata=_help("How often to look for more, with follow = true."),
    )
    qos: Literal[0, 1, 2] = attrs.field(
        default=1, metadata=_help("QoS the messages carry; a sink to a broker keeps it.")
    )
    max_line: Size = attrs.field(
        default=Size(16 * 1024 * 1024),
        validator=attrs.validators.ge(Size(1)),
        metadata=_help("A longer line is passed over."),
    )

    def once(self) -> JsonlSource:
        """The same file, to its present end."""
        return attrs.evolve(self, follow=False)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Reader]:
        chunks: _Chunks = _Stdin(sys.stdin.buffer) if self.path.name == "-" else _File(self)
        try:
            yield _JsonlReader(self, chunks)
        finally:
            chunks.close()


class _Chunks(Protocol):
    async def read(self) -> bytes:
        """Some bytes; b"" at the end. Cancel-safe."""
        ...

    def restarted(self) -> bool:
        """Whether the last bytes begin another file; true once each time."""
        ...

    def close(self) -> None: ...


class _JsonlReader:
    def __init__(self, recipe: JsonlSource, chunks: _Chunks) -> None:
        self._recipe = recipe
        self._chunks = chunks
        self._rest = b""
        self._skipping = False  # the rest of a line that is too long
        self._line = 0
        self._ended = False
        self._passed_over = 0
        self._logged = -math.inf
        self._decode = msgspec.json.Decoder(_Line).decode

    async def read(self) -> Delivery:
        while not self._ended:
            chunk = await self._chunks.read()
            if self._chunks.restarted():
                self._rest, self._skipping, self._line = b"", False, 0
            self._ended = not chunk
            if self._skipping:
                _, end, chunk = chunk.partition(b"\n")
                self._skipping = not end
                if not chunk:
                    continue
            lines = (self._rest + (chunk or b"\n")).split(b"\n")
            self._rest = lines.pop()
            if len(self._rest) > self._recipe.max_line:
                lines.append(self._rest)
                self._rest, self._skipping = b"", True
            messages = self._messages(lines)
            if messages:
                return Delivery(Batch(messages, time.time()))
        raise EndOfInput

    def _messages(self, lines: list[bytes]) -> list[Message]:
        topic, qos = self._recipe.topic, self._recipe.qos
        messages = []
        for line in lines:
            self._line += 1
            text = line.strip()
            if not text:
                continue
            if len(text) > self._recipe.max_line:
                self._pass_over(f"longer than max_line, {self._recipe.max_line} bytes")
                continue
            if topic:
                messages.append(Message(topic, text, qos))
                continue
            try:
                name, payload = self._parse(text)
            except (msgspec.MsgspecError, ValueError, ConnectorError, RecursionError) as error:
                self._pass_over(error)
            else:
                messages.append(Message(name, payload, qos))
        return messages

    def _pass_over(self, reason: object) -> None:
        self._passed_over += 1
        now = time.monotonic()
        if now - self._logged >= LOG_INTERVAL:
            self._logged = now
            log.warning(
                "%s:%d is passed over (%d lines so far): %s",
                self._recipe.path, self._line, self._passed_over, reason,
            )  # fmt: skip

    def _parse(self, text: bytes) -> tuple[str, bytes]:
        line = self._decode(text)
        check_topic(line.topic)
        if line.value is not msgspec.UNSET:
            return line.topic, bytes(line.value)
        if line.payload is not None:
            return line.topic, line.payload.encode()
        if line.payload_base64 is not None:
            try:
                return line.topic, base64.b64decode(line.payload_base64, validate=True)
            except binascii.Error as error:
                raise ValueError(f"payload_base64 is not base64: {error}") from error
        raise ValueError("the line has a topic, but no value, payload or payload_base64")


class _File:
    """A file; with `follow`, whatever file the path names from time to time."""

    def __init__(self, recipe: JsonlSource) -> None:
        self._recipe = recipe
        self._file: int = -1
        self._restarted = False
        try:
            self._file = self._open()
        except FileNotFoundError as error:
            if not recipe.follow:
                raise ConnectorError(
                    f"there is no file {recipe.path}",
                    fix="correct the path, or wait for it with follow = true",
                ) from error
        except OSError as error:
            raise self._explained(error) from error
        else:
            if recipe.start_at == "end":
                os.lseek(self._file, 0, os.SEEK_END)

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        while True:
            try:
                data = os.read(self._file, CHUNK) if self._file >= 0 else b""
                if data or not self._recipe.follow:
                    return data
                if self._next():
                    continue
            except OSError as error:
                raise self._explained(error) from error
            await asyncio.sleep(self._recipe.poll)

    def restarted(self) -> bool:
        restarted, self._restarted = self._restarted, False
        return restarted

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _open(self) -> int:
        return os.open(
            self._recipe.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        )

    def _next(self) -> bool:
        """At the end of a file: whether there is another to read from its beginning."""
        try:
            there = self._recipe.path.stat()
        except FileNotFoundError:
            return False
        if self._file >= 0:
            ours = os.fstat(self._file)
            if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
                if ours.st_size >= os.lseek(self._file, 0, os.SEEK_CUR):
                    return False
                os.lseek(self._file, 0, os.SEEK_SET)  # it was cut short: written anew
                self._restarted = True
                return True
        try:
            file = self._open()
        except FileNotFoundError:
            return False
        if (
            self._file >= 0
            and (more := os.fstat(self._file).st_size - os.lseek(self._file, 0, os.SEEK_CUR)) > 0
        ):
            os.close(file)  # written between our last read and the rotation
            return more > 0
        self._restarted = self._file >= 0
        self.close()
        self._file = file
        return True

    def _explained(self, error: OSError) -> ConnectorError:
        return ConnectorError(
            f"cannot read {self._recipe.path}: {error.strerror or error}",
            fix="see that this user may read the file",
        )


class _Stdin:
    """Standard input, read by a thread: no system offers a way for every kind of it. The thread
    holds one chunk at most, and ends with the program."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._wanted = threading.Semaphore(1)
        self._closed = False
        threading.Thread(target=self._pump, name="tesaiot-stdin", daemon=True).start()

    async def read(self) -> bytes:
        chunk = await self._chunks.get()
        self._wanted.release()
        return chunk

    def restarted(self) -> bool:
        return False

    def close(self) -> None:
        self._closed = True
        self._wanted.release()

    def _pump(self) -> None:
        chunk = b"-"
        while chunk:
            self._wanted.acquire()
            if self._closed:
                return
            try:
                chunk = self._stream.read1(CHUNK)
            except (OSError, ValueError):  # closed under our hands
                chunk = b""
            try:
                self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
            except RuntimeError:  # the loop has ended
                return
