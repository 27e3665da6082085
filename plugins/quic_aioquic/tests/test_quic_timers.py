"""Timers of a connection: event loops wake up about every millisecond, and nothing spins in between."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from loops import LOOPS
from quic_clock import steady_loop

from tesaiot_connect import Connection, Disconnected, TlsOptions, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_quic_aioquic.connection import QuicConnection


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_timers_fire_no_more_often_than_packets_travel(
    tmp_path: Path, loop_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fired = 0
    on_time = QuicConnection._on_time

    def counted(self: QuicConnection) -> None:
        nonlocal fired
        fired += 1
        on_time(self)

    monkeypatch.setattr(QuicConnection, "_on_time", counted)
    certificates = Certificates(tmp_path / "certificates")

    async def echo(connection: Connection) -> None:
        stream = await connection.accept_stream()
        try:
            while data := await stream.receive():
                await stream.send(data)
        except Disconnected:
            pass

    async def main() -> int:
        listener = QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=certificates.server())
        async with listener.listen(echo) as url:
            client = QuicAioquic(
                Url.parse(url),
                tls=TlsOptions(ca_file=certificates.ca_file),
                ticket_folder=tmp_path,
                connect_timeout=30.0,
            )
            connection = await client.connect()
            stream = await connection.open_stream()
            for size in (1, 10, 100_000, 1_000_000):
                sending = asyncio.create_task(stream.send(bytes(size)))
                while size:
                    size -= len(await stream.receive())
                await sending
            for _ in range(100):
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            quic = connection.status().quic
            assert quic is not None
            await connection.aclose()
        return (quic.packets_sent or 0) + (quic.packets_received or 0)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        packets = runner.run(main())
    assert 0 < fired < packets, f"{fired} timers for {packets} packets"


@pytest.mark.skipif(steady_loop is None, reason="Windows has no steady loop")
def test_the_clock_of_the_other_tests_does_not_see_a_standstill() -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        before = clock()
        time.sleep(0.2)  # the subject
        assert clock() - before < 0.002
        await asyncio.sleep(0.05)
        assert clock() - before > 0.045

    with asyncio.Runner(loop_factory=steady_loop) as runner:
        runner.run(main())
