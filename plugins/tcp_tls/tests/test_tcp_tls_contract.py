"""tcp_tls keeps the transport contract: plain and TLS, on every event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tesaiot_connect_tcp_tls import TcpTls

from tesaiot_connect.protocols import ClientCertificate, Listener, Transport, Url
from tesaiot_connect.testing import Certificates, TransportCheck, transport_checks
from tesaiot_connect.tls import TlsOptions

LOOPS: list[Any] = [pytest.param(asyncio.new_event_loop, id="asyncio")]
try:
    import uvloop
except ImportError:
    pass
else:
    LOOPS.append(pytest.param(uvloop.new_event_loop, id="uvloop"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


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


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_tls(check: TransportCheck, loop_factory: Any, version: Any, certificates: Certificates) -> None:
    if version == "1.2" and loop_factory is not asyncio.new_event_loop:
        pytest.skip("TLS 1.2 is checked on one loop")
    if version == "1.2" and check.name == "close_is_bounded":
        pytest.skip("takes seconds and is the same as with TLS 1.3")
    identity: ClientCertificate = certificates.client()
    check(
        listen=TcpTls(Url.parse("mqtts://127.0.0.1:0"), server_tls=certificates.server(clients=certificates)),
        connect=lambda url: TcpTls(
            Url.parse(url),
            tls=TlsOptions(ca_file=certificates.ca_file, minimum_version=version),
        ),
        identity=identity,
        loop_factory=loop_factory,
    )
