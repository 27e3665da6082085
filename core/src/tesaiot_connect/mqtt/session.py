"""What outlives a connection: packet identifiers in use on the control stream (MQTT 5 section 4.1).

Owns: that state, as plain data. Rule: no behaviour beyond bookkeeping; store it, give it to the
next engine, and nothing that was promised is forgotten.
"""

from __future__ import annotations

import msgspec

from ..message import Message


class InFlight(msgspec.Struct, gc=False):
    """A QoS 1 or 2 message that was sent and is not acknowledged to the end."""

    key: int
    """The owner's name for the message, given to `publish` and back in `Acknowledged`."""
    message: Message
    released: bool = False
    """QoS 2: the peer has the message (PUBREC came), its PUBCOMP is awaited."""


class Session:
    """Data of one MQTT session.

    `outbound`: packet identifier to what is in flight, in sending order.
    `inbound`: QoS 2 identifiers whose PUBREC went out and whose PUBREL has not come.
    `unsettled`: QoS 2 identifiers received and not settled, with the token that will settle
    them; not worth storing across a restart, since the sender then sends them again.
    """

    __slots__ = ("inbound", "last_id", "last_token", "outbound", "unsettled")

    def __init__(self) -> None:
        self.outbound: dict[int, InFlight] = {}
        self.inbound: set[int] = set()
        self.unsettled: dict[int, int] = {}
        self.last_id = 0
        self.last_token = 0

    def next_id(self) -> int:
        """A free packet identifier. There is one: windows are smaller than the space."""
        packet_id = self.last_id
        while True:
            packet_id = packet_id % 65535 + 1
            if packet_id not in self.outbound:
                self.last_id = packet_id
                return packet_id

    def next_token(self) -> int:
        self.last_token += 1
        return self.last_token

    def settle_unconnected(self, token: int) -> list[int]:
        """What `token` held of QoS 2 is safe: a peer that sends it again gets PUBREC at once."""
        safe = [packet_id for packet_id, holder in self.unsettled.items() if holder == token]
        for packet_id in safe:
            del self.unsettled[packet_id]
            self.inbound.add(packet_id)
        return safe

    def forget(self, token: int) -> bool:
        """What `token` held of QoS 2 was not taken: when the peer sends it again, it is new.

        Says whether there was any."""
        held = [packet_id for packet_id, holder in self.unsettled.items() if holder == token]
        for packet_id in held:
            del self.unsettled[packet_id]
        return bool(held)

    def forget_inbound(self) -> None:
        """The peer starts a new session: its identifiers mean nothing any more."""
        self.inbound.clear()
        self.unsettled.clear()
