"""What a server's certificate says.

Owns: reading it. Rule: it is read for people alone; whether it is good the transport has decided. The
library `cryptography` reads it where it is installed, as with QUIC; else only its fingerprint is known.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from cryptography import x509


@attrs.frozen
class Certificate:
    """Dates are seconds since the epoch."""

    sha256: str
    """Fingerprint, hexadecimal."""
    subject: str = ""
    issuer: str = ""
    names: tuple[str, ...] = ()
    """Host names and addresses that it is for."""
    not_before: float | None = None
    not_after: float | None = None
    chain: tuple[str, ...] = ()
    """Subjects of who issued it, of who issued that, and so on, as far as they are known."""

    def days_left(self, now: float) -> float | None:
        return None if self.not_after is None else (self.not_after - now) / 86400


def read(der: bytes, authorities: bytes = b"") -> Certificate:
    """`authorities` are PEM certificates among which its issuers may be. Never raises for what they hold."""
    alone = Certificate(hashlib.sha256(der).hexdigest())
    try:
        from cryptography import x509
    except ImportError:
        return alone
    try:
        found = x509.load_der_x509_certificate(der)
        names: tuple[str, ...] = ()
        try:
            listed = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = (
                *listed.get_values_for_type(x509.DNSName),
                *map(str, listed.get_values_for_type(x509.IPAddress)),
            )
        except x509.ExtensionNotFound:
            pass
        return Certificate(
            alone.sha256,
            _shown(found.subject.rfc4514_string()),
            _shown(found.issuer.rfc4514_string()),
            tuple(_shown(name) for name in names),
            found.not_valid_before_utc.timestamp(),
            found.not_valid_after_utc.timestamp(),
            _chain(found, authorities),
        )
    except ValueError:
        return alone


def _chain(found: x509.Certificate, authorities: bytes) -> tuple[str, ...]:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    def issued(issuer: x509.Certificate) -> bool:
        try:
            found.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    try:
        known = x509.load_pem_x509_certificates(authorities)
    except ValueError:
        return ()
    chain: list[str] = []
    while (issuer := next(filter(issued, known), None)) is not None:
        known.remove(issuer)
        chain.append(_shown(issuer.subject.rfc4514_string()))
        found = issuer
    return tuple(chain)


def _shown(text: str) -> str:
    """Fit for a terminal, whoever wrote it."""
    return "".join(one if one.isprintable() else " " for one in text[:300])
