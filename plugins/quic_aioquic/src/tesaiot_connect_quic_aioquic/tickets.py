"""What a client keeps to resume TLS sessions, in memory or in a folder (RFC 8446 sections 2.2 and 4.6.1).

Owns: the folder and its files. Rules: a ticket is used once (RFC 8446 appendix C.4), over all
processes; it never crosses a key; and what the disk does costs a resumption, never a connection.

A ticket holds a secret that stands in for the server's certificate: whoever could plant one could
pose as the server. So a folder that others may write to is not used.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import msgspec
from aioquic.tls import CipherSuite, SessionTicket

from tesaiot_connect import state

log = logging.getLogger(__name__)

LIFETIME = 7 * 86400
"""Seconds a ticket may be kept at most, whatever the server says (RFC 8446 section 4.6.1)."""

_VERSION = 1
_KEPT = 4
_SUFFIX = ".ticket"


@attrs.frozen
class TicketKey:
    """Where a ticket came from: it is used nowhere else.

    `identity` is a digest of everything else that a session must not cross: the trust settings
    it was verified with, ALPN, the QUIC version (RFC 9369 section 5), the client's certificate.
    """

    host: str
    port: int
    server_name: str
    identity: str

    @property
    def digest(self) -> str:
        """For file names: tells nothing about the key. 32 hex digits."""
        return hashlib.sha256(msgspec.json.encode(attrs.astuple(self))).hexdigest()[:32]


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    age_add: int
    cipher_suite: int
    not_valid_before: datetime.datetime
    not_valid_after: datetime.datetime
    resumption_secret: bytes
    server_name: str | None
    ticket: bytes
    max_early_data_size: int | None
    other_extensions: list[tuple[int, bytes]]


_decode = msgspec.json.Decoder(_Stored).decode


def pack(ticket: SessionTicket) -> bytes:
    """The ticket as JSON. Holds its secret."""
    return msgspec.json.encode(
        _Stored(
            version=_VERSION,
            age_add=ticket.age_add,
            cipher_suite=int(ticket.cipher_suite),
            not_valid_before=ticket.not_valid_before,
            not_valid_after=ticket.not_valid_after,
            resumption_secret=ticket.resumption_secret,
            server_name=ticket.server_name,
            ticket=ticket.ticket,
            max_early_data_size=ticket.max_early_data_size,
            other_extensions=[(int(kind), data) for kind, data in ticket.other_extensions],
        )
    )


def unpack(data: bytes) -> SessionTicket:
    """Raises ValueError for anything that `pack` of this release did not write."""
    stored = _decode(data)
    if stored.version != _VERSION:
        raise ValueError(f"format {stored.version}, this release reads {_VERSION}")
    if stored.not_valid_before.tzinfo is None or stored.not_valid_after.tzinfo is None:
        raise ValueError("times without a time zone")
    fields: dict[str, Any] = msgspec.structs.asdict(stored)
    del fields["version"]
    fields["cipher_suite"] = CipherSuite(stored.cipher_suite)
    return SessionTicket(**fields)


def usable(ticket: SessionTicket, lifetime: float = LIFETIME) -> bool:
    """Whether its time has begun, and has not ended by its own word or after `lifetime` seconds."""
    age = datetime.datetime.now(datetime.UTC) - ticket.not_valid_before
    return bool(ticket.is_valid) and age.total_seconds() < lifetime


def default_folder() -> Path:
    """Does not create it."""
    return state.state_folder("quic-tickets")


class Tickets:
    """Tickets by key, newest first. `folder` None keeps them in memory.

    Several processes may share a folder. No method raises for what the disk does.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[TicketKey, list[SessionTicket]] = {}
        self._warned = False
        self._swept = False

    def take(self, key: TicketKey) -> SessionTicket | None:
        """The newest ticket that can be used, which nobody will be given again; None without one."""
        if self._folder is None:
            kept = self._memory.get(key, [])
            while kept:
                newest = kept.pop()
                if usable(newest):
                    return newest
            return None
        try:
            if not self._folder.is_dir():
                return None
            state.check_private(self._folder)
            for path in self._files(self._folder, key):
                ticket = self._claim(path)
                if ticket is not None:
                    return ticket
        except OSError as error:
            self._warn(error)
        return None

    def put(self, key: TicketKey, ticket: SessionTicket) -> None:
        """Keep it; of one key the newest 4 stay."""
        if not usable(ticket):
            return
        if self._folder is None:
            kept = self._memory.setdefault(key, [])
            kept.append(ticket)
            del kept[:-_KEPT]
            return
        try:
            state.make_private(self._folder)
            self._write(self._folder, key, pack(ticket))
            for path in self._files(self._folder, key)[_KEPT:]:
                path.unlink(missing_ok=True)
            if not self._swept:
                self._swept = True
                self._sweep(self._folder)
        except OSError as error:
            self._warn(error)

    # --- files: <digest of the key>-<time, so that names sort by age>-<random>.ticket

    def _files(self, folder: Path, key: TicketKey) -> list[Path]:
        return sorted(folder.glob(f"{key.digest}-*{_SUFFIX}"), reverse=True)

    def _write(self, folder: Path, key: TicketKey, data: bytes) -> None:
        name = f"{key.digest}-{time.time_ns():020d}-{secrets.token_hex(4)}{_SUFFIX}"
        state.write_private(folder / name, data)

    def _claim(self, path: Path) -> SessionTicket | None:
        """Read it and remove it: it belongs to the one process whose removal succeeds."""
        try:
            data = path.read_bytes()
            path.unlink()
        except FileNotFoundError:
            return None
        except PermissionError:
            if sys.platform == "win32":  # another process has it open or is removing it
                return None
            raise
        try:
            ticket = unpack(data)
        except ValueError as error:
            log.debug("quic: dropped the session ticket %s: %s", path, error)
            return None
        return ticket if usable(ticket) else None

    def _sweep(self, folder: Path) -> None:
        """Remove what is too old to be of use: of servers nobody asks any more, of writers that died."""
        oldest = time.time() - LIFETIME
        for path in folder.glob(f"*{_SUFFIX}"):  # those that start with a dot as well
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "quic: session tickets cannot be kept in %s: %s; connections work, but the next start "
                "pays for a full handshake",
                self._folder,
                error.strerror or error,
            )
