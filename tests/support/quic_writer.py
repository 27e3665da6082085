"""A program that publishes numbered QoS 1 messages over QUIC, for tests that kill it: see quic_kills.py.

    quic_writer.py URL CA_FILE TICKET_FOLDER FIRST

Prints `connecting` before each connection, `migrating` before each move, and `acked N` when all up to and
without N are the broker's.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from tesaiot_connect import (
    Backoff,
    Client,
    ClientCertificate,
    ClientOptions,
    Connection,
    Disconnected,
    Duration,
    Message,
    TlsOptions,
    Unsupported,
    Url,
)
from tesaiot_connect_quic_aioquic import QuicAioquic

log = logging.getLogger(__name__)

_BATCH = 50
_MOVE_EVERY = 10


class Telling:
    """A dialer that says so."""

    def __init__(self, transport: QuicAioquic) -> None:
        self._transport = transport
        self.connection: Connection | None = None

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.connection = None
        print("connecting", flush=True)
        self.connection = await self._transport.connect(identity=identity, early=early)
        return self.connection


async def _move(dialer: Telling) -> None:
    print("migrating", flush=True)
    try:
        if dialer.connection is not None:
            await dialer.connection.migrate()
    except (Disconnected, Unsupported) as error:
        log.info("not moved: %s", error)


async def main(url: str, ca_file: str, tickets: str, first: int) -> None:
    transport = QuicAioquic(
        Url.parse(url),
        tls=TlsOptions(ca_file=Path(ca_file)),
        ticket_folder=Path(tickets),
        # so that only a refusal or a stateless reset can tell in time that the broker is another one
        path_timeout=Duration(100.0),
        connect_timeout=Duration(2.0),
    )
    dialer = Telling(transport)
    options = ClientOptions(
        client_id="writer", early_publish=True, reconnect=Backoff(min=Duration(0.02), max=Duration(0.2))
    )
    moving: asyncio.Task[None] | None = None
    async with Client(dialer, options) as client:
        number = first
        while True:
            numbers = range(number, number + _BATCH)
            await client.publish([Message("kills/t", b"%d" % one, qos=1) for one in numbers])
            number += _BATCH
            print("acked", number, flush=True)
            if number // _BATCH % _MOVE_EVERY == 0 and (moving is None or moving.done()):
                moving = asyncio.create_task(_move(dialer))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
