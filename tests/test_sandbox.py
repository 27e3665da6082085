"""The sandbox from nothing, as a process: every way in, every account, and what a kill leaves."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import re
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sandbox_process import TOOL, SandboxProcess

from tesaiot_connect import (
    Client,
    Message,
    PartialDelivery,
    PluginError,
    Reader,
    Refused,
    hookspecs,
    plugins,
    sandbox as sandbox_package,
)
from tesaiot_connect.cli import execute
from tesaiot_connect.config import bundle_connection
from tesaiot_connect.config.document import read_env_file
from tesaiot_connect.plugins import Catalog
from tesaiot_connect.sandbox import SandboxOptions

READINGS = ["device/+/telemetry/#"]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    """acme with device-1 and device-2, globex with device-3 and device-4; in a folder that needs quotes."""
    folder = tmp_path_factory.mktemp("sandbox") / (
        "it's $HOME" if sys.platform == "win32" else 'a "$b"\'s 😀'
    )
    options = ("--devices", "2", "--organisation", "acme", "--organisation", "globex")
    with SandboxProcess(folder, *options) as running:
        yield running


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(main())


@asynccontextmanager
async def client(folder: Path, *overrides: str, url: str = "") -> AsyncIterator[Client]:
    own = [f"endpoints=[{json.dumps(url)}]"] if url else []
    made = bundle_connection(folder, overrides=[*own, *overrides], environ={})
    async with Client(made.dialer, made.options, auth=made.auth) as opened:
        yield opened


@asynccontextmanager
async def reading(client: Client, *filters: str) -> AsyncIterator[Reader]:
    """A reader whose subscription is made: what is published from now on comes."""
    async with client.subscribe(list(filters or READINGS)) as reader:
        await client.connected()
        with contextlib.suppress(PartialDelivery):  # refused, and so answered, after SUBSCRIBE
            await client.publish([Message("nowhere", b"", 1)])
        yield reader


def report(**data: object) -> bytes:
    return json.dumps({"timestamp": "2026-01-01T00:00:00Z", "data": data}).encode()


async def take(reader: Reader, count: int) -> list[Message]:
    found: list[Message] = []
    while len(found) < count:
        delivery = await reader.read()
        found += delivery.batch.messages
        await delivery.ack()
    return found


# --- what is there ------------------------------------------------------------------------


def test_the_folder(sandbox: SandboxProcess) -> None:
    folder = sandbox.folder
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    mine = {"mqtt-quic-config.json", "ca-chain.pem", ".env", ".env.example", "QUICKSTART.md"}
    wanted = {"platform.toml", "ca/ca.pem", "ca/ca.key", "server.pem", "server.key", "users", "tokens"}
    wanted |= {
        f"devices/device-{n}/{name}" for n in (1, 2, 3, 4) for name in (*mine, "client.pem", "client.key")
    }
    wanted |= {f"{place}/{name}" for place in ("organisation", "organisation-globex") for name in mine}
    wanted |= {"organisations.toml", "organisation/pipeline.toml", "organisation-globex/pipeline.toml"}
    assert wanted <= files
    assert sandbox.said["organisations"] == {
        "acme": ["device-1", "device-2"],
        "globex": ["device-3", "device-4"],
    }
    assert sandbox.said["missing"] == []
    assert list(sandbox.urls) == ["quic", "tls", "wss"]
    assert sandbox.urls["wss"].endswith("/mqtt")
    if sys.platform != "win32":
        for name in files:
            if name.endswith((".key", "/.env")) or name.partition("-")[0] in ("users", "tokens", "broker.db"):
                assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name


def test_the_configuration_of_a_device_has_the_keys_of_the_platform(sandbox: SandboxProcess) -> None:
    folder = sandbox.folder / "devices" / "device-1"
    config = json.loads((folder / "mqtt-quic-config.json").read_text())
    port = int(sandbox.urls["quic"].rpartition(":")[2])
    assert (config["protocol"], config["host"], config["port"]) == ("mqtts", "localhost", port)
    assert config["transport"] == "quic"
    assert config["tls"]["ca_file"] == "ca-chain.pem"
    assert config["auth"] == {"method": "username_password", "username": "device-1"}
    password = re.search(r"TESAIOT_PASSWORD=(.+)", (folder / ".env").read_text())
    assert password is not None
    others = [file for file in sandbox.folder.rglob("*") if file.is_file() and file != folder / ".env"]
    assert not [file for file in others if password[1].encode() in file.read_bytes()], "it is in one place"


def test_the_files_that_it_writes_are_right(sandbox: SandboxProcess) -> None:
    folder = sandbox.folder
    files = [folder / "platform.toml", folder / "organisation" / "pipeline.toml"]
    done = subprocess.run([TOOL, "lint", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_device_s_quickstart_says_works_as_it_is(sandbox: SandboxProcess, tmp_path: Path) -> None:
    """Each block as it stands there, from another folder; what reads for ever is left out."""
    text = (sandbox.folder / "devices" / "device-1" / "QUICKSTART.md").read_text()
    shell = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if " pub " in block]
    python = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert (len(shell), len(python)) == (2, 1)

    async def test() -> None:
        async with client(sandbox.folder / "organisation") as watching, reading(watching) as reader:
            for command in [[TOOL, *shlex.split(block)[1:]] for block in shell]:
                done = await asyncio.create_subprocess_exec(*command, cwd=tmp_path)
                assert await done.wait() == 0
            done = await asyncio.create_subprocess_exec(sys.executable, "-c", python[0], cwd=tmp_path)
            assert await done.wait() == 0
            found = await take(reader, 5)
        topics = [message.topic for message in found]
        assert topics.count("device/device-1/telemetry/temperature") == 3
        assert topics.count("device/device-1/telemetry/humidity") == 2

    run(test)


def test_what_an_organisation_s_quickstart_says_works_as_it_is(
    sandbox: SandboxProcess, tmp_path: Path
) -> None:
    """A device speaks until everybody has heard it, and the row is in the database."""
    folder = sandbox.folder / "organisation"
    text = (folder / "QUICKSTART.md").read_text()
    start, sub, pipeline, show = (
        [TOOL, *shlex.split(block)[1:]] for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    )
    assert start == [TOOL, "sandbox", str(sandbox.folder)]
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    async def speak(until: asyncio.Event) -> None:
        async with client(sandbox.folder / "devices" / "device-2") as device:
            while not until.is_set():
                await device.publish([Message("devices/device-2/telemetry", report(rssi=-70), 1)])
                await asyncio.sleep(0.05)

    def stored() -> bool:
        with contextlib.closing(sqlite3.connect(folder / "telemetry.db")) as database:
            with contextlib.suppress(sqlite3.OperationalError):  # there is no table before the first row
                found = database.execute("SELECT device_id, sensor_type, value, unit FROM telemetry")
                return ("device-2", "rssi", -70, "dBm") in found.fetchall()
        return False

    async def test() -> None:
        pipe, where = asyncio.subprocess.PIPE, {"cwd": tmp_path}
        listening = [
            await asyncio.create_subprocess_exec(*sub, stdout=pipe, **where),
            await asyncio.create_subprocess_exec(sys.executable, "-u", "-c", python, stdout=pipe, **where),
        ]
        running = await asyncio.create_subprocess_exec(*pipeline, **where)
        heard = asyncio.Event()
        speaking = asyncio.create_task(speak(heard))
        try:
            (printed, shown) = [await one.stdout.readline() for one in listening if one.stdout is not None]
            assert printed.startswith(b'device/device-2/telemetry/rssi {"value":-70,"unit":"dBm"')
            assert shown == b"device-2 rssi -70 dBm\n"
            while not stored():
                await asyncio.sleep(0.02)
            assert running.returncode is None
        finally:
            heard.set()
            for process in (*listening, running):
                process.terminate()
            for process in (*listening, running):
                await process.communicate()
            await speaking
        assert running.returncode == 0 or sys.platform == "win32"

    run(test)
    done = subprocess.run(show, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tesa_mqtt_" not in done.stdout + done.stderr


# --- every way in -------------------------------------------------------------------------

WAYS = [("quic", ()), ("tls", ()), ("wss", ()), ("tls", ("auth.type=mtls",)), ("wss", ("auth.type=mtls",))]


def test_devices_come_by_every_way_and_the_organisation_reads_by_websocket(sandbox: SandboxProcess) -> None:
    async def test() -> None:
        async with client(sandbox.folder / "organisation") as watching:
            assert watching.status.transport == ""
            async with reading(watching, *READINGS, "devices/+/telemetry") as reader:
                assert watching.status.transport == "wss"
                for number, (way, own) in enumerate(WAYS):
                    device = sandbox.folder / "devices" / "device-1"
                    async with client(device, *own, url=sandbox.urls[way]) as sending:
                        await sending.publish([Message("devices/device-1/telemetry", report(co2=number), 1)])
                        assert sending.status.transport == {"quic": "quic_aioquic", "tls": "tcp_tls"}.get(
                            way, way
                        )
                found = await take(reader, 2 * len(WAYS))
        routed = [one for one in found if one.topic == "device/device-1/telemetry/co2"]
        assert [json.loads(one.payload) for one in routed] == [
            {"value": number, "unit": "ppm", "timestamp": "2026-01-01T00:00:00Z"}
            for number in range(len(WAYS))
        ]
        assert {one.qos for one in routed} == {1}
        reports = [one for one in found if one.topic == "devices/device-1/telemetry"]
        assert [json.loads(one.payload)["data"]["co2"] for one in reports] == list(range(len(WAYS)))

    run(test)


def test_commands_reach_the_device(sandbox: SandboxProcess) -> None:
    async def test() -> None:
        device = sandbox.folder / "devices" / "device-2"
        async with client(device) as listening, reading(listening, "devices/device-2/commands/#") as reader:
            async with client(sandbox.folder / "organisation") as operator:
                await operator.publish([Message("devices/device-2/commands/reboot", b"now", 1)])
                with pytest.raises(PartialDelivery):
                    await operator.publish([Message("devices/device-3/commands/reboot", b"now", 1)])
            (found,) = await take(reader, 1)
        assert (found.topic, found.payload) == ("devices/device-2/commands/reboot", b"now")

    run(test)


def test_nobody_gets_at_what_is_another_s(sandbox: SandboxProcess) -> None:
    device = sandbox.folder / "devices" / "device-1"

    async def test() -> None:
        for topic_filter in ("device/+/telemetry/#", "devices/+/telemetry", "devices/device-2/#", "#"):
            async with client(device) as curious, curious.subscribe([topic_filter]) as reader:
                with pytest.raises(Refused):
                    await reader.read()
        async with client(device) as forging:
            for topic in ("devices/device-2/telemetry", "device/device-1/telemetry/temperature", "x"):
                with pytest.raises(PartialDelivery):
                    await forging.publish([Message(topic, report(co2=1), 1)])

        acme, globex = sandbox.folder / "organisation", sandbox.folder / "organisation-globex"
        async with client(acme) as one, client(globex) as two, reading(one) as ours, reading(two) as theirs:
            for name in ("device-1", "device-3"):
                async with client(sandbox.folder / "devices" / name) as sending:
                    await sending.publish([Message(f"devices/{name}/telemetry", report(level=1), 1)])
            assert [message.topic for message in await take(ours, 1)] == ["device/device-1/telemetry/level"]
            assert [message.topic for message in await take(theirs, 1)] == ["device/device-3/telemetry/level"]

    run(test)


@pytest.mark.parametrize(
    "own", ['auth={type="password", username="device-1", password="wrong"}', "auth.username=device-9"]
)
def test_a_wrong_password_is_refused(sandbox: SandboxProcess, own: str) -> None:
    async def test() -> None:
        async with client(sandbox.folder / "devices" / "device-1", own) as intruder:
            with pytest.raises(Refused):
                await intruder.connected()

    run(test)


# --- again and again ----------------------------------------------------------------------


def test_nothing_is_lost_by_a_kill_and_a_second_start_goes_on(tmp_path: Path) -> None:
    """What was acknowledged to the device before the kill is delivered, routed, after it."""
    folder = tmp_path / "platform"
    device, organisation = folder / "devices" / "device-1", folder / "organisation"
    session = ('client_id="archive"', "clean_session=false")
    count = 200

    async def subscribe() -> None:
        async with client(organisation, *session) as watching, reading(watching):
            pass

    async def send(started: asyncio.Event, acknowledged: list[int]) -> None:
        async with client(device) as sending:
            for number in range(count):
                await sending.publish([Message("devices/device-1/telemetry", report(n=number, m=number), 1)])
                acknowledged.append(number)
                if number == count // 4:
                    started.set()

    async def kill_meanwhile(sandbox: SandboxProcess) -> list[int]:
        started, acknowledged = asyncio.Event(), list[int]()
        sending = asyncio.create_task(send(started, acknowledged))
        await started.wait()
        sandbox.kill()
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
        return acknowledged

    async def collect(wanted: set[tuple[str, int]]) -> None:
        found: set[tuple[str, int]] = set()
        async with client(organisation, *session) as watching:
            async with watching.subscribe(READINGS) as reader:
                while not wanted <= found:
                    for message in await take(reader, 1):
                        found.add((message.topic[-1], json.loads(message.payload)["value"]))

    def kept() -> dict[str, bytes]:
        files = [*folder.rglob("*.pem"), *folder.rglob("*.key"), folder / "users", folder / "tokens"]
        return {str(file): file.read_bytes() for file in (*files, device / ".env", organisation / ".env")}

    sandbox = SandboxProcess(folder, "--devices", "1")
    with sandbox:
        before = kept()
        asyncio.run(asyncio.wait_for(subscribe(), 60))
        acknowledged = asyncio.run(asyncio.wait_for(kill_meanwhile(sandbox), 60))
        assert len(acknowledged) < count, "the kill came in between"
        sandbox.start()
        now = kept()
        assert now.pop(str(organisation / ".env")) != before.pop(str(organisation / ".env")), "another port"
        assert now == before
        asyncio.run(asyncio.wait_for(collect({(name, one) for name in "nm" for one in acknowledged}), 60))
        assert sandbox.stop() == 0 or sys.platform == "win32"


def test_simulated_devices_are_heard(tmp_path: Path) -> None:
    async def test() -> None:
        seen: set[str] = set()
        async with client(tmp_path / "platform" / "organisation") as watching:
            async with watching.subscribe(READINGS) as reader:
                while len(seen) < 6:
                    seen |= {message.topic for message in await take(reader, 1)}
        sensors = ("temperature", "humidity", "pressure")
        assert seen == {f"device/device-{n}/telemetry/{sensor}" for n in (1, 2) for sensor in sensors}

    options = ("--devices", "2", "--simulate-over", "wss", "--interval", "50ms")
    with SandboxProcess(tmp_path / "platform", *options) as sandbox:
        run(test)
        assert sandbox.stop() == 0 or sys.platform == "win32"
        assert "device-1-simulated" in sandbox.log.read_text()


def test_a_port_that_is_taken(
    sandbox: SandboxProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = sandbox.urls["tls"].rpartition(":")[2]
    others = ("--quic-port", "0", "--wss-port", "0")
    assert execute(["sandbox", str(tmp_path / "p"), "--devices", "1", "--tls-port", port, *others]) == 1
    told = capsys.readouterr().err
    assert f"port {port}" in told
    assert "--tls-port 0" in told


# --- what is wrong with a folder ----------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "platform"
    assert execute(["sandbox", str(folder), "--devices", "1", "--init-only", "--json"]) == 0
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "platform"))


def initialise(folder: Path, *options: str) -> int:
    return execute(["sandbox", str(folder), "--devices", "1", "--init-only", *options])


def test_init_only_writes_and_ends(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert initialise(copy) == 0
    said = capsys.readouterr().out
    assert "quic://localhost:14567" in said
    assert "wss://localhost:8085/mqtt" in said
    assert f"start it:\n\n  tesaiot-connect sandbox {copy}\n" in said
    assert "Ctrl-C" not in said
    assert f"tesaiot-connect run {copy / 'organisation' / 'pipeline.toml'}" in said


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("users", b"device-1 without a hash\n"),
        ("users", b"\xff\xfe"),
        ("tokens", b"nonsense\n"),
        ("organisations.toml", b"acme = ["),
        ("organisations.toml", b'acme = "device-1"'),
        ("organisations.toml", b'acme = ["../../etc"]'),
        ("organisations.toml", b'acme = ["d"]\nglobex = ["d"]'),
        ("server.pem", b""),
        ("server.key", b"nonsense"),
        ("ca/ca.key", b"nonsense"),
        ("devices/device-1/.env", b"\xff\xfe"),
        ("devices/device-1/.env", b"no assignment"),
        ("devices/device-1/client.pem", b"nonsense"),
        ("organisation/.env", b"no assignment"),
    ],
)
def test_a_damaged_file_is_named(
    copy: Path, name: str, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).write_bytes(damage)
    if name in ("users", "tokens"):  # a running sandbox reads them too; here they are written to
        (copy / "devices" / "device-1" / ".env").unlink()
        (copy / "organisation" / ".env").unlink()
    assert initialise(copy) == 1
    told = capsys.readouterr().err
    assert str(copy / name) in told
    assert re.search("damaged|cannot be read", told)
    assert "delete the sandbox's whole folder" in told or "correct the line" in told


def test_what_is_missing_is_made_again(copy: Path) -> None:
    env = (copy / "devices" / "device-1" / ".env").read_text()
    token = (copy / "organisation" / ".env").read_text()
    for name in ("users", "server.key", "organisation/.env", "organisations.toml", "platform.toml"):
        (copy / name).unlink()
    assert initialise(copy, "--json") == 0
    assert (copy / "users").read_text().startswith("device-1:")
    assert (copy / "devices" / "device-1" / ".env").read_text() == env, "the password stays"
    assert (copy / "organisation" / ".env").read_text() != token


def test_a_password_of_one_s_own_stays_as_it_is(copy: Path) -> None:
    env = copy / "devices" / "device-1" / ".env"
    line = """TESAIOT_PASSWORD='it\\'s "a" #b\\\\'"""
    env.write_text(re.sub("TESAIOT_PASSWORD=.*", lambda _: line, env.read_text()))
    before = read_env_file(env)["TESAIOT_PASSWORD"]
    assert before == """it's "a" #b\\"""
    for _ in range(2):
        assert initialise(copy, "--json") == 0
        assert read_env_file(env)["TESAIOT_PASSWORD"] == before


def test_a_token_that_is_over_is_renewed(copy: Path) -> None:
    tokens, env = copy / "tokens", copy / "organisation" / ".env"
    before = env.read_text()
    tokens.write_text(re.sub(r":\d{4}-\d\d-\d\dT[\d:]+Z:", ":2026-01-01T00:00:00Z:", tokens.read_text()))
    assert initialise(copy, "--json") == 0
    assert env.read_text() != before


def test_more_devices_and_organisations_are_added(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--devices", "2", "--organisation", "acme", "--organisation", "globex", "--init-only", "--json"]
    capsys.readouterr()
    assert execute(["sandbox", str(copy), *more]) == 0
    assert json.loads(capsys.readouterr().out)["organisations"] == {
        "acme": ["device-1", "device-2"],
        "globex": ["device-3", "device-4"],
    }
    assert initialise(copy, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["bundles"]) == 6, "and stay"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "--expose"),
        (["--host", "192.0.2.1"], "--expose"),
        (["--interval", "5"], "a duration"),
        (["--devices", "0"], "--devices"),
        (["--tls-port", "70000"], "--tls-port"),
    ],
)
def test_a_wrong_option(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["sandbox", str(tmp_path / "p"), "--init-only", *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--organisation", "Ac me"], "cannot be the name of an organisation"),
        (["--expose", "--host", "a b"], "no address to listen on"),
        (["--expose", "--host", "ünï"], "no address to listen on"),
        (["--expose", "--host", ""], "no address to listen on"),
    ],
)
def test_a_name_that_cannot_be_one(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert initialise(tmp_path / "p", *options) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "p" / "ca").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert initialise(tmp_path / b"\xff".decode("utf-8", "surrogateescape")) == 1
    assert "is not UTF-8" in capsys.readouterr().err


def test_a_folder_of_somebody_else_stays_as_it_is(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "platform.toml").write_text("# mine\n")
    (copy / "organisations.toml").unlink()
    assert initialise(copy) == 1
    assert "platform.toml is not the sandbox's" in capsys.readouterr().err
    assert (copy / "platform.toml").read_text() == "# mine\n"
    assert not (copy / "organisations.toml").exists()


def test_a_folder_with_other_things_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    assert initialise(tmp_path) == 1
    assert "holds other things, such as thesis.txt" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_on_one_folder(sandbox: SandboxProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither may the second one run, nor give the bundles other addresses."""
    bundle = sandbox.folder / "organisation" / ".env"
    before = bundle.read_text()
    assert initialise(sandbox.folder) == 1
    assert "another sandbox uses" in capsys.readouterr().err
    assert execute(["sandbox", str(sandbox.folder), "--quic-port", "0"]) == 1
    assert "another sandbox uses" in capsys.readouterr().err
    assert bundle.read_text() == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_start_that_takes_long(tmp_path: Path) -> None:
    """A thousand passwords take most of a minute."""
    folder, words = tmp_path / "p", ["--devices", "1000", "--tls-port", "0"]
    process = subprocess.Popen([TOOL, "sandbox", folder, *words], stderr=subprocess.PIPE, text=True)
    while not (folder / "users").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.strip()) == (130, "")
    assert not (folder / "devices" / "device-1000").exists()


def without(*packages: str) -> Catalog:
    points = importlib.metadata.entry_points(group=hookspecs.GROUP)
    return plugins.load(point for point in points if point.value.partition(":")[0] not in packages)


def test_what_is_not_installed_is_left_out(tmp_path: Path) -> None:
    catalog = without(*(f"tesaiot_connect_{name}" for name in ("quic_aioquic", "wss", "auth_mtls")))
    estate, urls = sandbox_package.initialise(SandboxOptions(folder=tmp_path / "p", devices=1), catalog)
    assert dict(urls) == {"tls": "mqtts://localhost:8883"}
    assert [words.partition(":")[0] for words in estate.missing] == [
        "no quic", "no wss", "no client certificates"
    ]  # fmt: skip
    assert all("pip install tesaiot-connect-" in words for words in estate.missing)
    platform = (estate.folder / "platform.toml").read_text()
    assert "mtls" not in platform and "client_certificate" not in platform
    told = (estate.devices[0].folder / "QUICKSTART.md").read_text()
    told += str(sandbox_package.next_steps(estate, urls))
    assert "mtls" not in told and "quic://" not in told and "wss://" not in told


@pytest.mark.parametrize("kind", ["password", "token"])
def test_without_accounts_there_is_no_sandbox(tmp_path: Path, kind: str) -> None:
    with pytest.raises(PluginError, match=f"pip install tesaiot-connect-auth-{kind}"):
        sandbox_package.initialise(
            SandboxOptions(folder=tmp_path / "p"), without(f"tesaiot_connect_auth_{kind}")
        )
    assert not (tmp_path / "p" / "ca").exists()
