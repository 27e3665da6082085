"""The sandbox's own authority and what it issues.

Owns: ca/, server.pem, and the devices' client certificates. Rules: private keys are readable by
their owner alone; what expires within a week is issued anew, and so is what a new authority did
not sign.

EC P-256 throughout: a key takes a millisecond to make, and every TLS stack knows it.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConnectorError
from .files import damaged, write

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder, ExtensionType, GeneralName, Name

_DAY = datetime.timedelta(days=1)
_AUTHORITY = 3650 * _DAY
_LEAF = 365 * _DAY
_EARLY = 7 * _DAY
"""A certificate is renewed this long before its end."""


class Authority:
    """Issues certificates; `ca_file` is what clients trust."""

    def __init__(self, folder: Path, *, now: datetime.datetime | None = None) -> None:
        """Read from `folder`, or made there. `now` is the time to judge by. Raises ConnectorError."""
        self._now = now or datetime.datetime.now(datetime.UTC)
        try:
            import cryptography  # noqa: F401 - says early what is missing
        except ImportError as error:
            raise ConnectorError(
                "the sandbox makes certificates, for which the package `cryptography` is missing",
                fix='install it: pip install "tesaiot-connect[sandbox]"',
            ) from error
        self.ca_file, key_file = folder / "ca.pem", folder / "ca.key"
        if not self.ca_file.exists() and not key_file.exists():
            self._create(key_file)
        certificate, key = _load(self.ca_file), _load_key(key_file)
        if certificate.public_key() != key.public_key():
            raise damaged(key_file, f"it is not the key of {self.ca_file}")
        if self._ends_soon(certificate):
            self._create(key_file)
            certificate, key = _load(self.ca_file), _load_key(key_file)
        self._certificate, self._key = certificate, key

    def server(self, certificate: Path, key: Path, names: Sequence[str]) -> None:
        """A server's certificate for host names and addresses, unless a good one is there."""
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        wanted = x509.SubjectAlternativeName([_name(one) for one in names])
        if (found := self._good(certificate, key)) is not None:
            extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            if set(wanted) <= set(extension.value):
                return
        subject = _subject(names[0], "TESAIoT sandbox")
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        self._issue(certificate, key, subject, [wanted, usage])

    def client(self, certificate: Path, key: Path, name: str, organisation: str) -> None:
        """A client's certificate, common name `name`, unless a good one is there."""
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        subject = _subject(name, organisation)
        found = self._good(certificate, key)
        if found is None or found.subject != subject:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
            names = x509.SubjectAlternativeName([x509.DNSName(name)])
            self._issue(certificate, key, subject, [names, usage])

    def _good(self, certificate: Path, key: Path) -> Certificate | None:
        """What is there already, if it is ours and lasts."""
        if not certificate.exists() or not key.exists():
            return None
        found = _load(certificate)
        if found.public_key() != _load_key(key).public_key():
            raise damaged(key, f"it is not the key of {certificate}")
        if found.issuer != self._certificate.subject or self._ends_soon(found):
            return None
        return found

    def _ends_soon(self, certificate: Certificate) -> bool:
        return certificate.not_valid_after_utc - _EARLY < self._now

    def _create(self, key_file: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        # the number tells this authority's certificates from those of one that was deleted
        subject = _subject(f"TESAIoT sandbox CA {x509.random_serial_number():040x}"[:58], "TESAIoT sandbox")
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        made = (
            self._builder(subject, subject, key, _AUTHORITY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _save(self.ca_file, key_file, [made], key)

    def _builder(
        self, subject: Name, issuer: Name, key: EllipticCurvePrivateKey, life: datetime.timedelta
    ) -> CertificateBuilder:
        from cryptography import x509

        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - _DAY)
            .not_valid_after(self._now + life)
        )

    def _issue(
        self, certificate: Path, key_file: Path, subject: Name, extensions: Sequence[ExtensionType]
    ) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(subject, self._certificate.subject, key, _LEAF)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        for extension in (issuer, *extensions):
            builder = builder.add_extension(extension, critical=False)
        _save(certificate, key_file, [builder.sign(self._key, hashes.SHA256())], key)


def _save(
    certificate: Path, key_file: Path, chain: Sequence[Certificate], key: EllipticCurvePrivateKey
) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write(key_file, pem, secret=True)
    write(certificate, b"".join(one.public_bytes(Encoding.PEM) for one in chain))


def _load(file: Path) -> Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(file, _why(error, "it holds no certificate")) from error


def _load_key(file: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise damaged(file, _why(error, "it holds no private key")) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise damaged(file, "it is not a key that the sandbox made")
    return key


def _why(error: Exception, otherwise: str) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else otherwise


def _subject(name: str, organisation: str) -> Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _name(text: str) -> GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
