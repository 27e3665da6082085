"""The recipe: dial or listen on TCP, with TLS where the scheme says so.

Owns: the endpoint's options, the order name -> TCP -> TLS, and the words for what fails on the
way. Rule: what `connect` returns is secured; what fails leaves neither a socket nor a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import attrs

from tesaiot_connect import (
    AsyncioStream,
    ClientCertificate,
    ConnectFailed,
    Connection,
    ConnectorError,
    Disconnected,
    Duration,
    Handler,
    Peer,
    ServerTls,
    StreamConnection,
    TlsOptions,
    Url,
    accepting,
    certificate_facts,
    explain_tls,
)

from .dial import Address, alternate, race, resolve, tune

NAME = "tcp_tls"
_DIAGNOSIS = 3.0  # seconds to find out what is wrong with a rejected certificate


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
        stage = "resolving"
        rejected: OSError
        try:
            async with asyncio.timeout(self.connect_timeout):
                addresses = await self._resolve()
                stage = "connecting"
                sock = await self._dial(addresses)
                address = (sock.family, sock.getpeername())
                stage = "handshake"
                try:
                    return await self._wrap(sock, context, accepted=False)
                except OSError as error:
                    rejected = error
        except TimeoutError as error:
            what, fix = _TIMEOUTS[stage]
            raise ConnectFailed(
                f"{self._place} gave no connection within {self.connect_timeout:g} s: {what}", fix=fix
            ) from error
        raise await self._tls_failure(rejected, address) from rejected

    async def _resolve(self) -> list[Address]:
        try:
            return await resolve(self.url.host, self.port)
        except OSError as error:
            raise ConnectFailed(
                f"the name {self.url.host} cannot be resolved: {error.strerror or error}",
                fix="check its spelling, the network and this machine's name server",
            ) from error

    async def _dial(self, addresses: Sequence[Address]) -> socket.socket:
        try:
            return await race(alternate(addresses), self._open, self.attempt_delay)
        except ExceptionGroup as group:
            errors = [error for error in group.exceptions if isinstance(error, OSError)]
            reasons = dict.fromkeys(_os_reason(error) for error in errors)
            what = "; ".join(dict.fromkeys(reason for reason, _ in reasons))
            fix = next((fix for _, fix in reasons if fix), "")
            raise ConnectFailed(f"{self._place} cannot be reached: {what}", fix=fix) from group

    async def _open(self, address: Address) -> socket.socket:
        family, where = address
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            self._tune(sock)
            if self.local_address is not None:
                sock.bind((self.local_address, 0))
            await asyncio.get_running_loop().sock_connect(sock, where)
        except OSError as error:
            sock.close()
            raise _Unreachable(error, _text(where), self.local_address) from error
        except BaseException:
            sock.close()
            raise
        return sock

    async def _wrap(
        self, sock: socket.socket, context: ssl.SSLContext | None, *, accepted: bool
    ) -> StreamConnection:
        """Owns the socket from here on. Raises OSError, ConnectFailed."""
        loop = asyncio.get_running_loop()
        where = _text(_remote(sock))
        silent = None
        if context is not None and not accepted:
            silent = Disconnected(
                f"{self._place} closed the connection right after the TLS handshake: it may require "
                "a client certificate, or not accept the one it was shown",
                fix='see auth = { type = "mtls", ... } on the connection, and the log of the server',
            )
        stream = AsyncioStream(explain=explain_tls, half_close=context is None, silent=silent)
        bounds: dict[str, Any] = {}
        if context is not None:
            bounds["ssl_shutdown_timeout"] = 5.0
            bounds["ssl_handshake_timeout"] = self.handshake_timeout if accepted else self.connect_timeout
        if accepted:
            making = loop.connect_accepted_socket(lambda: stream, sock, ssl=context, **bounds)
        else:
            name = (self.tls.server_name or self.url.host) if context else None
            making = loop.create_connection(
                lambda: stream, sock=sock, ssl=context, server_hostname=name, **bounds
            )
        await _to_its_end(loop.create_task(making), sock)
        try:
            peer = self._peer(stream, where, context)
        except ValueError:  # TLS broke since: a rejection may follow the handshake at once
            await stream.wait_gone()
            told = stream.error or Disconnected("the peer left right after the TLS handshake")
            raise ConnectFailed(f"{self._place}: {told.what}", fix=told.fix) from told
        return StreamConnection(stream, peer, accepted=accepted)

    def _peer(self, stream: AsyncioStream, where: str, context: ssl.SSLContext | None) -> Peer:
        tls = stream.transport.get_extra_info("ssl_object")
        if tls is None or context is None:
            return Peer(where, NAME)
        verified = context.verify_mode is not ssl.CERT_NONE
        return Peer(
            where,
            NAME,
            secure=True,
            alpn=tls.selected_alpn_protocol(),
            certificate=tls.getpeercert(binary_form=True) if verified else None,
        )

    async def _tls_failure(self, error: BaseException, address: Address) -> ConnectFailed:
        told = explain_tls(error)
        what = f"{self._place}: {told.what}"
        if isinstance(error, ssl.SSLCertVerificationError):
            facts = await self._diagnose(address)
            what += f" ({facts})" if facts else ""
        elif not isinstance(error, ssl.SSLError):
            what = f"{self._place} broke off the TLS handshake: {told.what}"
        return ConnectFailed(
            what,
            fix=told.fix or "check that the port speaks TLS, in a version that `minimum_version` allows",
        )

    async def _diagnose(self, address: Address) -> str:
        """Names and dates of a certificate that was rejected, "" where they cannot be had."""
        try:
            context = self.tls.diagnostic_context()
            async with asyncio.timeout(_DIAGNOSIS):
                connection = await self._wrap(await self._open(address), context, accepted=False)
        except (OSError, ConnectorError):
            return ""
        try:
            stream = await connection.open_stream()
            return certificate_facts(stream.transport.get_extra_info("peercert"))
        finally:
            connection.abort()

    # --- listener

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        """Raises ConnectorError where the address cannot be had or the certificate not read."""
        context = self._server_context()
        sockets = await self._bind()
        port = sockets[0].getsockname()[1]
        secure = functools.partial(self._accept, context)
        async with accepting(sockets, secure, handler):
            yield str(attrs.evolve(self.url, port=port))

    def _server_context(self) -> ssl.SSLContext | None:
        if not self.secure:
            return None
        if self.server_tls is None:
            raise ConnectorError(
                f"a listener on {self.url} needs a certificate",
                fix="set server_tls = { certificate = ..., key = ... }, or use mqtt:// without TLS",
            )
        return self.server_tls.server_context()

    async def _accept(self, context: ssl.SSLContext | None, sock: socket.socket) -> Connection:
        with contextlib.suppress(OSError):  # it may have left already; the handshake will say so
            self._tune(sock)
        where = _text(_remote(sock))
        try:
            return await self._wrap(sock, context, accepted=True)
        except OSError as error:
            told = explain_tls(error)
            raise ConnectorError(f"{where}: {told.what}", fix=told.fix) from error

    async def _bind(self) -> list[socket.socket]:
        """Listening sockets, one for each address, all on one port."""
        port = self.url.port
        with contextlib.ExitStack() as opened:
            sockets: list[socket.socket] = []
            for host in (self.url.host, *self.hosts):
                for family, where in await self._local(host, port):
                    sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    self._listen_on(sock, where[0], port, dual=host == "::" and not self.hosts)
                    port = sock.getsockname()[1]
                    sockets.append(sock)
            opened.pop_all()
        return sockets

    async def _local(self, host: str, port: int) -> list[Address]:
        try:
            found = await resolve(host, port)
        except OSError as error:
            raise ConnectorError(
                f"cannot listen on {host}: {error.strerror or error}",
                fix="use an address of this machine, 0.0.0.0 or [::]",
            ) from error
        return [address for address in found if address[0] in (socket.AF_INET, socket.AF_INET6)]

    def _listen_on(self, sock: socket.socket, host: str, port: int, *, dual: bool) -> None:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows: SO_REUSEADDR would share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        try:
            sock.bind((host, port))
            sock.listen(self.backlog)
        except OSError as error:
            place = f"{host}, port {port}" if port else host
            raise ConnectorError(
                f"cannot listen on {place}: {error.strerror or error}",
                fix=_BIND_FIXES.get(error.errno or 0, ""),
            ) from error

    # --- both

    def _tune(self, sock: socket.socket) -> None:
        tune(
            sock,
            nodelay=self.nodelay,
            idle=self.keepalive_idle,
            interval=self.keepalive_interval,
            count=self.keepalive_count,
        )

    @property
    def _place(self) -> str:
        return str(attrs.evolve(self.url, port=self.port))


class _Unreachable(OSError):
    """An OSError that knows its address."""

    def __init__(self, error: OSError, where: str, local: str | None) -> None:
        super().__init__(error.errno, error.strerror or str(error))
        self.where = where
        self.local = local


_TIMEOUTS = {
    "resolving": ("the name server does not answer", "check this machine's name server"),
    "connecting": (
        "no address answers",
        "check host and port, and whether a firewall on the way drops the packets",
    ),
    "handshake": (
        "the server accepted the connection but does not answer the TLS handshake",
        "check that the port speaks TLS (8883); a plain MQTT port (1883, mqtt://) never answers it",
    ),
}
_BIND_FIXES = {
    errno.EADDRINUSE: "another program listens there: stop it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have that address: use one it has, 0.0.0.0 or [::]",
    errno.EACCES: "ports below 1024 need privileges: choose a higher one",
}


def _os_reason(error: OSError) -> tuple[str, str]:
    where = getattr(error, "where", "it")
    number = error.errno
    if number == errno.ECONNREFUSED:
        return f"{where} refused", "nothing listens there: check the port and that the broker runs"
    if number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN):
        return f"{where} has no route", "check the network, the VPN and the address"
    if number == errno.ETIMEDOUT:
        return f"{where} did not answer", _TIMEOUTS["connecting"][1]
    if number in (errno.EADDRNOTAVAIL, errno.EINVAL) and getattr(error, "local", None):
        return f"cannot connect from {error.local}", "local_address must be of this machine"  # type: ignore[attr-defined]
    return f"{where}: {error.strerror or error}", ""


async def _to_its_end(making: asyncio.Task[Any], sock: socket.socket) -> None:
    """Await `making`, a connection over `sock`, which leaves nothing when it fails or is cancelled.

    Cancelling asyncio's own handshake in its first turn would leave it running, so a cancelled
    one is ended from below.
    """
    try:
        await asyncio.shield(making)
        return
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        await asyncio.wait([making])
        if not making.cancelled() and making.exception() is None:
            making.result()[0].abort()
        await _let_go(sock)
        raise
    except OSError:
        await _let_go(sock)
        raise


async def _let_go(sock: socket.socket) -> None:
    """Wait until the failed transport closed its socket.

    uvloop forgets to tell the socket object when the peer leaves in the first turn: the
    descriptor is closed, and may be another connection's soon, so the object must not close it.
    """
    for _ in range(5):
        if sock.fileno() < 0:
            return
        await asyncio.sleep(0)
    sock.detach()


def _remote(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()
    except OSError:  # it left already
        return ("?", 0)


def _text(where: Any) -> str:
    host, port = where[0].removeprefix("::ffff:"), where[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listed(addresses: Sequence[Address]) -> str:
    return ", ".join(_text(where) for _, where in addresses)
