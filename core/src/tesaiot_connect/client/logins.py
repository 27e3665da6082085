"""Who a client says it is: its auth, asked anew for every connection.

Owns: how long an auth may take to answer, and the wait for other credentials. Rule: an auth that hangs
or fails costs one attempt, never the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from ..errors import ConnectFailed
from ..protocols import Auth, ClientCertificate, Login, RotatingAuth
from .options import ClientOptions

log = logging.getLogger(__name__)

T = TypeVar("T")


def cancelled() -> bool:
    """Whether the current task is cancelled, and not something that an auth or a transport awaits."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class Logins:
    """`auth` as one client asks it. `name` is for the log."""

    def __init__(self, name: str, auth: Auth | None, options: ClientOptions) -> None:
        self._name = name
        self._auth = auth
        self._options = options
        self.origin = f"the `auth` table of {name}" if auth is not None else ""
        """Where the credentials are set, where they do not say so themselves."""

    async def begin(self) -> Login | None:
        """None without an auth. Raises ConnectFailed where it takes too long, and what the auth raises."""
        return await self.answer(self._auth.begin()) if self._auth is not None else None

    async def identity(self) -> ClientCertificate | None:
        """As `begin`."""
        return await self.answer(self._auth.identity()) if self._auth is not None else None

    async def answer(self, asked: Awaitable[T]) -> T:
        """An answer of the auth, which has as long as the broker has for its own."""
        seconds = self._options.connect_timeout
        try:
            async with asyncio.timeout(seconds) as deadline:
                return await asked
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise ConnectFailed(
                f"the `auth` of this connection gave no answer within {seconds:g} s",
                fix="see what it waits for, or raise `connect_timeout`",
            ) from error

    async def pause(self, delay: float) -> None:
        """Before the next attempt; shorter when the auth has other credentials meanwhile."""
        clock = asyncio.get_running_loop().time
        begun = clock()
        auth: object = self._auth
        if isinstance(auth, RotatingAuth):
            try:
                async with asyncio.timeout(delay):
                    await auth.changed()
                log.info("%s: the credentials have changed, trying again now", self._name)
                delay = min(delay, float(self._options.reconnect.min))
            except TimeoutError:
                pass
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and cancelled():
                    raise
                log.warning("%s: cannot tell when the credentials change: %r", self._name, error)
        await asyncio.sleep(max(0.0, begun + delay - clock()))
