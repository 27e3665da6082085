"""States, figures and qlog: what both sides tell of a connection."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from quic_ends import HOST, ask, client, echoing, run, until

from tesaiot_connect import (
    ConnectFailed,
    ListenerStatus,
    QuicState,
    QuicStatus,
    State,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import dial
from tesaiot_connect_quic_aioquic.connection import QuicConnection


def quic_of(connection: Any) -> QuicStatus:
    found = connection.status().quic
    assert isinstance(found, QuicStatus)
    return found


# --- states and figures


async def orderly(connection: Any, server: Any, echo: Any) -> None:
    await connection.aclose()


async def by_the_peer(connection: Any, server: Any, echo: Any) -> None:
    await server.aclose(0x8B, "going down")
    reason = await connection.wait_closed()
    assert (reason.code, reason.by_peer) == (0x8B, True)
    assert "going down" in reason.text
    status = quic_of(connection)
    assert (status.close_code, status.close_frame) == (0x8B, "application")


async def aborted(connection: Any, server: Any, echo: Any) -> None:
    connection.abort(0x80)
    assert quic_of(connection).close_code == 0x80


@pytest.mark.parametrize("ending", [orderly, by_the_peer, aborted])
def test_states_of_a_life(ending: Any, certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            connection = await client(echo.url, certificates, tmp_path).connect()
            await ask(connection, b"x" * 50_000)
            assert quic_of(connection).state is QuicState.ONE_RTT
            server = echo.connections[0]
            plausible(quic_of(connection))
            await until(lambda: quic_of(server).bytes_in_flight == 0)
            plausible(quic_of(server))
            await ending(connection, server, echo)
            await connection.wait_closed()
            await server.wait_closed()
            for one in (connection, server):
                assert [state for state, _ in quic_of(one).states] == [*QuicState]
                times = [time for _, time in quic_of(one).states]
                assert times == sorted(times)
                assert one.status().state is State.CLOSED

    run(main())


def plausible(status: QuicStatus) -> None:
    assert status.handshake_time is not None
    assert 0 < status.handshake_time < 10
    assert status.rtt_min is not None
    assert status.rtt_smoothed is not None
    assert 0 < status.rtt_min <= status.rtt_smoothed < 10
    assert status.congestion_window is not None
    assert status.congestion_window >= 2 * 1200
    assert status.packets_sent is not None
    assert status.packets_received is not None
    assert status.packets_sent > 20
    assert status.packets_received > 20
    assert status.streams_total == 1
    assert status.path_mtu == 1200
    assert status.version == 1
    assert status.close_code is None


@pytest.mark.parametrize("why", ["refused", "silent", "rejected"])
def test_states_of_what_never_came_about(
    why: str, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[QuicConnection] = []

    class Kept(QuicConnection):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(dial, "QuicConnection", Kept)

    async def main() -> None:
        async with echoing(certificates, max_connections=1) as echo:
            holder = await client(echo.url, certificates, tmp_path / "t").connect()
            made.clear()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
                silent.bind((HOST, 0))
                port = silent.getsockname()[1]
                if why == "refused":
                    silent.close()
                place = str(echo.url) if why == "rejected" else f"quic://{HOST}:{port}"
                with pytest.raises(ConnectFailed):
                    await client(
                        place, certificates, tmp_path / "t", connect_timeout=30.0 if why != "silent" else 0.3
                    ).connect()
            (one,) = made
            expected = [QuicState.INITIAL, QuicState.DRAINING, QuicState.CLOSED]
            if why == "rejected":
                expected.insert(1, QuicState.HANDSHAKE)
            assert [state for state, _ in quic_of(one).states] == expected
            assert one.status().state is State.CLOSED
            assert quic_of(one).handshake_time is None
            await holder.aclose()

    run(main())


def test_figures_of_a_listener(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        async with echoing(certificates) as echo:
            assert echo.status() == ListenerStatus()
            connection = await client(echo.url, certificates, tmp_path).connect()
            await ask(connection, b"x" * 10_000)
            status = echo.status()
            assert (status.connections, status.handshakes, status.accepted) == (1, 0, 1)
            assert status.bytes_received > 10_000 < status.bytes_sent
            assert status.datagrams_received >= 9
            await connection.aclose()
            await until(lambda: echo.status().connections == 0)

    run(main())


# --- qlog


def read_qlog(path: Path) -> list[dict[str, Any]]:
    """RFC 7464: a record separator, JSON, a line feed."""
    records = path.read_text("ascii").split("\x1e")
    assert records[0] == ""
    assert all(record.endswith("\n") for record in records[1:])
    return [json.loads(record) for record in records[1:]]


def test_qlog_of_both_sides(certificates: Certificates, tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "qlog"
        async with echoing(certificates, qlog_folder=folder) as echo:
            recipe = client(echo.url, certificates, tmp_path / "t", qlog_folder=folder)
            connection = await recipe.connect()
            await ask(connection, b"logged")
            files = sorted(folder.iterdir())
            assert [path.name.split("-")[1] for path in files] == ["client.sqlog", "server.sqlog"]
            for path in files:  # while it runs
                head, *happened = read_qlog(path)
                assert head["qlog_format"] == "JSON-SEQ"
                names = {event["name"] for event in happened}
                assert {"transport:packet_sent", "transport:packet_received"} <= names
            await connection.aclose()
        for path in files:
            assert "connection_close" in path.read_text()

    run(main())


def test_a_qlog_that_cannot_be_written_costs_no_connection(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        folder = tmp_path / "qlog"
        async with echoing(certificates, qlog_folder=folder) as echo:
            folder.rmdir()
            folder.symlink_to(tmp_path / "gone")
            connection = await client(echo.url, certificates, tmp_path / "t").connect()
            await ask(connection, b"served all the same")
            await connection.aclose()
        if Path("/dev/full").exists():
            folder.unlink()
            full = tmp_path / "full"
            full.mkdir()
            async with echoing(certificates) as echo:
                logged = client(echo.url, certificates, tmp_path / "t", qlog_folder=full)
                open_ = Path.open
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(
                        Path,
                        "open",
                        lambda self, *rest, **more: open_(
                            Path("/dev/full") if self.suffix == ".sqlog" else self, *rest, **more
                        ),
                    )
                    connection = await logged.connect()
                    await ask(connection, b"served all the same")
                    await connection.aclose()

    run(main())
    assert sum("qlog" in record.getMessage() for record in caplog.records) >= 1


def test_a_qlog_survives_kill(certificates: Certificates, tmp_path: Path) -> None:
    folder = tmp_path / "qlog"
    program = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from tesaiot_connect import TlsOptions, Url
        from tesaiot_connect_quic_aioquic import QuicAioquic

        async def main(url, ca, folder):
            recipe = QuicAioquic(
                Url.parse(url), tls=TlsOptions(ca_file=Path(ca)), qlog_folder=folder,
                ticket_folder=Path(folder) / "t", connect_timeout=30.0,
            )
            connection = await recipe.connect()
            stream = await connection.open_stream()
            await stream.send(b"last words")
            await stream.receive()
            print("ready", flush=True)
            await asyncio.Event().wait()

        asyncio.run(main(*sys.argv[1:]))
        """
    )

    async def main() -> None:
        async with echoing(certificates) as echo:
            with subprocess.Popen(
                [sys.executable, "-c", program, echo.url, str(certificates.ca_file), str(folder)],
                stdout=subprocess.PIPE,
            ) as process:
                assert process.stdout
                line = await asyncio.get_running_loop().run_in_executor(None, process.stdout.readline)
                assert line == b"ready\n"
                process.send_signal(signal.SIGKILL)
                process.wait()
            for connection in echo.connections:
                connection.abort()
        (path,) = folder.glob("*.sqlog")
        assert "stream" in json.dumps(read_qlog(path))

    run(main())
