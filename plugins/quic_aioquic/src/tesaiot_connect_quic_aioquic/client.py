"""The client half: from an endpoint's options to a connection whose handshake is behind it.

Owns: name resolution, tickets, and the words for what fails on the way. Rule: what fails leaves
neither a socket nor a task.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import functools
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

from aioquic.tls import SessionTicket

from tesaiot_connect import ClientCertificate, ConnectFailed, Disconnected, tcp

from .certificates import Trust, client_trust
from .configuration import configuration
from .connection import QuicConnection
from .dial import ClientEndpoint, resolve, unsupported_identity
from .endpoint import Budget, Tuning, Windows, address_text
from .explain import explain_silence
from .quic import Quic
from .tickets import TicketKey, Tickets, default_folder
from .udp import Address

if TYPE_CHECKING:
    from .transport import QuicAioquic


async def connect(recipe: QuicAioquic, *, identity: ClientCertificate | None, early: bytes) -> QuicConnection:
    """`early` goes out with the first packet where a ticket allows. Raises ConnectFailed, and
    Unsupported for a client certificate."""
    if identity is not None:
        raise unsupported_identity(recipe.place)
    trust = client_trust(recipe.tls)
    deadline = asyncio.get_running_loop().time() + recipe.connect_timeout
    addresses = await _resolve(recipe)
    key = TicketKey(
        recipe.url.host,
        recipe.port,
        server_name=_ascii(trust.server_name or recipe.url.host),
        identity=f"{trust.digest} {','.join(recipe.alpn)} {recipe.versions}",
    )
    tickets = Tickets(recipe.ticket_folder or default_folder())
    ticket = tickets.take(key)
    if ticket is not None and not (recipe.zero_rtt and early):
        ticket = dataclasses.replace(ticket, max_early_data_size=None)
    dial = functools.partial(_dial, recipe, trust=trust, deadline=deadline, key=key, tickets=tickets)
    first, *others = tcp.alternate(addresses)
    # early data goes to one address alone, and a ticket serves once
    attempts: list[Callable[[], Awaitable[QuicConnection]]] = [
        functools.partial(dial, *first, ticket=ticket, early=early),
        *(functools.partial(dial, *address) for address in others),
    ]
    try:
        return await tcp.race(
            attempts, recipe.attempt_delay, failure=ConnectFailed, discard=QuicConnection.abort
        )
    except ExceptionGroup as group:
        raise _failure(group) from group


def _ascii(name: str) -> str:
    """A host name as certificates have it (RFC 6125)."""
    try:
        return name.rstrip(".").encode("idna").decode() if not name.isascii() else name.rstrip(".")
    except UnicodeError as error:
        raise ConnectFailed(
            f"{name!r} is not a host name: {error}",
            fix="check the endpoint's host and `server_name`",
            stage="name",
        ) from error


async def _resolve(recipe: QuicAioquic) -> list[tuple[int, Address]]:
    try:
        async with asyncio.timeout(recipe.connect_timeout):
            return await resolve(recipe.url.host, recipe.port)
    except TimeoutError as error:
        raise ConnectFailed(
            f"the name {recipe.url.host} cannot be resolved: the name server does not answer",
            fix="check this machine's name server",
            stage="name",
        ) from error
    except (OSError, UnicodeError) as error:
        raise tcp.unresolved(recipe.url.host, error) from error


async def _dial(
    recipe: QuicAioquic,
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
    settings = configuration(recipe, is_client=True)
    settings.server_name = key.server_name
    settings.cafile = trust.cafile
    settings.capath = trust.capath
    settings.cadata = trust.cadata
    settings.verify_mode = trust.verify_mode
    settings.session_ticket = ticket
    quic = Quic(
        settings,
        Windows(recipe.stream_window, recipe.connection_window, 0),
        clock=asyncio.get_running_loop().time,
        key_update=recipe.key_update,
        session_ticket_handler=functools.partial(tickets.put, key),
    )
    try:
        endpoint = ClientEndpoint(
            family,
            address,
            local=(recipe.local_address, 0) if recipe.local_address else None,
            receive_buffer=recipe.socket_buffer,
            send_buffer=recipe.socket_buffer,
            offload=recipe.offload,
            verify=trust.verify_mode is not ssl.CERT_NONE,
        )
    except OSError as error:
        raise _no_socket(recipe, error, address) from error
    tuning = Tuning(
        place=recipe.place,
        send_buffer=recipe.send_buffer,
        handshake_timeout=max(0.1, deadline - asyncio.get_running_loop().time()),
        idle_timeout=settings.idle_timeout,
        keepalive=recipe.keepalive,
        path_timeout=recipe.path_timeout,
    )
    connection = endpoint.start(
        quic, tuning, Budget(4 * recipe.send_buffer + recipe.connection_window), early
    )
    try:
        await asyncio.shield(connection.handshake)
    except Disconnected as error:
        raise _unanswered(recipe, endpoint, connection, address, error) from error
    except BaseException:
        connection.abort()
        raise
    return connection


def _no_socket(recipe: QuicAioquic, error: OSError, address: Address) -> ConnectFailed:
    where = address_text(address)
    if recipe.local_address and error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
        return ConnectFailed(
            f"{recipe.place}: cannot connect from {recipe.local_address}",
            fix="local_address must be of this machine",
            stage="reach",
        )
    return ConnectFailed(
        f"{recipe.place}: no way to {where}: {error.strerror or error}",
        fix="check the network, the VPN and the address",
        stage="reach",
    )


def _unanswered(
    recipe: QuicAioquic,
    endpoint: ClientEndpoint,
    connection: QuicConnection,
    address: Address,
    error: Disconnected,
) -> ConnectFailed:
    stage: Literal["reach", "secure"] = "secure" if endpoint.received else "reach"
    if connection.timed_out or endpoint.refused:
        what, fix = explain_silence(
            sent=connection.quic.packets_sent,
            received=connection.quic.packets_received,
            path_mtu=endpoint.path_mtu,
            too_big=endpoint.too_big,
            refused=endpoint.refused,
            timeout=recipe.connect_timeout,
            datagram_size=recipe.max_datagram_size,
        )
        return ConnectFailed(f"{recipe.place} ({address_text(address)}): {what}", fix=fix, stage=stage)
    return ConnectFailed(error.what, fix=error.fix, stage=stage)


def _failure(group: ExceptionGroup[Exception]) -> ConnectFailed:
    errors = [error for error in group.exceptions if isinstance(error, ConnectFailed)]
    reasons = dict.fromkeys(error.what for error in errors)
    if len(reasons) == 1:
        return errors[0]
    fixes = dict.fromkeys(error.fix for error in errors if error.fix)
    furthest = max((error.stage for error in errors), key=ConnectFailed.STAGES.index)
    return ConnectFailed("; ".join(reasons), fix="; ".join(fixes), stage=furthest)
