"""`tesaiot-connect sandbox` as a process: started, ready, stopped or killed by its process id."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from real_brokers import stop

TOOL = Path(sys.executable).with_name("tesaiot-connect")
_READY = 60.0


class SandboxProcess:
    """A sandbox in `folder`, on free ports. `start` and `kill` or `stop` may alternate."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.log = folder.with_name(f"{folder.name}.log")
        self.urls: dict[str, str] = {}
        self.said: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> SandboxProcess:
        """Returns once it is ready."""
        ports = [word for way in ("quic", "tls", "wss") for word in (f"--{way}-port", "0")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [TOOL, "sandbox", self.folder, *ports, "--json", *self.options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        timer = threading.Timer(_READY, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        timer.cancel()
        assert line, self.log.read_text()
        self.said = json.loads(line)
        self.urls = self.said["urls"]
        return self

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        code = stop(self._process)  # type: ignore[arg-type]
        self._forget()
        return code

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._forget()

    def _forget(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        self._process.stdout.close()
        self._process = None

    def __enter__(self) -> SandboxProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()
