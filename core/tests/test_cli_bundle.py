"""`bundle show`, and a bundle where a URL or a file is expected."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest

from tesaiot_connect import Broker, BrokerOptions, Client, Credentials, ListenerSpec, Peer, Principal, Url
from tesaiot_connect.access import Anybody
from tesaiot_connect.cli import execute
from tesaiot_connect.config import bundle_connection
from tesaiot_connect.testing import Certificates

PASSWORD = "s3cret-of-the-file"
CONFIG = """\
{
  "protocol": "mqtts",
  "host": "localhost",
  "port": 8883,
  "transport": "tcp",
  "auth": {"method": "username_password", "username": "d1", "password": "<from_bundle>"},
  "connection": {"keepalive": 60, "clean_session": true}
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "MQTT_API_TOKEN",
        "MQTT_BROKER_URL",
        "TESAIOT_HOST",
        "TESAIOT_DEVICE_ID",
        "TESAIOT_PASSWORD",
    ):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "d1"
    folder.mkdir()
    (folder / "mqtt-quic-config.json").write_text(CONFIG)
    (folder / ".env").write_text(f"TESAIOT_PASSWORD={PASSWORD}\n")
    return folder


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ca-chain.pem").write_text("PEM")
    assert execute(["bundle", "show", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == str(folder)
    rows = [line.split(maxsplit=2) for line in captured.out.splitlines()[2:]]
    assert rows[0] == ["key", "value", "from"]
    assert ["endpoints[0]", "mqtts://localhost:8883", "mqtt-quic-config.json: transport, host, port"] in rows
    assert ["auth.password", "***", ".env: TESAIOT_PASSWORD"] in rows
    assert ["tls.ca_file", str(folder / "ca-chain.pem"), "default: ca-chain.pem of the bundle"] in rows
    assert ["connect_timeout", "10s", "default"] in rows
    assert ["clean_session", "true", "mqtt-quic-config.json: connection.clean_session"] in rows
    assert PASSWORD not in captured.out + captured.err


def test_show_as_json(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (folder / "mqtt-quic-config.json").read_text().replace('"port": 8883', '"prot": 8883')
    (folder / "mqtt-quic-config.json").write_text(text)
    (folder / ".env").unlink()
    variables = tmp_path / "variables"
    variables.write_text(f"TESAIOT_PASSWORD={PASSWORD}\n")
    assert execute(["bundle", "show", str(folder), "--json", "--env-file", str(variables)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    settings = {one["key"]: one for one in document["settings"]}
    assert settings["auth.password"] == {
        "key": "auth.password",
        "value": "***",
        "from": "environment variable TESAIOT_PASSWORD",
        "secret": True,
        "given": True,
    }
    assert settings["clean_session"]["value"] is True
    assert settings["endpoints[0]"]["value"] == "mqtts://localhost"
    (warning,) = document["warnings"]
    assert warning.endswith("mqtt-quic-config.json:4: prot: unknown key, not used. Did you mean 'port'?")
    assert warning in captured.err
    assert PASSWORD not in captured.out + captured.err


def test_show_says_all_that_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG.replace('"localhost"', "1").replace('"tcp"', '"udp"')
    (folder / "mqtt-quic-config.json").write_text(text)
    assert execute(["bundle", "show", str(folder)]) == 78
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line.partition(" ")[0].removeprefix(f"{folder}/") for line in lines[:2]] == [
        "mqtt-quic-config.json:3:",
        "mqtt-quic-config.json:5:",
    ]
    assert lines[2:] == ["2 problems"]
    assert captured.out == ""


def test_a_bundle_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "nowhere")
    for arguments in (["bundle", "show", missing], ["sub", missing, "#"], ["pub", missing + "/", "t", "x"]):
        assert execute(arguments) == 78
        told = capsys.readouterr().err
        assert f"{missing}: there is no such folder. Download the bundle" in told
        assert "tesaiot-connect sandbox DIR" in told


# --- against a broker -------------------------------------------------------------------------


@attrs.frozen
class Door:
    """An authenticator that lets everybody in, and remembers what they said."""

    seen: list[tuple[str | None, bytes | None]] = attrs.field(factory=list)

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        self.seen.append((credentials.username, credentials.password))
        return Anybody()


@asynccontextmanager
async def broker(folder: Path, certificates: Certificates, door: Door) -> AsyncIterator[str]:
    """Serves with TLS, and completes the bundle so that it leads there; gives the URL."""
    transport = pytest.importorskip("tesaiot_connect_tcp_tls").TcpTls
    pytest.importorskip("tesaiot_connect_auth_password")
    recipe = transport(Url("mqtts", "127.0.0.1"), server_tls=certificates.server())
    shutil.copy(certificates.ca_file, folder / "ca-chain.pem")
    async with Broker(BrokerOptions()).serving([ListenerSpec("tls", recipe, door)]) as (url,):
        config = json.loads(CONFIG) | {"host": "127.0.0.1", "port": Url.parse(url).port}
        (folder / "mqtt-quic-config.json").write_text(json.dumps(config))
        yield url


def test_a_secret_in_env_is_read_at_each_connect(folder: Path, tmp_path: Path) -> None:
    """A password that is changed in .env counts from the next connect on; nothing is restarted."""
    door, certificates = Door(), Certificates(tmp_path / "certificates")

    async def main() -> None:
        async with broker(folder, certificates, door):
            made = bundle_connection(folder)
            for password in (PASSWORD, "rotated"):
                (folder / ".env").write_text(f'TESAIOT_PASSWORD="{password}"\n')
                async with Client(made.dialer, made.options, auth=made.auth) as client:
                    await client.connected(once=True)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert door.seen == [("d1", PASSWORD.encode()), ("d1", b"rotated")]


def test_commands_take_a_bundle(folder: Path, tmp_path: Path) -> None:
    door, certificates = Door(), Certificates(tmp_path / "certificates")

    async def command(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tesaiot_connect", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=tmp_path,
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err
        return out.decode()

    async def main() -> None:
        async with broker(folder, certificates, door) as url:
            assert (await command("check", "d1")).startswith("d1  ok  ")
            await command("pub", "d1/", "t", "x", "--set", "auth.username=other")
            await command("pub", url, "t", "x", "--set", "bundle=d1")

    asyncio.run(asyncio.wait_for(main(), 60))
    assert [name for name, _ in door.seen] == ["d1", "other", "d1"]


def test_the_variables_of_env_file_are_for_set_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tesaiot_connect_tcp_tls")
    (tmp_path / "more.env").write_text("TESAIOT_TEST_KEEPALIVE=soon\n")
    command = ["pub", "mqtt://127.0.0.1:1", "t", "x", "--set", "keepalive=${TESAIOT_TEST_KEEPALIVE}"]
    assert execute(command) == 78
    assert "TESAIOT_TEST_KEEPALIVE is not set" in capsys.readouterr().err
    assert execute([*command, "--env-file", str(tmp_path / "more.env")]) == 78
    assert "keepalive: expected a duration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["pub", "mqtt://h", "a/#", "x"], 2, "'a/#': + and # are for subscriptions"),
        (["pub", "broker.example", "a", "x"], 78, "'broker.example' is neither a URL nor a folder"),
        (["sub", "broker.example:1883", "a"], 78, "Write a URL, such as mqtts://broker.example:1883,"),
        (["bundle", "devices/d1"], 2, "Write: tesaiot-connect bundle show DIR"),
    ],
)
def test_what_a_wrong_argument_should_have_been(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(arguments) == code
    assert says in capsys.readouterr().err
