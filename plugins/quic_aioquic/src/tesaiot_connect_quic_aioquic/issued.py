"""Which session tickets a server has given out, in SQLite: each is honoured once.

Owns: the file. Rule: a ticket is gone from the file before its early data is accepted, so a replay,
to whichever process and after whichever crash, gets a full handshake (RFC 8446 section 8.1).

Calls belong to the event loop: a call is one small statement, and waits for other processes at most
a quarter of a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from pathlib import Path

from aioquic.tls import SessionTicket

from tesaiot_connect import ConnectorError

from .tickets import pack, unpack, usable

log = logging.getLogger(__name__)

_APPLICATION_ID = 0x7E5A109
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE ticket (id INTEGER PRIMARY KEY, digest BLOB UNIQUE, expires REAL, state BLOB)",
    "CREATE TABLE secret (name TEXT PRIMARY KEY, value BLOB NOT NULL)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)
_TRIM_EVERY = 256
_OPENING = 5.0  # seconds to wait for other processes while opening
_RUNNING = 0.25  # and while the event loop waits
_FIXES = (
    ("locked", "another process keeps it locked: end that one, or choose another path"),
    ("unable to open", "check that its folder exists and that this user may write there"),
    ("readonly", "check the permissions of the file and its folder"),
    ("full", "free some space"),
    ("format", "use the release that wrote it, or move the file away: clients then do full handshakes once"),
    ("", "move the file away: a new one is made, and clients do full handshakes once"),
)


class IssuedTickets:
    """An open file. `path` None keeps all in memory.

    `lifetime`: seconds a ticket is honoured at most. `limit`: tickets that are kept, the oldest go
    first. `scope` names what a session must not cross (ALPN, limits that early data relies on, RFC
    9000 section 7.4.1): a ticket of another scope is not honoured.
    """

    def __init__(
        self, path: Path | None, *, lifetime: float = 86400.0, limit: int = 100_000, scope: str = ""
    ) -> None:
        """Opens or creates the file. Raises ConnectorError, naming it, where it cannot be used."""
        self._path = path
        self._lifetime = lifetime
        self._limit = limit
        self._scope = hashlib.sha256(scope.encode()).digest()
        self._issued = 0
        self._warned = False
        self._closed = False
        try:
            self._database = _connect(path)
        except (sqlite3.Error, OSError) as error:
            text = (error.strerror if isinstance(error, OSError) else None) or str(error)
            fix = next(fix for part, fix in _FIXES if part in text)
            if isinstance(error, OSError):
                fix = "check that its folder exists and that this user may write there"
            raise ConnectorError(f"the ticket file {path} cannot be used: {text}", fix=fix) from error
        try:
            self._reset_key = self._open()
        except sqlite3.Error as error:
            self._database.close()
            fix = next(fix for part, fix in _FIXES if part in str(error))
            raise ConnectorError(f"the ticket file {path} cannot be used: {error}", fix=fix) from error

    def issue(self, ticket: SessionTicket) -> None:
        """Remember a ticket that is being given to a client. aioquic's session_ticket_handler."""
        if self._closed:
            return
        now = time.time()
        expires = min(ticket.not_valid_after.timestamp(), now + self._lifetime)
        try:
            self._database.execute(
                "INSERT INTO ticket (digest, expires, state) VALUES (?, ?, ?)",
                (self._digest(ticket.ticket), expires, pack(ticket)),
            )
            self._issued += 1
            if self._issued % _TRIM_EVERY == 0:
                self._trim(now)
        except sqlite3.Error as error:
            self._warn(error)

    def redeem(self, identity: bytes) -> SessionTicket | None:
        """The ticket, to the first who asks for it; None ever after. aioquic's session_ticket_fetcher."""
        if self._closed:
            return None
        digest = self._digest(identity)
        try:
            row = self._database.execute(
                "SELECT id, state FROM ticket WHERE digest = ?", (digest,)
            ).fetchone()
            if row is None:
                return None
            # a row never changes: whoever deletes it is the one who has it
            gone = self._database.execute(
                "DELETE FROM ticket WHERE id = ? AND digest = ?", (row[0], digest)
            ).rowcount
            if gone != 1:
                return None
            ticket = unpack(row[1])
        except (sqlite3.Error, ValueError) as error:
            self._warn(error)
            return None
        return ticket if usable(ticket, self._lifetime) else None

    def reset_key(self) -> bytes:
        """32 random bytes that stay with the file: for stateless reset tokens (RFC 9000 section 10.3)."""
        return self._reset_key

    def close(self) -> None:
        """Nothing is issued or honoured from now on. May be called again."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(sqlite3.Error):
                self._database.close()

    # ---

    def _open(self) -> bytes:
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in _SCHEMA:
                database.execute(statement)
        if database.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it is a database of something else")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise sqlite3.DatabaseError(f"it has format {version}, this release reads {_VERSION}")
        database.execute("DELETE FROM ticket WHERE expires <= ?", (time.time(),))
        database.execute("INSERT OR IGNORE INTO secret VALUES ('reset', ?)", (os.urandom(32),))
        key: bytes = database.execute("SELECT value FROM secret WHERE name = 'reset'").fetchone()[0]
        database.execute("COMMIT")
        database.execute(f"PRAGMA busy_timeout = {round(_RUNNING * 1000)}")
        return key

    def _digest(self, identity: bytes) -> bytes:
        return hashlib.blake2b(identity, digest_size=16, key=self._scope).digest()

    def _trim(self, now: float) -> None:
        """The oldest go: those beyond the limit, and of the next few those that have expired."""
        self._database.execute(
            "DELETE FROM ticket WHERE id <= (SELECT max(id) FROM ticket) - ?", (self._limit,)
        )
        self._database.execute(
            "DELETE FROM ticket WHERE expires <= ? AND id IN (SELECT id FROM ticket ORDER BY id LIMIT ?)",
            (now, 2 * _TRIM_EVERY),
        )

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "quic: the ticket file %s fails: %s; clients connect with full handshakes",
                self._path,
                error,
            )


def _connect(path: Path | None) -> sqlite3.Connection:
    if path is None:
        return sqlite3.connect(":memory:", isolation_level=None)
    # SQLite gives the -wal and -shm files the mode of the file, so it is set first. A file that
    # exists is not opened here: closing it would drop the locks that this process has on it.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if path.is_file():
            with contextlib.suppress(PermissionError):  # another user's, and ours to share
                path.chmod(0o600)
    database = sqlite3.connect(path, timeout=_OPENING, isolation_level=None)
    try:
        _write_ahead(database)
        database.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        database.close()
        raise
    return database


def _write_ahead(database: sqlite3.Connection) -> None:
    """SQLite does not wait for others at every point of this switch, so we do."""
    deadline = time.monotonic() + _OPENING
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
        else:
            return
