"""Passwords and tokens end to end: configuration files, a broker on a real socket, clients that log in."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner
from guides import REST, blocks

from tesaiot_connect import Broker, Client, FirstOf, Message, Refused, load
from tesaiot_connect.config.serving import load_server
from tesaiot_connect_auth_password import PasswordFile, add_user, remove_user
from tesaiot_connect_auth_token import TokenFile, add_token, revoke_token

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "guide" / "login.md").read_text(encoding="utf-8")
BLOCKS = blocks(PAGE, "toml")
TOKEN = "tesa_mqtt_acme_a1b2c3d4e5f6g7h8i9j0k1l2m3n4o5p6"
BROKER = """
[broker]
recheck = "50ms"
[listeners.tcp]
port = 0
auth = [
  { type = "token", file = "tokens" },
  { type = "password", file = "users" },
]
[[access.rules]]
publish = ["#"]
subscribe = ["#"]
"""
CLIENTS = """
[connections.device]
endpoints = ["mqtt://127.0.0.1:PORT"]
reconnect = { min = "10ms", max = "1000s" }
connect_timeout = "60s"
[connections.device.auth]
type = "password"
username = { env = "DEVICE" }
password = { command = [PYTHON, "-c", "print('pw')"], timeout = "60s" }

[connections.dashboard]
endpoints = ["mqtt://127.0.0.1:PORT"]
auth = { type = "token", token = { file = "token" } }
reconnect = { min = "10ms", max = "1000s" }
"""


def run_tool(*arguments: str | Path) -> tuple[int, str]:
    from tesaiot_connect.cli import command

    done = CliRunner().invoke(command, [str(one) for one in arguments], obj={"debug": False})
    return done.exit_code, done.output


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_both_at_one_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setenv("DEVICE", "device-1")
    users, tokens, mine = (tmp_path / name for name in ("users", "tokens", "token"))
    add_user(users, "device-1", "pw", organisation="acme")
    mine.write_text(add_token(tokens, "acme", name="dashboard"))
    mine.chmod(0o600)
    (tmp_path / "broker.toml").write_text(BROKER)
    server = load_server(tmp_path / "broker.toml")
    by_token, by_password = cast("FirstOf", server.listeners[0].authenticator).authenticators
    cast("TokenFile", by_token)._tokens.interval = 0
    cast("PasswordFile", by_password)._users.interval = 0

    async def main() -> None:
        async with asyncio.timeout(60), Broker(server.options).serving(server.listeners) as (address,):
            port = address.rpartition(":")[2]
            text = CLIENTS.replace("PORT", port).replace("PYTHON", f"'{sys.executable}'")
            (tmp_path / "clients.toml").write_text(text)
            made = load(
                tmp_path / "clients.toml",
                need_pipelines=False,
                overrides=[f'connections.{name}.protocol="{protocol}"' for name in ("device", "dashboard")],
            ).connections
            device, dashboard = (
                Client(one.dialer, one.options, auth=one.auth, name=name) for name, one in made.items()
            )
            async with device, dashboard, dashboard.subscribe(["devices/#"]) as reader:
                await dashboard.connected()
                reading = asyncio.create_task(reader.read())
                while not reading.done():
                    await device.publish([Message("devices/device-1/telemetry", b"1", 1)])
                    await asyncio.wait([reading], timeout=0.01)
                await (await reading).ack()

                # rotated during the run: the new token is taken at the next connection
                mine.write_text(add_token(tokens, "acme", name="dashboard"))
                first = tokens.read_text().splitlines()[0]
                revoke_token(tokens, first[:8])
                while dashboard.status.connects < 2:
                    await asyncio.sleep(0.01)

                # revoked while connected: refused, until there is another one
                revoke_token(tokens, "dashboard")
                while not dashboard.status.last_error.count(str(mine)):
                    await asyncio.sleep(0.01)
                with pytest.raises(Refused, match="make a new one in Admin UI"):
                    await dashboard.connected()
                mine.write_text(add_token(tokens, "acme", name="dashboard"))
                while dashboard.status.connects < 3:
                    await asyncio.sleep(0.01)

                remove_user(users, "device-1")
                while "`password` is the output of" not in device.status.last_error:
                    await asyncio.sleep(0.01)
                assert device.status.connects == 1

    asyncio.run(main())


def test_a_username_that_is_no_token_is_asked_of_the_password_file_alone(tmp_path: Path) -> None:
    """And the first that knows the sort of login decides."""
    add_user(tmp_path / "users", TOKEN, TOKEN)
    add_token(tmp_path / "tokens", "acme")
    (tmp_path / "broker.toml").write_text(BROKER)
    server = load_server(tmp_path / "broker.toml")

    async def main() -> None:
        async with asyncio.timeout(60), Broker(server.options).serving(server.listeners) as (address,):
            (tmp_path / "c.toml").write_text(
                f'connections.c.endpoints = ["{address}"]\n'
                f'connections.c.auth = {{ type = "password", username = "{TOKEN}", password = "{TOKEN}" }}\n'
            )
            one = load(tmp_path / "c.toml", need_pipelines=False).connections["c"]
            async with Client(one.dialer, one.options, auth=one.auth) as client:
                with pytest.raises(Refused, match="check `username` and `password` of this connection's"):
                    await client.connected()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("auth", "said"),
    [
        (
            '{ type = "token", token = "tesa_mqtt_acme_hunter2" }',
            "(tesa_mqtt_acme_…) has 7 characters behind",
        ),
        ('{ type = "token", token = "${LEAK}" }', "does not begin with tesa_mqtt_"),
        ('{ type = "token", token = 5 }', "expected a string or a table"),
        (
            '{ type = "token", token = { file = "t" }, expires = 2026-12-31 }',
            'Write it in quotes: "2026-12-31"',
        ),
        (
            '{ type = "token", token = { file = "t" }, expires = "soon" }',
            "connections.c.auth.expires: `expires`",
        ),
        ('{ type = "token", token = { file = "t" }, pattern = "(" }', "is not a regular expression"),
        ('{ type = "password", username = "u" }', "the key `password` is missing"),
        (
            '{ type = "password", username = "u", password = "" }',
            "connections.c.auth.password: `password` is empty",
        ),
        ('{ type = "password", username = "u", password = ["hunter2"] }', "got an array. Write"),
        ('{ type = "password", username = "u", pasword = "hunter2" }', "Did you mean 'password'?"),
        ('{ type = "password", username = "u", password = { file = "a", env = "B" } }', "are given"),
    ],
)
def test_lint_names_the_mistake_and_not_the_secret(
    tmp_path: Path, auth: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAK", "hunter2")
    file = tmp_path / "p.toml"
    file.write_text(f'[connections.c]\nendpoints = ["mqtt://h"]\nauth = {auth}\n')
    code, output = run_tool("lint", file)
    assert code == 78
    assert said in output
    assert f"{file}:3: connections.c.auth" in output
    assert "hunter2" not in output


def test_lint_names_the_line_of_a_damaged_account_file(tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text(BROKER)
    (tmp_path / "users").write_text("# mine\nu:hunter2\n")
    code, output = run_tool("lint", tmp_path / "broker.toml")
    assert code == 78
    assert f"the password file {tmp_path / 'users'} is damaged in line 2" in output
    assert f"the token file {tmp_path / 'tokens'} does not exist" in output
    assert "hunter2" not in output


@pytest.mark.parametrize("module", ["tesaiot_connect_auth_password", "tesaiot_connect_auth_token"])
def test_a_recipe_costs_little_to_import(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"argon2", "cryptography", "cattrs", "click", "tesaiot_connect.client"}


@pytest.mark.parametrize("module", ["tesaiot_connect_auth_password", "tesaiot_connect_auth_token"])
def test_the_writers_run_as_modules(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"usage: python -m {module}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_configurations_of_the_login_page_are_right(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MQTT_API_TOKEN", TOKEN)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/pipeline.service")
    add_user(tmp_path / "users", "device-1", "pw", organisation="acme")
    add_token(tmp_path / "tokens", "acme")
    text = BLOCKS[block]
    config = tmp_path / "config.toml"
    config.write_text(text if "[listeners" in text else text + REST)
    code, output = run_tool("lint", config)
    assert code == 0, output


def test_every_message_of_the_login_page_is_one_that_is_said() -> None:
    """The first column of the table is what a person looks for in it."""
    rows = re.findall(r"^\| ([^|]+) \|", PAGE.split("## When something goes wrong")[1], re.MULTILINE)[1:]
    sources = [*ROOT.glob("plugins/auth_*/src/**/*.py"), *ROOT.glob("core/src/**/*.py")]
    said = re.sub(r'"\s*\n\s*f?"', "", " ".join(path.read_text(encoding="utf-8") for path in sources))
    parts = [part.strip(' ,:()"`') for row in rows for part in re.split(r"\d+|…|-{3,}", row)]
    assert len(rows) > 5
    assert not [part for part in parts if part not in said]
