"""Many QUIC connections on one socket: the server's endpoint.

Owns: the way from a datagram to its connection, and what answers strangers: Retry, Version
Negotiation, stateless reset, refusal (RFC 9000 sections 6, 8.1, 10.3). Rules: nothing a stranger
sends costs more than a limit allows, and is answered with more than it brought; what a burst
brought is handed on in one piece.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence

import attrs
from aioquic._buffer import Buffer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicFrameType,
    QuicHeader,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.retry import QuicRetryTokenHandler

from tesaiot_connect import Disconnected, ListenerStatus, PathLost

from .certificates import ServerIdentity
from .connection import QuicConnection
from .endpoint import CONNECTION_ID, Budget, Tuning, Windows, address_text
from .issued import IssuedTickets
from .quic import Quic
from .resets import LEAST_RESET, RESET_TOKEN, reset_token
from .udp import Address, Datagram, UdpSocket

log = logging.getLogger(__name__)

_RETRY = b"tqr1"
"""How tokens of our Retry packets begin."""
_CLOSING = 1.0
"""Seconds after its end that a connection's packets are ignored; then they get a stateless reset."""
_DEPARTED = 10_000
"""Connection ids remembered for that."""
_ANSWERS = 1000
"""Datagrams a second that may answer strangers (stateless resets, refusals, versions)."""
_LINES = 10
"""Failed handshakes a second that the log tells of."""
_REFUSALS = {
    "stopping": "the server is stopping",
    "max_connections": "the server has as many connections as it takes",
    "max_handshakes": "the server has as many handshakes under way as it takes",
    "memory": "the server holds as much unread data as it takes",
    "token": "the token is not of this server",
}


@attrs.frozen
class Limits:
    """What a listener takes."""

    connections: int
    handshakes: int
    retry: str
    """"always", "auto" or "never"."""
    retry_above: int
    """Handshakes under way above which "auto" validates addresses first."""


class _Allowance:
    """So many a second, counted by the clock of `now`."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._second = 0
        self._left = rate

    def take(self, now: float) -> bool:
        if int(now) != self._second:
            self._second, self._left = int(now), self._rate
        self._left -= 1
        return self._left >= 0


def _refusal(header: QuicHeader, reason: str) -> bytes:
    """An Initial packet that closes the connection it answers: no TLS, no state (RFC 9000 section 10.2.3)."""
    assert header.version is not None
    crypto = CryptoPair()
    crypto.setup_initial(cid=header.destination_cid, is_client=False, version=header.version)
    builder = QuicPacketBuilder(
        host_cid=os.urandom(CONNECTION_ID),
        peer_cid=header.source_cid,
        version=header.version,
        is_client=False,
        max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    text = _REFUSALS[reason].encode()
    buf = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=32 + len(text))
    buf.push_uint_var(QuicErrorCode.INVALID_TOKEN if reason == "token" else QuicErrorCode.CONNECTION_REFUSED)
    buf.push_uint_var(QuicFrameType.PADDING)
    buf.push_uint_var(len(text))
    buf.push_bytes(text)
    (data,), _ = builder.flush()
    return data


class ServerEndpoint:
    """A `connection.Endpoint` for all connections of a listener, on one or several sockets.

    `accept` is called with each connection that may be served.
    """

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        identity: ServerIdentity,
        tickets: IssuedTickets,
        windows: Windows,
        limits: Limits,
        tuning: Tuning,
        memory: int,
        early_data: bool,
        key_update: int,
        accept: Callable[[QuicConnection], None],
    ) -> None:
        self._configuration = configuration
        self._identity = identity
        self._tickets = tickets
        self._windows = windows
        self._limits = limits
        self._tuning = tuning
        self._early_data = early_data
        self._key_update = key_update
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._reset_key = tickets.reset_key()
        self._retry = QuicRetryTokenHandler()
        self._answers = _Allowance(_ANSWERS)
        self._told = _Allowance(_LINES)
        self._sockets: list[UdpSocket] = []
        self._routes: dict[bytes, QuicConnection] = {}
        self._ids: dict[QuicConnection, set[bytes]] = {}
        """The same, by connection."""
        self._departed: dict[bytes, float] = {}
        """Ids of connections that ended a moment ago: what still comes for them is no surprise."""
        self._connections: dict[QuicConnection, UdpSocket] = {}
        self._handshakes: set[QuicConnection] = set()
        self._waiting: set[QuicConnection] = set()
        """Flushes that wait for room in a socket."""
        self._open = True
        self.budget = Budget(memory)
        self._refused: Counter[str] = Counter()
        self._accepted = self._resumed = self._early = self._retries = self._resets = 0
        self._dropped = self._migrations = 0

    def add(self, udp: UdpSocket) -> None:
        """Serve on this socket too, and own it."""
        self._sockets.append(udp)

        def arrived(datagrams: list[Datagram]) -> None:
            self._on_datagrams(udp, datagrams)

        udp.start(arrived, self._on_error, self._on_writable)

    def refuse_new(self) -> None:
        self._open = False

    def close(self) -> None:
        """Ends what is left, at once."""
        for connection in tuple(self._connections):
            connection.abort()
        for udp in self._sockets:
            udp.close()

    def status(self) -> ListenerStatus:
        sockets = self._sockets
        return ListenerStatus(
            connections=len(self._connections),
            handshakes=len(self._handshakes),
            accepted=self._accepted,
            resumed=self._resumed,
            early_data_accepted=self._early,
            refused=dict(self._refused),
            retries=self._retries,
            stateless_resets=self._resets,
            datagrams_received=sum(one.datagrams_received for one in sockets),
            datagrams_sent=sum(one.datagrams_sent for one in sockets),
            datagrams_dropped=self._dropped + sum(one.dropped + one.too_big for one in sockets),
            bytes_received=sum(one.bytes_received for one in sockets),
            bytes_sent=sum(one.bytes_sent for one in sockets),
            migrations=self._migrations + sum(one.figures.migrations for one in self._connections),
        )

    # --- the socket tells ---------------------------------------------------------------------

    def _on_error(self, error: OSError) -> None:
        log.debug("a datagram could not be sent: %s", error)

    def _on_writable(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for connection in waiting:
            if not connection.over:
                connection.flush()

    def _on_datagrams(self, udp: UdpSocket, datagrams: list[Datagram]) -> None:
        now = self._loop.time()
        routes = self._routes
        mail: dict[QuicConnection, list[Datagram]] = {}
        for datagram in datagrams:
            data = datagram.data
            if not data:
                continue
            if data[0] & 0x80:
                size = data[5] if len(data) > 5 else 0
                connection = routes.get(data[6 : 6 + size])
            else:
                connection = routes.get(data[1 : 1 + CONNECTION_ID])
            if connection is None:
                connection = self._stranger(udp, datagram, now)
                if connection is None:
                    continue
            if connection in mail:
                mail[connection].append(datagram)
            else:
                mail[connection] = [datagram]
        for connection, found in mail.items():
            connection.receive(found, now)
            if not connection.quic.packets_received:  # a handshake's place is not for what cannot be read
                self._handshakes.discard(connection)
                self._dropped += 1
                connection.lost(Disconnected("nothing that it sent could be read"))

    # --- strangers ----------------------------------------------------------------------------

    def _stranger(self, udp: UdpSocket, datagram: Datagram, now: float) -> QuicConnection | None:
        """A connection for the datagram, or an answer to it, or nothing."""
        data = datagram.data
        if not data[0] & 0x80:
            self._reset(udp, datagram, now)
            return None
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=CONNECTION_ID)
        except ValueError:
            self._dropped += 1
            return None
        if len(data) < SMALLEST_MAX_DATAGRAM_SIZE or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            self._dropped += 1
            return None
        if header.version not in self._configuration.supported_versions:
            self._refused["version"] += 1
            if self._answers.take(now):
                self._answer(
                    udp,
                    datagram,
                    encode_quic_version_negotiation(
                        source_cid=header.destination_cid,
                        destination_cid=header.source_cid,
                        supported_versions=self._configuration.supported_versions,
                    ),
                )
            return None
        if header.packet_type is not QuicPacketType.INITIAL or len(header.destination_cid) < 8:
            self._dropped += 1
            return None
        return self._initial(udp, datagram, header, now)

    def _initial(
        self, udp: UdpSocket, datagram: Datagram, header: QuicHeader, now: float
    ) -> QuicConnection | None:
        limits = self._limits
        original, source, reason = header.destination_cid, None, ""
        busy = len(self._handshakes) >= limits.retry_above
        # a token of another server at this address is as good as none (RFC 9000 section 8.1.3)
        if header.token.startswith(_RETRY):
            try:
                original = self._retry.validate_token(
                    address=datagram.address,
                    destination_cid=header.destination_cid,
                    token=header.token[len(_RETRY) :],
                    now=now,
                )
                source = header.destination_cid
            except ValueError:
                reason = "token"
        if not (source or reason) and (limits.retry == "always" or (limits.retry == "auto" and busy)):
            self._send_retry(udp, datagram, header, now)
            return None
        if not self._open:
            reason = "stopping"
        elif len(self._connections) >= limits.connections:
            reason = "max_connections"
        elif len(self._handshakes) >= limits.handshakes:
            reason = "max_handshakes"
        elif self.budget.tight:
            reason = "memory"
        if reason:
            self._refused[reason] += 1
            if self._answers.take(now):
                self._answer(udp, datagram, _refusal(header, reason))
            return None
        if self._identity.reload(now):
            self._identity.apply(self._configuration)
        quic = Quic(
            self._configuration,
            self._windows,
            clock=self._loop.time,
            reset_key=self._reset_key,
            early_data=self._early_data,
            key_update=self._key_update,
            original_destination_connection_id=original,
            retry_source_connection_id=source,
            session_ticket_fetcher=self._tickets.redeem,
            session_ticket_handler=self._tickets.issue,
        )
        tuning = attrs.evolve(self._tuning, place=address_text(datagram.address))
        connection = QuicConnection(quic, self, tuning, self.budget, accepted=True)
        self._connections[connection] = udp
        self._handshakes.add(connection)
        self._ids[connection] = set()
        self.issued(connection, header.destination_cid)
        self.issued(connection, quic.host_cid)
        return connection

    def _send_retry(self, udp: UdpSocket, datagram: Datagram, header: QuicHeader, now: float) -> None:
        self._retries += 1
        source = os.urandom(CONNECTION_ID)
        token = _RETRY + self._retry.create_token(
            address=datagram.address,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source,
            now=now,
        )
        assert header.version is not None
        self._answer(
            udp,
            datagram,
            encode_quic_retry(
                version=header.version,
                source_cid=source,
                destination_cid=header.source_cid,
                original_destination_cid=header.destination_cid,
                retry_token=token,
            ),
        )

    def _reset(self, udp: UdpSocket, datagram: Datagram, now: float) -> None:
        """Tells a peer that its connection is not known here, as after a restart.

        Always smaller than what it answers, so that two such servers cannot keep each other busy.
        """
        size = min(len(datagram.data) - 1, 2 * LEAST_RESET)
        connection_id = datagram.data[1 : 1 + CONNECTION_ID]
        closing = now < self._departed.get(connection_id, 0.0)
        if closing or size < LEAST_RESET or not self._answers.take(now):
            self._dropped += 1
            return
        self._resets += 1
        noise = bytearray(os.urandom(size - RESET_TOKEN))
        noise[0] = noise[0] & 0x3F | 0x40
        self._answer(udp, datagram, bytes(noise) + reset_token(self._reset_key, connection_id))

    @staticmethod
    def _answer(udp: UdpSocket, datagram: Datagram, data: bytes) -> None:
        udp.send([data], datagram.address, datagram.local)

    # --- a connection asks --------------------------------------------------------------------

    def transmit(self, connection: QuicConnection, datagrams: Sequence[bytes], address: Address) -> None:
        udp = self._connections.get(connection)
        if udp is not None:
            udp.send(datagrams, address, connection.local)

    def congested(self, connection: QuicConnection) -> bool:
        udp = self._connections.get(connection)
        if udp is None or not udp.blocked:
            return False
        self._waiting.add(connection)
        return True

    def issued(self, connection: QuicConnection, connection_id: bytes) -> None:
        known = self._ids.get(connection)
        if known is not None:  # else it is over
            self._routes[connection_id] = connection
            known.add(connection_id)

    def retired(self, connection: QuicConnection, connection_id: bytes) -> None:
        known = self._ids.get(connection)
        if known is not None and connection_id in known:
            known.remove(connection_id)
            del self._routes[connection_id]

    def ready(self, connection: QuicConnection) -> None:
        if not self._open:
            connection.abort()
            return
        quic = connection.quic
        self._accepted += 1
        self._resumed += quic.resumed
        self._early += quic.early_data_accepted
        self._accept(connection)

    def handshaken(self, connection: QuicConnection) -> None:
        self._handshakes.discard(connection)

    def released(self, connection: QuicConnection) -> None:
        if connection in self._handshakes:
            self._handshakes.discard(connection)
            self._refused["handshake_failed"] += 1
            if self._told.take(self._loop.time()):
                error = connection.gone()
                log.info("a client did not get through its handshake: %s", error)
        self._migrations += connection.figures.migrations
        self._connections.pop(connection, None)
        self._waiting.discard(connection)
        now = self._loop.time()
        for connection_id in self._ids.pop(connection, ()):
            self._routes.pop(connection_id, None)
            self._departed[connection_id] = now + _CLOSING
        while self._departed and (
            len(self._departed) > _DEPARTED or next(iter(self._departed.values())) < now
        ):
            self._departed.pop(next(iter(self._departed)))

    def probing(self, connection: QuicConnection) -> None:
        """The client moves, not we."""

    def silence(self, connection: QuicConnection, seconds: float) -> PathLost:
        raise NotImplementedError

    async def migrate(self, connection: QuicConnection) -> None:
        raise NotImplementedError
