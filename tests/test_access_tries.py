"""One organisation's clients try to read, write, lose or take over what is another's.

Every try goes over a real socket, with bytes of our own where a well-behaved client would not send
them, and ends with the same question: do the rightful clients have all that is theirs, and only that?
The same tries against a broker whose rules allow everything show that they would find a hole.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
from engine_peer import EnginePeer

from tesaiot_connect import (
    ByteStream,
    Challenge,
    Connection,
    Credentials,
    Message,
    Peer,
    Principal,
    Url,
    access as access_module,
)
from tesaiot_connect.access import Access, AccessRule
from tesaiot_connect.errors import Disconnected, Refused
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.packets import Connect, Subscribe, Subscription, Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Certificates
from tesaiot_connect.tls import TlsOptions
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls

PLATFORM = Access(
    rules=(
        AccessRule(
            publish=("devices/{username}/#", "device/{username}/#"),
            subscribe=("devices/{username}/commands/#",),
        ),
        AccessRule(
            principals=("token:*",),
            publish=("devices/{device}/commands/#", "{organisation}/events/#"),
            subscribe=("device/{device}/telemetry/#", "{organisation}/events/#"),
        ),
    ),
    organisations={"acme": ["d1", "d2"], "other": ["e1", "e2"]},
)
OPEN = Access(rules=(AccessRule(publish=("#",), subscribe=("#",)),))
KEPT = "device/d1/telemetry/kept"
TELEMETRY = "device/+/telemetry/#"
PASSWORD = b"right"


@attrs.frozen
class Users:
    """Users are called "name@organisation" when they log in."""

    access: Access

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        if credentials.password != PASSWORD:
            raise Refused("wrong password", reason_code=R.BAD_USER_NAME_OR_PASSWORD, permanent=True)
        name, _, organisation = (credentials.username or "").rpartition("@")
        return self.access.principal(name, organisation=organisation)


class Intruder:
    """A connection that says any bytes and keeps all it hears."""

    def __init__(self, connection: Connection, stream: ByteStream, version: int) -> None:
        self.connection = connection
        self.stream = stream
        self.version = version
        self.heard = b""

    async def send(self, data: bytes) -> None:
        try:
            await self.stream.send(data)
        except Disconnected:
            pass  # the broker has had enough; what it said before is still read

    async def hear(self, what: bytes) -> bytes:
        """Until it came (a regular expression), or the connection ended: what has come since before."""
        begin = len(self.heard)
        async with asyncio.timeout(20):
            while not re.search(what, self.heard[begin:], re.DOTALL):
                try:
                    data = await self.stream.receive()
                except Disconnected:
                    break
                if not data:
                    break
                self.heard += data
        return self.heard[begin:]

    async def fence(self) -> None:
        """Everything the broker sent before has been heard then."""
        await self.send(b"\xc0\x00")
        await self.hear(rb"\xd0\x00")

    async def subscribe(self, *filters: str, qos: int = 2, options: int = 0) -> None:
        """`options` are the bits beside the QoS (MQTT 5 section 3.8.3.1)."""
        names = [one.encode() for one in filters]  # as they are: our own encoder checks them
        body = b"\0\7" + (b"\0" if self.version == 5 else b"")
        body += b"".join(len(name).to_bytes(2) + name + bytes([qos | options]) for name in names)
        await self.send(codec.packet(0x82, body))
        await self.hear(rb"\x90")
        await self.fence()

    async def publish(
        self, topic: str, payload: bytes = b"FORGED", qos: int = 1, *, retain: bool = False, alias: int = 0
    ) -> None:
        name = topic.encode("utf-8", "surrogatepass")
        found = b"" if self.version < 5 else b"\x03\x23" + alias.to_bytes(2) if alias else b"\x00"
        number = (9).to_bytes(2) if qos else b""
        body = len(name).to_bytes(2) + name + number + found + payload
        await self.send(codec.packet(0x30 | qos << 1 | retain, body))
        if qos == 2:
            await self.send(b"\x62\x02\x00\x09")
        await self.fence()

    async def leave(self) -> None:
        self.connection.abort()


class World:
    """A broker, the clients of acme that are in the right, and intruders of other."""

    def __init__(self, live: Broker, transport: TcpTls, version: int) -> None:
        self.live = live
        self.transport = transport
        self.version = version
        self.intruders: list[Intruder] = []
        self.connections: list[Connection] = []

    async def rightful(self, user: str, client_id: str, *, clean: bool = False) -> EnginePeer:
        peer = await EnginePeer.open(
            self.transport, client_id, version=self.version, clean=clean, expiry=1000,
            username=user, password=PASSWORD,
        )  # fmt: skip
        self.connections.append(peer.connection)
        await peer.connack()
        return peer

    async def begin(self) -> None:
        self.device = await self.rightful("d1@acme", "d1")
        self.reader = await self.rightful("token:acme:1@acme", "acme-reader")
        self.sharer = await self.rightful("token:acme:2@acme", "acme-sharer")
        assert await self.device.subscribe("devices/d1/commands/#") == (2,)
        assert await self.reader.subscribe(TELEMETRY, "acme/events/#") == (2, 2)
        assert await self.sharer.subscribe(f"$share/acme/{TELEMETRY}") == (2,)
        await self.device.publish(Message(KEPT, b"SECRET kept", 1, True))

    async def end(self) -> None:
        for connection in self.connections:
            connection.abort()
            await connection.wait_closed()

    async def approach(self) -> Intruder:
        connection = await self.transport.connect()
        self.connections.append(connection)
        self.intruders.append(Intruder(connection, await connection.open_stream(), self.version))
        return self.intruders[-1]

    async def intrude(
        self,
        user: str = "e1@other",
        client_id: str = "intruder",
        *,
        clean: bool = True,
        expiry: int = 1000,
        will: Will | None = None,
    ) -> Intruder:
        intruder = await self.approach()
        properties = {P.SESSION_EXPIRY: expiry, P.TOPIC_ALIAS_MAXIMUM: 10} if self.version == 5 else {}
        connect = Connect(
            client_id=client_id, version=self.version, clean_start=clean, will=will, keepalive=0,
            username=user, password=PASSWORD, properties=properties,
        )  # fmt: skip
        await intruder.send(codec.encode_connect(connect))
        await intruder.hear(rb"\x20..")
        return intruder

    async def breaches(self) -> set[str]:
        """What is wrong: "read", "written", "lost"."""
        sent = [Message(f"device/d1/telemetry/t{qos}", b"SECRET %d" % qos, qos) for qos in (0, 1, 2)]
        await self.device.publish(*sent)
        command = Message("devices/d1/commands/now", b"SECRET command", 1)
        event = Message("acme/events/x", b"SECRET event", 1)
        await self.reader.publish(command, event)
        late = await self.rightful("token:acme:3@acme", "late", clean=True)
        await late.subscribe(KEPT)
        wanted = [
            (self.reader, {*(one.payload for one in sent), event.payload}),
            (self.sharer, {one.payload for one in sent}),
            (self.device, {command.payload}),
            (late, {b"SECRET kept"}),
        ]
        found = set()
        for peer, payloads in wanted:
            await peer.publish(Message("nobody/reads/this", b"", 1))  # what came before is here then
            got = {message.payload for message in peer.messages}
            if not payloads <= got:
                found.add("lost")
            if any(b"FORGED" in payload for payload in got):
                found.add("written")
        for intruder in self.intruders:
            await intruder.fence()
            if b"SECRET" in intruder.heard:
                found.add("read")
            await intruder.leave()
        return found


Try = Callable[[World], Awaitable[None]]
TRIES: dict[str, tuple[Try, str]] = {}
"""By name; with the breach that a broker of open rules suffers, "" for none."""


def a_try(breach: str = "") -> Callable[[Try], Try]:
    def add(attempt: Try) -> Try:
        TRIES[attempt.__name__] = (attempt, breach)
        return attempt

    return add


# --- reading by subscriptions -------------------------------------------------------------

FILTERS = [
    "#",
    "+/#",
    "+/+/+/+",
    "+/d1/#",
    "device/#",
    "device/d1/#",
    "device/d1/telemetry/#",
    "device/d1/+/t1",
    "device/+/telemetry/t1",
    "device/+/+/+",
    TELEMETRY,
    KEPT,
    "devices/#",
    "devices/+/commands/#",
    "devices/d1/commands/now",
    "+/+/commands/+",
    "acme/#",
    "acme/events/#",
    "+/events/x",
    "+/+/x/#",
    "$share/acme/" + TELEMETRY,
    "$share/g/#",
    "$share/g/device/d1/telemetry/#",
    "$share/g/acme/events/x",
]
"""Each matches something of acme's."""
HARMLESS = [
    "/#",
    "//#",
    "device//telemetry/#",
    "/device/d1/telemetry/#",
    "device/d1/telemetry/t1/",
    "DEVICE/D1/TELEMETRY/#",
    "device/D1/telemetry/#",
    "device/d\uff11/telemetry/#",  # a full-width digit
    "d\u0435vice/d1/telemetry/#",  # a Cyrillic letter
    "device/d1\u200b/telemetry/#",  # a space without width
    "\ufeffdevice/d1/telemetry/#",
    "$SYS/#",
    "$share/device/d1/telemetry/#",
    "$share/g/$share/acme/device/d1/telemetry/#",
    "device/" + "+/" * 190 + "#",
    "device/" + "+/" * 5000 + "#",
    "device/" + "x" * 60_000,
]
"""Each could match something of acme's, if somebody were careless."""


def subscription(topic_filter: str, user: str) -> Try:
    async def attempt(world: World) -> None:
        intruder = await world.intrude(user)
        for qos in (0, 2):
            await intruder.subscribe(topic_filter, qos=qos)

    return attempt


for _user in ("e1@other", "token:other:1@other"):
    for _filters, _breach in ((FILTERS, "read"), (HARMLESS, "")):
        for _filter in _filters:
            _shown = _filter if len(_filter) < 60 else f"{_filter[:20]}({len(_filter)})"
            TRIES[f"{_user.partition('@')[0]} subscribes {_shown}"] = (subscription(_filter, _user), _breach)


@a_try("read")
async def many_filters_in_one_packet(world: World) -> None:
    intruder = await world.intrude("token:other:1@other")
    await intruder.subscribe("other/events/#", *FILTERS, TELEMETRY)


@a_try("read")
async def every_way_to_ask_for_what_is_kept(world: World) -> None:
    """Retain handling 0, 1 and 2, as published or not, no local; with MQTT 3.1.1 these bits mean nothing."""
    for options in (0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x04):
        intruder = await world.intrude("token:other:1@other", f"options-{options}")
        await intruder.subscribe(TELEMETRY, KEPT, options=options if world.version == 5 else 0)
        await intruder.subscribe(TELEMETRY, KEPT, options=options if world.version == 5 else 0)


@a_try("read")
async def the_fields_of_a_session_of_its_own(world: World) -> None:
    """A client identifier gives no rights: not by what it is called, nor by what it looks like."""
    for client_id in (
        "#",
        "+",
        "$SYS",
        "$share/acme/x",
        "device/d1",
        "d1 ",
        "D1",
        "d1\u200b",
        "acme-reader/",
    ):
        intruder = await world.intrude("token:other:1@other", client_id)
        await intruder.subscribe(TELEMETRY, "acme/events/#", "devices/d1/commands/#")


@a_try()
async def names_that_end_early(world: World) -> None:
    """NUL is how the broker tells a name from its organisation, and no text of MQTT may hold it."""
    for user, client_id in (
        ("token:acme:1!acme@other", "acme-reader"), ("d1!acme@", "d1"), ("e1@other", "d1!"), ("e1@other", "!")
    ):  # fmt: skip
        intruder = await world.approach()
        connect = Connect(
            client_id=client_id, version=world.version, clean_start=False, username=user, password=PASSWORD
        )
        await intruder.send(codec.encode_connect(connect).replace(b"!", b"\0"))
        assert not await intruder.hear(rb"\x20..")
        await intruder.subscribe(TELEMETRY)


@a_try("read")
async def a_name_that_is_a_wildcard(world: World) -> None:
    for name in ("+", "#", "", "d1/commands/#", "e1/../d1", "{device}", "*"):
        intruder = await world.intrude(f"{name}@other", f"name-{name!r}")
        await intruder.subscribe("devices/+/commands/#", "device/#")
        await intruder.subscribe(f"devices/{name}/commands/#")


@a_try("read")
async def an_organisation_that_is_a_wildcard(world: World) -> None:
    for organisation in ("+", "#", "", "acme/x", "{organisation}", "*"):
        intruder = await world.intrude(f"token:x@{organisation}", f"organisation-{organisation!r}")
        await intruder.subscribe(TELEMETRY, "+/events/#")
        await intruder.subscribe(f"{organisation}/events/#")


@a_try("read")
async def a_session_that_waits_while_its_client_is_away(world: World) -> None:
    intruder = await world.intrude("token:other:1@other", "durable", clean=False)
    await intruder.subscribe(TELEMETRY, f"$share/acme/{TELEMETRY}", "acme/events/#")
    await intruder.leave()
    while world.live.stats.clients > 3:
        await asyncio.sleep(0.001)
    await world.device.publish(Message("device/d1/telemetry/meanwhile", b"SECRET meanwhile", 1))
    await world.intrude("token:other:1@other", "durable", clean=False)


@a_try("lost")
async def a_place_among_those_who_share(world: World) -> None:
    for number in range(5):
        intruder = await world.intrude("token:other:1@other", f"share-{number}")
        await intruder.subscribe(f"$share/acme/{TELEMETRY}")


# --- writing ------------------------------------------------------------------------------

PLACES = [
    "device/d1/telemetry/t1",
    "devices/d1/commands/now",
    "acme/events/x",
    "device/d1/telemetry/t1/",
    "device/d1/telemetry//t1",
]


@a_try("written")
async def publishing(world: World) -> None:
    for user in ("e1@other", "token:other:1@other"):
        intruder = await world.intrude(user, f"writer-{user}")
        for topic in PLACES:
            for qos in (0, 1, 2):
                await intruder.publish(topic, qos=qos)


@a_try("written")
async def publishing_to_what_is_kept(world: World) -> None:
    intruder = await world.intrude()
    for qos in (0, 1, 2):
        await intruder.publish(KEPT, qos=qos, retain=True)


@a_try("lost")
async def erasing_what_is_kept(world: World) -> None:
    intruder = await world.intrude()
    await intruder.publish(KEPT, b"", retain=True)


@a_try("written")
async def a_will(world: World) -> None:
    for number, topic in enumerate(PLACES):
        will = Will(Message(topic, b"FORGED by a will", 1, True))
        intruder = await world.intrude("e1@other", f"will-{number}", will=will)
        await intruder.leave()
    while world.live.stats.clients > 3:
        await asyncio.sleep(0.001)


@a_try("written")
async def a_will_that_waits(world: World) -> None:
    """Until the session ends: by a new one of the same client."""
    for number, topic in enumerate(PLACES):
        will = Will(Message(topic, b"FORGED by a late will", 1), 500)
        intruder = await world.intrude("e1@other", f"late-{number}", clean=False, will=will)
        await intruder.leave()
    while world.live.stats.clients > 3:
        await asyncio.sleep(0.001)
    for number in range(len(PLACES)):
        await world.intrude("e1@other", f"late-{number}")


@a_try()
async def an_answer_that_another_is_asked_for(world: World) -> None:
    """The broker itself answers nobody; a response topic is for those who may publish there."""
    intruder = await world.intrude()
    topic, to = b"device/e1/telemetry/own", b"devices/d1/commands/now"
    asked = b"\x08" + len(to).to_bytes(2) + to + b"\x09\x00\x06FORGED"
    properties = bytes([len(asked)]) + asked if world.version == 5 else b""
    body = len(topic).to_bytes(2) + topic + b"\x00\x09" + properties + b"FORGED"
    await intruder.send(codec.packet(0x32, body))
    await intruder.fence()


@a_try("lost")
async def a_will_that_erases(world: World) -> None:
    intruder = await world.intrude(will=Will(Message(KEPT, b"", 1, True)))
    await intruder.leave()
    while world.live.stats.clients > 3:
        await asyncio.sleep(0.001)


@a_try("written")
async def an_alias(world: World) -> None:
    """Without MQTT 5 there is none: the topic itself then."""
    intruder = await world.intrude()
    await intruder.publish("device/e1/telemetry/own", b"own", 1, alias=1)
    await intruder.publish("device/d1/telemetry/t1", qos=1, alias=1)
    if world.version == 5:
        await intruder.publish("", qos=1, alias=1)  # refused once is not forgotten: it is judged again
        await intruder.publish("", qos=0, alias=1)
        await intruder.publish("device/d1/telemetry/t1", qos=0, alias=2)
        await intruder.publish("", qos=2, alias=2)


@a_try()
async def topics_that_are_none(world: World) -> None:
    none = ("device/+/telemetry/t1", "device/#", "device/d1\0/telemetry", "", "\ud800")
    for number, topic in enumerate((*none, "$share/acme/device/d1/telemetry/t1")):
        intruder = await world.intrude("e1@other", f"none-{number}")
        await intruder.publish(topic)


@a_try()
async def look_alikes_as_topics(world: World) -> None:
    intruder = await world.intrude()
    for topic in ("device/d\uff11/telemetry/t1", "Device/d1/telemetry/t1", "device/d1\u200b/telemetry/t1"):
        await intruder.publish(topic, qos=1, retain=True)


# --- taking over --------------------------------------------------------------------------


@a_try()
async def the_client_identifier_of_who_is_connected(world: World) -> None:
    for user in ("e1@other", "d1@other", "token:acme:1@other", "token:other:1@other"):
        for client_id in ("d1", "acme-reader", "acme-sharer"):
            for clean in (True, False):
                intruder = await world.intrude(user, client_id, clean=clean)
                await intruder.fence()


@a_try()
async def the_session_of_who_is_away(world: World) -> None:
    await world.reader.vanish()
    while world.live.stats.clients > 2:
        await asyncio.sleep(0.001)
    await world.device.publish(Message("device/d1/telemetry/meanwhile", b"SECRET meanwhile", 1))
    for user in ("e1@other", "token:acme:1@other", "token:acme:2@acme"):
        for clean in (True, False):
            intruder = await world.intrude(user, "acme-reader", clean=clean)
            await intruder.fence()
    world.reader = await world.rightful("token:acme:1@acme", "acme-reader")
    await world.reader.until(lambda: b"SECRET meanwhile" in {one.payload for one in world.reader.messages})


@a_try()
async def a_wrong_password(world: World) -> None:
    intruder = await world.approach()
    connect = Connect(client_id="d1", version=world.version, username="d1@acme", password=b"wrong")
    hello = Subscribe(packet_id=1, subscriptions=(Subscription("devices/d1/commands/#", 1),))
    await intruder.send(codec.encode_connect(connect) + codec.encode_subscribe(hello, world.version))
    await intruder.fence()


# --- the tries ----------------------------------------------------------------------------


@asynccontextmanager
async def world_of(access: Access, folder: Path, version: int) -> AsyncIterator[World]:
    live = Broker(BrokerOptions(state_file=folder / "state.db", synchronous="normal"))
    listener = ListenerSpec("tcp", TcpTls(Url.parse("mqtt://127.0.0.1:0")), Users(access))
    async with asyncio.timeout(60), live.serving([listener]) as (address,):
        world = World(live, TcpTls(Url.parse(address)), version)
        try:
            await world.begin()
            yield world
        finally:
            await world.end()


async def outcome(access: Access, folder: Path, version: int, attempt: Try) -> set[str]:
    async with world_of(access, folder, version) as world:
        await attempt(world)
        return await world.breaches()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", TRIES)
def test_another_organisation_gets_nowhere(tmp_path: Path, name: str, version: int) -> None:
    assert asyncio.run(outcome(PLATFORM, tmp_path, version, TRIES[name][0])) == set()


@pytest.mark.parametrize("name", [name for name, (_, breach) in TRIES.items() if breach])
def test_the_try_finds_a_hole_where_there_is_one(tmp_path: Path, name: str) -> None:
    attempt, breach = TRIES[name]
    assert breach in asyncio.run(outcome(OPEN, tmp_path, 5, attempt))


@pytest.mark.parametrize("version", [4, 5])
def test_a_device_that_went_to_another_organisation_is_not_its_old_one_s_any_more(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was granted before the change: subscriptions, a place in a group, a queue, a will, a session."""
    monkeypatch.setattr(access_module, "_LOOK", -1.0)
    file = tmp_path / "organisations.toml"
    file.write_text('acme = ["d1"]\nother = ["e1", "m1"]\n')
    access = attrs.evolve(PLATFORM, organisations={}, organisations_file=file)

    async def main() -> None:
        async with world_of(access, tmp_path, version) as world:
            moves = await world.rightful("m1@other", "m1")
            watcher = await world.intrude("token:other:1@other", "watcher")
            await watcher.subscribe(TELEMETRY, "device/m1/telemetry/#")
            sharer = await world.intrude("token:other:2@other", "sharer")
            await sharer.subscribe(f"$share/acme/{TELEMETRY}")
            away = await world.intrude("token:other:3@other", "away", clean=False)
            await away.subscribe(TELEMETRY)
            will = Will(Message("devices/m1/commands/x", b"FORGED by a will", 1), 500)
            late = await world.intrude("token:other:4@other", "willing", clean=False, will=will)
            await moves.publish(Message("device/m1/telemetry/before", b"before", 1))
            for control in (watcher, away):
                if b"before" not in control.heard:
                    await control.hear(b"before")
            await away.leave()
            if version == 5:  # without it a will does not wait
                await late.leave()
            while world.live.stats.clients > (7 if version == 5 else 8) - 1:
                await asyncio.sleep(0.001)

            file.write_text('acme = ["d1", "m1"]\nother = ["e1"]\n')
            refused = await world.intrude("m1@acme", "m1")  # the session is of another organisation's m1
            assert refused.heard[0] == 0x20 and refused.heard[3] != 0
            await late.leave()
            moved = await world.rightful("m1@acme", "m1-acme", clean=True)
            assert await moved.subscribe("devices/m1/commands/#") == (2,)
            await moved.publish(Message("device/m1/telemetry/after", b"SECRET after", 1, True))
            await world.intrude("token:other:4@other", "willing")  # ends the session, and so the will is due
            await world.intrude("token:other:3@other", "away", clean=False)
            fresh = await world.intrude("token:other:5@other", "fresh")
            await fresh.subscribe(TELEMETRY, "device/m1/telemetry/after")
            await world.reader.publish(Message("devices/m1/commands/now", b"SECRET command", 1))
            await moved.until(lambda: bool(moved.messages))
            assert [one.payload for one in moved.messages] == [b"SECRET command"]
            assert await world.breaches() == set()
            assert b"SECRET after" in {one.payload for one in world.reader.messages}

    asyncio.run(main())


def test_another_stream_of_a_quic_connection_has_the_same_rights(
    tmp_path: Path, certificates: Certificates
) -> None:
    async def main() -> None:
        live = Broker(BrokerOptions())
        tls = certificates.server()
        listeners = [
            ListenerSpec("tcp", TcpTls(Url.parse("mqtt://127.0.0.1:0")), Users(PLATFORM)),
            ListenerSpec(
                "quic", QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=tls), Users(PLATFORM)
            ),
        ]
        async with asyncio.timeout(60), live.serving(listeners) as (tcp, quic):
            world = World(live, TcpTls(Url.parse(tcp)), 5)
            await world.begin()
            trust = TlsOptions(ca_file=certificates.ca_file)
            world.transport = QuicAioquic(Url.parse(quic), tls=trust)  # type: ignore[assignment]
            control = await world.intrude("token:other:1@other")
            own = Intruder(control.connection, await control.connection.open_stream(), 5)
            packet = Subscribe(packet_id=7, subscriptions=tuple(Subscription(one, 2) for one in FILTERS))
            await own.send(codec.encode_subscribe(packet, 5))
            answer = await own.hear(rb"\x90.*\x87")
            granted = [FILTERS.index(TELEMETRY), FILTERS.index(f"$share/acme/{TELEMETRY}")]
            codes = list(answer[-len(FILTERS) :])
            assert [index for index, code in enumerate(codes) if code != R.NOT_AUTHORIZED] == [
                FILTERS.index("device/+/telemetry/t1"), *granted
            ]  # fmt: skip
            await own.send(codec.packet(0x32, b"\x00\x16device/d1/telemetry/t1\x00\x09\x00FORGED"))
            assert b"\x40\x03\x00\x09\x87" in await own.hear(rb"\x40\x03")
            world.transport = TcpTls(Url.parse(tcp))
            assert await world.breaches() == set()
            assert b"SECRET" not in own.heard
            await world.end()

    asyncio.run(main())
