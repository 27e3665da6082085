"""Whom a client trusts and who a listener is, proved by handshakes of aioquic in memory."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

import pytest
import trustme
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import HandshakeCompleted
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from tesaiot_connect import ConnectFailed, ConnectorError, Secret, ServerTls, TlsOptions
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic.certificates import ServerIdentity, Trust, client_trust, unfit

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
TRADITIONAL = serialization.PrivateFormat.TraditionalOpenSSL
CLEAR = serialization.NoEncryption()


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "certificates")


def accepts(trust: Trust, server: ServerTls | ServerIdentity, name: str = "localhost") -> bool:
    """Whether a client with this trust completes a handshake with this server."""
    here = QuicConfiguration(
        alpn_protocols=["mqtt"],
        server_name=trust.server_name or name,
        cafile=trust.cafile,
        capath=trust.capath,
        cadata=trust.cadata,
        verify_mode=trust.verify_mode,
    )
    there = QuicConfiguration(is_client=False, alpn_protocols=["mqtt"])
    (server if isinstance(server, ServerIdentity) else ServerIdentity(server)).apply(there)
    client = QuicConnection(configuration=here)
    client.connect(("192.0.2.2", 1), now=0.0)
    accepted = QuicConnection(
        configuration=there, original_destination_connection_id=client.original_destination_connection_id
    )
    for _ in range(6):
        for data, _ in client.datagrams_to_send(now=0.0):
            accepted.receive_datagram(data, ("192.0.2.1", 1), now=0.0)
        for data, _ in accepted.datagrams_to_send(now=0.0):
            client.receive_datagram(data, ("192.0.2.2", 1), now=0.0)
    events = list(iter(client.next_event, None))
    return any(isinstance(event, HandshakeCompleted) for event in events)


# --- client


def test_a_ca_file_is_the_only_authority(certificates: Certificates, tmp_path: Path) -> None:
    trust = client_trust(TlsOptions(ca_file=certificates.ca_file))
    assert trust.verify_mode is ssl.CERT_REQUIRED
    assert accepts(trust, certificates.server())
    assert not accepts(trust, Certificates(tmp_path / "other").server())


def test_the_name_may_be_given(certificates: Certificates) -> None:
    trust = client_trust(TlsOptions(ca_file=certificates.ca_file, server_name="broker.example"))
    assert accepts(trust, certificates.server("broker.example"))
    assert not accepts(trust, certificates.server())


def test_what_was_checked_is_what_is_used(certificates: Certificates, tmp_path: Path) -> None:
    trust = client_trust(TlsOptions(ca_file=certificates.ca_file))
    certificates.ca_file.write_text("replaced since")
    assert accepts(trust, certificates.server())


@pytest.mark.parametrize("odd", ["crlf", "text around", "no end of line", "a broken one beside it"])
def test_ca_files_of_all_kinds(certificates: Certificates, odd: str) -> None:
    pem = certificates.ca_file.read_bytes()
    certificates.ca_file.write_bytes(
        {
            "crlf": pem.replace(b"\n", b"\r\n"),
            "text around": b"# our authority\n" + pem + b"\nthe end\n",
            "no end of line": pem.rstrip(),
            "a broken one beside it": b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n" + pem,
        }[odd]
    )
    if odd == "a broken one beside it":  # OpenSSL reads up to it, and finds nothing
        with pytest.raises(ConnectFailed, match="holds no certificate"):
            client_trust(TlsOptions(ca_file=certificates.ca_file))
    else:
        assert accepts(client_trust(TlsOptions(ca_file=certificates.ca_file)), certificates.server())


def test_ca_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConnectFailed, match=r"CA file .*nowhere.pem does not exist"):
        client_trust(TlsOptions(ca_file=tmp_path / "nowhere.pem"))
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ConnectFailed, match=r"CA file .*empty.pem holds no certificate") as caught:
        client_trust(TlsOptions(ca_file=empty))
    assert "PEM" in caught.value.fix


def test_the_system_store_is_the_systems(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca_file))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "nowhere"))
    trust = client_trust(TlsOptions())
    assert trust.cafile == str(certificates.ca_file)
    assert accepts(trust, certificates.server())


def test_a_system_without_files_has_no_other_authorities(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ssl.create_default_context(cafile=str(certificates.ca_file))
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    trust = client_trust(TlsOptions())
    assert (trust.cafile, trust.capath, trust.cadata) == (None, None, b"")  # None would mean certifi's
    assert not accepts(trust, certificates.server())
    # a store that is no file, as on Windows
    monkeypatch.setattr(ssl, "create_default_context", lambda: ours)
    assert accepts(client_trust(TlsOptions()), certificates.server())


def test_no_verification_is_warned_of(certificates: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    trust = client_trust(TlsOptions(verify="none", insecure=True))
    assert trust.verify_mode is ssl.CERT_NONE
    assert accepts(trust, certificates.server(), "any.example")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING


def test_the_digest_changes_with_the_trust(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_file = TlsOptions(ca_file=certificates.ca_file)
    first = client_trust(with_file).digest
    assert client_trust(with_file).digest == first
    none = client_trust(TlsOptions(verify="none", insecure=True)).digest
    system = client_trust(TlsOptions()).digest
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca_file))
    other_system = client_trust(TlsOptions()).digest
    certificates.ca_file.write_bytes(Certificates(tmp_path / "other").ca_file.read_bytes())
    assert len({first, none, system, other_system, client_trust(with_file).digest}) == 5


# --- what aioquic lets pass


def leaf(authority: trustme.CA) -> x509.Certificate:
    issued = authority.issue_cert("localhost")
    return x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())


def with_usage(*usages: x509.ObjectIdentifier, bits: int = 2048) -> x509.Certificate:
    made = leaf(trustme.CA())
    key = rsa.generate_private_key(65537, bits)
    builder = x509.CertificateBuilder(
        made.issuer, made.subject, key.public_key(), 1, made.not_valid_before_utc, made.not_valid_after_utc
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(key, hashes.SHA256())


def test_certificates_that_are_fit() -> None:
    usage = ExtendedKeyUsageOID
    assert unfit(leaf(trustme.CA())) is None
    assert unfit(with_usage()) is None
    assert unfit(with_usage(usage.SERVER_AUTH)) is None
    assert unfit(with_usage(usage.CLIENT_AUTH, usage.ANY_EXTENDED_KEY_USAGE)) is None


def test_a_clients_certificate_is_no_servers() -> None:
    told = unfit(with_usage(ExtendedKeyUsageOID.CLIENT_AUTH))
    assert told is not None
    assert "not meant for servers" in told[0]


def test_small_keys_are_refused() -> None:
    told = unfit(with_usage(bits=1024))
    assert told is not None
    assert "1024 bits" in told[0]


# --- listener


def write(
    folder: Path,
    authority: trustme.CA,
    *,
    kind: trustme.KeyType = trustme.KeyType.ECDSA,
    format: serialization.PrivateFormat = PKCS8,
    encryption: serialization.KeySerializationEncryption = CLEAR,
    passphrase: str | None = None,
) -> ServerTls:
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert("localhost", key_type=kind)
    (folder / "s.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    (folder / "s.key").write_bytes(key.private_bytes(PEM, format, encryption))
    return ServerTls(
        certificate=folder / "s.pem",
        key=folder / "s.key",
        passphrase=None if passphrase is None else Secret(passphrase),
    )


def trusting(folder: Path, authority: trustme.CA) -> Trust:
    folder.mkdir(exist_ok=True)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return client_trust(TlsOptions(ca_file=folder / "ca.pem"))


@pytest.mark.parametrize("format", [PKCS8, TRADITIONAL])
@pytest.mark.parametrize("kind", list(trustme.KeyType))
@pytest.mark.parametrize("passphrase", [None, "geheim"])
def test_keys_of_all_kinds(
    tmp_path: Path, kind: trustme.KeyType, format: serialization.PrivateFormat, passphrase: str | None
) -> None:
    authority = trustme.CA()
    encryption = CLEAR if passphrase is None else serialization.BestAvailableEncryption(passphrase.encode())
    tls = write(tmp_path, authority, kind=kind, format=format, encryption=encryption, passphrase=passphrase)
    assert accepts(trusting(tmp_path, authority), tls)


def test_a_passphrase_beside_a_clear_key_does_no_harm(tmp_path: Path) -> None:
    authority = trustme.CA()
    assert accepts(trusting(tmp_path, authority), write(tmp_path, authority, passphrase="needless"))


def test_a_chain_is_sent(tmp_path: Path) -> None:
    root = trustme.CA()
    intermediate = root.create_child_ca().create_child_ca()
    tls = write(tmp_path, intermediate)
    trust = trusting(tmp_path, root)
    assert accepts(trust, tls)
    # without the intermediate ones the chain has a gap
    tls.certificate.write_bytes(
        tls.certificate.read_bytes().split(b"-----END")[0] + b"-----END CERTIFICATE-----"
    )
    assert not accepts(trust, tls)


def test_files_as_they_come(tmp_path: Path) -> None:
    """One file for all, the key first, Windows' line ends, parameters before the key."""
    authority = trustme.CA()
    tls = write(tmp_path, authority, format=TRADITIONAL)
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    both = tmp_path / "both.pem"
    both.write_bytes(
        (parameters + tls.key.read_bytes() + b"bag attributes\n" + tls.certificate.read_bytes()).replace(
            b"\n", b"\r\n"
        )
    )
    assert accepts(trusting(tmp_path, authority), ServerTls(certificate=both, key=both))


def test_client_certificates_are_refused(certificates: Certificates) -> None:
    for required in (True, False):
        with pytest.raises(ConnectorError, match="no client certificates") as caught:
            ServerIdentity(certificates.server(clients=certificates, required=required))
        assert "mqtts://" in caught.value.fix


def test_files_that_cannot_be_used_are_named(certificates: Certificates, tmp_path: Path) -> None:
    tls, other = certificates.server(), certificates.server()
    with pytest.raises(ConnectFailed, match=r"server key .*nowhere.key does not exist"):
        ServerIdentity(ServerTls(certificate=tls.certificate, key=tmp_path / "nowhere.key"))
    with pytest.raises(ConnectFailed, match="does not belong to the certificate"):
        ServerIdentity(ServerTls(certificate=tls.certificate, key=other.key))
    with pytest.raises(ConnectFailed, match="cannot be used"):
        ServerIdentity(ServerTls(certificate=tls.key, key=tls.key))


def test_files_that_are_replaced_while_they_are_read(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, other = certificates.server(), certificates.server()
    monkeypatch.setattr(ServerTls, "server_context", lambda self: None)  # it saw a pair that fits
    with pytest.raises(ConnectFailed, match="do not belong together"):
        ServerIdentity(ServerTls(certificate=tls.certificate, key=other.key))


def test_passphrases_that_do_not_open_are_named(tmp_path: Path) -> None:
    encryption = serialization.BestAvailableEncryption(b"right")
    tls = write(tmp_path, trustme.CA(), encryption=encryption, passphrase="wrong")
    with pytest.raises(ConnectFailed, match=r"passphrase does not open .*s.key"):
        ServerIdentity(tls)
    with pytest.raises(ConnectFailed, match=r"s.key is encrypted") as caught:
        ServerIdentity(ServerTls(certificate=tls.certificate, key=tls.key))
    assert "`passphrase`" in caught.value.fix


def test_keys_that_no_quic_client_can_use_are_refused(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP521R1())
    made = leaf(trustme.CA())
    certificate = x509.CertificateBuilder(
        made.issuer, made.subject, key.public_key(), 1, made.not_valid_before_utc, made.not_valid_after_utc
    ).sign(key, hashes.SHA256())
    (tmp_path / "s.pem").write_bytes(certificate.public_bytes(PEM))
    (tmp_path / "s.key").write_bytes(key.private_bytes(PEM, PKCS8, CLEAR))
    with pytest.raises(ConnectFailed, match=r"s.key is of a kind") as caught:
        ServerIdentity(ServerTls(certificate=tmp_path / "s.pem", key=tmp_path / "s.key"))
    assert "P-256" in caught.value.fix


def test_an_expired_certificate_is_warned_of(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    ServerIdentity(certificates.server(expired=True))
    assert "has expired" in caplog.text


# --- reload


def replace(tls: ServerTls, other: ServerTls) -> None:
    for old, new in ((tls.certificate, other.certificate), (tls.key, other.key)):
        copy = old.with_suffix(".new")
        copy.write_bytes(new.read_bytes())
        copy.replace(old)


def test_files_that_change_are_loaded_anew(tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    tls = write(tmp_path / "used", old)
    identity = ServerIdentity(tls)
    assert not identity.reload(0.0)
    replace(tls, write(tmp_path / "new", new))
    assert not identity.reload(1.0)  # it does not look at the files all the time
    assert accepts(trusting(tmp_path, old), identity)
    assert identity.reload(10.0)
    assert accepts(trusting(tmp_path, new), identity)
    assert not identity.reload(20.0)


@pytest.mark.parametrize("broken", ["half", "gone", "other key"])
def test_a_broken_pair_leaves_the_old_one(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    authority = trustme.CA()
    tls, good = write(tmp_path / "used", authority), write(tmp_path / "good", authority)
    identity = ServerIdentity(tls)
    if broken == "half":
        tls.certificate.write_bytes(good.certificate.read_bytes()[:100])
    elif broken == "gone":
        tls.key.unlink()
    else:
        tls.key.write_bytes(good.key.read_bytes())
        os.utime(tls.key, (1, 1))  # so that the clock's grain cannot hide the change
    for now in (0.0, 10.0, 20.0):
        assert not identity.reload(now)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(tmp_path / "used") in record.getMessage()
    assert accepts(trusting(tmp_path, authority), identity)
    replace(tls, good)
    assert identity.reload(30.0)
    assert accepts(trusting(tmp_path, authority), identity)
