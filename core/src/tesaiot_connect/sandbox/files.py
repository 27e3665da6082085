"""Reading and writing the sandbox's files.

Owns: how a file of DIR comes to be. Rules: a file is whole or is not there; what is secret is
readable by its owner alone; what cannot be used is named, with what to do.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import ConnectorError


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
        raise ConnectorError(
            f"{file} cannot be written: {error.strerror or error}",
            fix="give the sandbox a folder that this user may write to",
        ) from error


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
