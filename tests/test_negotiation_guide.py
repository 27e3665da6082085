"""The guide to negotiation: its files are right, and its program runs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guides import REST, blocks

from tesaiot_connect import Broker, ListenerSpec, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls

PAGE = (Path(__file__).resolve().parents[1] / "docs/guide/negotiation.md").read_text(encoding="utf-8")
FILES = blocks(PAGE, "toml")


@pytest.mark.parametrize("number", range(len(FILES)))
def test_the_files_are_right(number: int, tmp_path: Path) -> None:
    config = tmp_path / "pipeline.toml"
    config.write_text(FILES[number] + REST)
    command = [sys.executable, "-m", "tesaiot_connect", "lint", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr


def test_the_program_runs(certificates: Certificates) -> None:
    (program,) = blocks(PAGE, "python")

    async def main() -> str:
        own = certificates.server()
        specs = [
            ListenerSpec("quic", QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=own)),
            ListenerSpec("tls", TcpTls(Url.parse("mqtts://127.0.0.1:0"), server_tls=own)),
        ]
        async with asyncio.timeout(60), Broker().serving(specs) as (quic, tls):
            nowhere = str(quic).replace("quic://127.0.0.1", "quic://no-such-host.invalid")
            command = ("-c", program, nowhere, str(tls), str(certificates.ca_file))
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await process.communicate()
            assert process.returncode == 0
            return output.decode().replace(str(tls), "TLS").replace(nowhere, "QUIC")

    first, second, *attempts = asyncio.run(main()).splitlines()
    assert first == "uses TLS by tcp_tls"
    assert re.fullmatch(r"moves 0 connects 1 better after [\d.]+", second)
    assert [line.split()[1] for line in attempts] == ["QUIC", "TLS"]
