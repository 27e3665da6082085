"""quic_nng with NanoNNG's streams keeps the transport contract, as far as those streams can.

The library is a stand-in that speaks TCP, so the listener does too. With TESAIOT_NANONNG_LIBRARY, a path of a
real one, the same runs over QUIC.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import nng_stub
import pytest

from tesaiot_connect import Duration, Handler, TlsOptions, Url
from tesaiot_connect.testing import Certificates, TransportCheck, transport_checks
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_quic_nng import QuicNng
from tesaiot_connect_tcp_tls import TcpTls

pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")


class Tcp:
    """Listens with TCP, and says that it is QUIC."""

    schemes = QuicNng.schemes
    rank = 0
    races = False

    @contextlib.asynccontextmanager
    async def listen(self, handler: Handler) -> AsyncIterator[str]:
        async with TcpTls(Url.parse("mqtt://127.0.0.1:0")).listen(handler) as url:
            yield url.replace("mqtt", "quic")


@pytest.fixture(scope="session")
def library() -> Path:
    return nng_stub.built("nanonng")


def connect(certificates: Certificates, library: Path, url: str) -> QuicNng:
    tls = TlsOptions(ca_file=certificates.ca_file)
    return QuicNng(
        Url.parse(url),
        tls=tls,
        backend="nanonng",
        library=library,
        verify_hostname=False,
        connect_timeout=Duration(30.0),
        ack_timeout=Duration(30.0),
        idle_timeout=Duration(3.0),
        keepalive=Duration(1.0),
    )


@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_stream(check: TransportCheck, library: Path, certificates: Certificates) -> None:
    check(listen=Tcp(), connect=partial(connect, certificates, library))


CANNOT = {
    "end_is_final": "it ends a stream by closing the connection, which is no end of a stream to the server",
    "close_flushes": "the same: all arrives, and then the connection is closed",
    "early": "what comes together with the end of the stream is lost",
}


@pytest.mark.skipif(
    not os.environ.get("TESAIOT_NANONNG_LIBRARY"), reason="TESAIOT_NANONNG_LIBRARY is not set"
)
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_real_stream(check: TransportCheck, certificates: Certificates) -> None:
    if check.name in CANNOT:
        pytest.skip(f"NanoNNG cannot: {CANNOT[check.name]}")
    check(
        listen=QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=certificates.server()),
        connect=partial(connect, certificates, Path(os.environ["TESAIOT_NANONNG_LIBRARY"])),
    )
