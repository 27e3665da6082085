"""Delivery promises on a network that cuts at any byte: QoS 1 at least once, QoS 2 exactly once, in order.

Two engines with their sessions, and between them a network that carries some bytes, then breaks.
Beside them an observer reads the wire with a parser of its own and checks what the standard counts.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import Acknowledged, Close, Closed, Connected, ConnectRequest, Received, Send
from tesaiot_connect.mqtt.packets import Connect
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session

PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 3, 4, 5, 6, 7


class Packets:
    """An MQTT parser of eight lines, so that the observer does not believe the engine."""

    def __init__(self, version):
        self.version, self.data = version, b""

    def feed(self, data):
        self.data += data
        while len(self.data) >= 2:
            length = shift = 0
            for at in range(1, min(5, len(self.data))):
                length |= (self.data[at] & 0x7F) << shift
                shift += 7
                if self.data[at] < 0x80:
                    break
            else:
                return
            if len(self.data) < at + 1 + length:
                return
            first, body = self.data[0], self.data[at + 1 : at + 1 + length]
            self.data = self.data[at + 1 + length :]
            kind = first >> 4
            if kind == PUBLISH:
                topic = int.from_bytes(body[:2])
                yield kind, first, int.from_bytes(body[2 + topic : 4 + topic]) if first & 6 else 0, 0
            elif PUBACK <= kind <= PUBCOMP:
                yield kind, first, int.from_bytes(body[:2]), body[2] if len(body) > 2 else 0


class Watch:
    """One direction of one connection: what its sender may not do.

    `sent` is told what left the sender, `answered` what has reached it, `arrived` what reached the receiver.
    """

    def __init__(self, version, receive_maximum):
        self.limit = receive_maximum if version == 5 else 65535
        self.out = Packets(version)
        self.there = Packets(version)
        self.back = Packets(version)
        self.answers = Packets(version)
        self.in_flight = set()
        self.arrivals = {1: [], 2: []}
        self.acks = {PUBACK: [], PUBREC: []}

    def sent(self, data):
        for kind, first, packet_id, _ in self.out.feed(data):
            if kind == PUBLISH and first & 6:
                assert packet_id not in self.in_flight, "a packet identifier in use was used again"
                self.in_flight.add(packet_id)
                assert len(self.in_flight) <= self.limit, "Receive Maximum exceeded"

    def answered(self, data):
        for kind, _, packet_id, code in self.back.feed(data):
            if kind in (PUBACK, PUBCOMP) or (kind == PUBREC and code >= 0x80):
                self.in_flight.discard(packet_id)

    def arrived(self, data):
        for kind, first, packet_id, _ in self.there.feed(data):
            if kind == PUBLISH and first & 6:
                self.arrivals[first >> 1 & 3].append(packet_id)

    def answering(self, data):
        for kind, _, packet_id, _ in self.answers.feed(data):
            if kind in self.acks:
                self.acks[kind].append(packet_id)
        # sections 4.6: acknowledgements in the order of arrival, of each kind
        for kind, qos in ((PUBACK, 1), (PUBREC, 2)):
            done = self.acks[kind]
            assert done == self.arrivals[qos][: len(done)], "acknowledged out of order"


class Side:
    """One peer: its session, what it wants to send, what it was told and what it got."""

    def __init__(self, name, rng):
        self.name, self.rng = name, rng
        self.session = Session()
        self.engine = None
        self.accepted = False
        """The engine knows the session."""
        self.counter = 0
        self.queue = []
        self.keys = []
        self.got = []
        self.tokens = []
        self.everything = set()

    def want(self, count):
        for _ in range(count):
            self.counter += 1
            qos = self.rng.choice((0, 1, 1, 2, 2))
            payload = f"{self.name}{qos}:{self.counter}".encode()
            self.everything.add(payload)
            self.queue.append((self.counter, Message(f"t/{self.rng.randrange(4)}", payload, qos)))

    def offer(self):
        batch = self.queue[: self.rng.randint(1, 8)]
        taken = self.engine.publish([message for _, message in batch], [key for key, _ in batch])
        assert 0 <= taken <= len(batch)
        del self.queue[:taken]

    def settle(self, how_many):
        for _ in range(how_many):
            if not self.tokens:
                return
            token = self.tokens.pop(self.rng.randrange(len(self.tokens)))
            if self.engine is None or not self.accepted:
                self.session.settle_unconnected(token)
            else:
                self.engine.settle(token)


class World:
    def __init__(self, seed, version, *, forgetful=False):
        self.rng = random.Random(seed)
        self.version, self.forgetful = version, forgetful
        self.client, self.server = Side("c", self.rng), Side("s", self.rng)
        self.untold = False
        """The client has not heard yet that its session is gone: no server should build on that one."""
        self.lost_keys = []
        self.now = 0.0
        self.limits = ServerLimits(
            receive_maximum=self.rng.randint(1, 6),
            outbound_window=self.rng.randint(1, 6),
            topic_alias_maximum=self.rng.choice((0, 2)),
        )
        self.up = False

    def connect(self):
        found = {}
        client_maximum = 65535
        if self.version == 5:
            client_maximum = self.rng.randint(1, 6)
            found = {P.RECEIVE_MAXIMUM: client_maximum, P.SESSION_EXPIRY: 100, P.TOPIC_ALIAS_MAXIMUM: 2}
        connect = Connect(client_id="c", version=self.version, clean_start=False, properties=found)
        self.client.engine = ClientEngine(
            connect, self.client.session, now=self.now, window=self.rng.choice((3, 60000))
        )
        self.client.accepted = True
        self.server.engine = ServerEngine(self.limits, now=self.now)
        self.wire = {"c": b"", "s": b""}
        self.watch = {
            "c": Watch(self.version, self.limits.receive_maximum),
            "s": Watch(self.version, client_maximum),
        }
        self.up = True

    def collect(self, side):
        """Outputs of a side go on the wire."""
        other = "s" if side.name == "c" else "c"
        for one in side.engine.outputs():
            assert not isinstance(one, Close), side.name
            assert isinstance(one, Send)
            self.wire[side.name] += one.data
            self.watch[side.name].sent(one.data)
            self.watch[other].answering(one.data)

    def carry(self, side, count):
        """Bytes from the wire of `side` reach its peer."""
        data, self.wire[side.name] = self.wire[side.name][:count], self.wire[side.name][count:]
        if not data:
            return
        peer = self.server if side is self.client else self.client
        self.watch[side.name].arrived(data)
        self.watch[peer.name].answered(data)
        self.events(peer, peer.engine.receive_data(data, now=self.now))
        self.events(peer, peer.engine.take_events())
        self.collect(peer)

    def events(self, side, events):
        for event in events:
            assert not isinstance(event, Closed), event
            if isinstance(event, ConnectRequest):
                present = True
                if self.forgetful and (self.untold or self.rng.random() < 0.3):
                    present = False
                    self.untold = True
                    self.lost_keys += [one.key for one in self.server.session.outbound.values()]
                    self.server.session = Session()
                    self.server.tokens.clear()
                self.server.accepted = True
                self.server.engine.accept(self.server.session, now=self.now, session_present=present)
            elif isinstance(event, Connected):
                self.untold = False
                if not event.connack.session_present:
                    self.client.tokens.clear()
            elif isinstance(event, Received):
                side.got += event.messages
                assert bool(event.token) == any(event.ids)
                if event.token:
                    side.tokens.append(event.token)
            elif isinstance(event, Acknowledged):
                assert event.refused == {}
                side.keys += event.keys

    def cut(self):
        self.up = False
        self.wire = {}
        for side in (self.client, self.server):
            closed = side.engine.stream_reset(0, now=self.now)
            assert isinstance(closed[-1], Closed)
            assert closed[-1].reason_code is None
            side.engine, side.accepted = None, False

    def step(self, calm=False):
        rng = self.rng
        side = rng.choice((self.client, self.server))
        if not self.up:
            if rng.random() < 0.5:
                side.settle(rng.randint(0, 3))
            else:
                self.connect()
            return
        match rng.randrange(6):
            case 0:
                side.offer()
            case 1:
                side.settle(rng.randint(1, 4))
            case 5 if not calm and rng.random() < 0.12:
                self.cut()
                return
            case _:
                self.collect(side)
                self.carry(side, rng.choice((1, 2, 5, 30, 1000)))
        self.collect(side)

    def run(self, steps):
        for _ in range(steps):
            if self.rng.random() < 0.1:
                self.rng.choice((self.client, self.server)).want(self.rng.randint(1, 6))
            self.step()
        if not self.up:
            self.connect()
        sides = (self.client, self.server)
        for _ in range(3000):
            for side in sides:
                if side.queue:
                    side.offer()
                self.collect(side)
                self.carry(side, 100_000)
                side.settle(len(side.tokens))
                self.collect(side)
            if not any(self.wire.values()) and not any(one.queue or one.tokens for one in sides):
                return
        raise AssertionError("the exchange never ends")


def payloads(messages, qos):
    return Counter(one.payload for one in messages if one.qos == qos)


@pytest.mark.parametrize("version", [5, 4])
@pytest.mark.parametrize("group", range(6))
def test_with_sessions_kept_nothing_is_lost_and_qos_2_comes_once(version, group):
    for seed in range(group * 20, group * 20 + 20):
        world = World(seed, version)
        world.run(400)
        for sender, receiver in ((world.client, world.server), (world.server, world.client)):
            assert sender.session.outbound == {}, seed
            assert receiver.session.inbound == set(), seed
            assert receiver.session.unsettled == {}, seed
            told = Counter(sender.keys)
            assert set(told.values()) <= {1}, (seed, "a key came back twice")
            got = {qos: payloads(receiver.got, qos) for qos in (0, 1, 2)}
            by_qos = {
                qos: {p for p in sender.everything if p.startswith(f"{sender.name}{qos}".encode())}
                for qos in (0, 1, 2)
            }
            assert got[1].keys() == by_qos[1], seed
            assert got[2] == Counter(by_qos[2]), seed
            assert got[0].keys() <= by_qos[0], seed
            assert set(got[0].values()) <= {1}, seed
            assert len(told) == len(by_qos[1]) + len(by_qos[2]), seed


@pytest.mark.parametrize("version", [5, 4])
@pytest.mark.parametrize("group", range(3))
def test_with_sessions_lost_by_the_server_the_client_publishes_as_new(version, group):
    for seed in range(1000 + group * 20, 1000 + group * 20 + 20):
        world = World(seed, version, forgetful=True)
        world.run(400)
        sender, receiver = world.client, world.server
        assert sender.session.outbound == {}, seed
        told = Counter(sender.keys)
        assert set(told.values()) <= {1}, seed
        assert payloads(receiver.got, 1).keys() == {p for p in sender.everything if p.startswith(b"c1")}, seed
        assert payloads(receiver.got, 2).keys() == {p for p in sender.everything if p.startswith(b"c2")}, seed
        again = Counter(world.server.keys)
        assert set(again.values()) <= {1}, seed
        assert not set(again) & set(world.lost_keys), seed
