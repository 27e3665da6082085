"""quic_aioquic keeps the transport contract: with and without offload, on every event loop, IPv4 and IPv6."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loops import LOOPS

from tesaiot_connect import LazyTransport, Listener, TlsOptions, Transport, Url
from tesaiot_connect.testing import Certificates, TransportCheck, transport_checks
from tesaiot_connect_quic_aioquic import QuicAioquic


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_it_is_a_transport_and_a_listener() -> None:
    recipe = QuicAioquic(Url.parse("quic://localhost"))
    assert isinstance(recipe, Transport)
    assert isinstance(recipe, Listener)
    assert isinstance(recipe, LazyTransport)


def test_reading_the_recipe_loads_no_protocol_machine() -> None:
    """Every command reads the recipes of all plugins: that must cost neither time nor memory."""
    program = "import sys, tesaiot_connect_quic_aioquic; print([m for m in sys.modules if 'aioquic.' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['tesaiot_connect_quic_aioquic.transport']"]


def keeps_the_contract(
    check: TransportCheck,
    certificates: Certificates,
    folder: Path,
    loop_factory: Any = asyncio.new_event_loop,
    host: str = "127.0.0.1",
    **options: Any,
) -> None:
    options.setdefault("connect_timeout", 30.0)
    tls = TlsOptions(ca_file=certificates.ca_file, server_name="localhost")
    check(
        listen=QuicAioquic(Url.parse(f"quic://{host}:0"), server_tls=certificates.server(), **options),
        connect=lambda url: QuicAioquic(Url.parse(url), tls=tls, ticket_folder=folder, **options),
        loop_factory=loop_factory,
    )


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_contract(
    check: TransportCheck, loop_factory: Any, certificates: Certificates, tmp_path: Path
) -> None:
    keeps_the_contract(check, certificates, tmp_path, loop_factory)


@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_contract_without_offload(check: TransportCheck, certificates: Certificates, tmp_path: Path) -> None:
    keeps_the_contract(check, certificates, tmp_path, offload=False)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_contract_on_ipv6_with_small_windows(
    check: TransportCheck, certificates: Certificates, tmp_path: Path
) -> None:
    keeps_the_contract(
        check,
        certificates,
        tmp_path,
        host="[::1]",
        stream_window=20_000,
        connection_window=50_000,
        send_buffer=30_000,
        key_update=500,
        congestion_control="reno",
        versions=(2, 1),
    )
