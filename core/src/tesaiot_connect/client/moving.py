"""From a connection to a better one, make before break.

Owns: the search for a better way while a connection serves, and the moment to change. Rules: the old
connection is given up only when the new one is secured, the credentials for it are there and nobody holds a
message unsettled; who reads and who publishes only waits a moment; whatever hinders a move leaves
everything as it was.

A move that something hindered (a sink that does not settle, an auth that fails) is tried again after a
minute, and after twice that each time, up to an hour. How soon a way that failed is tried again is the
dialer's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import attrs

from ..dialing import Dialed, NegotiatingDialer
from ..errors import ConnectorError
from ..mqtt.packets import V5, Connack, Connect
from ..mqtt.properties import P
from ..protocols import Login, State
from .connection import Live
from .deliveries import Deliveries
from .logins import Logins, cancelled

log = logging.getLogger(__name__)

_MOMENT = 1.5
"""Seconds in which a quiet moment may come by itself."""
_ANSWERS = 2.0
"""Seconds the broker then has to acknowledge what is in flight; what it does not comes again on the new
connection, where QoS 1 allows that it comes twice."""
_SETTLING = 3.0
"""Seconds those who read then have to settle what they were given. With the others it is less than the
time for which brokers wait for CONNECT."""
_FIXED = "a subscription has a stream of its own, which would miss messages meanwhile"
_AGAIN = 60.0
_LONGEST = 3600.0
_FRESH = 3600.0
"""Seconds after which a search goes on with an identity that was asked anew."""


def survives(connect: Connect, connack: Connack) -> bool:
    """Whether the session is there still when its connection was closed (MQTT 5 section 3.1.2.11.2; in
    3.1.1, whether it was not to be a clean one)."""
    if connect.version != V5:
        return not connect.clean_start
    expiry = connect.properties.get(P.SESSION_EXPIRY, 0)
    return bool(connack.properties.get(P.SESSION_EXPIRY, expiry))


@attrs.frozen
class Prepared:
    """A secured connection on which no CONNECT was sent."""

    dialed: Dialed
    origin: str
    """Where it is left from, for the log."""
    login: Login | None = None
    asked: bool = False
    """The auth was asked for the login."""

    @property
    def usable(self) -> bool:
        return self.dialed.connection.status().state is State.OPEN

    def abort(self) -> None:
        self.dialed.connection.abort()


class Mover:
    """Looks for a better connection than `live`, which came by `dialed`, from now until `stop`."""

    def __init__(
        self,
        name: str,
        live: Live,
        dialed: Dialed,
        *,
        dialer: NegotiatingDialer,
        logins: Logins,
        deliveries: Deliveries,
    ) -> None:
        self._name = name
        self._live = live
        self._dialed = dialed
        self._dialer = dialer
        self._logins = logins
        self._deliveries = deliveries
        self._changed = asyncio.Event()
        self._origin = f"{dialed.endpoint} by {live.connection.peer.transport}"
        self._prepared: Prepared | None = None
        self._resting = 0.0
        """Until then, in seconds since the epoch, nothing is tried."""
        self._task = asyncio.create_task(self._run(), name=f"better way of {name}")

    @property
    def due(self) -> float | None:
        """When the next attempt at a better way is due, in seconds since the epoch; None: there is none."""
        due = self._dialer.better_after(self._dialed)
        return None if due is None else max(due, self._resting)

    async def stop(self) -> Prepared | None:
        """Ends the search. Gives what it has prepared, which is then the caller's; a caller that is cancelled
        meanwhile gets nothing, and it is closed."""
        self._task.cancel()
        try:
            await asyncio.wait([self._task])
        except asyncio.CancelledError:
            self._task.add_done_callback(lambda _: self._drop())
            raise
        prepared, self._prepared = self._prepared, None
        return prepared

    def _drop(self) -> None:
        if self._prepared is not None:
            self._prepared.abort()
            self._prepared = None

    async def _run(self) -> None:
        """Until a move is under way: the old connection has heard DISCONNECT then."""
        rest = _AGAIN
        while True:
            hindrance: object = None
            try:
                hindrance = await self._try()
                if hindrance is None:
                    return
            except ConnectorError as error:
                hindrance = error
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and cancelled():
                    raise
                hindrance = f"it failed in an unexpected way: {error!r}"
            if not self._live.up:  # what is prepared is what comes next
                return
            self._drop()
            log.info(
                "%s: no move to a better endpoint for now: %s; trying again in %.0f s",
                self._name,
                hindrance,
                rest,
            )
            self._resting = time.time() + rest
            await asyncio.sleep(rest)
            rest = min(2 * rest, _LONGEST)

    async def _try(self) -> str | None:
        """What hindered the move; None: it is under way. Raises what the auth raises."""
        if self._live.fixed:
            return _FIXED
        dialed = await self._find()
        self._prepared = Prepared(dialed, self._origin)
        login = await self._logins.begin()
        self._prepared = Prepared(dialed, self._origin, login, asked=True)
        self._live.moment = self._changed
        try:
            return await self._leave(self._prepared)
        finally:
            self._live.moment = None
            if not self._live.departed:
                self._live.release()

    async def _find(self) -> Dialed:
        while True:
            identity = await self._logins.identity()
            try:
                async with asyncio.timeout(_FRESH) as old:
                    return await self._dialer.better(self._dialed, identity=identity)
            except TimeoutError:
                if not old.expired():
                    raise

    async def _leave(self, prepared: Prepared) -> str | None:
        """Waits for a quiet moment, or makes one, and leaves the old connection in it."""
        live, deliveries = self._live, self._deliveries
        await self._until(lambda: live.idle and not deliveries.awaited, _MOMENT)
        live.hold()
        await self._until(lambda: live.idle, _ANSWERS)
        live.stop_reading()
        if not await self._until(lambda: not deliveries.awaited, _SETTLING):
            return "messages are with somebody who has not settled them"
        if live.fixed:
            return _FIXED
        if not prepared.usable:
            return f"the connection by {prepared.dialed.endpoint} ended before it was used"
        await live.leave()
        if not live.up:
            return "the connection ended meanwhile"
        live.depart()
        return None

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it came about in that time."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True
