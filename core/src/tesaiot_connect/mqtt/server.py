"""The server side of one MQTT connection.

Owns: what a server must check and answer on one connection. Rule: it decides nothing about
sessions, routing or rights; it asks by events and its owner answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ..errors import ProtocolError
from ..message import Message
from . import codec
from .events import (
    AuthChallenge,
    Closed,
    ConnectRequest,
    Event,
    Output,
    SubscribeRequest,
    UnsubscribeRequest,
)
from .flow import Flow, PeerLimits
from .link import Link
from .packets import V3, V5, Auth, Connack, Connect, Disconnect, Ping, SubackPacket, Subscribe, Unsubscribe
from .properties import P
from .reasons import R, words
from .session import Session


@attrs.frozen
class ServerLimits:
    """What a client may do, in bytes, seconds and messages."""

    maximum_packet_size: int = 1_048_576
    receive_maximum: int = 1024
    """QoS 1 and 2 messages a client may have unacknowledged; announced, and enforced in MQTT 5."""
    topic_alias_maximum: int = 32
    """Topic aliases a client may set on a stream."""
    outbound_alias_maximum: int = 32
    """Topic aliases used towards a client that allows them."""
    outbound_window: int = 1024
    """QoS 1 and 2 messages in flight to a client, if its Receive Maximum allows as many."""
    send_buffer: int = 1_048_576
    """Bytes that may wait to be written before `publish` takes no more."""
    maximum_connect_size: int = 131_072
    """Bytes of a packet from a client that was not accepted yet, if `maximum_packet_size` is not less."""
    connect_timeout: float = 10.0
    maximum_qos: int = 2
    retain_available: bool = True
    maximum_streams: int = 10
    """Streams of a connection, the control stream included."""


class ServerEngine:
    """Bytes in, events out; answers and messages in, bytes out. `now` is any monotonic clock in
    seconds. Call `outputs` after every other call, and `take_events` after `accept` and `publish`."""

    def __init__(self, limits: ServerLimits, *, now: float) -> None:
        self.limits = limits
        self.connect: Connect | None = None
        self.keepalive = 0
        self._deadline = now + limits.connect_timeout
        self._challenged = False
        self._link = Link(
            self._handle,
            Session(),
            server=True,
            version=V5,
            maximum_packet_size=limits.maximum_packet_size,
            topic_alias_maximum=limits.topic_alias_maximum,
            receive_maximum=limits.receive_maximum,
            send_buffer=limits.send_buffer,
            maximum_streams=limits.maximum_streams,
            maximum_qos=limits.maximum_qos,
            retain_available=limits.retain_available,
        )
        self._link.last_received = now
        self._link.control.decoder.maximum_packet_size = min(
            limits.maximum_packet_size, limits.maximum_connect_size
        )

    @property
    def version(self) -> int:
        """3, 4 or 5, once CONNECT came."""
        return self.connect.version if self.connect is not None else 0

    @property
    def client_id(self) -> str:
        """As CONNECT named it; empty before, and where the server assigns one."""
        return self.connect.client_id if self.connect is not None else ""

    @property
    def accepted(self) -> bool:
        return self._link.ready

    # --- input ----------------------------------------------------------------------------

    def receive_data(self, data: bytes, *, stream: int = 0, now: float) -> list[Event]:
        """Takes what arrived on a stream."""
        link = self._link
        if self.connect is None or link.ready or self._challenged or stream:
            return link.receive(data, stream, now)
        if not link.closed:
            link.control.held += data
        if len(link.control.held) > self.limits.maximum_packet_size:
            link.control.held.clear()
            self.refuse(R.PACKET_TOO_LARGE, text="too much data before CONNACK")
        return link.take_events()

    def stream_opened(self, stream: int, *, now: float) -> list[Event]:
        return self._link.stream_opened(stream)

    def stream_eof(self, stream: int, *, now: float) -> list[Event]:
        return self._link.stream_lost(stream, reset=False)

    def stream_reset(self, stream: int, *, now: float) -> list[Event]:
        return self._link.stream_lost(stream, reset=True)

    def next_timeout(self) -> float | None:
        """When `handle_timeout` wants to be called, on the clock of `now`."""
        if self._link.closed:
            return None
        if self._link.ready:
            return self._link.last_received + self.keepalive * 1.5 if self.keepalive else None
        return self._deadline

    def handle_timeout(self, now: float) -> list[Event]:
        due = self.next_timeout()
        if due is not None and now >= due:
            if self._link.ready:
                text = f"nothing came for {self.keepalive * 1.5:g} s, one and a half times the keepalive"
                self._link.disconnect(R.KEEP_ALIVE_TIMEOUT, text, {})
            else:
                text = (
                    "no CONNECT came in time" if self.connect is None else "CONNECT was not answered in time"
                )
                self._link.end(Closed(None, text, False, False))
        return self._link.take_events()

    def take_events(self) -> list[Event]:
        """Events caused by answers: what a client sent right behind CONNECT, messages it cannot take."""
        return self._link.take_events()

    def _handle(self, flow: Flow, packet: Any) -> None:
        link = self._link
        control = flow is link.control
        if type(packet) is Connect:
            if self.connect is not None or not control:
                raise ProtocolError("a second CONNECT", reason_code=R.PROTOCOL_ERROR)
            self._connect(packet)
        elif self.connect is None:
            raise ProtocolError("the first packet was not CONNECT", reason_code=R.PROTOCOL_ERROR)
        elif type(packet) is Ping:
            if control:
                flow.write(b"\xd0\x00")
        elif type(packet) is Auth and control:
            self._auth(packet)
        elif type(packet) is Disconnect and control:
            self._disconnected(packet)
        elif not link.ready:
            raise ProtocolError("a packet before authentication was over", reason_code=R.PROTOCOL_ERROR)
        elif type(packet) is Subscribe:
            link.events.append(SubscribeRequest(flow.stream, packet))
        elif type(packet) is Unsubscribe:
            link.events.append(UnsubscribeRequest(flow.stream, packet))
        else:
            raise ProtocolError("a packet that belongs on the control stream", reason_code=R.PROTOCOL_ERROR)

    def _connect(self, connect: Connect) -> None:
        self.connect = connect
        self.keepalive = connect.keepalive
        self._link.version = V5 if connect.version == V5 else V3
        limits = self.limits
        self._link.peer = PeerLimits(receive_maximum=limits.outbound_window)
        if connect.version == V5:
            asked = connect.properties
            self._link.peer = PeerLimits(
                receive_maximum=asked.get(P.RECEIVE_MAXIMUM, 65_535),
                maximum_packet_size=asked.get(P.MAXIMUM_PACKET_SIZE, 268_435_460),
                topic_alias_maximum=min(asked.get(P.TOPIC_ALIAS_MAXIMUM, 0), limits.outbound_alias_maximum),
            )
        if connect.version != V5 and not connect.client_id and not connect.clean_start:
            self.refuse(R.CLIENT_IDENTIFIER_NOT_VALID)
            return
        will = connect.will
        if will is not None and will.message.qos > limits.maximum_qos:
            self.refuse(R.QOS_NOT_SUPPORTED, text="the will's QoS is not supported")
        elif will is not None and will.message.retain and not limits.retain_available:
            self.refuse(R.RETAIN_NOT_SUPPORTED, text="a retained will is not supported")
        else:
            self._link.events.append(ConnectRequest(connect))

    def _auth(self, packet: Auth) -> None:
        method = packet.properties.get(P.AUTH_METHOD)
        assert self.connect is not None
        code = packet.reason_code
        fits = self._link.ready if code == R.RE_AUTHENTICATE else self._challenged and code != R.SUCCESS
        if method is None or method != self.connect.properties.get(P.AUTH_METHOD) or not fits:
            raise ProtocolError(
                "AUTH with a method or reason that does not fit", reason_code=R.PROTOCOL_ERROR
            )
        self._challenged = False
        self._link.events.append(AuthChallenge(method, packet.properties.get(P.AUTH_DATA, b""), False))

    def _disconnected(self, packet: Disconnect) -> None:
        assert self.connect is not None
        if P.SERVER_REFERENCE in packet.properties:
            raise ProtocolError("a client named a server reference", reason_code=R.PROTOCOL_ERROR)
        expiry = packet.properties.get(P.SESSION_EXPIRY)
        if expiry and not self.connect.properties.get(P.SESSION_EXPIRY):
            raise ProtocolError(
                "DISCONNECT sets a session expiry where CONNECT had none", reason_code=R.PROTOCOL_ERROR
            )
        code = packet.reason_code
        text = packet.properties.get(P.REASON_STRING, "") or (words(code) if code else "")
        self._link.end(Closed(code, text, True, code == 0, packet.properties))

    # --- answers --------------------------------------------------------------------------

    def accept(
        self, session: Session, *, now: float, session_present: bool, properties: Mapping[P, Any] = {}
    ) -> None:
        """CONNACK with the limits (and `properties`), then again what is in flight in `session`.

        The authentication method of CONNECT is repeated, as section 4.12 demands.
        SERVER_KEEP_ALIVE among the properties takes effect. Then call `take_events`: a client
        may have sent more right behind CONNECT.
        """
        connect = self.connect
        link = self._link
        if connect is None or link.ready or link.closed:
            return
        limits = self.limits
        found: dict[P, Any] = {}
        if connect.version == V5:
            found = {
                P.RECEIVE_MAXIMUM: limits.receive_maximum,
                P.MAXIMUM_PACKET_SIZE: limits.maximum_packet_size,
            }
            if limits.topic_alias_maximum:
                found[P.TOPIC_ALIAS_MAXIMUM] = limits.topic_alias_maximum
            if limits.maximum_qos < 2:
                found[P.MAXIMUM_QOS] = limits.maximum_qos
            if not limits.retain_available:
                found[P.RETAIN_AVAILABLE] = 0
            if P.AUTH_METHOD in connect.properties:
                found[P.AUTH_METHOD] = connect.properties[P.AUTH_METHOD]
            found.update(properties)
            self.keepalive = found.get(P.SERVER_KEEP_ALIVE, self.keepalive)
        if not self._say_connack(0, session_present, found):
            link.end(
                Closed(R.PACKET_TOO_LARGE, "the client takes no packet as large as CONNACK", False, False)
            )
            return
        link.control.session = session
        link.control.decoder.maximum_packet_size = limits.maximum_packet_size
        link.last_received = now
        link.start(link.version, link.peer, limits.outbound_window)
        link.control.resume(dup=True)
        link.release_held()

    def refuse(self, reason_code: int, *, text: str = "", properties: Mapping[P, Any] = {}) -> None:
        """CONNACK with a reason, then the end."""
        link = self._link
        if self.connect is None or link.ready or link.closed:
            return
        found = dict(properties)
        if text:
            found[P.REASON_STRING] = text
        self._say_connack(reason_code, False, found)
        link.end(Closed(reason_code, text or words(reason_code), False, False))

    def _say_connack(self, code: int, present: bool, found: Mapping[P, Any]) -> bool:
        def encode(some: Mapping[P, Any]) -> bytes:
            connack = Connack(reason_code=code, session_present=present, properties=some)
            return codec.encode_connack(connack, self._link.version)

        return self._link.say(self._link.control, encode, found)

    def challenge(self, method: str, data: bytes, *, final: bool = False) -> None:
        """AUTH: go on, or (`final`, only for a re-authentication) success. Then call `take_events`."""
        if self._link.closed:
            return
        code = R.SUCCESS if final else R.CONTINUE_AUTHENTICATION
        found = {P.AUTH_METHOD: method, P.AUTH_DATA: data}
        self._challenged = not final
        self._link.control.write(codec.encode_auth(Auth(reason_code=code, properties=found)))
        if not self._link.ready:
            self._link.release_one(self._link.control)

    def suback(self, request: SubscribeRequest, codes: Sequence[int], *, text: str = "") -> None:
        """One reason code per subscription of the request."""
        self._answer(0x90, request.stream, request.packet.packet_id, codes, text)

    def unsuback(self, request: UnsubscribeRequest, codes: Sequence[int]) -> None:
        self._answer(0xB0, request.stream, request.packet.packet_id, codes, "")

    def _answer(self, first_byte: int, stream: int, packet_id: int, codes: Sequence[int], text: str) -> None:
        link = self._link
        flow = link.flows.get(stream)
        if flow is None or link.closed:
            return
        found: dict[P, Any] = {}
        if text and self.connect is not None and self.connect.properties.get(P.REQUEST_PROBLEM_INFO, 1):
            found[P.REASON_STRING] = text

        def encode(some: Mapping[P, Any]) -> bytes:
            packet = SubackPacket(packet_id=packet_id, codes=bytes(codes), properties=some)
            return codec.encode_suback(first_byte, packet, link.version)

        if not link.say(flow, encode, found):
            link.disconnect(R.PACKET_TOO_LARGE, "the client does not take the answer to its packet", {})

    def settle(self, token: int, reasons: Sequence[int] | None = None) -> None:
        """PUBACK or PUBREC for every message of that `Received`, in order of arrival.

        `reasons` are parallel to its messages (MQTT 5 only); None is success for all. A token of an
        earlier connection of the same session is fine, and `reasons` do not count then. Before
        `accept` there is no session here yet: use its `settle_unconnected`.
        """
        self._link.settle(token, reasons)

    def publish(self, messages: Sequence[Message], keys: Sequence[int], *, stream: int = 0) -> int:
        """Encodes messages from the front as window and buffer allow; returns how many were taken.

        `keys` are parallel to the messages and come back in `Acknowledged` for QoS 1 and 2, and
        for a message larger than the client takes, which is dropped.
        """
        return self._link.publish(messages, keys, stream)

    def disconnect(self, reason_code: int = 0, *, text: str = "", properties: Mapping[P, Any] = {}) -> None:
        """DISCONNECT (MQTT 5 only), then the end. Idempotent."""
        self._link.disconnect(reason_code, text, properties)

    def outputs(self) -> list[Output]:
        """What to write; call it after every other call."""
        return self._link.outputs()
