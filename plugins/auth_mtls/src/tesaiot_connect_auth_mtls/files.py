"""Certificate and key from files, as a TLS handshake wants them.

Owns: reading PEM and PKCS#12, and the words for what is wrong with them or will be soon. Rule: no
private key leaves here in the clear: what a PKCS#12 file held is encrypted anew before it is given on.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
    pkcs12,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from tesaiot_connect import ClientCertificate, ConnectFailed, Secret

log = logging.getLogger(__name__)

_LABEL = re.compile(rb"-----BEGIN ([A-Z0-9# ]+)-----")
_ELSEWHERE = (b"PKCS#11 PROVIDER URI", b"TSS2 PRIVATE KEY")
"""PEM labels of keys that a provider of OpenSSL keeps: they cannot be looked at here."""
_PEM = "-----BEGIN CERTIFICATE-----"


@attrs.frozen
class Found:
    """What the files hold. `chain` is what the file has behind the client's own certificate."""

    identity: ClientCertificate
    file: Path
    leaf: x509.Certificate
    chain: tuple[x509.Certificate, ...]


def from_pem(certificate: Path, key: Path, passphrase: str | None) -> Found:
    """Raises ConnectFailed."""
    chain = _certificates(certificate)
    data = _read(key, "client key")
    labels = _LABEL.findall(data)
    if not any(label in _ELSEWHERE for label in labels):
        _check_pair(chain, certificate, _key(data, labels, key, passphrase), key)
    secret = None if passphrase is None else Secret(passphrase)
    return Found(ClientCertificate(str(certificate), str(key), secret), certificate, chain[0], chain[1:])


def from_pkcs12(file: Path, passphrase: str | None) -> Found:
    """Raises ConnectFailed. What it gives is in memory, with the key encrypted by a random passphrase."""
    data = _read(file, "PKCS#12 file")
    if _LABEL.search(data):
        raise ConnectFailed(
            f"{file} is a PEM file, not PKCS#12", fix="name it `certificate` (and `key`) instead of `pkcs12`"
        )
    try:
        held = pkcs12.load_pkcs12(data, None if passphrase is None else passphrase.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _pkcs12_failure(file, passphrase, error) from error
    if held.key is None or held.cert is None:
        lacks = "no private key" if held.key is None else "no certificate that its key belongs to"
        raise ConnectFailed(
            f"the PKCS#12 file {file} has {lacks}",
            fix="export it again with both: openssl pkcs12 -export -in client.pem -inkey client.key -out "
            f"{file.name}",
        )
    leaf, chain = held.cert.certificate, tuple(one.certificate for one in held.additional_certs)
    chain = _in_order(leaf, chain)
    own = secrets.token_urlsafe(32)
    pem = b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, *chain)) + held.key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(own.encode())
    )
    return Found(ClientCertificate(str(file), str(file), Secret(own), pem=pem), file, leaf, chain)


def judge(found: Found, warn: float) -> None:
    """Raises ConnectFailed where the certificate is not valid now; logs what may be refused, and an
    end that is nearer than `warn` seconds."""
    now = datetime.now(UTC)
    what = f"the client certificate {found.file} ({found.leaf.subject.rfc4514_string() or 'without a name'})"
    first, last = found.leaf.not_valid_before_utc, found.leaf.not_valid_after_utc
    if now > last:
        raise ConnectFailed(
            f"{what} has expired on {last:%Y-%m-%d %H:%M} UTC",
            fix="renew it and put it in the same place; if it is valid, this machine's clock is wrong",
        )
    if now < first:
        raise ConnectFailed(
            f"{what} is not valid before {first:%Y-%m-%d %H:%M} UTC",
            fix=f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC: set it if that is wrong",
        )
    if last - now <= timedelta(seconds=warn):
        log.warning(
            "%s expires on %s UTC, in %d days: renew it; it is read again at the next connect",
            what,
            f"{last:%Y-%m-%d %H:%M}",
            (last - now).days,
        )
    for doubt in _doubts(found, now):
        log.warning("%s: %s", what, doubt)


# --- inside


def _doubts(found: Found, now: datetime) -> Iterator[str]:
    """What a server will probably not like, in words."""
    try:
        usage = found.leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        usage = None
    if usage is not None and not {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    }.intersection(usage):
        yield "its extended key usage is not for clients: servers may refuse it; have one issued for clients"
    for one in found.chain:
        if now > one.not_valid_after_utc:
            yield f"the authority {one.subject.rfc4514_string()} behind it has expired"
    for issued, issuer in pairwise((found.leaf, *found.chain)):
        if issued.issuer != issuer.subject:
            yield (
                f"{issuer.subject.rfc4514_string()} stands behind a certificate that it did not issue: put "
                f"that of {issued.issuer.rfc4514_string()} there, or the server cannot follow the chain"
            )


def _read(path: Path, what: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConnectFailed(
            f"the {what} {path} does not exist",
            fix=f"relative paths start at {Path.cwd()}; the platform's bundle brings the file",
        ) from error
    except OSError as error:
        raise ConnectFailed(
            f"the {what} {path} cannot be read: {error.strerror}",
            fix="check its permissions and the user this program runs as",
        ) from error
    if not data.strip():
        raise ConnectFailed(f"the {what} {path} is empty", fix="put the file there again")
    return data


def _certificates(path: Path) -> tuple[x509.Certificate, ...]:
    data = _read(path, "client certificate")
    labels = _LABEL.findall(data)
    if b"CERTIFICATE" not in labels:
        raise _no_certificate(path, data, labels)
    try:
        return tuple(x509.load_pem_x509_certificates(data))
    except ValueError as error:
        raise ConnectFailed(
            f"a certificate in {path} is damaged: {error}", fix="copy the file again, whole"
        ) from error


def _no_certificate(path: Path, data: bytes, labels: list[bytes]) -> ConnectFailed:
    what = f"{path} holds no certificate"
    if b"CERTIFICATE REQUEST" in labels or b"NEW CERTIFICATE REQUEST" in labels:
        return ConnectFailed(
            f"{what} but a request for one", fix="have an authority sign it, and use what it gives back"
        )
    if labels:
        held = " and ".join(label.decode().lower() for label in dict.fromkeys(labels))
        return ConnectFailed(f"{what} but {held}", fix="the key's file is `key`, the other one `certificate`")
    try:
        x509.load_der_x509_certificate(data)
    except ValueError:
        pass
    else:
        return ConnectFailed(
            f"the client certificate {path} is DER, not PEM",
            fix=f"convert it: openssl x509 -inform DER -in {path.name} -out client.pem",
        )
    try:
        pkcs12.load_pkcs12(data, None)
        is_pkcs12 = True
    except (ValueError, UnsupportedAlgorithm) as error:
        is_pkcs12 = "password" in str(error)
    if is_pkcs12:
        return ConnectFailed(f"{path} is a PKCS#12 file", fix="name it `pkcs12` instead of `certificate`")
    return ConnectFailed(what, fix=f"it must be PEM: text with {_PEM}")


def _key(data: bytes, labels: list[bytes], path: Path, passphrase: str | None) -> PrivateKeyTypes:
    if not any(label.endswith(b"PRIVATE KEY") for label in labels):
        raise _no_key(path, data, labels)
    encrypted = b"ENCRYPTED PRIVATE KEY" in labels or b"Proc-Type: 4,ENCRYPTED" in data
    if encrypted and passphrase is None:
        raise ConnectFailed(f"the client key {path} is encrypted", fix="set `passphrase` beside it")
    pem = data[data.index(b"-----BEGIN", _start_of_key(data)) :]
    try:
        return load_pem_private_key(
            pem, passphrase.encode() if encrypted and passphrase is not None else None
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if encrypted:
            raise ConnectFailed(
                f"the passphrase does not open the client key {path}",
                fix=f"check `passphrase`; to see whether it is right: openssl pkey -noout -in {path.name}",
            ) from error
        raise ConnectFailed(
            f"the client key {path} cannot be used: {error}", fix="copy the file again, whole"
        ) from error


def _start_of_key(data: bytes) -> int:
    """Where its PEM block begins: other blocks, EC parameters for one, may stand before it."""
    match = re.search(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----", data)
    assert match is not None
    return match.start()


def _no_key(path: Path, data: bytes, labels: list[bytes]) -> ConnectFailed:
    what = f"{path} holds no private key"
    if labels:
        held = " and ".join(label.decode().lower() for label in dict.fromkeys(labels))
        return ConnectFailed(f"{what} but {held}", fix="set `key` to the file of the private key")
    try:
        load_der_private_key(data, None)
        is_der = True
    except TypeError:  # it is one, and encrypted
        is_der = True
    except (ValueError, UnsupportedAlgorithm):
        is_der = False
    if is_der:
        return ConnectFailed(
            f"the client key {path} is DER, not PEM",
            fix=f"convert it: openssl pkey -inform DER -in {path.name} -out client.key",
        )
    return ConnectFailed(what, fix="it must be PEM: text with -----BEGIN PRIVATE KEY-----")


def _check_pair(
    chain: tuple[x509.Certificate, ...], certificate: Path, key: PrivateKeyTypes, key_file: Path
) -> None:
    ours = _public(key)
    matching = [number for number, one in enumerate(chain) if _of(one) == ours]
    if not matching:
        raise ConnectFailed(
            f"the client key {key_file} does not belong to the certificate {certificate} "
            f"({chain[0].subject.rfc4514_string()})",
            fix="use the key that the certificate was requested with; if both were just renewed, "
            "the second file may not be there yet",
        )
    if matching[0]:
        raise ConnectFailed(
            f"the client's own certificate is not the first one in {certificate}",
            fix="put it first, then the intermediate ones, each before its issuer",
        )


def _public(key: PrivateKeyTypes) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _of(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _pkcs12_failure(file: Path, passphrase: str | None, error: Exception) -> ConnectFailed:
    if "password" not in str(error).lower():
        return ConnectFailed(
            f"the PKCS#12 file {file} cannot be read: {error}", fix="export or copy it again, whole"
        )
    if passphrase is None:
        return ConnectFailed(f"the PKCS#12 file {file} is encrypted", fix="set `passphrase` beside it")
    return ConnectFailed(
        f"the passphrase does not open the PKCS#12 file {file}",
        fix=f"check `passphrase`; to see whether it is right: openssl pkcs12 -noout -in {file.name}",
    )


def _in_order(leaf: x509.Certificate, others: tuple[x509.Certificate, ...]) -> tuple[x509.Certificate, ...]:
    """Each behind the one it issued, as TLS sends them; a self-signed one is of no use to a server."""
    ordered: list[x509.Certificate] = []
    last = leaf
    while True:
        issuer = next((o for o in others if o.subject == last.issuer and o not in (leaf, *ordered)), None)
        if issuer is None or issuer.subject == issuer.issuer:
            return tuple(ordered)
        ordered.append(issuer)
        last = issuer
