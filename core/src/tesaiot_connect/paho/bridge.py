"""Between paho's socket and a connection of ours.

Owns: a pair of local sockets, of which paho has one, and the two flows between the other and the
connection's stream. Rules: nothing is read that cannot be handed on, so what is under way is
bounded by the sockets' buffers and one chunk for each direction; what paho wrote before it closed
its socket is delivered before the connection is closed; a dialer that negotiates hears of a path that
went silent.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from ..dialing import Dialed, Dialer, NegotiatingDialer
from ..errors import ConnectorError, PathLost
from ..portal import Portal
from ..protocols import ByteStream, ClientCertificate

log = logging.getLogger(__name__)

CHUNK = 65536
"""Bytes that are taken at once from either side."""
GRACE = 30.0
"""Seconds that what was written before one side left has to arrive."""
EXIT_GRACE = 5.0
"""The same, when the program ends meanwhile."""


class _Ended(enum.Enum):
    """Which side a flow ended at."""

    PAHO = enum.auto()
    NETWORK = enum.auto()


class Bridge:
    """One connection, from `open` until either side ends it."""

    def __init__(self, dialer: Dialer, identity: ClientCertificate | None, keepalive: float) -> None:
        self._dialer = dialer
        self._identity = identity
        self._keepalive = keepalive
        self._portal = Portal(name="tesaiot-paho")
        self._left = asyncio.Event()

    def open(self) -> socket.socket:
        """Connect, and give paho's end. Blocks; raises ConnectorError."""
        near, far = socket.socketpair()
        far.setblocking(False)
        opened: Future[None] = Future()
        try:
            life = self._portal.start(self._live(near, far, opened))
        except BaseException:  # no thread can be had
            near.close()
            far.close()
            raise
        life.add_done_callback(lambda _: self._portal.close())
        try:
            opened.result()
        except BaseException:  # it failed, or the waiting was interrupted
            self._portal.close()
            near.close()
            raise
        return near

    def leave(self) -> None:
        """paho closed its end. From now on the rest has `GRACE` seconds to be sent."""
        try:
            self._portal.start(self._leave())
        except RuntimeError:  # it ended before
            pass

    async def _leave(self) -> None:
        self._left.set()

    async def _live(self, near: socket.socket, far: socket.socket, opened: Future[None]) -> None:
        try:
            dialed = await self._dial()
            connection = dialed.connection
            try:
                connection.set_keepalive(self._keepalive)
                stream = await connection.open_stream()
            except BaseException as error:
                connection.abort()
                self._broke(dialed, error)
                raise
        except Exception as error:  # noqa: BLE001 - the caller's
            far.close()
            opened.set_exception(error)
            return
        except asyncio.CancelledError:
            far.close()
            raise
        carrying = asyncio.create_task(self._carry(dialed, stream, far))
        opened.set_result(None)
        try:
            await asyncio.shield(carrying)
        except asyncio.CancelledError:
            # The program ends. As with a socket of the system, what was written still goes out, and
            # paho's thread, which may outlive us, is not to see a lost connection and reconnect.
            try:
                near.shutdown(socket.SHUT_WR)
            except OSError:  # paho closed it
                pass
            self._left.set()
            await asyncio.wait({carrying}, timeout=EXIT_GRACE)
            carrying.cancel()
            await asyncio.wait({carrying})
            far.detach()
            raise
        except Exception:
            log.exception("a transport failed in an unexpected way")
        far.close()

    async def _dial(self) -> Dialed:
        if isinstance(self._dialer, NegotiatingDialer):
            return await self._dialer.dial(identity=self._identity)
        return Dialed(await self._dialer.connect(identity=self._identity))

    def _broke(self, dialed: Dialed, error: BaseException) -> None:
        if isinstance(error, PathLost) and isinstance(self._dialer, NegotiatingDialer):
            self._dialer.lost(dialed, error)

    async def _carry(self, dialed: Dialed, stream: ByteStream, far: socket.socket) -> None:
        connection, broke = dialed.connection, partial(self._broke, dialed)
        up = asyncio.create_task(_up(far, stream, broke))
        down = asyncio.create_task(_down(stream, far, broke))
        left = asyncio.create_task(self._left.wait())
        try:
            await asyncio.wait({up, down, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done() or _how(up) is _Ended.PAHO or _how(down) is _Ended.PAHO:
                await asyncio.wait({up}, timeout=GRACE)
                if _how(up) is _Ended.PAHO:
                    await connection.aclose()
            elif _how(up) is _Ended.NETWORK:
                await asyncio.wait({down, left}, timeout=GRACE, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down, left):
                task.cancel()
            connection.abort()
            await asyncio.wait({up, down, left})


def _how(flow: asyncio.Task[_Ended]) -> _Ended | None:
    """None while it goes on. Raises what it raised."""
    return flow.result() if flow.done() else None


async def _up(far: socket.socket, stream: ByteStream, broke: Callable[[ConnectorError], None]) -> _Ended:
    """What paho writes."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await loop.sock_recv(far, CHUNK)
        except OSError:  # it closed its end with something unread in it
            return _Ended.PAHO
        if not data:
            return _Ended.PAHO
        try:
            await stream.send(data)
        except ConnectorError as error:
            log.info("%s", error)
            broke(error)
            return _Ended.NETWORK


async def _down(stream: ByteStream, far: socket.socket, broke: Callable[[ConnectorError], None]) -> _Ended:
    """What the broker sends."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await stream.receive(CHUNK)
        except ConnectorError as error:
            log.info("%s", error)
            broke(error)
            return _Ended.NETWORK
        if not data:
            return _Ended.NETWORK
        try:
            await loop.sock_sendall(far, data)
        except OSError:
            return _Ended.PAHO
