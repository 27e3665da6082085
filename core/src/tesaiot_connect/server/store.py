"""The state file: sessions, queues, wills and retained messages in SQLite.

Owns: the file, its one writer thread and group commit. Rule: while one commit runs the next
batch gathers; whoever waits hears of it when everything written before is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
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
        self._lock = threading.Condition()
        self._wake = False
        self._closing = False
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
            fix = (
                "another broker has it open: stop that one, or choose another state_file"
                if "locked" in str(error)
                else "check the path and its permissions, or move the file away to start empty"
            )
            raise ConnectorError(f"the state file {path} cannot be opened: {error}", fix=fix) from error
        store = cls(database, path)
        store._thread.start()
        return store, rows

    def execute(self, statement: str, *parameters: Any) -> None:
        """Queue one statement; statements keep their order."""
        with self._lock:
            self._batch.statements.append((statement, parameters))
        self._soon()

    def put(
        self, key: int, client_id: str, expires_at: float | None, shared: str | None, message: Message
    ) -> None:
        """Queue a row of the queue table; `when_committed` or `commit` starts the writing."""
        row = (key, client_id, expires_at, shared, pack(message))
        with self._lock:
            self._batch.puts[key] = row
        self._soon()

    def delete(self, key: int) -> None:
        """A row of the queue is not needed any more. One that was not written yet never will be."""
        with self._lock:
            if self._batch.puts.pop(key, None) is None:
                self._batch.deletes.append((key,))
        self._soon()

    def retain(self, topic: str, expires_at: float | None, message: Message | None) -> None:
        """The topic's retained message, None for none any more. Only the last one before a commit
        is written, so a flood of them costs no memory."""
        with self._lock:
            self._batch.retained[topic] = None if message is None else (topic, expires_at, pack(message))
        self._soon()

    def when_committed(self, callback: Callable[[], None]) -> None:
        """Call back, on the loop, when everything queued so far is on disk."""
        with self._lock:
            self._batch.waiting.append(callback)
            self._wake = True
            if not self._writing:
                self._lock.notify()

    async def commit(self) -> None:
        """Return when everything queued so far is on disk."""
        done = asyncio.Event()
        self.when_committed(done.set)
        await done.wait()

    async def aclose(self) -> None:
        """Write what is left and close. Raises ConnectorError if it could not be written."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._closing = True
            self._lock.notify()
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
        with self._lock:
            self._wake = True
            self._lock.notify()

    def _write(self) -> None:
        """The writer thread."""
        while True:
            with self._lock:
                self._writing = False
                while not (self._wake or self._closing):
                    self._lock.wait()
                batch, self._batch = self._batch, _Batch()
                self._wake = False
                self._writing = True
                closing = self._closing
            if batch and not self._run(batch):
                break
            if closing and not self._batch:
                break
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def _run(self, batch: _Batch) -> bool:
        """Whether the batch was written; tried for ever unless the store is closing."""
        while True:
            try:
                batch.run(self._database)
            except sqlite3.Error as error:
                if self.error is None:
                    log.error("the state file %s cannot be written: %s; trying again", self._path, error)
                self.error = str(error)
                with self._lock:
                    if self._closing:
                        return False
                    self._lock.wait_for(lambda: self._closing, timeout=_RETRY)
                continue
            if self.error is not None:
                log.info("the state file %s is written again", self._path)
                self.error = None
            self.commits += 1
            if batch.waiting:
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(_call, batch.waiting)
            return True


def _call(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()


def _open(path: str, synchronous: str) -> tuple[sqlite3.Connection, Rows]:
    if not Path(path).parent.is_dir():
        raise sqlite3.OperationalError(f"there is no folder {Path(path).parent}")
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
