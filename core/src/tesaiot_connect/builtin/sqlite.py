"""Records as rows of an SQLite table.

Owns: the table's schema, which grows with the records, and the transaction. Rule: one
transaction a batch, in a thread of its own; a batch is in the file as a whole or not at all.

Columns: `time` (seconds since the epoch), `topic`, one for each topic field, and one for each
key of the payload where that is an object; a payload that is none goes to `value`. Nested values
are JSON text. Keys that cannot have a column of their own go to `extra`, a JSON object: beyond
`max_columns`, or longer than 200 characters, or equal to another column but for upper and lower
case (SQLite does not distinguish them), or named like a topic field.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import msgspec

from ..errors import ConnectorError, PartialDelivery, PayloadError
from ..message import Record
from ..protocols import Duration, Writer

_encode = msgspec.json.Encoder().encode
_FIXED = ("time", "topic")
_OWN = (*_FIXED, "extra")
"""Columns of every table, which no payload key may fill."""
_PLAIN = frozenset({float, int, str, bool, type(None)})
"""Types SQLite stores as they are, with few exceptions that it reports."""
_PLANS = 1000
_PLAN_KEYS = 100_000
"""How many shapes of records are remembered, and how many keys these have together at most."""
_NAME = 200
"""Characters of a key that becomes a column."""
_MIN, _MAX = -(2**63), 2**63 - 1


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _table_name(_instance: Any, _field: Any, name: str) -> None:
    if not name or "\0" in name or name.lower().startswith("sqlite_"):
        raise ValueError(f"{name!r} cannot be the name of a table")


@attrs.frozen(kw_only=True)
class SqliteSink:
    """Stores records in a table that is made, and widened, as they come."""

    reads: ClassVar[Literal["records"]] = "records"

    path: Path = attrs.field(metadata=_help("The database file; made if missing. Its folder must exist."))
    table: str = attrs.field(
        default="telemetry", validator=_table_name, metadata=_help("The table; made if missing.")
    )
    synchronous: Literal["normal", "full"] = attrs.field(
        default="normal",
        metadata=_help(
            '"normal": a crash of the process loses nothing, a power cut may lose the last transactions. '
            '"full": a power cut loses nothing either; slower.'
        ),
    )
    indexes: tuple[str, ...] = attrs.field(
        default=(),
        metadata=_help(
            'Indexes to keep, each a list of columns: ["time", "device_id, time"]. One costs more than '
            "the insert itself."
        ),
    )
    max_columns: int = attrs.field(
        default=200,
        validator=[attrs.validators.ge(4), attrs.validators.le(1900)],
        metadata=_help("Further keys go to the column extra, as JSON."),
    )
    busy_timeout: Duration = attrs.field(
        default=Duration(5.0),
        validator=attrs.validators.ge(Duration(0)),
        metadata=_help("How long to wait for another writer before the write counts as failed."),
    )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="tesaiot-sqlite")
        opening = thread.submit(_Table, self)
        try:
            try:
                table = await asyncio.wrap_future(opening)
            except asyncio.CancelledError:
                thread.submit(_close, opening)  # the thread may be at it still
                raise
            try:
                yield _SqliteWriter(table, thread)
            finally:
                await asyncio.shield(loop.run_in_executor(thread, table.close))
        finally:
            thread.shutdown(wait=False)


def _close(opening: Future[_Table]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _SqliteWriter:
    def __init__(self, table: _Table, thread: ThreadPoolExecutor) -> None:
        self._table = table
        self._thread = thread

    async def write(self, batch: Sequence[Record], /) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._table.insert, batch)


_Shape = tuple[tuple[Any, ...] | None, tuple[str, ...]]
"""The keys of a payload (None where it is no object) and the topic fields of a record."""


def _shape(record: Record) -> _Shape:
    value = record.value
    return tuple(value) if type(value) is dict else None, tuple(record.route.fields)


@attrs.frozen(eq=False)
class _Plan:
    """How records of one shape become rows: `direct`, cell by cell, or sorted into `columns`."""

    sql: str
    columns: tuple[str, ...]
    direct: bool


class _Table:
    """The table, for one thread. After an error it is closed and opened again."""

    def __init__(self, recipe: SqliteSink) -> None:
        self._recipe = recipe
        self._name = _quoted(recipe.table)
        self._columns: dict[str, None] = {}
        self._folded: set[str] = set()
        self._plans: dict[_Shape, _Plan] = {}
        self._plan_keys = 0
        self._indexed = False
        try:
            self._db = sqlite3.connect(recipe.path, timeout=recipe.busy_timeout, isolation_level=None)
        except sqlite3.Error as error:
            raise self._explained(error) from error
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {recipe.synchronous}")
            self._learn()
            self._inode = recipe.path.stat().st_ino
        except (sqlite3.Error, OSError) as error:
            self._db.close()
            raise self._explained(error) from error

    def close(self) -> None:
        self._db.close()

    def insert(self, records: Sequence[Record]) -> None:
        self._check_file()
        try:
            try:
                failures = self._insert(records, careful=False)
            except (OverflowError, UnicodeEncodeError):
                self._plans.clear()
                self._indexed = False  # what was made was rolled back
                failures = self._insert(records, careful=True)
        except sqlite3.Error as error:
            raise self._explained(error) from error
        if failures:
            raise PartialDelivery(failures)

    def _check_file(self) -> None:
        """SQLite would go on writing to a file that was deleted or moved away, and nobody would see it."""
        try:
            if self._recipe.path.stat().st_ino == self._inode:
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._explained(error) from error
        raise ConnectorError(
            f"the SQLite file {self._recipe.path} was deleted or replaced while it was in use",
            fix="a new one is made, or the one that is there now is used: stop the pipeline before moving it",
        )

    def _insert(self, records: Sequence[Record], *, careful: bool) -> dict[int, BaseException]:
        """One transaction. `careful` looks at every cell, where a whole row looked harmless."""
        shapes = [_shape(record) for record in records]
        failures: dict[int, BaseException] = {}
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._widen(dict.fromkeys(shapes))
            for plan, rows in self._rows(records, shapes, failures, careful):
                self._db.executemany(plan.sql, rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return failures

    def _rows(
        self,
        records: Sequence[Record],
        shapes: Sequence[_Shape],
        failures: dict[int, BaseException],
        careful: bool,
    ) -> list[tuple[_Plan, list[tuple[Any, ...]]]]:
        """Rows in order, in runs that one statement inserts."""
        plain = frozenset[type]() if careful else _PLAIN
        plans = self._plans
        runs: list[tuple[_Plan, list[tuple[Any, ...]]]] = []
        current: _Plan | None = None
        rows: list[tuple[Any, ...]] = []
        for index, (record, shape) in enumerate(zip(records, shapes, strict=True)):
            plan = plans[shape]
            route, value = record.route, record.value
            try:
                if plan.direct:
                    row = (record.time, route.topic, *route.fields.values(), *value.values())
                else:
                    cells = self._placed(value, route.fields)
                    row = (record.time, route.topic, *map(cells.get, plan.columns))
                if not plain.issuperset(map(type, row)):
                    row = tuple(map(_cell, row))
            except Exception as error:  # noqa: BLE001 - a value of anybody's
                wrong = PayloadError(
                    f"{repr(value)[:200]} of topic {route.topic!r} cannot be stored: {error}"
                )
                wrong.__cause__ = error
                failures[index] = wrong
                continue
            if plan is not current:
                current, rows = plan, []
                runs.append((plan, rows))
            rows.append(row)
        return runs

    def _placed(self, value: Any, fields: Mapping[str, str]) -> dict[str, Any]:
        """Cells by column; what has no column of its own is in `extra`."""
        cells: dict[str, Any] = {}
        extra: dict[Any, Any] = {}
        for key, item in value.items() if type(value) is dict else (("value", value),):
            own = key in self._columns and key not in _OWN and key not in fields
            (cells if own else extra)[key] = item
        for key, item in fields.items():
            if key in self._columns:
                cells[key] = item
            else:
                extra.setdefault(key, item)
        if extra:
            cells["extra"] = extra
        return cells

    def _widen(self, shapes: Iterable[_Shape]) -> None:
        """Make the table if it is missing, columns for what is new, and a plan for each shape."""
        new = [shape for shape in shapes if shape not in self._plans]
        if not new:
            return
        wanted: dict[Any, None] = {}
        for names, fields in new:
            wanted.update(dict.fromkeys(fields))
            wanted.update(dict.fromkeys(("value",) if names is None else names))
        self._learn()  # another writer may have changed it
        if not self._columns:
            self._folded = set(_OWN)
            chosen = self._distinct(wanted, self._recipe.max_columns - len(_OWN))
            columns = ", ".join(map(_declared, (*_FIXED, *chosen, "extra")))
            self._db.execute(f"CREATE TABLE {self._name} ({columns})")
        else:
            for name in self._distinct(wanted, self._recipe.max_columns - len(self._columns)):
                self._add(name)
        self._index()
        self._learn()
        if len(self._plans) + len(new) > _PLANS or self._plan_keys > _PLAN_KEYS:
            self._plans.clear()
            self._plan_keys = 0
        for shape in shapes:
            if shape not in self._plans:
                self._plans[shape] = self._plan(*shape)
                self._plan_keys += len(shape[0] or ()) + len(shape[1])

    def _plan(self, names: tuple[Any, ...] | None, fields: tuple[str, ...]) -> _Plan:
        cells = (*fields, *(names or ()))
        direct = (
            names is not None
            and all(name in self._columns and name not in _OWN for name in cells)
            and len(set(cells)) == len(cells)
        )
        if not direct:
            cells = tuple(name for name in self._columns if name not in _FIXED)
        columns = ",".join(map(_quoted, (*_FIXED, *cells)))
        places = ",".join("?" * (len(_FIXED) + len(cells)))
        return _Plan(f"INSERT INTO {self._name} ({columns}) VALUES ({places})", cells, direct)  # noqa: S608

    def _distinct(self, names: Iterable[Any], room: int) -> list[str]:
        """Those of the names that can become new columns."""
        chosen: list[str] = []
        folded = set(self._folded)
        for name in names:
            if len(chosen) >= room:
                break
            if _is_name(name) and name.lower() not in folded:
                folded.add(name.lower())
                chosen.append(name)
        return chosen

    def _add(self, name: str) -> None:
        self._db.execute(f"ALTER TABLE {self._name} ADD COLUMN {_declared(name)}")

    def _index(self) -> None:
        if self._indexed:
            return
        for index in self._recipe.indexes:
            names = [name.strip() for name in index.split(",")]
            for name in self._distinct(names, len(names)):
                self._add(name)
            self._learn()
            title = _quoted("_".join((self._recipe.table, *names)))
            columns = ", ".join(map(_quoted, names))
            self._db.execute(f"CREATE INDEX IF NOT EXISTS {title} ON {self._name} ({columns})")
        self._indexed = True

    def _learn(self) -> None:
        """What the file says; `time`, `topic` and `extra` are added to a table that lacks them."""
        names = self._names()
        if names:
            for name in _OWN:
                if name not in map(str.lower, names):
                    self._add(name)
            names = self._names()
        self._folded = set(map(str.lower, names))
        self._columns = {name.lower() if name.lower() in _OWN else name: None for name in names}

    def _names(self) -> list[str]:
        return [row[1] for row in self._db.execute(f"PRAGMA table_info({self._name})")]

    def _explained(self, error: sqlite3.Error | OSError) -> ConnectorError:
        text = str(error)
        path = self._recipe.path
        unreachable = f"see that {path.parent} exists and this user may write there"
        fixes = {
            "locked": "another program is writing to it: the write is tried again; see busy_timeout",
            "full": "free space on the disk: the write is tried again",
            "not a database": "it is another kind of file: choose a path of its own for the database",
            "unable to open": "name a file, not a folder" if path.is_dir() else unreachable,
            "readonly": "let this user write to the file and its folder",
            "malformed": "the file is damaged: move it away, a new one is made",
            "disk I/O": "see that the disk works and has room",
        }
        fix = next((words for part, words in fixes.items() if part in text), "")
        return ConnectorError(f"the SQLite file {path} cannot be written: {text}", fix=fix)


def _is_name(key: Any) -> bool:
    """Whether a key can name a column; half of a surrogate pair is no text."""
    if not isinstance(key, str) or not key or len(key) > _NAME or "\0" in key:
        return False
    return key.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in key)


def _cell(value: Any) -> Any:
    """A value as SQLite stores it. Whole numbers beyond 64 bits become text with all digits."""
    kind = type(value)
    if kind is int:
        return value if _MIN <= value <= _MAX else str(value)
    if kind in _PLAIN:
        if kind is str:
            value.encode()  # raises for what is no text: half of a surrogate pair
        return value
    if kind is bytes:
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    text = _encode(value).decode()
    return msgspec.json.decode(text) if text.startswith('"') else text


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _declared(name: str) -> str:
    kinds = {"time": " REAL", "topic": " TEXT", "extra": " TEXT"}
    return _quoted(name) + kinds.get(name, "")
