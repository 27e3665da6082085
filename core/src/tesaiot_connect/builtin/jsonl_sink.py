"""JSON lines in a file: one record a line.

Owns: the line format and the file: appending, rotation, fsync, and repair after a crash. Rule:
the file always ends at the end of a line, except while a write is under way; whatever is found
or left there by a crash or a full disk is put right before anything is added.

A line is {"topic": ..., <topic fields>, "time": <seconds since the epoch>, "value": <payload>}.
Bytes that are not JSON (serializer "raw") are shown as text if they are UTF-8, else as
{"base64": "..."}.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import msgspec

from ..errors import ConnectorError, PartialDelivery, PayloadError
from ..message import Record, Records, Route
from ..protocols import Duration, Size, Writer

_encode = msgspec.json.Encoder().encode
_PREFIXES = 65536
"""How many topics' beginnings of a line are kept."""
_LONG = 1024
"""Bytes of such a beginning that are worth it."""
_ONLY_RAW = frozenset({msgspec.Raw})
_SHOWN = frozenset({bytes, bytearray, memoryview})
"""Types that are not left to the encoder."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@attrs.frozen(kw_only=True)
class JsonlSink:
    """Appends records to a file, one JSON document a line."""

    reads: ClassVar[Literal["raw_records"]] = "raw_records"

    path: Path = attrs.field(metadata=_help("The file. Its folder must exist."))
    fsync: Literal["never", "batch", "interval"] = attrs.field(
        default="never",
        metadata=_help(
            'When the file is forced to the disk. "never": the system decides; a crash of the process '
            'loses nothing, a power cut may. "batch": before each batch is acknowledged, so a power cut '
            'loses nothing. "interval": every fsync_interval, so a power cut loses at most that.'
        ),
    )
    fsync_interval: Duration = attrs.field(
        default=Duration(1.0),
        validator=attrs.validators.gt(Duration(0)),
        metadata=_help('How often, with fsync = "interval".'),
    )
    rotate_size: Size = attrs.field(
        default=Size(0),
        validator=attrs.validators.ge(Size(0)),
        metadata=_help("Start a new file before this one grows larger; 0 is never."),
    )
    rotate_age: Duration = attrs.field(
        default=Duration(0.0),
        validator=attrs.validators.ge(Duration(0)),
        metadata=_help("Start a new file when the first line of this one is older; 0 is never."),
    )
    keep: int = attrs.field(
        default=10,
        validator=attrs.validators.ge(1),
        metadata=_help("How many rotated files stay (name.1 is the newest); older ones are deleted."),
    )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        file = LineFile(self)
        syncing = asyncio.create_task(file.sync_every()) if self.fsync == "interval" else None
        try:
            yield _JsonlWriter(file)
        finally:
            if syncing is not None:
                syncing.cancel()
                await asyncio.wait((syncing,))
            try:
                if self.fsync != "never":
                    await file.sync()
            finally:
                file.close()


class _JsonlWriter:
    def __init__(self, file: LineFile) -> None:
        self._file = file
        self._lines = Lines()

    async def write(self, batch: Sequence[Record], /) -> None:
        data, failures = self._lines.encode(batch)
        if data:
            self._file.append(data)
            await self._file.settle()
        if failures:
            raise PartialDelivery(failures)


class Lines:
    """Records to lines. The beginning of a line is encoded once for each topic."""

    def __init__(self) -> None:
        self._prefixes: dict[str, bytes] = {}
        self._topics: set[str] = set()

    def encode(self, records: Sequence[Record]) -> tuple[bytes, dict[int, BaseException]]:
        """The lines of all records that can be written, and the errors of the others."""
        failures: dict[int, BaseException] = {}
        values: Sequence[Any]
        values = records.values if type(records) is Records else [record.value for record in records]
        if not values:
            return b"", failures
        if set(map(type, values)) != _ONLY_RAW:
            records, values, failures = _documents(records, values)
            if not values:
                return b"", failures
        heads = self._heads(records)
        data = _joined(heads, values)
        if data.count(b"\n") > len(values) or b"\r" in data:  # white space: JSON text holds neither unescaped
            data = _joined(heads, [msgspec.json.format(value, indent=-1) for value in values])
        return data, failures

    def _heads(self, records: Sequence[Record]) -> list[bytes]:
        """For each record the end of the line before it and the beginning of its own."""
        prefixes = self._prefixes
        routes: Sequence[Route]
        if type(records) is Records:
            routes, time, same = records.routes, records.time, True
        else:
            routes, time = [record.route for record in records], records[0].time
            same = all(record.time == time for record in records)
        if same:
            end = b'%.6f,"value":' % time
            if len(self._topics) > len(routes):  # of the batch before: mostly the same again
                self._topics = set()
            try:
                stamped = {topic: prefixes[topic] + end for topic in self._topics}
                return [stamped[route.topic] for route in routes]
            except KeyError:
                self._topics = {route.topic for route in routes}
            try:
                stamped = {topic: prefixes[topic] + end for topic in self._topics}
                return [stamped[route.topic] for route in routes]
            except KeyError:  # a topic that is new
                pass
        heads = []
        for record in records:
            prefix = prefixes.get(record.route.topic) or self._learn(record)
            heads.append(b'%b%.6f,"value":' % (prefix, record.time))
        return heads

    def _learn(self, record: Record) -> bytes:
        if len(self._prefixes) >= _PREFIXES:
            self._prefixes.clear()
        start = _encode({"topic": record.route.topic, **record.route.fields})
        prefix = b"}\n" + start[:-1] + b',"time":'
        if len(prefix) <= _LONG:
            self._prefixes[record.route.topic] = prefix
        return prefix


def _joined(heads: list[bytes], values: Sequence[Any]) -> bytes:
    parts: list[Any] = [None] * (2 * len(heads))
    parts[0::2] = heads
    parts[1::2] = values
    return b"".join(parts)[2:] + b"}\n"


def _documents(
    records: Sequence[Record], values: Sequence[Any]
) -> tuple[list[Record], list[Any], dict[int, BaseException]]:
    """Values as JSON documents, without those that have no such form."""
    if not _SHOWN.intersection(map(type, values)):
        try:
            return list(records), list(map(_encode, values)), {}
        except Exception:  # noqa: BLE001, S110 - found one by one below
            pass
    kept: list[Record] = []
    documents: list[Any] = []
    failures: dict[int, BaseException] = {}
    for index, (record, value) in enumerate(zip(records, values, strict=True)):
        try:
            documents.append(value if type(value) is msgspec.Raw else _encode(presentable(value)))
            kept.append(record)
        except Exception as error:  # noqa: BLE001 - a value of anybody's
            wrong = PayloadError(
                f"{repr(value)[:200]} of topic {record.route.topic!r} has no JSON form: {error}"
            )
            wrong.__cause__ = error
            failures[index] = wrong
    return kept, documents, failures


def presentable(value: Any) -> Any:
    """A value as JSON shows it: bytes as text if they are UTF-8, else as {"base64": "..."}."""
    if type(value) in _SHOWN:
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return value


class LineFile:
    """The file: whole lines only. Used from one task."""

    def __init__(self, recipe: JsonlSink) -> None:
        self._recipe = recipe
        self._path = recipe.path
        self._file = -1
        self._dirty = False
        self._sync_error: BaseException | None = None
        self._open()

    def append(self, data: bytes) -> None:
        """All of `data` or nothing of it."""
        if self._sync_error is not None:
            error, self._sync_error = self._sync_error, None
            raise error
        self._follow()
        self._rotate(len(data))
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, memoryview(data)[done:] if done else data)
        except OSError as error:
            if done:
                os.ftruncate(self._file, self._size)
            raise self._explained(error) from error
        self._size += done
        self._dirty = True

    async def settle(self) -> None:
        if self._recipe.fsync == "batch":
            await self.sync()

    async def sync(self) -> None:
        if self._dirty:
            self._dirty = False
            try:
                await asyncio.to_thread(os.fsync, self._file)
            except asyncio.CancelledError:  # the thread may come too late, when the file is closed
                self._dirty = True
                raise
            except OSError as error:
                raise self._explained(error) from error

    async def sync_every(self) -> None:
        while True:
            await asyncio.sleep(self._recipe.fsync_interval)
            try:
                await self.sync()
            except ConnectorError as error:
                self._sync_error = error

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _open(self) -> None:
        flags = (
            os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        )
        try:
            self._file = os.open(self._path, flags, 0o644)
        except OSError as error:
            raise self._explained(error) from error
        try:
            self._size = _repair(self._file)
            self._born = _first_time(self._file) if self._recipe.rotate_age and self._size else time.time()
        except OSError as error:
            self.close()
            raise self._explained(error) from error

    def _follow(self) -> None:
        """Open the path again if the file there is not ours any more; see what others appended."""
        ours = os.fstat(self._file)
        self._size = ours.st_size
        with contextlib.suppress(FileNotFoundError):
            there = self._path.stat()
            if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
                return
        self.close()
        self._open()

    def _rotate(self, coming: int) -> None:
        recipe = self._recipe
        if not self._size:
            self._born = time.time()
            return
        too_large = recipe.rotate_size and self._size + coming > recipe.rotate_size
        too_old = recipe.rotate_age and time.time() - self._born > recipe.rotate_age
        if not (too_large or too_old):
            return
        try:
            if recipe.fsync != "never":
                os.fsync(self._file)
            self.close()
            for number in range(recipe.keep - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    self._numbered(number).replace(self._numbered(number + 1))
            self._path.replace(self._numbered(1))
        except PermissionError:  # Windows, while somebody reads it: the next batch tries again
            pass
        except OSError as error:
            raise self._explained(error) from error
        if self._file < 0:
            self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _explained(self, error: OSError) -> ConnectorError:
        fixes = {
            errno.ENOSPC: "free space on the disk: what could not be written is tried again",
            errno.EDQUOT: "free space or raise the quota: what could not be written is tried again",
            errno.ENOENT: f"create the folder {self._path.parent}",
            errno.EACCES: "let this user write there, or choose another path",
            errno.EISDIR: "name a file, not a folder",
            errno.EROFS: "choose a path on a disk that can be written",
        }
        reason = error.strerror or str(error)
        return ConnectorError(
            f"cannot write {self._path}: {reason}",
            fix=fixes.get(error.errno or 0, "see that the path can be written"),
        )


def _repair(file: int) -> int:
    """Make the file end at the end of a line, and give its size. What stands after the last end
    of line is completed if it is a document, else cut off: it was never acknowledged."""
    size = os.fstat(file).st_size
    tail = b""
    start = size
    while start and b"\n" not in tail:
        step = min(start, 65536)
        start -= step
        os.lseek(file, start, os.SEEK_SET)
        tail = _read(file, step) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    if not tail:
        return size
    try:
        msgspec.json.decode(tail)
    except Exception:  # noqa: BLE001 - any tail that is not a document
        os.ftruncate(file, size - len(tail))
    else:
        os.write(file, b"\n")
    return os.fstat(file).st_size


def _first_time(file: int) -> float:
    """When the first line was received; the last change of the file if it does not say."""
    os.lseek(file, 0, os.SEEK_SET)
    line = _read(file, 65536).partition(b"\n")[0]
    try:
        return float(msgspec.json.decode(line)["time"])
    except Exception:  # noqa: BLE001 - a line of anybody's
        return os.fstat(file).st_mtime


def _read(file: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := os.read(file, size - len(data))):
        data += more
    return data
