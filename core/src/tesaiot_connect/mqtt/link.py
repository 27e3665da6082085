"""What both engines share: the streams of one connection and the way packets pass through them.

Owns: the set of flows, the gathering of messages into one `Received`, outputs, and the end of
the connection. Rule: control packets go to the role's `handle`, messages never do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ProtocolError
from ..message import Message
from . import codec
from .decoder import Acks, Decoder, Publishes
from .events import Acknowledged, Close, Closed, Event, Output, Received, Reset, Send, StreamLost
from .flow import Flow, PeerLimits
from .packets import V5, Connack, Disconnect, Ping
from .properties import P, PropertyMap
from .reasons import R
from .session import Session

Handle = Callable[[Flow, Any], None]
CONTROL = 0
"""The stream of CONNECT, AUTH, PING and DISCONNECT, whose end is the connection's end."""


class Link:
    """The streams of one connection. `handle(flow, packet)` takes control packets and may raise
    ProtocolError; it adds its events to `events`."""

    def __init__(
        self,
        handle: Handle,
        session: Session,
        *,
        server: bool,
        version: int,
        maximum_packet_size: int,
        topic_alias_maximum: int,
        receive_maximum: int,
        send_buffer: int,
        maximum_streams: int,
        maximum_qos: int = 2,
        retain_available: bool = True,
    ) -> None:
        self.events: list[Event] = []
        self.version = version
        self.closed = False
        self.ready = False
        """Accepted: messages may flow."""
        self.flows: dict[int, Flow] = {}
        self.last_received = 0.0
        self._handle = handle
        self._server = server
        self._maximum_packet_size = maximum_packet_size
        self._topic_alias_maximum = topic_alias_maximum
        self._receive_maximum = receive_maximum
        self._maximum_qos = maximum_qos
        self._retain_available = retain_available
        self._send_buffer = send_buffer
        self._maximum_streams = maximum_streams
        self._tail: list[Output] = []
        self.peer = PeerLimits()
        self._window = 0
        self.control = self._open(CONTROL, session)

    def _open(self, stream: int, session: Session) -> Flow:
        decoder = Decoder(
            from_client=self._server,
            version=self.version,
            maximum_packet_size=self._maximum_packet_size,
            topic_alias_maximum=self._topic_alias_maximum,
        )
        flow = Flow(stream, session, decoder, send_buffer=self._send_buffer, server=self._server)
        flow.receive_maximum = self._receive_maximum
        flow.maximum_qos = self._maximum_qos
        flow.retain_available = self._retain_available
        self.flows[stream] = flow
        return flow

    def start(self, version: int, peer: PeerLimits, window: int) -> None:
        """CONNACK said yes: all streams may carry messages."""
        self.version = version
        self.peer = peer
        self._window = window
        self.ready = True
        for flow in self.flows.values():
            flow.start(version, peer, window=window)

    def release_held(self) -> None:
        """Process what other streams brought before the connection was accepted, and what
        followed CONNECT."""
        for flow in list(self.flows.values()):
            if self.closed:
                return
            self.release_one(flow)

    def release_one(self, flow: Flow) -> None:
        held, flow.held = bytes(flow.held), bytearray()
        self._feed(flow, held)
        if flow.ended:
            self._drop(flow.stream, None)

    def take_events(self) -> list[Event]:
        self._tell_refused()
        events, self.events = self.events, []
        return events

    def _tell_refused(self) -> None:
        for flow in self.flows.values():
            if flow.refused:
                self._emit(flow, [], [], [])

    # --- input ----------------------------------------------------------------------------

    def receive(self, data: bytes, stream: int, now: float) -> list[Event]:
        self.last_received = now
        flow = self.flows.get(stream)
        if flow is not None and not self.closed:
            self._feed(flow, data)
        return self.take_events()

    def _feed(self, flow: Flow, data: bytes) -> None:
        if not self.ready and flow is not self.control:
            flow.held += data
            if len(flow.held) > self._maximum_packet_size:
                self.fail(flow, ProtocolError("too much data before CONNECT", reason_code=R.PACKET_TOO_LARGE))
            return
        messages: list[Message] = []
        ids: list[int] = []
        keys: list[int] = []
        try:
            for item in flow.decoder.feed(data):
                kind = type(item)
                if not self.ready and (kind is Publishes or kind is Acks or kind is Ping):
                    raise ProtocolError("a packet before the connection is up", reason_code=R.PROTOCOL_ERROR)
                if kind is Publishes:
                    new_messages, new_ids = flow.received(item)
                    if messages:
                        messages += new_messages
                        ids += new_ids
                    else:
                        messages, ids = new_messages, new_ids
                elif kind is Acks:
                    flow.acks(item, keys)
                elif kind is ProtocolError:
                    raise item
                elif kind is Ping:
                    self._handle(flow, item)
                else:
                    self._emit(flow, messages, ids, keys)
                    messages, ids, keys = [], [], []
                    self._handle(flow, item)
                    if self.closed:
                        return
        except ProtocolError as error:
            self._emit(flow, messages, ids, keys)
            self.fail(flow, error)
            return
        self._emit(flow, messages, ids, keys)

    def _emit(self, flow: Flow, messages: list[Message], ids: list[int], keys: list[int]) -> None:
        if messages:
            self.events.append(
                Received(flow.stream, messages, ids, flow.hold(messages, ids, self.control.session))
            )
        if keys or flow.refused:
            refused, flow.refused = flow.refused, {}
            self.events.append(Acknowledged(flow.stream, keys, refused))

    def stream_opened(self, stream: int) -> list[Event]:
        """The peer, or the owner, opened a further stream."""
        if stream == CONTROL or stream in self.flows or self.closed:
            return []
        if len(self.flows) >= self._maximum_streams:
            self._tail.append(Reset(stream, R.QUOTA_EXCEEDED))
            return []
        flow = self._open(stream, Session())
        if self.ready:
            flow.start(self.version, self.peer, window=self._window)
        return []

    def stream_lost(self, stream: int, *, reset: bool) -> list[Event]:
        """A stream ended: the control stream takes the connection along."""
        if self.closed:
            return []
        if stream == CONTROL:
            self.end(
                Closed(
                    None,
                    "the connection was lost" if reset else "the peer closed the connection",
                    True,
                    False,
                )
            )
        else:
            flow = self.flows.get(stream)
            if flow is not None and flow.held and not reset and not self.ready:
                flow.ended = True
            else:
                self._drop(stream, None)
        return self.take_events()

    def _drop(self, stream: int, code: int | None) -> None:
        flow = self.flows.pop(stream, None)
        if flow is None:
            return
        self._tail.append(Send(stream, flow.take(), fin=True) if code is None else Reset(stream, code))
        self._lost(flow)

    def _lost(self, flow: Flow) -> None:
        """Every key in flight on a data stream comes back: a QoS 2 message that the peer has taken
        over (PUBREC) is done."""
        entries = flow.session.outbound.values()
        self._emit(flow, [], [], [entry.key for entry in entries if entry.released])
        self.events.append(StreamLost(flow.stream, [entry.key for entry in entries if not entry.released]))

    # --- output ---------------------------------------------------------------------------

    def settle(self, token: int, reasons: Sequence[int] | None) -> None:
        if not token:
            return
        for flow in self.flows.values():
            if flow.settle(token, reasons):
                return
        self.control.settle_earlier(token)

    def publish(self, messages: Sequence[Message], keys: Sequence[int], stream: int) -> int:
        flow = self.flows.get(stream)
        if flow is None or self.closed or not self.ready:
            return 0
        return flow.publish(messages, keys)

    @property
    def has_output(self) -> bool:
        return bool(self._tail) or any(flow.out for flow in self.flows.values())

    def outputs(self) -> list[Output]:
        found: list[Output] = [Send(flow.stream, flow.take()) for flow in self.flows.values() if flow.out]
        if self._tail:
            found += self._tail
            self._tail = []
        return found

    def pending(self) -> list[int]:
        """The streams that `take` would give something for."""
        found = [flow.stream for flow in self.flows.values() if flow.out]
        if self._tail:
            found += [CONTROL if isinstance(one, Close) else one.stream for one in self._tail]
        return found

    def take(self, stream: int) -> list[Output]:
        flow = self.flows.get(stream)
        found: list[Output] = [Send(stream, flow.take())] if flow is not None and flow.out else []
        if self._tail:
            others: list[Output] = []
            for one in self._tail:
                of = CONTROL if isinstance(one, Close) else one.stream
                (found if of == stream else others).append(one)
            self._tail = others
        return found

    def fail(self, flow: Flow, error: ProtocolError) -> None:
        """Answers a violation: a data stream is reset, on the control stream the connection ends."""
        if flow is not self.control:
            self._drop(flow.stream, error.reason_code)
        elif self._server and not self.ready:
            if error.reason_code == R.UNSUPPORTED_PROTOCOL_VERSION:
                # section 3.1.2.2: the version that cannot be spoken is refused in the newest one
                # that both forms of CONNACK can be read in
                self.control.write(codec.encode_connack(Connack(reason_code=error.reason_code), V5))
            self.end(Closed(error.reason_code, error.what, False, False))
        else:
            code = error.reason_code
            if code == R.UNSUPPORTED_PROTOCOL_VERSION:  # a second CONNECT: DISCONNECT knows no such code
                code = R.PROTOCOL_ERROR
            self.disconnect(code, error.what, {})

    def say(self, flow: Flow, encode: Callable[[PropertyMap], bytes], found: PropertyMap) -> bool:
        """Writes a packet within the peer's Maximum Packet Size (section 3.1.2.11.4): without its
        reason string and user properties where those make it too large. False: not even so."""
        data = encode(found)
        if len(data) > self.peer.maximum_packet_size:
            data = encode({key: found[key] for key in found if key not in (P.REASON_STRING, P.USER)})
            if len(data) > self.peer.maximum_packet_size:
                return False
        flow.write(data)
        return True

    def disconnect(
        self, reason_code: int, text: str, properties: Mapping[P, Any], *, orderly: bool = False
    ) -> None:
        """Says DISCONNECT where the version lets this side say it, then closes. In 3.1.1 only a
        client says it, and it means that all is well: the will is discarded. A client that leaves
        need not wait for CONNACK with it (MQTT 5 section 3.1.4)."""
        if self.closed:
            return
        found = dict(properties)
        if text and reason_code:
            found[P.REASON_STRING] = text[:256]
        if (self.ready or orderly) and (self.version == V5 or not (self._server or reason_code)):
            self.say(
                self.control,
                lambda some: codec.encode_disconnect(
                    Disconnect(reason_code=reason_code, properties=some), self.version
                ),
                found,
            )
        self.end(Closed(reason_code, text, False, orderly, found))

    def end(self, closed: Closed) -> None:
        """The last event. What is in the output still goes out."""
        if self.closed:
            return
        self._tell_refused()
        for flow in self.flows.values():
            if flow is not self.control:
                self._lost(flow)
        self.closed = True
        self.events.append(closed)
        self._tail.append(Close(closed.reason_code or 0))
