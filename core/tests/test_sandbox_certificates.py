"""The sandbox's authority: certificates that are good, kept, renewed, or named when damaged."""

from __future__ import annotations

import datetime
import ssl
import stat
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from tesaiot_connect.errors import ConnectorError
from tesaiot_connect.protocols import ClientCertificate
from tesaiot_connect.sandbox.certificates import Authority
from tesaiot_connect.tls import ServerTls, TlsOptions

NAMES = ("localhost", "127.0.0.1", "::1")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> dict[str, object]:
    """TLS in memory; the client's certificate as the server sees it. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(down, up, server_hostname=name)
    two = server.wrap_bio(up, down, server_side=True)
    waiting = [one, two]
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return dict(two.getpeercert() or {})


def test_both_ends_verify_each_other(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pem, key = tmp_path / "server.pem", tmp_path / "server.key"
    authority.server(pem, key, NAMES)
    authority.client(tmp_path / "c.pem", tmp_path / "c.key", "device-1", "acme")
    server = ServerTls(certificate=pem, key=key, ca_file=authority.ca_file, client_certificate="required")
    identity = ClientCertificate(str(tmp_path / "c.pem"), str(tmp_path / "c.key"))
    trust = TlsOptions(ca_file=authority.ca_file, minimum_version="1.3")
    for name in NAMES:
        shown = handshake(server.server_context(), trust.client_context(identity), name)
        assert (("commonName", "device-1"),) in shown["subject"]  # type: ignore[operator]
        assert (("organizationName", "acme"),) in shown["subject"]  # type: ignore[operator]
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server.server_context(), trust.client_context(identity), "elsewhere.example")


@pytest.mark.skipif(sys.platform == "win32", reason="rights are kept in another way there")
def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    Authority(tmp_path / "ca").server(tmp_path / "server.pem", tmp_path / "server.key", NAMES)
    for key in (tmp_path / "ca" / "ca.key", tmp_path / "server.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    def start() -> dict[str, bytes]:
        authority = Authority(tmp_path)
        authority.server(tmp_path / "s.pem", tmp_path / "s.key", NAMES)
        authority.client(tmp_path / "c.pem", tmp_path / "c.key", "device-1", "acme")
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    assert start() == start()


def test_what_ends_is_renewed(tmp_path: Path) -> None:
    def start(days: int = 0) -> tuple[bytes, bytes]:
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        authority = Authority(tmp_path, now=now)
        authority.server(tmp_path / "s.pem", tmp_path / "s.key", NAMES)
        return authority.ca_file.read_bytes(), (tmp_path / "s.pem").read_bytes()

    first = start()
    second = start(359)
    assert second[0] == first[0]
    assert second[1] != first[1]
    third = start(3650)
    assert third[0] != second[0], "and with the authority all that it issued"
    assert third[1] != second[1]


def test_more_names_need_a_new_certificate(tmp_path: Path) -> None:
    authority, pem = Authority(tmp_path), tmp_path / "s.pem"
    authority.server(pem, tmp_path / "s.key", NAMES)
    authority.server(pem, tmp_path / "s.key", (*NAMES, "192.0.2.1"))
    extension = x509.load_pem_x509_certificate(pem.read_bytes()).extensions
    found = extension.get_extension_for_class(x509.SubjectAlternativeName).value
    assert str(found.get_values_for_type(x509.IPAddress)[-1]) == "192.0.2.1"


def test_certificates_of_a_deleted_authority_are_replaced(tmp_path: Path) -> None:
    pem, key = tmp_path / "c.pem", tmp_path / "c.key"
    Authority(tmp_path / "ca").client(pem, key, "device-1", "acme")
    (tmp_path / "ca" / "ca.pem").unlink()
    (tmp_path / "ca" / "ca.key").unlink()
    authority = Authority(tmp_path / "ca")
    authority.client(pem, key, "device-1", "acme")
    signed = x509.load_pem_x509_certificate(pem.read_bytes())
    assert signed.issuer == x509.load_pem_x509_certificate(authority.ca_file.read_bytes()).subject
    assert signed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "device-1"


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
@pytest.mark.parametrize("damage", ["missing", "empty", "nonsense", "another"])
def test_a_damaged_authority_is_named(tmp_path: Path, name: str, damage: str) -> None:
    Authority(tmp_path / "ca")
    Authority(tmp_path / "other")
    file = tmp_path / "ca" / name
    match damage:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "nonsense":
            file.write_bytes(b"\xff nonsense")
        case "another":
            file.write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ConnectorError) as raised:
        Authority(tmp_path / "ca")
    assert str(tmp_path / "ca" / ("ca.key" if damage == "another" else name)) in raised.value.what
    assert "delete" in raised.value.fix
