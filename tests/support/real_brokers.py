"""Real servers for tests: found, started on loopback, stopped by their process id.

On Linux `make test` installs them and sets TESAIOT_REQUIRE_SERVERS, so a missing one is a failure there;
elsewhere the test skips and says what to install.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import pytest

_MORE_PATHS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/homebrew/bin")


def program(name: str, package: str) -> str:
    """Where it is; skips, or fails where the servers are required."""
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *_MORE_PATHS)))
    if found:
        return found
    reason = f"{name} is not installed (package {package})"
    if os.environ.get("TESAIOT_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{reason}: run `make servers`")
    pytest.skip(reason)


_WORKER = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0) % 8
_FIRST = 10_000 + 2_000 * _WORKER
_PORTS = itertools.cycle(random.sample(range(_FIRST, _FIRST + 2_000), 2_000))
"""Below those that systems give to whoever asks for any; each process that tests has its own."""


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """One that nobody listens on, and that this run will not soon give again."""
    for port in _PORTS:
        with socket.socket(socket.AF_INET, kind) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError  # it cycles


def free_udp_port() -> int:
    return free_port(socket.SOCK_DGRAM)


def until_listening(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 60.0) -> None:
    """Returns once the port takes connections; raises with the log when the process ended instead."""
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            text = log.read_text(errors="replace") if log.exists() else ""
            raise AssertionError(f"nothing listens on port {port} (exit {process.poll()}): {text}")
        time.sleep(0.01)


def stop(process: subprocess.Popen[bytes], seconds: float = 60.0) -> int:
    """SIGTERM, and SIGKILL if that is not enough; the exit code."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"{process.args!r} did not end within {seconds:.0f} s of SIGTERM") from None


class Mosquitto:
    """A mosquitto of one's own. `start` and `stop` may alternate; the port and the files stay.

    `lines` are lines of mosquitto.conf for its one listener.
    """

    def __init__(self, folder: Path, *lines: str, persistence: bool = False) -> None:
        self._tool = program("mosquitto", "mosquitto")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.log = folder / "mosquitto.log"
        self._config = folder / "mosquitto.conf"
        self._process: subprocess.Popen[bytes] | None = None
        anonymous = (
            [] if any(line.startswith("allow_anonymous") for line in lines) else ["allow_anonymous true"]
        )
        stored = ["persistence true", f"persistence_location {folder}/"] if persistence else []
        self._config.write_text(
            "\n".join(
                (
                    f"listener {self.port} 127.0.0.1",
                    *anonymous,
                    *stored,
                    # without this it drops its root privileges and cannot reach the test's folder
                    "user root",
                    "set_tcp_nodelay true",
                    "log_dest stderr",
                    *(f"log_type {kind}" for kind in ("error", "warning", "notice", "information")),
                    *lines,
                    "",
                )
            )
        )

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([self._tool, "-c", str(self._config)], stdout=log, stderr=log)
        until_listening(self.port, self._process, self.log)

    def stop(self) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
