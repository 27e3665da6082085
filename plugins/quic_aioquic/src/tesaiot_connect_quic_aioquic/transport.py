"""The recipe: an endpoint's options.

Owns: those, their help and their limits. Rule: importing it loads no protocol machine, since every
command reads the recipes of all plugins; `client` and `server` do the work.
"""

from __future__ import annotations

# ruff: noqa: RUF009 - `_option` is attrs.field
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs

from tesaiot_connect import (
    ClientCertificate,
    Connection,
    Duration,
    Handler,
    ServerTls,
    Size,
    TlsOptions,
    Url,
)

_VERSIONS = {1, 2}


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


def _no_client_certificates(_instance: Any, _field: Any, value: ServerTls | None) -> None:
    if value is not None and value.client_certificate != "none":
        raise ValueError(
            "a QUIC listener takes no client certificates: leave client_certificate = "
            f'"{value.client_certificate}" out, and add an mqtts:// listener for clients that have one'
        )


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
        "cubic",
        "Congestion control of what this side sends.",
        validator=attrs.validators.in_(("reno", "cubic")),
    )
    max_datagram_size: Size = _option(
        Size(1200),
        "UDP payload to send, in bytes, from 1200 to 16000. 1200 passes everywhere; 1452 saves CPU where "
        "the path carries 1500-byte packets, more needs larger ones. There is no path MTU discovery.",
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
        "Client: silence after which a QUIC PING goes out, which keeps NATs open too; 0s never. Soon after "
        "something was sent or received it goes out earlier, see `path_timeout`.",
    )
    path_timeout: Duration = _option(
        Duration(5.0),
        "Client: silence for so long ends the connection, and the session goes on over the next endpoint. "
        "After a quarter of it a PING asks whether the path is alive; where nothing was sent or received "
        "lately that is asked at `keepalive`, so both add up. At least four probe timeouts (RFC 9002 section "
        "6.2), so longer where a round trip takes a second or more. 0s leaves it to idle_timeout.",
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
    server_tls: ServerTls | None = _option(
        None, "Listener: certificate and key.", validator=_no_client_certificates
    )

    @property
    def secure(self) -> bool:
        return True

    @property
    def port(self) -> int:
        return self.url.port or self.schemes[self.url.scheme]

    @property
    def place(self) -> str:
        return str(attrs.evolve(self.url, port=self.port))

    def load(self) -> None:
        from . import client  # noqa: F401

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """`early` goes out with the first packet where a ticket allows. Raises ConnectFailed, and
        Unsupported for a client certificate."""
        from . import client

        return await client.connect(self, identity=identity, early=early)

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        """Gives a `BoundUrl`. Raises ConnectorError where the address cannot be had or the
        certificate not read."""
        from . import server

        async with server.listen(self, handler) as url:
            yield url
