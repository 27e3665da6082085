"""The client side of one MQTT connection.

Owns: CONNECT to CONNACK, SUBSCRIBE, PING, AUTH and DISCONNECT as a client says them. Rule: one
engine a connection; the `Session` it is given outlives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ProtocolError
from ..message import Message
from . import codec
from .decoder import Publishes
from .events import Acknowledged, AuthChallenge, Closed, Connected, Event, Output, Suback
from .flow import MAX_WINDOW, Flow, PeerLimits
from .link import Link
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
)
from .properties import P
from .reasons import R, words
from .session import Session

_WINDOW_V3 = 20
"""In flight to a 3.1.1 broker, which cannot announce a maximum: brokers commonly allow 20 and
drop the connection beyond that."""


class ClientEngine:
    """Bytes in, events out; messages in, bytes out.

    What `connect.properties` announce (Receive Maximum, Maximum Packet Size, Topic Alias
    Maximum) is enforced. `now` is any monotonic clock in seconds. `ping_timeout`: seconds of
    silence after a PINGREQ before the connection counts as dead.
    """

    def __init__(
        self,
        connect: Connect,
        session: Session,
        *,
        now: float,
        connect_timeout: float = 10.0,
        ping_timeout: float = 10.0,
        send_buffer: int = 1_048_576,
        window: int = MAX_WINDOW,
        maximum_streams: int = 10,
    ) -> None:
        announced = connect.properties if connect.version == V5 else {}
        self.connect = connect
        self.connack: Connack | None = None
        self.keepalive = connect.keepalive
        self.session = session
        self._window = window
        self._connect_timeout = connect_timeout
        self._ping_timeout = ping_timeout
        self._deadline: float | None = now + connect_timeout
        """CONNACK is due, later PINGRESP; None when nothing is awaited."""
        self._next_ping: float | None = None
        self._paused: float | None = None
        self._asked: dict[int, tuple[Flow, int]] = {}
        """SUBSCRIBE and UNSUBSCRIBE not answered: packet identifier to stream and number of filters."""
        self._reauthenticating = False
        self._link = Link(
            self._handle,
            session,
            server=False,
            version=connect.version,
            maximum_packet_size=announced.get(P.MAXIMUM_PACKET_SIZE, 268_435_460),
            topic_alias_maximum=announced.get(P.TOPIC_ALIAS_MAXIMUM, 0),
            receive_maximum=announced.get(P.RECEIVE_MAXIMUM, 65_535),
            send_buffer=send_buffer,
            maximum_streams=maximum_streams,
        )
        self._link.last_received = now
        self._link.control.write(codec.encode_connect(connect))

    @property
    def connected(self) -> bool:
        return self._link.ready and not self._link.closed

    # --- input ----------------------------------------------------------------------------

    def opened(self, now: float) -> None:
        """The transport's connection is there: the time for CONNACK begins now. For an engine that
        was made before, so that its first bytes could go along with the transport's handshake."""
        self._deadline = now + self._connect_timeout
        self._link.last_received = now

    def receive_data(self, data: bytes, *, stream: int = 0, now: float) -> list[Event]:
        """Takes what arrived on a stream."""
        if self._link.ready:
            self._deadline = None
        events = self._link.receive(data, stream, now)
        if self._link.ready and self._next_ping is None and self.keepalive:
            self._next_ping = now + self.keepalive
        return events

    def stream_opened(self, stream: int, *, now: float) -> list[Event]:
        return self._link.stream_opened(stream)

    def stream_eof(self, stream: int, *, now: float) -> list[Event]:
        return self._link.stream_lost(stream, reset=False)

    def stream_reset(self, stream: int, *, now: float) -> list[Event]:
        return self._link.stream_lost(stream, reset=True)

    def pause_reading(self, now: float) -> None:
        """The owner does not read for now: silence proves nothing until `resume_reading`."""
        if self._paused is None:
            self._paused = now

    def resume_reading(self, now: float) -> None:
        if self._paused is not None:
            if self._deadline is not None:
                self._deadline += now - self._paused
            self._paused = None

    def next_timeout(self) -> float | None:
        """When `handle_timeout` wants to be called, on the clock of `now`."""
        if self._link.closed:
            return None
        deadline = None if self._paused is not None else self._deadline
        times = [one for one in (deadline, self._next_ping) if one is not None]
        return min(times, default=None)

    def handle_timeout(self, now: float) -> list[Event]:
        if self._link.closed:
            return self._link.take_events()
        if self._deadline is not None and self._paused is None and now >= self._deadline:
            if self._link.ready:
                self._link.disconnect(R.UNSPECIFIED_ERROR, "the broker stopped answering (no PINGRESP)", {})
            else:
                self._link.end(
                    Closed(None, "the broker accepted the connection but sent no CONNACK", False, False)
                )
        elif self._next_ping is not None and now >= self._next_ping:
            self._link.control.write(b"\xc0\x00")
            self._next_ping = now + self.keepalive
            if self._deadline is None:
                # while paused the deadline stands still; resume_reading moves it on
                self._deadline = (now if self._paused is None else self._paused) + self._ping_timeout
        return self._link.take_events()

    def take_events(self) -> list[Event]:
        """Events that `publish` caused (messages the broker's announced limits exclude)."""
        return self._link.take_events()

    def _handle(self, flow: Flow, packet: Any) -> None:
        link = self._link
        if type(packet) is Ping:
            return
        if type(packet) is SubackPacket:
            self._suback(flow, packet)
        elif flow is not link.control:
            raise ProtocolError("a packet that belongs on the control stream", reason_code=R.PROTOCOL_ERROR)
        elif type(packet) is Connack:
            self._connack(packet)
        elif type(packet) is Auth:
            self._auth(packet)
        elif type(packet) is Disconnect and link.version == V5 and link.ready:
            if P.SESSION_EXPIRY in packet.properties:
                raise ProtocolError("the server set a session expiry", reason_code=R.PROTOCOL_ERROR)
            text = packet.properties.get(P.REASON_STRING, "") or words(packet.reason_code)
            link.end(Closed(packet.reason_code, text, True, False, packet.properties))
        else:
            raise ProtocolError("the server sent a packet it must not send now", reason_code=R.PROTOCOL_ERROR)

    def _connack(self, connack: Connack) -> None:
        link = self._link
        if link.ready:
            raise ProtocolError("a second CONNACK", reason_code=R.PROTOCOL_ERROR)
        found = connack.properties
        if connack.reason_code:
            text = found.get(P.REASON_STRING, "") or words(connack.reason_code)
            link.end(Closed(connack.reason_code, text, True, False, found))
            return
        if connack.session_present and self.connect.clean_start:
            link.end(
                Closed(R.PROTOCOL_ERROR, "the server kept a session that was to start clean", False, False)
            )
            return
        method = self.connect.properties.get(P.AUTH_METHOD)
        if found.get(P.AUTH_METHOD, method) != method:
            raise ProtocolError(
                "CONNACK with a method that CONNECT did not name", reason_code=R.PROTOCOL_ERROR
            )
        self._deadline = None
        self.connack = connack
        self.keepalive = found.get(P.SERVER_KEEP_ALIVE, self.keepalive)
        link.start(link.version, self._limits(connack), self._window)
        link.events.append(Connected(connack))
        session = self.session
        if not connack.session_present:
            session.forget_inbound()
            # what the server had taken over (PUBREC) before it forgot the session is done
            done = {one: entry.key for one, entry in session.outbound.items() if entry.released}
            for packet_id in done:
                del session.outbound[packet_id]
            if done:
                link.events.append(Acknowledged(0, list(done.values()), {}))
        link.control.resume(dup=connack.session_present)
        link.release_held()

    def _limits(self, connack: Connack) -> PeerLimits:
        found, default = connack.properties, 65_535 if self._link.version == V5 else _WINDOW_V3
        return PeerLimits(
            receive_maximum=found.get(P.RECEIVE_MAXIMUM, default),
            maximum_packet_size=found.get(P.MAXIMUM_PACKET_SIZE, 268_435_460),
            maximum_qos=found.get(P.MAXIMUM_QOS, 2),
            retain_available=bool(found.get(P.RETAIN_AVAILABLE, 1)),
            topic_alias_maximum=found.get(P.TOPIC_ALIAS_MAXIMUM, 0),
        )

    def _suback(self, flow: Flow, packet: SubackPacket) -> None:
        asked, count = self._asked.get(packet.packet_id, (None, 0))
        if asked is not flow:
            raise ProtocolError("an answer to a SUBSCRIBE that was not sent", reason_code=R.PROTOCOL_ERROR)
        if packet.codes and len(packet.codes) != count:
            raise ProtocolError("SUBACK does not answer every topic filter", reason_code=R.PROTOCOL_ERROR)
        del self._asked[packet.packet_id]
        flow.reserved.discard(packet.packet_id)
        text = packet.properties.get(P.REASON_STRING, "")
        self._link.events.append(Suback(packet.packet_id, tuple(packet.codes), text))

    def _auth(self, packet: Auth) -> None:
        method = packet.properties.get(P.AUTH_METHOD)
        if method is None or method != self.connect.properties.get(P.AUTH_METHOD):
            raise ProtocolError("AUTH with a method that CONNECT did not name", reason_code=R.PROTOCOL_ERROR)
        final = packet.reason_code == R.SUCCESS
        if packet.reason_code == R.RE_AUTHENTICATE or (
            not self._reauthenticating if self._link.ready else final
        ):
            raise ProtocolError("AUTH that does not fit the exchange", reason_code=R.PROTOCOL_ERROR)
        if final:
            self._reauthenticating = False
        data = packet.properties.get(P.AUTH_DATA, b"")
        self._link.events.append(AuthChallenge(method, data, final))

    # --- what a client says ---------------------------------------------------------------

    def subscribe(
        self,
        subscriptions: Sequence[Subscription],
        *,
        properties: Mapping[P, Any] = {},
        stream: int = 0,
    ) -> int:
        """Sends SUBSCRIBE; its packet identifier comes back in `Suback`. Raises ProtocolError for
        an invalid filter and for what the server said it does not take; call it only while connected."""
        flow = self._link.flows[stream]
        packet_id = self._free_id(flow)
        packet = Subscribe(packet_id=packet_id, subscriptions=tuple(subscriptions), properties=properties)
        return self._ask(
            flow, packet_id, codec.encode_subscribe(packet, self._link.version), len(packet.subscriptions)
        )

    def unsubscribe(self, filters: Sequence[str], *, stream: int = 0) -> int:
        """Sends UNSUBSCRIBE; its packet identifier comes back in `Suback`."""
        flow = self._link.flows[stream]
        packet_id = self._free_id(flow)
        packet = Unsubscribe(packet_id=packet_id, filters=tuple(filters))
        return self._ask(
            flow, packet_id, codec.encode_unsubscribe(packet, self._link.version), len(packet.filters)
        )

    def _ask(self, flow: Flow, packet_id: int, data: bytes, count: int) -> int:
        if len(data) > self._link.peer.maximum_packet_size:
            raise ProtocolError(
                f"a packet of {len(data)} bytes is larger than the server takes",
                reason_code=R.PACKET_TOO_LARGE,
            )
        flow.write(data)
        flow.reserved.add(packet_id)
        self._asked[packet_id] = flow, count
        return packet_id

    def _free_id(self, flow: Flow) -> int:
        """Unused on the stream, and unlike all that wait for an answer on any."""
        flows = self._link.flows
        self._asked = {key: one for key, one in self._asked.items() if one[0].stream in flows}
        while (packet_id := self.session.next_id()) in self._asked or packet_id in flow.session.outbound:
            pass
        return packet_id

    def publish(self, messages: Sequence[Message], keys: Sequence[int], *, stream: int = 0) -> int:
        """Encodes messages from the front as window and buffer allow; returns how many were taken.

        `keys` are parallel to the messages and come back in `Acknowledged` for QoS 1 and 2, and
        for any message that the broker's announced limits exclude.
        """
        return self._link.publish(messages, keys, stream)

    def publish_early(
        self, messages: Sequence[Message], keys: Sequence[int], *, known: Connack | None = None
    ) -> int:
        """As `publish`, right behind CONNECT and before CONNACK; returns how many were taken.

        Only QoS 1 from the front, at most 16 messages of 8 KiB together, into a session with
        nothing in flight, without enhanced authentication. The server may get them twice. They
        are in flight from now on: not sent again after CONNACK, but on the next connection if
        this one ends before they are acknowledged, and refused if CONNACK excludes them.
        `known` is what this server said last time, which is then kept to.
        """
        if self._link.closed or P.AUTH_METHOD in self.connect.properties:
            return 0
        limits = self._limits(known or Connack())
        return self._link.control.publish_early(self.connect.version, limits, messages, keys)

    def withdraw(self) -> list[int]:
        """There will be no connection: gives back the keys of what was published early."""
        return self._link.control.withdraw()

    def settle(self, token: int) -> None:
        """The messages of that `Received` are safe: PUBACK and PUBREC go out, in order of arrival.

        A token of an earlier connection of the same session is fine.
        """
        self._link.settle(token, None)

    def auth(self, data: bytes, *, reauthenticate: bool = False) -> None:
        """Answers a challenge, or starts a re-authentication (MQTT 5 section 4.12.1)."""
        code = R.RE_AUTHENTICATE if reauthenticate else R.CONTINUE_AUTHENTICATION
        self._reauthenticating = self._reauthenticating or reauthenticate
        found = {P.AUTH_METHOD: self.connect.properties[P.AUTH_METHOD], P.AUTH_DATA: data}
        self._link.control.write(codec.encode_auth(Auth(reason_code=code, properties=found)))

    def disconnect(self, reason_code: int = 0, *, properties: Mapping[P, Any] = {}) -> None:
        """Says DISCONNECT; 0x04 asks for the will to be published (in 3.1.1 by closing without a
        word). Idempotent. Raises ProtocolError for a session expiry where CONNECT had none."""
        if properties.get(P.SESSION_EXPIRY) and not self.connect.properties.get(P.SESSION_EXPIRY):
            raise ProtocolError(
                "a session that CONNECT let end with the connection cannot be prolonged in DISCONNECT",
                reason_code=R.PROTOCOL_ERROR,
            )
        self._link.disconnect(reason_code, "", properties, orderly=True)

    def salvage(self, data: bytes) -> list[Message]:
        """After `disconnect`: the QoS 0 messages among what still comes on the control stream. What is to
        be acknowledged is left out: in a session that is kept it comes again."""
        found: list[Message] = []
        for item in self._link.control.decoder.feed(data):
            if type(item) is Publishes:
                found += [
                    one for one, packet_id in zip(item.messages, item.ids, strict=True) if not packet_id
                ]
        return found

    @property
    def in_flight(self) -> int:
        """QoS 1 and 2 messages that were sent, on any stream, and not acknowledged to the end."""
        return sum(len(flow.session.outbound) for flow in self._link.flows.values())

    @property
    def has_output(self) -> bool:
        """Whether `outputs` would give anything."""
        return self._link.has_output

    def outputs(self) -> list[Output]:
        """What to write; call it after every other call."""
        return self._link.outputs()

    def pending(self) -> list[int]:
        """The streams on which something is to be written."""
        return self._link.pending()

    def take(self, stream: int) -> list[Output]:
        """The part of `outputs` that is about one stream, for an owner who writes each by itself;
        `Close` is about the control stream."""
        return self._link.take(stream)
