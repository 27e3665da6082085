"""TLS settings: safe by default, and every file problem is named."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

import pytest

from tesaiot_connect.errors import ConnectFailed, Disconnected
from tesaiot_connect.protocols import ClientCertificate, Secret
from tesaiot_connect.testing import Certificates
from tesaiot_connect.tls import ServerTls, TlsOptions, certificate_facts, explain_tls


def test_the_default_verifies_server_and_name() -> None:
    context = TlsOptions().client_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_minimum_version(certificates: Certificates) -> None:
    options = TlsOptions(ca_file=certificates.ca_file, minimum_version="1.3")
    assert options.client_context().minimum_version is ssl.TLSVersion.TLSv1_3


def test_no_verification_must_be_said_twice() -> None:
    with pytest.raises(ValueError, match="insecure = true"):
        TlsOptions(verify="none")


def test_no_verification_warns_at_every_start(caplog: pytest.LogCaptureFixture) -> None:
    options = TlsOptions(verify="none", insecure=True)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            context = options.client_context()
    assert context.verify_mode is ssl.CERT_NONE
    assert len(caplog.records) == 2


def test_client_certificates_need_an_authority() -> None:
    with pytest.raises(ValueError, match="ca_file"):
        ServerTls(certificate=Path("c"), key=Path("k"), client_certificate="required")


def test_missing_files_are_named(tmp_path: Path, certificates: Certificates) -> None:
    with pytest.raises(ConnectFailed, match=r"CA file .*nowhere.pem does not exist"):
        TlsOptions(ca_file=tmp_path / "nowhere.pem").client_context()
    identity = certificates.client()
    wrong = ClientCertificate(identity.certificate, str(tmp_path / "nowhere.key"))
    with pytest.raises(ConnectFailed, match=r"client key .*nowhere.key does not exist"):
        TlsOptions(ca_file=certificates.ca_file).client_context(wrong)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file"
)
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    secret = tmp_path / "ca.pem"
    secret.write_text("x")
    secret.chmod(0)
    with pytest.raises(ConnectFailed, match="cannot be read"):
        TlsOptions(ca_file=secret).client_context()


def test_a_ca_file_without_certificates(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("nothing here\n")
    with pytest.raises(ConnectFailed, match="holds no certificate"):
        TlsOptions(ca_file=empty).client_context()


def test_a_key_of_another_certificate(certificates: Certificates) -> None:
    one, other = certificates.client("one"), certificates.client("other")
    with pytest.raises(ConnectFailed, match="does not belong to the certificate"):
        TlsOptions().client_context(ClientCertificate(one.certificate, other.key))


def test_a_key_that_is_no_key(tmp_path: Path, certificates: Certificates) -> None:
    junk = tmp_path / "junk.key"
    junk.write_text("junk")
    with pytest.raises(ConnectFailed, match="cannot be used"):
        TlsOptions().client_context(ClientCertificate(certificates.client().certificate, str(junk)))


def encrypted(identity: ClientCertificate, folder: Path, passphrase: bytes) -> str:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(identity.key).read_bytes(), None)
    path = folder / "encrypted.key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase),
        )
    )
    return str(path)


def test_encrypted_keys(tmp_path: Path, certificates: Certificates) -> None:
    identity = certificates.client()
    key = encrypted(identity, tmp_path, b"open sesame")
    options = TlsOptions(ca_file=certificates.ca_file)
    good = ClientCertificate(identity.certificate, key, Secret("open sesame"))
    options.client_context(good)
    with pytest.raises(ConnectFailed, match="passphrase does not open"):
        options.client_context(ClientCertificate(identity.certificate, key, Secret("wrong")))
    with pytest.raises(ConnectFailed, match=r"is encrypted.*set `passphrase`"):
        options.client_context(ClientCertificate(identity.certificate, key))


def test_files_are_read_anew(tmp_path: Path, certificates: Certificates) -> None:
    """A renewed certificate is used at the next connect."""
    ca_file = tmp_path / "ca.pem"
    options = TlsOptions(ca_file=ca_file)
    ca_file.write_bytes(certificates.ca_file.read_bytes())
    before = options.client_context().get_ca_certs()
    ca_file.write_bytes(Certificates(tmp_path / "new", name="new").ca_file.read_bytes())
    assert options.client_context().get_ca_certs() != before


def test_other_errors_are_explained_too() -> None:
    assert "reset" in str(explain_tls(ConnectionResetError()))
    told = Disconnected("as it is")
    assert explain_tls(told) is told
    assert "TLS failed" in str(explain_tls(ssl.SSLError(1, "[SSL: NEWS] something new")))


def test_certificate_facts() -> None:
    facts = certificate_facts(
        {
            "subjectAltName": (("DNS", "a.example"), ("IP Address", "10.0.0.1")),
            "notBefore": "yesterday",
            "notAfter": "tomorrow",
        }
    )
    assert facts == ("the certificate names a.example, 10.0.0.1; it is valid from yesterday until tomorrow")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (18, "the client's certificate is not from a trusted authority (self-signed)"),
        (10, "the client's certificate has expired"),
        (9, "the client's certificate is not valid yet"),
        (26, "the client's certificate was rejected: self-signed"),
    ],
)
def test_a_listener_rejects_the_certificate_of_a_client(code: int, says: str) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "self-signed"
    told = explain_tls(error, accepted=True)
    assert told.what == says
    assert told.fix
    assert told.__cause__ is error
    assert "the server's certificate" in explain_tls(error).what
