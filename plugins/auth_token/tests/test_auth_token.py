"""Tokens: their form and age on the client, the token file, and a broker that checks it."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
import re
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import tesaiot_connect_auth_token as plugin
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
from tesaiot_connect_auth_token import AuthToken, TokenFile, add_token, revoke_token
from tesaiot_connect_auth_token.__main__ import main as command
from tesaiot_connect_auth_token.login import _remind
from tesaiot_connect_auth_token.store import digest, token_file

PEER = Peer("192.0.2.1:5", "test")
EVERYTHING = Access(rules=(AccessRule(publish=("#",), subscribe=("#",)),))
SECRET = "a1b2c3d4e5f6g7h8i9j0k1l2m3n4o5p6"
TOKEN = f"tesa_mqtt_myorg_{SECRET}"
DAY = 86400.0


def kept(file: Path, text: str = TOKEN) -> SecretFrom:
    file.write_text(f"{text}\n")
    file.chmod(0o600)
    return SecretFrom(file=file)


def begun(auth: AuthToken) -> Credentials:
    return asyncio.run(auth.begin()).credentials


def refused(auth: AuthToken) -> str:
    with pytest.raises(Refused) as caught:
        begun(auth)
    assert caught.value.permanent
    assert SECRET not in str(caught.value)
    return str(caught.value)


def in_days(days: float) -> str:
    return format_date(time.time() + days * DAY)


# --- the form -----------------------------------------------------------------------------


def test_it_is_username_and_password_both_and_is_never_shown() -> None:
    auth = AuthToken(token=Secret(TOKEN))
    found = begun(auth)
    assert str.__str__(found.username or "") == TOKEN
    assert found.password == TOKEN.encode()
    assert SECRET not in repr(auth) + repr(found) + str(found)
    assert "`token` of this connection's `auth`: if it has expired or was revoked, make a new" in found.origin


@pytest.mark.parametrize("organisation", ["myorg", "my-org", "my_org", "A1"])
def test_right_forms(organisation: str) -> None:
    AuthToken(token=Secret(f"tesa_mqtt_{organisation}_{SECRET}"))


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (TOKEN[:-1], r"\(tesa_mqtt_myorg_…\) has 31 characters behind its last _, not 32"),
        (TOKEN + "x", r"\(tesa_mqtt_myorg_…\) has 33 characters"),
        (f"tesa_mqtt_{SECRET}", r"\(tesa_mqtt_…\) has characters that no token has, or no organisation"),
        (f"tesa_mqtt_myorg_{SECRET[:-1]}!", "has characters that no token has"),
        (f"{TOKEN} ", "has spaces or line ends around it"),
        (f"Bearer {TOKEN}", "does not begin with tesa_mqtt_"),
        (SECRET, "does not begin with tesa_mqtt_"),
        ("", "does not begin with tesa_mqtt_"),
        ("<your token>", "does not begin with tesa_mqtt_"),
    ],
)
def test_wrong_forms_are_found_before_anything_is_sent(token: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match=said) as caught:
        AuthToken(token=Secret(token))
    assert "tesa_mqtt_<organisation>_<32 characters>" in str(caught.value)
    assert "Admin UI > Organization Settings > MQTT Tokens" in str(caught.value)
    assert SECRET[:6] not in str(caught.value)
    if token.strip() and not token.endswith(" "):
        told = refused(AuthToken(token=kept(tmp_path / "token", token)))
        assert re.search(said, told)
        assert f"`token` of this connection's `auth` (the file {tmp_path / 'token'})" in told


def test_tokens_of_another_platform() -> None:
    assert begun(AuthToken(token=Secret("key-123"), pattern=r"key-\d+")).password == b"key-123"
    with pytest.raises(ConnectorError, match="has not the form of a token: it does not match `pattern`"):
        AuthToken(token=Secret("key-123x"), pattern=r"key-\d+")
    with pytest.raises(ValueError, match="`pattern` is not a regular expression"):
        AuthToken(token=Secret("x"), pattern="(")


# --- its age ------------------------------------------------------------------------------


def test_a_token_that_is_over_is_not_sent(tmp_path: Path) -> None:
    for dates in (
        {"expires": "2020-01-31"},
        {"issued": "2020-01-31"},
        {"issued": in_days(-8), "lifetime": Duration(7 * DAY)},
    ):
        told = refused(AuthToken(token=Secret(TOKEN), **dates))
        assert "expired on 20" in told
        assert "nothing was sent" in told
        assert "Admin UI > Organization Settings > MQTT Tokens" in told
        assert f"correct `{next(iter(dates))}`" in told
    told = refused(AuthToken(token=kept(tmp_path / "token"), expires="2020-01-31"))
    assert f"put it into the file {tmp_path / 'token'}, and correct `expires`" in told
    begun(AuthToken(token=Secret(TOKEN), expires=in_days(0.5)))
    begun(AuthToken(token=Secret(TOKEN), issued=in_days(-89)))


def test_the_date_of_its_file(tmp_path: Path) -> None:
    token = kept(tmp_path / "token")
    auth = AuthToken(token=token, issued="file")
    begun(auth)
    old = time.time() - 91 * DAY
    os.utime(tmp_path / "token", (old, old))
    assert "put it into the file" in refused(auth)
    kept(tmp_path / "token", TOKEN.replace("myorg", "other"))
    begun(auth)
    with pytest.raises(ValueError, match="kept in a file"):
        AuthToken(token=Secret(TOKEN), issued="file")
    with pytest.raises(ConnectorError, match="cannot be read"):
        begun(AuthToken(token=SecretFrom(file=tmp_path / "nowhere"), issued="file"))


def test_a_date_is_not_of_the_token_that_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = AuthToken(token=kept(tmp_path / "token"), expires="2999-01-01")
    begun(auth)
    kept(tmp_path / "token", TOKEN.replace("myorg", "newer"))
    far = time.time() + 2000 * 365 * DAY
    monkeypatch.setattr(time, "time", lambda: far)
    assert begun(auth).password == TOKEN.replace("myorg", "newer").encode()
    kept(tmp_path / "token")
    refused(auth)


def test_the_log_says_when_it_will_end_once_a_day(caplog: pytest.LogCaptureFixture) -> None:
    auth = AuthToken(token=Secret(TOKEN), expires=in_days(5.5))
    for _ in range(3):
        begun(auth)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    told = record.getMessage()
    assert "expires in 5 days" in told
    assert "make a new one in Admin UI" in told
    assert SECRET not in told
    caplog.clear()
    auth._memory.warned -= DAY
    begun(auth)
    assert len(caplog.records) == 1
    caplog.clear()
    begun(AuthToken(token=Secret(TOKEN), expires=in_days(15)))
    begun(AuthToken(token=Secret(TOKEN), expires=in_days(5), warn=Duration(DAY)))
    begun(AuthToken(token=Secret(TOKEN)))
    assert not caplog.records


def test_a_connection_that_lasts_is_told_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a timer that is there as long as the login is."""
    monkeypatch.setattr("tesaiot_connect_auth_token.login._DAY", 0.01)

    async def main() -> None:
        auth = AuthToken(token=Secret(TOKEN), expires=in_days(5))
        login = await auth.begin()
        async with asyncio.timeout(30):
            while len(caplog.records) < 3:
                await asyncio.sleep(0.001)
        ended = weakref.ref(login)
        del login
        assert ended() is None
        timer = auth._memory.reminder
        count = len(caplog.records)
        _remind(auth, time.time() + DAY, ended)
        assert auth._memory.reminder is timer, "nobody is reminded any more"
        assert len(caplog.records) == count

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"expires": "soon"}, "`expires`: 'soon' is not a date"),
        ({"issued": "31.12.2026"}, "`issued`: '31.12.2026' is not a date"),
        ({"expires": "file"}, "`expires`: 'file' is not a date"),
        ({"expires": "2999-01-01", "issued": "2026-01-01"}, "not both"),
        ({"warn": Duration(-1)}, "`warn` must not be negative"),
    ],
)
def test_what_is_said_of_mistakes(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AuthToken(token=Secret(TOKEN), **given)


# --- the broker's half --------------------------------------------------------------------


def live(file: Path, **given: Any) -> TokenFile:
    """One that looks at its file every time."""
    made = TokenFile(file=file, **given)
    made._tokens.interval = 0
    return made


async def login(server: TokenFile, username: str | None, password: str | None = None) -> Principal:
    text = username if password is None else password
    return await server.begin(PEER, Credentials(username, None if text is None else text.encode()))


def refusal(server: TokenFile, username: str | None, password: str | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        asyncio.run(login(server, username, password))
    return caught.value


def test_the_token_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    one, two = add_token(file, "acme"), add_token(file, "acme", name="dashboard", days=None)
    third = add_token(file, "My Org.", days=1)
    assert re.fullmatch("tesa_mqtt_acme_[a-z0-9]{32}", one)
    assert third.startswith("tesa_mqtt_myorg_")
    assert one not in file.read_text()
    server = live(file)
    for token, name, organisation in (
        (one, "token:acme:1", "acme"),
        (two, "dashboard", "acme"),
        (third, "token:My Org.:1", "My Org."),
    ):
        AuthToken(token=Secret(token))
        principal = asyncio.run(login(server, token))
        assert (principal.name, principal.organisation) == (name, organisation)
        assert (principal.valid_until is None) == (name == "dashboard")
    assert add_token(file, "acme")
    names = [one.name for one in token_file(file).read().values()]
    assert names == ["token:acme:1", "dashboard", "token:My Org.:1", "token:acme:2"]


def test_wrong_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    token = add_token(file, "acme")
    server = live(file)
    assert refusal(server, TOKEN).reason_code == 0x86
    assert refusal(server, token, "other").reason_code == 0x86
    assert refusal(server, token, "").permanent
    with pytest.raises(Refused):
        asyncio.run(server.begin(PEER, Credentials(token, None)))
    for username in (None, "", "device-1", token[:-1], f"{token}\n"):
        assert isinstance(refusal(server, username), NotApplicable)
    assert token not in str(refusal(server, token, "other"))


def test_tokens_of_another_form(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{digest('key-1')}:acme::mine\n")
    server = live(file, pattern=r"key-\d+")
    assert asyncio.run(login(server, "key-1")).name == "mine"
    assert refusal(server, "key-2").reason_code == 0x86
    assert isinstance(refusal(server, TOKEN), NotApplicable)


def test_a_token_that_is_over(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{digest(TOKEN)}:acme:2020-01-01:old:one\n")
    error = refusal(live(file), TOKEN)
    assert error.reason_code == 0x87
    assert "the token old:one was valid until 2020-01-02T00:00:00Z" in str(error)


def test_a_token_is_over_from_its_end_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A date alone is to its end, in UTC."""
    file = tmp_path / "tokens"
    file.write_text(f"{digest(TOKEN)}:acme:2030-12-31:one\n")
    server, end = live(file), 1_924_992_000.0  # 2031-01-01T00:00:00Z
    now = [end - 0.001]
    monkeypatch.setattr("time.time", lambda: now[0])
    principal = asyncio.run(login(server, TOKEN))
    assert (principal.valid_until, principal.refusal()) == (end, "")
    own = AuthToken(token=Secret(TOKEN), expires="2030-12-31")
    asyncio.run(own.begin())
    now[0] = end
    assert "was valid until 2031-01-01T00:00:00Z" in principal.refusal()
    assert "was valid until 2031-01-01T00:00:00Z" in str(refusal(server, TOKEN))
    with pytest.raises(Refused, match="expired on 2031-01-01T00:00:00Z: nothing was sent"):
        asyncio.run(own.begin())


def test_a_token_that_ends_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    token = add_token(file, "acme")
    server = live(file)
    principal = asyncio.run(login(server, token))
    assert isinstance(principal, RevocablePrincipal)
    before = file.read_text()
    add_token(file, "acme")
    assert principal.refusal() == ""
    for text, said in (
        ("", "was revoked"),
        (before.replace("acme", "other"), "another name or organisation"),
        (f"{digest(token)}:acme:2020-01-01:token:acme:1\n", "was valid until"),
    ):
        file.write_text(text)
        assert said in principal.refusal()
    file.write_text("nonsense")
    file.write_text(before)
    assert principal.refusal() == ""


@pytest.mark.parametrize("until", ["", "2999-01-01", "2999-01-01T00:00:00Z", "2999-01-01T00:00:00+01:00"])
@pytest.mark.parametrize("name", ["a", "token:acme:1", "1:2", "2999-01-01"])
def test_names_and_dates_have_colons(tmp_path: Path, until: str, name: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{digest(TOKEN)}:acme:{until}:{name}\n")
    (token,) = token_file(file).read().values()
    assert token.name == name
    assert (token.valid_until is None) == (not until)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (TOKEN, "it is not sha256:"),
        (f"{digest(TOKEN)}:acme", "it is not sha256:"),
        (f"{digest(TOKEN)}:acme:soon:x", "it is not sha256:"),
        (f"{digest(TOKEN)}:acme:2026-13-01:x", "is not a date"),
        (f"{digest(TOKEN)}:a/b::x", "the organisation must not"),
        (f"{digest(TOKEN)}:acme::a/b", "the name of a token must not"),
    ],
)
def test_a_damaged_file(tmp_path: Path, line: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens"
    token = add_token(file, "acme")
    server = live(file)
    with file.open("a") as opened:
        opened.write(line)
    asyncio.run(login(server, token))
    (record,) = (one for one in caplog.records if one.levelno >= logging.ERROR)
    told = record.getMessage()
    assert f"{file} is damaged in line 2" in told
    assert said in told
    assert SECRET not in told
    assert digest(TOKEN) not in told
    with pytest.raises(ConnectorError, match="damaged in line 2"):
        TokenFile(file=file)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match="make it: python -m tesaiot_connect_auth_token new"):
        TokenFile(file=tmp_path / "tokens")
    with pytest.raises(ConnectorError, match="does not exist"):
        revoke_token(tmp_path / "tokens", "x")
    assert not list(tmp_path.iterdir())


# --- together -----------------------------------------------------------------------------


@asynccontextmanager
async def broker(server: TokenFile) -> AsyncIterator[Network]:
    network = Network()
    options = BrokerOptions(recheck=Duration(0.01))
    async with (
        asyncio.timeout(60),
        Broker(options).serving([ListenerSpec("pair", network.transport(), server)]),
    ):
        yield network


def client(network: Network, auth: AuthToken) -> Client:
    slow = Backoff(min=Duration(0.01), max=Duration(1000))
    return Client(Negotiator([network.transport()]), ClientOptions(reconnect=slow), auth=auth, name="c")


def test_rotation_during_a_run(tmp_path: Path) -> None:
    """Revoked while connected, refused, then replaced: the client comes back by itself."""
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    auth = AuthToken(token=kept(mine, add_token(tokens, "acme", name="dashboard")))

    async def main() -> None:
        async with broker(live(tokens, access=EVERYTHING)) as network, client(network, auth) as one:
            await one.connected()
            kept(mine, add_token(tokens, "acme", name="dashboard"))
            assert one.status.state == "connected"
            old = next(iter(token_file(tokens).read().values()))
            assert revoke_token(tokens, old.id) == 1
            while one.status.connects < 2:
                await asyncio.sleep(0.01)
            revoke_token(tokens, "dashboard")
            while one.status.state == "connected":
                await asyncio.sleep(0.01)
            with pytest.raises(Refused) as caught:
                while True:
                    await asyncio.sleep(0.01)
                    if one.status.state != "connected":
                        await one.connected()
            assert f"check `token` of this connection's `auth` (the file {mine})" in str(caught.value)
            assert "make a new one in Admin UI > Organization Settings > MQTT Tokens" in str(caught.value)
            assert caught.value.permanent
            kept(mine, "half of it")
            kept(mine, add_token(tokens, "acme", name="dashboard"))
            while one.status.connects < 3:
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_token_that_ends_while_connected(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    auth = AuthToken(token=Secret(TOKEN))

    async def main() -> None:
        end = dt.datetime.fromtimestamp(time.time() + 0.5, dt.UTC).isoformat()
        tokens.write_text(f"{digest(TOKEN)}:acme:{end}:short\n")
        async with broker(live(tokens, access=EVERYTHING)) as network, client(network, auth) as one:
            try:
                await one.connected(once=True)
            except Refused:  # a slow machine
                return
            while one.status.state == "connected":
                await asyncio.sleep(0.01)
            while "valid" not in one.status.last_error:
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_nothing_is_dialled_with_a_token_that_cannot_be_right(tmp_path: Path) -> None:
    auth = AuthToken(token=kept(tmp_path / "token", "nonsense"))
    network = Network()  # where nobody listens: dialling would say so

    async def main() -> None:
        async with asyncio.timeout(30), client(network, auth) as one:
            with pytest.raises(Refused, match="has not the form of a token"):
                await one.connected()
            kept(tmp_path / "token")
            with pytest.raises(Disconnected, match="pair"):
                while True:
                    await asyncio.sleep(0.01)
                    if "token" not in one.status.last_error:
                        raise Disconnected(one.status.last_error)

    asyncio.run(main())


# --- the command --------------------------------------------------------------------------


def test_the_hooks() -> None:
    assert plugin.tesaiot_auths() == {"token": AuthToken}
    assert plugin.tesaiot_authenticators() == {"token": TokenFile}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "tokens")
    assert command(["new", file, "--organisation", "acme"]) == 0
    out, err = capsys.readouterr()
    AuthToken(token=Secret(out.removesuffix("\n")))
    assert err.startswith("token:acme:1, until ")
    assert "90 days left" in err
    assert command(["new", file, "--organisation", "acme", "--name", "dashboard", "--days", "0"]) == 0
    assert command(["new", file, "--organisation", "acme", "--name", "dashboard", "--days", "7"]) == 0
    told = capsys.readouterr().err
    (other,) = re.findall(r"^([0-9a-f]{8}) has the same name: for ever", told, re.MULTILINE)
    assert command(["list", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "ORGANISATION", "VALID"]
    assert [line.split()[1] for line in lines[1:]] == ["dashboard", "dashboard", "token:acme:1"]
    assert len({line.index("acme  ") for line in lines[1:]}) == 1
    assert command(["revoke", file, other]) == 0
    assert capsys.readouterr().out == "revoked 1 token\n"
    assert command(["revoke", file, "dashboard"]) == 0
    assert command(["revoke", file, "token:acme:1"]) == 0
    assert command(["list", file]) == 0
    assert capsys.readouterr().out.endswith(f"no tokens in {file}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["revoke", "FILE", "nobody"], "there is no token 'nobody'"),
        (["revoke", "FILE-not-there", "x"], "does not exist"),
        (["list", "FILE-not-there"], "does not exist"),
        (["new", "FILE", "--organisation", "a/b"], "the organisation must not"),
        (["new", "FILE", "--organisation", "a", "--name", "a/b"], "the name of a token must not"),
        (["new", "FILE", "--organisation", "other", "--name", "taken"], "of the organisation 'acme'"),
        (["new", "FILE", "--organisation", "a", "--days", "-1"], "more than 0 days"),
        (["new", "nowhere/at/all", "--organisation", "a"], "cannot be written"),
    ],
)
def test_what_the_command_says_of_mistakes(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "FILE"
    add_token(file, "acme", name="taken")
    before = file.read_text()
    arguments = [str(tmp_path / one) if one.startswith(("FILE", "nowhere")) else one for one in arguments]
    assert command(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert said in told
    assert file.read_text() == before


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    assert "make a token, and print it once" in capsys.readouterr().out
