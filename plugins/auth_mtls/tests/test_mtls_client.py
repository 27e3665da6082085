"""The client's certificate: what is read, what is said of it, and that OpenSSL takes what comes out."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from issuing import KINDS, Authority, Issued, new_key

from tesaiot_connect import ClientCertificate, ConnectFailed, Secret, SecretFrom, TlsOptions, Unsupported
from tesaiot_connect_auth_mtls import AuthMtls

AUTHORITY = Authority()
DEVICE = AUTHORITY.issue("device-1")


def identity(auth: AuthMtls) -> ClientCertificate:
    return asyncio.run(auth.identity())


def taken(found: ClientCertificate) -> ssl.SSLContext:
    """OpenSSL takes it."""
    return TlsOptions().client_context(found)


def pair(issued: Issued, folder: Path, passphrase: str = "") -> dict[str, Any]:
    certificate, key = issued.write(folder, passphrase)
    return {"certificate": certificate, "key": key}


# --- what is read -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passphrase", ["", "opensesame"])
def test_pem_files_are_handed_on_where_they_are(kind: str, passphrase: str, tmp_path: Path) -> None:
    files = pair(AUTHORITY.issue(kind=kind), tmp_path, passphrase)
    found = identity(AuthMtls(**files, passphrase=Secret(passphrase) if passphrase else None))
    assert (found.certificate, found.key, found.pem) == (str(files["certificate"]), str(files["key"]), None)
    taken(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passphrase", ["", "opensésame"])
def test_pkcs12(kind: str, passphrase: str, tmp_path: Path) -> None:
    issued = Authority("in between", under=AUTHORITY).issue(kind=kind)
    file = tmp_path / "client.p12"
    file.write_bytes(issued.pkcs12(passphrase))
    found = identity(AuthMtls(pkcs12=file, passphrase=Secret(passphrase) if passphrase else None))
    taken(found)
    assert found.pem is not None and found.passphrase is not None
    assert [one.subject for one in x509.load_pem_x509_certificates(found.pem)] == [
        one.subject for one in (issued.certificate, *issued.above)
    ]


def test_a_key_of_a_pkcs12_file_is_nowhere_in_the_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "client.p12", tmp_path / "temporary"
    folder.mkdir()
    file.write_bytes(DEVICE.pkcs12())  # not encrypted, even
    found = identity(AuthMtls(pkcs12=file))
    assert found.pem is not None and b"BEGIN ENCRYPTED PRIVATE KEY" in found.pem
    assert DEVICE.key_pem() not in found.pem and "PRIVATE KEY" not in repr(found)
    with pytest.raises(TypeError, match="encrypted"):
        load_pem_private_key(found.pem[found.pem.index(b"-----BEGIN ENCRYPTED") :], None)

    written: list[tuple[bytes, int]] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, certificate: str, *rest: Any, **named: Any) -> None:
        written.append((Path(certificate).read_bytes(), Path(certificate).stat().st_mode & 0o777))
        load(self, certificate, *rest, **named)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    taken(found)
    ((data, mode),) = written
    assert data == found.pem
    assert mode == 0o600 or sys.platform == "win32"
    assert list(folder.iterdir()) == []


def test_the_temporary_file_goes_when_openssl_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConnectFailed):
        taken(ClientCertificate("client.p12", "client.p12", Secret("x"), pem=b"nonsense"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConnectFailed, match=r"no temporary file.*TMPDIR"):
        taken(ClientCertificate("client.p12", "client.p12", Secret("x"), pem=b"nonsense"))


def test_one_file_with_certificate_and_key(tmp_path: Path) -> None:
    file = tmp_path / "both.pem"
    for data in (DEVICE.certificate_pem + DEVICE.key_pem("x"), DEVICE.key_pem("x") + DEVICE.certificate_pem):
        file.write_bytes(data)
        taken(identity(AuthMtls(certificate=file, passphrase=Secret("x"))))


def test_an_old_openssl_key_with_its_parameters_in_front(tmp_path: Path) -> None:
    files = pair(DEVICE, tmp_path)
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    for passphrase in ("", "x"):
        files["key"].write_bytes(parameters + DEVICE.key_pem(passphrase, traditional=True))
        taken(identity(AuthMtls(**files, passphrase=Secret(passphrase) if passphrase else None)))


def test_a_key_that_a_provider_of_openssl_keeps_is_left_to_it(tmp_path: Path) -> None:
    files = pair(DEVICE, tmp_path)
    files["key"].write_text(
        "-----BEGIN PKCS#11 PROVIDER URI-----\nMA==\n-----END PKCS#11 PROVIDER URI-----\n"
    )
    assert identity(AuthMtls(**files)).key == str(files["key"])


@pytest.mark.skipif(sys.platform == "win32", reason="uses a POSIX command")
def test_the_passphrase_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pair(DEVICE, tmp_path, "opensesame")
    (tmp_path / "passphrase").write_text("opensesame\n")
    monkeypatch.setenv("MTLS_PASSPHRASE", "opensesame")
    for kept in (
        SecretFrom(file=tmp_path / "passphrase"),
        SecretFrom(env="MTLS_PASSPHRASE"),
        SecretFrom(command=("echo", "opensesame")),
    ):
        taken(identity(AuthMtls(**files, passphrase=kept)))


def test_files_are_read_at_each_connect(tmp_path: Path) -> None:
    auth = AuthMtls(**pair(AUTHORITY.issue(ends=-1), tmp_path))
    with pytest.raises(ConnectFailed, match="has expired"):
        identity(auth)
    DEVICE.write(tmp_path)
    taken(identity(auth))


def test_credentials() -> None:
    async def login(auth: AuthMtls) -> tuple[str | None, bytes | None, str]:
        found = (await auth.begin()).credentials
        return found.username, found.password, found.origin

    alone = asyncio.run(login(AuthMtls(certificate="client.pem", key="client.key")))
    assert alone == (None, None, "the certificate client.pem of this connection's `auth`")
    both = asyncio.run(login(AuthMtls(pkcs12="client.p12", username="device-1", password=Secret("s"))))
    assert both[:2] == ("device-1", b"s")
    assert "client.p12" in both[2] and "`username`" in both[2]


# --- what is wrong ------------------------------------------------------------------------

Make = Callable[[Path], AuthMtls]


def broken(**content: bytes) -> Make:
    """The good pair, with other content in `certificate` or `key`."""

    def make(folder: Path) -> AuthMtls:
        files = pair(DEVICE, folder)
        for name, data in content.items():
            files[name].write_bytes(data)
        return AuthMtls(**files)

    return make


def encrypted(passphrase: str | None, *, p12: bool = False) -> Make:
    def make(folder: Path) -> AuthMtls:
        secret = None if passphrase is None else Secret(passphrase)
        if p12:
            (folder / "client.p12").write_bytes(DEVICE.pkcs12("right"))
            return AuthMtls(pkcs12=folder / "client.p12", passphrase=secret)
        return AuthMtls(**pair(DEVICE, folder, "right"), passphrase=secret)

    return make


def with_pkcs12(data: bytes) -> Make:
    def make(folder: Path) -> AuthMtls:
        (folder / "client.p12").write_bytes(data)
        return AuthMtls(pkcs12=folder / "client.p12")

    return make


def issued(**how: Any) -> Make:
    return lambda folder: AuthMtls(**pair(AUTHORITY.issue(**how), folder))


DER_KEY = DEVICE.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
REQUEST = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(DEVICE.certificate.subject)
    .sign(DEVICE.key, DEVICE.certificate.signature_hash_algorithm)  # type: ignore[arg-type]
    .public_bytes(Encoding.PEM)
)
AUTHORITY_PEM = AUTHORITY.certificate.public_bytes(Encoding.PEM)

WRONG: dict[str, tuple[Make, str, str]] = {
    "missing certificate": (
        lambda folder: AuthMtls(certificate=folder / "client.pem"),
        r"client certificate .*client\.pem does not exist",
        "relative paths start at",
    ),
    "missing key": (
        lambda folder: AuthMtls(certificate=pair(DEVICE, folder)["certificate"], key=folder / "absent.key"),
        r"client key .*absent\.key does not exist",
        "relative paths start at",
    ),
    "missing pkcs12": (
        lambda folder: AuthMtls(pkcs12=folder / "client.p12"),
        r"client\.p12 does not exist",
        "bundle",
    ),
    "folder": (lambda folder: AuthMtls(certificate=folder), "cannot be read", "permissions"),
    "empty": (broken(certificate=b"\n"), r"client\.pem is empty", "again"),
    "no certificate": (broken(certificate=b"hello"), r"client\.pem holds no certificate", "must be PEM"),
    "damaged": (
        broken(certificate=b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"),
        r"certificate in .*client\.pem is damaged",
        "copy the file again",
    ),
    "swapped": (broken(certificate=DEVICE.key_pem()), r"holds no certificate but private key", "`key`"),
    "request": (broken(certificate=REQUEST), r"holds no certificate but a request", "authority sign"),
    "DER certificate": (
        broken(certificate=DEVICE.der),
        r"client\.pem is DER, not PEM",
        "openssl x509 -inform DER",
    ),
    "PKCS#12 as certificate": (
        broken(certificate=DEVICE.pkcs12("x")),
        "is a PKCS#12 file",
        "name it `pkcs12`",
    ),
    "DER key": (broken(key=DER_KEY), r"client\.key is DER, not PEM", "openssl pkey -inform DER"),
    "certificate as key": (
        broken(key=DEVICE.certificate_pem),
        "holds no private key but certificate",
        "set `key`",
    ),
    "no key": (broken(key=b"hello"), r"client\.key holds no private key", "must be PEM"),
    "damaged key": (
        broken(key=b"-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n"),
        r"client key .*client\.key cannot be used",
        "copy the file again",
    ),
    "another's key": (
        broken(key=AUTHORITY.issue().key_pem()),
        r"client\.key does not belong to .*client\.pem \(CN=device-1\)",
        "requested with",
    ),
    "authority first": (
        broken(certificate=AUTHORITY_PEM + DEVICE.certificate_pem),
        "own certificate is not the first",
        "put it first",
    ),
    "no passphrase": (encrypted(None), r"client\.key is encrypted", "set `passphrase`"),
    "wrong passphrase": (
        encrypted("wrong"),
        r"passphrase does not open the client key .*client\.key",
        "`passphrase`",
    ),
    "pkcs12 without passphrase": (encrypted(None, p12=True), r"client\.p12 is encrypted", "set `passphrase`"),
    "pkcs12, wrong passphrase": (
        encrypted("wrong", p12=True),
        r"does not open the PKCS#12",
        "openssl pkcs12",
    ),
    "PEM as pkcs12": (with_pkcs12(DEVICE.certificate_pem), "is a PEM file, not PKCS#12", "`certificate`"),
    "damaged pkcs12": (with_pkcs12(DEVICE.pkcs12()[:200]), "cannot be read", "again"),
    "expired": (issued(ends=-1), r"client\.pem \(CN=device-1\) has expired on 20\d\d-", "renew it"),
    "not yet valid": (issued(begins=2), r"client\.pem \(CN=device-1\) is not valid before 20\d\d-", "clock"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_the_file_and_the_fix(name: str, tmp_path: Path) -> None:
    make, what, fix = WRONG[name]
    with pytest.raises(ConnectFailed) as caught:
        identity(make(tmp_path))
    assert re.search(what, caught.value.what), caught.value.what
    assert fix in caught.value.fix
    assert "right" not in str(caught.value).replace("whether it is right", "")  # the passphrase


def test_an_unreadable_key(tmp_path: Path) -> None:
    files = pair(DEVICE, tmp_path)
    files["key"].chmod(0)
    if os.access(files["key"], os.R_OK):
        pytest.skip("the superuser may read every file")
    with pytest.raises(ConnectFailed, match=r"cannot be read.*permissions"):
        identity(AuthMtls(**files))


def test_a_weak_key_is_said_to_be_one(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    found = identity(AuthMtls(**pair(AUTHORITY.issue(key=rsa.generate_private_key(65537, 1024)), tmp_path)))
    with pytest.raises(ConnectFailed, match="key is too short"):
        taken(found)


# --- what is warned of --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ends": 15}, ""),
        ({"ends": 13}, r"client\.pem \(CN=device-1\) expires on .* in 12 days: renew it"),
        ({"ends": 90, "usage": ExtendedKeyUsageOID.SERVER_AUTH}, "not for clients"),
        ({"usage": None}, ""),
    ],
)
def test_warnings(how: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        identity(issued(**how)(tmp_path))
    assert bool(caplog.messages) == bool(said)
    assert all(re.search(said, message) for message in caplog.messages)


def test_a_chain_with_a_gap_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outer = Authority("outer", under=AUTHORITY)
    device = Authority("inner", under=outer).issue()
    files = pair(device, tmp_path)
    with caplog.at_level(logging.WARNING):
        identity(AuthMtls(**files))
        assert caplog.messages == []
        gap = Issued(device.certificate, device.key, device.above[1:])
        files["certificate"].write_bytes(gap.certificate_pem)
        identity(AuthMtls(**files))
    (message,) = caplog.messages
    assert "CN=outer stands behind" in message and "CN=inner" in message


def test_a_year_of_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = DEVICE.write(tmp_path)
    with caplog.at_level(logging.WARNING):
        identity(AuthMtls(certificate=certificate, key=key, warn=365 * 86400.0))  # type: ignore[arg-type]
    assert "expires on" in caplog.text


# --- the recipe ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "either `certificate` and `key`, or `pkcs12`"),
        ({"certificate": "a", "pkcs12": "b"}, "either"),
        ({"pkcs12": "b", "key": "c"}, "remove `key`"),
        ({"certificate": "a", "password": Secret("s")}, "needs `username`"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AuthMtls(**fields)


@pytest.mark.parametrize(
    "uri", ["pkcs11:token=device;object=key", "pkcs11:object=k?module-path=/usr/lib/p11.so"]
)
def test_a_pkcs11_uri_is_refused_with_what_to_do(uri: str, tmp_path: Path) -> None:
    for key in (Path(uri), tmp_path / uri):  # the latter is what a TOML file gives
        with pytest.raises(Unsupported, match=r"PKCS#11.*PEM file.*openssl.cnf"):
            AuthMtls(certificate="client.pem", key=key)


def test_secrets_do_not_show() -> None:
    auth = AuthMtls(pkcs12="x", passphrase=Secret("opensesame"), username="u", password=Secret("opensesame"))
    assert "opensesame" not in repr(auth)


def test_the_kinds_of_keys_are_three() -> None:
    assert len({type(new_key(kind)) for kind in KINDS}) == 3
