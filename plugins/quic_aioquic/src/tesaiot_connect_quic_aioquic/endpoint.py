"""What lies between a connection and its socket: the seam, and what both sides of it know.

Owns: the types that a connection and the two endpoints, a client's and a listener's, share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from tesaiot_connect import PathLost

if TYPE_CHECKING:
    from .connection import QuicConnection

NAME = "quic_aioquic"
CONNECTION_ID = 8
"""Bytes of our connection ids."""


class Endpoint(Protocol):
    """What moves a connection's datagrams."""

    def transmit(self, connection: QuicConnection, datagrams: Sequence[bytes], address: Any) -> None: ...
    def congested(self, connection: QuicConnection) -> bool:
        """Whether the socket has no room; `flush` is called again when it has."""
        ...

    def issued(self, connection: QuicConnection, connection_id: bytes) -> None: ...
    def retired(self, connection: QuicConnection, connection_id: bytes) -> None: ...
    def ready(self, connection: QuicConnection) -> None:
        """The peer may be served: the handshake is complete, or early data was accepted."""
        ...

    def handshaken(self, connection: QuicConnection) -> None:
        """The handshake is complete. It may be refused still."""
        ...

    def released(self, connection: QuicConnection) -> None:
        """It is over; the endpoint forgets it."""
        ...

    def probing(self, connection: QuicConnection) -> None:
        """The peer left something unanswered for longer than a round trip."""
        ...

    def silence(self, connection: QuicConnection, seconds: float) -> PathLost:
        """What it means that the peer has not answered for so long."""
        ...

    async def migrate(self, connection: QuicConnection) -> None: ...


@attrs.frozen
class Windows:
    """What the peer may send ahead of the application: bytes for a stream and for all, and streams."""

    stream: int
    connection: int
    streams: int
    """Streams that the peer may have open; 0 for a client, since only clients open streams in MQTT."""


@attrs.define
class Budget:
    """Bytes that all connections of an endpoint hold in this process, and may hold."""

    limit: int
    used: int = 0

    @property
    def tight(self) -> bool:
        return self.used >= self.limit


@attrs.frozen
class Tuning:
    """What a connection is told about its timers and buffers. Times in seconds, sizes in bytes."""

    place: str
    """For messages: the endpoint's URL, or the peer's address."""
    send_buffer: int
    handshake_timeout: float
    idle_timeout: float
    keepalive: float = 0.0
    """Silence after which a PING goes out; 0 never."""
    path_timeout: float = 0.0
    """Silence for so long ends the connection; 0 leaves it to the idle timeout."""


def address_text(address: Any) -> str:
    if address is None:
        return "?"
    host, port = address[0].removeprefix("::ffff:"), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
