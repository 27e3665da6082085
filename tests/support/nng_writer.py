"""A program that publishes numbered messages through `quic_nng`, for tests that kill it: see nng_kills.py.

    nng_writer.py URL CA_FILE LIBRARY FIRST QOS

Prints `worker PID` for each connection, and `acked N` when all up to and without N are the broker's. LIBRARY
may be empty: then the environment names it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

from tesaiot_connect import (
    Backoff,
    Client,
    ClientCertificate,
    ClientOptions,
    Connection,
    Duration,
    Message,
    TlsOptions,
    Url,
)
from tesaiot_connect_quic_nng import QuicNng

_BATCH = 50


class Telling:
    """A dialer that says so."""

    def __init__(self, transport: QuicNng) -> None:
        self._transport = transport

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        connection: Any = await self._transport.connect(identity=identity, early=early)
        print("worker", connection.pid, flush=True)
        return connection  # type: ignore[no-any-return]


async def main(url: str, ca_file: str, library: str, first: int, qos: int) -> None:
    named = {"library": library, "msquic": Path(library).with_name("libmsquic.so")} if library else {}
    recipe = QuicNng(
        Url.parse(url),
        tls=TlsOptions(ca_file=Path(ca_file)),
        verify_hostname=False,
        connect_timeout=Duration(30.0),
        ack_timeout=Duration(30.0),
        **named,
    )
    options = ClientOptions(
        client_id="writer", protocol="3.1.1", reconnect=Backoff(min=Duration(0.02), max=Duration(0.2))
    )
    async with Client(Telling(recipe), options) as client:
        number = first
        while True:
            numbers = range(number, number + _BATCH)
            await client.publish([Message("kills/t", b"%-100d" % one, qos) for one in numbers])
            number += _BATCH
            print("acked", number, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
