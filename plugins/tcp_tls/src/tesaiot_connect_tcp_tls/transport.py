"""The recipe: dial or listen on TCP, with TLS where the scheme says so.

Owns: the endpoint's options, and the words for what only MQTT's own ports can mean. Rule: what `connect`
returns is secured; what fails leaves neither a socket nor a task.
"""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import ClassVar

import attrs

from tesaiot_connect import (
    AsyncioStream,
    ClientCertificate,
    Connection,
    Duration,
    Handler,
    Peer,
    ServerTls,
    StreamConnection,
    TlsOptions,
    Url,
    accepting,
    explain_tls,
    tcp,
)

NAME = "tcp_tls"
_HANDSHAKE = tcp.Stage(
    "the server accepted the connection but does not answer the TLS handshake",
    "check that the port speaks TLS (8883); a plain MQTT port (1883, mqtt://) never answers it",
    "secure",
)


@attrs.frozen
class TcpTls:
    """`mqtt://host:1883` is plain TCP, `mqtts://host:8883` is TLS over TCP."""

    schemes: ClassVar[Mapping[str, int]] = {"mqtt": 1883, "mqtts": 8883}
    rank: ClassVar[int] = 100
    races: ClassVar[bool] = True

    url: Url
    tls: TlsOptions = attrs.field(factory=TlsOptions, kw_only=True)
    connect_timeout: Duration = attrs.field(
        default=Duration(10.0),
        kw_only=True,
        metadata={"help": "For name resolution, TCP and TLS together."},
    )
    nodelay: bool = attrs.field(
        default=True,
        kw_only=True,
        metadata={"help": "Send small packets at once (TCP_NODELAY)."},
    )
    keepalive_idle: Duration = attrs.field(
        default=Duration(60.0),
        kw_only=True,
        metadata={"help": "Silence before the first TCP keepalive probe; '0s' sends none."},
    )
    keepalive_interval: Duration = attrs.field(
        default=Duration(10.0), kw_only=True, metadata={"help": "Time between two probes."}
    )
    keepalive_count: int = attrs.field(
        default=3,
        kw_only=True,
        metadata={"help": "Probes without an answer before the connection is given up."},
    )
    attempt_delay: Duration = attrs.field(
        default=Duration(0.25),
        kw_only=True,
        metadata={"help": "Head start of each address of a name over the next (RFC 8305)."},
    )
    local_address: str | None = attrs.field(
        default=None, kw_only=True, metadata={"help": "Address to connect from."}
    )
    hosts: tuple[str, ...] = attrs.field(
        default=(),
        kw_only=True,
        metadata={"help": "Listener: more addresses to listen on, on the same port."},
    )
    backlog: int = attrs.field(
        default=512,
        kw_only=True,
        metadata={"help": "Listener: connections that may wait to be accepted."},
    )
    handshake_timeout: Duration = attrs.field(
        default=Duration(10.0),
        kw_only=True,
        metadata={"help": "Listener: time a client has for its TLS handshake."},
    )
    server_tls: ServerTls | None = attrs.field(
        default=None,
        kw_only=True,
        metadata={"help": "Listener: certificate and key, for mqtts://."},
    )

    @property
    def secure(self) -> bool:
        return self.url.scheme == "mqtts"

    @property
    def port(self) -> int:
        return self.url.port or self.schemes[self.url.scheme]

    # --- client

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """`early` is not sent: there is no replay-safe early data here. Raises ConnectFailed."""
        context = self.tls.client_context(identity) if self.secure else None

        def stream() -> AsyncioStream:
            silent = tcp.silent(self) if self.secure else None
            return AsyncioStream(explain=explain_tls, half_close=not self.secure, silent=silent)

        async def finish(stream: AsyncioStream, peer: Peer, _progress: tcp.Progress) -> Connection:
            return StreamConnection(stream, peer)

        return await tcp.connect(
            self, name=NAME, context=context, protocol=stream, finish=finish, handshake=_HANDSHAKE
        )

    # --- listener

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        """Raises ConnectorError where the address cannot be had or the certificate not read."""
        context = tcp.server_context(self)
        sockets = await tcp.bind(self)
        port = sockets[0].getsockname()[1]
        async with accepting(sockets, functools.partial(self._accept, context), handler):
            yield str(attrs.evolve(self.url, port=port))

    async def _accept(self, context: ssl.SSLContext | None, sock: socket.socket) -> Connection:
        stream = AsyncioStream(explain=explain_tls, half_close=context is None)
        peer = await tcp.wrap_accepted(self, NAME, sock, context, stream)
        return StreamConnection(stream, peer, accepted=True)
