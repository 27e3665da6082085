"""Programs that tests build from source in this repository: built once a change, kept in `.work/`."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".work"


def unavailable(reason: str) -> NoReturn:
    """Skips the test, or fails it where `make test` has installed what it needs."""
    if os.environ.get("TESAIOT_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{reason}: run `make servers`")
    pytest.skip(reason)


def compiled(
    name: str,
    sources: Sequence[Path],
    command: Callable[[Path], Sequence[str]],
    *,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """The program built from `sources` by `command(output)`, an argument list that is run in their folder.

    The file's name holds a digest of the sources and the command, so an unchanged program is built once.
    A lock keeps test runs that start together from building it twice. `environment` adds to our own.
    """
    import fcntl  # not on Windows, where nothing is built

    digest = hashlib.sha256()
    for part in (*command(Path("output")), *(f"{k}={v}" for k, v in sorted((environment or {}).items()))):
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update(source.read_bytes() + b"\0")
    program = WORK / "bin" / f"{name}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with (program.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if program.exists():
            return program
        for stale in program.parent.glob(f"{name}-*"):
            stale.unlink()
        output = program.parent / f"new.{name}"
        done = subprocess.run(
            command(output),
            cwd=sources[0].parent,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name} does not build:\n{done.stdout}{done.stderr}"
        output.rename(program)
    return program
