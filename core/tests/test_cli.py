"""The command, from outside: verbs, exit codes, and what is imported for them."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tesaiot_connect.cli import VERBS, execute, explain, logs
from tesaiot_connect.errors import ConfigError, ConnectFailed, ConnectorError, PluginError, Problem

COMMAND = [sys.executable, "-m", "tesaiot_connect"]


def run(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **more,  # type: ignore[call-overload]
    )
    assert isinstance(done, subprocess.CompletedProcess)
    assert "Traceback" not in done.stderr
    return done


# --- the shell ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([verb, "--help"]) == 0
    assert f"Usage: tesaiot-connect {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["rnu"], ["run"], ["run", "a", "b"], ["run", "--what"], ["pub", "mqtt://h", "a/#"]]
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(arguments) == 2
    assert "Error: " in capsys.readouterr().err


def test_the_nearest_command(capsys: pytest.CaptureFixture[str]) -> None:
    execute(["rnu"])
    assert "Did you mean 'run'?" in capsys.readouterr().err


def test_help_and_version_import_little() -> None:
    heavy = {"asyncio", "rich", "cattrs", "pluggy", "sqlite3", "ssl", "tesaiot_connect.runner"}
    for arguments in (["--help"], ["--version"]):
        code = (
            "import sys; from tesaiot_connect.cli import execute; "
            f"assert execute({arguments!r}) == 0; print(*sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded = set(done.stdout.splitlines()[-1].split())
        assert not loaded & heavy, loaded & heavy


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError([Problem("f", 3, "a.b", "is wrong", "Right it")]), 78, "f:3: a.b: is wrong. Right it"),
        (
            ConfigError([Problem("f", 1, "a", "x"), Problem("g", 0, "", "y")]),
            78,
            "f:1: a: x\ng: y\n2 problems",
        ),
        (PluginError("no quic", fix="pip install it"), 78, "error: no quic. pip install it"),
        (ConnectFailed("nobody there"), 69, "error: nobody there"),
        (ConnectorError("it broke"), 1, "error: it broke"),
        (FileNotFoundError(2, "No such file", "x.db"), 1, "error: x.db: No such file"),
        (ExceptionGroup("two", [ConnectFailed("nobody there"), ValueError()]), 69, "error: nobody there"),
    ],
)
def test_errors_become_words_and_codes(error: Exception, code: int, words: str) -> None:
    assert explain(error) == (code, words)


def test_a_bug_is_called_one() -> None:
    code, words = explain(KeyError("x"))
    assert code == 1
    assert words.startswith("error: KeyError: 'x'\n")
    assert "--debug" in words


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [*COMMAND, "--debug", "run", str(tmp_path / "missing.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert done.returncode == 1


# --- the log ------------------------------------------------------------------------------


def record(error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    made = logging.LogRecord("tesaiot_connect.client", logging.WARNING, "f", 1, "lost %s", ("it",), info)
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_json_lines() -> None:
    line = json.loads(logs.Json(debug=False).format(record(ValueError("bad\nvalue"))))
    assert line == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "tesaiot_connect.client",
        "message": "lost it",
        "error": "ValueError: bad\nvalue",
    }


def test_human_lines() -> None:
    line = logs.Human(debug=False, colour=False).format(record(ValueError("bad\nvalue")))
    assert line[8:] == " warning  client: lost it: ValueError: bad | value"


def test_a_mistake_in_a_step_is_found_without_a_traceback(tmp_path: Path) -> None:
    step = tmp_path / "steps.py"
    step.write_text("import json\n\ndef clean(text):\n    return json.loads(text)\n")
    module: dict[str, Any] = {}
    exec(compile(step.read_text(), step, "exec"), module)
    try:
        module["clean"]("{")
    except ValueError as error:
        made = record(error)
        made.msg, made.args = f"failed: {type(error).__name__}: {error}", ()
    line = logs.Human(debug=False, colour=False).format(made)
    assert line.count("JSONDecodeError") == 1
    assert f" ({step}:4 in clean; --debug shows the traceback)" in line
    assert json.loads(logs.Json(debug=False).format(made))["at"] == f"{step}:4 in clean"


def test_the_table_of_figures_is_readable_in_80_columns() -> None:
    from rich.console import Console

    from tesaiot_connect.cli.figures import table
    from tesaiot_connect.pipeline import PipelineStats, SinkStats

    bad = SinkStats("log", failing=True, last_error="cannot write [/dev/full]: " + "no space " * 20)
    good = SinkStats("database", written=1_234_567)
    stats = PipelineStats("a-rather-long-name", "in", sinks=[good, bad], received=1_234_567, rate=2001)
    stats.acknowledged = 1_234_500
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(table([stats]))
    head, first, second = capture.get().splitlines()
    assert "retries" not in head  # nothing was tried again
    for number in ("1,234,567", "2,001", "1,234,500"):
        assert number in first
    assert "failing: cann" in second


# --- with a broker ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`serve` in a process of its own; gives its URL."""
    pytest.importorskip("tesaiot_connect_tcp_tls", reason="needs a transport for mqtt://")
    file = tmp_path_factory.mktemp("broker") / "broker.toml"
    file.write_text("[listeners.tcp]\nport = 1883\n")
    arguments = ["serve", str(file), "--set", "listeners.tcp.port=0", "--log-format", "json"]
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = json.loads(process.stderr.readline())
            yield line["message"].split()[-1]
        finally:
            process.terminate()
            _, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for another process")
def test_pub_that_waits_for_its_input_is_interrupted(broker: str) -> None:
    arguments = ["pub", broker, "interrupted", "-l", "-r"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *arguments], stdin=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        assert run("sub", broker, "interrupted", "-C", "1").stdout == "interrupted one\n"
        process.send_signal(signal.SIGINT)  # it reads on, in a thread
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_pub_at_a_terminal_says_that_it_waits(broker: str) -> None:
    ours, its = os.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, "pub", broker, "typed", "-r"], stdin=its, stderr=subprocess.PIPE
        ) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == b"type what to publish; Ctrl-D ends it\n"
            os.write(ours, b"by hand\n\x04")
            assert process.wait(30) == 0
    finally:
        os.close(ours)
        os.close(its)
    assert run("sub", broker, "typed", "-C", "1").stdout == "typed by hand\n\n"


def test_pub_and_sub(broker: str) -> None:
    run("pub", broker, "kept/json", '{"x": [1, 2.5]}', "-r")
    run("pub", broker, "kept/text", "-r", input="two\nlines")
    done = run("sub", broker, "kept/#", "-C", "2")
    assert sorted(done.stdout.splitlines()) == ['kept/json {"x": [1, 2.5]}', "kept/text two", "lines"]
    done = run("sub", broker, "kept/#", "nothing/+", "-C", "2", "--json")
    rows = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda row: row["topic"])
    assert [(row["topic"], row["payload"], row["retain"]) for row in rows] == [
        ("kept/json", {"x": [1, 2.5]}, True),
        ("kept/text", "two\nlines", True),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sub_ends_quietly_when_asked_to(broker: str, number: int) -> None:
    """Also where SIGINT was ignored, as a script's background jobs have it."""
    run("pub", broker, "greeting", "hello", "-r")
    ignoring = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignoring, *COMMAND, "sub", broker, "greeting"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"greeting hello\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, b"")


def test_a_file_of_connections_alone_can_be_tried(broker: str, tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f'[connections.local]\nendpoints = ["{broker}"]\n')
    assert run("check", str(file)).stdout.startswith("local  ok  ")
    assert run("pub", "-c", str(file), "local", "alone/test", "1").returncode == 0
    assert run("run", str(file)).returncode == 78


def test_run_stores_what_is_published(broker: str, tmp_path: Path) -> None:
    """Lines in by `pub --lines`, through `run`, out to a file; SIGTERM drains."""
    file = tmp_path / "pipeline.toml"
    file.write_text(
        f'[connections.local]\nclient_id = "run-test"\nendpoints = ["{broker}"]\n'
        '[sources.in]\ntype = "mqtt"\nconnection = "local"\nsubscribe = ["run/#"]\n'
        '[sinks.out]\ntype = "jsonl"\npath = "out.jsonl"\n'
        '[pipelines.main]\nfrom = "in"\nto = ["out"]\n'
    )
    check = run("check", str(file))
    assert check.returncode == 0, check.stderr
    assert check.stdout.startswith("local  ok  ")
    # the session exists before anything is published, so that nothing depends on who starts first
    run("run", str(file), "--once", "--set", "sources.in.idle_timeout=100ms")
    lines = "".join(f'{{"n": {number}}}\n' for number in range(500))
    assert run("pub", "-c", str(file), "local", "run/test", "-l", input=lines).returncode == 0
    with subprocess.Popen(
        [*COMMAND, "run", str(file), "--log-format", "json"], stderr=subprocess.PIPE, text=True
    ) as process:
        follow(tmp_path / "out.jsonl", 500, process)
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    assert any("received 500, acknowledged 500, written: out 500" in message for message in messages), (
        messages
    )
    stored = (tmp_path / "out.jsonl").read_text().splitlines()
    values = [json.loads(line)["value"]["n"] for line in stored]
    assert values == list(range(500))


def follow(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Returns when the file has so many lines; fails if the process ends before."""
    while True:
        ended = process.poll() is not None
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert not ended, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)


def test_nobody_there(tmp_path: Path) -> None:
    pytest.importorskip("tesaiot_connect_tcp_tls", reason="needs a transport for mqtt://")
    with socket.socket() as held:  # bound and not listening: nobody else gets the port
        held.bind(("127.0.0.1", 0))
        url = f"mqtt://127.0.0.1:{held.getsockname()[1]}"
        for arguments in (["pub", url, "t", "x"], ["sub", url, "t"]):
            done = run(*arguments)
            assert done.returncode == 69
            assert done.stderr.startswith("error: ")
            assert len(done.stderr.splitlines()) == 1
        file = tmp_path / "pipeline.toml"
        file.write_text(
            f'[connections.local]\nendpoints = ["{url}"]\n'
            '[sources.in]\ntype = "mqtt"\nconnection = "local"\nsubscribe = ["run/#"]\n'
            '[sinks.out]\ntype = "null"\n[pipelines.main]\nfrom = "in"\nto = ["out"]\n'
        )
        done = run("check", str(file))
        assert done.returncode == 69
        assert done.stdout.startswith("local  ")


def test_run_once_from_a_generator(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(
        '[sources.in]\ntype = "generator"\ncount = 100\nrate = 0\n'
        '[sinks.out]\ntype = "jsonl"\npath = "out.jsonl"\n'
        '[pipelines.main]\nfrom = "in"\nto = ["out"]\n'
    )
    done = run("run", str(file))
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 100


def test_lint_finds_a_tls_listener_without_a_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('[listeners.tls]\nscheme = "mqtts"\nport = 0\n')
    assert execute(["lint", str(file)]) == 78
    told = capsys.readouterr().err
    assert "broker.toml:1: listeners.tls: a listener on mqtts:// needs a certificate" in told
    assert "server_tls" in told
