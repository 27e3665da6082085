"""What a client is told when no connection comes about, and what a handshake leaves behind."""

from __future__ import annotations

import asyncio
import datetime
import gc
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from quic_ends import HOST, ask, client, echoing, run, until

from tesaiot_connect import ConnectFailed, ConnectorError, ServerTls, TlsOptions, Unsupported, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic


def open_sockets() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            name = str(fd.readlink())
        except OSError:
            continue
        if name.startswith("socket:"):
            found.add(name)
    return found


async def refusal(recipe: QuicAioquic, **more: Any) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as failed:
        await recipe.connect(**more)
    gc.collect()
    return failed.value


def says(error: ConnectorError, what: str, fix: str) -> None:
    assert what in error.what, error.what
    assert fix in (error.fix or ""), error.fix
    assert len(error.what) < 400


# --- certificates


def test_a_certificate_of_another_authority(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Certificates(tmp_path / "other", name="another authority")

    async def main() -> None:
        async with echoing(certificates) as echo:
            error = await refusal(client(echo.url, other, tmp_path))
            says(error, "not from a trusted authority", "ca_file")
            assert error.stage == "secure"
            assert "quic://127.0.0.1" in error.what
            await until(lambda: echo.status().refused.get("handshake_failed") == 1)
            assert not echo.connections

    with caplog.at_level(logging.INFO):
        run(main())
    assert any(
        "handshake: 127.0.0.1:" in record.getMessage()
        for record in caplog.records
        if record.name.startswith("tesaiot")
    ), "the listener does not say that a client's handshake failed"


def test_a_certificate_for_another_name(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        server = certificates.server("a.example", "b.example")
        async with echoing(certificates, server_tls=server) as echo:
            error = await refusal(client(f"quic://localhost:{echo.port}", certificates, tmp_path))
            says(error, "for another name (a.example, b.example)", "server_name")
            named = TlsOptions(ca_file=certificates.ca_file, server_name="b.example")
            connection = await client(echo.url, certificates, tmp_path, tls=named).connect()
            await connection.aclose()

    run(main())


def test_a_certificate_that_has_expired(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        server = certificates.server(expired=True)
        async with echoing(certificates, server_tls=server) as echo:
            error = await refusal(client(echo.url, certificates, tmp_path))
            says(error, "has expired", "renew it")

    run(main())


def homemade(folder: Path, *, usage: Any = None) -> ServerTls:
    """A certificate that signs itself, for localhost."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    pem, secret = folder / "own.pem", folder / "own.key"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return ServerTls(certificate=pem, key=secret)


def test_a_certificate_that_signs_itself(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        own = homemade(tmp_path)
        async with echoing(certificates, server_tls=own) as echo:
            place = f"quic://localhost:{echo.port}"
            error = await refusal(client(place, certificates, tmp_path / "t"))
            says(error, "not from a trusted authority", "ca_file")
            trusting = TlsOptions(ca_file=own.certificate)
            connection = await client(place, certificates, tmp_path / "t", tls=trusting).connect()
            await ask(connection, b"trusted")
            await connection.aclose()

    run(main())


def test_a_certificate_that_is_meant_for_clients(certificates: Certificates, tmp_path: Path) -> None:
    from cryptography.x509.oid import ExtendedKeyUsageOID

    async def main() -> None:
        own = homemade(tmp_path, usage=ExtendedKeyUsageOID.CLIENT_AUTH)
        async with echoing(certificates, server_tls=own) as echo:
            place = f"quic://localhost:{echo.port}"
            trusting = TlsOptions(ca_file=own.certificate)
            recipe = client(place, certificates, tmp_path / "t", tls=trusting)
            says(await refusal(recipe, early=b"CONNECT"), "not meant for servers", "serverAuth")
            # and no ticket of that handshake lets the next one through
            says(await refusal(recipe, early=b"CONNECT"), "not meant for servers", "serverAuth")
            assert not any(echo.got)
            await until(lambda: not echo.status().connections)

    run(main())


def test_a_listener_needs_a_certificate() -> None:
    async def main() -> None:
        recipe = QuicAioquic(Url.parse("quic://127.0.0.1:0"))
        with pytest.raises(ConnectorError) as failed:
            async with recipe.listen(lambda connection: asyncio.sleep(0)):
                pass
        says(failed.value, "needs a certificate", "server_tls")

    run(main())


def test_a_client_certificate_is_refused_with_a_way_out(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(Unsupported) as failed:
            await client("quic://localhost:1", certificates, tmp_path).connect(identity=certificates.client())
        says(failed.value, "client certificates are not available over QUIC", "mqtts://")

    run(main())


# --- agreement


def test_no_common_application_protocol(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with echoing(certificates, alpn=("mqtt",)) as echo:
            error = await refusal(client(echo.url, certificates, tmp_path, alpn=("h3",)))
            says(error, "ALPN", "`alpn`")
            assert error.stage == "secure"
            await until(lambda: not echo.status().connections)
            assert echo.status().refused == {"handshake_failed": 1}

    with caplog.at_level(logging.INFO):
        run(main())
    told = [r.getMessage() for r in caplog.records if r.name.startswith("tesaiot")]
    assert any("ALPN" in text and "127.0.0.1:" in text for text in told), told


@pytest.mark.parametrize(
    ("ours", "theirs", "version"),
    [((1, 2), (1, 2), 1), ((2, 1), (1, 2), 2), ((2, 1), (1,), 1), ((1, 2), (2,), 2)],
)
def test_versions_are_negotiated(
    ours: tuple[int, ...], theirs: tuple[int, ...], version: int, certificates: Certificates, tmp_path: Path
) -> None:
    async def main() -> None:
        async with echoing(certificates, versions=theirs) as echo:
            connection = await client(echo.url, certificates, tmp_path, versions=ours).connect()
            await ask(connection, b"x" * 3000)
            quic = connection.status().quic
            assert quic is not None
            assert quic.version == version
            negotiated = ours[0] not in theirs
            assert echo.status().refused == ({"version": 1} if negotiated else {})
            await connection.aclose()

    run(main())


def test_no_common_version(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, versions=(2,)) as echo:
            error = await refusal(client(echo.url, certificates, tmp_path, versions=(1,)))
            says(error, "share no QUIC version", "version")
            assert error.stage == "secure"

    run(main())


# --- the way


def test_a_port_where_nothing_listens_fails_at_once(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind((HOST, 0))
            port = taken.getsockname()[1]
        begun = time.monotonic()
        error = await refusal(client(f"quic://{HOST}:{port}", certificates, tmp_path, connect_timeout=25.0))
        says(error, "nothing listens", "QUIC listener")
        assert error.stage == "reach"
        assert time.monotonic() - begun < 20

    run(main())


def test_silence(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind((HOST, 0))
            port = silent.getsockname()[1]
            error = await refusal(
                client(f"quic://{HOST}:{port}", certificates, tmp_path, connect_timeout=0.4)
            )
            says(error, "nothing came back", "blocks UDP")
            assert error.stage == "reach"
            assert "within 0.4 s" in error.what

    run(main())


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "a" * 70 + ".example", "x..example", "exämple.invalid"]
)
def test_a_name_that_does_not_resolve(host: str, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        error = await refusal(client(f"quic://{host}", certificates, tmp_path))
        assert host in error.what
        assert error.fix
        assert error.stage == "name"

    run(main())


def test_ipv6(certificates: Certificates, tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")

    async def main() -> None:
        async with echoing(certificates, host="[::1]") as echo:
            connection = await client(echo.url, certificates, tmp_path).connect()  # verified by address
            await ask(connection, b"six")
            assert connection.peer.address == f"[::1]:{echo.port}"
            assert echo.connections[0].peer.address.startswith("[::1]:")
            await connection.aclose()

    run(main())


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    async def resolve(host: str, port: int) -> list[Any]:
        return [(int(socket.AF_INET), address) for address in addresses]

    monkeypatch.setattr("tesaiot_connect_quic_aioquic.client.resolve", resolve)


@pytest.mark.parametrize("dead", ["silent", "refusing"])
def test_a_name_with_a_dead_address_first(
    dead: str, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
                silent.bind((HOST, 0))
                port = silent.getsockname()[1]
                if dead == "refusing":
                    silent.close()
                resolves_to(monkeypatch, (HOST, port), (HOST, echo.port))
                before = open_sockets()
                recipe = client("quic://localhost:1", certificates, tmp_path, attempt_delay=0.01)
                connection = await recipe.connect(early=b"once")
                await ask(connection, b"the second one")
                assert connection.peer.address == f"{HOST}:{echo.port}"
                assert len(open_sockets() - before) == 1
                await connection.aclose()

    run(main())


def test_two_dead_addresses_are_both_explained(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        other = Certificates(tmp_path / "other")
        async with echoing(certificates, server_tls=other.server()) as echo:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
                taken.bind((HOST, 0))
                port = taken.getsockname()[1]
            resolves_to(monkeypatch, (HOST, port), (HOST, echo.port))
            error = await refusal(client("quic://localhost:1", certificates, tmp_path))
            says(error, "nothing listens", "QUIC listener")
            says(error, "not from a trusted authority", "ca_file")
            assert error.stage == "secure"  # the one that got further

    run(main())


@pytest.mark.parametrize("host", ["bücher.example", "BÜCHER.example", "broker.example.", "BROKER.example"])
def test_names_are_verified_as_certificates_have_them(
    host: str, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = certificates.server("xn--bcher-kva.example", "broker.example")
        async with echoing(certificates, server_tls=server) as echo:
            resolves_to(monkeypatch, (HOST, echo.port))
            connection = await client(f"quic://{host}:{echo.port}", certificates, tmp_path).connect()
            await connection.aclose()

    run(main())


# --- what is left behind


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts sockets in /proc")
def test_cancelling_leaves_nothing(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(f"quic://localhost:{echo.port}", certificates, tmp_path)
            await (await recipe.connect()).aclose()
            before = open_sockets()
            for turns in range(60):
                dialling = asyncio.create_task(recipe.connect(early=b"hello"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                dialling.cancel()
                try:
                    connection = await dialling
                except asyncio.CancelledError:
                    continue
                connection.abort()
            await until(lambda: open_sockets() <= before, "a socket was left open")
            await until(lambda: not echo.status().connections, "the server kept a connection")
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()}, "a task was left")

    run(main())


def test_many_at_a_time(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path, connect_timeout=30.0)
            connections = await asyncio.gather(*(recipe.connect() for _ in range(60)))
            await asyncio.gather(*(ask(one, b"%d" % n * 1000) for n, one in enumerate(connections)))
            assert echo.status().connections == 60
            await asyncio.gather(*(one.aclose() for one in connections))
            await until(lambda: not echo.status().connections)
            assert sorted(map(bytes, echo.got)) == sorted(b"%d" % n * 1000 for n in range(60))

    run(main())
