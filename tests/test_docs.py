"""What the documentation shows is what runs: the demo, the examples, the files in the README."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guides import REST, blocks
from platform_thread import Platform
from real_brokers import free_port, stop, until_listening

from tesaiot_connect import load
from tesaiot_connect.testing import Certificates

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
TOOL = Path(sys.executable).with_name("tesaiot-connect")
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("plugins/*/README.md"),
    ]
)


@pytest.fixture
def broker_port(tmp_path: Path) -> Iterator[int]:
    """The broker that docs/examples/broker.toml describes, as a process."""
    port, log = free_port(), tmp_path / "broker.log"
    command = [TOOL, "serve", EXAMPLES / "broker.toml", "--set", f"listeners.tcp.port={port}"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            until_listening(port, process, log)
            yield port
        finally:
            code = stop(process)
    assert code == 0 or sys.platform == "win32", log.read_text()


def logged(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> str:
    """What the pattern's group finds in the log, once it does."""
    deadline = time.monotonic() + 20
    while (found := re.search(pattern, log.read_text())) is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    return found[1]


def publish(port: int, topic: str, payload: str, *options: str, scheme: str = "mqtt") -> None:
    command = [TOOL, "pub", f"{scheme}://localhost:{port}", topic, payload, *options]
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def test_the_demo_stores_what_it_publishes(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "demo" / "run.py", "--seconds", "1", "--data", tmp_path / "data"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything that was published is stored." in done.stdout
    assert re.search(r"^quic +\d+ connections of up to 2 streams, \d+ resumed$", done.stdout, re.MULTILINE)
    assert (tmp_path / "data" / "telemetry.db").is_file()
    assert (tmp_path / "data" / "telemetry.jsonl").stat().st_size


def test_the_reader_example(broker_port: int) -> None:
    command = [sys.executable, EXAMPLES / "embedding" / "reader.py", f"mqtt://127.0.0.1:{broker_port}"]
    topic, payload = "device/d1/telemetry/temperature", '{"value": 25.5}'
    publish(broker_port, topic, payload, "--retain")  # so that it does not matter who comes first
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(30, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{topic} {payload}\n"
        finally:
            timer.cancel()
            process.kill()


def test_the_pipelines_example(broker_port: int, tmp_path: Path) -> None:
    publish(broker_port, "device/d1/telemetry/temperature", '{"value": 25.5}', "--retain")
    config = tmp_path / "pipeline.toml"
    config.write_text(readme_pipeline().replace("1883", str(broker_port)))
    command = [sys.executable, EXAMPLES / "embedding" / "pipelines.py", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"device_id":"d1"' in (tmp_path / "telemetry.jsonl").read_text()


@pytest.mark.parametrize("udp", ["open", "closed"])
def test_the_endpoints_example(udp: str, tmp_path: Path, certificates: Certificates) -> None:
    own, log = certificates.server("localhost"), tmp_path / "broker.log"
    command = [TOOL, "serve", EXAMPLES / "quic-broker.toml"]
    for name in ("quic", "tls"):
        command += ["--set", f"listeners.{name}.port=0"]
        command += ["--set", f"listeners.{name}.server_tls.certificate={own.certificate}"]
        command += ["--set", f"listeners.{name}.server_tls.key={own.key}"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            quic, tls = (
                logged(rf"listener {name} on \w+://127.0.0.1:(\d+)\n", log, process)
                for name in ("quic", "tls")
            )
            urls = f"quic://localhost:{quic if udp == 'open' else free_port()}", f"mqtts://localhost:{tls}"
            program = [sys.executable, EXAMPLES / "embedding" / "endpoints.py", *urls, certificates.ca_file]
            done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
        finally:
            stop(process)
    assert done.returncode == 0, done.stderr
    states = ("connecting", "connected", "closed")
    lines = [line.rstrip("; ") for line in done.stdout.splitlines()]
    used = next(line.partition(" ")[2] for line in lines if line.startswith("connected "))
    assert used in (urls if udp == "open" else urls[1:])
    assert [line for line in lines if line.startswith(states)] == [
        "connecting",
        f"connected {used}",
        "closed",
    ]
    attempts = [line.split("; ")[:2] for line in lines if not line.startswith(states)]
    assert ["won", used] in attempts
    assert udp == "open" or attempts[0][0] in ("lost", "failed")


def readme_pipeline() -> str:
    (block,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "toml")
    assert isinstance(block, str)
    return block


def test_the_pipeline_in_the_readme_is_right(tmp_path: Path) -> None:
    config = tmp_path / "pipeline.toml"
    config.write_text(readme_pipeline())
    assert load(config).pipelines
    subprocess.run([TOOL, "lint", config], check=True, cwd=tmp_path, capture_output=True)


QUIC_PAGE = (ROOT / "docs" / "guide" / "quic.md").read_text(encoding="utf-8")
QUIC_BLOCKS = blocks(QUIC_PAGE, "toml")


@pytest.mark.parametrize("block", range(len(QUIC_BLOCKS)))
def test_the_configurations_of_the_quic_page_are_right(
    block: int, tmp_path: Path, certificates: Certificates
) -> None:
    own, text = certificates.server("localhost"), QUIC_BLOCKS[block]
    for name, file in (("server.pem", own.certificate), ("server.key", own.key)):
        (tmp_path / name).write_bytes(file.read_bytes())
    config = tmp_path / "config.toml"
    config.write_text(text if "[listeners" in text else text + REST)
    done = subprocess.run([TOOL, "lint", config], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_quic_broker_example_serves(tmp_path: Path, certificates: Certificates) -> None:
    own, log = certificates.server("localhost"), tmp_path / "broker.log"
    command = [TOOL, "serve", EXAMPLES / "quic-broker.toml"]
    for name in ("quic", "tls"):
        command += ["--set", f"listeners.{name}.port=0"]
        command += ["--set", f"listeners.{name}.server_tls.certificate={own.certificate}"]
        command += ["--set", f"listeners.{name}.server_tls.key={own.key}"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            port = logged(r"listener quic on quic://127.0.0.1:(\d+)\n", log, process)
            for _ in range(2):
                publish(int(port), "t", "x", "--set", f"tls.ca_file={certificates.ca_file}", scheme="quic")
        finally:
            stop(process)
    assert len(re.findall("over quic_aioquic", log.read_text())) == 2
    assert " quic: [" not in log.read_text(), "aioquic's own lines are for --debug"


def test_every_message_of_the_quic_page_is_one_that_is_said() -> None:
    """The first column of the table is what a person looks for in it."""
    rows = re.findall(r"^\| ([^|]+) \|", QUIC_PAGE.split("## When something goes wrong")[1], re.MULTILINE)
    table = rows[1 : rows.index("broker")]
    sources = [*ROOT.glob("plugins/quic_aioquic/src/**/*.py"), *ROOT.glob("core/src/**/*.py")]
    code = " ".join(path.read_text(encoding="utf-8") for path in sources)
    said = re.sub(r'"\s*\n\s*f?"', "", code)
    missing = []
    for row in table:
        for message in row.split("; "):
            parts = [part.strip(' ,:()"') for part in re.split(r"\d+ s\b|\d+|…", message)]
            missing += [part for part in parts if part not in said]
    assert not missing


def readme_programs() -> list[str]:
    return blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")


def test_the_device_and_the_application_in_the_readme(tmp_path: Path) -> None:
    device, application, _ = readme_programs()
    with (
        Platform(tmp_path / "playground") as platform,
        subprocess.Popen(
            [sys.executable, "-u", "-c", application], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while not platform.ask(lambda sandbox: sandbox.broker.stats.subscriptions):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            subprocess.run([sys.executable, "-c", device], cwd=tmp_path, check=True, timeout=60)
            assert process.stdout is not None
            printed = {process.stdout.readline(), process.stdout.readline()}
        finally:
            process.kill()
    assert printed == {"device-1 temperature 25.5 celsius\n", "device-1 humidity 55.3 percent\n"}


def test_the_example_in_the_readme_is_the_one_that_runs() -> None:
    *_, block = readme_programs()
    code = (EXAMPLES / "embedding" / "reader.py").read_text(encoding="utf-8")
    assert block.strip() in code
    body = [
        line
        for line in block.strip().splitlines()
        if line.strip() and not line.startswith(("import", "from"))
    ]
    assert len(body) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"`make ([a-z]+)`", text):
        assert target in targets, target
