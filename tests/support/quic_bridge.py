"""The QUIC bridge of `tests/interop/bridge`, which makes every TCP client and broker a QUIC one, on quic-go.

Built from the packages of Debian 12, by its own Go: its quic-go does not build with a newer one, and other
releases have another quic-go, whose interface differs.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from compiled import ROOT, WORK, compiled, unavailable
from real_brokers import stop

_SOURCE = ROOT / "tests" / "interop" / "bridge" / "main.go"
_GO = Path("/usr/lib/go/bin/go")  # another one in PATH may be newer
_PACKAGES = Path("/usr/share/gocode")
_QUIC_GO = _PACKAGES / "src" / "github.com" / "lucas-clemente" / "quic-go"

Event = dict[str, Any]


def build() -> Path:
    """The program. Skips elsewhere than on Debian 12; without Go or quic-go skips, or fails if required."""
    if not sys.platform.startswith("linux") or _codename() != "bookworm":
        pytest.skip("the QUIC bridge is built from packages of Debian 12")
    if not _GO.exists() or not _QUIC_GO.is_dir():
        unavailable("no quic-go (packages golang-go, golang-github-lucas-clemente-quic-go-dev)")
    environment = {
        "CGO_ENABLED": "0",
        "GO111MODULE": "off",
        "GOCACHE": str(WORK / "go-cache"),
        "GOFLAGS": "",
        "GOPATH": str(_PACKAGES),
        "GOROOT": "",
        "GOTOOLCHAIN": "local",
    }
    return compiled(
        "bridge",
        [_SOURCE],
        lambda output: [str(_GO.resolve()), "build", "-o", str(output), _SOURCE.name],
        environment=environment,
    )


def _codename() -> str:
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


class Bridge:
    """A running bridge. `host` and `port` are where it listens; its events are described in main.go."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._ended = False
        self._errors = b""
        self._threads = [
            threading.Thread(target=self._collect),
            threading.Thread(target=self._collect_errors),
        ]
        for thread in self._threads:
            thread.start()
        self.host, self.port = "", 0

    @property
    def events(self) -> list[Event]:
        """All events so far."""
        with self._changed:
            return list(self._events)

    def wait(self, event: str, count: int = 1, seconds: float = 60.0, **values: object) -> Event:
        """The `count`-th event of this name whose fields have these values, once it has come."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                found = [
                    one
                    for one in self._events
                    if one["event"] == event and all(one.get(key) == value for key, value in values.items())
                ]
                if len(found) >= count:
                    return found[count - 1]
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    raise AssertionError(
                        f"no {event} {values or ''} number {count} from {self.process.args!r} "
                        f"(exit {self.process.poll()}): {self._events} {self._errors.decode()}"
                    )
                self._changed.wait(left)

    def listening(self) -> None:
        """Returns once it listens, with `host` and `port` set."""
        self.host, port = self.wait("listening")["address"].rsplit(":", 1)
        self.port = int(port)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def kill(self) -> None:
        """SIGKILL: its peers hear nothing of it."""
        self.process.kill()
        self._join()

    def stop(self) -> None:
        """Ends it, unless that has happened, and checks that it ended well."""
        if self.process.returncode is None:
            try:
                stop(self.process, 60.0)
            finally:
                self._join()
            assert self.process.returncode == 0, self._errors.decode()

    def _join(self) -> None:
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _collect_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors = self.process.stderr.read()


@contextmanager
def _running(*arguments: str) -> Iterator[Bridge]:
    process = subprocess.Popen(
        [str(build()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING": "true"},
    )
    bridge = Bridge(process)
    try:
        bridge.listening()
        yield bridge
    except BaseException:
        bridge.kill()
        raise
    bridge.stop()


@contextmanager
def client(
    dial: str,
    ca: Path,
    *,
    server_name: str | None = None,
    listen: str = "127.0.0.1:0",
    resume: bool = False,
    early: bool = False,
    alpn: str = "mqtt",
    arguments: Sequence[str] = (),
) -> Iterator[Bridge]:
    """TCP on `listen` to QUIC towards `dial` ("host:port"), whose certificate must come from `ca`."""
    flags = [*(["--resume"] if resume else []), *(["--early"] if early else [])]
    name = [] if server_name is None else ["--server-name", server_name]
    where = ["--listen", listen, "--dial", dial, "--ca", str(ca), "--alpn", alpn]
    with _running("client", *where, *name, *flags, *arguments) as bridge:
        yield bridge


@contextmanager
def server(
    dial: str,
    certificate: Path,
    key: Path,
    *,
    listen: str = "127.0.0.1:0",
    early: bool = False,
    alpn: str = "mqtt",
    arguments: Sequence[str] = (),
) -> Iterator[Bridge]:
    """QUIC on `listen`, each stream to TCP towards `dial` ("host:port")."""
    where = [
        "--listen",
        listen,
        "--dial",
        dial,
        "--cert",
        str(certificate),
        "--key",
        str(key),
        "--alpn",
        alpn,
    ]
    with _running("server", *where, *(["--early"] if early else []), *arguments) as bridge:
        yield bridge
