"""A whole conversation, replayed to each engine with its input cut at every byte: same events and answers."""

from __future__ import annotations

import pytest

from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.decoder import Acks, Decoder, Publishes
from tesaiot_connect.mqtt.events import (
    Acknowledged,
    AuthChallenge,
    Close,
    Closed,
    Connected,
    ConnectRequest,
    Received,
    Send,
    Suback,
    SubscribeRequest,
    UnsubscribeRequest,
)
from tesaiot_connect.mqtt.packets import Connect, Subscription, Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session

REQUEST = Properties(
    payload_format=1,
    message_expiry=30,
    content_type="text/plain",
    response_topic="answers/dev",
    correlation_data=b"\x00\x01",
    user=(("trace", "1"), ("trace", "2")),
)
ANSWER = Properties(correlation_data=b"\x00\x01", subscription_ids=(7, 200))
FROM_CLIENT = [
    Message("device/dev/telemetry", b"0", 0),
    Message("device/dev/telemetry", b"1", 1, False, REQUEST),
    Message("device/dev/telemetry", b"2", 2, True),
    Message("another/topic", b"", 2, False, REQUEST),
    Message("another/topic", "é".encode() * 80, 1),
    Message("a/third", b"3", 0, False, REQUEST),
]
FROM_SERVER = [
    Message("answers/dev", b"0", 2, False, ANSWER),
    Message("answers/dev", b"1", 1, True),
    Message("answers/dev", b"2", 0),
    Message("news", bytes(range(256)), 2),
    Message("news", b"", 1, False, ANSWER),
]


class Peer:
    """An engine whose owner answers every event at once, always in the same way."""

    def __init__(self, engine):
        self.engine = engine
        self.events = []
        self.sent = b""
        self.closed = False
        self.now = 0.0

    def feed(self, data):
        self._handle(self.engine.receive_data(data, now=self.now))

    def do(self, action):
        action(self)
        self._handle(self.engine.take_events())

    def _handle(self, events):
        for event in events:
            assert not any(isinstance(one, Closed) for one in self.events)
            self.events.append(event)
            self._answer(event)
        if more := self.engine.take_events():
            self._handle(more)

    def _answer(self, event):
        engine = self.engine
        match event:
            case ConnectRequest() if event.connect.properties:
                engine.challenge("SCRAM", b"first")
            case ConnectRequest():
                self.accept()
            case AuthChallenge() if isinstance(engine, ClientEngine):
                if not event.final:
                    engine.auth(b"answer to " + event.data)
            case AuthChallenge(data=b"answer to first"):
                self.accept({P.AUTH_DATA: b"proof", P.SERVER_KEEP_ALIVE: 30, P.ASSIGNED_CLIENT_ID: "dev"})
            case AuthChallenge(data=b"again"):
                engine.challenge("SCRAM", b"second")
            case AuthChallenge():
                engine.challenge("SCRAM", b"bye", final=True)
            case Received():
                engine.settle(event.token)
            case SubscribeRequest():
                codes = [
                    one.qos if one.topic_filter != "secret" else 0x87 for one in event.packet.subscriptions
                ]
                engine.suback(event, codes, text="some")
            case UnsubscribeRequest():
                engine.unsuback(event, [0, 0x11][: len(event.packet.filters)])

    def accept(self, properties=None):
        self.engine.accept(Session(), now=self.now, session_present=False, properties=properties or {})

    def take(self):
        data = b""
        for one in self.engine.outputs():
            if isinstance(one, Send):
                assert one.stream == 0
                data += one.data
            else:
                assert isinstance(one, Close)
                self.closed = True
        self.sent += data
        return data


def merged(events):
    """Events without what depends on how the bytes came: runs are joined, tokens left out."""
    found = []
    received, done = [], []
    for event in events:
        match event:
            case Received():
                assert bool(event.token) == any(event.ids)
                received += zip(event.messages, event.ids, strict=True)
            case Acknowledged():
                done += event.keys
                assert event.refused == {}
            case _:
                found.append(event)
    return found, received, done


def said(data, *, from_client, version):
    """What was said, by kind of packet: answers of different kinds may be interleaved differently."""
    found = {}
    if not from_client or not data.startswith(b"\x10"):
        rest = data
    else:
        length = data[1] if data[1] < 0x80 else (data[1] & 0x7F) + (data[2] << 7)
        end = length + (2 if data[1] < 0x80 else 3)
        found["connect"], rest = data[:end], data[end:]
    for item in Decoder(from_client=from_client, version=version, topic_alias_maximum=8).feed(rest):
        assert not isinstance(item, Exception), item
        if isinstance(item, Publishes):
            found.setdefault("messages", []).extend(zip(item.messages, item.ids, strict=True))
        elif isinstance(item, Acks):
            found.setdefault(item.packet_type, []).extend((one, item.reasons.get(one, 0)) for one in item.ids)
        else:
            found.setdefault(type(item).__name__, []).append(item)
    return found


def client_engine(version):
    if version == 5:
        connect = Connect(
            client_id="",
            clean_start=False,
            keepalive=60,
            username="me",
            password=b"secret",
            will=Will(Message("gone/dev", b"bye", 1, True, REQUEST), 5),
            properties={
                P.SESSION_EXPIRY: 3600,
                P.RECEIVE_MAXIMUM: 20,
                P.MAXIMUM_PACKET_SIZE: 100_000,
                P.TOPIC_ALIAS_MAXIMUM: 2,
                P.REQUEST_RESPONSE_INFO: 1,
                P.AUTH_METHOD: "SCRAM",
                P.AUTH_DATA: b"hello",
                P.USER: [("a", "b")],
            },
        )
    else:
        connect = Connect(client_id="dev", version=4, keepalive=30, will=Will(Message("gone/dev", b"bye", 1)))
    return ClientEngine(connect, Session(), now=0.0)


def server_engine():
    return ServerEngine(ServerLimits(topic_alias_maximum=2), now=0.0)


def ping(peer):
    peer.now = 31.0
    peer._handle(peer.engine.handle_timeout(peer.now))


def steps(version, ending):
    """What the owners do beside answering, as (side, action)."""
    v5 = version == 5
    yield (
        "c",
        lambda peer: peer.engine.subscribe(
            [
                Subscription(
                    "answers/#", 2, no_local=v5, retain_as_published=v5, retain_handling=2 if v5 else 0
                )
            ],
            properties={P.SUBSCRIPTION_ID: [7], P.USER: [("x", "y")]} if v5 else {},
        ),
    )
    yield (
        "c",
        lambda peer: peer.engine.subscribe(
            [Subscription("news", 1), Subscription("secret", 0), Subscription("$share/g/+/x", 1)]
        ),
    )
    yield "c", lambda peer: _publish(peer, FROM_CLIENT, 100)
    yield "s", lambda peer: _publish(peer, FROM_SERVER, 200)
    yield "c", ping
    yield "c", lambda peer: peer.engine.unsubscribe(["news", "nothing"] if v5 else ["news"])
    if v5:
        yield "c", lambda peer: peer.engine.auth(b"again", reauthenticate=True)
    yield "c", lambda peer: _publish(peer, FROM_CLIENT, 300)
    yield "s", lambda peer: _publish(peer, FROM_SERVER, 400)
    if ending == "client":
        found = {P.SESSION_EXPIRY: 10, P.REASON_STRING: "done"} if v5 else {}
        yield "c", lambda peer: peer.engine.disconnect(R.DISCONNECT_WITH_WILL if v5 else 0, properties=found)
    else:
        yield (
            "s",
            lambda peer: peer.engine.disconnect(
                R.SERVER_MOVED, text="moved", properties={P.SERVER_REFERENCE: "b.example:8883"}
            ),
        )


def _publish(peer, messages, first):
    assert peer.engine.publish(messages, range(first, first + len(messages))) == len(messages)


def record(version, ending):
    """Both peers talk; returns each with the log of what it was given: bytes or an action."""
    peers = {"c": Peer(client_engine(version)), "s": Peer(server_engine())}
    logs = {"c": [], "s": []}

    def pump():
        quiet = 0
        while quiet < 2:
            for here, there in (("c", "s"), ("s", "c")):
                data = peers[here].take()
                quiet = 0 if data else quiet + 1
                if data:
                    logs[there].append(data)
                    peers[there].feed(data)

    pump()
    for side, action in steps(version, ending):
        logs[side].append(action)
        peers[side].do(action)
        pump()
    return peers, logs


def fresh(side, version):
    return Peer(client_engine(version) if side == "c" else server_engine())


def replay(peer, log, cut):
    peer.take()
    at = 0
    for entry in log:
        if callable(entry):
            peer.do(entry)
        else:
            for part in cut(entry, at):
                peer.feed(part)
            at += len(entry)
        peer.take()
    return peer


def at_byte(position):
    def cut(data, at):
        here = position - at
        return (data[:here], data[here:]) if 0 < here < len(data) else (data,)

    return cut


CASES = [(5, "client"), (5, "server"), (4, "client"), (4, "server")]


@pytest.mark.parametrize(("version", "ending"), CASES)
def test_the_dialogue_says_all_there_is_to_say(version, ending):
    peers, _ = record(version, ending)
    client, client_got, client_done = merged(peers["c"].events)
    server, server_got, server_done = merged(peers["s"].events)
    sent = FROM_CLIENT * 2 if version == 5 else [_bare(one) for one in FROM_CLIENT * 2]
    back = FROM_SERVER * 2 if version == 5 else [_bare(one) for one in FROM_SERVER * 2]
    assert [message for message, _ in server_got] == sent
    assert [message for message, _ in client_got] == back
    assert sorted(client_done) == list(_keys(FROM_CLIENT, 100, 300))
    assert sorted(server_done) == list(_keys(FROM_SERVER, 200, 400))
    kinds = [type(event) for event in client]
    if version == 5:
        assert kinds == [
            AuthChallenge,
            Connected,
            Suback,
            Suback,
            Suback,
            AuthChallenge,
            AuthChallenge,
            Closed,
        ]
        assert client[1].connack.properties[P.AUTH_METHOD] == "SCRAM"
        assert client[1].connack.properties[P.ASSIGNED_CLIENT_ID] == "dev"
        assert [one.codes for one in client if isinstance(one, Suback)] == [(2,), (1, 0x87, 1), (0, 0x11)]
        request = next(one for one in server if isinstance(one, SubscribeRequest))
        assert request.packet.properties == {P.SUBSCRIPTION_ID: [7], P.USER: [("x", "y")]}
        assert request.packet.subscriptions == (Subscription("answers/#", 2, True, True, 2),)
    else:
        assert kinds == [Connected, Suback, Suback, Suback, *[Closed] * (ending == "client")]
        assert [one.codes for one in client if isinstance(one, Suback)] == [(2,), (1, 0x80, 1), ()]
    assert b"\xc0\x00" in peers["c"].sent
    assert b"\xd0\x00" in peers["s"].sent
    ends = {"c": client[-1], "s": server[-1]}
    assert isinstance(ends["s"], Closed)
    if ending == "client":
        assert ends["s"].by_peer
        assert ends["s"].orderly == (version == 4)
        if version == 5:
            assert ends["s"].reason_code == R.DISCONNECT_WITH_WILL
            assert ends["s"].properties == {P.SESSION_EXPIRY: 10, P.REASON_STRING: "done"}
    elif version == 5:
        assert ends["c"] == Closed(
            R.SERVER_MOVED,
            "moved",
            True,
            False,
            {P.SERVER_REFERENCE: "b.example:8883", P.REASON_STRING: "moved"},
        )
    else:
        assert not isinstance(ends["c"], Closed)  # a 3.1.1 server just closes
        assert b"\xe0" not in peers["s"].sent[-2:]
    assert peers["s"].closed


def _bare(message):
    return Message(message.topic, message.payload, message.qos, message.retain)


def _keys(messages, *firsts):
    for first in firsts:
        yield from (first + index for index, one in enumerate(messages) if one.qos)


@pytest.mark.parametrize("side", ["c", "s"])
@pytest.mark.parametrize(("version", "ending"), CASES)
def test_every_split_gives_the_same_events(version, ending, side):
    peers, logs = record(version, ending)
    expected = merged(peers[side].events)
    answers = said(peers[side].sent, from_client=side == "c", version=version)
    total = sum(len(entry) for entry in logs[side] if not callable(entry))
    assert total > 400
    for position in range(1, total):
        peer = replay(fresh(side, version), logs[side], at_byte(position))
        assert merged(peer.events) == expected, position
        if position % 8 == 0:
            assert said(peer.sent, from_client=side == "c", version=version) == answers, position


@pytest.mark.parametrize("side", ["c", "s"])
@pytest.mark.parametrize(("version", "ending"), CASES)
def test_byte_by_byte_gives_the_same_events(version, ending, side):
    peers, logs = record(version, ending)
    peer = replay(fresh(side, version), logs[side], lambda data, _: [bytes([byte]) for byte in data])
    assert merged(peer.events) == merged(peers[side].events)
    from_client = side == "c"
    assert said(peer.sent, from_client=from_client, version=version) == said(
        peers[side].sent, from_client=from_client, version=version
    )


@pytest.mark.parametrize("version", [4, 5])
def test_everything_at_once_is_accepted_too(version):
    """A client may send right behind CONNECT (section 3.1.4): one chunk, and each split of it."""
    client = client_engine(4) if version == 4 else ClientEngine(Connect(client_id="c"), Session(), now=0.0)
    [connect] = client.outputs()
    publish = b"\x32\x06\x00\x01a\x00\x01x" if version == 4 else b"\x32\x07\x00\x01a\x00\x01\x00x"
    subscribe = b"\x82\x06\x00\x02\x00\x01b\x01" if version == 4 else b"\x82\x07\x00\x02\x00\x00\x01b\x01"
    wire = connect.data + publish + subscribe + b"\xc0\x00\xe0\x00"
    for position in range(1, len(wire) + 1):
        server = server_engine()
        events = []
        for part in (wire[:position], wire[position:]):
            events += server.receive_data(part, now=0.0)
        assert [type(event) for event in events] == [ConnectRequest]
        assert server.outputs() == []
        server.accept(Session(), now=0.0, session_present=False)
        events = server.take_events()
        assert [type(event) for event in events] == [Received, SubscribeRequest, Closed]
        assert events[0].messages == [Message("a", b"x", 1)]
        assert events[-1].orderly
        *sends, close = server.outputs()
        data = b"".join(one.data for one in sends)
        assert data[:1] == b"\x20"
        assert data[-2:] == b"\xd0\x00"
        assert close == Close(0)
