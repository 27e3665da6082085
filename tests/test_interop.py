"""Eclipse's interoperability suite (paho.mqtt.testing) against our broker.

Runs from a checkout beside the project, in PAHO_TESTING: `make interop`. One test is left out, because it
hangs on the suite's own reference broker too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_brokers import free_port, stop, until_listening

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("tesaiot-connect")
SUITE = Path(os.environ.get("PAHO_TESTING", ROOT.parent / "paho.mqtt.testing")) / "interoperability"
LEFT_OUT = "test_flow_control2"

# The suite reads its settings from module globals that only its command line sets.
RUNNER = f"""
import importlib, io, json, sys, unittest
name, port, prefix = sys.argv[1], int(sys.argv[2]), sys.argv[3]
suite = importlib.import_module(name)
suite.host, suite.port, suite.topic_prefix = "127.0.0.1", port, prefix
suite.topics = [prefix + t for t in ("TopicA", "TopicA/B", "Topic/C", "TopicA/C", "/TopicA")]
suite.wildtopics = [prefix + t for t in ("TopicA/+", "+/C", "#", "/#", "/+", "+/+", "TopicA/#")]
suite.nosubscribe_topics = ("test/nosubscribe",)
tests = [t for group in unittest.defaultTestLoader.loadTestsFromModule(suite) for t in group]
tests = [t for t in tests if t._testMethodName != "{LEFT_OUT}"]
result = unittest.TextTestRunner(stream=io.StringIO()).run(unittest.TestSuite(tests))
failed = {{str(test).split()[0]: trace[-800:] for test, trace in result.failures + result.errors}}
print("RESULT" + json.dumps([len(tests), failed]))
"""


@pytest.mark.interop
@pytest.mark.parametrize(
    ("suite", "prefix", "total", "enough"),  # of 27, one is left out
    [("client_test", "", 10, 10), ("client_test5", "client_test5/", 26, 26)],
)
def test_eclipse_suite(tmp_path: Path, suite: str, prefix: str, total: int, enough: int) -> None:
    if not SUITE.is_dir():
        pytest.fail(f"{SUITE} is missing: set PAHO_TESTING to a checkout of eclipse/paho.mqtt.testing")
    port, log = free_port(), tmp_path / "broker.log"
    command = [
        TOOL,
        "serve",
        ROOT / "docs" / "examples" / "broker.toml",
        "--set",
        f"listeners.tcp.port={port}",
        "--set",
        'broker.deny_subscribe=["test/nosubscribe"]',
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            until_listening(port, process, log)
            done = subprocess.run(
                [sys.executable, "-c", RUNNER, suite, str(port), prefix],
                cwd=SUITE,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
        finally:
            stop(process)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    ran, failed = json.loads(lines[0].removeprefix("RESULT"))
    print(f"\n{suite}: {ran - len(failed)} of {ran}")
    for name, trace in failed.items():
        print(f"failed: {name}\n{trace}")
    assert ran == total
    assert ran - len(failed) >= enough
