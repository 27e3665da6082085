"""The recipe: dial or listen with MQTT over QUIC.

Owns: the endpoint's options, and the words for what fails on the way. Rule: what `connect`
returns has its handshake behind it; what fails leaves neither a socket nor a task.
"""

from __future__ import annotations

# ruff: noqa: RUF009 - `_option` is attrs.field
import asyncio
import contextlib
import dataclasses
import errno
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import SessionTicket

from tesaiot_connect import (
    BoundUrl,
    ClientCertificate,
    ConnectFailed,
    Connection,
    ConnectorError,
    Disconnected,
    Duration,
    Handler,
    ServerTls,
    Size,
    TlsOptions,
    Url,
    serving,
)

from .certificates import ServerIdentity, Trust, client_trust
from .connection import QuicConnection
from .dial import ClientEndpoint, alternate, race, resolve, unsupported_identity
from .endpoint import Budget, Tuning, Windows, address_text
from .explain import explain_silence
from .issued import IssuedTickets
from .listener import CONNECTION_ID, Limits, ServerEndpoint
from .qlog import QlogFolder
from .quic import Quic
from .tickets import TicketKey, Tickets, default_folder
from .udp import Address, UdpSocket, open_socket

_VERSIONS = {1: QuicProtocolVersion.VERSION_1, 2: QuicProtocolVersion.VERSION_2}
_CLIENT_IDLE = 45.0
_LISTENER_IDLE = 3600.0
_TICKETS = 100_000
_TICKETS_IN_MEMORY = 10_000  # about 1 KB each


def _option(default: Any, text: str, **more: Any) -> Any:
    return attrs.field(default=default, kw_only=True, metadata={"help": text}, **more)


def _versions(_instance: Any, _field: Any, value: tuple[int, ...]) -> None:
    if not value or not set(value) <= set(_VERSIONS):
        raise ValueError(f"versions must be of {sorted(_VERSIONS)}, not {list(value)}")


def _datagram(_instance: Any, _field: Any, value: int) -> None:
    if not 1200 <= value <= 16_000:
        raise ValueError(f"max_datagram_size must be from 1200 to 16000 bytes, not {value}")


def _some(_instance: Any, field: Any, value: Any) -> None:
    if not value or (isinstance(value, int) and value < 0):
        raise ValueError(f"{field.name} must be more than nothing")


@attrs.frozen
class QuicAioquic:
    """`quic://host:14567`: MQTT over QUIC, TLS 1.3 included, with as many streams as the client opens."""

    schemes: ClassVar[Mapping[str, int]] = {"quic": 14567}
    rank: ClassVar[int] = 100
    races: ClassVar[bool] = True

    url: Url
    tls: TlsOptions = attrs.field(factory=TlsOptions, kw_only=True)
    connect_timeout: Duration = _option(Duration(5.0), "For name resolution and the handshake.")
    alpn: tuple[str, ...] = _option(
        ("mqtt",), "Application protocols to offer, or to accept on a listener.", validator=_some
    )
    zero_rtt: bool = _option(
        True,
        "Send CONNECT with the first packet where an earlier connection left a ticket (0-RTT). On a "
        "listener: accept that. Each ticket serves once.",
    )
    ticket_folder: Path | None = _option(
        None,
        "Where a client keeps its session tickets. Default: the user's state folder.",
        converter=attrs.converters.optional(Path),
    )
    congestion_control: Literal["reno", "cubic"] = _option(
        "cubic", "Congestion control of what this side sends."
    )
    max_datagram_size: Size = _option(
        Size(1200),
        "UDP payload to send, in bytes. 1200 passes everywhere; up to 1452 saves CPU where the path "
        "carries 1500-byte packets. There is no path MTU discovery.",
        validator=_datagram,
    )
    versions: tuple[int, ...] = _option(
        (1, 2), "QUIC versions, the preferred one first.", validator=_versions
    )
    idle_timeout: Duration | None = _option(
        None,
        "Silence after which the connection is given up, without a word. Default: 45s for a client; "
        "for a listener 1h until CONNECT, then 1.5 times the MQTT keepalive.",
    )
    keepalive: Duration = _option(
        Duration(15.0),
        "Client: silence after which a QUIC PING goes out, which keeps NATs open too; 0s never.",
    )
    path_timeout: Duration = _option(
        Duration(12.0),
        "Client: packets unanswered for so long end the connection; 0s leaves that to idle_timeout.",
    )
    attempt_delay: Duration = _option(
        Duration(0.25), "Client: head start of each address of a name over the next (RFC 8305)."
    )
    local_address: str | None = _option(None, "Client: address to connect from.")
    stream_window: Size = _option(
        Size(256 * 1024), "Bytes that the peer may send ahead on one stream.", validator=_some
    )
    connection_window: Size = _option(
        Size(1024 * 1024), "Bytes that the peer may send ahead on all streams.", validator=_some
    )
    send_buffer: Size = _option(
        Size(1024 * 1024),
        "Bytes of one stream that may be unacknowledged before sending waits; four times that for all "
        "streams. At least bandwidth times round trip.",
        validator=_some,
    )
    socket_buffer: Size = _option(
        Size(4 * 1024 * 1024), "Buffers of the socket, as far as the system allows.", validator=_some
    )
    offload: bool = _option(
        True, "Let the kernel split and join datagrams (GSO, GRO) where it can. false: one call for each."
    )
    key_update: int = _option(4_000_000, "Packets after which the encryption keys are renewed; 0 never.")
    qlog_folder: Path | None = _option(
        None,
        "Write what happens on each connection into this folder, as qlog. For diagnosis: it costs a lot.",
        converter=attrs.converters.optional(Path),
    )
    hosts: tuple[str, ...] = _option((), "Listener: more addresses to listen on, on the same port.")
    max_connections: int = _option(10_000, "Listener: connections at a time.", validator=_some)
    max_handshakes: int = _option(1_000, "Listener: handshakes under way at a time.", validator=_some)
    max_streams: int = _option(
        16, "Listener: streams that a client may have open; the broker's own limit is lower.", validator=_some
    )
    handshake_timeout: Duration = _option(Duration(10.0), "Listener: time a client has for its handshake.")
    memory: Size = _option(
        Size(256 * 1024 * 1024),
        "Listener: bytes that all connections may hold unread or unacknowledged. Beyond it nobody new is "
        "taken, and each stream may hold 16 KiB.",
        validator=_some,
    )
    retry: Literal["auto", "always", "never"] = _option(
        "auto",
        "Listener: make clients prove their address first (RFC 9000 section 8.1), one round trip more; "
        "auto does so from `retry_above` handshakes on.",
    )
    retry_above: int = _option(100, "Listener: handshakes under way from which `retry = 'auto'` validates.")
    state_file: Path | None = _option(
        None,
        "Listener: SQLite file of the tickets given out, so that resumption survives a restart and a "
        "ticket serves once over all processes. Default: in memory.",
        converter=attrs.converters.optional(Path),
    )
    server_tls: ServerTls | None = _option(None, "Listener: certificate and key.")

    @property
    def secure(self) -> bool:
        return True

    @property
    def port(self) -> int:
        return self.url.port or self.schemes[self.url.scheme]

    @property
    def _place(self) -> str:
        return str(attrs.evolve(self.url, port=self.port))

    # --- client

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """`early` goes out with the first packet where a ticket allows. Raises ConnectFailed, and
        Unsupported for a client certificate."""
        if identity is not None:
            raise unsupported_identity(self._place)
        trust = client_trust(self.tls)
        deadline = asyncio.get_running_loop().time() + self.connect_timeout
        addresses = await self._resolve()
        key = TicketKey(
            self.url.host,
            self.port,
            server_name=self._ascii(trust.server_name or self.url.host),
            identity=f"{trust.digest} {','.join(self.alpn)} {self.versions}",
        )
        tickets = Tickets(self.ticket_folder or default_folder())
        ticket = tickets.take(key)
        if ticket is not None and not (self.zero_rtt and early):
            ticket = dataclasses.replace(ticket, max_early_data_size=None)
        dial = functools.partial(self._dial, trust=trust, deadline=deadline, key=key, tickets=tickets)
        first, *others = alternate(addresses)
        # early data goes to one address alone, and a ticket serves once
        attempts: list[Callable[[], Awaitable[QuicConnection]]] = [
            functools.partial(dial, *first, ticket=ticket, early=early),
            *(functools.partial(dial, *address) for address in others),
        ]
        try:
            return await race(attempts, self.attempt_delay)
        except ExceptionGroup as group:
            raise self._failure(group) from group

    def _ascii(self, name: str) -> str:
        """A host name as certificates have it (RFC 6125)."""
        try:
            return name.rstrip(".").encode("idna").decode() if not name.isascii() else name.rstrip(".")
        except UnicodeError as error:
            raise ConnectFailed(
                f"{name!r} is not a host name: {error}", fix="check the endpoint's host and `server_name`"
            ) from error

    async def _resolve(self) -> list[tuple[int, Address]]:
        try:
            async with asyncio.timeout(self.connect_timeout):
                return await resolve(self.url.host, self.port)
        except TimeoutError as error:
            raise ConnectFailed(
                f"the name {self.url.host} cannot be resolved: the name server does not answer",
                fix="check this machine's name server",
            ) from error
        except (OSError, UnicodeError) as error:  # the latter for labels that are empty or too long
            text = getattr(error, "strerror", None) or "it is not a host name"
            raise ConnectFailed(
                f"the name {self.url.host} cannot be resolved: {text}",
                fix="check its spelling, the network and this machine's name server",
            ) from error

    async def _dial(
        self,
        family: int,
        address: Address,
        *,
        trust: Trust,
        deadline: float,
        key: TicketKey,
        tickets: Tickets,
        ticket: SessionTicket | None = None,
        early: bytes = b"",
    ) -> QuicConnection:
        configuration = self._configuration(is_client=True)
        configuration.server_name = key.server_name
        configuration.cafile = trust.cafile
        configuration.capath = trust.capath
        configuration.cadata = trust.cadata
        configuration.verify_mode = trust.verify_mode
        configuration.session_ticket = ticket
        quic = Quic(
            configuration,
            Windows(self.stream_window, self.connection_window, 0),
            clock=asyncio.get_running_loop().time,
            key_update=self.key_update,
            session_ticket_handler=functools.partial(tickets.put, key),
        )
        try:
            endpoint = ClientEndpoint(
                family,
                address,
                local=(self.local_address, 0) if self.local_address else None,
                receive_buffer=self.socket_buffer,
                send_buffer=self.socket_buffer,
                offload=self.offload,
                verify=trust.verify_mode is not ssl.CERT_NONE,
            )
        except OSError as error:
            raise self._no_socket(error, address) from error
        tuning = Tuning(
            place=self._place,
            send_buffer=self.send_buffer,
            handshake_timeout=max(0.1, deadline - asyncio.get_running_loop().time()),
            idle_timeout=configuration.idle_timeout,
            keepalive=self.keepalive,
            path_timeout=self.path_timeout,
        )
        connection = endpoint.start(
            quic, tuning, Budget(4 * self.send_buffer + self.connection_window), early
        )
        try:
            await asyncio.shield(connection.handshake)
        except Disconnected as error:
            raise self._unanswered(endpoint, connection, address, error) from error
        except BaseException:
            connection.abort()
            raise
        return connection

    def _configuration(self, *, is_client: bool) -> QuicConfiguration:
        idle = self.idle_timeout
        if idle is None:
            idle = Duration(_CLIENT_IDLE if is_client else _LISTENER_IDLE)
        try:
            qlog = QlogFolder(self.qlog_folder) if self.qlog_folder is not None else None
        except OSError as error:
            raise ConnectFailed(
                f"the qlog folder {self.qlog_folder} cannot be used: {error.strerror}",
                fix="choose a folder that this program may write to, or leave out `qlog_folder`",
            ) from error
        return QuicConfiguration(
            is_client=is_client,
            alpn_protocols=list(self.alpn),
            congestion_control_algorithm=self.congestion_control,
            connection_id_length=CONNECTION_ID,
            idle_timeout=idle,
            max_data=self.connection_window,
            max_stream_data=self.stream_window,
            max_datagram_size=self.max_datagram_size,
            quic_logger=qlog,
            supported_versions=[_VERSIONS[one] for one in self.versions],
        )

    def _no_socket(self, error: OSError, address: Address) -> ConnectFailed:
        where = address_text(address)
        if self.local_address and error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            return ConnectFailed(
                f"{self._place}: cannot connect from {self.local_address}",
                fix="local_address must be of this machine",
            )
        return ConnectFailed(
            f"{self._place}: no way to {where}: {error.strerror or error}",
            fix="check the network, the VPN and the address",
        )

    def _unanswered(
        self, endpoint: ClientEndpoint, connection: QuicConnection, address: Address, error: Disconnected
    ) -> ConnectFailed:
        if connection.timed_out or endpoint.refused:
            what, fix = explain_silence(
                sent=connection.quic.packets_sent,
                received=connection.quic.packets_received,
                path_mtu=endpoint.path_mtu,
                too_big=endpoint.too_big,
                refused=endpoint.refused,
                timeout=self.connect_timeout,
                datagram_size=self.max_datagram_size,
            )
            return ConnectFailed(f"{self._place} ({address_text(address)}): {what}", fix=fix)
        return ConnectFailed(error.what, fix=error.fix)

    def _failure(self, group: ExceptionGroup[Exception]) -> BaseException:
        errors = [error for error in group.exceptions if isinstance(error, ConnectorError)]
        others = [error for error in group.exceptions if not isinstance(error, ConnectorError)]
        if others:
            return others[0]
        reasons = dict.fromkeys(error.what for error in errors)
        if len(reasons) == 1:
            return errors[0]
        fixes = dict.fromkeys(error.fix for error in errors if error.fix)
        return ConnectFailed("; ".join(reasons), fix="; ".join(fixes))

    # --- listener

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        """Gives a `BoundUrl`. Raises ConnectorError where the address cannot be had or the
        certificate not read."""
        if self.server_tls is None:
            raise ConnectorError(
                f"a listener on {self.url} needs a certificate",
                fix="set server_tls = { certificate = ..., key = ... }: QUIC is always encrypted",
            )
        identity = ServerIdentity(self.server_tls)
        configuration = self._configuration(is_client=False)
        identity.apply(configuration)
        with contextlib.ExitStack() as stack:
            # accepted early data must not meet smaller limits than it was promised (RFC 9000 7.4.1)
            scope = f"{self.alpn} {self.stream_window} {self.connection_window} {self.max_streams}"
            limit = _TICKETS if self.state_file is not None else _TICKETS_IN_MEMORY
            tickets = IssuedTickets(self.state_file, scope=scope, limit=limit)
            stack.callback(tickets.close)
            sockets = await self._bind()
            port = sockets[0].getsockname()[1]
            async with serving(handler) as start:
                endpoint = ServerEndpoint(
                    configuration=configuration,
                    identity=identity,
                    tickets=tickets,
                    windows=Windows(self.stream_window, self.connection_window, self.max_streams),
                    limits=Limits(self.max_connections, self.max_handshakes, self.retry, self.retry_above),
                    tuning=Tuning(
                        place="",
                        send_buffer=self.send_buffer,
                        handshake_timeout=self.handshake_timeout,
                        idle_timeout=configuration.idle_timeout,
                    ),
                    memory=self.memory,
                    early_data=self.zero_rtt,
                    key_update=self.key_update,
                    accept=lambda connection: start(functools.partial(_itself, connection)),
                )
                stack.callback(endpoint.close)
                for sock in sockets:
                    endpoint.add(UdpSocket(sock, offload=self.offload))
                try:
                    yield BoundUrl(str(attrs.evolve(self.url, port=port)), endpoint.status)
                finally:
                    endpoint.refuse_new()

    async def _bind(self) -> list[socket.socket]:
        """One socket for each address, all on one port."""
        port = self.url.port
        with contextlib.ExitStack() as opened:
            sockets: list[socket.socket] = []
            for host in (self.url.host, *self.hosts):
                try:
                    found = await resolve(host, port)
                except (OSError, UnicodeError) as error:
                    text = getattr(error, "strerror", None) or "it is not a host name"
                    raise ConnectorError(
                        f"cannot listen on {host}: {text}",
                        fix="use an address of this machine, 0.0.0.0 or [::]",
                    ) from error
                for family, address in found:
                    dual = host == "::" and not self.hosts
                    sockets.append(opened.enter_context(self._listen_on(family, address[0], port, dual)))
                    port = sockets[-1].getsockname()[1]
            opened.pop_all()
        return sockets

    def _listen_on(self, family: int, host: str, port: int, dual: bool) -> socket.socket:
        try:
            return open_socket(
                family,
                local=(host, port),
                remote=None,
                receive_buffer=self.socket_buffer,
                send_buffer=self.socket_buffer,
                v6only=not dual if family == socket.AF_INET6 else None,
            )
        except OSError as error:
            place = f"{host}, UDP port {port}" if port else host
            raise ConnectorError(
                f"cannot listen on {place}: {error.strerror or error}",
                fix=_BIND_FIXES.get(error.errno or 0, ""),
            ) from error


_BIND_FIXES = {
    errno.EADDRINUSE: "another program listens there: stop it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have that address: use one it has, 0.0.0.0 or [::]",
    errno.EACCES: "ports below 1024 need privileges: choose a higher one",
}


async def _itself(connection: QuicConnection) -> Connection:
    return connection
