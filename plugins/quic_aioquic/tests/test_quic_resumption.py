"""Resumption and 0-RTT: what a ticket is good for, once, and what happens where it is not."""

from __future__ import annotations

import asyncio
import datetime
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from quic_ends import HOST, Echo, Relay, ask, client, echoing, exactly, resumable, run, throw, until

from tesaiot_connect import QuicStatus, TlsOptions
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_quic_aioquic.issued import IssuedTickets
from tesaiot_connect_quic_aioquic.tickets import pack, unpack

EARLY = b"CONNECT, in the first packet"


def quic_of(connection: Any) -> QuicStatus:
    found = connection.status().quic
    assert isinstance(found, QuicStatus)
    return found


async def early(recipe: QuicAioquic, data: bytes = EARLY) -> Any:
    """Connects with early data as a client does: what did not go out early is sent after. Returns the
    connection after one echo."""
    connection = await recipe.connect(early=data)
    stream = await connection.open_stream()
    if not connection.early_sent:
        await stream.send(data)
    assert await exactly(stream, len(data)) == data
    return connection


def count(echo: Echo, data: bytes = EARLY) -> int:
    """How often the server was given these bytes."""
    return sum(bytes(got).count(data) for got in echo.got)


# --- what works


@pytest.mark.parametrize("version", [1, 2])
def test_the_second_connection_is_resumed_and_sends_early(
    version: int, certificates: Certificates, tmp_path: Path
) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path / "t", versions=(version,))
            await resumable(recipe, tmp_path / "t")
            connection = await early(recipe)
            assert connection.early_sent
            assert quic_of(connection).resumed
            assert quic_of(connection).early_data_accepted
            server = quic_of(echo.connections[1])
            assert server.resumed
            assert server.early_data_accepted
            assert count(echo) == 1
            status = echo.status()
            assert (status.accepted, status.resumed, status.early_data_accepted) == (2, 1, 1)
            await connection.aclose()

    run(main())


def test_tickets_are_private(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        folder, state = tmp_path / "t", tmp_path / "state.db"
        async with echoing(certificates, state_file=state) as echo:
            await resumable(client(echo.url, certificates, folder), folder)
            for path in (*folder.iterdir(), *tmp_path.glob("state.db*")):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    run(main())


def test_resumed_without_early_data(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            connection = await recipe.connect()
            assert quic_of(connection).resumed
            assert not connection.early_sent
            assert not quic_of(connection).early_data_accepted
            await ask(connection, b"later")
            await connection.aclose()

    run(main())


@pytest.mark.parametrize("side", ["client", "server"])
def test_zero_rtt_can_be_turned_off(side: str, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates, zero_rtt=side != "server") as echo:
            recipe = client(echo.url, certificates, tmp_path, zero_rtt=side != "client")
            await resumable(recipe, tmp_path)
            connection = await early(recipe)
            assert not connection.early_sent
            assert quic_of(connection).resumed
            assert not quic_of(connection).early_data_accepted
            assert count(echo) == 1
            await connection.aclose()

    run(main())


@pytest.mark.parametrize("size", [5_000, 40_000])
def test_early_data_of_many_datagrams(size: int, certificates: Certificates, tmp_path: Path) -> None:
    """40,000 bytes are more than the initial congestion window, and than the server's stream window."""

    async def main() -> None:
        data = b"0123456789" * (size // 10)
        async with echoing(certificates, stream_window=16_384) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            connection = await early(recipe, data)
            assert connection.early_sent
            assert quic_of(connection).early_data_accepted
            assert bytes(echo.got[1]) == data
            await connection.aclose()

    run(main())


# --- rejected early data


@pytest.mark.parametrize("size", [len(EARLY), 6_000, 40_000])
def test_rejected_early_data_arrives_once_in_the_same_attempt(
    size: int, certificates: Certificates, tmp_path: Path
) -> None:
    async def main() -> None:
        data = (EARLY * 2000)[:size]
        folder, state = tmp_path / "t", tmp_path / "state.db"
        async with echoing(certificates, state_file=state) as echo:
            await resumable(client(echo.url, certificates, folder), folder)
            port = echo.port
        # the same tickets, and no early data any more
        again = f"quic://{HOST}:{port}"
        async with echoing(certificates, host=again, state_file=state, zero_rtt=False) as echo:
            connection = await early(client(again, certificates, folder), data)
            assert connection.early_sent
            assert quic_of(connection).resumed
            assert not quic_of(connection).early_data_accepted
            assert quic_of(connection).packets_lost == 0
            assert [bytes(got) for got in echo.got] == [data]
            assert echo.status().accepted == 1
            await connection.aclose()

    run(main())


def test_a_ticket_that_the_server_does_not_know(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            await resumable(client(echo.url, certificates, tmp_path), tmp_path)
            port = echo.port
        again = f"quic://{HOST}:{port}"
        async with echoing(certificates, host=again) as echo:  # restarted, without a state file
            connection = await early(client(again, certificates, tmp_path))
            assert connection.early_sent
            assert not quic_of(connection).resumed
            assert count(echo) == 1
            assert echo.status().accepted == 1
            await connection.aclose()

    run(main())


@pytest.mark.parametrize("change", [{"stream_window": 4096}, {"max_streams": 2}, {"alpn": ("other", "mqtt")}])
def test_early_data_never_meets_other_limits(
    change: dict[str, Any], certificates: Certificates, tmp_path: Path
) -> None:
    """The client remembered the old ones (RFC 9000 section 7.4.1)."""

    async def main() -> None:
        folder, state = tmp_path / "t", tmp_path / "state.db"
        async with echoing(certificates, state_file=state) as echo:
            await resumable(client(echo.url, certificates, folder), folder)
            port = echo.port
        again = f"quic://{HOST}:{port}"
        async with echoing(certificates, host=again, state_file=state, **change) as echo:
            connection = await early(client(again, certificates, folder), EARLY * 300)
            assert connection.early_sent
            assert not quic_of(connection).early_data_accepted
            assert [bytes(got) for got in echo.got] == [EARLY * 300]
            await connection.aclose()

    run(main())


@pytest.mark.parametrize("size", [len(EARLY), 6_000])
def test_early_data_behind_a_retry(size: int, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        data = (EARLY * 300)[:size]
        async with echoing(certificates, retry="always") as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            connection = await early(recipe, data)
            assert connection.early_sent
            assert [bytes(got) for got in echo.got[1:]] == [data]
            assert quic_of(connection).resumed
            assert quic_of(connection).early_data_accepted
            assert echo.status().retries == 2
            await until(lambda: quic_of(connection).bytes_in_flight == 0, "the first flight is still counted")
            await connection.aclose()

    run(main())


def test_lost_early_data_is_sent_again(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(f"quic://localhost:{echo.port}", certificates, tmp_path)
            lose = [0]

            def passes(from_client: bool, number: int, data: bytes) -> bool:
                # of the second connection, the datagram behind the first, with most of the early data
                if from_client and lose[0] and data[0] & 0xB0 == 0x90:
                    lose[0] -= 1
                    return False
                return True

            async with Relay(echo.port, passes) as relay:
                recipe = client(relay.url, certificates, tmp_path)
                await resumable(recipe, tmp_path)
                lose[0] = 1
                connection = await early(recipe, EARLY * 100)
                assert connection.early_sent
                assert lose == [0]
                assert bytes(echo.got[1]) == EARLY * 100
                await connection.aclose()
                await until(lambda: not echo.status().connections)

    run(main())


# --- once


async def record(echo: Echo, certificates: Certificates, folder: Path) -> Sequence[bytes]:
    """The datagrams that a client sends before anything answers, of a connection with early data."""
    first: list[bytes] = []
    async with Relay(echo.port) as relay:
        recipe = client(relay.url, certificates, folder, keepalive=0.0)
        await resumable(recipe, folder)
        begun = len(relay.to_server)
        before = len(relay.to_client)
        connection = await recipe.connect(early=EARLY * 100)
        assert connection.early_sent
        stream = await connection.open_stream()
        await exactly(stream, len(EARLY) * 100)
        assert quic_of(connection).early_data_accepted
        assert before < len(relay.to_client)
        first = [data for data in relay.to_server[begun:] if data[0] & 0x80]
        await connection.aclose()
        await until(lambda: not echo.status().connections)
    assert len(first) >= 3
    return first


def test_a_replay_does_not_reach_the_application(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recorded = await record(echo, certificates, tmp_path)
            served, delivered = len(echo.connections), count(echo)
            assert delivered == 100
            await throw(echo.port, recorded, answers=1)  # with a handshake of its own
            for _ in range(3):
                await throw(echo.port, recorded)
            await (await early(client(echo.url, certificates, tmp_path / "other"), b"behind them")).aclose()
            assert count(echo) == delivered
            assert len(echo.connections) == served + 1
            assert echo.status().early_data_accepted == 1

    run(main())


@pytest.mark.parametrize("retry", ["never", "always"])
def test_a_replay_after_a_restart(retry: Any, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        state = tmp_path / "state.db"
        async with echoing(certificates, state_file=state) as echo:
            recorded = await record(echo, certificates, tmp_path / "t")
        async with echoing(certificates, state_file=state, retry=retry) as echo:
            await throw(echo.port, recorded, answers=1)
            await until(lambda: echo.status().handshakes or echo.status().retries)
            assert not echo.connections
            assert not echo.got

    run(main())


def test_a_replay_at_another_listener(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        state = tmp_path / "state.db"
        async with (
            echoing(certificates, state_file=state) as one,
            echoing(certificates, state_file=state) as other,
        ):
            recorded = await record(one, certificates, tmp_path / "t")
            assert count(one) == 100
            await throw(other.port, recorded, answers=2)
            assert not other.connections
            assert not other.got

    run(main())


def test_a_ticket_serves_at_one_of_two_listeners(certificates: Certificates, tmp_path: Path) -> None:
    """The same first datagrams at both at once: one may take the early data, not two."""

    async def main() -> None:
        state = tmp_path / "state.db"
        async with (
            echoing(certificates, state_file=state) as one,
            echoing(certificates, state_file=state) as other,
        ):
            # nothing of the second connection reaches a server through the relay
            held: list[bytes] = []
            holding = [False]

            def passes(from_client: bool, number: int, data: bytes) -> bool:
                if holding[0] and from_client:
                    held.append(data)
                return not holding[0]

            async with Relay(one.port, passes) as relay:
                recipe = client(relay.url, certificates, tmp_path / "t")
                await resumable(recipe, tmp_path / "t")
                holding[0] = True
                dialling = asyncio.create_task(recipe.connect(early=EARLY))
                await until(lambda: any(data[0] & 0x80 for data in held))
                await asyncio.gather(*(throw(port, held, answers=1) for port in (one.port, other.port)))
                await until(lambda: count(one) + count(other) > 0)
                dialling.cancel()
                await asyncio.wait([dialling])
            assert count(one) + count(other) == 1
            for connection in (*one.connections, *other.connections):
                connection.abort()

    run(main())


def test_resumed_after_a_restart_and_once(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        folder, state = tmp_path / "t", tmp_path / "state.db"
        async with echoing(certificates, state_file=state) as echo:
            await resumable(client(echo.url, certificates, folder), folder)
            port = echo.port
        again = f"quic://{HOST}:{port}"
        (file,) = folder.glob("*.ticket")
        copy = file.read_bytes()
        async with echoing(certificates, host=again, state_file=state) as echo:
            recipe = client(again, certificates, folder)
            connection = await early(recipe)
            assert quic_of(connection).early_data_accepted
            await connection.aclose()
            for path in folder.glob("*.ticket"):
                path.unlink()
            file.write_bytes(copy)  # a second client with the first one's ticket
            file.chmod(0o600)
            connection = await early(recipe)
            assert connection.early_sent
            assert not quic_of(connection).resumed
            assert count(echo) == 2
            await connection.aclose()

    run(main())


# --- tickets that are not used


def age(folder: Path, **changes: Any) -> None:
    for path in folder.glob("*.ticket"):
        ticket = unpack(path.read_bytes())
        for name, value in changes.items():
            setattr(ticket, name, value)
        path.write_bytes(pack(ticket))


def test_an_expired_ticket(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
            age(tmp_path, not_valid_after=past)
            connection = await early(recipe)
            assert not connection.early_sent
            assert not quic_of(connection).resumed
            assert count(echo) == 1
            await connection.aclose()

    run(main())


def test_a_ticket_that_only_the_server_finds_expired(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            monkeypatch.setattr(IssuedTickets, "redeem", lambda self, identity: None)
            connection = await early(recipe)
            assert connection.early_sent
            assert not quic_of(connection).resumed
            assert count(echo) == 1
            await connection.aclose()

    run(main())


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 300, b'{"version": 1'])
def test_a_damaged_ticket(content: bytes, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            for path in tmp_path.glob("*.ticket"):
                path.write_bytes(content)
            connection = await early(recipe)
            assert not connection.early_sent
            assert count(echo) == 1
            await connection.aclose()

    run(main())


@pytest.mark.parametrize("field", ["ticket", "resumption_secret"])
def test_a_ticket_with_flipped_bits(field: str, certificates: Certificates, tmp_path: Path) -> None:
    """It costs at most this attempt: the ticket is gone, and the next one works."""

    async def main() -> None:
        async with echoing(certificates) as echo:
            recipe = client(echo.url, certificates, tmp_path)
            await resumable(recipe, tmp_path)
            (path,) = tmp_path.glob("*.ticket")
            ticket = unpack(path.read_bytes())
            age(tmp_path, **{field: bytes(byte ^ 1 for byte in getattr(ticket, field))})
            if field == "ticket":
                connection = await early(recipe)
                assert not quic_of(connection).resumed
                await connection.aclose()
            else:
                from tesaiot_connect import ConnectFailed

                with pytest.raises(ConnectFailed):
                    await early(recipe)
            connection = await early(recipe)
            assert count(echo) == (2 if field == "ticket" else 1)
            await connection.aclose()

    run(main())


def test_a_ticket_never_crosses_trust(certificates: Certificates, tmp_path: Path) -> None:
    """Neither from verify = "none" to verification, nor from one CA file to another, nor to another name."""
    other = Certificates(tmp_path / "other")

    async def main() -> None:
        async with echoing(certificates) as echo:
            place = f"quic://localhost:{echo.port}"
            lax = TlsOptions(verify="none", insecure=True)
            both = tmp_path / "both.pem"
            both.write_bytes(other.ca_file.read_bytes() + certificates.ca_file.read_bytes())
            ways = [
                client(place, certificates, tmp_path / "t"),
                client(place, certificates, tmp_path / "t", tls=TlsOptions(ca_file=both)),
                client(place, certificates, tmp_path / "t", alpn=("mqtt", "other")),
                client(f"quic://{HOST}:{echo.port}", certificates, tmp_path / "t"),
            ]
            await resumable(client(place, certificates, tmp_path / "t", tls=lax), tmp_path / "t")
            for recipe in ways:
                connection = await recipe.connect(early=EARLY)
                assert not connection.early_sent
                assert not quic_of(connection).resumed
                await connection.aclose()
            # a server that is not trusted cannot come in through the ticket of an unverified visit
            from tesaiot_connect import ConnectFailed

            with pytest.raises(ConnectFailed, match="trusted"):
                await client(place, other, tmp_path / "t").connect(early=EARLY)

    run(main())


def test_a_new_server_certificate_ends_no_session(certificates: Certificates, tmp_path: Path) -> None:
    """Whoever redeems the ticket has proven itself; a client that trusts somebody else does not ask."""
    other = Certificates(tmp_path / "other")

    async def main() -> None:
        folder, state = tmp_path / "t", tmp_path / "state.db"
        async with echoing(certificates, state_file=state) as echo:
            await resumable(client(echo.url, certificates, folder), folder)
            port = echo.port
        again = f"quic://{HOST}:{port}"
        async with echoing(certificates, host=again, state_file=state, server_tls=other.server()) as echo:
            connection = await early(client(again, other, folder))
            assert not connection.early_sent
            await connection.aclose()
            connection = await early(client(again, certificates, folder))
            assert quic_of(connection).resumed
            await connection.aclose()

    run(main())


def test_a_name_that_only_differs_in_case_is_the_same(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            await resumable(client(f"quic://localhost:{echo.port}", certificates, tmp_path), tmp_path)
            connection = await early(client(f"quic://LOCALHOST:{echo.port}", certificates, tmp_path))
            await connection.aclose()
            assert count(echo) == 1

    run(main())
