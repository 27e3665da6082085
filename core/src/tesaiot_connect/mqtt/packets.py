"""The control packets, all but PUBLISH (a `Message`) and its acknowledgements (lists of ids).

Owns: their shapes, free of wire details.
"""

from __future__ import annotations

import msgspec

from ..message import Message
from .properties import PropertyMap

V3 = 4
"""Protocol level of MQTT 3.1.1 (3.1, level 3, is accepted by the server and spoken as 3.1.1)."""
V5 = 5


class Will(msgspec.Struct, frozen=True):
    """A will and how long the server waits before it publishes it, in seconds."""

    message: Message
    delay: int = 0


class Connect(msgspec.Struct, frozen=True, kw_only=True):
    client_id: str
    version: int = V5
    """3 (MQTT 3.1), 4 (3.1.1) or 5. Bit 7 of the byte on the wire, set by bridges, is dropped."""
    clean_start: bool = True
    """Clean Session in 3.1.1."""
    keepalive: int = 60
    """Seconds, 0 is off."""
    username: str | None = None
    password: bytes | None = None
    will: Will | None = None
    properties: PropertyMap = {}
    bridge: bool = False

    def __repr__(self) -> str:
        """Without the credentials, and the will."""
        return f"Connect(client_id={self.client_id!r}, version={self.version}, ...)"


class Connack(msgspec.Struct, frozen=True, kw_only=True):
    reason_code: int = 0
    """Always an MQTT 5 code, translated from and to 3.1.1."""
    session_present: bool = False
    properties: PropertyMap = {}


class Subscription(msgspec.Struct, frozen=True):
    """One filter of a SUBSCRIBE with its options (MQTT 5 section 3.8.3.1)."""

    topic_filter: str
    qos: int = 1
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0
    """0: send retained messages; 1: only if the subscription is new; 2: never."""


class Subscribe(msgspec.Struct, frozen=True, kw_only=True):
    packet_id: int
    subscriptions: tuple[Subscription, ...]
    properties: PropertyMap = {}
    """SUBSCRIPTION_ID is a list with one int."""


class Unsubscribe(msgspec.Struct, frozen=True, kw_only=True):
    packet_id: int
    filters: tuple[str, ...]
    properties: PropertyMap = {}


class SubackPacket(msgspec.Struct, frozen=True, kw_only=True):
    """SUBACK or UNSUBACK. `codes` holds one byte per filter."""

    packet_id: int
    codes: bytes
    properties: PropertyMap = {}


class Disconnect(msgspec.Struct, frozen=True, kw_only=True):
    reason_code: int = 0
    properties: PropertyMap = {}


class Auth(msgspec.Struct, frozen=True, kw_only=True):
    reason_code: int = 0
    properties: PropertyMap = {}


class Ping(msgspec.Struct, frozen=True):
    """PINGREQ at a server, PINGRESP at a client."""
