"""wss keeps the transport contract: plain and TLS, IPv4 and IPv6, on every event loop."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from loops import LOOPS

from tesaiot_connect import Listener, TlsOptions, Transport, Url
from tesaiot_connect.testing import Certificates, TransportCheck, transport_checks
from tesaiot_connect_wss import Wss


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_it_is_a_transport_and_a_listener() -> None:
    recipe = Wss(Url.parse("ws://localhost"))
    assert isinstance(recipe, Transport)
    assert isinstance(recipe, Listener)


WAITING = {"backpressure", "cancelled_send", "abort_during_send", "close_is_bounded"}
"""Checks that take a second, which is long enough for one event loop each."""


def cases(*slow: str) -> list[Any]:
    return [
        pytest.param(check, loop, id=f"{check}-{loop.id}")
        for loop in LOOPS
        for check in transport_checks
        if check.name not in WAITING or loop.id in slow or len(LOOPS) == 1
    ]


@pytest.mark.parametrize(("check", "loop"), cases("asyncio"))
def test_plain(check: TransportCheck, loop: Any) -> None:
    check(
        listen=Wss(Url.parse("ws://127.0.0.1:0")),
        connect=lambda url: Wss(Url.parse(url)),
        loop_factory=loop.values[0],
    )


@pytest.mark.parametrize(("check", "loop"), cases("uvloop"))
def test_tls(check: TransportCheck, loop: Any, certificates: Certificates) -> None:
    host = "[::1]" if has_ipv6() else "127.0.0.1"
    check(
        listen=Wss(Url.parse(f"wss://{host}:0"), server_tls=certificates.server(clients=certificates)),
        connect=lambda url: Wss(Url.parse(url), tls=TlsOptions(ca_file=certificates.ca_file)),
        identity=certificates.client(),
        loop_factory=loop.values[0],
    )
