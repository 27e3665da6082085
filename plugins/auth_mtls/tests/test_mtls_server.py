"""From a verified certificate to a principal, and the list of revoked ones."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from issuing import KINDS, Authority, Issued

from tesaiot_connect import Access, AccessRule, Credentials, NotApplicable, Peer, Principal, Refused
from tesaiot_connect_auth_mtls import CertificateAuth
from tesaiot_connect_auth_mtls.revoked import read_revoked

AUTHORITY = Authority()


def begin(auth: CertificateAuth, issued: Issued | bytes | None) -> Any:
    der = issued.der if isinstance(issued, Issued) else issued
    peer = Peer("127.0.0.1:1", "tcp_tls", secure=True, certificate=der)
    return asyncio.run(auth.begin(peer, Credentials("somebody", b"else")))


def refused(auth: CertificateAuth, issued: Issued) -> Refused:
    with pytest.raises(Refused) as caught:
        begin(auth, issued)
    assert not isinstance(caught.value, NotApplicable)
    return caught.value


# --- names --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_common_name_and_the_organisation(kind: str) -> None:
    issued = AUTHORITY.issue("device-1", o=["acme"], ou=["plant 7"], kind=kind, ends=40)
    found: Principal = begin(CertificateAuth(), issued)
    assert (found.name, found.organisation) == ("device-1", "acme")
    assert found.valid_until == issued.certificate.not_valid_after_utc.timestamp()
    assert begin(CertificateAuth(organisation="ou"), issued).organisation == "plant 7"
    assert begin(CertificateAuth(organisation="none"), issued).organisation is None
    assert begin(CertificateAuth(), AUTHORITY.issue("device-1")).organisation is None


def test_subject_alternative_names() -> None:
    names = (
        x509.DNSName("device-1.acme.example"),
        x509.UniformResourceIdentifier("urn:dev:mac:0024befffe804ff1"),
        x509.RFC822Name("device-1@acme.example"),
        x509.DirectoryName(x509.Name([])),
    )
    issued = AUTHORITY.issue("ignored", alternatives=names)
    assert begin(CertificateAuth(principal="dns"), issued).name == "device-1.acme.example"
    assert begin(CertificateAuth(principal="uri"), issued).name == "urn:dev:mac:0024befffe804ff1"
    assert begin(CertificateAuth(principal="email"), issued).name == "device-1@acme.example"


@pytest.mark.parametrize("name", ["Gerät 7", "เครื่อง-1", "a.b_c-d:e@f", "0", "x" * 64])
def test_names_that_are_fine(name: str) -> None:
    assert begin(CertificateAuth(), AUTHORITY.issue(name)).name == name


@pytest.mark.parametrize(
    "name",
    [
        "a/b", "/", "+", "#", "dev+1", "dev#1", "*", "{device}", "{username}", "$SYS", "$share",
        "a\0b", "a\nb", "a\x7fb", "a\u202eb", "a\u200bb", "a\ufeff", " a", "a ", "\u3000a",
    ],
)  # fmt: skip
def test_names_that_could_mean_something_in_a_topic(name: str) -> None:
    told = refused(CertificateAuth(), AUTHORITY.issue(name))
    assert told.permanent and told.reason_code == 0x87
    assert "names nobody: its common name " in told.what
    assert told.what.isprintable() and told.what.isascii()
    refused(CertificateAuth(), AUTHORITY.issue("device-1", o=[name]))
    begin(CertificateAuth(organisation="none"), AUTHORITY.issue("device-1", o=[name]))


@pytest.mark.parametrize(
    ("auth", "issued", "said"),
    [
        (CertificateAuth(), AUTHORITY.issue([]), "it has no common name"),
        (CertificateAuth(), AUTHORITY.issue(["a", "b"]), r"it has 2 of the kind common name ('a', 'b')"),
        (CertificateAuth(), AUTHORITY.issue(["a", "a"]), "it has 2"),
        (CertificateAuth(), AUTHORITY.issue("a", o=["x", "y"]), "it has 2 of the kind organisation (O)"),
        (CertificateAuth(principal="dns"), AUTHORITY.issue("a"), "it has no DNS name"),
        (
            CertificateAuth(principal="uri"),
            AUTHORITY.issue(alternatives=[x509.UniformResourceIdentifier("spiffe://acme/device-1")]),
            "cannot stand in a topic",
        ),
        (
            CertificateAuth(principal="dns"),
            AUTHORITY.issue(alternatives=[x509.DNSName("a"), x509.DNSName("b")]),
            "it has 2 of the kind DNS name",
        ),
        (
            CertificateAuth(principal="dns"),
            AUTHORITY.issue(alternatives=[x509.DNSName("*.acme.example")]),
            "cannot stand in a topic",
        ),
        (
            CertificateAuth(principal="dns"),
            AUTHORITY.issue(alternatives=[x509.DNSName("a" * 300)]),
            "is longer than 256 characters",
        ),
    ],
)
def test_exactly_one_name(auth: CertificateAuth, issued: Issued, said: str) -> None:
    assert said in refused(auth, issued).what


def test_no_certificate_is_for_the_next_authenticator() -> None:
    with pytest.raises(NotApplicable, match="showed no certificate"):
        begin(CertificateAuth(), None)


def test_nonsense_is_refused() -> None:
    with pytest.raises(Refused, match="names nobody"):
        begin(CertificateAuth(), b"nonsense")


def test_one_that_expired_behind_a_resumed_session_is_refused() -> None:
    assert "has expired" in refused(CertificateAuth(), AUTHORITY.issue(ends=-0.001)).what


def test_access_decides() -> None:
    rule = AccessRule(publish=("devices/{username}/#",), subscribe=("org/{organisation}/#",))
    found = begin(CertificateAuth(access=Access(rules=(rule,))), AUTHORITY.issue("device-1", o=["acme"]))
    assert found.may_publish("devices/device-1/telemetry")
    assert not found.may_publish("devices/device-2/telemetry")
    assert found.may_subscribe("org/acme/#")
    assert not found.may_subscribe("org/other/#")


# --- revoked ------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    """As an editor does it: never half."""
    fresh = file.with_name("fresh")
    fresh.write_text(text)
    fresh.replace(file)


def fingerprint(issued: Issued) -> str:
    return hashlib.sha256(issued.der).hexdigest()


@pytest.mark.parametrize(
    "by", ["serial", "SERIAL", "0x", "colons", "openssl", "fingerprint", "openssl fingerprint"]
)
def test_ways_to_name_a_certificate(by: str, tmp_path: Path) -> None:
    device, other = AUTHORITY.issue("device-1"), AUTHORITY.issue("device-2")
    serial, digest = f"{device.certificate.serial_number:x}", fingerprint(device)
    even = serial.rjust(len(serial) + len(serial) % 2, "0")
    colons = ":".join(even[n : n + 2] for n in range(0, len(even), 2))
    line = {
        "serial": serial,
        "SERIAL": f"00{serial.upper()}",
        "0x": f"0x{serial}",
        "colons": colons,
        "openssl": f"serial={even.upper()}",
        "fingerprint": digest,
        "openssl fingerprint": "sha256 Fingerprint="
        + ":".join(digest[n : n + 2].upper() for n in range(0, 64, 2)),
    }[by]
    file = tmp_path / "revoked"
    file.write_text(f"# lost in the field\n\n  {line}   # device-1, 2026-01-01\n")
    told = refused(CertificateAuth(revoked_file=file), device)
    assert told.what == "the certificate was revoked" and told.permanent and told.reason_code == 0x87
    assert begin(CertificateAuth(revoked_file=file), other).name == "device-2"


def test_revoked_while_connected_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device, other = AUTHORITY.issue("device-1"), AUTHORITY.issue("device-2")
    file = tmp_path / "revoked"
    file.write_text("")
    auth = CertificateAuth(revoked_file=file)
    one, two = begin(auth, device), begin(auth, other)
    assert one.refusal() == two.refusal() == ""
    write(file, fingerprint(device))
    assert (one.refusal(), two.refusal()) == ("the certificate was revoked", "")
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        write(file, "not hex\n")
        assert (one.refusal(), two.refusal()) == ("the certificate was revoked", "")
        file.unlink()
        for _ in range(2):
            assert (one.refusal(), two.refusal()) == ("the certificate was revoked", "")
    first, second = caplog.messages
    assert "line 1 is neither" in first and "what it said before still counts" in first
    assert "No such file" in second
    write(file, "")
    assert one.refusal() == two.refusal() == ""


def test_without_a_list_that_could_be_read_nobody_gets_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "revoked"
    auth = CertificateAuth(revoked_file=file)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            told = refused(auth, AUTHORITY.issue())
            assert told.reason_code == 0x88 and not told.permanent
    (message,) = caplog.messages
    assert str(file) in message and "no certificate is accepted" in message
    file.write_text("")
    assert begin(auth, AUTHORITY.issue()).name == "device-1"


def test_a_list_is_read_when_it_changes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "revoked"
    file.write_text("broken\n")
    reads: list[Path] = []

    def counted(path: Path) -> Any:
        reads.append(path)
        return read_revoked(path)

    monkeypatch.setattr("tesaiot_connect_auth_mtls.revoked.read_revoked", counted)
    auth = CertificateAuth(revoked_file=file)
    for content in ("broken\n", "0a1b\n"):
        write(file, content)
        reads.clear()
        for _ in range(3):
            try:
                begin(auth, AUTHORITY.issue())
            except Refused:
                pass
        assert len(reads) == 1


def test_a_trouble_that_passes_does_not_hide_a_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device, file = AUTHORITY.issue("device-1"), tmp_path / "revoked"
    file.write_text("")
    principal = begin(CertificateAuth(revoked_file=file), device)
    write(file, f"{device.certificate.serial_number:x}\n")
    caplog.clear()
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):

        def no_files_left(*_: object, **__: object) -> str:
            raise OSError(errno.EMFILE, "Too many open files")

        patched.setattr(Path, "read_text", no_files_left)
        assert [principal.refusal() for _ in range(3)] == ["", "", ""]
    (message,) = caplog.messages
    assert "Too many open files" in message
    assert principal.refusal() == "the certificate was revoked"


@pytest.mark.parametrize("name", ["token:acme:1", "TOKEN:acme:1", "token:"])
def test_a_certificate_is_no_token(name: str) -> None:
    """Rules give rights to the names that the holders of tokens have."""
    assert "names the holder of a token" in refused(CertificateAuth(), AUTHORITY.issue(name)).what
    assert begin(CertificateAuth(), AUTHORITY.issue("tokens:1")).name == "tokens:1"


@pytest.mark.parametrize("line", ["xyz", "0x", "a" * 41, "a" * 63, "a" * 65, "-1", "12 34"])
def test_lines_that_name_nothing(line: str, tmp_path: Path) -> None:
    file = tmp_path / "revoked"
    file.write_text(f"0a\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_revoked(file)


def test_serials_of_every_length(tmp_path: Path) -> None:
    file = tmp_path / "revoked"
    for serial in (1, 0x80, 2**159 - 1):
        file.write_text(f"{serial:x}\n")
        assert read_revoked(file) == (frozenset([serial]), frozenset())
        refused(CertificateAuth(revoked_file=file), AUTHORITY.issue(serial=serial))
