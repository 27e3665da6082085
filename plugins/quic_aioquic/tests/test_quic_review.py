"""Ends of streams at odd moments: nobody waits for ever, no credit and no memory is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aioquic import tls
from aioquic.buffer import encode_uint_var as varint
from aioquic.quic import events
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder
from quic_ends import HOST, Raw, client, echoing, exactly, port_of, resumable, run, until

from tesaiot_connect import Connection, Disconnected, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic, server
from tesaiot_connect_quic_aioquic.issued import IssuedTickets

MUCH = 300_000


def inject(raw: Raw, frame: bytes) -> None:
    """One 1-RTT packet with this frame."""
    quic = raw.quic
    builder = QuicPacketBuilder(
        host_cid=quic.host_cid,
        peer_cid=quic._peer_cid.cid,
        version=quic._version or 1,
        is_client=True,
        max_datagram_size=1200,
        packet_number=quic._packet_number,
    )
    builder.start_packet(QuicPacketType.ONE_RTT, quic._cryptos[tls.Epoch.ONE_RTT])
    builder.start_frame(frame[0], capacity=len(frame)).push_bytes(frame[1:])
    (data,), _ = builder.flush()
    quic._packet_number = builder.packet_number
    raw.send(data)


async def with_server(
    certificates: Certificates, test: Callable[[Raw, Any], Awaitable[None]], **options: Any
) -> None:
    """A listener that leaves its connection to the test, and a peer that never grants more than at first."""
    found: list[Connection] = []

    async def serve(connection: Connection) -> None:
        found.append(connection)
        await connection.wait_closed()

    recipe = QuicAioquic(Url.parse(f"quic://{HOST}:0"), server_tls=certificates.server(), **options)
    async with recipe.listen(serve) as bound, Raw(port_of(bound), max_data=50_000) as raw:
        raw.quic._write_connection_limits = lambda *a, **k: None  # type: ignore[method-assign]
        raw.quic._write_stream_limits = lambda *a, **k: None  # type: ignore[method-assign]
        await raw.handshake()
        await raw.until(lambda: found)
        playing = asyncio.create_task(raw.until(lambda: raw.ended))
        await test(raw, found[0])
        found[0].abort()
        await playing


async def stuck(raw: Raw, server: Any) -> tuple[Any, asyncio.Task[None]]:
    """A stream of the server's whose sender waits for a peer that takes no more."""
    raw.quic.send_stream_data(0, b"x")
    raw.flush()
    found = await server.accept_stream()
    assert await found.receive() == b"x"
    sending = asyncio.create_task(found.send(bytes(MUCH)))
    await until(lambda: server.quic.blocked)
    assert not sending.done()
    return found, sending


def test_what_a_reset_leaves_out_is_credited(certificates: Certificates) -> None:
    """Bytes that were counted and never came (RFC 9000 section 4.5) must not narrow the window for ever."""

    async def test(raw: Raw, server: Any) -> None:
        for number in range(4):
            inject(raw, b"\x04" + varint(4 * number) + b"\x00" + varint(60_000))
            await until(lambda: raw.quic._remote_max_data >= 100_000 + 60_000 * (number + 1))  # noqa: B023

    run(with_server(certificates, test, connection_window=100_000, stream_window=100_000))


def test_what_comes_for_a_stream_that_was_left_is_credited(certificates: Certificates) -> None:
    async def test(raw: Raw, server: Any) -> None:
        raw.quic.send_stream_data(0, b"x")
        raw.flush()
        (await server.accept_stream()).abort()
        inject(raw, b"\x04\x00\x00" + varint(90_000))
        await until(lambda: raw.quic._remote_max_data >= 190_000)

    run(with_server(certificates, test, connection_window=100_000, stream_window=100_000))


def test_bytes_behind_a_gap_count_for_the_budget(certificates: Certificates) -> None:
    async def test(raw: Raw, server: Any) -> None:
        inject(raw, b"\x0e\x00" + varint(200_000) + b"\x01x")
        await until(lambda: server._budget.used >= 200_000)
        server.abort()
        assert server._budget.used == 0

    run(with_server(certificates, test))


def test_a_stream_that_is_refused_as_it_opens(certificates: Certificates) -> None:
    """STOP_SENDING may come before the first byte: aioquic puts it first."""

    async def test(raw: Raw, server: Any) -> None:
        raw.quic.send_stream_data(0, b"x")
        raw.quic.stop_stream(0, 7)
        raw.flush()
        found = await server.accept_stream()
        assert await found.receive() == b"x"
        with pytest.raises(Disconnected, match="0x7"):
            await found.send(b"answer")
        await found.aclose()

    run(with_server(certificates, test))


def test_what_a_peer_refuses_is_not_kept(certificates: Certificates) -> None:
    async def test(raw: Raw, server: Any) -> None:
        _, sending = await stuck(raw, server)
        assert server.quic.buffered(0) >= 200_000 - 50_000
        raw.quic.stop_stream(0, 7)
        raw.flush()
        with pytest.raises(Disconnected, match="0x7"):
            await sending
        assert server.quic.buffered(0) == 0

    run(with_server(certificates, test, send_buffer=200_000))


def test_closing_a_stream_ends_its_sender(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And cuts off the peer that takes nothing, with what it did not take."""
    monkeypatch.setattr("tesaiot_connect_quic_aioquic.stream.CLOSE_TIMEOUT", 0.1)

    async def test(raw: Raw, server: Any) -> None:
        found, sending = await stuck(raw, server)
        await found.aclose()
        with pytest.raises(Disconnected):
            await sending
        await until(lambda: raw.event(events.StreamReset))
        assert server.quic.buffered(0) == 0
        assert server._budget.used <= 1

    run(with_server(certificates, test, send_buffer=200_000))


def test_closing_a_connection_ends_its_senders(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(raw: Raw, server: Any) -> None:
        _, sending = await stuck(raw, server)
        closing = asyncio.create_task(server.aclose())
        inject(raw, b"\x10" + varint(10_000_000))  # it takes all that was written, and the sender goes on
        inject(raw, b"\x11\x00" + varint(10_000_000))
        with pytest.raises(Disconnected):
            await sending
        await closing

    run(with_server(certificates, test, send_buffer=200_000))


def test_a_full_listener_leaves_every_stream_some_room(certificates: Certificates) -> None:
    """What one stream held before must not silence its siblings, the control stream among them."""

    async def test(raw: Raw, server: Any) -> None:
        _, sending = await stuck(raw, server)
        raw.quic.send_stream_data(4, b"x")
        raw.flush()
        other = await server.accept_stream()
        server._budget.limit = 1
        assert server._budget.tight
        async with asyncio.timeout(30):
            await other.send(b"answer")
        sending.cancel()

    run(with_server(certificates, test, send_buffer=200_000))


def link_local() -> tuple[str, int] | None:
    """An address of this machine that means nothing without its interface."""
    try:
        lines = Path("/proc/net/if_inet6").read_text("ascii").splitlines()
    except OSError:
        return None
    for address, index, _, scope, *_ in map(str.split, lines):
        if scope == "20":
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)), int(index, 16)
    return None


@pytest.mark.skipif(link_local() is None, reason="this machine has no link-local address")
def test_a_listener_on_a_link_local_address(certificates: Certificates, tmp_path: Path) -> None:
    address, index = link_local() or ("", 0)
    host = f"{address}%{socket.if_indextoname(index)}"

    async def main() -> None:
        async with echoing(certificates, hosts=(host,)) as echo:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            with sock:
                sock.setblocking(False)
                sock.connect((address, echo.port, 0, index))
                sock.send(b"\xc0\x0a\x0a\x0a\x0a\x08" + bytes(8) + b"\x08" + bytes(1300))  # unknown version
                async with asyncio.timeout(30):
                    assert await asyncio.get_running_loop().sock_recv(sock, 1500)

    run(main())


def test_early_data_may_go_on_to_the_new_limits(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may raise its limits between a ticket and its use (RFC 9000 section 7.4.1); ours does not."""
    monkeypatch.setattr(server, "IssuedTickets", lambda path, scope, limit: IssuedTickets(path, limit=limit))

    async def main() -> None:
        state = tmp_path / "state"
        async with echoing(certificates, state_file=state, stream_window=20_000) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            place = f"quic://{HOST}:{echo.port}"
        async with echoing(certificates, place, state_file=state, stream_window=400_000):
            connection = await recipe.connect(early=b"early")
            assert connection.status().quic.early_data_accepted  # type: ignore[union-attr]
            stream = await connection.open_stream()
            sending = asyncio.create_task(stream.send(bytes(100_000)))
            async with asyncio.timeout(30):
                await exactly(stream, 100_005)
            await sending
            await connection.aclose()

    run(main())


def test_what_a_peer_says_of_its_timers(certificates: Certificates) -> None:
    """An idle timeout of 0 is none (RFC 9000 section 18.2); the exponent is what RTTs are reckoned with."""

    async def main() -> None:
        async with echoing(certificates) as echo, Raw(echo.port, idle_timeout=0.0) as raw:
            raw.quic._idle_timeout = lambda: 60.0  # type: ignore[method-assign]
            raw.quic._local_ack_delay_exponent = 8
            await raw.handshake()
            await raw.until(lambda: echo.connections)
            server: Any = echo.connections[0]
            assert server.quic.idle_timeout == 3600
            assert server.quic._remote_ack_delay_exponent == 8
            server.set_keepalive(100)
            assert server.quic.idle_timeout == 151
            server.abort()

    run(main())


def test_the_smallest_windows_do_not_flood(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, connection_window=1, stream_window=1) as echo:
            connection = await client(echo.url, certificates, tmp_path).connect()
            stream = await connection.open_stream()
            for _ in range(10):
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            status = echo.connections[0].status().quic
            assert status is not None
            assert status.packets_sent < 200
            connection.abort()

    run(main())
