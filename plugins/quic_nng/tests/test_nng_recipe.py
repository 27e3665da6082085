"""quic_nng's recipe: what it lets a file say, whom it trusts, and what it refuses to promise."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from issuing import Authority

from tesaiot_connect import (
    CheckedTransport,
    ClientCertificate,
    ConnectFailed,
    Duration,
    Listener,
    Secret,
    Size,
    TlsOptions,
    Transport,
    Unsupported,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_nng import QuicNng, trust

URL = Url.parse("quic://broker.example")
UNVERIFIED = TlsOptions(verify="none", insecure=True)


def trusting(certificates: Certificates, **more: Any) -> QuicNng:
    tls = TlsOptions(ca_file=certificates.ca_file)
    return QuicNng(more.pop("url", URL), tls=tls, verify_hostname=False, **more)


def refusal(recipe: QuicNng) -> Unsupported:
    with pytest.raises(Unsupported) as caught:
        asyncio.run(recipe.connect())
    return caught.value


# --- the table --------------------------------------------------------------------------------


def test_it_is_a_client_below_quic_aioquic() -> None:
    recipe = QuicNng(URL)
    assert isinstance(recipe, Transport)
    assert not isinstance(recipe, Listener)
    assert (recipe.rank, recipe.races, recipe.secure) == (50, False, True)
    assert (recipe.port, recipe.place) == (14567, "quic://broker.example:14567")
    assert attrs.fields(QuicNng)[0].name == "url"


def test_what_it_cannot_do_reads_behind_cannot() -> None:
    assert QuicNng.cannot
    for phrase in QuicNng.cannot:
        assert phrase[0].islower()
        assert not phrase.endswith(".")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be from 1 to 32"),
        ({"window": 33}, "window must be from 1 to 32"),
        ({"backend": "nng"}, "backend"),
        ({"connect_timeout": Duration(0.0)}, "connect_timeout must be more than nothing"),
        ({"ack_timeout": Duration(0.0)}, "ack_timeout must be more than nothing"),
        ({"keepalive": Duration(-1.0)}, "keepalive must not be negative"),
        ({"keepalive": Duration(40.0)}, "idle_timeout must be longer than keepalive"),
        ({"memory": Size(0)}, "memory must be more than nothing"),
        ({"verify_hostname": False}, "needs `ca_file` in the tls table"),
    ],
)
def test_a_value_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuicNng(URL, **options)


def test_without_verification_no_authority_is_needed() -> None:
    assert not QuicNng(URL, tls=UNVERIFIED, verify_hostname=False).verify_hostname


def test_importing_the_recipe_loads_neither_ctypes_nor_cryptography() -> None:
    """Every command reads the recipes of all plugins."""
    code = "import sys, tesaiot_connect_quic_nng; print(*({'ctypes', 'cryptography'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


# --- what is refused --------------------------------------------------------------------------


def test_host_names_are_not_checked_so_asking_for_that_is_refused() -> None:
    told = refusal(QuicNng(URL))
    assert "do not check that the server's certificate has the name of its host" in told.what
    assert 'via = "quic_aioquic"' in told.fix
    assert "verify_hostname = false" in told.fix
    assert "ca_file" in told.fix


def test_what_is_refused_is_known_before_connect(certificates: Certificates) -> None:
    recipe = QuicNng(URL)
    assert isinstance(recipe, CheckedTransport)
    told = recipe.refusal()
    assert told is not None
    assert refusal(recipe).what == f"{recipe.place}: {told.what}"
    assert trusting(certificates).refusal() is None


def test_what_it_cannot_do_depends_on_the_backend(certificates: Certificates) -> None:
    words = "send DISCONNECT, so the will is published whenever a connection ends"
    assert words in QuicNng.cannot
    assert words in trusting(certificates).cannot
    streams = trusting(certificates, backend="nanonng").cannot
    assert words not in streams
    assert "check the server's host name" in streams


def test_another_server_name_is_refused(certificates: Certificates) -> None:
    tls = TlsOptions(ca_file=certificates.ca_file, server_name="other.example")
    told = refusal(QuicNng(URL, tls=tls, verify_hostname=False))
    assert "'other.example'" in told.what
    assert "server_name" in told.fix


@pytest.mark.parametrize("host", ["[::1]", "[fe80::1%25eth0]"])
def test_ipv6_is_refused(certificates: Certificates, host: str) -> None:
    told = refusal(trusting(certificates, url=Url.parse(f"quic://{host}:14567")))
    assert "IPv4 alone" in told.what


def test_a_client_certificate_without_verification_is_refused(certificates: Certificates) -> None:
    with pytest.raises(Unsupported, match="to a server that it does not verify"):
        asyncio.run(QuicNng(URL, tls=UNVERIFIED).connect(identity=certificates.client()))


def test_an_authority_that_is_not_there_is_named(tmp_path: Path) -> None:
    tls = TlsOptions(ca_file=tmp_path / "ca.pem")
    with pytest.raises(ConnectFailed, match=r"CA file .*ca\.pem does not exist"):
        asyncio.run(QuicNng(URL, tls=tls, verify_hostname=False).connect())


# --- certificates -----------------------------------------------------------------------------


def of(pair: trust.Pair | None) -> tuple[x509.Certificate, bytes]:
    """Its certificate, and its key's public half; they belong together, and the key is open."""
    assert pair is not None
    first = x509.load_pem_x509_certificate(pair.certificate.encode())
    public = load_pem_private_key(pair.key.encode(), None).public_key()
    assert public == first.public_key()
    return first, pair.key.encode()


def test_nobody_is_shown_where_there_is_no_identity(certificates: Certificates) -> None:
    """The libraries verify only where they have a certificate themselves."""
    recipe = trusting(certificates)
    shown, _ = of(trust.pair(recipe, None))
    assert shown.subject == shown.issuer
    assert "nobody" in shown.subject.rfc4514_string()
    assert trust.pair(recipe, None) is trust.pair(trusting(certificates), None)


def test_without_verification_nothing_is_shown() -> None:
    assert trust.pair(QuicNng(URL, tls=UNVERIFIED), None) is None


def test_an_identity_is_shown_with_its_chain(certificates: Certificates, tmp_path: Path) -> None:
    device = Authority("between", under=Authority()).issue("device-1")
    certificate, key = device.write(tmp_path)
    pair = trust.pair(trusting(certificates), ClientCertificate(str(certificate), str(key)))
    shown, _ = of(pair)
    assert shown == device.certificate
    assert pair is not None
    assert pair.certificate.count("BEGIN CERTIFICATE") == 2


@pytest.mark.parametrize("traditional", [False, True])
def test_an_encrypted_key_is_opened_in_memory(
    certificates: Certificates, tmp_path: Path, traditional: bool
) -> None:
    device = Authority().issue("device-1")
    certificate, key = device.write(tmp_path)
    key.write_bytes(device.key_pem("secret", traditional=traditional))
    before = {*tmp_path.iterdir()}
    identity = ClientCertificate(str(certificate), str(key), Secret("secret"))
    _, opened = of(trust.pair(trusting(certificates), identity))
    assert b"ENCRYPTED" not in opened
    assert {*tmp_path.iterdir()} == before


def test_an_identity_may_be_in_memory(certificates: Certificates) -> None:
    device = Authority().issue("device-1")
    pem = device.certificate_pem + device.key_pem("secret")
    identity = ClientCertificate("store.p12", "store.p12", Secret("secret"), pem)
    shown, _ = of(trust.pair(trusting(certificates), identity))
    assert shown == device.certificate


def test_a_wrong_passphrase_is_named(certificates: Certificates, tmp_path: Path) -> None:
    certificate, key = Authority().issue("device-1").write(tmp_path, "secret")
    identity = ClientCertificate(str(certificate), str(key), Secret("other"))
    with pytest.raises(ConnectFailed, match="passphrase does not open"):
        trust.pair(trusting(certificates), identity)
