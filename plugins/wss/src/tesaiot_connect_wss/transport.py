"""The recipe: dial or listen for MQTT over WebSocket, with TLS where the scheme says so.

Owns: the endpoint's options, and the order proxy -> TCP -> TLS -> upgrade. Rule: what `connect` returns has
been upgraded; nothing of the WebSocket library is loaded before it is needed.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from tesaiot_connect import (
    ClientCertificate,
    ConnectFailed,
    Connection,
    ConnectorError,
    Disconnected,
    Duration,
    Handler,
    Peer,
    Secret,
    SecretFrom,
    ServerTls,
    Size,
    TlsOptions,
    Url,
    accepting,
    read_secret,
    tcp,
)

if TYPE_CHECKING:
    from .layer import WebSocket
    from .upgrade import Opening

NAME = "wss"
PATH = "/mqtt"
_HANDSHAKE = tcp.Stage(
    "the server accepted the connection but does not answer the TLS handshake",
    "check that the port speaks TLS; for one that does not, use ws://",
    "secure",
)
_UPGRADE = tcp.Stage(
    "the server does not answer the upgrade to WebSocket",
    "check that the port is the broker's WebSocket listener, not that of plain MQTT (1883, 8883)",
    "upgrade",
)
_NOT_TLS = "the port may speak WebSocket without TLS: then use ws://, or the broker's wss:// port"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_RESERVED = ("host", "upgrade", "connection", "content-length", "transfer-encoding")


def _check_headers(_recipe: object, _field: object, headers: Mapping[str, object]) -> None:
    for name in headers:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an HTTP header")
        if name.lower() in _RESERVED or name.lower().startswith("sec-websocket-"):
            raise ValueError(f"the header {name} is set by the handshake itself")


def _check_networks(_recipe: object, _field: object, networks: tuple[str, ...]) -> None:
    for network in networks:
        ipaddress.ip_network(network)


@attrs.frozen
class Wss:
    """`ws://host:80/mqtt` is plain, `wss://host:443/mqtt` is over TLS. A URL without a path means /mqtt."""

    schemes: ClassVar[Mapping[str, int]] = {"ws": 80, "wss": 443}
    rank: ClassVar[int] = 100
    races: ClassVar[bool] = True

    url: Url
    tls: TlsOptions = attrs.field(factory=TlsOptions, kw_only=True)
    connect_timeout: Duration = attrs.field(
        default=Duration(10.0),
        kw_only=True,
        metadata={"help": "For name resolution, proxy, TCP, TLS and the upgrade together."},
    )
    headers: Mapping[str, Secret | SecretFrom] = attrs.field(
        factory=dict,
        kw_only=True,
        validator=_check_headers,
        metadata={"help": "More HTTP headers for the upgrade; a value may be kept elsewhere, as a secret."},
    )
    proxy: Secret | SecretFrom | None = attrs.field(
        default=None,
        kw_only=True,
        metadata={
            "help": "'http://user:password@host:port', 'socks5://host:port' or 'none'. "
            "Default: HTTPS_PROXY, ALL_PROXY and NO_PROXY of the environment."
        },
    )
    max_message_size: Size | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(attrs.validators.ge(Size(128))),
        kw_only=True,
        metadata={
            "help": "Largest WebSocket message to accept, all its fragments together. Default: 17MiB from a "
            "server, 2MiB from a client; a message commonly holds one MQTT packet."
        },
    )
    ping_interval: Duration = attrs.field(
        default=Duration(30.0),
        kw_only=True,
        metadata={"help": "Silence of the peer before it is sent a ping; '0s' sends none."},
    )
    ping_timeout: Duration = attrs.field(
        default=Duration(20.0),
        kw_only=True,
        metadata={"help": "Time without a single byte after a ping until the connection is given up."},
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
        metadata={"help": "Listener: time a client has for its TLS handshake and its upgrade."},
    )
    origins: tuple[str, ...] = attrs.field(
        default=(),
        kw_only=True,
        metadata={
            "help": "Listener: origins of web pages that may connect, for example 'https://app.example'; "
            "clients that are no web page have none and are admitted. Default: any."
        },
    )
    trusted_proxies: tuple[str, ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=_check_networks,
        metadata={
            "help": "Listener: addresses or networks of proxies whose X-Forwarded-For says who the client is."
        },
    )
    server_tls: ServerTls | None = attrs.field(
        default=None,
        kw_only=True,
        metadata={"help": "Listener: certificate and key, for wss://."},
    )

    @property
    def secure(self) -> bool:
        return self.url.scheme == "wss"

    @property
    def port(self) -> int:
        return self.url.port or self.schemes[self.url.scheme]

    @property
    def path(self) -> str:
        """With the query, as it is asked for."""
        path, mark, query = self.url.path.partition("?")
        return (path or PATH) + mark + query

    # --- client

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """`early` is not sent: there is no replay-safe early data here. Raises ConnectFailed."""
        from . import proxy
        from .upgrade import ClientOpening

        context = self.tls.client_context(identity) if self.secure else None
        if context is not None:
            context.set_alpn_protocols(["http/1.1"])
        place = tcp.place(self)
        try:
            headers = {name: await read_secret(value) for name, value in self.headers.items()}
            chosen = None if self.proxy is None else await read_secret(self.proxy)
        except ConnectorError as error:
            raise ConnectFailed(f"{place}: {error.what}", fix=error.fix) from error
        for name, value in headers.items():
            if not value.isprintable() or not value.isascii():
                raise ConnectFailed(
                    f"{place}: the value of the header {name} holds characters that HTTP forbids",
                    fix="use printable ASCII, on one line",
                )
        if chosen is None:
            chosen = proxy.from_environment(self.url.scheme, self.url.host, self.port)
        tunnel = None
        if chosen not in (None, "none"):
            assert chosen is not None
            tunnel = functools.partial(self._tunnel, proxy.parse(chosen))
        url = attrs.evolve(self.url, port=self.port, path=self.path)

        def websocket() -> WebSocket:
            opening = ClientOpening(place, url, headers, self._most(accepted=False))
            silent = tcp.silent(self) if self.secure else None
            return self._websocket(opening, self._most(accepted=False), silent)

        return await tcp.connect(
            self,
            name=NAME,
            context=context,
            protocol=websocket,
            finish=self._opened,
            handshake=_HANDSHAKE,
            not_tls=_NOT_TLS,
            tunnel=tunnel,
        )

    async def _tunnel(self, through: Any, progress: tcp.Progress) -> socket.socket:
        from .proxy import tunnel

        return await tunnel(self, progress, through)

    def _most(self, *, accepted: bool) -> int:
        """Bytes of the largest message. Servers are chosen, and may send a client's largest packet."""
        return self.max_message_size or (2 if accepted else 17) * 1024 * 1024

    def _websocket(self, opening: Opening, limit: int, silent: Disconnected | None = None) -> WebSocket:
        from .layer import WebSocket

        return WebSocket(
            opening,
            limit=limit,
            interval=self.ping_interval,
            timeout=self.ping_timeout,
            silent=silent,
        )

    async def _opened(self, made: WebSocket, peer: Peer, progress: tcp.Progress) -> Connection:
        from .connection import WssConnection

        progress.stage = _UPGRADE
        try:
            await made.opened
        except ConnectFailed:
            made.abort()
            raise
        except Disconnected as error:
            place = tcp.place(self)
            what = error.what if place in error.what else f"{place}: {error.what}"
            stage: Literal["secure", "upgrade"] = "secure" if made.tls_failed else "upgrade"
            raise ConnectFailed(what, fix=error.fix or _UPGRADE.fix, stage=stage) from error
        except BaseException:
            made.abort()
            raise
        return WssConnection(made, peer)

    # --- listener

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        """Raises ConnectorError where the address cannot be had or the certificate not read."""
        from .upgrade import Rules

        context = tcp.server_context(self)
        if context is not None:
            context.set_alpn_protocols(["http/1.1"])
        path = self.path.partition("?")[0]
        rules = Rules(path, self.origins, self._most(accepted=True))
        sockets = await tcp.bind(self)
        port = sockets[0].getsockname()[1]
        farewell = [(1000, "")]
        accept = functools.partial(self._accept, context, rules, farewell)
        async with accepting(sockets, accept, handler):
            try:
                yield str(attrs.evolve(self.url, port=port, path=path))
            finally:
                farewell[0] = (1001, "the listener stops")

    async def _accept(
        self, context: ssl.SSLContext | None, rules: Any, farewell: list[tuple[int, str]], sock: socket.socket
    ) -> Connection:
        from .connection import WssConnection
        from .upgrade import ServerOpening

        opening = ServerOpening(rules)
        made = self._websocket(opening, self._most(accepted=True))
        made.farewell = lambda: farewell[0]
        where = tcp.remote_address(sock)
        try:
            async with asyncio.timeout(self.handshake_timeout):
                peer = await tcp.wrap_accepted(self, NAME, sock, context, made)
                await made.opened
        except TimeoutError as error:
            made.abort()
            raise ConnectorError(f"{where}: no upgrade within {self.handshake_timeout:g} s") from error
        except ConnectorError as error:
            if made.opened.done():
                await self._answered(made)
            raise ConnectorError(f"{where}: {error.what}", fix=error.fix) from error
        except BaseException:
            made.abort()
            raise
        address = self._client(peer.address, opening.headers.get_all("X-Forwarded-For"))
        return WssConnection(made, attrs.evolve(peer, address=address), accepted=True)

    @staticmethod
    async def _answered(made: WebSocket) -> None:
        """Our refusal is on its way, for so long as the layer gives it."""
        try:
            await made.wait_gone()
        except BaseException:
            made.abort()
            raise

    def _client(self, address: str, forwarded: list[str]) -> str:
        """The nearest address that is not a trusted proxy's."""
        networks = [ipaddress.ip_network(one) for one in self.trusted_proxies]
        steps = [step.strip() for line in forwarded for step in line.split(",")]
        while networks and steps:
            nearest = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
            if not any(nearest in network for network in networks):
                break
            try:
                address = tcp.address_text((str(ipaddress.ip_address(steps.pop())), 0))
            except ValueError:  # whatever a stranger wrote before it came to the proxy
                break
        return address
