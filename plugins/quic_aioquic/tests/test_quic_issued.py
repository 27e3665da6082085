"""Session tickets of a server: each is honoured once, over processes, crashes and restarts."""

from __future__ import annotations

import datetime
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from aioquic.tls import CipherSuite, SessionTicket

from tesaiot_connect import ConnectorError
from tesaiot_connect_quic_aioquic.issued import IssuedTickets


def ticket(identity: bytes, *, begun: float = 0.0, lifetime: float = 86400.0) -> SessionTicket:
    begins = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=begun)
    return SessionTicket(
        age_add=7,
        cipher_suite=CipherSuite.AES_128_GCM_SHA256,
        not_valid_before=begins,
        not_valid_after=begins + datetime.timedelta(seconds=lifetime),
        resumption_secret=bytes(32),
        server_name=None,
        ticket=identity,
        max_early_data_size=0xFFFFFFFF,
        other_extensions=[(57, b"parameters")],
    )


def rows(path: Path) -> int:
    database = sqlite3.connect(path)
    try:
        count: int = database.execute("SELECT count(*) FROM ticket").fetchone()[0]
        return count
    finally:
        database.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tickets.db"


@pytest.mark.parametrize("kept", ["file", "memory"])
def test_a_ticket_is_honoured_once(kept: str, path: Path) -> None:
    issued = IssuedTickets(path if kept == "file" else None)
    given = ticket(b"one")
    issued.issue(given)
    issued.issue(ticket(b"two"))
    assert issued.redeem(b"one") == given
    assert issued.redeem(b"one") is None
    assert issued.redeem(b"never issued") is None
    assert issued.redeem(b"two") is not None
    issued.close()


def test_a_restart_knows_what_is_left(path: Path) -> None:
    first = IssuedTickets(path)
    first.issue(ticket(b"used"))
    first.issue(ticket(b"left"))
    assert first.redeem(b"used") is not None
    first.close()
    second = IssuedTickets(path)
    assert second.redeem(b"used") is None
    assert second.redeem(b"left") is not None
    second.close()


def test_expired_tickets_are_not_honoured(path: Path) -> None:
    issued = IssuedTickets(path, lifetime=600)
    issued.issue(ticket(b"by its own word", begun=-100, lifetime=50))
    issued.issue(ticket(b"by ours", begun=-601))
    issued.issue(ticket(b"fresh", begun=-500))
    assert issued.redeem(b"by its own word") is None
    assert issued.redeem(b"by ours") is None
    assert issued.redeem(b"fresh") is not None
    issued.close()


def test_expired_tickets_are_cleaned_up(path: Path) -> None:
    issued = IssuedTickets(path)
    for number in range(300):  # more than one cleaning
        issued.issue(ticket(b"old %d" % number, begun=-100, lifetime=50))
    assert rows(path) < 300
    issued.close()
    IssuedTickets(path).close()
    assert rows(path) == 0


def test_the_oldest_go_when_there_are_too_many(path: Path) -> None:
    issued = IssuedTickets(path, limit=100)
    for number in range(1024):
        issued.issue(ticket(b"%d" % number))
    assert rows(path) <= 100
    assert issued.redeem(b"0") is None
    assert issued.redeem(b"1023") is not None
    issued.close()


def test_a_ticket_of_another_scope_is_not_honoured(path: Path) -> None:
    one, other = IssuedTickets(path, scope="mqtt"), IssuedTickets(path, scope="other")
    one.issue(ticket(b"one"))
    assert other.redeem(b"one") is None
    assert one.redeem(b"one") is not None
    one.close()
    other.close()


def test_the_reset_key_stays(path: Path) -> None:
    first = IssuedTickets(path)
    key = first.reset_key()
    assert len(key) == 32
    assert first.reset_key() == key
    first.close()
    second = IssuedTickets(path)
    assert second.reset_key() == key
    second.close()
    memory = IssuedTickets(None)
    assert memory.reset_key() != key
    memory.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
@pytest.mark.parametrize("exists", [False, True])
def test_the_files_are_private(path: Path, exists: bool) -> None:
    if exists:
        path.touch()
        path.chmod(0o644)
    before = os.umask(0)
    try:
        issued = IssuedTickets(path)
        issued.issue(ticket(b"one"))
    finally:
        os.umask(before)
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
    issued.close()
    assert modes == {"tickets.db": 0o600, "tickets.db-wal": 0o600, "tickets.db-shm": 0o600}


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(b"this is no database" * 1000)
    with pytest.raises(ConnectorError, match=r"noise.*not a database") as caught:
        IssuedTickets(noise)
    assert "move the file away" in caught.value.fix

    with pytest.raises(ConnectorError, match="nowhere") as caught:
        IssuedTickets(tmp_path / "nowhere" / "tickets.db")
    assert "folder exists" in caught.value.fix

    with pytest.raises(ConnectorError, match=str(tmp_path)):
        IssuedTickets(tmp_path)

    other = tmp_path / "other.db"
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE ticket (id)")
    database.close()
    with pytest.raises(ConnectorError, match="something else"):
        IssuedTickets(other)

    newer = tmp_path / "newer.db"
    IssuedTickets(newer).close()
    database = sqlite3.connect(newer)
    database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(ConnectorError, match="format 2") as caught:
        IssuedTickets(newer)
    assert "release" in caught.value.fix


def test_a_failing_database_costs_the_resumption_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    issued = IssuedTickets(path)
    issued.issue(ticket(b"one"))
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        issued.issue(ticket(b"two"))
        issued.issue(ticket(b"three"))
        assert issued.redeem(b"one") is None  # not honoured, as it could not be crossed out
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert issued.redeem(b"one") is not None
    issued.close()


def test_after_close_nothing_is_honoured(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    issued = IssuedTickets(path)
    issued.issue(ticket(b"one"))
    issued.close()
    issued.close()
    issued.issue(ticket(b"two"))
    assert issued.redeem(b"one") is None
    assert not caplog.records


def test_whoever_comes_second_gets_nothing(path: Path) -> None:
    """Another process takes the ticket after this one has read it."""
    first, second = IssuedTickets(path), IssuedTickets(path)
    first.issue(ticket(b"one"))
    database = first._database
    stolen: list[SessionTicket | None] = []

    class Slow:
        def execute(self, statement: str, parameters: tuple[object, ...]) -> sqlite3.Cursor:
            if statement.startswith("DELETE"):
                stolen.append(second.redeem(b"one"))
            return database.execute(statement, parameters)

    first._database = Slow()  # type: ignore[assignment]
    assert first.redeem(b"one") is None
    assert len(stolen) == 1
    assert stolen[0] is not None
    database.close()
    second.close()


# --- processes

_PRELUDE = """
import sys
from pathlib import Path
from tesaiot_connect_quic_aioquic import issued as module
from tesaiot_connect_quic_aioquic.issued import IssuedTickets
module._OPENING = 60.0  # one of them may stand still with the lock in its hands
print("ready", flush=True)
sys.stdin.readline()
issued = IssuedTickets(Path(sys.argv[1]))
"""


def process(code: str, path: Path) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def go(started: subprocess.Popen[str]) -> None:
    assert started.stdin is not None
    started.stdin.write("\n")
    started.stdin.flush()


def test_two_processes_never_honour_the_same_ticket(path: Path) -> None:
    rounds = 500
    issued = IssuedTickets(path)
    for number in range(rounds):
        issued.issue(ticket(b"%d" % number))
    code = f"""
for number in range({rounds}):
    if issued.redeem(b"%d" % number) is not None:
        print(number)
"""
    redeemers = [process(code, path) for _ in range(2)]
    for one in redeemers:
        go(one)
    honoured = [int(line) for one in redeemers for line in one.communicate(timeout=60)[0].splitlines()]
    assert [one.returncode for one in redeemers] == [0, 0]
    assert len(honoured) == len(set(honoured)), "a ticket was honoured twice"
    # what a process could not cross out in time is not honoured, so it is still there
    left = [number for number in range(rounds) if issued.redeem(b"%d" % number) is not None]
    assert sorted(honoured + left) == list(range(rounds))
    issued.close()


def test_processes_may_create_the_file_at_the_same_time(path: Path) -> None:
    makers = [process("print(issued.reset_key().hex())", path) for _ in range(4)]
    for one in makers:
        go(one)
    keys = {one.communicate(timeout=60)[0] for one in makers}
    assert [one.returncode for one in makers] == [0] * 4
    assert len(keys) == 1


def test_opening_waits_where_sqlite_does_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch to WAL fails at once while another process makes the same switch."""
    connect, refusals = sqlite3.connect, ["first", "second"]

    class Busy(sqlite3.Connection):
        def execute(self, statement: str, *parameters: object) -> sqlite3.Cursor:
            if "journal_mode" in statement and refusals:
                refusals.pop()
                raise sqlite3.OperationalError("database is locked")
            return super().execute(statement, *parameters)  # type: ignore[arg-type]

    def busy(path: Path, **options: object) -> sqlite3.Connection:
        return connect(path, factory=Busy, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sqlite3, "connect", busy)
    IssuedTickets(path).close()
    assert refusals == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_has_crossed_out_what_it_honoured(path: Path) -> None:
    issued = IssuedTickets(path)
    issued.issue(ticket(b"one"))
    issued.issue(ticket(b"two"))
    issued.close()
    code = """
assert issued.redeem(b"one") is not None
print("honoured", flush=True)
sys.stdin.readline()
"""
    victim = process(code, path)
    go(victim)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "honoured\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL
    restarted = IssuedTickets(path)
    assert restarted.redeem(b"one") is None
    assert restarted.redeem(b"two") is not None
    restarted.close()
