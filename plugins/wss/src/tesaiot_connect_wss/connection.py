"""A WebSocket as a `Connection`: one stream, and what only a WebSocket knows.

Owns: the view from above. Rule: what ended it is told with its close code, in words.
"""

from __future__ import annotations

import attrs

from tesaiot_connect import (
    AsyncioStream,
    CloseReason,
    ConnectionStatus,
    Peer,
    State,
    StreamConnection,
)

from .layer import WebSocket


class WssConnection:
    """The side that dialled opens the stream, the side that accepted (`accepted`) accepts it."""

    multistream = False
    early_sent = False

    def __init__(self, socket: WebSocket, peer: Peer, *, accepted: bool = False) -> None:
        self._socket = socket
        self._peer = peer
        self._single = StreamConnection(socket.stream, peer, accepted=accepted)

    @property
    def peer(self) -> Peer:
        return self._peer

    async def open_stream(self, *, priority: int = 0) -> AsyncioStream:
        told, stream = self._socket.error, self._socket.stream
        if told is not None and stream.state is State.CLOSED and not stream.bytes_received:
            raise type(told)(told.what, fix=told.fix)
        return await self._single.open_stream(priority=priority)

    async def accept_stream(self) -> AsyncioStream:
        return await self._single.accept_stream()

    def status(self) -> ConnectionStatus:
        """Bytes are those of MQTT, without frames; `rtt` is that of the last ping, where there was one."""
        return attrs.evolve(
            self._single.status(),
            last_received=self._socket.last_received,
            rtt=self._socket.rtt,
            close_reason=self._socket.close_reason,
        )

    def set_keepalive(self, seconds: float) -> None:
        """Nothing to do: pings have an interval of their own."""

    async def probe(self) -> None:
        await self._socket.probe()

    async def migrate(self) -> None:
        await self._single.migrate()

    async def wait_closed(self) -> CloseReason:
        """The code is that of the close frame, 1006 where none came, 0 for an orderly end."""
        await self._socket.wait_gone()
        reason = self._socket.close_reason
        assert reason is not None
        return reason

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        """`code` goes out where it is one that an application may send (RFC 6455 section 7.4), 1000 else."""
        if 3000 <= code < 5000 or code in _SENDABLE:
            self._socket.farewell = lambda: (code, reason)
        await self._single.aclose()

    def abort(self, code: int = 0) -> None:
        self._single.abort(code)


_SENDABLE = {1000, 1001, 1003, 1007, 1008, 1009, 1011, 1012, 1013, 1014}
