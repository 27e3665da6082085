"""Certificates for aioquic: whom a client trusts, and who a listener is.

Owns: the translation of the `tls` tables. Rules: what was checked is what is used, so files are read
once, into memory; aioquic's own list of authorities (certifi's) is never fallen back to.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import re
import ssl
from pathlib import Path

import attrs
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID

from tesaiot_connect import ConnectFailed, ConnectorError, ServerTls, TlsOptions

log = logging.getLogger(__name__)

_LOOK_EVERY = 5.0
"""Seconds between two looks at a listener's files."""
_BITS = 2048
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\s.*?-----END CERTIFICATE-----", re.DOTALL)
_KEY = re.compile(rb"-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY-----\s.*?-----END \1PRIVATE KEY-----", re.DOTALL)


# --- client


@attrs.frozen
class Trust:
    """The verification settings of a QuicConfiguration, under its names.

    `server_name` None means the host of the endpoint: fill it in, since aioquic verifies no name
    where it has none. `digest` changes with whatever a session was verified against.
    """

    cafile: str | None
    capath: str | None
    cadata: bytes | None = attrs.field(repr=False)
    verify_mode: ssl.VerifyMode
    server_name: str | None
    digest: str


def client_trust(tls: TlsOptions) -> Trust:
    """Reads the CA file anew. Raises ConnectFailed, naming the file and what to do."""
    if tls.verify == "none":
        tls.client_context()  # warns
        return Trust(None, None, b"", ssl.CERT_NONE, tls.server_name, _digest("none"))
    if tls.ca_file is not None:
        tls.client_context()  # words for a file that cannot be used
        authorities = _authorities(tls.ca_file)
        return Trust(
            None, None, authorities, ssl.CERT_REQUIRED, tls.server_name, _digest("file", authorities)
        )
    paths = ssl.get_default_verify_paths()
    if paths.cafile or paths.capath:
        seen = "\0".join(f"{path} {_signature(path)}" for path in (paths.cafile, paths.capath) if path)
        digest = _digest("system", seen.encode())
        return Trust(paths.cafile, paths.capath, None, ssl.CERT_REQUIRED, tls.server_name, digest)
    # Windows: the store is no file
    found = ssl.create_default_context().get_ca_certs(binary_form=True)
    authorities = _pem([ssl.DER_cert_to_PEM_cert(der).encode() for der in found])
    return Trust(None, None, authorities, ssl.CERT_REQUIRED, tls.server_name, _digest("store", authorities))


def unfit(certificate: x509.Certificate) -> tuple[str, str] | None:
    """Why a server's certificate must be rejected that aioquic accepts: (what, fix), or None.

    OpenSSL checks these for mqtts://, aioquic does not: that the certificate is meant for servers
    (RFC 5280 section 4.2.1.12; a device's client certificate is not), and the size of an RSA key.
    """
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usage = None
    except ValueError:
        return "the server's certificate has broken extensions", "issue it anew"
    if usage is not None and not {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    } & set(usage):
        return (
            "the server's certificate is not meant for servers (extended key usage)",
            "issue one with serverAuth for the server",
        )
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _BITS:
        return (
            f"the server's certificate has an RSA key of {key.key_size} bits",
            f"use a key of {_BITS} bits or more",
        )
    return None


def _authorities(ca_file: Path) -> bytes:
    try:
        data = ca_file.read_bytes()
    except OSError as error:
        raise ConnectFailed(
            f"the CA file {ca_file} cannot be read: {error.strerror}",
            fix="check its permissions and the user this program runs as",
        ) from error
    pem = _pem(_CERTIFICATE.findall(data))
    if not pem:
        raise ConnectFailed(
            f"the CA file {ca_file} holds no certificate",
            fix="it must be PEM: text with -----BEGIN CERTIFICATE----- lines",
        )
    return pem


def _pem(blocks: list[bytes]) -> bytes:
    """Those certificates that can be read, as aioquic wants them; an odd one must not cost the others."""
    readable = []
    for block in blocks:
        try:
            readable.append(x509.load_pem_x509_certificate(block))
        except ValueError as error:
            log.debug("quic: left out an authority that cannot be read: %s", error)
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in readable)


def _digest(kind: str, data: bytes = b"") -> str:
    return hashlib.sha256(kind.encode() + b"\0" + data).hexdigest()


# --- listener


@attrs.frozen
class _Identity:
    certificate: x509.Certificate
    chain: list[x509.Certificate]
    key: PrivateKeyTypes


class ServerIdentity:
    """Certificate and key of a listener, loaded anew when their files change."""

    def __init__(self, tls: ServerTls) -> None:
        """Raises ConnectorError, naming the file and what to do."""
        if tls.client_certificate != "none":
            raise ConnectorError(
                "a QUIC listener takes no client certificates, and this one has "
                f'client_certificate = "{tls.client_certificate}"',
                fix="leave it out, and add an mqtts:// listener for clients that have one",
            )
        self._tls = tls
        self._looked = float("-inf")
        self._seen = self._look()
        self._identity = _load(tls)

    def apply(self, configuration: QuicConfiguration) -> None:
        """For connections that begin from now on."""
        configuration.certificate = self._identity.certificate
        configuration.certificate_chain = self._identity.chain
        configuration.private_key = self._identity.key

    def reload(self, now: float) -> bool:
        """Whether a new certificate is in use since the last call: `apply` it.

        `now` is a clock in seconds that does not go back. Looks at the files every 5 seconds at most.
        A pair that cannot be used is logged once, and the old one stays.
        """
        if now - self._looked < _LOOK_EVERY:
            return False
        self._looked = now
        seen = self._look()
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            self._identity = _load(self._tls)
        except ConnectorError as error:
            log.error("quic: the listener keeps its old certificate: %s", error)
            return False
        log.info(
            "quic: the listener uses the new certificate %s, valid until %s",
            self._tls.certificate,
            self._identity.certificate.not_valid_after_utc,
        )
        return True

    def _look(self) -> tuple[object, object]:
        return _signature(self._tls.certificate), _signature(self._tls.key)


def _load(tls: ServerTls) -> _Identity:
    tls.server_context()  # words for files that are missing or do not belong together
    what = f"the server certificate {tls.certificate} and key {tls.key} cannot be used over QUIC"
    try:
        blocks = _CERTIFICATE.findall(tls.certificate.read_bytes())
        certificate, *chain = [x509.load_pem_x509_certificate(block) for block in blocks]
        key = _key(tls)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConnectFailed(f"{what}: {error}", fix="both must be PEM files, the key RSA or P-256") from error
    if _public(certificate.public_key()) != _public(key.public_key()):  # written between the two readings
        raise ConnectFailed(f"{what}: they do not belong together", fix="write both files, then try again")
    if isinstance(key, ec.EllipticCurvePrivateKey):
        fit = isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1))
    else:
        fit = isinstance(key, (rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey))
    if not fit:
        raise ConnectFailed(
            f"the server key {tls.key} is of a kind that cannot be used over QUIC",
            fix="use an RSA key, or one on the curve P-256",
        )
    if certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        log.warning("quic: the server certificate %s has expired: clients will reject it", tls.certificate)
    return _Identity(certificate, chain, key)


def _key(tls: ServerTls) -> PrivateKeyTypes:
    found = _KEY.search(tls.key.read_bytes())
    if found is None:
        raise ValueError("there is no PRIVATE KEY in the key file")
    try:
        return serialization.load_pem_private_key(found[0], None)
    except TypeError:  # encrypted
        passphrase = b"" if tls.passphrase is None else tls.passphrase.reveal().encode()
        return serialization.load_pem_private_key(found[0], passphrase)


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _signature(path: str | Path) -> tuple[int, ...]:
    """Changes when the file does; () while there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino
