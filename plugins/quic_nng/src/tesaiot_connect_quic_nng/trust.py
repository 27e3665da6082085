"""Who the server must be and who we are, as the libraries can be told.

Owns: what of the tls table and an identity they can keep, and the words for what they cannot. Rule: nothing
that was asked for is left undone in silence; a key is decrypted in memory and is never on disk.
"""

from __future__ import annotations

import functools
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from tesaiot_connect import ClientCertificate, ConnectFailed, Unsupported

from .transport import QuicNng

_CERTIFICATES = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_KEY = re.compile(rb"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.+?-----END \1-----", re.DOTALL)


class Pair(NamedTuple):
    """A certificate with its chain, and its key, not encrypted; PEM."""

    certificate: str
    key: str


def pair(recipe: QuicNng, identity: ClientCertificate | None) -> Pair | None:
    """What the library is to show, None for nothing. Reads files.

    The libraries verify a server only where they have a client certificate themselves. So where there is no
    identity they get one that says nothing. Raises ConnectFailed, naming the file and what to do, and
    Unsupported.
    """
    verified = recipe.tls.verify == "full"
    if identity is not None and not verified:
        raise Unsupported(
            f"{recipe.place}: quic_nng cannot show a client certificate to a server that it does not verify",
            fix='remove verify = "none" from the tls table and put the CA of the server into its ca_file, '
            'or use via = "quic_aioquic" or another endpoint',
        )
    recipe.tls.client_context(identity)  # it knows the words for whatever is wrong with the files
    if identity is not None:
        return _open(identity)
    return throwaway() if verified else None


@functools.cache
def throwaway() -> Pair:
    """A certificate that stands for nobody: the same one while this process lives, and never in a file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tesaiot-connect, nobody")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    return Pair(certificate.public_bytes(Encoding.PEM).decode(), _plain(key))


def _open(identity: ClientCertificate) -> Pair:
    """Of an identity that OpenSSL has accepted, unless it was replaced since."""
    passphrase = identity.passphrase.reveal().encode() if identity.passphrase is not None else None
    try:
        if identity.pem is None:
            chain, secret = Path(identity.certificate).read_bytes(), Path(identity.key).read_bytes()
        else:
            chain = secret = identity.pem
        certificates, found = _CERTIFICATES.findall(chain), _KEY.search(secret)
        if not certificates or found is None:
            raise ValueError("no certificate or key in it")
        text = found[0]
        encrypted = b"ENCRYPTED" in text
        key = load_pem_private_key(text, passphrase if encrypted else None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConnectFailed(
            f"the client certificate {identity.certificate} and key {identity.key} cannot be used: {error}",
            fix="both must be PEM, with a P-256, Ed25519 or RSA key",
        ) from error
    return Pair(b"\n".join(certificates).decode() + "\n", _plain(key))


def _plain(key: PrivateKeyTypes) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
