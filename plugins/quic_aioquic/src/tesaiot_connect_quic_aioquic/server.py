"""The listening half: from an endpoint's options to sockets that are served.

Owns: the sockets' addresses, and the words for those that cannot be had. Rule: leaving closes
everything.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs

from tesaiot_connect import BoundUrl, Connection, ConnectorError, Handler, serving

from .certificates import ServerIdentity
from .configuration import configuration
from .connection import QuicConnection
from .dial import resolve
from .endpoint import Tuning, Windows
from .issued import IssuedTickets
from .listener import Limits, ServerEndpoint
from .udp import Address, UdpSocket, open_socket

if TYPE_CHECKING:
    from .transport import QuicAioquic

_TICKETS = 100_000
_TICKETS_IN_MEMORY = 10_000  # about 1 KB each

_BIND_FIXES = {
    errno.EADDRINUSE: "another program listens there: stop it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have that address: use one it has, 0.0.0.0 or [::]",
    errno.EACCES: "ports below 1024 need privileges: choose a higher one",
}


@asynccontextmanager
async def listen(recipe: QuicAioquic, handler: Handler) -> AsyncIterator[str]:
    """Gives a `BoundUrl`. Raises ConnectorError where the address cannot be had or the
    certificate not read."""
    if recipe.server_tls is None:
        raise ConnectorError(
            f"a listener on {recipe.url} needs a certificate",
            fix="set server_tls = { certificate = ..., key = ... }: QUIC is always encrypted",
        )
    identity = ServerIdentity(recipe.server_tls)
    settings = configuration(recipe, is_client=False)
    identity.apply(settings)
    with contextlib.ExitStack() as stack:
        # accepted early data must not meet smaller limits than it was promised (RFC 9000 7.4.1)
        scope = f"{recipe.alpn} {recipe.stream_window} {recipe.connection_window} {recipe.max_streams}"
        limit = _TICKETS if recipe.state_file is not None else _TICKETS_IN_MEMORY
        tickets = IssuedTickets(recipe.state_file, scope=scope, limit=limit)
        stack.callback(tickets.close)
        sockets = await _bind(recipe)
        port = sockets[0].getsockname()[1]
        async with serving(handler) as start:
            endpoint = ServerEndpoint(
                configuration=settings,
                identity=identity,
                tickets=tickets,
                windows=Windows(recipe.stream_window, recipe.connection_window, recipe.max_streams),
                limits=Limits(
                    recipe.max_connections, recipe.max_handshakes, recipe.retry, recipe.retry_above
                ),
                tuning=Tuning(
                    place="",
                    send_buffer=recipe.send_buffer,
                    handshake_timeout=recipe.handshake_timeout,
                    idle_timeout=settings.idle_timeout,
                ),
                memory=recipe.memory,
                early_data=recipe.zero_rtt,
                key_update=recipe.key_update,
                accept=lambda connection: start(functools.partial(_itself, connection)),
            )
            stack.callback(endpoint.close)
            for sock in sockets:
                endpoint.add(UdpSocket(sock, offload=recipe.offload))
            try:
                yield BoundUrl(str(attrs.evolve(recipe.url, port=port)), endpoint.status)
            finally:
                endpoint.refuse_new()


async def _bind(recipe: QuicAioquic) -> list[socket.socket]:
    """One socket for each address, all on one port."""
    port = recipe.url.port
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for host in (recipe.url.host, *recipe.hosts):
            try:
                found = await resolve(host, port)
            except (OSError, UnicodeError) as error:
                text = getattr(error, "strerror", None) or "it is not a host name"
                raise ConnectorError(
                    f"cannot listen on {host}: {text}",
                    fix="use an address of this machine, 0.0.0.0 or [::]",
                ) from error
            for family, address in found:
                dual = host == "::" and not recipe.hosts
                sockets.append(opened.enter_context(_listen_on(recipe, family, address, port, dual)))
                port = sockets[-1].getsockname()[1]
        opened.pop_all()
    return sockets


def _listen_on(recipe: QuicAioquic, family: int, address: Address, port: int, dual: bool) -> socket.socket:
    try:
        return open_socket(
            family,
            local=(address[0], port, *address[2:]),  # with the scope of a link-local one
            remote=None,
            receive_buffer=recipe.socket_buffer,
            send_buffer=recipe.socket_buffer,
            v6only=not dual if family == socket.AF_INET6 else None,
        )
    except OSError as error:
        place = f"{address[0]}, UDP port {port}" if port else address[0]
        raise ConnectorError(
            f"cannot listen on {place}: {error.strerror or error}",
            fix=_BIND_FIXES.get(error.errno or 0, ""),
        ) from error


async def _itself(connection: QuicConnection) -> Connection:
    return connection
