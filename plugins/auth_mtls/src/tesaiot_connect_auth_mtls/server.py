"""A listener that knows its clients by their certificates.

Owns: from a verified certificate to a principal. Rule: a name that could mean something in a topic
pattern, or that is not the only one, names nobody.
"""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from tesaiot_connect import Access, Credentials, NotApplicable, Peer, Principal, Refused

from .revoked import Revoked

if TYPE_CHECKING:
    from cryptography import x509

_NOT_AUTHORIZED = 0x87
_UNAVAILABLE = 0x88
_FORBIDDEN = frozenset("/+#*{}")
_HOLDERS = "token:"
"""How the names of those begin who hold a token: rules tell them by it."""
_LONGEST = 256


def _path(value: str | Path) -> Path:
    return Path(value)


@attrs.frozen(kw_only=True)
class CertificateAuth:
    """Knows a client by the certificate it showed; the listener's `server_tls` says which authorities'
    are accepted (`ca_file`, and `client_certificate = "required"` or "optional").

    A client without one is left to the listener's next `auth`.
    """

    principal: Literal["cn", "dns", "uri", "email"] = attrs.field(
        default="cn",
        metadata={
            "help": "Where the client's name stands: the common name, or the DNS name, URI or e-mail address "
            "among the subject alternative names. There must be exactly one."
        },
    )
    organisation: Literal["o", "ou", "none"] = attrs.field(
        default="o",
        metadata={"help": "Where its organisation stands: O or OU of the subject; 'none' takes none."},
    )
    revoked_file: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(_path),
        metadata={
            "help": "Certificates that are not accepted any more: serial numbers or SHA-256 fingerprints in "
            "hex, one a line; read again when it changes.",
            "exists": True,
        },
    )
    access: Access = attrs.field(
        factory=Access, metadata={"help": "What the clients may do; default: the `[access]` table."}
    )
    _revoked: Revoked = attrs.field(
        init=False,
        repr=False,
        eq=False,
        default=attrs.Factory(lambda self: Revoked(self.revoked_file), takes_self=True),
    )

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Principal:
        """Username and password do not count. Raises Refused, and NotApplicable without a certificate."""
        if peer.certificate is None:
            raise NotApplicable(
                "the client showed no certificate",
                fix='give it one, or set client_certificate = "optional" in the listener\'s server_tls',
                reason_code=_NOT_AUTHORIZED,
            )
        from cryptography import x509

        try:
            found = x509.load_der_x509_certificate(peer.certificate)
            name = _only(_names(found, self.principal), _KINDS[self.principal])
            if name.lower().startswith(_HOLDERS):
                raise ValueError(f"its {_KINDS[self.principal]} {name[:80]!a} names the holder of a token")
            if self.organisation == "none":
                organisation = None
            else:
                held = _of_subject(found, self.organisation)
                organisation = _only(held, _KINDS[self.organisation]) if held else None
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            raise Refused(
                f"the client's certificate names nobody: {error}",
                fix="issue one with one plain name",
                reason_code=_NOT_AUTHORIZED,
                permanent=True,
            ) from error
        valid_until = found.not_valid_after_utc.timestamp()
        if time.time() >= valid_until:  # a TLS session that was resumed is not verified again
            raise Refused(
                f"the certificate of {name!r} has expired",
                fix="renew it",
                reason_code=_NOT_AUTHORIZED,
                permanent=True,
            )
        fingerprint = hashlib.sha256(peer.certificate).hexdigest()
        refusal = functools.partial(self._revoked.refusal, found.serial_number, fingerprint)
        if told := refusal():
            known = self._revoked.known
            raise Refused(
                told,
                fix="give the client another certificate" if known else "see the broker's log",
                reason_code=_NOT_AUTHORIZED if known else _UNAVAILABLE,
                permanent=known,
            )
        return self.access.principal(
            name, organisation=organisation, valid_until=valid_until, refusal=refusal
        )


_KINDS = {
    "cn": "common name",
    "dns": "DNS name",
    "uri": "URI",
    "email": "e-mail address",
    "o": "organisation (O)",
    "ou": "organisational unit (OU)",
}


def _names(certificate: x509.Certificate, kind: str) -> list[str]:
    """Raises ValueError."""
    from cryptography import x509

    if kind == "cn":
        return _of_subject(certificate, kind)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    if kind == "dns":
        return names.get_values_for_type(x509.DNSName)
    if kind == "uri":
        return names.get_values_for_type(x509.UniformResourceIdentifier)
    return names.get_values_for_type(x509.RFC822Name)


def _of_subject(certificate: x509.Certificate, kind: str) -> list[str]:
    from cryptography.x509.oid import NameOID

    oids = {
        "cn": NameOID.COMMON_NAME,
        "o": NameOID.ORGANIZATION_NAME,
        "ou": NameOID.ORGANIZATIONAL_UNIT_NAME,
    }
    values = [one.value for one in certificate.subject.get_attributes_for_oid(oids[kind])]
    return [value if isinstance(value, str) else value.decode("latin-1") for value in values]


def _only(found: list[str], what: str) -> str:
    """The one name. Raises ValueError where there is none, more than one, or one that topics cannot have."""
    if not found:
        raise ValueError(f"it has no {what}")
    if len(found) > 1:
        listed = ", ".join(ascii(name[:40]) for name in found[:4])
        raise ValueError(f"it has {len(found)} of the kind {what} ({listed})")
    name = found[0]
    shown = ascii(name[:80])
    if not name or name != name.strip():
        raise ValueError(f"its {what} {shown} is empty or begins or ends with a space")
    if len(name) > _LONGEST:
        raise ValueError(f"its {what} {shown}... is longer than {_LONGEST} characters")
    if not name.isprintable() or name.startswith("$") or not _FORBIDDEN.isdisjoint(name):
        raise ValueError(
            f"its {what} {shown} cannot stand in a topic: / + # * {{ }}, a $ in front and control characters "
            "are not allowed"
        )
    return name
