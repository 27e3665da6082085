"""The authenticator of a broker that lets everybody in.

Owns: nothing but that. Rule: what a client may do is asked of its principal, never of the broker.
"""

from __future__ import annotations

import attrs

from ..protocols import Credentials, Peer


@attrs.frozen
class Anybody:
    """A principal that may do everything."""

    name: str = "anonymous"
    organisation: str | None = None
    valid_until: float | None = None

    def may_publish(self, topic: str, /) -> bool:
        return True

    def may_subscribe(self, topic_filter: str, /) -> bool:
        return True


@attrs.frozen
class Anonymous:
    """Lets every client in, whatever credentials it brings: for loopback and closed networks."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Anybody:
        return Anybody()
