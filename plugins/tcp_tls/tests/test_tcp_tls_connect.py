"""Dialling and listening for real: addresses, certificates, versions, and what is said when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from deadlines import LONG, over_at
from loops import Run

from tesaiot_connect import (
    ClientCertificate,
    ConnectFailed,
    Connection,
    ConnectorError,
    Disconnected,
    Duration,
    Peer,
    ServerTls,
    TlsOptions,
    Url,
    tcp,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_tcp_tls import TcpTls


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


async def echo(connection: Connection) -> None:
    stream = await connection.accept_stream()
    while data := await stream.receive():
        await stream.send(data)


def serve(certificates: Certificates | ServerTls, host: str = "127.0.0.1", **options: Any) -> TcpTls:
    tls = certificates if isinstance(certificates, ServerTls) else certificates.server()
    return TcpTls(Url.parse(f"mqtts://{host}:0"), server_tls=tls, **options)


def dial(url: str, certificates: Certificates | None, **tls: Any) -> TcpTls:
    if certificates is not None:
        tls["ca_file"] = certificates.ca_file
    return TcpTls(Url.parse(url), tls=TlsOptions(**tls))


async def works(transport: TcpTls, identity: ClientCertificate | None = None) -> Peer:
    connection = await transport.connect(identity=identity)
    try:
        stream = await connection.open_stream()
        await stream.send(b"ping")
        assert await stream.receive() == b"ping"
        return connection.peer
    finally:
        await connection.aclose()


async def fails(transport: TcpTls, identity: ClientCertificate | None = None) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as failed:
        await transport.connect(identity=identity)
    assert failed.value.fix
    return failed.value


# --- plain --------------------------------------------------------------------------------


def test_default_ports() -> None:
    assert TcpTls(Url.parse("mqtt://h")).port == 1883
    assert TcpTls(Url.parse("mqtts://h")).port == 8883
    assert TcpTls(Url.parse("mqtts://h:1")).port == 1


def test_plain_is_plain(run: Run) -> None:
    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(echo) as url:
            peer = await works(TcpTls(Url.parse(url)))
            assert (peer.secure, peer.certificate, peer.transport) == (False, None, "tcp_tls")
            assert peer.address == url.removeprefix("mqtt://")

    run(main())


@pytest.mark.parametrize("scheme", ["mqtt", "mqtts"])
def test_a_peer_that_leaves_at_once(run: Run, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Its reset is here before anybody looks at the socket, as when a broker that restarts is asked."""
    opened = tcp.open_socket

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            async def open_socket(*where: Any) -> socket.socket:
                sock = await opened(*where)
                left = server.accept()[0]
                left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                left.close()
                while True:
                    try:
                        sock.getpeername()
                    except OSError:
                        return sock
                    await asyncio.sleep(0)

            monkeypatch.setattr(tcp, "open_socket", open_socket)
            transport = TcpTls(Url.parse(f"{scheme}://127.0.0.1:{server.getsockname()[1]}"))
            with pytest.raises(Disconnected, match=r"reset|closed|left"):
                connection = await transport.connect()
                await (await connection.open_stream()).receive()

    run(main())


@ipv6
def test_ipv6(run: Run) -> None:
    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://[::1]:0")).listen(echo) as url:
            peer = await works(TcpTls(Url.parse(url)))
            assert peer.address.startswith("[::1]:")

    run(main())


@ipv6
def test_any_address_serves_both_families(run: Run) -> None:
    peers: list[str] = []

    async def handler(connection: Connection) -> None:
        peers.append(connection.peer.address)
        await echo(connection)

    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://[::]:0")).listen(handler) as url:
            port = Url.parse(url).port
            await works(TcpTls(Url.parse(f"mqtt://127.0.0.1:{port}")))
            await works(TcpTls(Url.parse(f"mqtt://[::1]:{port}")))
        assert peers[0].startswith("127.0.0.1:")
        assert peers[1].startswith("[::1]:")

    run(main())


def test_several_hosts_share_a_port(run: Run) -> None:
    async def main() -> None:
        recipe = TcpTls(Url.parse("mqtt://127.0.0.1:0"), hosts=("127.0.0.2",))
        try:
            async with recipe.listen(echo) as url:
                port = Url.parse(url).port
                for host in ("127.0.0.1", "127.0.0.2"):
                    await works(TcpTls(Url.parse(f"mqtt://{host}:{port}")))
        except ConnectorError as error:
            pytest.skip(f"this machine has no second loopback address: {error}")

    run(main())


def test_local_address(run: Run) -> None:
    peers: list[str] = []

    async def handler(connection: Connection) -> None:
        peers.append(connection.peer.address)
        await echo(connection)

    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(handler) as url:
            await works(TcpTls(Url.parse(url), local_address="127.0.0.1"))
            error = await fails(TcpTls(Url.parse(url), local_address="192.0.2.1"))
            assert "192.0.2.1" in str(error)
        assert peers[0].startswith("127.0.0.1:")

    run(main())


def test_socket_options(run: Run) -> None:
    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(echo) as url:
            connection = await TcpTls(Url.parse(url), keepalive_idle=Duration(7)).connect()
            stream: Any = await connection.open_stream()
            sock = stream.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
            connection.abort()
            off = TcpTls(Url.parse(url), keepalive_idle=Duration(0), nodelay=False)
            connection = await off.connect()
            stream = await connection.open_stream()
            sock = stream.transport.get_extra_info("socket")
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            connection.abort()

    run(main())


def test_refused_says_what_to_check(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error = run(fails(TcpTls(Url.parse(f"mqtt://127.0.0.1:{port}"))))
    assert f"127.0.0.1:{port} refused" in str(error)
    assert "nothing listens there" in error.fix
    assert error.stage == "reach"


def test_a_name_that_does_not_exist(run: Run) -> None:
    for host in ("no-such-host.invalid", "a" * 70 + ".example", "x..example"):
        error = run(fails(TcpTls(Url.parse(f"mqtt://{host}"))))
        assert f"{host} cannot be resolved" in str(error)
        assert error.stage == "name"


def test_silence_times_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose backlog is full drops what comes, as a firewall does."""
    over_at(monkeypatch, "reach")

    async def main() -> None:
        with contextlib.ExitStack() as open_sockets:
            address = black_hole(open_sockets)
            recipe = TcpTls(Url("mqtt", *address), connect_timeout=LONG)
            error = await fails(recipe)
            assert "no address answers" in str(error)
            assert "firewall" in error.fix
            assert error.stage == "reach"

    run(main())


def black_hole(open_sockets: contextlib.ExitStack, host: str = "127.0.0.1", port: int = 0) -> Any:
    """An address where connecting neither succeeds nor fails. Skips the test where it cannot be had."""
    server = open_sockets.enter_context(socket.socket())
    server.bind((host, port))
    server.listen(0)
    for number in range(8):
        client = open_sockets.enter_context(socket.socket())
        client.settimeout(0.1 if number else 20)  # there is always room for one
        try:
            client.connect(server.getsockname())
        except TimeoutError:
            return server.getsockname()
    pytest.skip("this system's backlog has no end")


# --- happy eyeballs -----------------------------------------------------------------------


def resolving_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    async def resolve(_host: str, port: int) -> list[tuple[int, Any]]:
        return [(socket.AF_INET, (host, port)) for host in hosts]

    monkeypatch.setattr("tesaiot_connect.tcp.resolve", resolve)


def test_a_dead_address_is_passed_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(echo) as url:
            resolving_to(monkeypatch, "127.0.0.9", "127.0.0.1")
            port = Url.parse(url).port
            recipe = TcpTls(Url("mqtt", "broker.example", port), attempt_delay=Duration(3600))
            assert (await works(recipe)).address == f"127.0.0.1:{port}"

    run(main())


def test_a_silent_address_loses_the_race(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(echo) as url:
            resolving_to(monkeypatch, "127.0.0.3", "127.0.0.1")
            port = Url.parse(url).port
            with contextlib.ExitStack() as open_sockets:
                try:
                    black_hole(open_sockets, "127.0.0.3", port)
                except OSError as error:
                    pytest.skip(f"no second loopback address: {error}")
                recipe = TcpTls(Url("mqtt", "broker.example", port), attempt_delay=Duration(0.01))
                assert (await works(recipe)).address == f"127.0.0.1:{port}"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_all_addresses_dead_tells_each(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    resolving_to(monkeypatch, "127.0.0.8", "127.0.0.9")
    error = run(fails(TcpTls(Url("mqtt", "broker.example", port))))
    assert f"127.0.0.8:{port} refused" in str(error)
    assert f"127.0.0.9:{port} refused" in str(error)
    assert error.stage == "reach"


# --- TLS ----------------------------------------------------------------------------------


def test_tls_verifies_and_shows_the_certificate(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        server = certificates.server()
        async with serve(server).listen(echo) as url:
            peer = await works(dial(url, certificates))
            assert peer.secure
            pem = server.certificate.read_text().partition("-----END CERTIFICATE-----")
            assert peer.certificate == ssl.PEM_cert_to_DER_cert(pem[0] + pem[1])

    run(main())


def test_an_unknown_authority(run: Run, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(certificates).listen(echo) as url:
            other = Certificates(tmp_path, name="somebody else")
            error = await fails(dial(url, other))
            assert "not from a trusted authority" in str(error)
            assert "ca_file" in error.fix
            assert error.stage == "secure"
            await fails(dial(url, None))  # nor does the system know it

    run(main())


def test_another_name_tells_the_names_it_has(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        server = certificates.server("broker.example", "broker2.example")
        async with serve(server).listen(echo) as url:
            error = await fails(dial(url, certificates))
            assert "is for another name" in str(error)
            assert "broker.example, broker2.example" in str(error)
            assert "server_name" in error.fix
            await works(dial(url, certificates, server_name="broker.example"))
            await fails(dial(url, certificates, server_name="elsewhere.example"))

    run(main())


def test_an_expired_certificate_tells_its_dates(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        server = certificates.server("localhost", "127.0.0.1", expired=True)
        async with serve(server).listen(echo) as url:
            error = await fails(dial(url, certificates))
            assert "has expired" in str(error)
            assert "it is valid from" in str(error)
            assert "clock" in error.fix

    run(main())


def test_without_verification(run: Run, certificates: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = certificates.server("broker.example", expired=True)
        async with serve(server).listen(echo) as url:
            peer = await works(dial(url, None, verify="none", insecure=True))
            assert peer.secure
            assert peer.certificate is None, "an unverified certificate proves nothing"

    with caplog.at_level(logging.WARNING):
        run(main())
    assert "not verified" in caplog.text


def test_minimum_versions(run: Run, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    make = ServerTls.server_context

    def old(self: ServerTls) -> ssl.SSLContext:
        context = make(self)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    async def main() -> None:
        server = certificates.server()
        modern = ServerTls(certificate=server.certificate, key=server.key, minimum_version="1.3")
        async with serve(modern).listen(echo) as url:
            await works(dial(url, certificates, minimum_version="1.3"))
        monkeypatch.setattr(ServerTls, "server_context", old)
        async with serve(server).listen(echo) as url:
            await works(dial(url, certificates))
            error = await fails(dial(url, certificates, minimum_version="1.3"))
            assert "minimum_version" in error.fix

    run(main())


def test_a_plain_port_is_not_tls(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(echo) as url:
            error = await fails(dial(url.replace("mqtt:", "mqtts:"), certificates))
            assert "8883" in error.fix or "speaks TLS" in error.fix
            assert error.stage == "secure"

    run(main())


def test_a_port_that_hangs_up(run: Run, certificates: Certificates) -> None:
    async def hang_up(connection: Connection) -> None:
        connection.abort()

    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(hang_up) as url:
            error = await fails(dial(url.replace("mqtt:", "mqtts:"), certificates))
            assert "speaks TLS" in error.fix
            assert error.stage == "secure"

    run(main())


def test_a_port_that_never_answers(
    run: Run, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    over_at(monkeypatch, "secure")

    async def silent(connection: Connection) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(silent) as url:
            recipe = TcpTls(
                Url.parse(url.replace("mqtt:", "mqtts:")),
                tls=TlsOptions(ca_file=certificates.ca_file),
                connect_timeout=LONG,
            )
            error = await fails(recipe)
            assert "does not answer the TLS handshake" in str(error)
            assert error.stage == "secure"

    run(main())


# --- client certificates ------------------------------------------------------------------


def test_a_required_client_certificate(run: Run, certificates: Certificates, tmp_path: Path) -> None:
    seen: list[Peer] = []

    async def handler(connection: Connection) -> None:
        seen.append(connection.peer)
        await echo(connection)

    async def main() -> None:
        server = certificates.server(clients=certificates)
        async with serve(server).listen(handler) as url:
            identity = certificates.client("sensor-7")
            await works(dial(url, certificates), identity)
            from cryptography import x509
            from cryptography.x509.oid import NameOID

            assert seen[0].certificate is not None
            shown = x509.load_der_x509_certificate(seen[0].certificate)
            names = shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            assert [name.value for name in names] == ["sensor-7"]

            await is_turned_away(dial(url, certificates), None, "may require a client certificate")
            stranger = Certificates(tmp_path / "stranger").client()
            await is_turned_away(dial(url, certificates), stranger, "not accept the one it was shown")
            expired = certificates.client(expired=True)
            await is_turned_away(dial(url, certificates), expired, "not accept the one it was shown")
        assert len(seen) == 1

    run(main())


async def is_turned_away(transport: TcpTls, identity: ClientCertificate | None, word: str) -> None:
    """TLS 1.3: the client's handshake succeeds; the rejection comes when or before it reads."""
    with pytest.raises(Disconnected) as rejected:
        connection = await transport.connect(identity=identity)
        try:
            stream = await connection.open_stream()
            await stream.receive()
        finally:
            connection.abort()
            await connection.wait_closed()
    assert word in str(rejected.value)


def test_an_optional_client_certificate(run: Run, certificates: Certificates, tmp_path: Path) -> None:
    seen: list[Peer] = []

    async def handler(connection: Connection) -> None:
        seen.append(connection.peer)
        await echo(connection)

    async def main() -> None:
        server = certificates.server(clients=certificates, required=False)
        async with serve(server).listen(handler) as url:
            await works(dial(url, certificates))
            await works(dial(url, certificates), certificates.client())
            stranger = Certificates(tmp_path / "stranger").client()
            await is_turned_away(dial(url, certificates), stranger, "not accept the one it was shown")
        assert [peer.certificate is not None for peer in seen] == [False, True]

    run(main())


@contextlib.contextmanager
def openssl_server(tls: ServerTls) -> Iterator[str]:
    """A server that sends TLS alerts, as most do (asyncio's own does not). One client at a time."""
    context = tls.server_context()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client, contextlib.suppress(OSError):
                    context.wrap_socket(client, server_side=True).close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"mqtts://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_alerts_are_put_into_words(run: Run, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        with openssl_server(certificates.server(clients=certificates)) as url:
            recipe = dial(url, certificates)
            await is_turned_away(recipe, None, "the server requires a client certificate")
            stranger = Certificates(tmp_path / "stranger").client()
            await is_turned_away(recipe, stranger, "does not trust our certificate")
            expired = certificates.client(expired=True)
            await is_turned_away(recipe, expired, "our certificate has expired")

    run(main())


def test_missing_identity_files(run: Run, certificates: Certificates) -> None:
    error = run(fails(dial("mqtts://127.0.0.1:1", certificates), ClientCertificate("no.pem", "no.key")))
    assert "client certificate no.pem does not exist" in str(error)


# --- listening ----------------------------------------------------------------------------


def cannot_listen(run: Run, recipe: TcpTls) -> ConnectorError:
    async def main() -> None:
        async with recipe.listen(echo):
            pass

    with pytest.raises(ConnectorError) as failed:
        run(main())
    return failed.value


def test_listening_problems_are_told(run: Run, certificates: Certificates, tmp_path: Path) -> None:
    assert "needs a certificate" in str(cannot_listen(run, TcpTls(Url.parse("mqtts://127.0.0.1:0"))))
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = TcpTls(Url("mqtt", "127.0.0.1", server.getsockname()[1]))
        assert "another program listens there" in str(cannot_listen(run, taken))
    foreign = TcpTls(Url.parse("mqtt://192.0.2.1:0"))
    assert "does not have that address" in str(cannot_listen(run, foreign))
    nowhere = ServerTls(certificate=tmp_path / "no.pem", key=tmp_path / "no.key")
    assert "server certificate" in str(cannot_listen(run, serve(nowhere)))
    nameless = TcpTls(Url.parse("mqtt://no-such-host.invalid:0"))
    assert "cannot listen on no-such-host.invalid" in str(cannot_listen(run, nameless))


def test_a_client_that_dawdles_is_dropped_and_others_served(
    run: Run, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has all the time there is, and the last one none."""
    times, wrap = [LONG, LONG, Duration(0.01)], tcp.wrap_accepted

    async def timed(recipe: Any, *rest: Any) -> Peer:
        return await wrap(attrs.evolve(recipe, handshake_timeout=times.pop(0)), *rest)

    monkeypatch.setattr(tcp, "wrap_accepted", timed)

    async def main() -> None:
        async with serve(certificates).listen(echo) as url:
            port = Url.parse(url).port
            _, slow = await asyncio.open_connection("127.0.0.1", port)
            await works(dial(url, certificates))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b"", "the listener did not hang up"
        for one in (slow, writer):
            one.close()
            with contextlib.suppress(ConnectionError):
                await one.wait_closed()

    run(main())


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\x10\x0c\x00\x04MQTT", b"\xff" * 5000])
def test_junk_instead_of_a_handshake(run: Run, certificates: Certificates, junk: bytes) -> None:
    async def main() -> None:
        async with serve(certificates).listen(echo) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", Url.parse(url).port)
            writer.write(junk)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            await works(dial(url, certificates))

    run(main())


def test_leaving_ends_handshakes_in_progress(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        async with serve(certificates).listen(echo) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", Url.parse(url).port)
            await works(dial(url, certificates))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())
