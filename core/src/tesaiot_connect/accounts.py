"""Files of accounts: one on a line, changed by people and commands while a broker reads them.

Owns: reading such a file again when it changes, rewriting it, and the dates in it. Rules: a reader
sees the old file or the new one, never half of it; a change that cannot be read locks nobody out.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from .errors import ConnectorError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

T = TypeVar("T")

_DATE = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?([Zz]|[+-]\d\d:\d\d)?)?")


class AccountFile(Generic[T]):
    """The accounts of a file by their key, as the file is now.

    `parse` makes key and account of a line, and raises ValueError saying what is wrong with it,
    without what may be secret. Empty lines and lines that begin with # do not count. `what` is
    what to call the file, `fix` how to make one.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[str], tuple[str, T]],
        *,
        what: str,
        fix: str,
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.interval = interval
        """Seconds between two looks whether the file has changed."""
        self._parse = parse
        self._what = what
        self._fix = fix
        self._clock = clock
        self._looked = -float("inf")
        self._stamp: Hashable = None
        self._told = ""
        self._accounts: Mapping[str, T] | None = None

    def current(self) -> Mapping[str, T]:
        """The accounts now. A change that cannot be read is logged, and the accounts from before
        stay. Raises ConnectorError, naming file and line, while there are none.
        """
        now = self._clock()
        if self._accounts is not None and now - self._looked < self.interval:
            return self._accounts
        self._looked = now
        stamp = file_stamp(self.path)
        if self._accounts is None or stamp != self._stamp:
            try:
                self._accounts = self.read()
            except ConnectorError as error:
                if self._accounts is None:
                    raise
                if isinstance(error.__cause__, OSError):  # it may pass without a change of the file
                    stamp = None
                if (told := str(error)) != self._told:
                    log.error("%s. Until then the accounts from before stay in force", error)
                self._told = told
            else:
                self._told = ""
            self._stamp = stamp
        return self._accounts

    def read(self) -> dict[str, T]:
        """What the file says now. Raises ConnectorError, naming file and line."""
        try:
            lines = self._lines()
        except FileNotFoundError as error:
            raise ConnectorError(f"the {self._what} {self.path} does not exist", fix=self._fix) from error
        except OSError as error:
            raise ConnectorError(
                f"the {self._what} {self.path} cannot be read: {error.strerror or error}",
                fix="check its permissions, and that it is a file",
            ) from error
        return {key: account for key, account, _ in self._parsed(lines)}

    def rewrite(self, change: Callable[[Mapping[str, T]], Mapping[str, str | None]]) -> None:
        """Change accounts as one step: `change` is given those there are, and gives the new lines
        of some by key, None for one that goes. Everything else stays as it is, comments too.

        Two writers take turns (by the file `<path>.lock`); a reader sees the old file or the new
        one, and so does whoever comes after a crash. A new file is for its owner alone; one that
        exists keeps its owner and mode, but for the rights of everybody. Raises ConnectorError.
        """
        path = self.path.resolve()  # a link stays one
        try:
            with _locked(path.with_name(f"{path.name}.lock")):
                try:
                    before, lines = path.stat(), self._lines()
                except FileNotFoundError:
                    before, lines = None, []
                found = self._parsed(lines)
                new = dict(change({key: account for key, account, _ in found}))
                kept: list[str | None] = [line.decode() for line in lines]
                for key, _, index in found:
                    if key in new:
                        kept[index] = new.pop(key)
                kept += new.values()
                _replace(path, "".join(f"{line}\n" for line in kept if line is not None), before)
        except OSError as error:
            fix = "check that the folder exists and that you may write there"
            if error.filename and str(error.filename) != str(path):
                fix += f" (it is about {error.filename})"
            raise ConnectorError(
                f"the {self._what} {path} cannot be written: {error.strerror or error}", fix=fix
            ) from error

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()

    def _parsed(self, lines: Sequence[bytes]) -> list[tuple[str, T, int]]:
        """Key, account and index of each line that holds one. Raises ConnectorError."""
        found: dict[str, tuple[str, T, int]] = {}
        for index, line in enumerate(lines):
            try:
                text = _decoded(line)
                if not text.strip() or text.lstrip().startswith("#"):
                    continue
                key, account = self._parse(text)
                if key in found:
                    raise ValueError(f"it is of the same account as line {found[key][2] + 1}")
            except ValueError as error:
                raise ConnectorError(
                    f"the {self._what} {self.path} is damaged in line {index + 1}: {error}",
                    fix="correct the line or remove it",
                ) from error
            found[key] = key, account, index
        return list(found.values())


def _replace(path: Path, text: str, before: os.stat_result | None) -> None:
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # of a writer that was killed: there is one at a time
    try:
        with open(new, "xb", opener=_private) as file:
            file.write(text.encode())
            if before is not None and os.name == "posix":
                _own_as(file.fileno(), before)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode) & 0o770)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _private(name: str, flags: int) -> int:
    """Opens a file that is for its owner alone if it is new."""
    return os.open(name, flags, 0o600)


def _own_as(number: int, before: os.stat_result) -> None:
    """Raises PermissionError where that is not allowed: whoever reads the file now could not any more."""
    now = os.fstat(number)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        try:
            os.fchown(number, before.st_uid, before.st_gid)
        except PermissionError as error:
            what = "you are not its owner, who must stay the same"
            raise PermissionError(error.errno, what) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits while another process is inside. Closing the file ends it, so a crash does too."""
    with open(path, "ab", opener=_private) as file:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_stamp(path: Path) -> Hashable:
    """Equal for as long as a file is untouched, even by who puts its time back; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def check_account_name(name: str, what: str = "a name") -> None:
    """Raises ValueError for what cannot stand in such a file, or is no single topic level."""
    if not name or name != name.strip() or name.startswith("$") or re.search(r"[:/+#\x00-\x1f\x7f]", name):
        raise ValueError(
            f"{what} must not be empty, begin with $, begin or end with a space, or contain : / + # or "
            "control characters"
        )


def parse_date(text: str, *, end: bool = False) -> float:
    """Seconds since the epoch of an RFC 3339 date or time; without an offset it is UTC.

    A date alone is its first moment, with `end` the end of that day. Raises ValueError.
    """
    try:
        match = _DATE.fullmatch(text)
        if match is None:
            raise ValueError(text)
        found = dt.datetime.fromisoformat(text.upper())
        if found.tzinfo is None:
            found = found.replace(tzinfo=dt.UTC)
        return (found + dt.timedelta(days=1 if end and match[1] is None else 0)).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(f'{text!r} is not a date: write "2026-12-31" or "2026-12-31T12:00:00Z"') from error


def format_date(seconds: float) -> str:
    """As `parse_date` reads it, to the second, in UTC."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:  # it has the line, which may hold a secret
        raise ValueError("it is not text in UTF-8") from None
