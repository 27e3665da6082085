"""The user's state folder: what a program learned and keeps for its next run.

Owns: where that folder is, and how a file of it is written. Rules: files are their owner's alone; a file
is whole or is not there, also when two processes write it or one is killed; what is kept there may vanish
at any time, so nobody depends on it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

_PLANTABLE = "it belongs to another user, or others may write to it"
_PLACES = {"win32": ("AppData", "Local"), "darwin": ("Library", "Application Support")}


def state_folder(name: str) -> Path:
    """The folder of one purpose, where this system has such things, or where XDG_STATE_HOME says (XDG base
    directories). Creates nothing."""
    base = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME", ""))
    if base.is_absolute():  # unset, empty or relative: the XDG specification ignores it
        return base / "tesaiot-connect" / name
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home, as in some containers
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"tesaiot-connect-{name}-{user}"
    return home.joinpath(*_PLACES.get(sys.platform, (".local", "state")), "tesaiot-connect", name)


def check_private(folder: Path) -> None:
    """Raises OSError where others could have planted what is in the folder, or where there is none."""
    found = folder.stat()
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(_PLANTABLE)


def make_private(folder: Path) -> None:
    """The folder is there afterwards, and private. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)


def write_private(file: Path, data: bytes) -> None:
    """Puts `data` in the place of the file at once, mode 0600. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=file.suffix, dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(data)
        Path(temporary).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
