"""The client's endpoint of a QUIC connection.

Owns: the client's sockets, and what the system says of the path. Rule: only proof ends a connection.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import socket
from collections.abc import Sequence
from typing import Any

from tesaiot_connect import Disconnected, PathLost, Unsupported

from .certificates import unfit
from .connection import QuicConnection
from .endpoint import Budget, Tuning
from .explain import explain_lost_path, explain_narrow, explain_refused, forgotten
from .quic import Quic
from .udp import Address, Datagram, UdpSocket, open_socket

log = logging.getLogger(__name__)

_DENIALS = 3
_DENIED_FOR = 0.5
"""Hints in a row, and over how many seconds at least, that the broker has forgotten an established
connection: ICMP refusals, or datagrams that make no sense. They may be forged, so they must hold against a
PING."""
_OBSTACLE = 1.0
"""Seconds before the last sign of life from which on an ICMP error counts: it may have overtaken that one,
and routers send about one a second."""
_ADDRESS_CHECK = 1.0
"""Seconds between two looks at this machine's address while the peer is silent."""


async def resolve(host: str, port: int) -> list[tuple[int, Address]]:
    """Family and address, in the system's order of preference (RFC 6724). Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    families = (socket.AF_INET, socket.AF_INET6)
    return list(
        dict.fromkeys((int(family), address) for family, _, _, _, address in found if family in families)
    )


class ClientEndpoint:
    """The socket of one client connection: a `connection.Endpoint`."""

    def __init__(
        self,
        family: int,
        remote: Address,
        *,
        local: Address | None,
        receive_buffer: int,
        send_buffer: int,
        offload: bool,
        verify: bool,
    ) -> None:
        self.family = family
        self.remote = remote
        self._local = local
        self._buffers = receive_buffer, send_buffer
        self._offload = offload
        self._verify = verify
        self._loop = asyncio.get_running_loop()
        self._connection: QuicConnection | None = None
        self._denials = 0
        self._received_at_denial = 0
        self._denied_since = 0.0
        self._obstacle = -math.inf, ""
        """What the system said of the path, and when."""
        self._checked = 0.0
        self._moving: asyncio.Handle | None = None
        self.too_big = 0
        self.refused = False
        self.path_mtu: int | None = None
        self.socket = self._open()

    def _open(self) -> UdpSocket:
        receive, send = self._buffers
        sock = open_socket(
            self.family,
            local=self._local,
            remote=self.remote,
            receive_buffer=receive,
            send_buffer=send,
            v6only=None,
        )
        udp = UdpSocket(sock, connected=self.remote, offload=self._offload)
        udp.start(self._on_datagrams, self._on_error, self._on_writable)
        return udp

    def start(self, quic: Quic, tuning: Tuning, budget: Budget, early: bytes) -> QuicConnection:
        """Sends the first flight, `early` with it where a ticket allows."""
        connection = self._connection = QuicConnection(quic, self, tuning, budget, accepted=False)
        quic.connect(self.remote, self._loop.time())
        if early and quic.sends_early_data:
            connection.send_early(early)
        connection.flush()
        return connection

    @property
    def received(self) -> int:
        return self.socket.datagrams_received

    # --- the connection asks ------------------------------------------------------------------

    def transmit(self, connection: QuicConnection, datagrams: Sequence[bytes], address: Any) -> None:
        self.socket.send(datagrams, self.remote)

    def congested(self, connection: QuicConnection) -> bool:
        return self.socket.blocked

    def issued(self, connection: QuicConnection, connection_id: bytes) -> None: ...
    def retired(self, connection: QuicConnection, connection_id: bytes) -> None: ...
    def ready(self, connection: QuicConnection) -> None: ...

    def handshaken(self, connection: QuicConnection) -> None:
        certificate = connection.quic.server_certificate
        told = unfit(certificate) if self._verify and certificate is not None else None
        if told is not None:
            what, fix = told
            connection.refuse(f"{connection.tuning.place}: {what}", fix)

    def released(self, connection: QuicConnection) -> None:
        self.too_big += self.socket.too_big
        self.path_mtu = self.socket.path_mtu
        if self._moving is not None:
            self._moving.cancel()
        self.socket.close()

    def probing(self, connection: QuicConnection) -> None:
        """Silence: it may be that this machine's address changed under us (RFC 9000 section 9)."""
        now = self._loop.time()
        if self._local is not None or now - self._checked < _ADDRESS_CHECK:
            return
        self._checked = now
        ours = self._address_towards_peer()
        if ours is not None and ours != self.socket.local_address[0]:
            self._move_soon()

    def silence(self, connection: QuicConnection, seconds: float) -> PathLost:
        quic = connection.quic
        narrow = explain_narrow(path_mtu=self.socket.path_mtu, too_big=0, datagram_size=quic.datagram_size)
        said, obstacle = self._obstacle
        recent = said > self._loop.time() - seconds - _OBSTACLE
        return explain_lost_path(seconds, narrow, obstacle if recent else "")

    def _address_towards_peer(self) -> str | None:
        with socket.socket(self.family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self.remote)
                return str(probe.getsockname()[0])
            except OSError:
                return None

    async def migrate(self, connection: QuicConnection) -> None:
        """Raises Disconnected where no new socket can be had."""
        try:
            self._rebind()
        except OSError as error:
            raise Disconnected(
                f"no new local address towards {self.remote[0]}: {error.strerror or error}",
                fix="check this machine's network",
            ) from error

    def _rebind(self) -> None:
        assert self._connection is not None
        old = self.socket
        self.socket = self._open()
        self.too_big += old.too_big
        old.close()
        self._connection.moved()

    def _move_soon(self) -> None:
        """After the present callback, which may come from the socket that goes."""
        if self._moving is None:
            self._moving = self._loop.call_soon(self._move_now)

    def _move_now(self) -> None:
        self._moving = None
        connection = self._connection
        if connection is None or connection.over or not connection.quic.confirmed:
            return
        if connection.quic.stationary:
            connection.lost(
                Disconnected(
                    f"this machine's address changed, and {connection.tuning.place} allows no moves",
                    fix="a new connection is made from the new address",
                )
            )
            return
        try:
            self._rebind()
        except OSError as error:
            log.debug("no way to move yet: %s", error)

    # --- the socket tells ---------------------------------------------------------------------

    def _on_datagrams(self, datagrams: list[Datagram]) -> None:
        connection = self._connection
        if connection is None:
            return
        before = connection.quic.packets_received
        connection.receive(datagrams, self._loop.time())
        if connection.quic.packets_received == before and connection.handshake.done():
            self._denied(connection, forgotten())

    def _on_writable(self) -> None:
        if self._connection is not None and not self._connection.over:
            self._connection.flush()

    def _on_error(self, error: OSError) -> None:
        connection = self._connection
        if connection is None or connection.over:
            return
        received = connection.quic.packets_received
        if isinstance(error, (ConnectionRefusedError, ConnectionResetError)):  # Windows says reset
            if not connection.handshake.done() and not received:
                self.refused = True
                connection.give_up(Disconnected("the port refuses datagrams (ICMP port unreachable)"))
            else:
                self._denied(connection, explain_refused(connection.tuning.place))
        elif connection.handshake.done():
            if error.errno != errno.EMSGSIZE:
                self._obstacle = self._loop.time(), error.strerror or str(error)
            self._checked = 0.0
            self.probing(connection)

    def _denied(self, connection: QuicConnection, error: Disconnected) -> None:
        """Something says that the broker does not know the connection any more: then the path is well."""
        quic, now = connection.quic, self._loop.time()
        if connection.over:
            return
        if quic.packets_received != self._received_at_denial or not self._denials:
            self._denials, self._denied_since = 0, now
            if connection.handshake.done():
                connection.ping()
        self._received_at_denial = quic.packets_received
        self._denials += 1
        if self._denials >= _DENIALS and now - self._denied_since >= max(_DENIED_FOR, 2 * quic.probe_timeout):
            connection.lost(error)


def unsupported_identity(place: str) -> Unsupported:
    return Unsupported(
        f"{place}: client certificates are not available over QUIC",
        fix="add an mqtts:// endpoint for this connection; it is used where auth is mtls",
    )
