"""Where a secret comes from: a value, a file, the environment, or a command's output.

Owns: reading secrets, noticing that they changed, and the words for where they are set. Rule: a
secret is read anew each time it is asked for, so that it may be changed under a running program;
it is never shown, and neither are a command's arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

import attrs

from .accounts import file_stamp
from .errors import ConnectorError
from .protocols import Duration, Secret

log = logging.getLogger(__name__)

_LARGEST = 64 * 1024
"""Bytes a secret may have: an MQTT password has at most 65,535 (MQTT 5 section 3.1.3.6)."""
_GRACE = 2.0
"""Seconds for what a command has written to arrive after its end."""


def _path(value: str | Path) -> Path:
    return Path(value)


def _program(command: tuple[str, ...] | None) -> str:
    """The program of a command, without arguments, as those who think of a shell write them too."""
    return (" ".join(command or ()).split() or ["None"])[0]


def _positive(_instance: Any, field: attrs.Attribute[Any], value: float) -> None:
    if value <= 0:
        raise ValueError(f"{field.name} must be more than 0")


@attrs.frozen(kw_only=True)
class SecretFrom:
    """A secret that is kept elsewhere: exactly one of `file`, `env` and `command`."""

    file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(_path))
    """File that holds it, in one line; line ends at its end do not count."""
    variable: str | None = None
    """With `file`: the file has NAME=value lines (.env), and the secret is the value of this name."""
    env: str | None = None
    """Name of an environment variable."""
    command: tuple[str, ...] | None = attrs.field(
        default=None, repr=_program, metadata={"write": '["program", "argument"], each argument apart'}
    )
    """Program and arguments, run without a shell: ["pass", "show", "mqtt"]. What it writes to its
    standard output is the secret, in one line."""
    timeout: Duration = attrs.field(default=Duration(10.0), validator=_positive)
    """How long the command may take."""
    _warned: list[Path] = attrs.field(factory=list, init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        given = {"file": self.file, "env": self.env, "command": self.command}
        names = [name for name, one in given.items() if one is not None]
        if len(names) != 1:
            told = f"{' and '.join(f'`{name}`' for name in names)} are given" if names else "none is given"
            raise ValueError(f"a secret has exactly one of `file`, `env` and `command`: {told}")
        if self.variable is not None and self.file is None:
            raise ValueError("`variable` is one of a `file` with NAME=value lines: give `file`, or `env`")
        if self.env is not None and (not self.env or "=" in self.env):
            raise ValueError('`env` is the name of an environment variable: write "NAME"')
        if self.command is not None and not (self.command and self.command[0]):
            raise ValueError('`command` is empty: write ["program", "argument"]')

    async def read(self) -> Secret:
        """Raises ConnectorError, naming the file, variable or command and what to do."""
        if self.file is not None:
            return self._from_file(self.file)
        if self.env is not None:
            return _from_environment(self.env)
        assert self.command is not None
        return await _from_command(self.command, self.timeout)

    def __str__(self) -> str:
        if self.file is not None:
            return f"{self.variable} in {self.file}" if self.variable else f"the file {self.file}"
        if self.env is not None:
            return f"the environment variable {self.env}"
        return f"the output of {_program(self.command)}"

    def _from_file(self, file: Path) -> Secret:
        try:
            with open(file, "rb", opener=_without_waiting) as opened:
                mode = os.fstat(opened.fileno()).st_mode
                data = opened.read(_LARGEST + 1) if stat.S_ISREG(mode) else b""
        except OSError as error:
            raise ConnectorError(
                f"{self} cannot be read for a secret: {error.strerror or error}",
                fix="check the path, and that the user who runs this may read it",
            ) from error
        if not stat.S_ISREG(mode):
            raise ConnectorError(f"{self} is not a regular file", fix="put the secret into a plain file")
        if os.name == "posix" and mode & stat.S_IROTH and not self._warned:
            self._warned.append(file)
            log.warning(
                "%s holds a secret and everybody on this machine can read it: chmod o-r %s", self, file
            )
        return _checked(data if self.variable is None else _variable(data, self.variable, file), str(self))


async def read_secret(secret: Secret | str | SecretFrom, key: str = "") -> str:
    """The text of a secret, read now. Raises ConnectorError; with `key`, it names that key of `auth`."""
    try:
        found = await secret.read() if isinstance(secret, SecretFrom) else secret
    except ConnectorError as error:
        if not key:
            raise
        what = f"`{key}` of this connection's `auth`: {error.what}"
        raise ConnectorError(what, fix=error.fix) from error
    return str.__str__(found)


def secret_origin(secret: Secret | str | SecretFrom, key: str) -> str:
    """Where a secret is set, for a message: "`password` of this connection's `auth`"."""
    kept = f" ({secret})" if isinstance(secret, SecretFrom) else ""
    return f"`{key}` of this connection's `auth`{kept}"


def secret_stamp(*secrets: Secret | str | SecretFrom) -> Hashable:
    """Equal for as long as the files of these secrets are untouched. Never raises."""
    return tuple(
        file_stamp(one.file) for one in secrets if isinstance(one, SecretFrom) and one.file is not None
    )


async def secret_changed(since: Hashable, *secrets: Secret | str | SecretFrom, interval: float = 1.0) -> None:
    """Returns when a file of these secrets is not as it was when `since` was stamped.

    Looks every `interval` seconds. Never returns for secrets without a file: what an environment
    variable or a command has to say cannot be watched.
    """
    while secret_stamp(*secrets) == since:  # noqa: ASYNC110 - not every system can tell of changed files
        await asyncio.sleep(interval)


def _without_waiting(name: str, flags: int) -> int:
    """Opens a file; a pipe too, although nobody writes to it."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _from_environment(name: str) -> Secret:
    if name not in os.environ:
        raise ConnectorError(
            f"the environment variable {name} is not set", fix=f"set {name} where this program is started"
        )
    return _checked(os.environ[name].encode(errors="surrogateescape"), f"the environment variable {name}")


def _variable(data: bytes, name: str, file: Path) -> bytes:
    """The value of a variable in the lines of a .env file."""
    from dotenv import dotenv_values

    try:
        lines = io.StringIO(data[: _LARGEST + 1].decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConnectorError(f"{file} is not text in UTF-8", fix="save it as UTF-8") from None
    found = dotenv_values(stream=lines, interpolate=False).get(name)
    if found is None:
        raise ConnectorError(f"{file} has no {name}", fix=f"write a line {name}=... into it")
    return found.encode()


# --- commands -----------------------------------------------------------------------------


class _Output:
    """What a process writes to a pipe: the beginning is kept, the rest is read and dropped.

    A thread of its own reads, so that it works under every event loop, and so that somebody who
    inherited the pipe from the process and keeps it open holds up nobody.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, name="secret command", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe as pipe:
            while data := pipe.read(4096):
                self._kept += data[: _LARGEST + 1 - len(self._kept)]

    def text(self, until: float) -> bytes:
        """Of what it has written; waits for the end of the pipe `until` then."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return bytes(self._kept)


class _Run:
    """One run of a command, in a thread. Whoever waits for it may end it before, while and after it runs."""

    def __init__(self, command: tuple[str, ...], timeout: float) -> None:
        self._command = command
        self._timeout = timeout
        self._lock = threading.Lock()
        self._unwanted = False
        self._process: subprocess.Popen[bytes] | None = None

    def finish(self) -> tuple[int | None, bytes, bytes]:
        """Exit code, standard output and standard error; no code if it had to be killed."""
        with self._lock:
            if self._unwanted:
                return None, b"", b""
            self._process = process = _start(self._command)
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = _Output(process.stdout), _Output(process.stderr)
        code: int | None = None
        try:
            code = process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
        end = time.monotonic() + _GRACE
        return code, out.text(end), err.text(end)

    def end(self) -> None:
        """Nobody waits any more: the thread ends with the process."""
        with self._lock:
            self._unwanted = True
            if self._process is not None and self._process.returncode is None:
                _kill(self._process)


async def _from_command(command: tuple[str, ...], timeout: float) -> Secret:
    program = _program(command)
    run = _Run(command, timeout)
    try:
        code, out, err = await asyncio.to_thread(run.finish)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check its name and that it is on the PATH"
        if program != command[0]:
            fix = f'there is no shell: write each argument apart, ["{program}", "..."]'
        told = ConnectorError(f"the command {program} for a secret cannot be run: {reason}", fix=fix)
        raise told from (error if program == command[0] else None)  # it names all of what was to be run
    finally:
        run.end()
    if code is None:
        raise ConnectorError(
            f"the command {program} for a secret did not end within {timeout:g} s and was stopped",
            fix="run it by hand with </dev/null: it may ask a question; or raise `timeout`",
        )
    if code:
        said = _without(" ".join(err.decode(errors="replace").split()), out)[:300]
        raise ConnectorError(
            f"the command {program} for a secret failed with code {code}" + (f": {said}" if said else ""),
            fix="run it by hand, as the user who runs this",
        )
    return _checked(out, f"the output of {program}")


def _start(command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - it is the integrator's own
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,  # so that it can be ended with all that it has started
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def _without(said: str, out: bytes) -> str:
    """What a command complained about, without what may be the secret."""
    for word in sorted(out.decode(errors="replace").split(), key=len, reverse=True):
        said = said.replace(word, "***")
    return said


def _checked(data: bytes, where: str) -> Secret:
    if len(data) > _LARGEST:
        raise ConnectorError(f"{where} is no secret: it has more than 64 KiB", fix="check what it names")
    try:
        text = data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:  # its text would show the byte
        raise ConnectorError(f"{where} is not text in UTF-8", fix="save it as UTF-8") from None
    if not text:
        raise ConnectorError(f"{where} holds no secret: it is empty", fix="put the secret there")
    if "\n" in text or "\r" in text:
        lines = len(text.splitlines())
        raise ConnectorError(
            f"{where} has {lines} lines, and a secret has one",
            fix="keep the secret alone there, or take its line by a command such as "
            '["sh", "-c", "pass show mqtt | head -n 1"]',
        )
    return Secret(text)
