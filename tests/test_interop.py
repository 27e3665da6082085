"""Eclipse's interoperability suite (paho.mqtt.testing) against our broker, over TCP and over QUIC.

Runs from a checkout beside the project, in PAHO_TESTING: `make interop`. One test is left out, because it
hangs on the suite's own reference broker too. The suite speaks TCP: for QUIC each of its connections goes
through a bridge on quic-go, so that two QUIC stacks that know nothing of each other are in between.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import quic_bridge
from real_brokers import stop

from tesaiot_connect.testing import Certificates

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("tesaiot-connect")
SUITE = Path(os.environ.get("PAHO_TESTING", ROOT.parent / "paho.mqtt.testing")) / "interoperability"
LEFT_OUT = "test_flow_control2"

# The suite reads its settings from module globals that only its command line sets. In one of its tests a
# client publishes before another's SUBACK has come, and connections have no common order: here each waits.
RUNNER = f"""
import importlib, io, json, sys, time, unittest
name, port, prefix = sys.argv[1], int(sys.argv[2]), sys.argv[3]
suite = importlib.import_module(name)
suite.host, suite.port, suite.topic_prefix = "127.0.0.1", port, prefix
suite.topics = [prefix + t for t in ("TopicA", "TopicA/B", "Topic/C", "TopicA/C", "/TopicA")]
suite.wildtopics = [prefix + t for t in ("TopicA/+", "+/C", "#", "/#", "/+", "+/+", "TopicA/#")]
suite.nosubscribe_topics = ("test/nosubscribe",)
def subscribe(client, *arguments, send=suite.mqtt_client.Client.subscribe, **named):
    got = getattr(client.callback, "subscribeds", [])
    before, until = len(got), time.monotonic() + 2
    packet_id = send(client, *arguments, **named)
    while client.callback and len(got) == before and time.monotonic() < until:
        time.sleep(0.01)
    return packet_id
suite.mqtt_client.Client.subscribe = subscribe
tests = [t for group in unittest.defaultTestLoader.loadTestsFromModule(suite) for t in group]
tests = [t for t in tests if t._testMethodName != "{LEFT_OUT}"]
result = unittest.TextTestRunner(stream=io.StringIO()).run(unittest.TestSuite(tests))
failed = {{str(test).split()[0]: trace[-800:] for test, trace in result.failures + result.errors}}
print("RESULT" + json.dumps([len(tests), failed]))
"""


@contextmanager
def served(folder: Path, listener: str, *settings: str) -> Iterator[str]:
    """Our broker as a process, with these `--set` more; gives "host:port" of the listener of that name."""
    log = folder / "broker.log"
    command = [TOOL, "serve", ROOT / "docs" / "examples" / "broker.toml"]
    for setting in ("listeners.tcp.port=0", 'broker.deny_subscribe=["test/nosubscribe"]', *settings):
        command += ["--set", setting]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield address_of(listener, process, log)
        finally:
            stop(process)


def address_of(listener: str, process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until the broker says where it listens."""
    deadline = time.monotonic() + 20
    while True:
        text = log.read_text(errors="replace")
        if found := re.search(rf"listener {listener} on \w+://(\S+)\n", text):
            return found[1]
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.01)


@contextmanager
def by_tcp(folder: Path) -> Iterator[int]:
    """The port that the suite connects to."""
    with served(folder, "tcp") as address:
        yield int(address.rpartition(":")[2])


@contextmanager
def by_quic(folder: Path) -> Iterator[int]:
    """The same, of a bridge to a QUIC listener: the suite's connections come over QUIC or not at all."""
    certificates = Certificates(folder)
    own = certificates.server("localhost")
    settings = (
        "listeners.quic.url=quic://127.0.0.1:0",
        f"listeners.quic.server_tls.certificate={own.certificate}",
        f"listeners.quic.server_tls.key={own.key}",
    )
    with (
        served(folder, "quic", *settings) as address,
        quic_bridge.client(address, certificates.ca_file, server_name="localhost") as bridge,
    ):
        yield bridge.port


@pytest.mark.interop
@pytest.mark.parametrize("way", [by_tcp, by_quic])
@pytest.mark.parametrize(
    ("suite", "prefix", "total", "enough"),  # of 27, one is left out
    [("client_test", "", 10, 10), ("client_test5", "client_test5/", 26, 26)],
)
def test_eclipse_suite(
    tmp_path: Path,
    way: Callable[[Path], AbstractContextManager[int]],
    suite: str,
    prefix: str,
    total: int,
    enough: int,
) -> None:
    if not SUITE.is_dir():
        pytest.fail(f"{SUITE} is missing: set PAHO_TESTING to a checkout of eclipse/paho.mqtt.testing")
    with way(tmp_path) as port:
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, suite, str(port), prefix],
            cwd=SUITE,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    ran, failed = json.loads(lines[0].removeprefix("RESULT"))
    print(f"\n{suite} {way.__name__}: {ran - len(failed)} of {ran}")
    for name, trace in failed.items():
        print(f"failed: {name}\n{trace}")
    assert ran == total
    assert ran - len(failed) >= enough
