"""A worker process that does what a test tells it: started instead of `tesaiot_connect_quic_nng.worker`.

TESAIOT_SCRIPT holds its steps, one a line: a report as JSON, sent as it is; `job` (wait for the job);
`serve` (echo data and answer pings until the data ends or says `go on`); `print TEXT`; `abort`; `abort once
FILE` (where FILE is not there, which is then made); `exit N`; `stop` (SIGSTOP); `wait` (until the parent is
gone); `close data`; `close control`. Bytes `stop`, `abort` and `go on` are orders to `serve`. The job is
written to the file TESAIOT_SCRIPT_JOB, where that is set.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

COMMAND = ("-I", __file__)
LOADED = json.dumps({"type": "loaded", "library": "/lib/libnng.so", "version": "1.8"})
SECURED = json.dumps({"type": "secured", "address": "127.0.0.1:14567"})


def failed(what: str, fix: str = "", *, stage: str = "", unsupported: bool = False) -> str:
    return json.dumps(
        {"type": "failed", "what": what, "fix": fix, "stage": stage, "unsupported": unsupported}
    )


def ended(
    what: str, fix: str = "", *, orderly: bool = False, silent: bool = False, by_peer: bool = False
) -> str:
    return json.dumps(
        {"type": "ended", "what": what, "fix": fix, "orderly": orderly, "silent": silent, "by_peer": by_peer}
    )


def script(*steps: str) -> dict[str, str]:
    """The environment with these steps."""
    return {"TESAIOT_SCRIPT": "\n".join(steps)}


class _Scripted:
    def __init__(self, data: socket.socket, control: socket.socket) -> None:
        self._data, self._control = data, control
        self._lines = b""

    def run(self, steps: list[str]) -> NoReturn:
        for step in steps:
            word, _, rest = step.partition(" ")
            if word.startswith("{"):
                self._control.sendall(step.encode() + b"\n")
            elif word == "job":
                while not (line := self._order()):
                    pass
                if "TESAIOT_SCRIPT_JOB" in os.environ:
                    Path(os.environ["TESAIOT_SCRIPT_JOB"]).write_bytes(line)
            elif word == "serve":
                self._serve()
            elif word == "print":
                os.write(1, rest.encode() + b"\n")
            elif word == "abort":
                once = Path(rest.removeprefix("once ")) if rest else None
                if once is None or not once.exists():
                    if once is not None:
                        once.touch()
                    os.abort()
            elif word == "exit":
                os._exit(int(rest))
            elif word == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif word == "wait":
                while self._order() or True:
                    pass
            elif step == "close data":
                self._data.close()
            elif step == "close control":
                self._control.close()
        os._exit(0)

    def _order(self) -> bytes:
        """The next line from the parent, b"" while it is not whole; it ends with the parent."""
        if b"\n" not in self._lines:
            piece = self._control.recv(65536)
            if not piece:
                os._exit(0)
            self._lines += piece
        if b"\n" not in self._lines:
            return b""
        line, _, self._lines = self._lines.partition(b"\n")
        return line

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._data, selectors.EVENT_READ)
            selector.register(self._control, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._control:
                        line = self._order()
                        while line:  # several have come together where this process stood still
                            order = json.loads(line)
                            if order["type"] == "ping":
                                pong = json.dumps({"type": "pong", "number": order["number"]})
                                self._control.sendall(pong.encode() + b"\n")
                            line = self._order() if b"\n" in self._lines else b""
                    elif not self._taken():
                        return

    def _taken(self) -> bool:
        try:
            data = self._data.recv(65536)
        except ConnectionResetError:
            data = b""
        if data == b"stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif data == b"abort":
            os.write(2, b"pthread_mutex_lock: Invalid argument\n")
            os.abort()
        elif data and data != b"go on":
            self._data.sendall(data)
        return bool(data) and data != b"go on"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    given = [socket.socket(fileno=int(number)) for number in sys.argv[1:3]]
    _Scripted(*given).run(os.environ["TESAIOT_SCRIPT"].splitlines())
