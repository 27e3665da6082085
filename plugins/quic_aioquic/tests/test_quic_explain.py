"""Words for the end of a connection: those of real handshakes that fail, and every code of the RFCs."""

from __future__ import annotations

import datetime
from pathlib import Path

import attrs
import pytest
from aioquic import tls
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent
from aioquic.quic.packet import QuicErrorCode, QuicProtocolVersion, encode_quic_version_negotiation
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tesaiot_connect import ServerTls, TlsOptions
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic.certificates import ServerIdentity, client_trust
from tesaiot_connect_quic_aioquic.explain import explain_close, explain_silence

CLIENT, SERVER = ("192.0.2.1", 1000), ("192.0.2.2", 14567)


@attrs.define
class Side:
    quic: QuicConnection
    events: list[QuicEvent] = attrs.field(factory=list)

    def collect(self) -> None:
        while (event := self.quic.next_event()) is not None:
            self.events.append(event)

    def end(self, *, by_peer: bool) -> tuple[str, str]:
        """The words for how it ended."""
        timer = self.quic.get_timer()
        if timer is not None:
            self.quic.handle_timer(timer + 1000)
        self.collect()
        (ended,) = [event for event in self.events if isinstance(event, ConnectionTerminated)]
        return explain_close(
            ended.error_code,
            frame_type=ended.frame_type,
            reason=ended.reason_phrase,
            by_peer=by_peer,
            handshake_done=any(isinstance(event, HandshakeCompleted) for event in self.events),
        )


def pair(client: QuicConfiguration, server: QuicConfiguration) -> tuple[Side, Side]:
    dialed = QuicConnection(configuration=client)
    dialed.connect(SERVER, now=0.0)
    accepted = QuicConnection(
        configuration=server, original_destination_connection_id=dialed.original_destination_connection_id
    )
    return Side(dialed), Side(accepted)


def pump(client: Side, server: Side) -> None:
    """Carries datagrams until there are none."""
    quiet = False
    while not quiet:
        quiet = True
        for sender, receiver, address in ((client, server, CLIENT), (server, client, SERVER)):
            for data, _ in sender.quic.datagrams_to_send(now=0.0):
                quiet = False
                receiver.quic.receive_datagram(data, address, now=0.0)
    client.collect()
    server.collect()


@pytest.fixture
def listener(certificates: Certificates) -> ServerTls:
    return certificates.server()


def dialing(options: TlsOptions, name: str = "localhost", alpn: str = "mqtt") -> QuicConfiguration:
    trust = client_trust(options)
    return QuicConfiguration(
        alpn_protocols=[alpn],
        server_name=trust.server_name or name,
        cafile=trust.cafile,
        capath=trust.capath,
        cadata=trust.cadata,
        verify_mode=trust.verify_mode,
    )


def listening(tls: ServerTls) -> QuicConfiguration:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["mqtt"])
    ServerIdentity(tls).apply(configuration)
    return configuration


def self_signed(folder: Path, *, begins: int = -1, named: bool = True) -> ServerTls:
    """Valid from `begins` days from now, for ten days; `named`: for localhost."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=begins)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), 77)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=10))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    if named:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / "self.pem").write_bytes(pem)
    (folder / "self.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return ServerTls(certificate=folder / "self.pem", key=folder / "self.key")


# --- handshakes that fail: what each side is told


def test_a_handshake_that_works(certificates: Certificates, listener: ServerTls) -> None:
    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file)), listening(listener))
    pump(client, server)
    assert any(isinstance(event, HandshakeCompleted) for event in client.events)
    client.quic.close()
    pump(client, server)
    assert client.end(by_peer=False) == ("the connection was closed in good order", "")
    assert server.end(by_peer=True) == ("the connection was closed in good order", "")


def test_wrong_authority(listener: ServerTls, tmp_path: Path) -> None:
    others = Certificates(tmp_path / "others", name="another authority")
    client, server = pair(dialing(TlsOptions(ca_file=others.ca_file)), listening(listener))
    pump(client, server)
    what, fix = client.end(by_peer=False)
    assert what == (
        "the server's certificate is not from a trusted authority (unable to get local issuer certificate)"
    )
    assert fix == "put the CA that issued it into `ca_file` of the tls table"
    what, fix = server.end(by_peer=True)
    assert what.startswith("the peer rejects our certificate")
    assert "unable to get local issuer certificate" in what
    assert "an authority that the client trusts" in fix


def test_self_signed(certificates: Certificates, tmp_path: Path) -> None:
    untrusted = listening(self_signed(tmp_path))
    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file)), untrusted)
    pump(client, server)
    what, fix = client.end(by_peer=False)
    assert "not from a trusted authority (self-signed certificate)" in what
    assert "`ca_file`" in fix


@pytest.mark.parametrize("name", ["other.example", "192.0.2.9"])
def test_wrong_name(certificates: Certificates, listener: ServerTls, name: str) -> None:
    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file), name), listening(listener))
    pump(client, server)
    assert client.end(by_peer=False) == (
        "the server's certificate is for another name (localhost, 127.0.0.1, ::1)",
        "use a name it has as the endpoint's host, or set `server_name` in the tls table",
    )
    what, _ = server.end(by_peer=True)
    assert what.endswith('the peer says: "the certificate is for other names"')


def test_no_name_at_all(tmp_path: Path) -> None:
    nameless = self_signed(tmp_path, named=False)
    client, server = pair(dialing(TlsOptions(ca_file=nameless.certificate)), listening(nameless))
    pump(client, server)
    what, fix = client.end(by_peer=False)
    assert what == "the server's certificate has no names (no subjectAltName)"
    assert "common name" in fix


def test_expired(certificates: Certificates) -> None:
    expired = listening(certificates.server(expired=True))
    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file)), expired)
    pump(client, server)
    what, fix = client.end(by_peer=False)
    assert what.startswith("the server's certificate has expired")
    assert "clock" in fix
    what, _ = server.end(by_peer=True)
    assert what.startswith("the peer says that our certificate has expired")


def test_not_valid_yet(tmp_path: Path) -> None:
    early = self_signed(tmp_path, begins=3)
    client, server = pair(dialing(TlsOptions(ca_file=early.certificate)), listening(early))
    pump(client, server)
    assert client.end(by_peer=False) == (
        "the server's certificate is not valid yet",
        "this machine's clock is probably wrong: set it",
    )


def test_no_common_alpn(certificates: Certificates, listener: ServerTls) -> None:
    h3 = dialing(TlsOptions(ca_file=certificates.ca_file), alpn="h3")
    client, server = pair(h3, listening(listener))
    pump(client, server)
    for words in (client.end(by_peer=True), server.end(by_peer=False)):
        assert words[0] == "the two sides share no application protocol (ALPN)"
        assert "set `alpn`" in words[1]


def test_no_common_cipher(certificates: Certificates, listener: ServerTls) -> None:
    here, there = dialing(TlsOptions(ca_file=certificates.ca_file)), listening(listener)
    here.cipher_suites = [tls.CipherSuite.AES_128_GCM_SHA256]
    there.cipher_suites = [tls.CipherSuite.CHACHA20_POLY1305_SHA256]
    client, server = pair(here, there)
    pump(client, server)
    assert client.end(by_peer=True)[0].startswith("the peer broke off the TLS handshake")
    assert server.end(by_peer=False)[0].startswith("the two sides share no cipher")


def test_no_common_version(certificates: Certificates) -> None:
    dialed = QuicConnection(configuration=dialing(TlsOptions(ca_file=certificates.ca_file)))
    dialed.connect(SERVER, now=0.0)
    first = dialed.datagrams_to_send(now=0.0)
    answer = encode_quic_version_negotiation(
        source_cid=dialed.original_destination_connection_id,
        destination_cid=dialed.host_cid,
        supported_versions=[0xFF00001D],  # draft 29
    )
    assert first
    dialed.receive_datagram(answer, SERVER, now=0.0)
    what, fix = Side(dialed).end(by_peer=False)
    assert what == "the two sides share no QUIC version"
    assert "RFC 9000" in fix
    assert QuicProtocolVersion.VERSION_1 in dialed.configuration.supported_versions


def test_idle_before_and_after_the_handshake(certificates: Certificates, listener: ServerTls) -> None:
    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file)), listening(listener))
    client.quic.datagrams_to_send(now=0.0)
    what, fix = client.end(by_peer=False)
    assert what == "the handshake got no answer"
    assert "UDP" in fix

    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file)), listening(listener))
    pump(client, server)
    what, fix = client.end(by_peer=False)
    assert "idle timeout" in what
    assert "`keepalive`" in fix


def test_a_close_of_the_application(certificates: Certificates, listener: ServerTls) -> None:
    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file)), listening(listener))
    pump(client, server)
    server.quic.close(0x8E, reason_phrase="session taken over")
    pump(client, server)
    assert client.end(by_peer=True) == (
        "the peer closed the connection: session taken over (0x8E)",
        "see the log of the other side",
    )
    assert server.end(by_peer=False)[0] == "the application closed the connection: session taken over (0x8E)"


def test_a_close_of_the_application_during_the_handshake(
    certificates: Certificates, listener: ServerTls
) -> None:
    client, server = pair(dialing(TlsOptions(ca_file=certificates.ca_file)), listening(listener))
    for data, _ in client.quic.datagrams_to_send(now=0.0):
        server.quic.receive_datagram(data, CLIENT, now=0.0)
    server.quic.close(0x97, reason_phrase="quota")
    pump(client, server)
    assert "before the handshake was complete" in client.end(by_peer=True)[0]


# --- every code


@pytest.mark.parametrize("by_peer", [False, True])
@pytest.mark.parametrize("code", list(QuicErrorCode))
def test_every_transport_code_has_words(code: QuicErrorCode, by_peer: bool) -> None:
    for done in (False, True):
        what, fix = explain_close(code, frame_type=6, reason="", by_peer=by_peer, handshake_done=done)
        assert "unknown" not in what
        assert fix or (code == QuicErrorCode.NO_ERROR and done) or code == QuicErrorCode.CRYPTO_ERROR


ALERTS = [alert for alert in tls.AlertDescription if alert != tls.AlertDescription.close_notify]


@pytest.mark.parametrize("by_peer", [False, True])
@pytest.mark.parametrize("alert", [*ALERTS, 49, 48, 44, 46])
def test_every_alert_has_words(alert: int, by_peer: bool) -> None:
    what, fix = explain_close(0x100 + alert, frame_type=6, reason="", by_peer=by_peer, handshake_done=False)
    assert fix
    assert by_peer is False or "alert" not in what
    assert "{}" not in what


def test_a_broker_that_wants_a_client_certificate() -> None:
    what, fix = explain_close(0x174, frame_type=0, reason="", by_peer=True, handshake_done=True)
    assert "wants a client certificate" in what
    assert "mqtts://" in fix


def test_codes_nobody_knows() -> None:
    assert "0x4567" in explain_close(0x4567, frame_type=0, reason="", by_peer=True, handshake_done=True)[0]
    assert "0x9999" in explain_close(0x9999, frame_type=None, reason="", by_peer=True, handshake_done=True)[0]
    assert "200" in explain_close(0x100 + 200, frame_type=0, reason="", by_peer=True, handshake_done=True)[0]


@pytest.mark.parametrize(
    ("code", "words"),
    [(0x80, "unspecified error"), (0x87, "not authorized"), (0xA2, "wildcard subscriptions not supported")],
)
def test_mqtt_reason_codes(code: int, words: str) -> None:
    what, _ = explain_close(code, frame_type=None, reason="", by_peer=True, handshake_done=True)
    assert what == f"the peer closed the connection: {words} (0x{code:02X})"


@pytest.mark.parametrize("frame_type", [None, 0])
def test_what_the_peer_wrote_is_shown_safely(frame_type: int | None) -> None:
    reason = 'go away\n2026-01-01 ERROR "forged" \x1b[31m' + "x" * 5000
    what, _ = explain_close(0x0A, frame_type=frame_type, reason=reason, by_peer=True, handshake_done=True)
    assert "go away" in what
    assert what.isprintable()
    assert len(what) < 400
    assert what.count('"') == 2


# --- silence


def silence(
    *,
    sent: int = 5,
    received: int = 0,
    path_mtu: int | None = None,
    too_big: int = 0,
    refused: bool = False,
) -> tuple[str, str]:
    return explain_silence(
        sent=sent,
        received=received,
        path_mtu=path_mtu,
        too_big=too_big,
        refused=refused,
        timeout=10.0,
        datagram_size=1200,
    )


def test_nothing_came_back() -> None:
    what, fix = silence()
    assert what == "nothing came back to 5 datagrams within 10 s"
    assert "firewall" in fix
    assert "mqtts://" in fix


def test_nothing_listens() -> None:
    what, fix = silence(refused=True)
    assert "nothing listens on that UDP port" in what
    assert "port" in fix


def test_the_path_is_too_narrow() -> None:
    assert "1228 bytes, and this one takes 1100" in silence(path_mtu=1100)[0]
    assert "1228 bytes, and this one takes less" in silence(sent=0, too_big=3)[0]
    assert "nothing came back" in silence(path_mtu=1228)[0]


def test_the_handshake_did_not_finish() -> None:
    what, _ = silence(received=1)
    assert "something came back (one datagram)" in what


def test_nothing_was_sent() -> None:
    assert silence(sent=0)[0] == "no datagram could be sent"
