"""Certificates that tests describe field by field: keys of every kind, odd names, any dates, chains."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
KINDS = ("rsa", "ec", "ed25519")


def new_key(kind: str = "ec") -> PrivateKeyTypes:
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048)
    if kind == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def distinguished(cn: Sequence[str] = (), o: Sequence[str] = (), ou: Sequence[str] = ()) -> x509.Name:
    oids = {NameOID.ORGANIZATION_NAME: o, NameOID.ORGANIZATIONAL_UNIT_NAME: ou, NameOID.COMMON_NAME: cn}
    return x509.Name([x509.NameAttribute(oid, text) for oid, texts in oids.items() for text in texts])


@attrs.frozen
class Issued:
    """A certificate, its key, and the certificates of the authorities behind it, the root's excepted."""

    certificate: x509.Certificate
    key: PrivateKeyTypes
    above: tuple[x509.Certificate, ...] = ()

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def certificate_pem(self) -> bytes:
        """The chain."""
        return b"".join(one.public_bytes(Encoding.PEM) for one in (self.certificate, *self.above))

    def key_pem(self, passphrase: str = "", *, traditional: bool = False) -> bytes:
        form = PrivateFormat.TraditionalOpenSSL if traditional else PrivateFormat.PKCS8
        return self.key.private_bytes(Encoding.PEM, form, _encryption(passphrase))

    def pkcs12(self, passphrase: str = "", *, name: str = "device") -> bytes:
        return pkcs12.serialize_key_and_certificates(
            name.encode(),
            self.key,  # type: ignore[arg-type]
            self.certificate,
            self.above or None,
            _encryption(passphrase),
        )

    def write(self, folder: Path, passphrase: str = "") -> tuple[Path, Path]:
        """The files client.pem and client.key."""
        folder.mkdir(parents=True, exist_ok=True)
        certificate, key = folder / "client.pem", folder / "client.key"
        certificate.write_bytes(self.certificate_pem)
        key.write_bytes(self.key_pem(passphrase))
        return certificate, key


def _encryption(passphrase: str) -> KeySerializationEncryption:
    return BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()


class Authority:
    """Issues certificates; `under` makes it an intermediate one."""

    def __init__(self, name: str = "test authority", *, under: Authority | None = None) -> None:
        self.name = distinguished([name])
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        issuer = under or self
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(issuer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 365 * DAY)
            .not_valid_after(now + 365 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(issuer.key, hashes.SHA256())
        )
        self.above = () if under is None else (self.certificate, *under.above)

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return path

    def issue(
        self,
        cn: str | Sequence[str] = "device-1",
        *,
        o: Sequence[str] = (),
        ou: Sequence[str] = (),
        alternatives: Iterable[x509.GeneralName] = (),
        key: PrivateKeyTypes | None = None,
        kind: str = "ec",
        begins: float = -30,
        ends: float = 90,
        usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH,
        serial: int | None = None,
    ) -> Issued:
        """`begins` and `ends` are days from now."""
        key = key or new_key(kind)
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(distinguished([cn] if isinstance(cn, str) else cn, o, ou))
            .issuer_name(self.name)
            .public_key(key.public_key())  # type: ignore[arg-type]
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(now + begins * DAY)
            .not_valid_after(now + ends * DAY)
        )
        names = list(alternatives)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return Issued(builder.sign(self.key, hashes.SHA256()), key, self.above)
