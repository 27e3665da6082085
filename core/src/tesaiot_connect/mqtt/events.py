"""What the engines tell their owner.

Owns: the event types. Rule: per-message news travels in lists, one event per `receive_data`
call and stream, never one per message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..message import Message
from .packets import Connack, Connect, Subscribe, Unsubscribe
from .properties import P


class Received(NamedTuple):
    """Application messages arrived. Call `settle(token)` when they are safe; that sends the
    PUBACK or PUBREC of each, in the order of arrival. All-QoS 0 needs no settling (token 0)."""

    stream: int
    messages: list[Message]
    ids: list[int]
    """Packet identifiers, parallel to messages, 0 for QoS 0."""
    token: int


class Acknowledged(NamedTuple):
    """Published messages are done: the peer has taken them over (PUBACK, PUBCOMP) or refused them."""

    stream: int
    keys: list[int]
    """The keys given to `publish` of the messages that were taken over."""
    refused: Mapping[int, int]
    """Key to reason code (MQTT 5) of the messages that were not, and never will be."""


class Connected(NamedTuple):
    """Client: the server accepted. `connack.session_present` says whether the session was kept."""

    connack: Connack


class Suback(NamedTuple):
    """Client: the answer to the SUBSCRIBE or UNSUBSCRIBE with this packet identifier."""

    packet_id: int
    codes: Sequence[int]
    """One reason code per filter, in order; empty for a 3.1.1 UNSUBACK."""
    text: str


class AuthChallenge(NamedTuple):
    """Enhanced authentication data (MQTT 5 section 4.12): answer with `auth(data)`.

    On the server `final` is false; on the client `final` says the server has finished.
    """

    method: str
    data: bytes
    final: bool


class ConnectRequest(NamedTuple):
    """Server: a valid CONNECT. Answer with `accept`, `refuse` or `challenge`."""

    connect: Connect


class SubscribeRequest(NamedTuple):
    """Server: answer with `suback(request, codes)`."""

    stream: int
    packet: Subscribe


class UnsubscribeRequest(NamedTuple):
    """Server: answer with `unsuback(request, codes)`."""

    stream: int
    packet: Unsubscribe


class StreamLost(NamedTuple):
    """A data stream is gone with everything that lived on it, alone or (right before `Closed`) with
    the connection. `unacknowledged` are the keys of QoS 1 and 2 messages in flight there that the
    peer has not taken over: publish them again, as new."""

    stream: int
    unacknowledged: list[int]


class Closed(NamedTuple):
    """The MQTT connection is over; nothing more will come. Flush `outputs()`, then close.

    `reason_code` is what was sent or received in DISCONNECT (or a refusing CONNACK), 0 for an
    orderly end, None when the transport just ended. `orderly` is true only after a DISCONNECT
    that forbids the will (server side: discard the will if so).
    """

    reason_code: int | None
    text: str
    by_peer: bool
    orderly: bool
    properties: Mapping[P, Any] = {}
    """Of the DISCONNECT or CONNACK: SERVER_REFERENCE, REASON_STRING, SESSION_EXPIRY."""


class Send(NamedTuple):
    """Output: write these bytes on the stream; then end its sending side if `fin`."""

    stream: int
    data: bytes
    fin: bool = False


class Reset(NamedTuple):
    """Output: abort one stream."""

    stream: int
    code: int


class Close(NamedTuple):
    """Output: close the transport after what was sent before."""

    code: int


Event = (
    Received
    | Acknowledged
    | Connected
    | Suback
    | AuthChallenge
    | ConnectRequest
    | SubscribeRequest
    | UnsubscribeRequest
    | StreamLost
    | Closed
)
Output = Send | Reset | Close
