"""Encoding and decoding of whole control packets, all but PUBLISH decoding (see `decoder`).

Owns: the layout of each packet and the reason codes it may carry. Rule: both versions go
through one function per packet; the version decides only what is on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ProtocolError
from ..message import Message
from . import properties as t
from .packets import (
    V5,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Ping,
    SubackPacket,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
)
from .primitives import Cursor, binary, malformed, packet, string
from .properties import (
    P,
    PropertyMap,
    from_message_properties,
    read_properties,
    to_message_properties,
    write_properties,
)
from .reasons import FROM_CONNACK_V3, TO_CONNACK_V3, R
from .topics import check_filter, check_topic

_CONNACK_CODES = frozenset(
    (0x00, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F)
)
_SUBACK_CODES_V3 = frozenset((0, 1, 2, 0x80))
_SUBACK_CODES = frozenset((0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2))
_UNSUBACK_CODES = frozenset((0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91))
_DISCONNECT_CODES = frozenset((0x00, 0x04, *range(0x80, 0x84), 0x87, 0x89, *range(0x8B, 0xA3))) - {
    0x8A,
    0x8C,
    0x91,
    0x92,
}
_AUTH_CODES = frozenset((0x00, 0x18, 0x19))
_PUBACK_CODES = frozenset((0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99))
_PUBREL_CODES = frozenset((0x00, 0x92))
ACK_CODES = {
    t.PUBACK: _PUBACK_CODES,
    t.PUBREC: _PUBACK_CODES,
    t.PUBREL: _PUBREL_CODES,
    t.PUBCOMP: _PUBREL_CODES,
}
"""Reason codes each acknowledgement may carry (MQTT 5 sections 3.4 to 3.7)."""

_NAMES = {b"MQTT": (4, 5), b"MQIsdp": (3,)}


def _reason(cursor: Cursor, allowed: frozenset[int], name: str) -> int:
    code = cursor.u8()
    if code not in allowed:
        raise malformed(f"{name} with the undefined reason code 0x{code:02X}")
    return code


def decode_connect(cursor: Cursor, version: int) -> Connect:
    name = cursor.binary()
    if name not in _NAMES:
        raise ProtocolError(
            f"CONNECT names the protocol {name[:16]!r}, not MQTT", reason_code=R.UNSUPPORTED_PROTOCOL_VERSION
        )
    level = cursor.u8()
    bridge, level = level >= 0x80, level & 0x7F
    if level not in _NAMES[name]:
        raise ProtocolError(
            f"CONNECT asks for protocol level {level}; 3, 4 and 5 are spoken here",
            reason_code=R.UNSUPPORTED_PROTOCOL_VERSION,
        )
    flags = cursor.u8()
    will_qos = flags >> 3 & 3
    if flags & 1:
        raise malformed("CONNECT sets its reserved flag")
    if will_qos == 3 or (not flags & 4 and flags & 0x38):
        raise malformed("CONNECT has impossible will flags")
    if level < V5 and flags & 0x40 and not flags & 0x80:
        raise malformed("CONNECT has a password but no user name")
    keepalive = cursor.u16()
    found = read_properties(cursor, t.CONNECT) if level == V5 else {}
    client_id = cursor.string()
    will = None
    if flags & 4:
        will_found = read_properties(cursor, t.WILL) if level == V5 else {}
        topic = cursor.string()
        check_topic(topic)
        message = Message(
            topic, cursor.binary(), will_qos, bool(flags & 0x20), to_message_properties(will_found)
        )
        will = Will(message, will_found.get(P.WILL_DELAY, 0))
    username = cursor.string() if flags & 0x80 else None
    password = cursor.binary() if flags & 0x40 else None
    cursor.finish()
    return Connect(
        client_id=client_id,
        version=level,
        clean_start=bool(flags & 2),
        keepalive=keepalive,
        username=username,
        password=password,
        will=will,
        properties=found,
        bridge=bridge,
    )


def encode_connect(connect: Connect) -> bytes:
    v5 = connect.version == V5
    will = connect.will
    flags = 0x02 if connect.clean_start else 0
    body = string(connect.client_id)
    if will is not None:
        check_topic(will.message.topic)
        flags |= 0x04 | will.message.qos << 3 | (0x20 if will.message.retain else 0)
        if v5:
            found = from_message_properties(will.message.properties)
            if will.delay:
                found[P.WILL_DELAY] = will.delay
            body += write_properties(found)
        body += string(will.message.topic) + binary(will.message.payload)
    if connect.username is not None:
        flags |= 0x80
        body += string(connect.username)
    if connect.password is not None:
        if not v5 and connect.username is None:
            raise ProtocolError(
                "MQTT 3.1.1 knows no password without a user name",
                fix="set a user name as well",
                reason_code=R.BAD_USER_NAME_OR_PASSWORD,
            )
        flags |= 0x40
        body += binary(connect.password)
    name = b"MQIsdp" if connect.version == 3 else b"MQTT"
    level = connect.version | (0x80 if connect.bridge else 0)
    head = binary(name) + bytes((level, flags)) + connect.keepalive.to_bytes(2)
    return packet(0x10, head + (write_properties(connect.properties) if v5 else b"") + body)


def decode_connack(cursor: Cursor, version: int) -> Connack:
    flags = cursor.u8()
    if flags & 0xFE:
        raise malformed("CONNACK sets a reserved flag")
    found: dict[P, Any] = {}
    if version == V5 and cursor.left() == 1 and cursor.data[cursor.pos]:
        # a refusal without properties: how a 3.1.1 server says no, and some of MQTT 5 do too
        raw = cursor.u8()
        code = FROM_CONNACK_V3.get(raw, raw)
        if code not in _CONNACK_CODES:
            raise malformed(f"CONNACK with the undefined reason code 0x{raw:02X}")
    elif version == V5:
        code = _reason(cursor, _CONNACK_CODES, "CONNACK")
        found = read_properties(cursor, t.CONNACK)
    else:
        raw = cursor.u8()
        if raw not in FROM_CONNACK_V3:
            raise malformed(f"CONNACK with the undefined return code {raw}")
        code = FROM_CONNACK_V3[raw]
    cursor.finish()
    if code and flags:
        raise ProtocolError(
            "CONNACK refuses and says that a session is present", reason_code=R.PROTOCOL_ERROR
        )
    return Connack(reason_code=int(code), session_present=bool(flags), properties=found)


def encode_connack(connack: Connack, version: int) -> bytes:
    present = b"\x01" if connack.session_present else b"\x00"
    if version == V5:
        return packet(0x20, present + bytes((connack.reason_code,)) + write_properties(connack.properties))
    try:
        code = TO_CONNACK_V3.get(R(connack.reason_code), 3)
    except ValueError:
        code = 3
    return packet(0x20, present + bytes((code,)))


def decode_subscribe(cursor: Cursor, version: int) -> Subscribe:
    packet_id = cursor.packet_id()
    found = read_properties(cursor, t.SUBSCRIBE) if version == V5 else {}
    subscriptions = []
    while cursor.left():
        topic_filter = cursor.string()
        check_filter(topic_filter)
        options = cursor.u8()
        if options & (0xC0 if version == V5 else 0xFC) or options & 3 == 3 or options >> 4 & 3 == 3:
            raise malformed("SUBSCRIBE has impossible subscription options")
        if options & 4 and topic_filter.startswith("$share/"):
            raise ProtocolError("no local on a shared subscription", reason_code=R.PROTOCOL_ERROR)
        subscriptions.append(
            Subscription(topic_filter, options & 3, bool(options & 4), bool(options & 8), options >> 4 & 3)
        )
    if not subscriptions:
        raise ProtocolError("SUBSCRIBE without a topic filter", reason_code=R.PROTOCOL_ERROR)
    return Subscribe(packet_id=packet_id, subscriptions=tuple(subscriptions), properties=found)


def encode_subscribe(subscribe: Subscribe, version: int) -> bytes:
    v5 = version == V5
    body = bytearray(subscribe.packet_id.to_bytes(2))
    if v5:
        body += write_properties(subscribe.properties)
    if not subscribe.subscriptions:
        raise ProtocolError("SUBSCRIBE without a topic filter", reason_code=R.PROTOCOL_ERROR)
    for one in subscribe.subscriptions:
        check_filter(one.topic_filter)
        if v5 and one.no_local and one.topic_filter.startswith("$share/"):
            raise ProtocolError("no local on a shared subscription", reason_code=R.PROTOCOL_ERROR)
        options = one.qos
        if v5:
            options |= one.no_local << 2 | one.retain_as_published << 3 | one.retain_handling << 4
        body += string(one.topic_filter)
        body.append(options)
    return packet(0x82, bytes(body))


def decode_unsubscribe(cursor: Cursor, version: int) -> Unsubscribe:
    packet_id = cursor.packet_id()
    found = read_properties(cursor, t.UNSUBSCRIBE) if version == V5 else {}
    filters = []
    while cursor.left():
        topic_filter = cursor.string()
        check_filter(topic_filter)
        filters.append(topic_filter)
    if not filters:
        raise ProtocolError("UNSUBSCRIBE without a topic filter", reason_code=R.PROTOCOL_ERROR)
    return Unsubscribe(packet_id=packet_id, filters=tuple(filters), properties=found)


def encode_unsubscribe(unsubscribe: Unsubscribe, version: int) -> bytes:
    body = unsubscribe.packet_id.to_bytes(2)
    if not unsubscribe.filters:
        raise ProtocolError("UNSUBSCRIBE without a topic filter", reason_code=R.PROTOCOL_ERROR)
    for topic_filter in unsubscribe.filters:
        check_filter(topic_filter)
    if version == V5:
        body += write_properties(unsubscribe.properties)
    return packet(0xA2, body + b"".join(map(string, unsubscribe.filters)))


def _decode_suback(cursor: Cursor, version: int, packet_type: int, allowed: frozenset[int]) -> SubackPacket:
    packet_id = cursor.packet_id()
    found = read_properties(cursor, packet_type) if version == V5 else {}
    codes = cursor.rest()
    if not codes or not allowed.issuperset(codes):
        raise malformed("SUBACK or UNSUBACK without a reason code or with an undefined one")
    return SubackPacket(packet_id=packet_id, codes=codes, properties=found)


def decode_suback(cursor: Cursor, version: int) -> SubackPacket:
    return _decode_suback(cursor, version, t.SUBACK, _SUBACK_CODES if version == V5 else _SUBACK_CODES_V3)


def decode_unsuback(cursor: Cursor, version: int) -> SubackPacket:
    if version != V5:
        found = SubackPacket(packet_id=cursor.packet_id(), codes=b"")
        cursor.finish()
        return found
    return _decode_suback(cursor, version, t.UNSUBACK, _UNSUBACK_CODES)


def encode_suback(first_byte: int, suback: SubackPacket, version: int) -> bytes:
    """SUBACK (0x90) or UNSUBACK (0xB0)."""
    head = suback.packet_id.to_bytes(2)
    if version == V5:
        return packet(first_byte, head + write_properties(suback.properties) + suback.codes)
    if first_byte == 0xB0:
        return packet(first_byte, head)
    return packet(first_byte, head + bytes(min(128, code) for code in suback.codes))


def decode_disconnect(cursor: Cursor, version: int) -> Disconnect:
    if version != V5:
        cursor.finish()
        return Disconnect()
    code = _reason(cursor, _DISCONNECT_CODES, "DISCONNECT") if cursor.left() else 0
    found = read_properties(cursor, t.DISCONNECT) if cursor.left() else {}
    cursor.finish()
    return Disconnect(reason_code=code, properties=found)


def decode_auth(cursor: Cursor, version: int) -> Auth:
    if version != V5:
        raise ProtocolError("AUTH does not exist before MQTT 5", reason_code=R.PROTOCOL_ERROR)
    if not cursor.left():  # section 3.15.2.1 allows it, whom it may help is not said
        return Auth()
    code = _reason(cursor, _AUTH_CODES, "AUTH")
    found = read_properties(cursor, t.AUTH) if cursor.left() else {}
    cursor.finish()
    if P.AUTH_METHOD not in found:
        raise ProtocolError("AUTH without an authentication method", reason_code=R.PROTOCOL_ERROR)
    return Auth(reason_code=code, properties=found)


def encode_disconnect(disconnect: Disconnect, version: int) -> bytes:
    return _encode_short(0xE0, disconnect.reason_code, disconnect.properties, version)


def encode_auth(auth: Auth) -> bytes:
    return _encode_short(0xF0, auth.reason_code, auth.properties, V5)


def _encode_short(first_byte: int, code: int, found: PropertyMap, version: int) -> bytes:
    if version != V5 or (not code and not found):
        return bytes((first_byte, 0))
    return packet(first_byte, bytes((code,)) + (write_properties(found) if found else b""))


def decode_ping(cursor: Cursor, version: int) -> Ping:
    cursor.finish()
    return Ping()


def decode_ack(cursor: Cursor, version: int, packet_type: int) -> tuple[int, int]:
    """PUBACK, PUBREC, PUBREL or PUBCOMP: packet identifier and reason code."""
    packet_id = cursor.packet_id()
    if version != V5:
        cursor.finish()
        return packet_id, 0
    code = _reason(cursor, ACK_CODES[packet_type], "an acknowledgement") if cursor.left() else 0
    if cursor.left():
        read_properties(cursor, packet_type)
    cursor.finish()
    return packet_id, code


_Decode = Callable[[Cursor, int], Any]
FROM_CLIENT: dict[int, _Decode] = {
    t.CONNECT: decode_connect,
    t.SUBSCRIBE: decode_subscribe,
    t.UNSUBSCRIBE: decode_unsubscribe,
    t.PINGREQ: decode_ping,
    t.DISCONNECT: decode_disconnect,
    t.AUTH: decode_auth,
}
"""What a server takes beside PUBLISH and acknowledgements."""
FROM_SERVER: dict[int, _Decode] = {
    t.CONNACK: decode_connack,
    t.SUBACK: decode_suback,
    t.UNSUBACK: decode_unsuback,
    t.PINGRESP: decode_ping,
    t.DISCONNECT: decode_disconnect,
    t.AUTH: decode_auth,
}
"""What a client takes beside PUBLISH and acknowledgements."""
FLAGS = {t.PUBREL: 2, t.SUBSCRIBE: 2, t.UNSUBSCRIBE: 2}
"""Fixed header flags that are not 0 (MQTT 5 section 2.1.3)."""
