"""MQTT 5 properties (section 2.2.2.2): one table drives encoding, decoding and validity.

Owns: property identifiers, their wire types, their values' limits and where each may stand.
PUBLISH properties have a typed form of their own (`message.Properties`); every other packet
carries a dict.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import ProtocolError
from ..message import Properties
from .primitives import Cursor, binary, malformed, string, varint
from .reasons import R


class P(enum.IntEnum):
    """Property identifiers. Values: bytes and numbers as int, strings as str, binary as bytes,
    USER as a list of (name, value), SUBSCRIPTION_ID as a list of int, all others at most once."""

    PAYLOAD_FORMAT = 0x01
    MESSAGE_EXPIRY = 0x02
    CONTENT_TYPE = 0x03
    RESPONSE_TOPIC = 0x08
    CORRELATION_DATA = 0x09
    SUBSCRIPTION_ID = 0x0B
    SESSION_EXPIRY = 0x11
    ASSIGNED_CLIENT_ID = 0x12
    SERVER_KEEP_ALIVE = 0x13
    AUTH_METHOD = 0x15
    AUTH_DATA = 0x16
    REQUEST_PROBLEM_INFO = 0x17
    WILL_DELAY = 0x18
    REQUEST_RESPONSE_INFO = 0x19
    RESPONSE_INFO = 0x1A
    SERVER_REFERENCE = 0x1C
    REASON_STRING = 0x1F
    RECEIVE_MAXIMUM = 0x21
    TOPIC_ALIAS_MAXIMUM = 0x22
    TOPIC_ALIAS = 0x23
    MAXIMUM_QOS = 0x24
    RETAIN_AVAILABLE = 0x25
    USER = 0x26
    MAXIMUM_PACKET_SIZE = 0x27
    WILDCARD_AVAILABLE = 0x28
    SUBSCRIPTION_IDS_AVAILABLE = 0x29
    SHARED_AVAILABLE = 0x2A


PropertyMap = Mapping[P, Any]

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK = range(1, 10)
UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = range(10, 16)
WILL = 16
"""The will's properties inside CONNECT: a place of their own in the table."""


class _Type(NamedTuple):
    read: Callable[[Cursor], Any]
    write: Callable[[Any], bytes]


def _read_pair(cursor: Cursor) -> tuple[str, str]:
    return cursor.string(), cursor.string()


_U8 = _Type(Cursor.u8, lambda value: value.to_bytes(1))
_U16 = _Type(Cursor.u16, lambda value: value.to_bytes(2))
_U32 = _Type(Cursor.u32, lambda value: value.to_bytes(4))
_VARINT = _Type(Cursor.varint, varint)
_STRING = _Type(Cursor.string, string)
_BINARY = _Type(Cursor.binary, binary)
_PAIR = _Type(_read_pair, lambda pair: string(pair[0]) + string(pair[1]))

_ACKS = (PUBACK, PUBREC, PUBREL, PUBCOMP)
_ANSWERS = (CONNACK, *_ACKS, SUBACK, UNSUBACK, DISCONNECT, AUTH)
_TABLE: dict[int, tuple[P, _Type, frozenset[int]]] = {
    key: (key, kind, frozenset(packets))
    for key, kind, packets in (
        (P.PAYLOAD_FORMAT, _U8, (PUBLISH, WILL)),
        (P.MESSAGE_EXPIRY, _U32, (PUBLISH, WILL)),
        (P.CONTENT_TYPE, _STRING, (PUBLISH, WILL)),
        (P.RESPONSE_TOPIC, _STRING, (PUBLISH, WILL)),
        (P.CORRELATION_DATA, _BINARY, (PUBLISH, WILL)),
        (P.SUBSCRIPTION_ID, _VARINT, (PUBLISH, SUBSCRIBE)),
        (P.SESSION_EXPIRY, _U32, (CONNECT, CONNACK, DISCONNECT)),
        (P.ASSIGNED_CLIENT_ID, _STRING, (CONNACK,)),
        (P.SERVER_KEEP_ALIVE, _U16, (CONNACK,)),
        (P.AUTH_METHOD, _STRING, (CONNECT, CONNACK, AUTH)),
        (P.AUTH_DATA, _BINARY, (CONNECT, CONNACK, AUTH)),
        (P.REQUEST_PROBLEM_INFO, _U8, (CONNECT,)),
        (P.WILL_DELAY, _U32, (WILL,)),
        (P.REQUEST_RESPONSE_INFO, _U8, (CONNECT,)),
        (P.RESPONSE_INFO, _STRING, (CONNACK,)),
        (P.SERVER_REFERENCE, _STRING, (CONNACK, DISCONNECT)),
        (P.REASON_STRING, _STRING, _ANSWERS),
        (P.RECEIVE_MAXIMUM, _U16, (CONNECT, CONNACK)),
        (P.TOPIC_ALIAS_MAXIMUM, _U16, (CONNECT, CONNACK)),
        (P.TOPIC_ALIAS, _U16, (PUBLISH,)),
        (P.MAXIMUM_QOS, _U8, (CONNACK,)),
        (P.RETAIN_AVAILABLE, _U8, (CONNACK,)),
        (P.USER, _PAIR, (CONNECT, PUBLISH, WILL, SUBSCRIBE, UNSUBSCRIBE, *_ANSWERS)),
        (P.MAXIMUM_PACKET_SIZE, _U32, (CONNECT, CONNACK)),
        (P.WILDCARD_AVAILABLE, _U8, (CONNACK,)),
        (P.SUBSCRIPTION_IDS_AVAILABLE, _U8, (CONNACK,)),
        (P.SHARED_AVAILABLE, _U8, (CONNACK,)),
    )
}
_NOT_ZERO = frozenset((P.SUBSCRIPTION_ID, P.RECEIVE_MAXIMUM, P.MAXIMUM_PACKET_SIZE))


def _check(key: P, kind: _Type, value: Any) -> None:
    if kind is _U8 and value > 1:
        raise ProtocolError(f"property {key.name} is {value}, not 0 or 1", reason_code=R.PROTOCOL_ERROR)
    if key in _NOT_ZERO and not value:
        raise ProtocolError(f"property {key.name} is 0", reason_code=R.PROTOCOL_ERROR)


def read_properties(cursor: Cursor, packet_type: int) -> dict[P, Any]:
    """Reads a length and that many bytes of properties.

    Raises ProtocolError for one that is unknown, does not belong in the packet, stands twice,
    or holds a value the standard forbids.
    """
    length = cursor.varint()
    found: dict[P, Any] = {}
    if not length:
        return found
    end = cursor.pos + length
    if end > cursor.end:
        raise malformed("the properties reach beyond their packet")
    inner = Cursor(cursor.data, cursor.pos, end)
    while inner.pos < end:
        entry = _TABLE.get(inner.varint())
        if entry is None or packet_type not in entry[2]:
            raise malformed("a packet holds a property that does not belong there")
        key, kind, _ = entry
        value = kind.read(inner)
        _check(key, kind, value)
        if key is P.USER or (key is P.SUBSCRIPTION_ID and (packet_type == PUBLISH or key not in found)):
            found.setdefault(key, []).append(value)
        elif key in found:
            raise ProtocolError(f"property {key.name} stands twice", reason_code=R.PROTOCOL_ERROR)
        else:
            found[key] = value
    if P.AUTH_DATA in found and P.AUTH_METHOD not in found:
        raise ProtocolError("authentication data without a method", reason_code=R.PROTOCOL_ERROR)
    cursor.pos = end
    return found


def write_properties(properties: PropertyMap) -> bytes:
    """The length and the properties. Raises ProtocolError for a value the standard forbids."""
    out = bytearray()
    for key, value in properties.items():
        kind = _TABLE[key][1]
        for one in value if key in (P.USER, P.SUBSCRIPTION_ID) else (value,):
            _check(key, kind, one)
            out += varint(key) + kind.write(one)
    return varint(len(out)) + bytes(out)


def to_message_properties(found: PropertyMap) -> Properties:
    """The typed form of what PUBLISH or a will carried. Raises ProtocolError."""
    response_topic = found.get(P.RESPONSE_TOPIC)
    _check_response_topic(response_topic)
    return Properties(
        payload_format=found.get(P.PAYLOAD_FORMAT),
        message_expiry=found.get(P.MESSAGE_EXPIRY),
        content_type=found.get(P.CONTENT_TYPE),
        response_topic=response_topic,
        correlation_data=found.get(P.CORRELATION_DATA),
        user=tuple(found.get(P.USER, ())),
        subscription_ids=tuple(found.get(P.SUBSCRIPTION_ID, ())),
    )


def _check_response_topic(topic: str | None) -> None:
    if topic is not None and (not topic or "+" in topic or "#" in topic):
        raise ProtocolError(f"the response topic {topic!r} is not a topic name", reason_code=R.PROTOCOL_ERROR)


def from_message_properties(properties: Properties) -> dict[P, Any]:
    """The dict form; fields that are None or empty are left out. Raises ProtocolError."""
    found: dict[P, Any] = {}
    _check_response_topic(properties.response_topic)
    if properties.payload_format is not None:
        found[P.PAYLOAD_FORMAT] = properties.payload_format
    if properties.message_expiry is not None:
        found[P.MESSAGE_EXPIRY] = properties.message_expiry
    if properties.content_type is not None:
        found[P.CONTENT_TYPE] = properties.content_type
    if properties.response_topic is not None:
        found[P.RESPONSE_TOPIC] = properties.response_topic
    if properties.correlation_data is not None:
        found[P.CORRELATION_DATA] = properties.correlation_data
    if properties.user:
        found[P.USER] = properties.user
    if properties.subscription_ids:
        found[P.SUBSCRIPTION_ID] = properties.subscription_ids
    return found
