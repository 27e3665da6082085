"""One stream of a connection: its decoder, packet identifiers, in-flight window and output.

Owns: the QoS 1 and 2 exchanges in both directions (MQTT 5 sections 4.3, 4.4, 4.9), the same for
client and server. Rules: messages move in lists; acknowledgements go out in the order the
messages came in (section 4.6).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ProtocolError
from ..message import NO_PROPERTIES, Message, Properties
from . import properties as t
from .decoder import Acks, Decoder, Publishes
from .packets import V5
from .primitives import MAX_VARINT, string, varint
from .properties import P, from_message_properties, write_properties
from .reasons import R
from .session import InFlight, Session

MAX_WINDOW = 65_000
"""In flight at most, so that a free packet identifier always exists."""
_CACHE_LIMIT = 4096
_CACHED_TOPIC = 256
"""Bytes of a topic that is worth remembering."""
_EARLY_MESSAGES = 16
_EARLY_BYTES = 8192
"""What may be sent before the peer has accepted the connection, which it may have to keep."""


class PeerLimits(NamedTuple):
    """What the other side announced it takes."""

    receive_maximum: int = 65_535
    maximum_packet_size: int = 268_435_460
    maximum_qos: int = 2
    retain_available: bool = True
    topic_alias_maximum: int = 0


class _Pending(NamedTuple):
    """What one `Received` holds back: identifiers and their QoS, until it is settled."""

    ids: list[int]
    qos: Sequence[int] | None
    """Parallel to ids; None when none is 2."""


class Flow:
    """State of one stream. `stream` 0 is the control stream, whose session outlives it."""

    def __init__(
        self, stream: int, session: Session, decoder: Decoder, *, send_buffer: int, server: bool
    ) -> None:
        self.stream = stream
        self.session = session
        self.decoder = decoder
        self.held = bytearray()
        """What arrived before the connection was accepted."""
        self.send_buffer = send_buffer
        self.out: list[bytes] = []
        self.out_size = 0
        self.receive_maximum = 65_535
        self.maximum_qos = 2
        self.retain_available = True
        """These three are what this side announced."""
        self.reserved: set[int] = set()
        """Packet identifiers of SUBSCRIBE and UNSUBSCRIBE that wait for their answer."""
        self.ended = False
        """The peer has ended the stream and what it had sent is still held."""
        self._server = server
        self._peer = PeerLimits()
        self._window = 0
        self._quota = 0
        self._v5 = True
        self._topics: dict[str, bytes] = {}
        self._aliases: dict[str, int] = {}
        self._order: deque[int] = deque()
        """What is to be acknowledged, in order of arrival: tokens, and for a QoS 2 message that
        an earlier connection brought first, minus its packet identifier."""
        self._pending: dict[int, _Pending] = {}
        self._settled: dict[int, Sequence[int] | None] = {}
        self._waiting = 0
        self._open: set[int] = set()
        """QoS 2 identifiers of this connection between PUBREC and PUBREL. With `_waiting` they are
        what the peer may count against our Receive Maximum (section 4.9)."""
        self.refused: dict[int, int] = {}
        """Keys of messages the peer does not take, and why, until the owner is told."""
        self._resend: deque[int] = deque()
        self._unquoted: set[int] = set()
        """Identifiers whose PUBLISH went out on an earlier connection, so they took none of this quota."""
        self._dup = True
        self._early: dict[int, int] = {}
        """Identifiers of what went out before CONNACK, and the size of each PUBLISH in bytes."""

    def start(self, version: int, peer: PeerLimits, *, window: int = MAX_WINDOW) -> None:
        """The connection is accepted: messages may flow, within what the peer announced."""
        self._v5 = version == V5
        self.decoder.version = version
        self._peer = peer
        self._window = self._quota = min(peer.receive_maximum, window, MAX_WINDOW)

    def resume(self, *, dup: bool) -> None:
        """Send again what is in flight in the session (section 4.4), as the window allows.

        `dup` False: the peer has a new session, so the messages go out as new ones. What was
        published early is on its way already; it counts against the window from now on.
        """
        for packet_id, entry in list(self.session.outbound.items()):
            if packet_id in self._early:
                if reason := self._excluded(entry.message, self._early[packet_id]):
                    self.refused[entry.key] = reason
                    del self.session.outbound[packet_id]
                else:
                    self._quota -= 1
            elif entry.released:
                self._unquoted.add(packet_id)
                self.write(b"\x62\x02" + packet_id.to_bytes(2))
            else:
                self._resend.append(packet_id)
        self._dup = dup
        self._send_again()

    def write(self, data: bytes) -> None:
        self.out.append(data)
        self.out_size += len(data)

    def take(self) -> bytes:
        data = b"".join(self.out)
        self.out.clear()
        self.out_size = 0
        return data

    # --- outbound messages ----------------------------------------------------------------

    def publish(self, messages: Sequence[Message], keys: Sequence[int]) -> int:
        """Encodes from the front while window and buffer allow; returns how many were taken.

        A message the peer said it cannot take counts as taken and is noted in `refused`.
        """
        if self._resend or not self._window:
            return 0
        session, reserved = self.session, self.reserved
        outbound = session.outbound
        room = min(self._quota, MAX_WINDOW - len(outbound))
        taken = 0
        for message, key in zip(messages, keys, strict=True):
            if self.out_size >= self.send_buffer:
                break
            if message.qos:
                if room <= 0:
                    break
                packet_id = session.next_id()
                while packet_id in reserved:
                    packet_id = session.next_id()
            else:
                packet_id = 0
            taken += 1
            reason = self._encode(message, packet_id, 0)
            if reason:
                self.refused[key] = reason
            elif packet_id:
                outbound[packet_id] = InFlight(key, message)
                self._quota -= 1
                room -= 1
        return taken

    def publish_early(
        self, version: int, peer: PeerLimits, messages: Sequence[Message], keys: Sequence[int]
    ) -> int:
        """As `publish`, right behind CONNECT; `peer` is what may be expected of it. Takes only QoS 1
        from the front, a few kilobytes in all, and nothing where a session has anything in flight.
        """
        outbound, early = self.session.outbound, self._early
        if self._window or len(outbound) > len(early):
            return 0
        self._v5 = version == V5
        self._peer = peer._replace(topic_alias_maximum=0)
        most = min(_EARLY_MESSAGES, peer.receive_maximum)
        taken = 0
        for message, key in zip(messages, keys, strict=True):
            if message.qos != 1 or len(early) >= most:
                break
            count, size = len(self.out), self.out_size
            packet_id = self.session.next_id()
            if self._encode(message, packet_id, 0):
                break
            if sum(early.values()) + self.out_size - size > _EARLY_BYTES:
                del self.out[count:]
                self.out_size = size
                break
            early[packet_id] = self.out_size - size
            outbound[packet_id] = InFlight(key, message)
            taken += 1
        return taken

    def withdraw(self) -> list[int]:
        """The keys of what was published early: the connection never came to be."""
        outbound = self.session.outbound
        keys = [outbound.pop(packet_id).key for packet_id in self._early]
        self._early.clear()
        return keys

    def _excluded(self, message: Message, size: int) -> int:
        """Why the peer would not take a PUBLISH of QoS 1 and that size; 0 if it would."""
        peer = self._peer
        if not peer.maximum_qos:
            return R.QOS_NOT_SUPPORTED
        if message.retain and not peer.retain_available:
            return R.RETAIN_NOT_SUPPORTED
        return R.PACKET_TOO_LARGE if size > peer.maximum_packet_size else 0

    def _encode(self, message: Message, packet_id: int, dup: int) -> int:
        """Appends one PUBLISH; or returns the reason code why the peer would not take it."""
        peer = self._peer
        qos = message.qos
        if qos > peer.maximum_qos:
            return R.QOS_NOT_SUPPORTED
        if message.retain and not peer.retain_available:
            return R.RETAIN_NOT_SUPPORTED
        topic = message.topic
        head = self._topics.get(topic)
        if head is None:
            head = self._head(topic)
            if not head:
                return R.TOPIC_NAME_INVALID
        new_alias = 0
        block = b""
        if self._v5:
            alias = self._aliases.get(topic, 0)
            if alias:
                head = b"\0\0"
            elif len(self._aliases) < peer.topic_alias_maximum:
                alias = new_alias = len(self._aliases) + 1
            if message.properties is NO_PROPERTIES:
                block = b"\3\x23" + alias.to_bytes(2) if alias else b"\0"
            else:
                try:
                    block = self._properties(message.properties, alias)
                except (ProtocolError, OverflowError):
                    return R.PAYLOAD_FORMAT_INVALID
        payload = message.payload
        body = len(head) + len(block) + len(payload) + (2 if qos else 0)
        first = 0x30 | dup | qos << 1 | message.retain
        if body < 0x80:
            fixed = bytes((first, body))
        elif body <= MAX_VARINT:
            fixed = bytes((first,)) + varint(body)
        else:
            return R.PACKET_TOO_LARGE
        size = len(fixed) + body
        if size > peer.maximum_packet_size:
            return R.PACKET_TOO_LARGE
        if new_alias:
            self._aliases[topic] = new_alias
        self.out += (fixed, head, packet_id.to_bytes(2) + block if qos else block, payload)
        self.out_size += size
        return 0

    def _head(self, topic: str) -> bytes:
        """The topic as a PUBLISH carries it; empty if none may."""
        try:
            head = string(topic)
        except ProtocolError:
            return b""
        if len(head) == 2 or "+" in topic or "#" in topic:
            return b""
        if len(head) <= _CACHED_TOPIC:
            if len(self._topics) >= _CACHE_LIMIT:
                self._topics.clear()
            self._topics[topic] = head
        return head

    def _properties(self, properties: Properties, alias: int) -> bytes:
        found = from_message_properties(properties)
        if not self._server:
            found.pop(P.SUBSCRIPTION_ID, None)
        if alias:
            found[P.TOPIC_ALIAS] = alias
        return write_properties(found)

    def _send_again(self) -> None:
        outbound = self.session.outbound
        while self._resend and self._quota > 0:
            packet_id = self._resend.popleft()
            entry = outbound.get(packet_id)
            if entry is None:
                continue
            if reason := self._encode(entry.message, packet_id, 8 if self._dup else 0):
                self.refused[entry.key] = reason
                del outbound[packet_id]
            else:
                self._quota -= 1

    def acks(self, acks: Acks, keys: list[int]) -> None:
        """Takes PUBACK, PUBREC or PUBCOMP (for what we sent) or PUBREL (for what we got).

        Appends to `keys` what is done; what the peer did not take is noted in `refused`.
        """
        if acks.packet_type == t.PUBREL:
            self._release(acks.ids)
            return
        outbound = self.session.outbound
        reasons = acks.reasons
        answers: list[bytes] = []
        freed = 0
        for packet_id in acks.ids:
            entry = outbound.get(packet_id)
            reason = reasons.get(packet_id, 0) if reasons else 0
            if entry is None:
                if acks.packet_type == t.PUBREC and reason < 0x80:
                    unknown = b"\x62\x03%b\x92" if self._v5 else b"\x62\x02%b"
                    answers.append(unknown % packet_id.to_bytes(2))
                continue
            if (acks.packet_type == t.PUBACK) != (entry.message.qos == 1) or (
                acks.packet_type == t.PUBCOMP and not entry.released
            ):
                raise ProtocolError(
                    f"the wrong kind of acknowledgement for packet identifier {packet_id}",
                    reason_code=R.PROTOCOL_ERROR,
                )
            if acks.packet_type == t.PUBREC and reason < 0x80:
                entry.released = True
                answers.append(b"\x62\x02" + packet_id.to_bytes(2))
                continue
            del outbound[packet_id]
            if packet_id in self._unquoted:
                self._unquoted.discard(packet_id)
            else:
                freed += 1
            if reason >= 0x80 and acks.packet_type != t.PUBCOMP:
                self.refused[entry.key] = reason
            else:
                keys.append(entry.key)
        if answers:
            self.write(b"".join(answers))
        self._quota = min(self._window, self._quota + freed)
        if self._resend:
            self._send_again()

    # --- inbound messages -----------------------------------------------------------------

    def received(self, publishes: Publishes) -> tuple[list[Message], list[int]]:
        """Messages that are new, and their identifiers. Raises ProtocolError beyond the window."""
        messages, ids, qos2 = publishes
        if self.maximum_qos < 2 or not self.retain_available:
            self._check_announced(messages)
        if qos2:
            messages, ids = self._without_duplicates(messages, ids)
        self._waiting += len(ids) - ids.count(0)
        if self._v5 and self._waiting + len(self._open) > self.receive_maximum:
            for message, packet_id in zip(messages, ids, strict=True):
                if message.qos == 2:
                    del self.session.unsettled[packet_id]
            raise ProtocolError(
                f"more than {self.receive_maximum} messages were sent without waiting for acknowledgement",
                reason_code=R.RECEIVE_MAXIMUM_EXCEEDED,
            )
        return messages, ids

    def _without_duplicates(self, messages: list[Message], ids: list[int]) -> tuple[list[Message], list[int]]:
        session = self.session
        new_messages: list[Message] = []
        new_ids: list[int] = []
        for message, packet_id in zip(messages, ids, strict=True):
            if message.qos == 2:
                if packet_id in session.inbound or packet_id in session.unsettled:
                    self._again(packet_id)
                    continue
                session.unsettled[packet_id] = 0
            new_messages.append(message)
            new_ids.append(packet_id)
        return new_messages, new_ids

    def _again(self, packet_id: int) -> None:
        """A QoS 2 message that came before: it emits nothing, its PUBREC goes out in its turn."""
        holder = self.session.unsettled.get(packet_id)
        if -packet_id in self._pending or holder == 0 or holder in self._pending:
            return
        self._order.append(-packet_id)
        self._pending[-packet_id] = _Pending([packet_id], (2,))
        self._waiting += 1
        if holder is None:
            self._settled[-packet_id] = None
            self._release_settled()

    def _check_announced(self, messages: list[Message]) -> None:
        for message in messages:
            if message.qos > self.maximum_qos:
                raise ProtocolError(
                    f"QoS {message.qos} is not supported here", reason_code=R.QOS_NOT_SUPPORTED
                )
            if message.retain and not self.retain_available:
                raise ProtocolError("retained messages are not supported", reason_code=R.RETAIN_NOT_SUPPORTED)

    def hold(self, messages: list[Message], ids: list[int], tokens: Session) -> int:
        """The token that settles these messages; 0 when all are QoS 0. `tokens` is the session of
        the control stream, so that a token means one thing on all streams."""
        if not any(ids):
            return 0
        session = self.session
        token = tokens.next_token()
        qos: list[int] | None = None
        if session.unsettled:
            qos = [message.qos for message in messages]
            for message, packet_id in zip(messages, ids, strict=True):
                if message.qos == 2:
                    session.unsettled[packet_id] = token
        self._order.append(token)
        self._pending[token] = _Pending(ids, qos)
        return token

    def settle(self, token: int, reasons: Sequence[int] | None) -> bool:
        """Acknowledge what the token holds, once all before it are. False: not of this connection.

        `reasons` are parallel to the messages of its `Received`."""
        pending = self._pending.get(token)
        if pending is None:
            return False
        self._settled[token] = reasons
        if self._order[0] == token:
            self._release_settled()
        elif pending.qos is not None:
            # it has to wait its turn, but is safe even if the connection breaks before that
            for index, packet_id in enumerate(pending.ids):
                if pending.qos[index] == 2:
                    self._safe(packet_id, reasons[index] if reasons is not None and self._v5 else 0)
        return True

    def _safe(self, packet_id: int, reason: int) -> None:
        self.session.unsettled.pop(packet_id, None)
        if reason < 0x80:
            self.session.inbound.add(packet_id)

    def _release_settled(self) -> None:
        order, settled = self._order, self._settled
        while order and order[0] in settled:
            head = order.popleft()
            self._acknowledge(self._pending.pop(head), settled.pop(head))

    def settle_earlier(self, token: int) -> None:
        """A token of an earlier connection: its QoS 2 messages are safe now. PUBREC goes to a peer
        that has sent them again, and will go to one that still does."""
        for packet_id in self.session.settle_unconnected(token):
            if -packet_id in self._pending:
                self._settled[-packet_id] = None
        self._release_settled()

    def _acknowledge(self, pending: _Pending, reasons: Sequence[int] | None) -> None:
        ids, qos = pending
        count = len(ids) - ids.count(0)
        self._waiting -= count
        if qos is None and (reasons is None or not self._v5):
            if count < len(ids):
                ids = [one for one in ids if one]
            words = [0x4002] * (2 * count)
            words[1::2] = ids
            self.write(struct.pack(f">{2 * count}H", *words))
            return
        out = bytearray()
        for index, packet_id in enumerate(ids):
            if not packet_id:
                continue
            reason = reasons[index] if reasons is not None and self._v5 else 0
            first = 0x40
            if qos is not None and qos[index] == 2:
                first = 0x50
                self._safe(packet_id, reason)
                if reason < 0x80:
                    self._open.add(packet_id)
            out += bytes((first, 3 if reason else 2)) + packet_id.to_bytes(2)
            if reason:
                out.append(reason)
        self.write(bytes(out))

    def _release(self, ids: list[int]) -> None:
        inbound = self.session.inbound
        out = bytearray()
        for packet_id in ids:
            self._open.discard(packet_id)
            if packet_id in inbound:
                inbound.discard(packet_id)
                out += b"\x70\x02" + packet_id.to_bytes(2)
            elif self._v5:
                out += b"\x70\x03" + packet_id.to_bytes(2) + b"\x92"
            else:
                out += b"\x70\x02" + packet_id.to_bytes(2)
        self.write(bytes(out))
