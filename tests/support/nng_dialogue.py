"""A session of `quic_nng` between the client engine of core and a library that does what a test says.

Nothing happens by itself: bytes move in `exchange`, the library sends, acknowledges and answers
when it is told to, and time is `now`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tesaiot_connect import Message
from tesaiot_connect.mqtt import (
    Acknowledged,
    ClientEngine,
    Closed,
    Connect,
    Connected,
    Event,
    Received,
    Send,
    Session as MqttSession,
    Suback,
    Subscription,
)
from tesaiot_connect_quic_nng.session import Session


class FakeLibrary:
    """Takes everything, counts identifiers as NanoSDK does, and remembers."""

    def __init__(self) -> None:
        self.connects: list[Connect] = []
        self.calls: list[list[Message]] = []
        self.subscribed: list[tuple[int, list[Subscription]]] = []
        self.unsubscribed: list[tuple[int, list[str]]] = []
        self.order: list[str] = []
        self.qos: dict[int, int] = {}
        """QoS of what is not acknowledged, by packet identifier, in sending order."""
        self.unsent = 0
        self.most_unsent = 0
        self.most_unacknowledged = 0
        self.next_id = 1
        self.answers: list[list[int]] = []
        """What `publish` returns instead of the right identifiers."""

    @property
    def published(self) -> list[Message]:
        return [message for call in self.calls for message in call]

    def connect(self, connect: Connect) -> None:
        self.connects.append(connect)
        self._queue(1)

    def publish(self, messages: Sequence[Message]) -> list[int]:
        self.calls.append(list(messages))
        self.order += ["publish"] * len(messages)
        self._queue(len(messages))
        ids = [self._id() if message.qos else 0 for message in messages]
        for message, packet_id in zip(messages, ids, strict=True):
            if packet_id:
                self.qos[packet_id] = message.qos
        self.most_unacknowledged = max(self.most_unacknowledged, len(self.qos))
        return self.answers.pop(0) if self.answers else ids

    def subscribe(self, number: int, subscriptions: Sequence[Subscription]) -> None:
        self._id()
        self.order.append("subscribe")
        self.subscribed.append((number, list(subscriptions)))
        self._queue(1)

    def unsubscribe(self, number: int, filters: Sequence[str]) -> None:
        self._id()
        self.order.append("unsubscribe")
        self.unsubscribed.append((number, list(filters)))
        self._queue(1)

    def _id(self) -> int:
        packet_id = self.next_id
        self.next_id = packet_id % 65535 + 1
        return packet_id

    def _queue(self, packets: int) -> None:
        self.unsent += packets
        self.most_unsent = max(self.most_unsent, self.unsent)


class Dialogue:
    def __init__(
        self,
        connect: Connect | None = None,
        *,
        window: int = 16,
        early_acks: bool = False,
        memory: int = 1_000_000,
        max_packet_size: int = 1_048_576,
        state: MqttSession | None = None,
    ) -> None:
        self.now = 100.0
        self.library = FakeLibrary()
        self.session = Session(
            self.library,
            window=window,
            ack_timeout=10.0,
            accept_early_acks=early_acks,
            max_packet_size=max_packet_size,
            memory=memory,
            now=self.now,
        )
        self.state = MqttSession() if state is None else state
        self.client = ClientEngine(
            Connect(client_id="device", version=4, keepalive=0) if connect is None else connect,
            self.state,
            now=self.now,
        )
        self.waiting: list[tuple[int, Message]] = []
        """Keys and messages that the client's own window holds back."""
        self.events: list[Event] = []
        self.acknowledged: set[int] = set()
        """Keys."""
        self.unread: bytearray = bytearray()
        """The client's bytes that the session did not want yet."""
        self._key = 0

    # --- bytes ----------------------------------------------------------------------------

    def said(self) -> bytes:
        """What the client wants to write now."""
        return b"".join(one.data for one in self.client.outputs() if isinstance(one, Send))

    def exchange(self, cuts: Sequence[int] = (65_536,)) -> None:
        """Bytes both ways until nothing moves; the client's in pieces of `cuts` bytes, in turns."""
        turn = 0
        while True:
            keys, messages = [key for key, _ in self.waiting], [one for _, one in self.waiting]
            del self.waiting[: self.client.publish(messages, keys)]
            self.unread += self.said()
            moved = False
            while self.unread and self.session.reading:
                piece = bytes(self.unread[: cuts[turn % len(cuts)]])
                turn += 1
                del self.unread[: len(piece)]
                self.session.receive_data(piece, now=self.now)
                moved = True
            while data := self.session.outputs():
                self.take(self.client.receive_data(data, now=self.now))
                moved = True
            if not moved:
                return

    def take(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, Acknowledged):
                self.acknowledged |= set(event.keys)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def messages(self) -> list[Message]:
        """What came to the client."""
        return [message for event in self.of(Received) for message in event.messages]

    @property
    def subacks(self) -> list[Suback]:
        return self.of(Suback)

    @property
    def connected(self) -> Connected:
        (event,) = self.of(Connected)
        assert isinstance(event, Connected)
        return event

    @property
    def closed(self) -> Closed:
        (event,) = self.of(Closed)
        assert isinstance(event, Closed)
        return event

    # --- what client and library do -------------------------------------------------------

    def accept(self, *, session_present: bool = False) -> None:
        self.exchange()
        self.finish()
        self.session.connack(0, session_present, now=self.now)
        self.exchange()

    def publish(self, messages: Sequence[Message]) -> list[int]:
        """As the client's window allows, in `exchange`; gives their keys."""
        keys = list(range(self._key, self._key + len(messages)))
        self._key += len(messages)
        self.waiting += zip(keys, messages, strict=True)
        return keys

    def finish(self, packets: int | None = None) -> None:
        """The library has sent so many packets, all of them by default."""
        count = self.library.unsent if packets is None else min(packets, self.library.unsent)
        if count:
            self.library.unsent -= count
            self.session.sent(count, now=self.now)

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """The server's PUBACK or PUBCOMP; before the latter the library has said PUBREL."""
        for packet_id in packet_ids:
            if self.library.qos.pop(packet_id, 0) == 2:
                self.library.unsent += 1
        self.session.acknowledged(packet_ids, now=self.now)

    def server_does_all(self) -> None:
        """Until everything the client said is sent and acknowledged."""
        for _ in range(100_000):
            self.exchange()
            if not (self.library.unsent or self.library.qos or self.waiting or self.unread):
                return
            self.acknowledge(list(self.library.qos))
            self.finish()
        raise AssertionError("it does not come to an end")
