"""One TCP connection, with TLS where asked: what the transports over TCP have in common.

Owns: the race of addresses (RFC 8305, "happy eyeballs"), socket options, listening sockets, the order
name -> TCP -> TLS, and the words for what fails on that way. Rule: one secured connection comes out, or
an error that says what to do; every other socket and task is gone before it does.

A recipe over TCP has the fields of `TcpRecipe`; its `connect` and `listen` are a few calls of this room.
asyncio's own `happy_eyeballs_delay` is missing from uvloop, so the race is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import attrs

from . import errors
from .errors import ConnectFailed, ConnectorError, Disconnected
from .protocols import Duration, Peer, Url
from .streams import AsyncioStream, to_its_end
from .tls import _NOT_TLS, ServerTls, TlsOptions, certificate_facts, explain_tls

T = TypeVar("T")
Address = tuple[int, Any]
"""Address family and the address as `socket.connect` takes it."""
_DIAGNOSIS = 3.0  # seconds to find out what is wrong with a rejected certificate


class TcpRecipe(Protocol):
    """The fields that recipes over TCP share, by these names. `port` is the URL's or the scheme's."""

    schemes: ClassVar[Any]

    @property
    def url(self) -> Url: ...
    @property
    def port(self) -> int: ...
    @property
    def secure(self) -> bool: ...
    @property
    def tls(self) -> TlsOptions: ...
    @property
    def connect_timeout(self) -> Duration: ...
    @property
    def nodelay(self) -> bool: ...
    @property
    def keepalive_idle(self) -> Duration: ...
    @property
    def keepalive_interval(self) -> Duration: ...
    @property
    def keepalive_count(self) -> int: ...
    @property
    def attempt_delay(self) -> Duration: ...
    @property
    def local_address(self) -> str | None: ...
    @property
    def hosts(self) -> tuple[str, ...]: ...
    @property
    def backlog(self) -> int: ...
    @property
    def handshake_timeout(self) -> Duration: ...
    @property
    def server_tls(self) -> ServerTls | None: ...


class Stage(NamedTuple):
    """A part of the way to a connection, for the words of a timeout in it."""

    silence: str
    fix: str
    stage: errors.Stage
    """That of `ConnectFailed`."""


RESOLVING = Stage("the name server does not answer", "check this machine's name server", "name")
CONNECTING = Stage(
    "no address answers", "check host and port, and whether a firewall on the way drops the packets", "reach"
)


@attrs.define
class Progress:
    """Where a connect is."""

    stage: Stage = RESOLVING


class Wrapped(Protocol):
    """What sits on the socket: an `AsyncioStream`, or a protocol with one on top."""

    @property
    def error(self) -> Disconnected | None: ...
    async def wait_gone(self) -> None: ...


# --- addresses ----------------------------------------------------------------------------


async def resolve(host: str, port: int) -> list[Address]:
    """In the system's order of preference (RFC 6724). Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def unresolved(host: str, error: OSError | UnicodeError) -> ConnectFailed:
    """What to raise for a name that has no address; UnicodeError is for labels that are empty or too long."""
    text = getattr(error, "strerror", None) or "it is not a host name"
    return ConnectFailed(
        f"the name {host} cannot be resolved: {text}",
        fix="check its spelling, the network and this machine's name server",
        stage="name",
    )


def alternate(addresses: Sequence[Address]) -> list[Address]:
    """The families in turn, the preferred one first (RFC 8305 section 4)."""
    families = dict.fromkeys(family for family, _ in addresses)
    columns = [[a for a in addresses if a[0] == family] for family in families]
    return [a for row in itertools.zip_longest(*columns) for a in row if a is not None]


async def race(
    attempts: Sequence[Callable[[], Awaitable[T]]],
    delay: float,
    *,
    failure: type[Exception],
    discard: Callable[[T], object],
) -> T:
    """What the first attempt that succeeds gives. `delay` is the head start of each, in seconds; `discard`
    gets what a second one gave at the same moment.

    Raises an ExceptionGroup with the `failure` of each attempt, in their order, when none succeeds; any
    other error at once.
    """
    waiting = deque(attempts)
    started: list[asyncio.Task[T]] = []
    running: set[asyncio.Task[T]] = set()

    async def run(attempt: Callable[[], Awaitable[T]]) -> T:
        return await attempt()

    try:
        while waiting or running:
            if waiting:
                started.append(asyncio.create_task(run(waiting.popleft())))
                running.add(started[-1])
            done, _ = await asyncio.wait(
                running, timeout=delay if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                running.discard(task)
                error = task.exception()
                if error is None:
                    # should two succeed at once, the other one is still in `running`
                    return task.result()
                if not isinstance(error, failure):
                    raise error
    finally:
        for task in running:
            task.cancel()
        try:
            await asyncio.gather(*running, return_exceptions=True)
        finally:  # which is cancelled itself, perhaps
            for task in running:
                if not task.cancelled() and task.exception() is None:
                    discard(task.result())
    failed = [error for task in started if isinstance(error := task.exception(), failure)]
    raise ExceptionGroup("no address gave a connection", failed)


def address_text(where: Any) -> str:
    """ "host:port" of a socket's address, IPv6 in brackets, IPv4 without its IPv6 coat."""
    host, port = where[0].removeprefix("::ffff:"), where[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def remote_address(sock: socket.socket) -> str:
    try:
        return address_text(sock.getpeername())
    except OSError:  # it left already
        return "?:0"


def place(recipe: TcpRecipe) -> str:
    """The endpoint with its port, for messages."""
    return str(attrs.evolve(recipe.url, port=recipe.port))


# --- sockets ------------------------------------------------------------------------------


def tune(sock: socket.socket, *, nodelay: bool, idle: float, interval: float, count: int) -> None:
    """Socket options of a connection; those the system does not have are left out.

    With keepalive on, data that stays unacknowledged as long as a silent path would be
    noticed breaks the connection too (TCP_USER_TIMEOUT, RFC 5482).
    """
    if nodelay:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if idle <= 0:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = {
        "TCP_KEEPIDLE": idle,
        "TCP_KEEPALIVE": idle,  # its name on macOS
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": count,
        "TCP_USER_TIMEOUT": (idle + interval * count) * 1000,
    }
    for name, value in seconds.items():
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, max(1, int(value)))


def tune_socket(recipe: TcpRecipe, sock: socket.socket) -> None:
    tune(
        sock,
        nodelay=recipe.nodelay,
        idle=recipe.keepalive_idle,
        interval=recipe.keepalive_interval,
        count=recipe.keepalive_count,
    )


async def open_socket(recipe: TcpRecipe, address: Address) -> socket.socket:
    """Raises OSError, which knows its address."""
    family, where = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune_socket(recipe, sock)
        if recipe.local_address is not None:
            sock.bind((recipe.local_address, 0))
        await asyncio.get_running_loop().sock_connect(sock, where)
    except OSError as error:
        sock.close()
        raise _Unreachable(error, address_text(where), recipe.local_address) from error
    except BaseException:
        sock.close()
        raise
    return sock


async def dial(recipe: TcpRecipe, progress: Progress, host: str, port: int, what: str) -> socket.socket:
    """The socket of the first address that answers. Raises ConnectFailed; `what` names the place in it."""
    progress.stage = RESOLVING
    try:
        addresses = await resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise unresolved(host, error) from error
    progress.stage = CONNECTING
    try:
        attempts = [partial(open_socket, recipe, address) for address in alternate(addresses)]
        return await race(attempts, recipe.attempt_delay, failure=OSError, discard=socket.socket.close)
    except ExceptionGroup as group:
        found = [error for error in group.exceptions if isinstance(error, OSError)]
        reasons = dict.fromkeys(_os_reason(error) for error in found)
        told = "; ".join(dict.fromkeys(reason for reason, _ in reasons))
        fix = next((fix for _, fix in reasons if fix), "")
        raise ConnectFailed(f"{what} cannot be reached: {told}", fix=fix, stage="reach") from group


# --- a client's connection ----------------------------------------------------------------


async def connect(
    recipe: TcpRecipe,
    *,
    name: str,
    context: ssl.SSLContext | None,
    protocol: Callable[[], Wrapped],
    finish: Callable[[Any, Peer, Progress], Awaitable[T]],
    handshake: Stage,
    not_tls: str = "",
    tunnel: Callable[[Progress], Awaitable[socket.socket]] | None = None,
) -> T:
    """Name, TCP, TLS, and then `finish(protocol, peer, progress)`, all within `connect_timeout`.

    `tunnel` opens the socket where it is not dialled straight. `handshake` is what a silent TLS handshake
    means, `not_tls` what to do where the port speaks something else. From `finish` on, the connection is
    its own to end. Raises ConnectFailed.
    """
    where, progress = place(recipe), Progress()
    rejected: OSError
    again: Callable[[], Awaitable[socket.socket]]
    try:
        async with asyncio.timeout(recipe.connect_timeout):
            if tunnel is not None:
                sock = await tunnel(progress)
                again = partial(tunnel, Progress())
            else:
                sock = await dial(recipe, progress, recipe.url.host, recipe.port, where)
                again = _again(recipe, sock)
            progress.stage = handshake
            made = protocol()
            try:
                peer = await wrap(recipe, name, sock, context, made, accepted=False)
            except OSError as error:
                rejected = error
            else:
                return await finish(made, peer, progress)
    except TimeoutError as error:
        what, fix, stage = progress.stage
        raise ConnectFailed(
            f"{where} gave no connection within {recipe.connect_timeout:g} s: {what}", fix=fix, stage=stage
        ) from error
    raise await _tls_failure(recipe, rejected, again, not_tls) from rejected


def _again(recipe: TcpRecipe, sock: socket.socket) -> Callable[[], Awaitable[socket.socket]]:
    """Another socket to where this one went, as far as it still tells: the peer may have left already."""
    try:
        return partial(open_socket, recipe, (sock.family, sock.getpeername()))
    except OSError:
        return partial(dial, recipe, Progress(), recipe.url.host, recipe.port, place(recipe))


def silent(recipe: TcpRecipe) -> Disconnected:
    """What it means that a server left after the TLS handshake, before it sent a byte (TLS 1.3)."""
    return Disconnected(
        f"{place(recipe)} closed the connection right after the TLS handshake: it may require "
        "a client certificate, or not accept the one it was shown",
        fix=f"check that this port speaks {recipe.url.scheme}://; see "
        'auth = { type = "mtls", ... } on the connection, and the log of the server',
    )


async def wrap(
    recipe: TcpRecipe,
    name: str,
    sock: socket.socket,
    context: ssl.SSLContext | None,
    protocol: Wrapped,
    *,
    accepted: bool,
) -> Peer:
    """Puts `protocol`, an asyncio.Protocol, on the socket, over TLS where there is a context.

    Owns the socket from here on. Raises OSError, ConnectFailed.
    """
    loop = asyncio.get_running_loop()
    where = remote_address(sock)
    bounds: dict[str, Any] = {}
    if context is not None:
        bounds["ssl_shutdown_timeout"] = 5.0
        bounds["ssl_handshake_timeout"] = recipe.handshake_timeout if accepted else recipe.connect_timeout
    making: Any
    if accepted:
        making = loop.connect_accepted_socket(lambda: protocol, sock, ssl=context, **bounds)
    else:
        server_name = (recipe.tls.server_name or recipe.url.host) if context else None
        making = loop.create_connection(
            lambda: protocol,
            sock=sock,
            ssl=context,
            server_hostname=server_name,
            **bounds,
        )
    transport = await to_its_end(loop.create_task(making), sock)
    try:
        return _peer(transport, where, name, context)
    except ValueError:  # TLS broke since: a rejection may follow the handshake at once
        await protocol.wait_gone()
        told = protocol.error or Disconnected("the peer left right after the TLS handshake")
        raise ConnectFailed(f"{place(recipe)}: {told.what}", fix=told.fix, stage="secure") from told


def _peer(transport: asyncio.Transport, where: str, name: str, context: ssl.SSLContext | None) -> Peer:
    tls = transport.get_extra_info("ssl_object")
    if tls is None or context is None:
        return Peer(where, name)
    verified = context.verify_mode is not ssl.CERT_NONE
    return Peer(
        where,
        name,
        secure=True,
        alpn=tls.selected_alpn_protocol(),
        certificate=tls.getpeercert(binary_form=True) if verified else None,
        tls_version=tls.version(),
    )


async def _tls_failure(
    recipe: TcpRecipe, error: OSError, again: Callable[[], Awaitable[socket.socket]], not_tls: str
) -> ConnectFailed:
    told = explain_tls(error)
    what, fix = f"{place(recipe)}: {told.what}", told.fix
    if isinstance(error, ssl.SSLCertVerificationError):
        facts = await _diagnose(recipe, again)
        what += f" ({facts})" if facts else ""
    elif not isinstance(error, ssl.SSLError):
        what = f"{place(recipe)} broke off the TLS handshake: {told.what}"
    elif error.reason in _NOT_TLS:
        fix = not_tls or fix
    return ConnectFailed(
        what,
        fix=fix or "check that the port speaks TLS, in a version that `minimum_version` allows",
        stage="secure",
    )


async def _diagnose(recipe: TcpRecipe, again: Callable[[], Awaitable[socket.socket]]) -> str:
    """Names and dates of a certificate that was rejected, "" where they cannot be had."""
    try:
        context = recipe.tls.diagnostic_context()
        stream = AsyncioStream(explain=explain_tls, half_close=False)
        async with asyncio.timeout(_DIAGNOSIS):
            await wrap(recipe, "", await again(), context, stream, accepted=False)
    except (OSError, ConnectorError):
        return ""
    try:
        return certificate_facts(stream.transport.get_extra_info("peercert"))
    finally:
        stream.abort()


# --- listening ----------------------------------------------------------------------------


def server_context(recipe: TcpRecipe) -> ssl.SSLContext | None:
    """None for a plain listener. Raises ConnectorError where there is no certificate or it cannot be read."""
    if not recipe.secure:
        return None
    if recipe.server_tls is None:
        plain = recipe.url.scheme.removesuffix("s")
        raise ConnectorError(
            f"a listener on {recipe.url} needs a certificate",
            fix=f"set server_tls = {{ certificate = ..., key = ... }}, or use {plain}:// without TLS",
        )
    return recipe.server_tls.server_context()


async def bind(recipe: TcpRecipe) -> list[socket.socket]:
    """Listening sockets of `url` and `hosts`, one an address, all on one port. Raises ConnectorError."""
    port = recipe.url.port
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for host in (recipe.url.host, *recipe.hosts):
            for family, where in await _local(host, port):
                sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                _listen_on(recipe, sock, where[0], port, dual=host == "::" and not recipe.hosts)
                port = sock.getsockname()[1]
                sockets.append(sock)
        opened.pop_all()
    return sockets


async def _local(host: str, port: int) -> list[Address]:
    try:
        found = await resolve(host, port)
    except OSError as error:
        raise ConnectorError(
            f"cannot listen on {host}: {error.strerror or error}",
            fix="use an address of this machine, 0.0.0.0 or [::]",
        ) from error
    return [address for address in found if address[0] in (socket.AF_INET, socket.AF_INET6)]


def _listen_on(recipe: TcpRecipe, sock: socket.socket, host: str, port: int, *, dual: bool) -> None:
    if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows: SO_REUSEADDR would share the port
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
    try:
        sock.bind((host, port))
        sock.listen(recipe.backlog)
    except OSError as error:
        where = f"{host}, port {port}" if port else host
        raise ConnectorError(
            f"cannot listen on {where}: {error.strerror or error}",
            fix=_BIND_FIXES.get(error.errno or 0, ""),
        ) from error


async def wrap_accepted(
    recipe: TcpRecipe, name: str, sock: socket.socket, context: ssl.SSLContext | None, protocol: Wrapped
) -> Peer:
    """`wrap` for a listener's socket. Raises ConnectorError."""
    with contextlib.suppress(OSError):  # it may have left already; the handshake will say so
        tune_socket(recipe, sock)
    where = remote_address(sock)
    try:
        return await wrap(recipe, name, sock, context, protocol, accepted=True)
    except OSError as error:
        told = explain_tls(error, accepted=True)
        raise ConnectorError(f"{where}: {told.what}", fix=told.fix) from error


# --- words --------------------------------------------------------------------------------


class _Unreachable(OSError):
    """An OSError that knows its address."""

    def __init__(self, error: OSError, where: str, local: str | None) -> None:
        super().__init__(error.errno, error.strerror or str(error))
        self.where = where
        self.local = local


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
        return f"{where} did not answer", CONNECTING.fix
    if number in (errno.EADDRNOTAVAIL, errno.EINVAL) and getattr(error, "local", None):
        return f"cannot connect from {error.local}", "local_address must be of this machine"  # type: ignore[attr-defined]
    return f"{where}: {error.strerror or error}", ""
