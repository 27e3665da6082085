"""Where the memory of endpoints is kept: small files in the user's state folder.

Owns: that folder and its files. Rules: one file for an endpoint on a network, replaced at once, so that
neither a crash nor a second process can damage it; names and contents tell neither the endpoint nor the
network; what the disk does costs what was remembered, never a connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import time
from pathlib import Path

import msgspec

from ..state import check_private, make_private, state_folder, write_private
from .memory import UNKNOWN, Record
from .network import fingerprint

log = logging.getLogger(__name__)

_SUFFIX = ".endpoint"
_SALT = "salt"
_KEPT = 90 * 86400
"""Seconds after which a file that nobody wrote to is removed."""
_LARGEST = 4096
"""Bytes of a file that are looked at; ours have some hundred."""

_decode = msgspec.json.Decoder(Record).decode


def default_folder() -> Path:
    return state_folder("endpoints")


class Store:
    """Records by endpoint and network. `folder` None keeps them in memory.

    No method raises for what the disk does. What could not be written is known as long as the process runs.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._key = b"" if folder is not None else b"memory"
        """Of all digests: the same in all processes that use the folder."""
        self._own: dict[str, Record] = {}
        """By file name, what the folder does not have."""
        self._warned = False
        self._swept = False

    def network(self) -> str:
        """Where this machine is now."""
        return fingerprint(self._keyed())

    def read(self, endpoint: str, network: str) -> Record:
        name = self._name(endpoint, network)
        if self._folder is None or name in self._own:
            return self._own.get(name, UNKNOWN)
        try:
            check_private(self._folder)
            return _decode(_head(self._folder / name))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(error)
        except (msgspec.DecodeError, RecursionError) as error:
            log.debug("negotiation: %s in %s is none of ours: %s", name, self._folder, error)
        return UNKNOWN

    def write(self, endpoint: str, network: str, record: Record) -> None:
        name = self._name(endpoint, network)
        self._own[name] = record
        if self._folder is None:
            return
        try:
            make_private(self._folder)
            write_private(self._folder / name, msgspec.json.encode(record))
            del self._own[name]
            self._sweep(self._folder)
        except OSError as error:
            self._warn(error)

    def _name(self, endpoint: str, network: str) -> str:
        key = self._keyed()
        text = endpoint.encode(errors="surrogatepass")
        return f"{network}-{hashlib.blake2b(text, key=key, digest_size=16).hexdigest()}{_SUFFIX}"

    def _keyed(self) -> bytes:
        if not self._key and self._folder is not None:
            try:
                make_private(self._folder)
                salt = _salt(self._folder)
            except OSError as error:
                self._warn(error)
                salt = secrets.token_bytes(32)
            self._key = hashlib.blake2b(salt, digest_size=32).digest()
        return self._key

    def _sweep(self, folder: Path) -> None:
        """Remove what is of no use any more, once a process."""
        if self._swept:
            return
        self._swept = True
        oldest = time.time() - _KEPT
        for path in folder.iterdir():
            if path.suffix == _SUFFIX:  # those that start with a dot as well: of writers that died
                with contextlib.suppress(OSError):
                    if path.lstat().st_mtime < oldest:
                        path.unlink()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "what was learned about endpoints cannot be kept in %s: %s; connections work, but the next "
                "start learns it anew. Name a folder of this user in `memory_folder`, or `memory = false`",
                self._folder,
                error.strerror or error,
            )


def _head(path: Path) -> bytes:
    """Raises OSError."""
    with path.open("rb") as file:
        return file.read(_LARGEST)


def _salt(folder: Path) -> bytes:
    """The same for all processes: of several that make one at the same time, one's becomes everybody's.

    Whatever the file has is the salt, except nothing: so much is left of a file when power failed.
    """
    path = folder / _SALT
    try:
        found = _head(path)
    except FileNotFoundError:
        found = None
    if found:
        return found
    mine = folder / f".{secrets.token_hex(8)}{_SUFFIX}"
    write_private(mine, secrets.token_bytes(32))
    try:
        if found is not None:
            mine.replace(path)
        else:
            os.link(mine, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)
    return _head(path)
