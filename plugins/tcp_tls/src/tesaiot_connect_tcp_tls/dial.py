"""One TCP connection out of several addresses.

Owns: the race of addresses (RFC 8305, "happy eyeballs") and the socket options. Rule: one socket
comes out; every other one is closed before it does.

asyncio's own `happy_eyeballs_delay` is missing from uvloop, so the race is here.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Address = tuple[int, Any]
"""Address family and the address as `socket.connect` takes it."""


async def resolve(host: str, port: int) -> list[Address]:
    """In the system's order of preference (RFC 6724). Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def alternate(addresses: Sequence[Address]) -> list[Address]:
    """The families in turn, the preferred one first (RFC 8305 section 4)."""
    families = dict.fromkeys(family for family, _ in addresses)
    columns = [[a for a in addresses if a[0] == family] for family in families]
    return [a for row in itertools.zip_longest(*columns) for a in row if a is not None]


async def race(
    addresses: Sequence[Address],
    connect: Callable[[Address], Awaitable[socket.socket]],
    delay: float,
) -> socket.socket:
    """The first socket that connects. `delay` is the head start of each address, in seconds.

    Raises an ExceptionGroup with the OSError of each address, in order, when none connects.
    """
    waiting = deque(addresses)
    running: set[asyncio.Task[socket.socket]] = set()
    errors: list[OSError] = []

    async def attempt(address: Address) -> socket.socket:
        return await connect(address)

    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.create_task(attempt(waiting.popleft())))
            done, _ = await asyncio.wait(
                running, timeout=delay if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                running.discard(task)
                error = task.exception()
                if error is None:
                    # should two connect at once, the other one is still in `running`
                    return task.result()
                if not isinstance(error, OSError):
                    raise error
                errors.append(error)
    finally:
        for task in running:
            task.cancel()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(outcome, socket.socket):
                outcome.close()
    raise ExceptionGroup("no address could be connected to", errors)


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
