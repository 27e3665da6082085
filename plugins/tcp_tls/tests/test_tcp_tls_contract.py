"""tcp_tls keeps the transport contract: plain and TLS, on every event loop."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest
from loops import LOOPS

from tesaiot_connect import Listener, ServerTls, TlsOptions, Transport, Url
from tesaiot_connect.testing import Certificates, TransportCheck, transport_checks
from tesaiot_connect_tcp_tls import TcpTls


def test_it_is_a_transport_and_a_listener() -> None:
    recipe = TcpTls(Url.parse("mqtt://localhost"))
    assert isinstance(recipe, Transport)
    assert isinstance(recipe, Listener)


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_plain(check: TransportCheck, loop_factory: Any) -> None:
    check(
        listen=TcpTls(Url.parse("mqtt://127.0.0.1:0")),
        connect=lambda url: TcpTls(Url.parse(url)),
        loop_factory=loop_factory,
    )


def keeps_the_contract_with_tls(check: TransportCheck, loop_factory: Any, certificates: Certificates) -> None:
    check(
        listen=TcpTls(Url.parse("mqtts://127.0.0.1:0"), server_tls=certificates.server(clients=certificates)),
        connect=lambda url: TcpTls(Url.parse(url), tls=TlsOptions(ca_file=certificates.ca_file)),
        identity=certificates.client(),
        loop_factory=loop_factory,
    )


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_tls(check: TransportCheck, loop_factory: Any, certificates: Certificates) -> None:
    keeps_the_contract_with_tls(check, loop_factory, certificates)


@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_tls_1_2(check: TransportCheck, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    make = ServerTls.server_context

    def old(self: ServerTls) -> ssl.SSLContext:
        context = make(self)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    monkeypatch.setattr(ServerTls, "server_context", old)
    if check.name == "close_is_bounded":
        pytest.skip("takes seconds and is the same as with TLS 1.3")
    keeps_the_contract_with_tls(check, asyncio.new_event_loop, certificates)
