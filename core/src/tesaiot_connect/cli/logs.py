"""What the log looks like.

Owns: the two formats, for people and for machines. Rule: one line for each record, on standard
error; a traceback only when it was asked for.
"""

from __future__ import annotations

import logging
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import Any

import click
import msgspec

_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


class _Stderr(logging.Handler):
    """Writes to whatever standard error is now: the live figures put themselves in between."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - what logging does with errors of its own
            self.handleError(record)


class Human(logging.Formatter):
    """12:00:01 warning  client: the words. `debug` adds tracebacks."""

    def __init__(self, *, debug: bool, colour: bool) -> None:
        super().__init__()
        self._debug, self._colour = debug, colour

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname.lower():8}"
        if self._colour and record.levelname in _COLOURS:
            level = click.style(level, fg=_COLOURS[record.levelname])
        text = f"{clock} {level} {_room(record.name)}: {record.getMessage()}"
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            kind = f"{type(error).__name__}: {error}"
            text += "" if kind in text else f": {kind}"
            place = _place(error)
            text += f" ({place}; --debug shows the traceback)" if place and not self._debug else ""
            if self._debug:
                text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        return text if self._debug else text.replace("\n", " | ")


class Json(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, error, at."""

    def __init__(self, *, debug: bool) -> None:
        super().__init__()
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{clock}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            line["error"] = f"{type(error).__name__}: {error}"
            if place := _place(error):
                line["at"] = place
            if self._debug:
                line["traceback"] = "".join(traceback.format_exception(error))
        return msgspec.json.encode(line).decode()


def _place(error: BaseException) -> str:
    """Where in a step or plugin an error came up; "" if it was not there."""
    own, library = str(Path(__file__).parents[1]), sysconfig.get_path("stdlib")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        theirs = "site-packages" in frame.filename or not frame.filename.startswith(library)
        if theirs and not frame.filename.startswith((own, "<")):
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return ""


def _room(name: str) -> str:
    return name.removeprefix("tesaiot_connect").lstrip("._") or name


def configure(log_format: str, level: str, *, debug: bool) -> None:
    """Send all log records to standard error."""
    handler = _Stderr()
    handler.setFormatter(
        Json(debug=debug) if log_format == "json" else Human(debug=debug, colour=sys.stderr.isatty())
    )
    logging.basicConfig(handlers=[handler], level="DEBUG" if debug else level.upper(), force=True)
    logging.getLogger("asyncio").setLevel("DEBUG" if debug else "WARNING")
    # aioquic's own words on each connection; what matters of them our messages say, with what to do
    logging.getLogger("quic").setLevel("DEBUG" if debug or level == "debug" else "ERROR")
    logging.captureWarnings(True)
