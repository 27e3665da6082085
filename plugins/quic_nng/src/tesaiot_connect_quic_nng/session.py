"""The client's MQTT on one side, calls of the library on the other: a translation, without I/O.

Owns: what the client is answered and when. Rules: PUBACK and PUBREC go to the client only for what
the server has acknowledged; the first reason for the end stays; nothing is settled after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from tesaiot_connect import Message
from tesaiot_connect.mqtt import (
    V5,
    Closed,
    Connect,
    ConnectRequest,
    Event,
    R,
    Received,
    Send,
    ServerEngine,
    ServerLimits,
    Session as MqttSession,
    SubscribeRequest,
    UnsubscribeRequest,
    words,
)

from .control import Ended
from .outgoing import Library, Outgoing, OutOfStep

__all__ = ["Library", "Session"]

_SMALLEST_PIECE = 256
_LARGEST_PIECE = 65_536
"""Bytes of the client that are decoded at once."""
_MESSAGES_A_PIECE = 4
"""QoS 1 and 2 messages in a piece, about: what comes in one piece is acknowledged to the client
together, when the last of it is."""
_SEND_BUFFER = 262_144
"""Bytes that are encoded for the client ahead of `outputs`."""
_A_MESSAGE = 128
"""Bytes of memory that a waiting message takes beside its topic and payload."""
_REFUSED = {
    1: R.UNSUPPORTED_PROTOCOL_VERSION,
    2: R.CLIENT_IDENTIFIER_NOT_VALID,
    3: R.SERVER_UNAVAILABLE,
    4: R.BAD_USER_NAME_OR_PASSWORD,
    5: R.NOT_AUTHORIZED,
}
"""The return codes of MQTT 3.1.1 section 3.2.2.3."""
_REFUSED_PERHAPS = (
    "the library does not tell a refused login from a lost connection: check the connection's `auth`, that "
    "MQTT is spoken there, and the broker's log"
)
_AGAIN = "the connection is made anew, and what is unknown is sent again"


class Session:
    """One connection. `now` is any monotonic clock in seconds.

    After every call: write `outputs` as far as the client takes it, look at `reading`, `next_timeout`
    and `ended`. When `next_timeout` is reached call `handle_timeout`. Once `ended` is there, what `outputs`
    still gives is written before the client's stream is closed.
    """

    def __init__(
        self,
        library: Library,
        *,
        window: int,
        ack_timeout: float,
        accept_early_acks: bool,
        max_packet_size: int,
        memory: int,
        now: float,
    ) -> None:
        """`window`: messages of QoS 1 and 2 that may be unacknowledged. `ack_timeout`: seconds.
        `max_packet_size`: bytes of a packet from the client. `memory`: bytes of messages that may
        wait for the client."""
        self.ended: Ended | None = None
        self._ack_timeout = ack_timeout
        self._highest_qos: Literal[0, 1] = 1 if accept_early_acks else 0
        """Of subscriptions. What is received at QoS 1 the library acknowledges by packets that it queues
        behind ours, and drops some of either when they are many."""
        self._memory = memory
        self._engine = ServerEngine(
            ServerLimits(
                maximum_packet_size=max_packet_size,
                maximum_connect_size=max_packet_size,
                send_buffer=_SEND_BUFFER,
            ),
            now=now,
        )
        self._outgoing = Outgoing(
            library, window=window, ack_timeout=ack_timeout, highest_qos=self._highest_qos
        )
        self._connecting: float | None = None
        """Since when CONNACK is awaited."""
        self._left: float | None = None
        """When the client said that it has no more to say."""
        self._unfed = b""
        self._at = 0
        """Where in `_unfed` the engine stopped reading."""
        self._piece = 4096
        self._fed = 0
        """Bytes the engine has taken since it last gave messages."""
        self._inbox: deque[list[Message]] = deque()
        """For the client, beyond what the engine takes now."""
        self._inbox_bytes = 0

    # --- the client -----------------------------------------------------------------------

    def receive_data(self, data: bytes, *, now: float) -> None:
        if self.ended is None and self._left is None:
            self._unfed = self._unfed[self._at :] + data if self._waits else data
            self._at = 0
            self._advance(now)

    def eof(self, *, now: float) -> None:
        if self._left is None:
            self._left = now
        self._advance(now)

    def outputs(self) -> bytes:
        """Bytes for the client; call it again until it gives none. What it has given is not counted in
        `memory` any more, so call it only when the client has taken what it gave before."""
        data = b"".join(one.data for one in self._engine.outputs() if isinstance(one, Send))
        self._deliver()
        return data

    @property
    def reading(self) -> bool:
        """Whether the client's bytes are wanted; False: leave them in the socket."""
        return self.ended is None and self._left is None and len(self._unfed) - self._at < _LARGEST_PIECE

    @property
    def settled(self) -> bool:
        """Whether everything the client said went out, and is acknowledged where it ought to be."""
        return not self._waits and self._connecting is None and self._outgoing.settled

    @property
    def _waits(self) -> bool:
        return self._at < len(self._unfed)

    # --- the library ----------------------------------------------------------------------

    def connack(self, return_code: int, session_present: bool, *, now: float) -> None:
        if self.ended is not None:
            return
        if self._connecting is None:
            self._end("the library was told CONNACK without asking: it has made another connection by itself")
        elif return_code:
            reason = _REFUSED.get(return_code, R.SERVER_UNAVAILABLE)
            self._engine.refuse(reason)
            self._end(f"the server refused the client: {words(reason)}", by_peer=True)
        else:
            self._connecting = None
            self._outgoing.exactly_once = not session_present
            self._engine.accept(MqttSession(), now=now, session_present=session_present)
            self._handle(self._engine.take_events(), now)
            self._advance(now)

    def sent(self, count: int, *, now: float) -> None:
        """The library has sent so many packets, its own included."""
        self._outgoing.sent(count, now)
        self._advance(now)

    def acknowledged(self, packet_ids: Sequence[int], *, now: float) -> None:
        """PUBACK or PUBCOMP came for these."""
        if self.ended is not None:
            return
        try:
            tokens = self._outgoing.acknowledged(packet_ids, now)
        except OutOfStep as error:
            self._out_of_step(error)
            return
        for token in tokens:
            self._engine.settle(token)
        self._advance(now)

    def suback(self, number: int, codes: Sequence[int], *, now: float) -> None:
        request = self._answered(number)
        if not isinstance(request, SubscribeRequest):
            return
        asked = request.packet.subscriptions
        if len(codes) != len(asked):
            self._end(f"the server answered {len(codes)} of {len(asked)} topic filters", by_peer=True)
            return
        granted = [
            0x80 if code >= 0x80 else min(code, one.qos, self._highest_qos)
            for code, one in zip(codes, asked, strict=True)
        ]
        self._engine.suback(request, granted)
        self._advance(now)

    def unsuback(self, number: int, *, now: float) -> None:
        request = self._answered(number)
        if isinstance(request, UnsubscribeRequest):
            self._engine.unsuback(request, [0] * len(request.packet.filters))
            self._advance(now)

    def received(self, messages: Sequence[Message], *, now: float) -> None:
        """Messages from the server; the library has acknowledged them."""
        if self.ended is not None:
            return
        # one packet for QoS 1 (PUBACK) and two for QoS 2 (PUBREC, PUBCOMP)
        own = sum([one.qos for one in messages])
        if own:
            self._outgoing.sent_by_itself(own, now)
        if self._left is not None:
            return
        found = list(messages)
        if own and not self._highest_qos:
            found = [Message(one.topic, one.payload, 0, one.retain) if one.qos else one for one in found]
        self._inbox.append(found)
        self._inbox_bytes += _size(found)
        self._deliver()
        if self._inbox_bytes > self._memory:
            self._end(
                f"more than {self._memory} bytes from the server wait for the client, and nothing can "
                "hold the server back",
                "read faster, subscribe to less, or raise `memory`",
            )

    def lost(self, what: str, fix: str = "", *, silent: bool = False, by_peer: bool = False) -> None:
        """The library, or its connection, is gone."""
        if self._connecting is not None:
            fix = fix or _REFUSED_PERHAPS
        self._end(what, fix, silent=silent, by_peer=by_peer)

    # --- time -----------------------------------------------------------------------------

    def next_timeout(self) -> float | None:
        if self.ended is not None:
            return None
        times = [self._outgoing.next_timeout(), self._keepalive()]
        times += [one + self._ack_timeout for one in (self._connecting, self._left) if one is not None]
        return min([one for one in times if one is not None], default=None)

    def handle_timeout(self, now: float) -> None:
        if self.ended is not None:
            return
        late = self._outgoing.handle_timeout(now)
        if self._connecting is not None and now >= self._connecting + self._ack_timeout:
            self._end(f"CONNACK did not come within {self._ack_timeout:g} s", silent=True)
        elif late:
            self._end(f"{late} within {self._ack_timeout:g} s", _AGAIN, silent=True)
        elif self._left is not None and now >= self._left + self._ack_timeout:
            self._end(
                f"the client has left, and the server did not take all it said within "
                f"{self._ack_timeout:g} s: {self._outgoing.unknown} messages are not acknowledged",
                silent=True,
            )
        else:
            due = self._keepalive()
            if due is not None and now >= due:
                self._handle(self._engine.handle_timeout(now), now)

    def _keepalive(self) -> float | None:
        """When the client was silent for too long. It is not silent while its bytes wait here."""
        if self._left is not None or self._waits or not self._engine.accepted:
            return None
        return self._engine.next_timeout()

    # --- inside ---------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Decode and hand over in turns, as far as window, credit and the bounds allow."""
        try:
            while self.ended is None:
                if not self._wanted:
                    self._outgoing.hand_over(now)
                    if not self._wanted:
                        break
                piece = self._unfed[self._at : self._at + self._piece]
                self._at += len(piece)
                self._fed += len(piece)
                events = self._engine.receive_data(piece, now=now)
                if events:
                    self._handle(events, now)
                else:  # in the middle of a packet
                    self._piece = min(2 * self._piece, _LARGEST_PIECE)
        except OutOfStep as error:
            self._out_of_step(error)
        self._deliver()
        if self._left is not None and self.settled:
            self._end("the client closed the connection", orderly=True)

    @property
    def _wanted(self) -> bool:
        """Whether more of the client's bytes can be decoded now."""
        return self._waits and not self._outgoing.full and self._connecting is None

    def _handle(self, events: list[Event], now: float) -> None:
        for event in events:
            if isinstance(event, Received):
                self._received(event)
            elif isinstance(event, SubscribeRequest | UnsubscribeRequest):
                self._outgoing.ask(event)
            elif isinstance(event, ConnectRequest):
                self._connect(event.connect, now)
            elif isinstance(event, Closed):
                if event.by_peer:
                    self._left = now if self._left is None else self._left
                    self._unfed = b""
                else:
                    self._end(f"the client's side failed: {event.text}")

    def _received(self, event: Received) -> None:
        size, self._fed = self._fed, 0
        count = len(event.ids) - event.ids.count(0)
        self._outgoing.add(event.messages, count, event.token, size)
        aim = _MESSAGES_A_PIECE * size // count if count else 2 * self._piece
        if size:
            self._piece = min(max(aim, _SMALLEST_PIECE), _LARGEST_PIECE)

    def _connect(self, connect: Connect, now: float) -> None:
        if connect.version == V5:
            text = "the library speaks MQTT 3.1.1 and no MQTT 5"
            self._engine.refuse(R.UNSUPPORTED_PROTOCOL_VERSION, text=text)
            self._end(text, "the client may ask for MQTT 3.1.1")
            return
        if 0 in (connect.password or b""):  # in any other string the engine refuses it
            self._end(
                "the library takes no zero byte in the password, and the client's has one",
                "use another password, or another transport",
            )
            return
        for name, value in _parts(connect).items():
            if value == b"":
                self._end(
                    f"the library cannot send an empty {name}, and the client has one",
                    f"set a {name}, or use another transport",
                )
                return
        self._connecting = now
        self._piece = _SMALLEST_PIECE
        self._outgoing.connect(connect, now)

    def _answered(self, number: int) -> SubscribeRequest | UnsubscribeRequest | None:
        if self.ended is not None:
            return None
        try:
            return self._outgoing.answered(number)
        except OutOfStep as error:
            self._out_of_step(error)
            return None

    def _deliver(self) -> None:
        """Messages to the client, as its window and the send buffer allow."""
        inbox = self._inbox
        while inbox:
            found = inbox[0]
            taken = self._engine.publish(found, [0] * len(found))
            if taken < len(found):
                if taken:
                    self._inbox_bytes -= _size(found[:taken])
                    inbox[0] = found[taken:]
                return
            self._inbox_bytes -= _size(found)
            inbox.popleft()

    def _out_of_step(self, error: OutOfStep) -> None:
        self._end(f"the library is out of step: {error}", _AGAIN)

    def _end(
        self,
        what: str,
        fix: str = "",
        *,
        orderly: bool = False,
        silent: bool = False,
        by_peer: bool = False,
    ) -> None:
        if self.ended is None:
            self.ended = Ended(what=what, fix=fix, orderly=orderly, silent=silent, by_peer=by_peer)


def _parts(connect: Connect) -> dict[str, bytes | None]:
    """What the library leaves out, or makes half a packet of, where it is empty."""
    return {
        "user name": None if connect.username is None else connect.username.encode(),
        "password": connect.password,
        "payload of the will": None if connect.will is None else connect.will.message.payload,
    }


def _size(messages: Sequence[Message]) -> int:
    return sum([len(one.topic) + len(one.payload) for one in messages]) + _A_MESSAGE * len(messages)
