"""Records in real SQLite files."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tesaiot_connect.builtin import SqliteSink, sqlite as sqlite_module
from tesaiot_connect.errors import ConnectorError, PartialDelivery, PayloadError
from tesaiot_connect.message import Message, Record, Route
from tesaiot_connect.protocols import Duration, Sink


def record(value: Any, fields: dict[str, str] | None = None, topic: str = "t", time: float = 1.5) -> Record:
    return Record(Route(topic, fields or {}), time, value, Message(topic, b""))


def within_30_s(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 30))


def write(sink: SqliteSink, *batches: Sequence[Record]) -> None:
    async def main() -> None:
        async with sink.open() as writer:
            for batch in batches:
                await writer.write(batch)

    within_30_s(main)


def query(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def columns(path: Path, table: str = "telemetry") -> list[str]:
    return [row[1] for row in query(path, f'PRAGMA table_info("{table}")')]


def rows(path: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM telemetry ORDER BY rowid")]


def test_the_table_is_made_from_the_records(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    value = {"value": 25.5, "unit": "celsius", "tags": [1, {"a": None}], "ok": True, "none": None, "count": 3}
    write(SqliteSink(path=path), [record(value, {"device_id": "d1"}, "device/d1")])
    assert columns(path) == ["time", "topic", "device_id", *value, "extra"]
    assert rows(path) == [
        {
            "time": 1.5, "topic": "device/d1", "device_id": "d1", "value": 25.5, "unit": "celsius",
            "tags": '[1,{"a":null}]', "ok": 1, "none": None, "count": 3, "extra": None,
        }
    ]  # fmt: skip


def test_values_that_are_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    values = [1, "text", None, [1], b"bytes", b"\xff", 1.5, datetime(2025, 1, 2, tzinfo=UTC)]
    write(SqliteSink(path=path), [record(value) for value in values])
    assert [row["value"] for row in rows(path)] == [
        1, "text", None, "[1]", "bytes", b"\xff", 1.5, "2025-01-02T00:00:00Z",
    ]  # fmt: skip


def test_new_keys_become_columns_also_in_a_later_run(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({"a": 1}), record({"a": 2, "b": 3})], [record({"c": 4}, {"f": "x"})])
    write(SqliteSink(path=path), [record({"d": 5})])
    assert columns(path) == ["time", "topic", "a", "b", "extra", "f", "c", "d"]
    assert [(row["a"], row["b"], row["c"], row["d"], row["f"]) for row in rows(path)] == [
        (1, None, None, None, None), (2, 3, None, None, None), (None, None, 4, None, "x"),
        (None, None, None, 5, None),
    ]  # fmt: skip


def test_keys_without_a_column_of_their_own_go_to_extra(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({"temp": 1})])
    write(
        SqliteSink(path=path),
        [
            record({"Temp": 2, "temp": 3}),
            record({"topic": "mine", "TIME": 9, "extra": 1, "": 0, "a\0b": 1}),
            record({"device_id": "other"}, {"device_id": "d1"}),
            record({7: "seven"}),
        ],
    )
    found = rows(path)
    assert (found[1]["temp"], found[1]["extra"]) == (3, '{"Temp":2}')
    assert found[2]["topic"] == "t"
    assert found[2]["extra"] == '{"topic":"mine","TIME":9,"extra":1,"":0,"a\\u0000b":1}'
    assert (found[3]["device_id"], found[3]["extra"]) == ("d1", '{"device_id":"other"}')
    assert found[4]["extra"] == '{"7":"seven"}'


def test_a_topic_field_never_gets_lost(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({"Device": 1})])
    write(SqliteSink(path=path), [record({"Device": 2}, {"device": "d1"})])
    assert (rows(path)[1]["Device"], rows(path)[1]["extra"]) == (2, '{"device":"d1"}')


def test_columns_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    batches = [[record({f"k{n}": n})] for n in range(10)]
    write(SqliteSink(path=path, max_columns=6), *batches, [record({f"z{n}": n for n in range(5000)})])
    assert len(columns(path)) == 6
    found = rows(path)
    assert (found[2]["k2"], found[3]["extra"], found[9]["extra"]) == (2, '{"k3":3}', '{"k9":9}')
    assert found[10]["extra"].startswith('{"z0":0,')


def test_names_are_quoted(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    odd = ['a"b', "select", "x y", "é", "); DROP TABLE telemetry; --"]
    write(SqliteSink(path=path, table='odd "name"'), [record(dict.fromkeys(odd, 1))])
    assert columns(path, 'odd ""name""') == ["time", "topic", *odd, "extra"]
    for name in ("", "sqlite_x", "a\0"):
        with pytest.raises(ValueError, match="cannot be the name"):
            SqliteSink(path=path, table=name)


@pytest.mark.parametrize(
    "key",
    ['x"); DROP TABLE telemetry; --', "a'b", "`q`", "[z]", "select", "rowid", "?", ":n", "%s", "\u200b", " "],
)
def test_no_key_reaches_into_the_statement(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({"a": 1}), record({key: "v", key + '"': 2}, {key[::-1] + "f": "w"})])
    assert rows(path)[1][key] == "v"
    assert rows(path)[1][key + '"'] == 2
    assert rows(path)[1][key[::-1] + "f"] == "w"


@pytest.mark.parametrize("key", ["k" * 201, "k" * 2_000_000, "nul\0", ""])
def test_keys_that_cannot_name_a_column_go_to_extra(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({key: 1, "a": 2})])
    assert columns(path) == ["time", "topic", "a", "extra"]
    assert json.loads(rows(path)[0]["extra"]) == {key: 1}


def test_a_key_that_is_no_text_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with pytest.raises(PartialDelivery) as caught:
        write(SqliteSink(path=path), [record({"a": 1}), record({"\ud800": 1}), record({"a": 3})])
    assert list(caught.value.failures) == [1]
    assert isinstance(caught.value.failures[1], PayloadError)
    assert [row["a"] for row in rows(path)] == [1, 3]


def test_shapes_that_never_repeat_cannot_fill_the_memory(tmp_path: Path) -> None:
    async def main() -> int:
        most = 0
        async with SqliteSink(path=tmp_path / "x.db").open() as writer:
            for start in range(30):
                await writer.write([record({f"{start}k{n}": 1 for n in range(20_000)})])
                plans = writer._table._plans  # type: ignore[attr-defined]
                most = max(most, sum(len(names or ()) for names, _ in plans))
        return most

    assert within_30_s(main) <= 140_000


def test_indexes_are_made_although_the_first_batch_had_to_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path, indexes=("time",)), [record({"a": 2**70})], [record({"a": 1})])
    assert len(query(path, "SELECT * FROM sqlite_schema WHERE type = 'index'")) == 1


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_goes_away_is_not_written_on(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.db"

    async def main() -> None:
        async with SqliteSink(path=path).open() as writer:
            await writer.write([record({"a": 1})])
            path.rename(tmp_path / "moved.db")
            if how == "replaced":
                sqlite3.connect(path).close()
                path.touch()
            with pytest.raises(ConnectorError, match="deleted or replaced"):
                await writer.write([record({"a": 2})])

    within_30_s(main)
    write(SqliteSink(path=path), [record({"a": 2})])  # what the pipeline does then
    assert [row["a"] for row in rows(path)] == [2]


def test_large_whole_numbers_keep_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    big = 12345678901234567890123
    write(SqliteSink(path=path), [record({"n": big}), record({"n": 2**63 - 1}), record({"n": -(2**63) - 1})])
    assert [row["n"] for row in rows(path)] == [str(big), 2**63 - 1, str(-(2**63) - 1)]


def test_a_value_that_cannot_be_stored_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    batch = [record({"a": 1}), record({"a": object()}), record({"a": "\ud800"}), record({"a": 4})]
    with pytest.raises(PartialDelivery) as caught:
        write(SqliteSink(path=path), batch)
    assert sorted(caught.value.failures) == [1, 2]
    assert all(isinstance(error, PayloadError) for error in caught.value.failures.values())
    assert [row["a"] for row in rows(path)] == [1, 4]


def test_indexes_are_made_once(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    sink = SqliteSink(path=path, indexes=("time", "device_id, time", "later"))
    write(sink, [record({"a": 1}, {"device_id": "d"})], [record({"a": 2})])
    write(sink, [record({"later": 3})])
    names = [row[1] for row in query(path, "PRAGMA index_list(telemetry)")]
    assert sorted(names) == ["telemetry_device_id_time", "telemetry_later", "telemetry_time"]
    assert len(rows(path)) == 3


def test_a_table_of_somebody_else_is_widened(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE telemetry (id INTEGER PRIMARY KEY, Time REAL, value)")
        db.commit()
    write(SqliteSink(path=path), [record({"value": 1})])
    assert rows(path) == [{"id": 1, "Time": 1.5, "value": 1, "topic": "t", "extra": None}]


def test_a_batch_is_stored_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({"a": 1})])
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "CREATE TRIGGER no BEFORE INSERT ON telemetry WHEN NEW.a = 3 "
            "BEGIN SELECT RAISE(ABORT, 'three'); END"
        )
        db.commit()
    with pytest.raises(ConnectorError, match="three"):
        write(SqliteSink(path=path), [record({"a": 2, "new": 1}), record({"a": 3})])
    assert [row["a"] for row in rows(path)] == [1]
    assert "new" not in columns(path)


def test_another_writer_makes_it_wait_or_fail_and_teaches(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({"a": 1})])

    async def main() -> None:
        async with SqliteSink(path=path, busy_timeout=Duration(0.01)).open() as writer:
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(ConnectorError, match="another program is writing"):
                    await writer.write([record({"a": 2})])
                other.execute("COMMIT")
            await writer.write([record({"a": 3})])

    within_30_s(main)
    assert [row["a"] for row in rows(path)] == [1, 3]


def test_an_open_that_is_cancelled_leaves_no_connection_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go, closed = threading.Event(), threading.Event(), threading.Event()

    class Slow(sqlite_module._Table):
        def __init__(self, recipe: SqliteSink) -> None:
            entered.set()
            assert go.wait(60)
            super().__init__(recipe)

        def close(self) -> None:
            super().close()
            closed.set()

    monkeypatch.setattr(sqlite_module, "_Table", Slow)

    async def main() -> None:
        opening = asyncio.create_task(SqliteSink(path=tmp_path / "x.db").open().__aenter__())
        assert await asyncio.to_thread(entered.wait, 60)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        go.set()
        assert await asyncio.to_thread(closed.wait, 20)

    asyncio.run(main())


def test_two_sinks_widen_one_table_together(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    sink = SqliteSink(path=path, busy_timeout=Duration(60))

    async def main() -> None:
        async with sink.open() as one, sink.open() as two:
            for number in range(20):
                await asyncio.gather(
                    one.write([record({f"a{number}": 1, f"b{number}": 1})]),
                    two.write([record({f"b{number}": 2, f"a{number}": 2})]),
                )

    within_30_s(main)
    assert len(rows(path)) == 40
    assert len(columns(path)) == 43


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"this is no database at all" * 100), "another kind of file"),
        (lambda path: path.mkdir(), "not a folder"),
    ],
)
def test_what_is_no_database_is_explained(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    path = tmp_path / "x.db"
    make(path)
    with pytest.raises(ConnectorError, match=words):
        write(SqliteSink(path=path), [record({"a": 1})])


def test_a_full_database_is_explained_and_recovers(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    write(SqliteSink(path=path), [record({"a": "x"})])

    async def main() -> None:
        async with SqliteSink(path=path).open() as writer:
            table = writer._table  # type: ignore[attr-defined]
            thread = writer._thread  # type: ignore[attr-defined]

            def limit(pages: int) -> None:
                table._db.execute(f"PRAGMA max_page_count = {pages}")

            await asyncio.wrap_future(thread.submit(limit, 1))
            with pytest.raises(ConnectorError, match="free space"):
                await writer.write([record({"a": "x" * 100_000})])
            await asyncio.wrap_future(thread.submit(limit, 100_000))
            await writer.write([record({"a": "y"})])

    within_30_s(main)
    assert [row["a"] for row in rows(path)] == ["x", "y"]


@pytest.mark.parametrize(("mode", "number"), [("normal", 1), ("full", 2)])
def test_the_journal_is_wal_and_the_mode_as_asked(tmp_path: Path, mode: Any, number: int) -> None:
    async def main() -> None:
        async with SqliteSink(path=tmp_path / "x.db", synchronous=mode).open() as writer:
            table = writer._table  # type: ignore[attr-defined]
            thread = writer._thread  # type: ignore[attr-defined]

            def ask(pragma: str) -> Any:
                return table._db.execute(f"PRAGMA {pragma}").fetchone()[0]

            assert await asyncio.wrap_future(thread.submit(ask, "journal_mode")) == "wal"
            assert await asyncio.wrap_future(thread.submit(ask, "synchronous")) == number

    within_30_s(main)


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    assert isinstance(SqliteSink(path=tmp_path / "x.db"), Sink)
