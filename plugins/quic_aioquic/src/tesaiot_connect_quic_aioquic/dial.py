"""One QUIC connection out of several addresses: the client's endpoint.

Owns: the client's sockets and the race of addresses (RFC 8305). Rules: one connection comes out,
everything else is closed before it does; early data goes to one address alone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tesaiot_connect import Disconnected, Unsupported

from .certificates import unfit
from .connection import QuicConnection
from .endpoint import Budget, Tuning
from .explain import explain_narrow
from .quic import Quic
from .udp import Address, Datagram, UdpSocket, open_socket

log = logging.getLogger(__name__)

_SILENT = (
    "the network path is gone, or UDP is blocked on it now, or the broker was restarted without "
    "`state_file`, which would have let it say so"
)
_REFUSALS = 3
_REFUSED_FOR = 0.5
"""ICMP refusals in a row, and over how many seconds, with nothing received in between, that end an
established connection. They may be forged, so they must hold against a PING."""
_ADDRESS_CHECK = 1.0
"""Seconds between two looks at this machine's address while the peer is silent."""


async def resolve(host: str, port: int) -> list[tuple[int, Address]]:
    """Family and address, in the system's order of preference (RFC 6724). Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    families = (socket.AF_INET, socket.AF_INET6)
    return list(
        dict.fromkeys((int(family), address) for family, _, _, _, address in found if family in families)
    )


async def race(attempts: Sequence[Callable[[], Awaitable[QuicConnection]]], delay: float) -> QuicConnection:
    """The first connection whose handshake completes. `delay` is the head start of each, in seconds.

    Raises an ExceptionGroup with the error of each attempt, in order, when none does.
    """
    waiting = deque(attempts)
    running: list[asyncio.Task[QuicConnection]] = []
    errors: dict[int, Exception] = {}

    async def run(attempt: Callable[[], Awaitable[QuicConnection]]) -> QuicConnection:
        return await attempt()

    order: dict[asyncio.Task[QuicConnection], int] = {}
    try:
        while waiting or running:
            if waiting:
                task = asyncio.create_task(run(waiting.popleft()))
                order[task] = len(order)
                running.append(task)
            done, _ = await asyncio.wait(
                running, timeout=delay if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                running.remove(task)
                error = task.exception()
                if error is None:
                    return task.result()
                if not isinstance(error, Exception):
                    raise error
                errors[order[task]] = error
    finally:
        for task in running:
            task.cancel()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(outcome, QuicConnection):
                outcome.abort()
    raise ExceptionGroup("no address gave a connection", [errors[one] for one in sorted(errors)])


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
        self._refusals = 0
        self._received_at_refusal = 0
        self._refused_since = 0.0
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

    def silence(self, connection: QuicConnection) -> tuple[str, str]:
        told = explain_narrow(
            path_mtu=self.socket.path_mtu, too_big=0, datagram_size=connection.quic.datagram_size
        )
        return told or ("", _SILENT)

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
        if self._connection is not None:
            self._connection.receive(datagrams, self._loop.time())

    def _on_writable(self) -> None:
        if self._connection is not None and not self._connection.over:
            self._connection.flush()

    def _on_error(self, error: OSError) -> None:
        connection = self._connection
        if connection is None or connection.over:
            return
        if isinstance(error, (ConnectionRefusedError, ConnectionResetError)):  # Windows says reset
            received, now = connection.quic.packets_received, self._loop.time()
            if received != self._received_at_refusal or not self._refusals:
                self._refusals, self._refused_since = 0, now
                if connection.handshake.done():
                    connection.ping()
            self._received_at_refusal = received
            self._refusals += 1
            if not connection.handshake.done() and not received:
                self.refused = True
                connection.lost(Disconnected("the port refuses datagrams (ICMP port unreachable)"))
            elif self._refusals >= _REFUSALS and now - self._refused_since >= _REFUSED_FOR:
                connection.lost(
                    Disconnected(
                        f"nothing listens any more at {connection.tuning.place}",
                        fix="the broker was stopped, or restarted on another port",
                    )
                )
        elif connection.handshake.done():
            self._checked = 0.0
            self.probing(connection)


def unsupported_identity(place: str) -> Unsupported:
    return Unsupported(
        f"{place}: client certificates are not available over QUIC",
        fix="add an mqtts:// endpoint for this connection; it is used where auth is mtls",
    )
