"""The listener: its limits, what it answers strangers, its certificates, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic import events
from quic_ends import HOST, Raw, Relay, ask, client, echoing, exactly, run, throw, until

from tesaiot_connect import (
    ConnectFailed,
    Connection,
    Disconnected,
    QuicState,
    QuicStatus,
    ServerTls,
    Size,
    State,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import (
    QuicAioquic,
    certificates as certificates_module,
    listener,
    server as server_module,
)
from tesaiot_connect_quic_aioquic.connection import QuicConnection
from tesaiot_connect_quic_aioquic.issued import IssuedTickets


@pytest.fixture
def endpoints(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The listeners' endpoints that the test makes."""
    found: list[Any] = []

    class Kept(listener.ServerEndpoint):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            found.append(self)

    monkeypatch.setattr(server_module, "ServerEndpoint", Kept)
    return found


def quic_of(connection: Any) -> QuicStatus:
    found = connection.status().quic
    assert isinstance(found, QuicStatus)
    return found


async def half_open(port: int) -> Raw:
    """A client that sends its first flight, reads the answer and never goes on."""
    raw = Raw(port)
    await raw.__aenter__()
    raw.connect()
    return raw


def is_retry(data: bytes) -> bool:
    return data[0] & 0xF0 == 0xF0


# --- address validation


def test_retry_always(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, retry="always") as echo:
            connection = await client(echo.url, certificates, tmp_path).connect()
            await ask(connection, b"validated")
            assert echo.status().retries == 1
            await connection.aclose()

    run(main())


def test_retry_begins_under_load_and_ends_with_it(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, retry_above=10, handshake_timeout=0.5) as echo:
            strangers = [await half_open(echo.port) for _ in range(30)]
            for raw in strangers:
                await raw.receive()
            answered = [is_retry(raw.received[0]) for raw in strangers]
            assert answered == [False] * 10 + [True] * 20
            assert all(len(raw.received[0]) < len(raw.sent[0]) for raw in strangers[10:])
            recipe = client(echo.url, certificates, tmp_path)
            await (await recipe.connect()).aclose()  # gets through meanwhile
            assert echo.status().retries == 21
            await until(lambda: echo.status().handshakes == 0, "half-open handshakes stay")
            assert echo.status().refused == {"handshake_failed": 10}
            await (await recipe.connect()).aclose()
            assert echo.status().retries == 21
            for raw in strangers:
                raw.close()

    run(main())


def test_a_token_is_of_its_address_and_its_server(certificates: Certificates) -> None:
    async def main() -> None:
        async with echoing(certificates, retry="always") as echo:
            async with Raw(echo.port) as raw, Raw(echo.port) as thief:
                raw.connect()
                raw.take(await raw.receive())  # the Retry
                (with_token,) = [data for data, _ in raw.quic.datagrams_to_send(raw.loop.time())][:1]
                thief.send(with_token)
                answer = await thief.receive()
                assert len(answer) <= 3 * len(with_token)
                await until(lambda: echo.status().refused == {"token": 1})
                raw.send(with_token)
                await raw.until(lambda: raw.event(events.HandshakeCompleted))
                raw.quic.close()
                raw.flush()

    run(main())


def test_a_token_of_another_server_counts_as_none(certificates: Certificates) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo, Raw(echo.port, token=b"of somebody else" * 4) as raw:
            raw.connect()
            await raw.until(lambda: raw.event(events.HandshakeCompleted))
            assert not echo.status().refused
            raw.quic.close()
            raw.flush()

    run(main())


def test_no_more_than_three_times_what_came(certificates: Certificates) -> None:
    """A client that never answers: of an address that may be forged (RFC 9000 section 8.1)."""

    async def main() -> None:
        async with echoing(certificates, handshake_timeout=1.5) as echo:
            async with Raw(echo.port) as raw:
                raw.connect()
                sent, got = sum(map(len, raw.sent)), 0
                assert sent == 1200
                while echo.status().handshakes or not got:
                    try:
                        got += len(await raw.receive(0.1))
                    except TimeoutError:
                        pass
                assert 0 < got <= 3 * sent
                assert echo.status().bytes_sent <= 3 * sent

    run(main())


# --- limits


def test_max_connections(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, max_connections=3) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            taken = [await recipe.connect() for _ in range(3)]
            with pytest.raises(ConnectFailed, match=r"as many connections as it takes") as failed:
                await recipe.connect()
            assert failed.value.fix
            assert echo.status().refused == {"max_connections": 1}
            assert echo.status().connections == 3
            await taken.pop().aclose()
            await until(lambda: echo.status().connections == 2)
            taken.append(await recipe.connect())
            for connection in taken:
                await connection.aclose()

    run(main())


def test_max_handshakes(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"max_handshakes": 5, "retry": "never", "handshake_timeout": 1.0}
        async with echoing(certificates, **options) as echo:
            strangers = [await half_open(echo.port) for _ in range(5)]
            await until(lambda: echo.status().handshakes == 5)
            recipe = client(echo.url, certificates, tmp_path)
            with pytest.raises(ConnectFailed, match="handshakes"):
                await recipe.connect()
            await until(lambda: echo.status().handshakes == 0)
            await (await recipe.connect()).aclose()
            for raw in strangers:
                raw.close()

    run(main())


def test_a_refusal_costs_no_handshake(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is turned away loses no ticket, and no signature is made for him."""

    async def main() -> None:
        async with echoing(certificates, max_connections=1) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            connection = await recipe.connect()
            await until(lambda: any(tmp_path.glob("*.ticket")))
            asked: list[bytes] = []
            redeem = IssuedTickets.redeem

            def counted(self: Any, identity: bytes) -> Any:
                asked.append(identity)
                return redeem(self, identity)

            monkeypatch.setattr(IssuedTickets, "redeem", counted)
            with pytest.raises(ConnectFailed, match="as many connections"):
                await recipe.connect(early=b"CONNECT")
            assert not asked
            await connection.aclose()

    run(main())


def test_a_listener_that_holds_enough_takes_nobody(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        reading = asyncio.Event()

        async def slow(connection: Connection) -> None:
            stream = await connection.accept_stream()
            await reading.wait()
            while await stream.receive():
                pass

        recipe = QuicAioquic(
            Url.parse("quic://127.0.0.1:0"), server_tls=certificates.server(), memory=Size(50_000)
        )
        async with recipe.listen(slow) as bound:
            status: Any = bound.status  # type: ignore[attr-defined]
            connector = client(bound, certificates, tmp_path)
            connection = await connector.connect()
            stream = await connection.open_stream()
            await stream.send(b"x" * 60_000)
            await until(lambda: quic_of(connection).bytes_in_flight == 0)
            with pytest.raises(ConnectFailed, match="as much unread data as it takes"):
                await connector.connect()
            assert status().refused == {"memory": 1}
            reading.set()
            await stream.send_eof()
            assert await stream.receive() == b""
            await (await connector.connect()).aclose()
            await connection.aclose()

    run(main())


# --- strangers


async def answer_to(port: int, data: bytes) -> bytes | None:
    """What comes back before the answer to a question that is always answered."""
    unknown = b"\xc0\x0a\x0a\x0a\x0a\x08marker!!\x08" + os.urandom(8) + bytes(1200)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((HOST, port))
        sock.send(data)
        sock.send(unknown)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            first = await loop.sock_recv(sock, 65536)
            return None if b"marker!!" in first else first


def test_version_negotiation_is_for_whole_datagrams(certificates: Certificates) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            head = b"\xc0\x1a\x2a\x3a\x4a\x08" + b"d" * 8 + b"\x08" + b"s" * 8
            whole = head + bytes(1200 - len(head))
            assert await answer_to(echo.port, whole[:1199]) is None
            found = await answer_to(echo.port, whole)
            assert found is not None
            assert found[0] & 0x80
            assert found[1:5] == bytes(4)
            assert found[5:23] == b"\x08" + b"s" * 8 + b"\x08" + b"d" * 8
            assert {found[i : i + 4] for i in range(23, len(found), 4)} >= {b"\0\0\0\1", b"\x6b\x33\x43\xcf"}
            # and never an answer to an answer
            assert await answer_to(echo.port, b"\xc0\0\0\0\0" + whole[5:]) is None

    run(main())


def test_a_stateless_reset_is_smaller_than_its_cause(certificates: Certificates) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            for size in (22, 23, 30, 43, 44, 100, 1200):
                found = await answer_to(echo.port, b"\x40" + os.urandom(size - 1))
                assert found is not None, size
                assert 21 <= len(found) < size
                assert found[0] & 0xC0 == 0x40
            for size in (1, 9, 20, 21):
                assert await answer_to(echo.port, b"\x40" + os.urandom(size - 1)) is None

    run(main())


def test_stateless_resets_have_a_limit(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(listener, "_ANSWERS", 20)
        async with echoing(certificates) as echo:
            await throw(echo.port, [b"\x40" + os.urandom(99) for _ in range(200)])
            await (await client(echo.url, certificates, tmp_path).connect()).aclose()  # behind them
            assert echo.status().stateless_resets <= 60  # within three seconds of the clock
            assert echo.status().datagrams_dropped >= 140

    run(main())


def test_a_restarted_server_is_noticed_at_once(
    certificates: Certificates, tmp_path: Path, endpoints: list[Any]
) -> None:
    """The key of its tokens stays in the state file."""

    async def main() -> None:
        state = tmp_path / "state.db"
        async with echoing(certificates, state_file=state) as echo:
            place = str(echo.url)
            connection = await client(place, certificates, tmp_path / "t").connect()
            stream = await connection.open_stream()
            await stream.send(b"before")
            assert await exactly(stream, 6) == b"before"
            server = echo.connections[0]
            assert isinstance(server, QuicConnection)
            for udp in endpoints[0]._sockets:  # a crash: not a word to the client
                udp.close()
            server.lost(Disconnected("forgotten"))
        async with echoing(certificates, host=place, state_file=state) as echo:
            with pytest.raises(Disconnected, match="does not know this connection any more"):
                await stream.send(b"after")
                await stream.receive()
            reason = await connection.wait_closed()
            assert "stateless reset" in reason.text
            assert reason.by_peer
            assert [state for state, _ in quic_of(connection).states] == [*QuicState]
            assert echo.status().stateless_resets >= 1
            assert not echo.connections
            await connection.aclose()

    run(main())


def test_a_forged_reset_is_ignored(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo, Relay(echo.port) as relay:
            connection = await client(relay.url, certificates, tmp_path).connect()
            stream = await connection.open_stream()
            await stream.send(b"1")
            assert await exactly(stream, 1) == b"1"
            for size in (21, 43, 1200):
                relay.near.sendto(b"\x40" + os.urandom(size - 1), relay._client)
            await stream.send(b"2")
            assert await exactly(stream, 1) == b"2"
            await connection.aclose()
            await until(lambda: not echo.status().connections)

    run(main())


# --- certificates


def test_a_new_certificate_is_for_new_connections(
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(certificates_module, "_LOOK_EVERY", 0.0)

    def put(found: ServerTls) -> None:
        for name, source in (("own.pem", found.certificate), ("own.key", found.key)):
            (tmp_path / name).write_bytes(source.read_bytes())

    async def main() -> None:
        put(certificates.server())
        own = ServerTls(certificate=tmp_path / "own.pem", key=tmp_path / "own.key")
        async with echoing(certificates, server_tls=own) as echo:
            recipe = client(echo.url, certificates, tmp_path / "t", zero_rtt=False)
            seen: list[bytes | None] = []

            async def look() -> Any:
                for path in (tmp_path / "t").glob("*.ticket"):
                    path.unlink()  # a full handshake
                connection = await recipe.connect()
                await ask(connection, b"new")
                seen.append(connection.peer.certificate)
                return connection

            old = await look()
            put(certificates.server())
            second = await look()
            (tmp_path / "own.pem").write_text("broken")
            third = await look()
            assert seen[0] != seen[1] == seen[2]
            assert None not in seen
            await ask(old, b"old ones live on")
            for connection in (old, second, third):
                await connection.aclose()

    with caplog.at_level(logging.INFO):
        run(main())
    told = [r.getMessage() for r in caplog.records if "certificate" in r.getMessage()]
    assert any("uses the new certificate" in text for text in told)
    assert any("keeps its old certificate" in text for text in told)


# --- time


def test_keys_are_renewed_in_the_middle_of_a_transfer(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, key_update=40) as echo:
            connection = await client(echo.url, certificates, tmp_path, key_update=60).connect()
            data = os.urandom(1_000_000)
            stream = await connection.open_stream()
            sending = asyncio.create_task(stream.send(data))
            assert await exactly(stream, len(data)) == data
            await sending
            quic: Any = connection.quic  # type: ignore[attr-defined]
            assert quic._key_phase_from >= 60, "no key was renewed"
            assert echo.connections[0].quic._key_phase_from >= 40  # type: ignore[attr-defined]
            await connection.aclose()

    run(main())


def test_a_dead_client_is_noticed(certificates: Certificates) -> None:
    """The idle timeout follows the MQTT keepalive: 1.5 times, and a second."""

    async def main() -> None:
        async with echoing(certificates) as echo:
            async with Raw(echo.port) as raw:
                await raw.handshake()
                await until(lambda: echo.connections)
                server = echo.connections[0]
                assert isinstance(server, QuicConnection)
                assert server.quic.idle_timeout == pytest.approx(60)  # what the client announced
                server.set_keepalive(20)
                assert server.quic.idle_timeout == pytest.approx(31)
                server.set_keepalive(0)
                assert server.quic.idle_timeout == pytest.approx(60)
                server.set_keepalive(0.01)
                reason = await server.wait_closed()  # the client says nothing any more
                assert "idle timeout" in reason.text
                assert not reason.by_peer
                states = [state for state, _ in quic_of(server).states]
                assert states[:3] == [QuicState.INITIAL, QuicState.HANDSHAKE, QuicState.ONE_RTT]
                assert states[-1] is QuicState.CLOSED
                await until(lambda: echo.status().connections == 0)

    run(main())


def test_pings_keep_a_connection_beyond_its_idle_timeout(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, idle_timeout=3.1) as echo:
            kept = await client(echo.url, certificates, tmp_path, keepalive=0.2).connect()
            left = await client(echo.url, certificates, tmp_path, keepalive=0.0).connect()
            with pytest.raises(Disconnected, match="idle timeout"):
                await (await left.open_stream()).receive()
            await ask(kept, b"still there")
            assert kept.status().state is State.OPEN
            await kept.aclose()

    run(main())


# --- the end


def test_closing_tells_everybody_at_once(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with echoing(certificates, handshake_timeout=20.0) as echo:
            recipe = client(echo.url, certificates, tmp_path, connect_timeout=20.0)
            connections = await asyncio.gather(*(recipe.connect() for _ in range(50)))
            streams = [await connection.open_stream() for connection in connections]
            for stream in streams:
                await stream.send(b"hello")
            await asyncio.gather(*(exactly(stream, 5) for stream in streams))
            stranger = await half_open(echo.port)
            begun = loop.time()
        assert loop.time() - begun < 4, "closing takes too long"
        for stream in streams:
            with pytest.raises(Disconnected):
                while await stream.receive():
                    pass
                await stream.send(b"x")
        reasons = [await connection.wait_closed() for connection in connections]
        assert all(reason.by_peer for reason in reasons)
        for connection in connections:
            await connection.aclose()
        stranger.close()
        # the port is free again
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((HOST, echo.port))

    run(main())


def test_a_handshake_that_completes_while_the_listener_stops_is_not_served(
    certificates: Certificates, tmp_path: Path, endpoints: list[Any]
) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            endpoints[0].refuse_new()
            with pytest.raises(ConnectFailed, match="stopping"):
                await client(echo.url, certificates, tmp_path).connect()
            async with Raw(echo.port) as raw:
                endpoints[0]._open = True
                raw.connect()
                raw.take(await raw.receive())
                await until(lambda: endpoints[0]._handshakes)
                endpoints[0].refuse_new()
                await raw.until(lambda: raw.ended)
            assert not echo.connections
            assert tables(endpoints[0]) == (0, 0, 0, 0, 0)

    run(main())


def tables(endpoint: Any) -> tuple[int, ...]:
    found = (endpoint._routes, endpoint._ids, endpoint._connections, endpoint._handshakes, endpoint._waiting)
    return tuple(map(len, found))


def test_nothing_grows(certificates: Certificates, tmp_path: Path, endpoints: list[Any]) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            for number in range(150):
                connection = await recipe.connect(early=b"early")
                if number % 3:
                    await connection.aclose()
                else:
                    connection.abort()
            await until(lambda: echo.status().connections == 0)
            assert tables(endpoints[0]) == (0, 0, 0, 0, 0)
            assert endpoints[0].budget.used == 0
            await until(lambda: len(asyncio.all_tasks()) == 1)

    run(main())


def test_many_idle_connections(certificates: Certificates, tmp_path: Path, endpoints: list[Any]) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path, connect_timeout=30.0, socket_buffer=65536)
            connections: list[Any] = []
            for _ in range(10):
                connections += await asyncio.gather(*(recipe.connect() for _ in range(20)))
            assert echo.status().connections == 200
            # 8 ids of ours each, and the one that the client chose first
            assert tables(endpoints[0])[0] <= 200 * 9
            await asyncio.gather(*(connection.aclose() for connection in connections))
            await until(lambda: echo.status().connections == 0)
            assert tables(endpoints[0]) == (0, 0, 0, 0, 0)

    run(main())
