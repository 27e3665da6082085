"""MQTT over Unix domain sockets: `unix:///run/mqtt.sock`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import attrs

from tesaiot_connect import (
    AsyncioStream,
    ClientCertificate,
    ConnectFailed,
    Connection,
    ConnectorError,
    Handler,
    Peer,
    StreamConnection,
    Transport,
    Url,
    accepting,
    hookimpl,
)


@attrs.frozen
class Unix:
    """The recipe. Its fields are the keys of an endpoint's TOML table."""

    schemes: ClassVar[Mapping[str, int]] = {"unix": 0}
    rank: ClassVar[int] = 100
    races: ClassVar[bool] = True

    url: Url
    backlog: int = attrs.field(default=128, kw_only=True, metadata={"help": "Listener: waiting connections."})

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, stream = await loop.create_unix_connection(AsyncioStream, self.url.path)
        except OSError as error:
            raise ConnectFailed(
                f"{self.url} cannot be reached: {error.strerror}",
                fix="check the path, its permissions, and that a broker listens there",
            ) from error
        return StreamConnection(stream, Peer(self.url.path, "unix"))

    @asynccontextmanager
    async def listen(self, handler: Handler, /) -> AsyncIterator[str]:
        path = Path(self.url.path)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(self.url.path)
            sock.listen(self.backlog)
        except OSError as error:
            sock.close()
            raise ConnectorError(
                f"cannot listen on {path}: {error.strerror}", fix="remove the file if nobody uses it"
            ) from error
        try:
            async with accepting([sock], self._accept, handler):
                yield str(self.url)
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    async def _accept(self, sock: socket.socket) -> Connection:
        loop = asyncio.get_running_loop()
        _, stream = await loop.connect_accepted_socket(AsyncioStream, sock)
        return StreamConnection(stream, Peer(self.url.path, "unix"), accepted=True)


@hookimpl
def tesaiot_transports() -> Mapping[str, type[Transport]]:
    return {"unix": Unix}
