"""qlog: what happened on a connection, for qvis and Wireshark.

Owns: the files. Rule: an event is on disk when it happened, not when the connection ends, so a
crash shows too and memory stays small; a disk that fails costs the log, not the connection. The
format is qlog in JSON text sequences (RFC 7464).
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from aioquic.quic.logger import QLOG_VERSION, QuicLogger, QuicLoggerTrace

log = logging.getLogger(__name__)

_SEPARATOR = "\x1e"


class _Log(deque[dict[str, Any]]):
    """Takes aioquic's events and writes them, until the first time that this fails.

    aioquic appends a packet that came before it has put its frames in, so `settle` says when that is done.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._held: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        try:
            self._file = path.open("w", buffering=1, encoding="ascii")
        except OSError as error:
            self._failed(path, error)

    def append(self, event: dict[str, Any]) -> None:
        if event.get("name") == "transport:packet_received":
            self.settle()
            self._held.append(event)
        elif self._held:
            self._held.append(event)
        else:
            self._write(event)

    def settle(self) -> None:
        held, self._held = self._held, []
        for event in held:
            self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        file = self._file
        if file is not None:
            try:
                file.write(f"{_SEPARATOR}{json.dumps(event, separators=(',', ':'))}\n")
            except OSError as error:
                self.close()
                self._failed(Path(file.name), error)

    def close(self) -> None:
        self.settle()
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _failed(self, path: Path, error: OSError) -> None:
        log.warning("the qlog %s is not written: %s", path, error.strerror or error)


class QlogFolder(QuicLogger):
    """One file for each connection, in `folder`, which it makes. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._logs: dict[QuicLoggerTrace, _Log] = {}

    def start_trace(self, is_client: bool, odcid: bytes) -> QuicLoggerTrace:
        trace = QuicLoggerTrace(is_client=is_client, odcid=odcid)
        side = "client" if is_client else "server"
        events = self._logs[trace] = _Log(self._folder / f"{odcid.hex()}-{side}.sqlog")
        events.append(
            {
                "qlog_format": "JSON-SEQ",
                "qlog_version": QLOG_VERSION,
                "trace": {
                    "common_fields": {"ODCID": odcid.hex(), "time_format": "absolute"},
                    "vantage_point": {"name": "tesaiot-connect", "type": side},
                    "description": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                },
            }
        )
        trace._events = events
        return trace

    def settle(self, trace: QuicLoggerTrace) -> None:
        """A datagram has been dealt with."""
        events = self._logs.get(trace)
        if events is not None:
            events.settle()

    def end_trace(self, trace: QuicLoggerTrace) -> None:
        events = self._logs.pop(trace, None)
        if events is not None:
            events.close()
