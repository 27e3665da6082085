"""The server half that all transports have in common: a task for each connection.

Owns: listening sockets, the tasks of handlers, and their end. Rule: whatever a stranger sends,
the listener goes on, and leaving it leaves no task and no socket behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from .errors import Disconnected
from .protocols import Connection, Handler

log = logging.getLogger(__name__)

_ACCEPTS = 64
"""Connections accepted from one socket before others get their turn."""

Secure = Callable[[socket.socket], Awaitable[Connection]]
"""Makes a secured connection of an accepted socket, or raises; it owns the socket from then on."""
Start = Callable[[Callable[[], Awaitable[Connection]]], None]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Start]:
    """Handlers of a listener, one task each: the part that is the same for every transport.

    The function it gives starts one: it takes what makes a secured connection (or raises). The
    connection is closed when its handler ends. Leaving cancels all tasks and waits for them. A
    peer that fails its handshake ends only its own task.
    """
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    async def serve(secure: Callable[[], Awaitable[Connection]]) -> None:
        try:
            connection = await secure()
        except Exception as error:  # noqa: BLE001 - whatever a stranger sends, the listener goes on
            log.info("a peer did not get through its handshake: %s", error)
            return
        try:
            await handler(connection)
        except Disconnected as error:
            log.debug("%s: %s", connection.peer.address, error)
        except Exception:
            log.exception("the handler of %s failed", connection.peer.address)
        finally:
            await connection.aclose()

    def start(secure: Callable[[], Awaitable[Connection]]) -> None:
        task = loop.create_task(serve(secure))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    try:
        yield start
    finally:
        running = list(tasks)
        try:
            await asyncio.sleep(0)  # a task that never began could not clean up
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


@contextlib.asynccontextmanager
async def accepting(
    sockets: Sequence[socket.socket], secure: Secure, handler: Handler
) -> AsyncIterator[None]:
    """Serve the listening `sockets`, which it owns from now on: the server half of a transport.

    Each connection has one task, from its handshake to the end of its handler. Leaving stops
    accepting, then cancels those tasks and waits for them.
    """
    loop = asyncio.get_running_loop()
    async with serving(handler) as start:

        def accept(listening: socket.socket) -> None:
            try:
                for _ in range(_ACCEPTS):
                    sock, _ = listening.accept()
                    sock.setblocking(False)
                    start(functools.partial(secure, sock))
            except BlockingIOError:
                pass
            except OSError as error:
                if not isinstance(error, ConnectionError):  # such a peer left before its turn
                    log.error("cannot accept connections: %s; trying again in 1 s", error)
                    loop.remove_reader(listening)
                    pauses[listening] = loop.call_later(1, loop.add_reader, listening, accept, listening)

        async def accept_by_completion(listening: socket.socket) -> None:
            while True:  # Windows' default loop watches operations, not sockets
                try:
                    sock, _ = await loop.sock_accept(listening)
                except OSError as error:
                    log.error("cannot accept connections: %s; trying again in 1 s", error)
                    await asyncio.sleep(1)
                    continue
                sock.setblocking(False)
                start(functools.partial(secure, sock))

        pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        acceptors: list[asyncio.Task[None]] = []
        try:
            for listening in sockets:
                listening.setblocking(False)
                try:
                    loop.add_reader(listening, accept, listening)
                except NotImplementedError:
                    acceptors.append(loop.create_task(accept_by_completion(listening)))
            yield
        finally:
            for listening in sockets:
                if listening in pauses:
                    pauses[listening].cancel()
                if not acceptors:
                    loop.remove_reader(listening)
            for acceptor in acceptors:
                acceptor.cancel()
            await asyncio.gather(*acceptors, return_exceptions=True)
            for listening in sockets:
                listening.close()
