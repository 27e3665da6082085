"""Certificates that are not accepted any more.

Owns: the file of revoked certificates. Rule: a file that cannot be read lets nobody in whom it might
name: what was read last stays in force, and before anything was read all are refused.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

log = logging.getLogger(__name__)

_HEX = re.compile(r"(?:0x)?([0-9a-f]+)\Z")
_SERIAL_DIGITS, _FINGERPRINT_DIGITS = 40, 64
"""A serial number has at most 20 octets (RFC 5280 section 4.1.2.2)."""


class Revoked:
    """What a file lists, read again when the file changes."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._seen: tuple[int, ...] | None = None
        self._said = ""
        self._serials: frozenset[int] = frozenset()
        self._fingerprints: frozenset[str] = frozenset()
        self.known = file is None
        """Whether the list was ever read."""

    def refusal(self, serial: int, fingerprint: str) -> str:
        """Why this certificate is not accepted, "" where it is. `fingerprint`: SHA-256, lower case hex."""
        if self._file is not None:
            self._look(self._file)
        if not self.known:
            return "the list of revoked certificates cannot be read"
        if serial in self._serials or fingerprint in self._fingerprints:
            return "the certificate was revoked"
        return ""

    def _look(self, file: Path) -> None:
        try:
            found = file.stat()
            now = (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
            if now == self._seen:
                return
            self._seen = now
            self._serials, self._fingerprints = read_revoked(file)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):  # it may pass without a change of the file
                self._seen = None
            reason = getattr(error, "strerror", None) or str(error)
            if reason != self._said:
                self._said = reason
                kept = "what it said before still counts" if self.known else "no certificate is accepted"
                log.error("the list of revoked certificates %s cannot be read, %s: %s", file, kept, reason)
            return
        count = len(self._serials) + len(self._fingerprints)
        log.info("%s was read: %d certificates are revoked", file, count)
        self._said, self.known = "", True


def read_revoked(file: Path) -> tuple[frozenset[int], frozenset[str]]:
    """Serial numbers, and fingerprints in lower case hex. Raises OSError, and ValueError naming the line.

    A line is hex digits, with or without colons, as openssl prints them after a "=" ("serial=0A1B");
    what follows a `#` is a comment.
    """
    serials, fingerprints = set(), set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].rpartition("=")[2].replace(":", "").strip().lower()
        if not text:
            continue
        match = _HEX.match(text)
        digits = match[1] if match else ""
        if len(digits) == _FINGERPRINT_DIGITS:
            fingerprints.add(digits)
        elif 0 < len(digits.lstrip("0")) <= _SERIAL_DIGITS:
            serials.add(int(digits, 16))
        else:
            raise ValueError(
                f"line {number} is neither a serial number nor a SHA-256 fingerprint in hex: {line[:80]!r}"
            )
    return frozenset(serials), frozenset(fingerprints)
