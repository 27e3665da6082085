"""Session tickets of a client: once each, never across keys, and never at the cost of a connection."""

from __future__ import annotations

import datetime
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from aioquic.tls import CipherSuite, ExtensionType, SessionTicket

from tesaiot_connect_quic_aioquic.tickets import LIFETIME, TicketKey, Tickets, default_folder, pack, unpack

KEY = TicketKey(host="broker.example", port=14567, server_name="broker.example", identity="ca-1")


def ticket(name: str = "one", *, begun: float = 0.0, lifetime: float = 3600.0) -> SessionTicket:
    """`begun` and `lifetime` in seconds; a negative `begun` is in the past."""
    begins = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=begun)
    return SessionTicket(
        age_add=4_000_000_000,
        cipher_suite=CipherSuite.AES_256_GCM_SHA384,
        not_valid_before=begins,
        not_valid_after=begins + datetime.timedelta(seconds=lifetime),
        resumption_secret=bytes(range(48)),
        server_name="broker.example",
        ticket=name.encode(),
        max_early_data_size=0xFFFFFFFF,
        other_extensions=[(ExtensionType.QUIC_TRANSPORT_PARAMETERS, b"\x01\x02\xff")],
    )


@pytest.fixture(params=["folder", "memory"])
def tickets(request: pytest.FixtureRequest, tmp_path: Path) -> Tickets:
    return Tickets(tmp_path / "state" / "tickets" if request.param == "folder" else None)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_ticket_comes_back_as_it_was(tickets: Tickets) -> None:
    kept = ticket()
    tickets.put(KEY, kept)
    assert tickets.take(KEY) == kept


def test_a_ticket_is_given_once(tickets: Tickets) -> None:
    tickets.put(KEY, ticket())
    assert tickets.take(KEY) is not None
    assert tickets.take(KEY) is None


def test_without_any_there_is_none(tickets: Tickets) -> None:
    assert tickets.take(KEY) is None


def test_the_newest_goes_first_and_four_are_kept(tickets: Tickets) -> None:
    for number in range(6):
        tickets.put(KEY, ticket(str(number)))
    taken = []
    while (found := tickets.take(KEY)) is not None:
        taken.append(found.ticket)
    assert taken == [b"5", b"4", b"3", b"2"]


@pytest.mark.parametrize(
    "other",
    [
        attrs.evolve(KEY, host="other.example"),
        attrs.evolve(KEY, port=14568),
        attrs.evolve(KEY, server_name="other.example"),
        attrs.evolve(KEY, identity="ca-2"),
    ],
)
def test_a_ticket_never_crosses_its_key(tickets: Tickets, other: TicketKey) -> None:
    tickets.put(KEY, ticket())
    assert tickets.take(other) is None
    assert tickets.take(KEY) is not None


def test_fields_of_a_key_do_not_run_into_each_other() -> None:
    one = TicketKey("a", 1, "bc", "d")
    assert one.digest != TicketKey("a", 1, "b", "cd").digest
    assert one.digest != TicketKey("a1", 1, "bc", "d").digest


@pytest.mark.parametrize(
    "useless",
    [
        ticket(begun=-3600, lifetime=3599),  # expired
        ticket(begun=3600),  # of a clock that has gone back since
        ticket(begun=-LIFETIME - 1, lifetime=10 * LIFETIME),  # older than RFC 8446 allows
        ticket(lifetime=0),  # "discard immediately"
    ],
    ids=["expired", "not yet", "too old", "no lifetime"],
)
def test_a_useless_ticket_is_neither_kept_nor_given(
    tickets: Tickets, useless: SessionTicket, tmp_path: Path
) -> None:
    tickets.put(KEY, useless)
    assert tickets.take(KEY) is None


def test_tickets_that_expire_on_disk_are_removed_and_older_valid_ones_serve(tmp_path: Path) -> None:
    tickets = Tickets(tmp_path)
    tickets.put(KEY, ticket("older"))
    tickets.put(KEY, ticket("newer"))
    newest = files(tmp_path)[-1]
    newest.write_bytes(pack(ticket("newer", begun=-3600, lifetime=1800)))
    found = tickets.take(KEY)
    assert found is not None
    assert found.ticket == b"older"
    assert files(tmp_path) == []


def test_a_restart_finds_them(tmp_path: Path) -> None:
    kept = ticket()
    Tickets(tmp_path / "t").put(KEY, kept)
    assert Tickets(tmp_path / "t").take(KEY) == kept
    assert Tickets(tmp_path / "t").take(KEY) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\xff not json",
        pack(ticket())[:-20],
        pack(ticket()).replace(b'"version":1', b'"version":2'),
        pack(ticket()).replace(b'"cipher_suite":4866', b'"cipher_suite":77'),
        b'{"version":1}',
    ],
    ids=["empty", "noise", "cut off", "newer format", "unknown cipher", "fields missing"],
)
def test_damage_counts_as_none(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    tickets = Tickets(tmp_path)
    tickets.put(KEY, ticket())
    (path,) = files(tmp_path)
    path.write_bytes(damage)
    with caplog.at_level(logging.DEBUG, "tesaiot_connect_quic_aioquic"):
        assert tickets.take(KEY) is None
    assert files(tmp_path) == []
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_unpack_takes_only_what_pack_wrote() -> None:
    with pytest.raises(ValueError, match="time zone"):
        unpack(pack(ticket()).replace(b'Z"', b'"'))


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
def test_files_are_private_and_their_names_tell_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "tickets"
    before = os.umask(0)
    try:
        Tickets(folder).put(KEY, ticket())
    finally:
        os.umask(before)
    (path,) = files(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "broker" not in path.name
    assert "ca-1" not in path.name


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
def test_a_folder_that_others_may_write_to_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Tickets(tmp_path).put(KEY, ticket())
    tmp_path.chmod(0o777)
    tickets = Tickets(tmp_path)
    assert tickets.take(KEY) is None  # anybody may have planted it
    tickets.put(KEY, ticket())
    tmp_path.chmod(0o700)
    assert len(files(tmp_path)) == 1
    assert "others may write" in caplog.text


def test_a_disk_that_fails_costs_one_warning_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    tickets = Tickets(tmp_path / "file" / "tickets")  # its folder is a file
    for _ in range(3):
        tickets.put(KEY, ticket())
        assert tickets.take(KEY) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "file") in record.getMessage()


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    Tickets(tmp_path).put(KEY, ticket())
    assert files(tmp_path) == []


def test_a_ticket_that_cannot_be_removed_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = Tickets(tmp_path)
    tickets.put(KEY, ticket())

    def read_only(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", read_only)
        assert tickets.take(KEY) is None
    assert Tickets(tmp_path).take(KEY) is not None


def test_what_dead_writers_and_forgotten_servers_left_is_swept(tmp_path: Path) -> None:
    old = tmp_path / ".abandoned.ticket"
    old.touch()
    os.utime(old, (0, 0))
    forgotten = tmp_path / f"{'0' * 32}-{'0' * 20}-00000000.ticket"
    forgotten.touch()
    os.utime(forgotten, (0, 0))
    foreign = tmp_path / "notes.txt"
    foreign.touch()
    os.utime(foreign, (0, 0))
    Tickets(tmp_path).put(KEY, ticket())
    left = files(tmp_path)
    assert old not in left
    assert forgotten not in left
    assert foreign in left


_TAKER = """
import sys
from pathlib import Path
from tesaiot_connect_quic_aioquic.tickets import TicketKey, Tickets
tickets = Tickets(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[2])):
    key = TicketKey(host="h", port=number, server_name="h", identity="")
    while (found := tickets.take(key)) is not None:
        print(number, found.ticket.decode())
"""


def test_two_processes_never_take_the_same_ticket(tmp_path: Path) -> None:
    rounds = 100
    tickets = Tickets(tmp_path)
    for number in range(rounds):
        for copy in ("a", "b"):
            tickets.put(TicketKey(host="h", port=number, server_name="h", identity=""), ticket(copy))
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", _TAKER, str(tmp_path), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for taker in takers:
        assert taker.stdout is not None
        assert taker.stdout.readline() == "ready\n"
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("\n")
        taker.stdin.flush()
    taken = [line for taker in takers for line in taker.communicate(timeout=60)[0].splitlines()]
    assert [taker.returncode for taker in takers] == [0, 0]
    assert sorted(taken) == sorted(f"{number} {copy}" for number in range(rounds) for copy in "ab")


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert default_folder() == Path("/var/state/tesaiot-connect/quic-tickets")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert default_folder() == Path("/home/me/.local/state/tesaiot-connect/quic-tickets")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == Path("/home/me/Library/Application Support/tesaiot-connect/quic-tickets")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert default_folder() == tmp_path / "tesaiot-connect" / "quic-tickets"


def test_a_user_without_a_home_has_a_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder().is_absolute()
