"""Username and password: the client's login, the password file, and a broker that checks it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

import tesaiot_connect_auth_password as plugin
from tesaiot_connect import (
    Access,
    AccessRule,
    Backoff,
    Broker,
    BrokerOptions,
    Client,
    ClientOptions,
    ConnectorError,
    Credentials,
    Disconnected,
    Duration,
    ListenerSpec,
    Negotiator,
    NotApplicable,
    Peer,
    Principal,
    Refused,
    RevocablePrincipal,
    Secret,
    SecretFrom,
    format_date,
)
from tesaiot_connect.testing import Network
from tesaiot_connect_auth_password import AuthPassword, PasswordFile, add_user, remove_user, verify
from tesaiot_connect_auth_password.__main__ import main as command
from tesaiot_connect_auth_password.users import COST

PEER = Peer("192.0.2.1:5", "test")
EVERYTHING = Access(rules=(AccessRule(publish=("#",), subscribe=("#",)),))


@pytest.fixture
def users(tmp_path: Path) -> Path:
    file = tmp_path / "users"
    add_user(file, "device-1", "right")
    return file


def live(file: Path, **given: Any) -> PasswordFile:
    """One that looks at its file every time."""
    made = PasswordFile(file=file, **given)
    made._users.interval = 0
    return made


async def login(server: PasswordFile, username: str | None, password: str | None) -> Principal:
    given = None if password is None else password.encode()
    return await server.begin(PEER, Credentials(username, given))


def refusal(server: PasswordFile, username: str | None, password: str | None) -> Refused:
    with pytest.raises(Refused) as caught:
        asyncio.run(login(server, username, password))
    return caught.value


# --- the client's half --------------------------------------------------------------------


def test_every_login_asks_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pw"
    auth = AuthPassword(username=SecretFrom(env="TESAIOT_TEST_USER"), password=SecretFrom(file=file))
    for name, password in (("a", "1"), ("b", "2")):
        monkeypatch.setenv("TESAIOT_TEST_USER", name)
        file.write_text(f"{password}\n")
        file.chmod(0o600)
        found = asyncio.run(auth.begin()).credentials
        assert (found.username, found.password) == (name, password.encode())
    assert "username" in found.origin
    assert f"`password` is the file {file}" in found.origin
    assert "`username` is the environment variable TESAIOT_TEST_USER" in found.origin


def test_a_command_gives_the_password() -> None:
    command = (sys.executable, "-c", "print('pw')")
    auth = AuthPassword(username="u", password=SecretFrom(command=command))
    assert asyncio.run(auth.begin()).credentials.password == b"pw"


def test_what_is_missing_is_named() -> None:
    for key in ("username", "password"):
        given: dict[str, Any] = {"username": "u", "password": Secret("p")}
        with pytest.raises(ValueError, match=f"`{key}` is empty: give the text, {{ file"):
            AuthPassword(**(given | {key: Secret("")}))
        auth = AuthPassword(**(given | {key: SecretFrom(env="TESAIOT_NOT_SET")}))
        with pytest.raises(ConnectorError, match=f"^`{key}` of this connection's `auth`: the environment"):
            asyncio.run(auth.begin())


def test_nothing_shows_the_password() -> None:
    auth = AuthPassword(username="u", password=Secret("hunter2"))
    assert "hunter2" not in repr(auth) + repr(asyncio.run(auth.begin()))


# --- the broker's half --------------------------------------------------------------------


def test_right_and_wrong(users: Path) -> None:
    add_user(users, "device-2", "other", organisation="acme", valid_until="2999-12-31")
    server = live(users)
    principal = asyncio.run(login(server, "device-1", "right"))
    assert (principal.name, principal.organisation, principal.valid_until) == ("device-1", None, None)
    principal = asyncio.run(login(server, "device-2", "other"))
    assert principal.organisation == "acme"
    assert format_date(principal.valid_until or 0) == "3000-01-01T00:00:00Z"
    told = {
        (str(error), error.reason_code, error.permanent)
        for error in (
            refusal(server, "device-1", "wrong"),
            refusal(server, "device-1", "other"),
            refusal(server, "device-1", ""),
            refusal(server, "nobody", "right"),
            refusal(server, "x" * 70_000, "right"),
            refusal(server, "a:b\n", "right"),
        )
    }
    assert told == {("wrong username or password", 0x86, True)}, "nobody can tell which it was"


def test_a_hash_that_cannot_be_computed_is_no_wrong_password(
    users: Path, caplog: pytest.LogCaptureFixture
) -> None:
    too_short = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHQ$AAAA"  # as "no memory" is: an error, no answer
    users.write_text(f"device-1:{too_short}\n")
    error = refusal(live(users), "device-1", "right")
    assert (error.reason_code, error.permanent) == (0x89, False), "the client comes back"
    assert "cannot be compared" in caplog.text
    assert "AAAA" not in caplog.text


def test_what_is_no_login_by_password_is_for_another(users: Path) -> None:
    server = live(users)
    for username, password in ((None, None), ("device-1", None), ("", "x"), (None, "x")):
        assert isinstance(refusal(server, username, password), NotApplicable)


def test_an_account_that_is_over(users: Path) -> None:
    users.write_text(users.read_text().strip() + "::2020-01-01\n")
    server = live(users)
    error = refusal(server, "device-1", "right")
    assert "was valid until 2020-01-02T00:00:00Z" in str(error)
    assert (error.reason_code, error.permanent) == (0x87, True)
    assert refusal(server, "device-1", "wrong").reason_code == 0x86


def test_an_account_is_over_from_its_end_on(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users.write_text(users.read_text().strip() + "::2031-01-01T01:00:00+01:00\n")
    server, end = live(users), 1_924_992_000.0  # 2031-01-01T00:00:00Z
    now = [end - 0.001]
    monkeypatch.setattr("time.time", lambda: now[0])
    principal = asyncio.run(login(server, "device-1", "right"))
    assert (principal.valid_until, principal.refusal()) == (end, "")
    now[0] = end
    assert "was valid until 2031-01-01T00:00:00Z" in principal.refusal()
    assert "was valid until 2031-01-01T00:00:00Z" in str(refusal(server, "device-1", "right"))


def test_an_account_that_ends_is_noticed(users: Path) -> None:
    server = live(users)
    principal = asyncio.run(login(server, "device-1", "right"))
    assert isinstance(principal, RevocablePrincipal)
    assert principal.refusal() == ""
    add_user(users, "other", "x")
    assert principal.refusal() == ""
    before = users.read_text()
    for change, said in (
        (lambda: remove_user(users, "device-1"), "was removed"),
        (lambda: add_user(users, "device-1", "right"), "password of device-1 was changed"),
        (lambda: add_user(users, "device-1", "new"), "password of device-1 was changed"),
        (lambda: users.write_text(before.replace("\nother", ":acme\nother")), "another organisation"),
        (lambda: users.write_text(before.replace("\nother", "::2020-01-01\nother")), "valid until 2020"),
    ):
        change()
        assert said in principal.refusal()
    users.write_text(before)
    assert principal.refusal() == ""
    users.write_text("nonsense")
    assert principal.refusal() == "", "a damaged file throws nobody out"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("device-2", "it is not username:hash"),
        ("device-2:hunter2", "no argon2 hash"),
        ("device-2:$2b$12$abcdefghijklmnopqrstuuhunter2", "no argon2 hash"),
        (f"device/2:{COST}$c2FsdA$aGFzaA", "the username must not"),
        (f"device-2:{COST}$c2FsdA$aGFzaA:a/b", "the organisation must not"),
        (f"device-2:{COST}$c2FsdA$aGFzaA:acme:soon", "'soon' is not a date"),
        ("device-2:$argon2id$v=19$m=9999999,t=1,p=1$c2FsdA$aGFzaA", "more than 1 GiB"),
        (f"device-1:{COST}$c2FsdA$aGFzaA", "same account as line 1"),
    ],
)
def test_a_damaged_file(users: Path, line: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    server = live(users)
    with users.open("a") as file:
        file.write(f"{line}\n")
    asyncio.run(login(server, "device-1", "right"))
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"{users} is damaged in line 2" in told
    assert said in told
    assert "hunter2" not in told
    with pytest.raises(ConnectorError, match="damaged in line 2"):
        PasswordFile(file=users)


def test_a_file_that_is_missing_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        ConnectorError, match=r"does not exist\. make it: python -m tesaiot_connect_auth_pass"
    ):
        PasswordFile(file=tmp_path / "users")


# --- under load ---------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hashes that passwords were compared with."""
    hashes: list[str] = []
    real = verify._matches

    def matches(hashed: str, password: bytes) -> bool:
        hashes.append(hashed)
        return real(hashed, password)

    monkeypatch.setattr(verify, "_matches", matches)
    return hashes


def test_an_unknown_user_costs_as_much_as_a_wrong_password(
    users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = counted(monkeypatch)
    server = live(users)
    refusal(server, "device-1", "wrong")
    refusal(server, "nobody", "wrong")
    known, unknown = (hashed.split("$") for hashed in hashes)
    assert known[:4] == unknown[:4]
    assert list(map(len, known)) == list(map(len, unknown))
    users.write_text(users.read_text().replace("m=19456", "m=8192"))
    refusal(server, "nobody", "wrong")
    assert "m=8192" in hashes[-1]
    users.write_text("")
    refusal(server, "nobody", "wrong")
    assert hashes[-1].startswith(COST)


def test_where_costs_differ_those_of_unknown_users_do_too(
    users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = users.read_text()
    users.write_text(ours + ours.replace("device-1", "device-2").replace("m=19456", "m=8192"))
    server = live(users)
    hashes = counted(monkeypatch)

    def cost(name: str) -> str:
        refusal(server, name, "wrong")
        return hashes[-1].split("$")[3]

    costs = {name: cost(name) for name in map(str, range(40))}  # of one cost alone: once in 2**39
    assert {one.partition(",")[0] for one in costs.values()} == {"m=19456", "m=8192"}
    assert all(cost(name) == costs[name] for name in list(costs)[:5])


def test_who_comes_back_costs_no_hash(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = counted(monkeypatch)
    server = live(users)
    for _ in range(3):
        asyncio.run(login(server, "device-1", "right"))
    assert len(hashes) == 1
    refusal(server, "device-1", "wrong")
    refusal(server, "device-1", "wrong")
    assert len(hashes) == 3, "only what was right is remembered"
    add_user(users, "device-1", "new")
    assert refusal(server, "device-1", "right").reason_code == 0x86
    add_user(users, "device-2", "right")
    asyncio.run(login(server, "device-2", "right"))
    assert len(hashes) == 5


def test_what_is_remembered_is_bounded(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "REMEMBERED", 2)
    monkeypatch.setattr(verify, "_matches", lambda hashed, password: True)
    checker = verify.Verifier()

    async def main() -> None:
        for number in range(10):
            await checker.verify("hash", b"%d" % number)

    asyncio.run(main())
    assert len(checker._right) == 2


def test_a_flood_waits_in_a_short_queue_and_the_loop_goes_on(
    users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, go, matches = live(users), threading.Event(), verify._matches

    def held(hashed: str, password: bytes) -> bool:
        assert go.wait(60)
        return matches(hashed, password)

    monkeypatch.setattr(verify, "_matches", held)

    async def main() -> None:
        flood = [asyncio.create_task(login(server, "device-1", f"wrong {n}")) for n in range(200)]
        for _ in range(200):  # other things happen meanwhile
            await asyncio.sleep(0)
        assert sum(not one.done() for one in flood) == verify.WAITING
        go.set()
        await asyncio.wait(flood)
        codes = [one.exception().reason_code for one in flood]  # type: ignore[union-attr]
        assert set(codes) == {0x86, 0x89}
        assert codes.count(0x86) == verify.WAITING
        busy = next(one.exception() for one in flood if one.exception().reason_code == 0x89)  # type: ignore[union-attr]
        assert isinstance(busy, Refused)
        assert not busy.permanent
        await login(server, "device-1", "right")

    asyncio.run(main())
    threads = server._verifier._threads
    assert threads._max_workers <= max(1, min(4, (os.cpu_count() or 1) // 2))


def test_who_leaves_while_waiting_gives_the_place_back(users: Path) -> None:
    server = live(users)

    async def main() -> None:
        flood = [asyncio.create_task(login(server, "nobody", f"{n}")) for n in range(verify.WAITING)]
        await asyncio.sleep(0)
        for one in flood:
            one.cancel()
        await asyncio.wait(flood)
        await login(server, "device-1", "right")

    asyncio.run(main())


# --- together -----------------------------------------------------------------------------


@asynccontextmanager
async def broker(server: PasswordFile) -> AsyncIterator[Network]:
    network = Network()
    options = BrokerOptions(recheck=Duration(0.01))
    async with (
        asyncio.timeout(60),
        Broker(options).serving([ListenerSpec("pair", network.transport(), server)]),
    ):
        yield network


def client(network: Network, auth: AuthPassword) -> Client:
    slow = Backoff(min=Duration(0.01), max=Duration(1000))
    return Client(Negotiator([network.transport()]), ClientOptions(reconnect=slow), auth=auth, name="c")


def test_a_refused_login_names_the_file_and_a_new_password_there_ends_it(users: Path) -> None:
    secret = users.with_name("pw")
    secret.write_text("wrong\n")
    secret.chmod(0o600)
    auth = AuthPassword(username="device-1", password=SecretFrom(file=secret))

    async def main() -> None:
        async with broker(live(users, access=EVERYTHING)) as network, client(network, auth) as one:
            with pytest.raises(Refused, match="check `username` and `password` of this") as caught:
                await one.connected()
            assert f"(`password` is the file {secret})" in str(caught.value)
            assert caught.value.permanent
            secret.write_text("right\n")
            while not one.status.connects:
                await asyncio.sleep(0.01)
            add_user(users, "device-1", "changed")
            while one.status.state == "connected":
                await asyncio.sleep(0.01)
            assert "not authorized" in one.status.last_error
            assert "was changed" in one.status.last_error
            secret.write_text("changed\n")
            while one.status.connects < 2:
                await asyncio.sleep(0.01)
            remove_user(users, "device-1")
            while one.status.state == "connected":
                await asyncio.sleep(0.01)
            with pytest.raises(Disconnected):
                await one.connected(once=True)

    asyncio.run(main())


# --- the command --------------------------------------------------------------------------


def test_the_hooks() -> None:
    assert plugin.tesaiot_auths() == {"password": AuthPassword}
    assert plugin.tesaiot_authenticators() == {"password": PasswordFile}
    assert attrs.has(AuthPassword)


def feed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_the_command_adds_changes_and_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "users"
    feed(monkeypatch, "right")
    assert (
        command([str(file), "device-1", "--stdin", "--organisation", "acme", "--valid-until", "2999-01-01"])
        == 0
    )
    assert capsys.readouterr().out == "added device-1\n"
    feed(monkeypatch, "new")
    assert command([str(file), "device-1", "--stdin"]) == 0
    assert capsys.readouterr().out == "changed device-1\n"
    principal = asyncio.run(login(live(file), "device-1", "new"))
    assert (principal.organisation, principal.valid_until is not None) == ("acme", True)
    feed(monkeypatch, "new")
    assert command([str(file), "device-1", "--stdin", "--organisation", "", "--valid-until", ""]) == 0
    principal = asyncio.run(login(live(file), "device-1", "new"))
    assert (principal.organisation, principal.valid_until) == (None, None)
    assert command([str(file), "device-1", "--remove"]) == 0
    assert file.read_text() == ""


def test_the_command_asks_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["right", "wrong", "right", "right"]
    monkeypatch.setattr("getpass.getpass", lambda prompt: answers.pop(0))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    file = tmp_path / "users"
    assert command([str(file), "u"]) == 1
    assert "the two passwords differ" in capsys.readouterr().err
    assert not file.exists()
    assert command([str(file), "u"]) == 0
    asyncio.run(login(live(file), "u", "right"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a/b", "--stdin"], "the username must not"),
        (["u", "--stdin", "--organisation", "a:b"], "the organisation must not"),
        (["u", "--stdin", "--valid-until", "soon"], "is not a date"),
        (["u", "--stdin", "--valid-until", "2020-01-01"], "is over"),
        (["nobody", "--remove"], "there is no user 'nobody'"),
        (["u"], "give it with --stdin"),
    ],
)
def test_what_the_command_says_of_mistakes(
    users: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = users.read_text()
    feed(monkeypatch, "pw")
    assert command([str(users), *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert said in told
    assert users.read_text() == before


def test_the_command_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    assert "The password is asked for twice" in " ".join(capsys.readouterr().out.split())
    assert command([str(tmp_path / "nowhere"), "u", "--remove"]) == 1
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(SystemExit):
        command([str(tmp_path / "f"), "u", "--remove", "--stdin"])


def test_an_empty_password_is_refused(users: Path) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        add_user(users, "u", "")
