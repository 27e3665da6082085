"""The memory's files: many writers, sudden deaths, bad disks, and what the files tell."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tesaiot_connect.negotiation import store as module
from tesaiot_connect.negotiation.memory import UNKNOWN, Record
from tesaiot_connect.negotiation.store import Store, default_folder

URL = "quic://broker.example:14567"
HOME = "0123456789abcdef" * 2
RECORD = Record(1.7e9, 0.05, 3, 1.7e9 + 600, "lost")

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and signals")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "endpoints"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".endpoint")


def kept(folder: Path, record: Record = RECORD) -> Path:
    Store(folder).write(URL, HOME, record)
    (path,) = files(folder)
    return path


def test_another_process_reads_what_one_wrote(folder: Path) -> None:
    kept(folder)
    assert Store(folder).read(URL, HOME) == RECORD
    assert Store(folder).read("mqtts://broker.example:8883", HOME) == UNKNOWN
    assert Store(folder).read(URL, "f" * 32) == UNKNOWN
    assert Store(folder).network() == Store(folder).network()


def test_without_a_folder_it_is_kept_in_memory() -> None:
    store = Store(None)
    assert store.read(URL, HOME) == UNKNOWN
    store.write(URL, HOME, RECORD)
    assert store.read(URL, HOME) == RECORD
    assert store.network() == Store(None).network()


def test_every_field_survives(folder: Path) -> None:
    path = kept(folder)
    assert set(json.loads(path.read_bytes())) == set(Record.__struct_fields__)


def test_neither_names_nor_contents_tell_where_it_was(folder: Path) -> None:
    store = Store(folder)
    store.write(URL, store.network(), RECORD)
    written = b"".join(os.fsencode(path.name) + path.read_bytes() for path in folder.iterdir())
    for word in (b"quic", b"broker", b"example", b"14567", b"127.0", b"192.168"):
        assert word not in written
    (path,) = files(folder)
    assert all(
        type(value) in (int, float) for value in json.loads(path.read_bytes()).values() if value != "lost"
    )


def test_folders_differ_in_their_names_for_the_same(tmp_path: Path) -> None:
    assert kept(tmp_path / "a").name != kept(tmp_path / "b").name


@posix
def test_files_are_their_owners_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        kept(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


# --- files that are none of ours ------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b'{"failures":-1}',
        b'{"failures":65}',
        b'{"penalty_until":"tomorrow"}',
        b'{"succeeded":1e999}',
        b'{"succeeded":null}',
        b'{"kind":"else"}',
        b'{"x":' + b"[" * 4000,
        b'{"failures":' + b"9" * 4000,
        b" " * 10_000_000,
        msgspec.json.encode(RECORD)[:-1],
    ],
    ids=range(14),
)
def test_a_file_that_is_none_of_ours_counts_as_none_and_is_replaced(folder: Path, data: bytes) -> None:
    path = kept(folder)
    path.write_bytes(data)
    store = Store(folder)
    assert store.read(URL, HOME) == UNKNOWN
    store.write(URL, HOME, RECORD)
    assert Store(folder).read(URL, HOME) == RECORD


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_file_can_raise(folder: Path, data: bytes) -> None:
    if not folder.exists():
        kept(folder)
    (path,) = files(folder)
    path.write_bytes(data)
    assert isinstance(Store(folder).read(URL, HOME), Record)


def test_fields_of_a_later_release_do_no_harm(folder: Path) -> None:
    path = kept(folder)
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | {"later": [1, {}]}).encode())
    assert Store(folder).read(URL, HOME) == RECORD


def test_an_old_file_goes_and_what_is_not_ours_stays(folder: Path) -> None:
    old = kept(folder)
    dead = folder / ".abc.endpoint"
    foreign = folder / "holiday.jpg"
    for path in (dead, foreign):
        path.touch()
    for path in (old, dead, foreign):
        os.utime(path, (0, time.time() - module._KEPT - 60))
    store = Store(folder)
    store.write("mqtts://broker.example", HOME, RECORD)
    assert foreign.exists()
    assert not old.exists()
    assert not dead.exists()
    assert len(files(folder)) == 1


# --- disks --------------------------------------------------------------------------------


def check_kept_in_process(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(folder)
    assert store.network() == store.network()
    for number in range(3):
        record = msgspec.structs.replace(RECORD, failures=number)
        store.write(URL, HOME, record)
        assert store.read(URL, HOME) == record
    told = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(told) == 1, "once"
    assert str(folder) in told[0].getMessage()
    assert "memory_folder" in told[0].getMessage()


def test_a_file_in_the_place_of_the_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.mkdir()
    folder.touch()
    check_kept_in_process(folder, caplog)


@posix
def test_a_folder_that_others_may_write_to(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = kept(folder)
    folder.chmod(0o777)
    assert Store(folder).read(URL, HOME) == UNKNOWN, "who knows who wrote it"
    caplog.clear()
    check_kept_in_process(folder, caplog)
    assert path.exists()


@pytest.mark.root
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_a_folder_of_another_user(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(folder)
    os.chown(folder, 12345, 12345)
    check_kept_in_process(folder, caplog)


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nobody_may_write_to(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(folder)
    folder.chmod(0o500)
    check_kept_in_process(folder, caplog)


@pytest.mark.parametrize("number", [28, 30, 5, 122], ids=["full", "read-only", "broken", "over quota"])
def test_a_disk_that_takes_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = kept(folder)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdopen", lambda handle, *_: os.close(handle) or fail())
        check_kept_in_process(folder, caplog)
    assert os.strerror(number) in caplog.text
    assert Store(folder).read(URL, HOME) == RECORD, "the old one is whole"
    assert set(folder.iterdir()) == {path, folder / "salt"}


def test_a_disk_that_recovers_is_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = Store(folder)
    with monkeypatch.context() as broken:
        store.network()
        broken.setattr(module, "write_private", full)
        store.write(URL, HOME, RECORD)
        assert store.read(URL, HOME) == RECORD
    better = msgspec.structs.replace(RECORD, failures=9)
    store.write(URL, HOME, better)
    assert Store(folder).read(URL, HOME) == better
    Store(folder).write(URL, HOME, RECORD)
    assert store.read(URL, HOME) == RECORD, "others are heard again"


def test_a_folder_that_vanishes_is_made_anew(folder: Path) -> None:
    store = Store(folder)
    store.write(URL, HOME, RECORD)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert store.read(URL, HOME) == UNKNOWN
    store.write(URL, HOME, RECORD)
    assert store.read(URL, HOME) == RECORD


# --- the salt -----------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"short", b"x" * 1_000_000])
def test_a_salt_that_is_none_of_ours_will_do(folder: Path, data: bytes) -> None:
    folder.mkdir(parents=True, mode=0o700)
    (folder / "salt").write_bytes(data)
    Store(folder).write(URL, HOME, RECORD)
    assert Store(folder).read(URL, HOME) == RECORD
    assert (folder / "salt").read_bytes(), "an empty one is replaced"


def test_of_two_that_make_a_salt_at_once_both_have_the_firsts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicker: list[str] = []
    write = module.write_private

    def slowly(file: Path, data: bytes) -> None:
        write(file, data)
        monkeypatch.setattr(module, "write_private", write)
        quicker.append(Store(folder).network())

    monkeypatch.setattr(module, "write_private", slowly)
    assert [Store(folder).network()] == quicker
    assert [path.name for path in folder.iterdir()] == ["salt"]


@pytest.mark.parametrize(
    "error", [PermissionError(1, "Operation not permitted"), OSError(95, "Not supported")]
)
def test_a_file_system_without_links(folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def link(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "link", link)
    kept(folder)
    assert len((folder / "salt").read_bytes()) == 32
    assert Store(folder).read(URL, HOME) == RECORD
    assert len(list(folder.iterdir())) == 2


# --- processes ----------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from tesaiot_connect.negotiation.memory import Record
from tesaiot_connect.negotiation.store import Store
folder, url, home, number, rounds = sys.argv[1:]
store = None
sys.stdout.write("ready\\n"), sys.stdout.flush()
sys.stdin.readline()
store = Store(Path(folder))
for turn in range(int(rounds)):
    store.write(url, home, Record(float(turn), float(number), int(number), 1.0))
    found = store.read(url, home)
    assert found.handshake == found.failures, found
    if turn == 0:
        sys.stdout.write(store.network() + "\\n"), sys.stdout.flush()
assert not store._warned
"""


@pytest.fixture
def writers() -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for one in running:
        one.kill()
        one.communicate()


def writer(folder: Path, number: int, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITER, str(folder), URL, HOME, str(number), str(rounds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def begin(one: subprocess.Popen[str]) -> None:
    assert one.stdin is not None
    one.stdin.write("\n")
    one.stdin.flush()


def line(one: subprocess.Popen[str]) -> str:
    assert one.stdout is not None
    return one.stdout.readline().strip()


def test_processes_that_begin_together_share_a_salt_and_every_file_is_whole(
    folder: Path, writers: list[subprocess.Popen[str]]
) -> None:
    writers += [writer(folder, number, 150) for number in range(1, 4)]
    for one in writers:
        assert line(one) == "ready"
    for one in writers:
        begin(one)
    assert len({line(one) for one in writers} | {Store(folder).network()}) == 1
    assert [one.wait(60) for one in writers] == [0, 0, 0]
    assert len(files(folder)) == 1
    found = Store(folder).read(URL, HOME)
    assert found.succeeded == 149
    assert len(list(folder.iterdir())) == 2


@posix
def test_a_writer_that_is_killed_leaves_a_whole_file(
    folder: Path, writers: list[subprocess.Popen[str]]
) -> None:
    for number in range(1, 6):
        one = writer(folder, number, 1_000_000)
        writers.append(one)
        assert line(one) == "ready"
        begin(one)
        assert line(one)
        one.send_signal(signal.SIGKILL)
        assert one.wait(30) == -signal.SIGKILL
        found = Store(folder).read(URL, HOME)
        assert found.handshake == found.failures == number


@posix
@pytest.mark.parametrize("call", ["write", "replace"])
def test_a_writer_that_dies_at_the_worst_moment_leaves_the_file_before(folder: Path, call: str) -> None:
    """Half of it is written; or all, and it is not in its place yet."""
    kept(folder)
    program = f"""
import io, os, signal
from pathlib import Path
from tesaiot_connect.negotiation.memory import Record
from tesaiot_connect.negotiation.store import Store
store = Store(Path({str(folder)!r}))
store.network()
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if {call!r} == "replace":
    Path.replace = die
else:
    fdopen = os.fdopen
    class Half:
        def __init__(self, handle): self.handle = handle
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def write(self, data):
            os.write(self.handle, data[:20])
            die()
    os.fdopen = lambda handle, *_: Half(handle)
store.write({URL!r}, {HOME!r}, Record(1.0))
"""
    died = subprocess.run([sys.executable, "-c", program], check=False)
    assert died.returncode == -signal.SIGKILL
    assert Store(folder).read(URL, HOME) == RECORD
    assert len([path for path in folder.iterdir() if path.name.startswith(".")]) == 1
    Store(folder).write(URL, HOME, UNKNOWN)
    assert Store(folder).read(URL, HOME) == UNKNOWN


def test_the_default_folder_is_the_users() -> None:
    assert default_folder().parts[-2:] == ("tesaiot-connect", "endpoints")
