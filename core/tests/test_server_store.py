"""The state file: what is committed is read back, and waiting means committed."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import sys
from pathlib import Path

import pytest

from tesaiot_connect.errors import ConnectorError
from tesaiot_connect.message import Message, Properties
from tesaiot_connect.server import store as store_module
from tesaiot_connect.server.store import Rows, Store, pack, unpack

MESSAGE = Message("a/b", b"\x00\xff", 1, True, Properties(user=(("a", "1"), ("a", "2")), message_expiry=9))


async def opened(path: Path) -> tuple[Store, Rows]:
    return await Store.open(str(path), "normal")


def reopened(path: Path) -> Rows:
    async def main() -> Rows:
        store, rows = await opened(path)
        await store.aclose()
        return rows

    return asyncio.run(main())


def test_messages_survive_packing() -> None:
    assert unpack(pack(MESSAGE)) == MESSAGE
    assert unpack(pack(Message("t", b""))) == Message("t", b"")


def test_what_is_committed_is_there_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "state.db"

    async def main() -> None:
        store, rows = await opened(path)
        assert rows.sessions == []
        store.execute("REPLACE INTO session VALUES (?, ?, ?, ?)", "c", "me", 60, None)
        store.put(7, "c", None, None, MESSAGE)
        store.put(8, "nobody", None, None, MESSAGE)
        store.put(9, "c", 12.5, "$share/g/a", MESSAGE)
        await store.commit()
        store.delete(7)
        await store.aclose()

    asyncio.run(main())
    rows = reopened(path)
    assert rows.sessions == [("c", "me", 60, None)]
    assert [row[:4] for row in rows.queue] == [(9, "c", 12.5, "$share/g/a")]
    assert unpack(rows.queue[0][4]) == MESSAGE


@pytest.mark.skipif(sys.platform == "win32", reason="rights are kept in another way there")
def test_a_new_file_is_for_its_owner_alone_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "state.db"

    async def main(mode: int) -> None:
        store, _ = await opened(path)
        store.put(7, "c", None, None, MESSAGE)
        await store.commit()
        modes = {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
        await store.aclose()
        assert modes == {mode}

    asyncio.run(main(0o600))
    path.chmod(0o640)
    asyncio.run(main(0o640))


def test_commit_means_readable_by_another_process(tmp_path: Path) -> None:
    """The file is locked while open, so look at a copy, as a crash would leave it."""
    path = tmp_path / "state.db"

    async def main() -> None:
        store, _ = await opened(path)
        store.execute("REPLACE INTO session VALUES (?, ?, ?, ?)", "c", "", 60, None)
        for key in range(1, 101):
            store.put(key, "c", None, None, MESSAGE)
        await store.commit()
        for name in ("state.db", "state.db-wal"):
            (tmp_path / f"copy-{name}").write_bytes((tmp_path / name).read_bytes())
        await store.aclose()

    asyncio.run(main())
    (tmp_path / "copy-state.db-wal").rename(tmp_path / "copy.db-wal")
    (tmp_path / "copy-state.db").rename(tmp_path / "copy.db")
    database = sqlite3.connect(tmp_path / "copy.db")
    assert database.execute("SELECT count(*) FROM queue").fetchone() == (100,)
    database.close()


def test_a_message_that_is_acknowledged_at_once_is_never_written(tmp_path: Path) -> None:
    async def main() -> None:
        store, _ = await opened(tmp_path / "state.db")
        store.put(1, "c", None, None, MESSAGE)
        store.delete(1)
        assert not store._batch.puts
        assert not store._batch.deletes
        await store.aclose()

    asyncio.run(main())


def test_commits_are_grouped(tmp_path: Path) -> None:
    async def main() -> int:
        store, _ = await opened(tmp_path / "state.db")

        async def one(key: int) -> None:
            store.put(key, "c", None, None, MESSAGE)
            await store.commit()

        await asyncio.gather(*(one(key) for key in range(1, 501)))
        commits = store.commits
        await store.aclose()
        return commits

    assert asyncio.run(main()) < 50


def test_a_file_in_use_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        store, _ = await opened(tmp_path / "state.db")
        try:
            with pytest.raises(ConnectorError, match="another broker has it open"):
                await opened(tmp_path / "state.db")
        finally:
            await store.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough" * 10, None])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "state.db"
    if content is None:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE telemetry (x)")
        database.commit()
        database.close()
    else:
        path.write_bytes(content)
    with pytest.raises(ConnectorError, match=r"cannot be opened.*move the file away"):
        asyncio.run(opened(path))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match="there is no folder"):
        asyncio.run(opened(tmp_path / "none" / "state.db"))


def test_while_the_disk_refuses_nobody_is_told_otherwise(tmp_path: Path) -> None:
    async def main() -> None:
        store, _ = await opened(tmp_path / "state.db")
        limit = store._database.execute("PRAGMA page_count").fetchone()[0]
        store._database.execute(f"PRAGMA max_page_count = {limit}")
        for key in range(1, 20):
            store.put(key, "c", None, None, Message("t", bytes(10_000)))
        commit = asyncio.create_task(store.commit())
        while store.error is None:
            await asyncio.sleep(0.01)
        assert "full" in store.error
        assert not commit.done()
        store._database.execute("PRAGMA max_page_count = 1000000")
        await commit
        assert store.error is None
        await store.aclose()

    asyncio.run(main())


def test_only_the_last_retained_message_of_a_topic_is_written(tmp_path: Path) -> None:
    path = tmp_path / "state.db"

    async def main() -> None:
        store, _ = await opened(path)
        for number in range(1000):
            store.retain("a", None, Message("a", str(number).encode(), retain=True))
        store.retain("b", 5.0, MESSAGE)
        store.retain("b", None, None)
        store.retain("c", 5.0, MESSAGE)
        assert len(store._batch.retained) == 3
        await store.aclose()

    asyncio.run(main())
    rows = {topic: (expires_at, unpack(packed)) for topic, expires_at, packed in reopened(path).retained}
    assert rows == {"a": (None, Message("a", b"999", retain=True)), "c": (5.0, MESSAGE)}


def test_what_one_turn_writes_is_in_one_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that moves from one queue to another is deleted and put: never only one of them."""
    moves: list[tuple[set[int], set[int]]] = []
    run = store_module._Batch.run

    def watched(batch: store_module._Batch, database: sqlite3.Connection) -> None:
        moves.append(({key + 3000 for (key,) in batch.deletes}, set(batch.puts)))
        run(batch, database)

    async def main() -> None:
        store, _ = await opened(tmp_path / "state.db")
        for key in range(3000):
            store.put(key, "c", None, None, MESSAGE)
        await store.commit()
        moves.clear()
        for turn in range(20):
            store.when_committed(lambda: None)
            for key in range(turn * 3000, (turn + 1) * 3000):
                store.delete(key)
            for key in range(turn * 3000, (turn + 1) * 3000):
                store.put(key + 3000, "c", None, None, MESSAGE)
            await store.commit()
        await store.aclose()

    monkeypatch.setattr(store_module._Batch, "run", watched)
    asyncio.run(main())
    assert len(moves) >= 20
    for deleted, put in moves:
        assert deleted == put


def test_what_cannot_be_written_at_all_is_told_and_ends_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        store, _ = await opened(tmp_path / "state.db")
        store.execute("REPLACE INTO session VALUES (?, ?, ?, ?)", "\ud800", "me", 60, None)
        waiting = asyncio.create_task(store.commit())
        async with asyncio.timeout(20):
            while store.error is None:
                await asyncio.sleep(0.001)
        assert not waiting.done()
        with pytest.raises(ConnectorError, match="could not be written"):
            await store.aclose()
        waiting.cancel()

    asyncio.run(main())


def test_a_timer_that_comes_when_all_is_written_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        store, _ = await opened(tmp_path / "state.db")
        store.put(1, "c", None, None, MESSAGE)
        await store.commit()
        assert store._timer is not None
        store._timer.cancel()
        store._due()  # as the timer does a while later
        async with asyncio.timeout(20):
            await store.commit()
        await store.aclose()

    asyncio.run(main())


def test_a_callback_that_fails_takes_no_other_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store, _ = await opened(tmp_path / "state.db")
        store.when_committed(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
        async with asyncio.timeout(20):
            await store.commit()
        await store.aclose()

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text


def test_a_file_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    reopened(path)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConnectorError, match="format 99") as caught:
        reopened(path)
    assert "release" in (caught.value.fix or "")
