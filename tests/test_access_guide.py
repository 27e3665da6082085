"""The guide's platform with organisations, as it stands there."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from pathlib import Path

from engine_peer import EnginePeer

from tesaiot_connect import Message, Url
from tesaiot_connect.config.serving import load_server
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.server import Broker
from tesaiot_connect.testing import Certificates
from tesaiot_connect.tls import TlsOptions
from tesaiot_connect_tcp_tls import TcpTls

PAGE = (Path(__file__).resolve().parents[1] / "docs/guide/access.md").read_text(encoding="utf-8")


def command(line: str, folder: Path, said: str = "") -> str:
    words = shlex.split(line.replace("tesaiot-connect", "-m tesaiot_connect").removeprefix("python "))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_platform_of_the_guide(tmp_path: Path, certificates: Certificates) -> None:
    platform, organisations = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "platform.toml").write_text(platform)
    (tmp_path / "organisations.toml").write_text(organisations)
    tls = certificates.server()
    for name, source in (("server.pem", tls.certificate), ("server.key", tls.key)):
        (tmp_path / name).write_bytes(Path(str(source)).read_bytes())
    block = next(one for one in re.findall(r"\n\n```\n(.*?)```", PAGE, re.DOTALL) if "users device-1" in one)
    *accounts, check, start = block.splitlines()
    assert start == "tesaiot-connect serve platform.toml"
    accounts += [accounts[0].replace("device-1", "device-2"), accounts[0].replace("device-1", "device-9")]
    accounts[-1] = accounts[-1].replace("acme", "other")
    accounts.append(next(line for line in accounts if "auth_token" in line).replace("acme", "other"))
    tokens = {}
    for line in accounts:
        if "auth_password" in line:
            command(f"{line} --stdin", tmp_path, "a good password\n")
        else:
            found = re.search(r"tesa_mqtt_\w+", command(line, tmp_path))
            assert found
            tokens[line.rpartition(" ")[2]] = found[0]
    assert "warning" not in command(check, tmp_path)
    asyncio.run(story(tmp_path, tokens, TlsOptions(ca_file=certificates.ca_file)))


async def story(folder: Path, tokens: dict[str, str], trust: TlsOptions) -> None:
    config = load_server(folder / "platform.toml", overrides=["listeners.tls.url=mqtts://127.0.0.1:0"])
    assert config.warnings == ()
    async with asyncio.timeout(60), Broker(config.options).serving(config.listeners) as (address,):

        async def enter(user: str, password: str = "a good password") -> EnginePeer:
            transport = TcpTls(Url.parse(address), tls=trust)
            peer = await EnginePeer.open(transport, user, username=user, password=password.encode())
            await peer.connack()
            return peer

        ours, theirs = [await enter(tokens[one], tokens[one]) for one in ("acme", "other")]
        operator = await enter("operator")
        for peer in (ours, theirs):
            assert await peer.subscribe("devices/+/telemetry", qos=1) == (1,)
            assert await peer.subscribe("#") == (R.NOT_AUTHORIZED,)
        assert await operator.subscribe("#", qos=1) == (1,)
        devices = {}
        for name in ("device-1", "device-2", "device-9"):
            devices[name] = device = await enter(name)
            assert await device.subscribe(f"devices/{name}/commands/#", qos=1) == (1,)
            for other in ("device-1", "device-2", "device-9"):
                await device.publish(Message(f"devices/{other}/telemetry", name.encode(), 1))
            assert list(device.refused.values()) == [R.NOT_AUTHORIZED] * 2
        await ours.publish(Message("devices/device-1/commands/x", b"go", 1))
        assert (await devices["device-1"].received(1))[0].payload == b"go"
        await theirs.publish(Message("devices/device-1/commands/x", b"stop", 1))
        assert list(theirs.refused.values()) == [R.NOT_AUTHORIZED]
        assert [one.payload for one in await ours.received(2)] == [b"device-1", b"device-2"]
        assert [one.payload for one in await theirs.received(1)] == [b"device-9"]
        assert len(await operator.received(4)) == 4
        for peer in (ours, theirs, operator, *devices.values()):
            assert peer.messages == []
            peer.connection.abort()
            await peer.connection.wait_closed()


def test_the_program_of_the_guide() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "access.md", "exec"), {})
