"""Reading and writing the sandbox's files.

Owns: how a file of DIR comes to be, and that one sandbox at a time makes them. Rules: a file is whole
or is not there; what is secret is readable by its owner alone; what cannot be used is named, with
what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConnectorError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While open, no other sandbox uses the folder; a crash ends it too. Raises ConnectorError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "sandbox.lock", "ab")  # noqa: SIM115, PTH123 - closed below
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock:
        try:
            if sys.platform == "win32":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise ConnectorError(
                    f"another sandbox uses {folder}", fix="use that one, or end it, or give another folder"
                ) from error
            raise _unwritable(folder / "sandbox.lock", error) from error
        yield


def write(file: Path, content: str | bytes, *, secret: bool = False) -> None:
    """Put `content` in the place of the file at once. Raises ConnectorError."""
    data = content.encode() if isinstance(content, str) else content
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as temporary:
                temporary.write(data)
                temporary.flush()
                os.fsync(temporary.fileno())
            Path(name).chmod(0o600 if secret else 0o644)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> ConnectorError:
    return ConnectorError(
        f"{file} cannot be written: {error.strerror or error}",
        fix="give the sandbox a folder that this user may write to",
    )


def read(file: Path) -> str | None:
    """The text of a file, None where there is none. Raises ConnectorError."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(file, str(getattr(error, "strerror", None) or error)) from error


def damaged(file: Path, why: str) -> ConnectorError:
    """The error for a file of DIR that cannot be used."""
    return ConnectorError(
        f"{file} is damaged: {why}",
        fix="put a copy of it in its place, or delete the sandbox's whole folder: it is made anew at the "
        "next start",
    )
