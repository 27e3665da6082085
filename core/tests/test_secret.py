"""Secrets: where they come from, what is said when they cannot be had, and that they are never shown."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

from tesaiot_connect import secret as secret_module
from tesaiot_connect.config.document import Document
from tesaiot_connect.config.schema import value as schema_of
from tesaiot_connect.config.structure import converter, structure
from tesaiot_connect.errors import ConnectorError
from tesaiot_connect.protocols import Duration, Secret
from tesaiot_connect.secret import (
    SecretFrom,
    read_secret,
    secret_changed,
    secret_origin,
    secret_stamp,
)

posix = pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")


def read(secret: Any, key: str = "") -> str:
    return asyncio.run(read_secret(secret, key))


def python(code: str) -> SecretFrom:
    return SecretFrom(command=(sys.executable, "-c", code), timeout=Duration(60))


def refused(secret: SecretFrom, key: str = "") -> str:
    with pytest.raises(ConnectorError) as caught:
        read(secret, key)
    assert caught.value.fix
    return str(caught.value)


def private(file: Path, text: str | bytes) -> Path:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(0o600)
    return file


# --- reading ------------------------------------------------------------------------------


def test_a_value_is_itself() -> None:
    assert read(Secret("pw")) == "pw"
    assert type(read(Secret("pw"))) is str
    assert read("name") == "name"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (b"pw", "pw"),
        (b"pw\n", "pw"),
        (b"pw\r\n\n", "pw"),
        (b" p w \n", " p w "),
        (b"\xef\xbb\xbfpw\n", "pw"),
        ("päss\n".encode(), "päss"),
    ],
)
def test_a_file(tmp_path: Path, text: bytes, secret: str) -> None:
    assert read(SecretFrom(file=private(tmp_path / "pw", text))) == secret


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    assert "pw cannot be read for a secret: No such file" in refused(SecretFrom(file=tmp_path / "pw"))
    cases = {
        b"": "is empty",
        b"\n\n": "is empty",
        b"hunter2\nurl: x\n": "has 2 lines, and a secret has one",
        b"hunter2\xff": "not text in UTF-8",
        b"hunter2" * 10_000: "more than 64 KiB",
    }
    for text, said in cases.items():
        told = refused(SecretFrom(file=private(tmp_path / "pw", text)))
        assert said in told
        assert "hunter2" not in told
        assert str(tmp_path / "pw") in told
    with pytest.raises(ConnectorError, match=r"cannot be read|not a regular file"):
        read(SecretFrom(file=tmp_path))
    if hasattr(os, "mkfifo"):
        assert "not a regular file" in refused(SecretFrom(file=Path(os.devnull)))


@posix
def test_a_file_that_everybody_can_read_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = private(tmp_path / "pw", "hunter2")
    read(SecretFrom(file=file))
    assert not caplog.records
    file.chmod(0o644)
    secret = SecretFrom(file=file)
    read(secret)
    read(secret)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "chmod o-r" in record.getMessage()
    assert "hunter2" not in record.getMessage()


@posix
def test_a_pipe_that_nobody_writes_to_holds_up_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refused(SecretFrom(file=tmp_path / "pipe"))


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESAIOT_TEST_PW", "pw")
    assert read(SecretFrom(env="TESAIOT_TEST_PW")) == "pw"
    monkeypatch.setenv("TESAIOT_TEST_PW", "")
    assert "TESAIOT_TEST_PW holds no secret: it is empty" in refused(SecretFrom(env="TESAIOT_TEST_PW"))
    monkeypatch.delenv("TESAIOT_TEST_PW")
    assert "TESAIOT_TEST_PW is not set" in refused(SecretFrom(env="TESAIOT_TEST_PW"))


def test_an_error_names_the_key() -> None:
    told = refused(SecretFrom(env="TESAIOT_NOT_SET"), "password")
    assert told.startswith("`password` of this connection's `auth`: the environment variable")


def test_a_variable_of_an_env_file(tmp_path: Path) -> None:
    file = private(tmp_path / ".env", "# comment\nTOKEN='hunter2'\n")
    assert read(SecretFrom(file=file, variable="TOKEN")) == "hunter2"
    told = refused(SecretFrom(file=file, variable="OTHER"))
    assert "has no OTHER" in told
    assert "hunter2" not in told


# --- commands -----------------------------------------------------------------------------


def test_a_command() -> None:
    assert read(python("print('pw')")) == "pw"
    asks = python("import sys; print('pw' if sys.stdin.read() == '' else 'asked')")
    assert read(asks) == "pw", "standard input is closed"


def test_a_command_runs_without_a_shell(tmp_path: Path) -> None:
    argument = f"$HOME; touch {tmp_path / 'made'}"
    code = "import sys; print(sys.argv[1])"
    command = (sys.executable, "-c", code, argument)
    assert read(SecretFrom(command=command, timeout=Duration(60))) == argument
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_says_why_and_keeps_the_secret() -> None:
    code = "import sys; print('hunter2'); print('vault is sealed, hunter2', file=sys.stderr); sys.exit(3)"
    told = refused(python(code))
    assert "failed with code 3: vault is sealed, ***" in told
    assert "hunter2" not in told


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-program")
    assert f"the command {missing} for a secret cannot be run" in refused(SecretFrom(command=(missing,)))
    with pytest.raises(ConnectorError) as caught:
        read(SecretFrom(command=(f"{missing} --token=hunter2",)))
    told = str(caught.value)
    assert "there is no shell: write each argument apart" in told
    assert "hunter2" not in told
    assert caught.value.__suppress_context__, "--debug would show it"
    assert caught.value.__cause__ is None


def test_a_command_that_floods_is_stopped_reading_not_remembered() -> None:
    told = refused(python("import sys; sys.stdout.write('hunter2' * 1_000_000)"))
    assert "more than 64 KiB" in told
    assert "hunter2" not in told


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while alive(pid):
            await asyncio.sleep(0.01)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
FAMILY = ("sh", "-c", 'sleep 600 & echo $! >"$0"; wait')


@needs_proc
def test_a_command_that_hangs_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "pid"
    start = secret_module._start

    def started(command: tuple[str, ...]) -> subprocess.Popen[bytes]:
        """Its time begins when there is a family."""
        process = start(command)
        while not told.exists() or not told.read_text():
            time.sleep(0.01)
        return process

    monkeypatch.setattr(secret_module, "_start", started)
    command = (*FAMILY, str(told))
    with pytest.raises(ConnectorError, match=r"did not end within 0\.1 s and was stopped"):
        read(SecretFrom(command=command, timeout=Duration(0.1)))
    asyncio.run(until_gone(int(told.read_text())))


@needs_proc
def test_a_command_is_ended_when_nobody_waits_any_more(tmp_path: Path) -> None:
    told = tmp_path / "pid"

    async def main() -> None:
        command = (*FAMILY, str(told))
        reading = asyncio.create_task(read_secret(SecretFrom(command=command, timeout=Duration(600))))
        async with asyncio.timeout(30):
            while not told.exists() or not told.read_text():
                await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until_gone(int(told.read_text()))

    asyncio.run(main())


def test_a_command_that_nobody_waits_for_any_more_is_not_started(tmp_path: Path) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        free = threading.Event()
        taken = asyncio.create_task(asyncio.to_thread(free.wait, 60))  # the only thread
        await asyncio.sleep(0)
        command = (sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", str(tmp_path / "ran"))
        reading = asyncio.create_task(read_secret(SecretFrom(command=command)))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        free.set()
        await taken

    asyncio.run(main())  # it waits for its threads
    assert not (tmp_path / "ran").exists()


def test_who_keeps_the_pipe_open_after_the_command_holds_up_nobody() -> None:
    code = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"])
print("pw")
"""
    assert read(python(code)) == "pw"


def test_a_loop_of_another_thread_and_of_another_make() -> None:
    """No child watcher, and no main thread, is needed."""
    loops: list[Any] = [asyncio.new_event_loop]
    if sys.platform != "win32":
        uvloop = pytest.importorskip("uvloop")
        loops.append(uvloop.new_event_loop)
    found: list[str] = []

    async def main() -> None:
        for make in loops:
            await asyncio.to_thread(lambda make=make: found.append(in_loop(make)))

    def in_loop(make: Any) -> str:
        with asyncio.Runner(loop_factory=make) as runner:
            return runner.run(read_secret(python("print('pw')")))

    asyncio.run(main())
    assert found == ["pw"] * len(loops)


# --- rotation -----------------------------------------------------------------------------


def test_a_change_of_the_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "pw"
    secret = SecretFrom(file=file)

    async def main() -> None:
        stamp = secret_stamp(secret, SecretFrom(env="X"), "value")
        waiting = asyncio.create_task(secret_changed(stamp, secret, SecretFrom(env="X"), "value", interval=0))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        private(file, "one")
        async with asyncio.timeout(20):
            await waiting
        stamp = secret_stamp(secret)
        private(tmp_path / "new", "two").replace(file)
        assert secret_stamp(secret) != stamp
        async with asyncio.timeout(20):
            await secret_changed(stamp, secret)

    asyncio.run(main())


# --- in a configuration -------------------------------------------------------------------


@attrs.frozen
class Recipe:
    password: Secret | SecretFrom
    username: str | SecretFrom = "u"


def load(text: str) -> Any:
    """The recipe, or what is said of it."""
    doc = Document("file.toml", text, Path("/folder"))
    doc.expand({})
    made = structure(doc, converter({}), ("auth",), doc.data["auth"], Recipe)
    return made if made is not None else [str(problem) for problem in doc.problems]


def test_every_way_to_write_it() -> None:
    for text, expected in {
        '"pw"': Secret("pw"),
        '{ file = "pw" }': SecretFrom(file=Path("/folder/pw")),
        '{ file = "/run/pw" }': SecretFrom(file=Path("/run/pw")),
        '{ env = "PW" }': SecretFrom(env="PW"),
        '{ command = ["pass", "show", "x"], timeout = "3s" }': SecretFrom(
            command=("pass", "show", "x"), timeout=Duration(3)
        ),
    }.items():
        made = load(f"auth = {{ password = {text}, username = {text} }}")
        assert made.password == expected
        assert type(made.password) is type(expected)
        assert made.username == (expected if isinstance(expected, SecretFrom) else "pw")
    assert isinstance(made.username, SecretFrom)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12345678", "expected a string or a table"),
        ('["pass", "hunter2"]', 'got an array. Write "...", { file = "..." }, { env = "NAME" } or { command'),
        ('{ flie = "x" }', "Did you mean 'file'?"),
        ('{ file = "x", env = "X" }', "`file` and `env` are given"),
        ("{ }", "none is given"),
        ("{ command = [] }", "`command` is empty"),
        ('{ command = "pass show" }', 'auth.password.command: is not of the right form. Write ["program'),
        ('{ command = "curl -u hunter2 x" }', "each argument apart"),
        ('{ command = ["pass", 12345678] }', "auth.password.command: is not of the right form"),
        ('{ env = "" }', "`env` is the name of an environment variable"),
        ('{ env = "X", timeout = "0s" }', "timeout must be more than 0"),
        ('{ env = "X", timeout = 3 }', "expected a duration with a unit"),
        ('{ file = "" }', "expected a path"),
        ('{ variable = "X" }', "none is given"),
        ('{ env = "X", variable = "Y" }', "`variable` is one of a `file`"),
    ],
)
def test_what_is_said_of_mistakes(text: str, said: str) -> None:
    problems = load(f"auth = {{ password = {text} }}")
    assert len(problems) == 1
    assert said in problems[0]
    assert "hunter2" not in problems[0]
    assert "12345678" not in problems[0]


def test_a_date_as_toml_writes_it_wants_quotes() -> None:
    doc = Document("file.toml", "x = 2026-12-31", Path("/"))
    structure(doc, converter({}), (), doc.data, attrs.make_class("Dated", {"x": attrs.field(type=str)}))
    assert 'Write it in quotes: "2026-12-31"' in str(doc.problems[0])


def test_the_schema_describes_it() -> None:
    text, kept = schema_of(Secret | SecretFrom)["anyOf"]
    assert text == {"type": "string"}
    assert set(kept["properties"]) == {"file", "variable", "env", "command", "timeout"}
    assert all(one["description"] for one in kept["properties"].values())
    assert kept["oneOf"] == [{"required": [key]} for key in ("file", "env", "command")]
    assert json.dumps(kept)


def test_nothing_shows_a_secret() -> None:
    recipe = Recipe(Secret("hunter2"))
    kept = SecretFrom(command=("vault", "--token=hunter2"))
    for shown in (
        repr(recipe),
        str(recipe),
        repr(kept),
        str(kept),
        f"{kept}",
        secret_origin(kept, "password"),
    ):
        assert "hunter2" not in shown
    assert secret_origin(kept, "password") == "`password` of this connection's `auth` (the output of vault)"
    assert repr(SecretFrom(command=("vault --token=hunter2",))).count("hunter2") == 0
