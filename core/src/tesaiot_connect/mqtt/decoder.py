"""Bytes to packets, for one direction of one stream.

Owns: packet framing, PUBLISH decoding, inbound topic aliases. Rules: one tight loop per chunk;
runs of PUBLISH and of acknowledgements come out as lists; a packet that breaks the standard
ends the flow with a `ProtocolError` as its last item, and what came before it still counts.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from ..errors import ProtocolError
from ..message import NO_PROPERTIES, Message, Properties
from . import properties as t
from .codec import FLAGS, FROM_CLIENT, FROM_SERVER, decode_ack
from .packets import V3, V5, Connect
from .primitives import Cursor, malformed, text
from .properties import P, read_properties, to_message_properties
from .reasons import R
from .topics import check_topic

_HEAD = struct.Struct(">BBH")
_COMMON = 16_386
"""Bytes of the longest packet whose remaining length takes at most two bytes."""
_CACHE_LIMIT = 4096
"""Entries in the caches of topics and of property blocks before they start afresh."""
_CACHED_TOPIC = 256
"""Bytes of a topic that is worth remembering: what a hostile peer can make us keep is bounded."""


class Publishes(NamedTuple):
    """Consecutive PUBLISH packets; `ids` is parallel to `messages`, 0 for QoS 0."""

    messages: list[Message]
    ids: list[int]
    qos2: bool
    """Whether any of them has QoS 2."""


class Acks(NamedTuple):
    """Consecutive acknowledgements of one type (`properties.PUBACK` to `PUBCOMP`)."""

    packet_type: int
    ids: list[int]
    reasons: dict[int, int]
    """Packet identifier to reason code where that is not 0."""


class Decoder:
    """Feed it what arrived; it gives packets in order.

    `from_client` says whose packets these are (a server decodes those of a client). `version`
    follows from CONNECT on the server; the client sets it. `topic_alias_maximum` is what this
    side announced.
    """

    def __init__(
        self,
        *,
        from_client: bool,
        version: int = V5,
        maximum_packet_size: int = 1_048_576,
        topic_alias_maximum: int = 0,
    ) -> None:
        self.version = version
        self.maximum_packet_size = maximum_packet_size
        self.topic_alias_maximum = topic_alias_maximum
        self._decode = FROM_CLIENT if from_client else FROM_SERVER
        self._from_client = from_client
        self._topics: dict[bytes, str] = {}
        self._blocks: dict[bytes, tuple[Properties, int]] = {}
        self._aliases: dict[int, str] = {}
        self._parts: list[bytes] = []
        self._have = 0
        self._need = 0
        self._failed = False

    @property
    def buffered(self) -> int:
        """Bytes of an unfinished packet that wait here."""
        return self._have

    def feed(self, data: bytes) -> list[Any]:
        """Publishes, Acks, control packets (`packets`), and at the very end perhaps a ProtocolError.

        After an error nothing is decoded any more.
        """
        if self._failed:
            return []
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        items: list[Any] = []
        try:
            pos = self._packets(data, items)
        except ProtocolError as error:
            self._failed = True
            self._have = 0
            items.append(error)
            return items
        self._have = len(data) - pos
        if self._have:
            self._parts.append(data[pos:])
        return items

    def _packets(self, data: bytes, items: list[Any]) -> int:
        """Decodes all whole packets; returns where the unfinished one starts.

        The inner loop takes what most packets are, a PUBLISH below 16 KiB on a known topic, QoS 0
        or 1, without properties; it leaves whatever else it meets, right or wrong, to the rest.
        """
        limit = self.maximum_packet_size
        common = limit >= _COMMON
        known = self._topics.get
        head = _HEAD.unpack_from
        messages: list[Message] = []
        ids: list[int] = []
        qos2 = False
        pos = 0
        end = len(data)
        try:
            while end - pos >= 2:
                add_message, add_id, v5 = messages.append, ids.append, self.version == V5
                while common and end - pos > 4:
                    first, length, size = head(data, pos)
                    start = pos + 4
                    if length > 0x7F:
                        high = size >> 8
                        if not 0 < high < 0x80:
                            break
                        length += (high << 7) - 0x80
                        size = (size & 0xFF) << 8 | data[start]
                        start += 1
                    stop = start + length - 2
                    at = start + size
                    if stop > end or at >= stop:
                        break
                    topic = known(data[start:at])
                    if topic is None:
                        break
                    if first == 0x30:
                        packet_id = 0
                    elif first == 0x32 and at + 2 < stop:
                        packet_id = data[at] << 8 | data[at + 1]
                        if not packet_id:
                            break
                        at += 2
                    else:
                        break
                    if v5:
                        if data[at]:
                            break
                        at += 1
                    if packet_id:
                        add_message(Message(topic, data[at:stop], 1))
                    else:
                        add_message(Message(topic, data[at:stop]))
                    add_id(packet_id)
                    pos = stop
                if end - pos < 2:
                    continue
                first = data[pos]
                length, start = self._length(data, pos, end)
                if not start:
                    break
                stop = start + length
                if stop - pos > limit:
                    raise ProtocolError(
                        f"a packet of {stop - pos} bytes is larger than the {limit} allowed",
                        reason_code=R.PACKET_TOO_LARGE,
                    )
                if stop > end:
                    self._need = stop - pos
                    break
                pos = stop
                if first & 0xF0 == 0x30:
                    message, packet_id = self._publish(first, data, start, stop)
                    messages.append(message)
                    ids.append(packet_id)
                    qos2 = qos2 or message.qos == 2
                    continue
                if messages:
                    items.append(Publishes(messages, ids, qos2))
                    messages, ids, qos2 = [], [], False
                if self._other(first, data, start, stop, items):
                    self._need = 0
                    break
            else:
                self._need = 2
        finally:
            if messages:
                items.append(Publishes(messages, ids, qos2))
        return pos

    def _publish(self, first: int, data: bytes, start: int, stop: int) -> tuple[Message, int]:
        """Any PUBLISH: the message and its packet identifier, 0 for QoS 0."""
        if stop - start < 3:
            raise malformed("PUBLISH is too short")
        at = start + 2 + (data[start] << 8 | data[start + 1])
        if at > stop:
            raise malformed("the topic reaches beyond its PUBLISH")
        raw = data[start + 2 : at]
        topic = self._topics.get(raw)
        if topic is None:
            topic = self._topic(raw)
        packet_id = 0
        if first & 6:
            if first & 6 == 6 or at + 2 > stop:
                raise malformed("PUBLISH with QoS 3 or without its packet identifier")
            packet_id = data[at] << 8 | data[at + 1]
            if not packet_id:
                raise ProtocolError("PUBLISH with packet identifier 0", reason_code=R.PROTOCOL_ERROR)
            at += 2
        elif first & 8:
            raise malformed("PUBLISH with QoS 0 and DUP")
        properties = NO_PROPERTIES
        if self.version == V5:
            if at >= stop:
                raise malformed("PUBLISH ends before its properties")
            alias = 0
            if data[at]:
                properties, alias, at = self._properties(data, at, stop)
            else:
                at += 1
            if alias:
                topic = self._alias(alias, topic)
            elif not topic:
                raise ProtocolError("PUBLISH without topic or alias", reason_code=R.PROTOCOL_ERROR)
        return Message(topic, data[at:stop], first >> 1 & 3, first & 1 == 1, properties), packet_id

    def _length(self, data: bytes, pos: int, end: int) -> tuple[int, int]:
        """A remaining length of two to four bytes and where the body starts; 0 if it is not all here."""
        length = 0
        for index in range(4):
            at = pos + 1 + index
            if at >= end:
                self._need = end - pos + 1
                return 0, 0
            byte = data[at]
            length |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if index and not byte:
                    raise malformed("a remaining length is not in its shortest form")
                return length, at + 1
        raise malformed("a remaining length is longer than four bytes")

    def _topic(self, raw: bytes) -> str:
        """Decodes, checks and remembers a topic name; an empty one may stand for an alias."""
        if not raw:
            if self.version != V5:
                raise ProtocolError("PUBLISH without a topic", reason_code=R.TOPIC_NAME_INVALID)
            return ""
        topic = text(raw)
        check_topic(topic)
        if len(raw) <= _CACHED_TOPIC:
            if len(self._topics) >= _CACHE_LIMIT:
                self._topics.clear()
            self._topics[raw] = topic
        return topic

    def _properties(self, data: bytes, at: int, stop: int) -> tuple[Properties, int, int]:
        """Properties, topic alias (0 for none) and where the payload starts."""
        length = data[at]
        payload = at + 1 + length
        if length < 0x80:
            block = data[at:payload]
            known = self._blocks.get(block)
            if known is not None and payload <= stop:
                return known[0], known[1], payload
        cursor = Cursor(data, at, stop)
        found = read_properties(cursor, t.PUBLISH)
        alias = found.pop(P.TOPIC_ALIAS, None)
        if alias is not None and not 0 < alias <= self.topic_alias_maximum:
            raise ProtocolError(
                f"topic alias {alias} is not between 1 and {self.topic_alias_maximum}",
                reason_code=R.TOPIC_ALIAS_INVALID,
            )
        if self._from_client and P.SUBSCRIPTION_ID in found:
            raise ProtocolError("a client sent a subscription identifier", reason_code=R.PROTOCOL_ERROR)
        properties = to_message_properties(found) if found else NO_PROPERTIES
        if length < 0x80:
            if len(self._blocks) >= _CACHE_LIMIT:
                self._blocks.clear()
            self._blocks[block] = properties, alias or 0
        return properties, alias or 0, cursor.pos

    def _alias(self, alias: int, topic: str) -> str:
        if topic:
            self._aliases[alias] = topic
            return topic
        try:
            return self._aliases[alias]
        except KeyError:
            raise ProtocolError(f"topic alias {alias} was never set", reason_code=R.PROTOCOL_ERROR) from None

    def _other(self, first: int, data: bytes, start: int, stop: int, items: list[Any]) -> bool:
        """Decodes one packet that is no PUBLISH; says whether to stop there, which is after
        CONNECT: what follows is decoded by the next `feed`, in the version CONNECT asked for."""
        packet_type = first >> 4
        if first & 0x0F != FLAGS.get(packet_type, 0):
            raise malformed(f"packet type {packet_type} with the reserved flags {first & 0x0F}")
        if t.PUBACK <= packet_type <= t.PUBCOMP:
            if stop - start == 2:
                packet_id = data[start] << 8 | data[start + 1]
                reason = 0
                if not packet_id:
                    raise ProtocolError(
                        "an acknowledgement of packet identifier 0", reason_code=R.PROTOCOL_ERROR
                    )
            else:
                packet_id, reason = decode_ack(Cursor(data, start, stop), self.version, packet_type)
            last = items[-1] if items else None
            if type(last) is not Acks or last.packet_type != packet_type:
                last = Acks(packet_type, [], {})
                items.append(last)
            last.ids.append(packet_id)
            if reason:
                last.reasons[packet_id] = reason
            return False
        decode = self._decode.get(packet_type)
        if not packet_type:
            raise malformed("packet type 0 does not exist")
        if decode is None:
            raise ProtocolError(
                f"packet type {packet_type} must not come from this side", reason_code=R.PROTOCOL_ERROR
            )
        packet = decode(Cursor(data, start, stop), self.version)
        items.append(packet)
        if type(packet) is not Connect:
            return False
        self.version = V5 if packet.version == V5 else V3
        return True
