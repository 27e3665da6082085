"""How a client gets its connections, and what it can tell about that.

Owns: the seam between a client and whatever chooses the transport, and the words of its attempts. Rule:
neither side of the seam knows the other.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import attrs

from .errors import ConnectorError
from .protocols import ClientCertificate, Connection


class Dialer(Protocol):
    """How a client gets connections: the transport is chosen behind this seam."""

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """Raises ConnectFailed with the reason of every endpoint tried."""
        ...


@attrs.frozen
class Attempt:
    """One try at one endpoint, or why there was none."""

    endpoint: str
    """Its URL."""
    outcome: Literal["won", "lost", "failed", "left out"]
    """"lost": another endpoint was there first, and this one was given up."""
    began: float = 0.0
    """Seconds since the epoch; 0 where it was left out from the start."""
    seconds: float = 0.0
    """How long it took until that outcome."""
    reason: str = ""
    """What happened, in one sentence without a full stop; empty for "won"."""
    fix: str = ""
    """What to do about it; may be empty."""


@attrs.frozen
class Dialed:
    """A connection, and how it came about."""

    connection: Connection
    endpoint: str = ""
    """URL of the endpoint; empty where the dialer does not tell."""
    place: int = 0
    """Which endpoint that is in order of preference, from 0."""
    attempts: tuple[Attempt, ...] = ()
    """In the order in which they began; those left out from the start come last."""
    barred: frozenset[int] = frozenset()
    """Places that are no use to the client: nothing better is looked for there."""


@runtime_checkable
class NegotiatingDialer(Protocol):
    """A dialer that knows several ways, better and worse. Optional."""

    async def dial(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Dialed:
        """As `connect`. The error has what was tried in its `attempts`."""
        ...

    async def better(self, than: Dialed, *, identity: ClientCertificate | None = None) -> Dialed:
        """Returns a secured connection by a way that is preferred to the one that `than` came by, as soon as
        there is one: that may be never. Raises nothing for a way that fails.

        Cancelled, it leaves no connection behind; a task that had returned before has one, to be aborted.
        """
        ...

    def better_after(self, than: Dialed) -> float | None:
        """When the next attempt at a better way is due, in seconds since the epoch; None: there is none.
        Cheap: fit to be shown again and again."""
        ...

    def lost(self, dialed: Dialed, error: ConnectorError) -> None:
        """A connection ended in a way that speaks against the way it came by: its path went silent, nobody
        answered the CONNECT, or it came from `better` and the broker did not accept it. The next `dial`
        prefers others."""
        ...
