"""The state file: sessions, queues, wills and retained messages in SQLite.

Owns: the file, its one writer thread and group commit. Rules: while one commit runs the next
batch gathers; whoever waits hears of it when everything written before is on disk. What one turn
of the event loop writes is in one transaction, so a crash leaves all of it or nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import attrs
import msgspec

from ..errors import ConnectorError
from ..message import NO_PROPERTIES, Message, Properties

log = logging.getLogger(__name__)

_APPLICATION_ID = 0x7E5A107
_VERSION = 1
_SCHEMA = """
CREATE TABLE session (client_id TEXT PRIMARY KEY, owner TEXT NOT NULL, expiry INTEGER NOT NULL,
    expires_at REAL) WITHOUT ROWID;
CREATE TABLE subscription (client_id TEXT NOT NULL, topic_filter TEXT NOT NULL, options BLOB NOT NULL,
    PRIMARY KEY (client_id, topic_filter)) WITHOUT ROWID;
CREATE TABLE queue (key INTEGER PRIMARY KEY, client_id TEXT NOT NULL, expires_at REAL, shared TEXT,
    message BLOB NOT NULL);
CREATE TABLE inflight (client_id TEXT PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE will (client_id TEXT PRIMARY KEY, delay INTEGER NOT NULL, due REAL, message BLOB NOT NULL)
    WITHOUT ROWID;
CREATE TABLE retained (topic TEXT PRIMARY KEY, expires_at REAL, message BLOB NOT NULL) WITHOUT ROWID;
"""
_LAZY = 0.25
"""Seconds that work nobody waits for may gather."""
_RETRY = 1.0
"""Seconds between attempts while the disk refuses."""
_BEHIND = 50_000
"""Rows and statements that may wait, beside those that acknowledgements wait for."""

_Packed = tuple[str, bytes, int, bool, Properties | None]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Packed).decode


def pack(message: Message) -> bytes:
    properties = None if message.properties is NO_PROPERTIES else message.properties
    return _encode((message.topic, message.payload, message.qos, message.retain, properties))


def unpack(data: bytes) -> Message:
    topic, payload, qos, retain, properties = _decode(data)
    return Message(topic, payload, qos, retain, properties or NO_PROPERTIES)


class Rows(NamedTuple):
    """The whole file. Column order is the tables'."""

    sessions: list[tuple[str, str, int, float | None]]
    subscriptions: list[tuple[str, str, bytes]]
    queue: list[tuple[int, str, float | None, str | None, bytes]]
    inflight: list[tuple[str, bytes]]
    wills: list[tuple[str, int, float | None, bytes]]
    retained: list[tuple[str, float | None, bytes]]


@attrs.define
class _Batch:
    statements: list[tuple[str, tuple[Any, ...]]] = attrs.field(factory=list)
    puts: dict[int, tuple[Any, ...]] = attrs.field(factory=dict)
    deletes: list[tuple[int]] = attrs.field(factory=list)
    retained: dict[str, tuple[str, float | None, bytes] | None] = attrs.field(factory=dict)
    waiting: list[Callable[[], None]] = attrs.field(factory=list)

    def __bool__(self) -> bool:
        return bool(self.statements or self.puts or self.deletes or self.retained or self.waiting)

    def run(self, database: sqlite3.Connection) -> None:
        with database:
            database.execute("BEGIN IMMEDIATE")
            for statement, parameters in self.statements:
                database.execute(statement, parameters)
            if self.puts:
                database.executemany("INSERT INTO queue VALUES (?, ?, ?, ?, ?)", self.puts.values())
            if self.deletes:
                database.executemany("DELETE FROM queue WHERE key = ?", self.deletes)
            for topic, row in self.retained.items():
                if row is None:
                    database.execute("DELETE FROM retained WHERE topic = ?", (topic,))
                else:
                    database.execute("REPLACE INTO retained VALUES (?, ?, ?)", row)


class Store:
    """An open state file. All methods belong to the event loop's thread."""

    def __init__(self, database: sqlite3.Connection, path: str) -> None:
        self._database = database
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._batch = _Batch()
        self._writing = False
        self._wanted = False
        self._work: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._write, name="tesaiot-connect state file")
        self.commits = 0
        self.error: str | None = None
        """What keeps the file from being written at the moment."""

    @classmethod
    async def open(cls, path: str, synchronous: Literal["full", "normal"]) -> tuple[Store, Rows]:
        """Raises ConnectorError for a file that is in use, is none of ours or cannot be read."""
        try:
            database, rows = await asyncio.to_thread(_open, path, synchronous)
        except sqlite3.Error as error:
            fix = next(
                (words for part, words in _FIXES.items() if part in str(error)),
                "check the path and its permissions, or move the file away to start empty",
            )
            raise ConnectorError(f"the state file {path} cannot be opened: {error}", fix=fix) from error
        store = cls(database, path)
        store._thread.start()
        return store, rows

    def execute(self, statement: str, *parameters: Any) -> None:
        """Queue one statement; statements keep their order."""
        self._batch.statements.append((statement, parameters))
        self._soon()

    def put(
        self, key: int, client_id: str, expires_at: float | None, shared: str | None, message: Message
    ) -> None:
        """Queue a row of the queue table; `when_committed` or `commit` starts the writing."""
        row = (key, client_id, expires_at, shared, pack(message))
        self._batch.puts[key] = row
        self._soon()

    def delete(self, key: int) -> None:
        """A row of the queue is not needed any more. One that was not written yet never will be."""
        if self._batch.puts.pop(key, None) is None:
            self._batch.deletes.append((key,))
        self._soon()

    def retain(self, topic: str, expires_at: float | None, message: Message | None) -> None:
        """The topic's retained message, None for none any more. Only the last one before a commit
        is written, so a flood of them costs no memory."""
        self._batch.retained[topic] = None if message is None else (topic, expires_at, pack(message))
        self._soon()

    def when_committed(self, callback: Callable[[], None]) -> None:
        """Call back, on the loop, when everything queued so far is on disk."""
        self._batch.waiting.append(callback)
        if not self._wanted:
            self._wanted = True
            self._loop.call_soon(self._hand_over)

    @property
    def behind(self) -> bool:
        """Whether so much waits to be written that those who cause more should wait, too."""
        return len(self._batch.statements) + len(self._batch.retained) > _BEHIND

    async def commit(self) -> None:
        """Return when everything queued so far is on disk."""
        done = asyncio.Event()
        self.when_committed(done.set)
        await done.wait()

    async def aclose(self) -> None:
        """Write what is left and close. Raises ConnectorError if it could not be written."""
        self._closing.set()
        try:
            while self._batch or self._writing:
                self._wanted = True
                self._hand_over()
                await self._idle.wait()
        finally:
            self._work.put(None)
            if self._timer is not None:
                self._timer.cancel()
        await asyncio.to_thread(self._thread.join)
        if self.error is not None:
            raise ConnectorError(
                f"the state file {self._path} could not be written: {self.error}",
                fix="free some space or mend its permissions; what was acknowledged before is in it",
            )

    def _soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_LAZY, self._due)

    def _due(self) -> None:
        self._timer = None
        self._wanted = bool(self._batch)  # else `when_committed` would not ask any more
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the batch to the writer, between two turns of whoever fills it."""
        if self._wanted and not self._writing and self._batch:
            self._wanted = False
            self._writing = True
            self._idle.clear()
            batch, self._batch = self._batch, _Batch()
            self._work.put(batch)

    def _written(self, batch: _Batch, error: str | None) -> None:
        """The writer is done with a batch, on the loop. With an error: it has given up."""
        self._writing = False
        self._idle.set()
        if error is None:
            self.commits += 1
            for callback in batch.waiting:
                try:
                    callback()
                except Exception:
                    log.exception("what waited for the state file failed")
            self._hand_over()
        else:
            self._batch = _Batch()

    def _write(self) -> None:
        """The writer thread."""
        while (batch := self._work.get()) is not None:
            error = self._run(batch)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._written, batch, error)
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def _run(self, batch: _Batch) -> str | None:
        """Write it, and try for ever unless the store is closing: the error then."""
        while True:
            try:
                batch.run(self._database)
            except Exception as error:  # noqa: BLE001 - whatever it is, nothing was written
                if self.error is None:
                    log.error("the state file %s cannot be written: %s; trying again", self._path, error)
                self.error = str(error) or type(error).__name__
                if self._closing.is_set():
                    return self.error
                self._closing.wait(_RETRY)
                continue
            if self.error is not None:
                log.info("the state file %s is written again", self._path)
                self.error = None
            return None


_FIXES = {
    "locked": "another broker has it open: stop that one, or choose another state_file",
    "full": "free space on its disk",
    "has format": "run the release that wrote it, or move the file away to start empty",
}


def _open(path: str, synchronous: str) -> tuple[sqlite3.Connection, Rows]:
    if not Path(path).parent.is_dir():
        raise sqlite3.OperationalError(f"there is no folder {Path(path).parent}")
    with contextlib.suppress(OSError):  # it is there already, or SQLite will say what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # it holds what is its clients'
    database = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(f"PRAGMA synchronous = {synchronous.upper()}")
        database.execute("BEGIN IMMEDIATE")
        empty = not database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if empty:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {_VERSION}")
        application = database.execute("PRAGMA application_id").fetchone()[0]
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if application != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it is a database of something else")
        if version != _VERSION:
            raise sqlite3.DatabaseError(f"it has format {version}, this release reads {_VERSION}")
        database.execute("DELETE FROM subscription WHERE client_id NOT IN (SELECT client_id FROM session)")
        database.execute("DELETE FROM queue WHERE client_id NOT IN (SELECT client_id FROM session)")
        database.execute("DELETE FROM inflight WHERE client_id NOT IN (SELECT client_id FROM session)")
        database.execute("COMMIT")
        rows = Rows(
            database.execute("SELECT * FROM session").fetchall(),
            database.execute("SELECT * FROM subscription").fetchall(),
            database.execute("SELECT * FROM queue ORDER BY key").fetchall(),
            database.execute("SELECT * FROM inflight").fetchall(),
            database.execute("SELECT * FROM will").fetchall(),
            database.execute("SELECT * FROM retained").fetchall(),
        )
    except BaseException:
        database.close()
        raise
    return database, rows
