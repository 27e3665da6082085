"""Which way a client's connections go: dialled, or moved to.

Owns: what is known of the present way, and the next one where that is there already. Rules: a dialer that
negotiates hears of every end that speaks against a way, and of no other; a connection that was prepared
is used or closed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import attrs

from ..dialing import Attempt, Dialed, Dialer, NegotiatingDialer
from ..errors import ConnectorError, Disconnected, PathLost, Refused
from ..mqtt.packets import Connack
from ..protocols import ByteStream, ClientCertificate, Connection, Peer
from .connection import Live
from .deliveries import Deliveries
from .logins import Logins, cancelled
from .moving import Mover, Prepared, survives
from .version import WORDS

log = logging.getLogger(__name__)


class Ways:
    """`dialer` as one client uses it, for one connection after the other: `take`, `open`, `accepted`
    perhaps, `left`, and `judge` where it was not left for another."""

    def __init__(self, name: str, dialer: Dialer, logins: Logins, deliveries: Deliveries) -> None:
        self.peer = Peer("", "")
        """At the other end of the present connection, or the latest."""
        self.attempts: tuple[Attempt, ...] = ()
        """Of the latest dial."""
        self.moves = 0
        self._name = name
        self._dialer = dialer
        self._negotiating = dialer if isinstance(dialer, NegotiatingDialer) else None
        self._logins = logins
        self._deliveries = deliveries
        self._dialed: Dialed | None = None
        """The present connection, or the latest."""
        self._used: Prepared | None = None
        """What that was, if it was prepared."""
        self._prepared: Prepared | None = None
        """The connection to go on with."""
        self._mover: Mover | None = None
        self._urgent = False
        """The latest way failed in a manner that calls for another one at once."""
        self._hasty = False
        """That was heeded, and no connection has lasted since."""
        self._rooted = False
        """A move has lost the session: there are no more."""
        self._barred: frozenset[int] = frozenset()
        """Places of endpoints that refuse the version: there are no moves to them."""
        self._closed = False

    @property
    def url(self) -> str:
        """The endpoint of the present connection, or the latest, as configured."""
        return self._dialed.endpoint if self._dialed is not None else ""

    @property
    def place(self) -> int:
        """Of that endpoint, in order of preference."""
        return self._dialed.place if self._dialed is not None else 0

    @property
    def several(self) -> bool:
        """Whether there may be other endpoints."""
        return self._negotiating is not None

    @property
    def better_after(self) -> float | None:
        """When an attempt at a better way is due, in seconds since the epoch."""
        return self._mover.due if self._mover is not None else None

    def take(self) -> Prepared | None:
        """The connection to go on with, if there is one, which is then the caller's."""
        prepared, self._prepared = self._prepared, None
        self._urgent = False
        return prepared

    async def open(
        self, prepared: Prepared | None, identity: ClientCertificate | None, early: bytes
    ) -> tuple[Connection, ByteStream]:
        """A connection, `prepared` or dialled, and its first stream. Raises what the dialer does, or
        Disconnected."""
        dialed = prepared.dialed if prepared is not None else await self._dial(identity, early)
        connection = dialed.connection
        self._dialed, self._used = dialed, prepared
        self.peer, self.attempts = connection.peer, dialed.attempts
        try:
            return connection, await connection.open_stream()
        except BaseException as error:
            connection.abort()
            if isinstance(error, PathLost) or (prepared is not None and isinstance(error, ConnectorError)):
                self._speak_against(dialed, error, urgent=prepared is not None)
            raise

    async def _dial(self, identity: ClientCertificate | None, early: bytes) -> Dialed:
        try:
            if self._negotiating is not None:
                return await self._negotiating.dial(identity=identity, early=early)
            connection = await self._dialer.connect(identity=identity, early=early)
        except ConnectorError as error:
            self.attempts = error.attempts
            raise
        return Dialed(connection, str(getattr(self._dialer, "url", "")))

    def accepted(self, live: Live, connack: Connack) -> tuple[str, str]:
        """The broker has said yes: from now on there may be a move to something better. Gives the words for
        which way it went, and for why not another one."""
        assert self._dialed is not None
        self._barred -= {self._dialed.place}
        dialed, prepared = attrs.evolve(self._dialed, barred=self._barred), self._used
        how = f"{live.connection.peer.transport}{_resumption(live.connection)}"
        if prepared is None:
            told = f"connected to {live.connection.peer.address} by {how}"
        else:
            self.moves += 1
            told = f"moved from {prepared.origin} to {dialed.endpoint} by {how}"
            if not connack.session_present and not self._rooted:
                self._rooted = True
                log.warning(
                    "%s: %s does not know the session that %s has, so there are no more moves; let "
                    "`endpoints` lead to one broker, or set `upgrade = false`",
                    self._name,
                    dialed.endpoint,
                    prepared.origin,
                )
        dialer = self._negotiating
        due = dialer.better_after(dialed) if dialer is not None else None
        moving = not self._rooted and survives(live.engine.connect, connack)
        if dialer is not None and due is not None and moving and not self._closed:
            self._mover = Mover(
                self._name, live, dialed, dialer=dialer, logins=self._logins, deliveries=self._deliveries
            )
        return told, _choice(dialed.attempts, due, moving)

    async def left(self) -> None:
        """The connection is over. What is prepared comes next, if it still can."""
        mover, self._mover = self._mover, None
        if mover is not None:
            self._prepared = await mover.stop()
        prepared = self._prepared
        if prepared is not None and not prepared.usable:
            log.info(
                "%s: the connection by %s ended before it was used", self._name, prepared.dialed.endpoint
            )
            self.drop()
        elif self._closed or cancelled():
            self.drop()

    def judge(self, live: Live, error: Disconnected, *, advice: str | None = None) -> Disconnected:
        """What the end of a connection says of its way. Gives the error to raise. `advice`: the version is
        refused there, and what may be done about it."""
        dialed, prepared = self._dialed, self._used
        assert dialed is not None
        gone = live.broken if isinstance(live.broken, PathLost) and live.closed is None else None
        if advice is not None:
            self._barred |= {dialed.place}
            if prepared is not None:
                log.warning(
                    "%s: %s does not speak MQTT %s, in which this session is kept, so there are no more "
                    "moves to it; %s, or take it out of `endpoints`",
                    self._name,
                    dialed.endpoint,
                    WORDS[live.engine.connect.version],
                    advice,
                )
        if prepared is not None and not live.accepted:
            # the credentials were good a moment ago, by the other way
            error = Disconnected(error.what, fix=error.fix)
            self._speak_against(dialed, error, urgent=True)
        elif advice is not None:
            self._speak_against(dialed, error, urgent=self.several)
        elif gone is not None or not (live.answered or isinstance(error, Refused)):
            self._speak_against(dialed, gone or error, urgent=gone is not None and live.accepted)
        return error

    def _speak_against(self, dialed: Dialed, error: ConnectorError, *, urgent: bool) -> None:
        if not self._closed:
            self._urgent = urgent
            if self._negotiating is not None:
                self._negotiating.lost(dialed, error)

    def at_once(self) -> bool:
        """Whether the next connection need not wait: it is there already, or the way has failed and not the
        broker. For such a failure once, until a connection has `lasted`."""
        if self._prepared is not None:
            return True
        haste = self._urgent and not self._hasty
        self._hasty = self._hasty or haste
        return haste

    def lasted(self) -> None:
        self._hasty = False

    def drop(self) -> None:
        """What is prepared is not wanted."""
        if self._prepared is not None:
            self._prepared.abort()
            self._prepared = None

    async def close(self) -> None:
        """There will be no more connections."""
        self._closed = True
        await self.left()


def _resumption(connection: Connection) -> str:
    """What is worth telling about a connection's handshake."""
    quic = connection.status().quic
    if quic is None:
        return ""
    if quic.early_data_accepted:
        return ", resumed with 0-RTT"
    return ", resumed" if quic.resumed else ""


def _choice(attempts: Sequence[Attempt], due: float | None, moving: bool) -> str:
    """Why it was not another endpoint, and what becomes of that."""
    told, others = "", 0
    won = next((place for place, one in enumerate(attempts) if one.outcome == "won"), 0)
    for place, one in enumerate(attempts):
        if one.outcome in ("failed", "left out"):
            told += f"; {one.endpoint} {one.outcome}: {one.reason}"
        elif one.outcome == "lost" and place < won:
            told += f"; {one.endpoint} was slower"
        else:
            continue
        others += one.outcome != "left out"
    if due is None:
        return told
    which = "it" if others == 1 else "a preferred endpoint"
    if not moving:
        return f"{told}; no move to {which} meanwhile, since the session would not be kept"
    return f"{told}; {which} is tried again in {max(0.0, due - time.time()):.0f} s"
