"""Peers that mean harm: what they cost is bounded, they learn what RFC 9000 says, others notice nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aioquic import tls
from aioquic.buffer import encode_uint_var as varint
from aioquic.quic import events
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder
from quic_ends import HOST, Echo, Raw, Relay, ask, client, echoing, exactly, run, until

from tesaiot_connect import Connection, State, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic, listener, server as server_module

DATAGRAMS = 10_000


@pytest.fixture
def endpoints(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    class Kept(listener.ServerEndpoint):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            found.append(self)

    monkeypatch.setattr(server_module, "ServerEndpoint", Kept)
    return found


# --- garbage


def mutated(recorded: list[bytes], dice: random.Random) -> bytes:
    """One datagram of a real handshake, or of nothing, with something wrong about it."""
    data = bytearray(dice.choice(recorded))
    match dice.randrange(9):
        case 0:
            return dice.randbytes(dice.randrange(1, 1500))
        case 1:  # bits
            for _ in range(dice.choice((1, 1, 1, 5, 50))):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case 2:  # shorter
            del data[dice.randrange(1, len(data)) :]
        case 3:  # longer
            data += dice.randbytes(dice.randrange(300))
        case 4:  # another destination
            size = min(8, len(data) - 1)
            at = 6 if data[0] & 0x80 else 1
            data[at : at + size] = dice.randbytes(size)
        case 5:  # another version or another kind
            if data[0] & 0x80:
                data[0] = data[0] & 0xCF | dice.randrange(4) << 4
                if dice.random() < 0.5:
                    data[1:5] = dice.choice((bytes(4), dice.randbytes(4), b"\x6b\x33\x43\xcf"))
            else:
                data[0] = dice.randrange(256)
        case 6:  # lengths that lie: of the ids, of the token
            data[dice.choice((5, 14, 15, 23, 24)) % len(data)] = dice.choice((0, 1, 20, 21, 255, 0x7F))
        case 7:  # an Initial with a huge token
            token = dice.randbytes(dice.randrange(1, 900))
            head = b"\xc3\0\0\0\1\x08" + dice.randbytes(8) + b"\x08" + dice.randbytes(8)
            data = bytearray(head + varint(len(token)) + token + varint(400) + dice.randbytes(1300))
            del data[1400:]
        case _:  # as it was: a duplicate, out of order
            pass
    return bytes(data)


async def recordings(echo: Echo, certificates: Certificates, folder: Path) -> list[bytes]:
    """Both directions of four handshakes, resumed ones with early data among them."""
    found: list[bytes] = []
    for _ in range(4):
        async with Relay(echo.port) as relay:
            recipe = client(relay.url, certificates, folder)
            connection = await recipe.connect(early=b"early" * 300)
            await ask(connection, b"recorded" * 200)
            await until(lambda: any(folder.glob("*.ticket")))
            await connection.aclose()
            await until(lambda: not echo.status().connections)
            found += [data for data in (*relay.to_server, *relay.to_client) if len(data) > 30]
    return found


def test_garbage(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture, endpoints: list[Any]
) -> None:
    async def main() -> None:
        dice = random.Random(9000)
        async with echoing(certificates, handshake_timeout=2.0) as echo:
            recorded = await recordings(echo, certificates, tmp_path)
            connection = await client(echo.url, certificates, tmp_path).connect()
            served = len(echo.got)
            before = echo.status()
            sent = 0
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                stranger.connect((HOST, echo.port))
                for _ in range(DATAGRAMS // 100):
                    for _ in range(100):
                        data = mutated(recorded, dice)
                        stranger.send(data)
                        sent += len(data)
                    await ask(connection, os.urandom(100))
                    assert echo.status().handshakes <= 200
            now = echo.status()
            assert now.datagrams_received - before.datagrams_received >= DATAGRAMS
            assert now.bytes_sent - before.bytes_sent < 2 * sent
            assert connection.status().state is State.OPEN
            assert connection.status().lost == 0
            # nothing of it reached an application but our own client's questions
            assert len(echo.got) == served + DATAGRAMS // 100
            await connection.aclose()
            await until(lambda: not echo.status().connections, "garbage keeps connections")
            (endpoint,) = endpoints
            assert not endpoint._routes
            assert not endpoint._ids

    with caplog.at_level(logging.DEBUG, "tesaiot_connect_quic_aioquic"):
        run(main(), 60)
    ours = [record for record in caplog.records if record.name.startswith("tesaiot")]
    assert not [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    assert not [record for record in ours if record.exc_info]
    assert len(ours) < 500, "a stranger fills the log"


def test_garbage_at_a_client(certificates: Certificates, tmp_path: Path) -> None:
    """The same from the side of the network: what the server never sent, at the server's address."""

    async def main() -> None:
        dice = random.Random(9001)
        async with echoing(certificates) as echo:
            recorded = await recordings(echo, certificates, tmp_path)
            async with Relay(echo.port) as relay:
                connection = await client(relay.url, certificates, tmp_path).connect()
                for _ in range(20):
                    for _ in range(50):
                        relay.near.sendto(mutated(recorded, dice), relay._client)
                    await ask(connection, os.urandom(100))
                assert connection.status().state is State.OPEN
                await connection.aclose()
                await until(lambda: not echo.status().connections)

    run(main())


# --- frames that must not be


def inject(raw: Raw, frame: bytes) -> None:
    """One 1-RTT packet with these frames, whatever they are."""
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
    buf = builder.start_frame(frame[0], capacity=len(frame))
    buf.push_bytes(frame[1:])
    (data,), _ = builder.flush()
    quic._packet_number = builder.packet_number
    raw.send(data)


ID = b"\x08" + b"i" * 8 + b"t" * 16

FRAMES: dict[str, tuple[bytes, int]] = {
    "unknown type": (b"\x21", 0x07),
    "NEW_TOKEN of a client": (b"\x07\x01x", 0x0A),
    "HANDSHAKE_DONE of a client": (b"\x1e", 0x0A),
    "RETIRE_CONNECTION_ID never issued": (b"\x19\x3f", 0x0A),
    "NEW_CONNECTION_ID retires the future": (b"\x18\x01\x02" + ID, 0x0A),  # RFC 9000 would have 0x07
    "NEW_CONNECTION_ID of no length": (b"\x18\x01\x00\x00" + b"t" * 16, 0x07),
    "MAX_STREAMS beyond all": (b"\x12" + varint(2**61), 0x07),
    "STREAM of the server's": (b"\x0a\x01\x01x", 0x05),
    "STREAM one way": (b"\x0a\x02\x01x", 0x04),
    "STREAM beyond the limit": (b"\x0a" + varint(4 * 16) + b"\x01x", 0x04),
    "STREAM beyond the window": (b"\x0e\x00" + varint(300_000) + b"\x01x", 0x03),
    "RESET_STREAM beyond the window": (b"\x04\x00\x00" + varint(300_000), 0x03),
    "STREAM beyond the largest offset": (b"\x0e\x00" + varint(2**62 - 1) + b"\x01x", 0x07),
    "CRYPTO far ahead": (b"\x06" + varint(2**20) + b"\x01x", 0x0D),
    "DATAGRAM not agreed on": (b"\x30x", 0x0A),
    "STOP_SENDING of no stream": (b"\x05\x01\x00", 0x05),
    "cut off": (b"\x0a\x00\x20x", 0x07),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_that_must_not_be(name: str, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            good = await client(echo.url, certificates, tmp_path).connect()
            async with Raw(echo.port) as raw:
                await raw.handshake()
                await until(lambda: len(echo.connections) == 2)
                frame, code = FRAMES[name]
                inject(raw, frame)
                await raw.until(lambda: raw.ended)
                assert raw.ended.error_code == code, raw.ended
            await ask(good, b"unaffected")
            await until(lambda: echo.status().connections == 1)
            await good.aclose()

    run(main())


def test_a_final_size_that_changes(certificates: Certificates) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo, Raw(echo.port) as raw:
            await raw.handshake()
            inject(raw, b"\x0b\x00\x01x")  # the end, after one byte
            inject(raw, b"\x0e\x00\x05\x01x")
            await raw.until(lambda: raw.ended)
            assert raw.ended.error_code == 0x06

    run(main())


# --- streams and windows


def may_open(raw: Raw, streams: int) -> bool:
    return raw.quic._remote_max_streams_bidi >= streams


async def answered(raw: Raw, uid: int) -> None:
    """The server has dealt with all that was sent before."""
    raw.events.clear() if uid >= 1000 else None
    raw.quic.send_ping(uid)
    await raw.until(lambda: any(isinstance(e, events.PingAcknowledged) and e.uid == uid for e in raw.events))


async def listening(
    certificates: Certificates, serve: Callable[[Connection], Any], test: Callable[[Any], Any], **options: Any
) -> None:
    recipe = QuicAioquic(Url.parse(f"quic://{HOST}:0"), server_tls=certificates.server(), **options)
    async with recipe.listen(serve) as bound:
        await test(bound)


def port(bound: str) -> int:
    found = Url.parse(bound).port
    assert found
    return found


def test_a_peer_that_opens_every_stream(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, max_streams=8) as echo:
            good = await client(echo.url, certificates, tmp_path).connect()
            async with Raw(echo.port) as raw:
                await raw.handshake()
                for _ in range(8):
                    raw.quic.send_stream_data(raw.quic.get_next_available_stream_id(), b"x")
                await raw.until(
                    lambda: sum(isinstance(e, events.StreamDataReceived) for e in raw.events) == 8
                )
                status = echo.connections[1].status().quic
                assert status is not None
                assert status.streams_open == 8
                raw.quic._remote_max_streams_bidi = 1000
                raw.quic.send_stream_data(raw.quic.get_next_available_stream_id(), b"x")
                await raw.until(lambda: raw.ended)
                assert raw.ended.error_code == 0x04
            await ask(good, b"unaffected")
            await good.aclose()

    run(main())


def test_streams_that_nobody_accepts_are_bounded(certificates: Certificates) -> None:
    """A peer opens and ends streams as fast as it may, where the server is slow to take them."""
    connections: list[Any] = []

    async def never(connection: Connection) -> None:
        connections.append(connection)
        await connection.wait_closed()

    async def test(bound: str) -> None:
        async with Raw(port(bound)) as raw:
            await raw.handshake()
            for number in range(400):
                if raw.quic.get_next_available_stream_id() >= 4 * raw.quic._remote_max_streams_bidi:
                    break
                stream = raw.quic.get_next_available_stream_id()
                raw.quic.send_stream_data(stream, b"x", end_stream=True)
                raw.quic.stop_stream(stream, 0)  # no interest in an answer
                if number % 8 == 7:
                    await answered(raw, number)
            await answered(raw, 1000)
            (server,) = connections
            assert len(server._incoming) == 16
            assert server.status().quic.streams_total == 16
            for more in range(17, 57):  # a new one for each that is taken
                stream = await server.accept_stream()
                await stream.receive()
                stream.abort()
                await raw.until(functools.partial(may_open, raw, more))
                number = raw.quic.get_next_available_stream_id()
                raw.quic.send_stream_data(number, b"x", end_stream=True)
                raw.quic.stop_stream(number, 0)
                await answered(raw, 1000)
                assert len(server._incoming) == 16
            assert server.status().quic.streams_total == 56
            server.abort()

    run(listening(certificates, never, test))


def test_a_stream_beyond_the_limit_waits_for_its_turn(certificates: Certificates, tmp_path: Path) -> None:
    """Whoever gives it up meanwhile leaves no trace: the peer must not hear of it (RFC 9000 section 4.6)."""

    async def main() -> None:
        async with echoing(certificates, max_streams=2) as echo:
            connection = await client(echo.url, certificates, tmp_path).connect()
            first, second = await connection.open_stream(), await connection.open_stream()
            for stream in (first, second):
                await stream.send(b"x")
                assert await exactly(stream, 1) == b"x"
            given_up = asyncio.create_task(connection.open_stream())
            patient = asyncio.create_task(connection.open_stream())
            await connection.probe()
            assert not given_up.done()
            given_up.cancel()
            await asyncio.wait([given_up])
            await first.aclose()
            third = await patient
            await third.send(b"z")
            assert await exactly(third, 1) == b"z"
            await connection.aclose()

    run(main())


def test_reset_codes_are_bounded(certificates: Certificates) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo, Raw(echo.port) as raw:
            await raw.handshake()
            raw.quic.send_stream_data(0, b"x")
            raw.flush()
            await until(lambda: echo.got)
            for code in range(600):
                inject(raw, b"\x05\x00" + varint(code))
            await answered(raw, 1)
            status = echo.connections[0].status().quic
            assert status is not None
            assert len(status.stream_resets) <= 100
            raw.quic.close()
            raw.flush()

    run(main())


def test_a_peer_that_sends_and_never_reads(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, send_buffer=100_000) as echo:
            good = await client(echo.url, certificates, tmp_path).connect()
            async with Raw(echo.port, max_data=50_000, max_stream_data=50_000) as raw:
                raw.quic._write_connection_limits = lambda *a, **k: None  # type: ignore[method-assign]
                raw.quic._write_stream_limits = lambda *a, **k: None  # type: ignore[method-assign]
                await raw.handshake()
                raw.quic.send_stream_data(0, bytes(5_000_000))
                server: Any = None

                def stuck() -> bool:
                    status = echo.connections[1].status().quic if len(echo.connections) > 1 else None
                    return status is not None and bool(server.quic.blocked) and len(echo.got[0]) > 100_000

                await until(lambda: len(echo.connections) > 1)
                server = echo.connections[1]
                await raw.until(stuck)
                for number in range(20):  # the sender goes on where it may, others are served
                    await answered(raw, number)
                    await ask(good, os.urandom(5000))
                received = sum(len(e.data) for e in raw.events if isinstance(e, events.StreamDataReceived))
                assert received == 50_000, "the server keeps to the window"
                # in the server: what is unacknowledged, and what waits to be read
                assert server._held <= 100_000 + 2 * 65536 + 256 * 1024
                taken = raw.quic._streams[0].sender.next_offset
                assert taken <= 50_000 + server._held + 65536 + 256 * 1024
                status = server.status().quic
                assert status.blocked_time > 0
                server.abort()
            await good.aclose()

    run(main())


def test_data_beyond_the_limits_ends_the_connection(certificates: Certificates, tmp_path: Path) -> None:
    async def unread(connection: Connection) -> None:
        await connection.accept_stream()
        await connection.wait_closed()

    async def test(bound: Any) -> None:
        for stream_limit, data_limit in ((2**30, 2**30), (2**30, None), (None, 2**30)):
            async with Raw(port(bound)) as raw:
                await raw.handshake()
                quic = raw.quic
                quic.send_stream_data(0, bytes(400_000))
                if data_limit:
                    quic.send_stream_data(4, bytes(400_000))
                if stream_limit:
                    for stream in quic._streams.values():
                        stream.max_stream_data_remote = stream_limit
                if data_limit:
                    quic._remote_max_data = data_limit
                await raw.until(lambda: raw.ended)
                assert raw.ended.error_code == 0x03

    run(listening(certificates, unread, test, connection_window=300 * 1024))


def test_a_peer_that_acknowledges_nothing(certificates: Certificates, tmp_path: Path) -> None:
    """It is cut off by the idle timeout, and what it may tie up is bounded until then."""

    async def main() -> None:
        async with echoing(certificates, send_buffer=50_000, idle_timeout=0.5) as echo:
            good = await client(echo.url, certificates, tmp_path, keepalive=0.1).connect()
            async with Raw(echo.port) as raw:
                await raw.handshake()
                raw.quic.send_stream_data(0, bytes(200_000))
                await raw.until(lambda: len(echo.connections) == 2 and echo.got and len(echo.got[0]) > 20_000)
                # from here on it is deaf and dumb
                server: Any = echo.connections[1]
                await until(lambda: server.over, seconds=20)
                assert server._held == 0
            await ask(good, b"unaffected")
            await good.aclose()

    run(main())


def test_connection_ids_that_are_retired_for_ever(certificates: Certificates, endpoints: list[Any]) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo, Raw(echo.port) as raw:
            await raw.handshake()
            await raw.until(lambda: len(raw.quic._peer_cid_available) == 7)
            for _ in range(300):
                raw.quic.change_connection_id()
                before = {one.sequence_number for one in raw.quic._peer_cid_available}
                await raw.until(
                    lambda before=before: (
                        {  # type: ignore[misc]
                            one.sequence_number for one in raw.quic._peer_cid_available
                        }
                        - before
                    )
                )
            (endpoint,) = endpoints
            assert len(endpoint._routes) <= 12
            raw.quic.close()
            raw.flush()

    run(main())


def test_a_flood_of_questions(certificates: Certificates, tmp_path: Path) -> None:
    """PATH_CHALLENGE and NEW_CONNECTION_ID without end, and no answer is read."""

    async def main() -> None:
        async with echoing(certificates) as echo:
            good = await client(echo.url, certificates, tmp_path).connect()
            async with Raw(echo.port) as raw:
                await raw.handshake()
                await until(lambda: len(echo.connections) == 2)
                server: Any = echo.connections[1]
                for number in range(1, 1500):
                    inject(raw, (b"\x1a" + os.urandom(8)) * 100)
                    sequence = varint(number)
                    inject(raw, b"\x18" + sequence + sequence + b"\x08" + os.urandom(8) + os.urandom(16))
                    if number % 100 == 0:
                        await ask(good, b"unaffected")
                quic = server.quic
                assert len(quic._retire_connection_ids) < 100
                assert all(len(path.remote_challenges) < 100 for path in quic._network_paths)
                server.abort()
            await good.aclose()

    run(main())


def test_a_stream_in_a_thousand_pieces(certificates: Certificates, tmp_path: Path) -> None:
    """Every other byte, so that nothing can be handed on: memory and time stay bounded."""

    async def main() -> None:
        async with echoing(certificates) as echo:
            good = await client(echo.url, certificates, tmp_path).connect()
            async with Raw(echo.port) as raw:
                await raw.handshake()
                for start in range(1, 40_000, 400):
                    frames = b"".join(
                        b"\x0e\x00" + varint(offset) + b"\x01x" for offset in range(start, start + 400, 2)
                    )
                    inject(raw, frames[:1100])
                    if start % 4000 == 1:
                        await ask(good, b"unaffected")
                assert not any(
                    echo.got[1:][i] for i in range(len(echo.got[1:])) if echo.got[1:][i][:1] == b"x"
                )
                raw.quic.close()
                raw.flush()
            await good.aclose()

    run(main())


def test_a_name_and_a_protocol_that_are_too_long(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            async with Raw(echo.port, server_name="x" * 250 + ".example") as raw:
                await raw.handshake()  # the name does not matter to us
                raw.quic.close()
                raw.flush()
            async with Raw(echo.port, alpn_protocols=["a" * 200, "b" * 200]) as raw:
                raw.connect()
                await raw.until(lambda: raw.ended)
                assert raw.ended.error_code == 0x100 + 120
            connection = await client(echo.url, certificates, tmp_path).connect()
            stream = await connection.open_stream()
            await stream.send(b"served")
            assert await exactly(stream, 6) == b"served"
            await connection.aclose()

    run(main())
