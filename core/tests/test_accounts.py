"""Files of accounts: read again when they change, rewritten as one step, and the dates in them."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from tesaiot_connect.accounts import AccountFile, check_account_name, file_stamp, format_date, parse_date
from tesaiot_connect.errors import ConnectorError

posix = pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")


def parse(line: str) -> tuple[str, str]:
    name, colon, rest = line.partition(":")
    if not colon:
        raise ValueError("it has no colon")
    return name, rest


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def accounts(path: Path, clock: Clock | None = None) -> AccountFile[str]:
    return AccountFile(path, parse, what="account file", fix="make it", clock=clock or Clock())


def test_it_is_read_again_when_it_changes_but_not_too_often(tmp_path: Path) -> None:
    file, clock = tmp_path / "f", Clock()
    file.write_text("# who\n\na:1\n  # b:2\n")
    live = accounts(file, clock)
    assert live.current() == {"a": "1"}
    file.write_text("a:1\nb:2\n")
    assert live.current() == {"a": "1"}
    clock.now = 1.0
    assert live.current() == {"a": "1", "b": "2"}
    assert live.current() is live.current()


def test_a_damaged_change_keeps_the_accounts_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "f", Clock()
    file.write_text("a:1\n")
    live = accounts(file, clock)
    live.current()
    damaged: tuple[tuple[bytes | None, str], ...] = (
        (b"a:1\nnonsense\n", "damaged in line 2: it has no colon"),
        (b"a:1\nb:2\na:3\n", "damaged in line 3: it is of the same account as line 1"),
        (b"b:1\n\xff:2\n", "damaged in line 2: it is not text in UTF-8"),
        (None, "does not exist"),
    )
    for text, said in damaged:
        caplog.clear()
        if text is None:
            file.unlink()
        else:
            file.write_bytes(text)
        for _ in range(3):
            clock.now += 1
            assert live.current() == {"a": "1"}
        (record,) = caplog.records
        assert said in record.getMessage()
        assert str(file) in record.getMessage()
    file.write_text("")
    clock.now += 1
    assert live.current() == {}, "an empty file is a file without accounts"


def test_at_first_it_must_be_right(tmp_path: Path) -> None:
    file = tmp_path / "f"
    with pytest.raises(ConnectorError, match=r"the account file .*f does not exist\. make it"):
        accounts(file).current()
    file.write_text("a:1\nnonsense\n")
    with pytest.raises(ConnectorError, match=r"damaged in line 2.*correct the line"):
        accounts(file).current()
    with pytest.raises(ConnectorError, match="cannot be read"):
        accounts(tmp_path).current()


def test_rewriting_touches_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"# first\r\na:1\r\n\nb:2 \n# last")
    seen: list[Mapping[str, str]] = []

    def change(found: Mapping[str, str]) -> Mapping[str, str | None]:
        seen.append(found)
        return {"a": None, "b": "b:3", "c": "c:4", "d": None}

    accounts(file).rewrite(change)
    assert seen == [{"a": "1", "b": "2 "}]
    assert file.read_bytes() == b"# first\n\nb:3\n# last\nc:4\n"
    assert {one.name for one in tmp_path.iterdir()} == {"f", "f.lock"}


def test_a_rewrite_that_fails_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("a:1\n")

    def change(found: Mapping[str, str]) -> Mapping[str, str]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        accounts(file).rewrite(change)
    with pytest.raises(ConnectorError, match="cannot be written"):
        accounts(tmp_path / "nowhere" / "f").rewrite(lambda found: {})
    file.write_text("nonsense\n")
    with pytest.raises(ConnectorError, match="damaged in line 1"):
        accounts(file).rewrite(lambda found: {"a": "a:2"})
    assert file.read_text() == "nonsense\n"
    assert {one.name for one in tmp_path.iterdir()} == {"f", "f.lock"}


def test_a_trouble_that_passes_does_not_keep_who_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "f", Clock()
    file.write_text("a:1\nb:2\n")
    live = accounts(file, clock)
    assert set(live.current()) == {"a", "b"}
    file.write_text("a:1\n")
    with monkeypatch.context() as patched:

        def no_files_left(_path: Path) -> bytes:
            raise OSError(errno.EMFILE, "Too many open files")

        patched.setattr(Path, "read_bytes", no_files_left)
        for _ in range(3):
            clock.now += 1.0
            assert set(live.current()) == {"a", "b"}
    assert len(caplog.records) == 1
    clock.now += 1.0
    assert set(live.current()) == {"a"}


@posix
def test_a_change_that_hides_its_time_and_size_is_noticed(tmp_path: Path) -> None:
    file, clock = tmp_path / "f", Clock()
    file.write_text("a:1\n")
    live = accounts(file, clock)
    live.current()
    before = file.stat()
    while file_stamp(file) == file_stamp_of(before):  # the clock of the file system is coarse
        with file.open("r+b") as opened:
            opened.write(b"b:1\n")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now = 1.0
    assert live.current() == {"b": "1"}


def file_stamp_of(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


@posix
def test_a_file_that_would_have_another_owner_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    file.write_text("a:1\n")
    real = Path.stat

    def of_somebody_else(path: Path, **how: bool) -> os.stat_result:
        found = list(real(path, **how))
        if path == file:
            found[stat.ST_UID] += 1
        return os.stat_result(found)

    def forbidden(*_: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "stat", of_somebody_else)
    monkeypatch.setattr(os, "fchown", forbidden)
    with pytest.raises(ConnectorError, match="you are not its owner"):
        accounts(file).rewrite(lambda found: {"a": "a:2"})
    assert file.read_text() == "a:1\n"
    assert {one.name for one in tmp_path.iterdir()} == {"f", "f.lock"}


@posix
def test_who_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "f"
    accounts(file).rewrite(lambda found: {"a": "a:1"})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "f.lock").stat().st_mode) == 0o600
    file.chmod(0o644)
    accounts(file).rewrite(lambda found: {"a": "a:2"})
    assert stat.S_IMODE(file.stat().st_mode) == 0o640, "a group that may read it, a broker's, still may"
    (tmp_path / ".f.new").write_text("half of a")  # of a writer that was killed
    accounts(file).rewrite(lambda found: {"a": "a:2"})
    assert not (tmp_path / ".f.new").exists()
    link = tmp_path / "link"
    link.symlink_to(file)
    accounts(link).rewrite(lambda found: {"a": "a:3"})
    assert link.is_symlink()
    assert file.read_text() == "a:3\n"


def test_writers_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "f"

    def write(number: int) -> None:
        for one in range(10):
            name = f"{number}-{one}"
            accounts(file).rewrite(lambda found, name=name: {name: f"{name}:{len(found)}"})  # type: ignore[misc]

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert sorted(map(int, accounts(file).read().values())) == list(range(30))


@pytest.mark.parametrize(
    ("text", "end", "seconds"),
    [
        ("1970-01-01", False, 0),
        ("1970-01-01", True, 86400),
        ("1970-01-02T00:00:10Z", True, 86410),
        ("1970-01-02t00:00:10z", True, 86410),
        ("1970-01-02 01:00:10+01:00", False, 86410),
        ("1970-01-02T00:00", False, 86400),
        ("1970-01-01T00:00:00.5Z", False, 0.5),
    ],
)
def test_dates(text: str, end: bool, seconds: float) -> None:
    assert parse_date(text, end=end) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "2026-13-01", "20260101", "2026-W01-1", "01.02.2026", "2026-1-1"]
)
def test_what_is_no_date(text: str) -> None:
    with pytest.raises(ValueError, match='write "2026-12-31"'):
        parse_date(text)


def test_a_date_is_written_as_it_is_read() -> None:
    assert format_date(86410.0) == "1970-01-02T00:00:10Z"
    assert parse_date(format_date(1_790_000_000.0)) == 1_790_000_000.0


def test_names() -> None:
    for name in ("device-1", "ä", "a b", "x@example.org", "00:11".replace(":", "-")):
        check_account_name(name)
    for name in ("", " a", "a ", "a:b", "a/b", "+", "a#", "$SYS", "a\nb", "a\0"):
        with pytest.raises(ValueError, match="the name must not be empty"):
            check_account_name(name, "the name")
