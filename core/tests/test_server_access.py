"""Rights as the broker enforces them: over time, and for what waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_peer import EnginePeer
from installed import EntryPoint

from tesaiot_connect import access as access_module, hookspecs, plugins
from tesaiot_connect.access import Access, AccessRule, Account, FirstOf
from tesaiot_connect.config.schema import serve_schema
from tesaiot_connect.config.serving import ServerConfig, load_server
from tesaiot_connect.errors import ConfigError, ConnectorError, NotApplicable
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.packets import Will
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.protocols import Challenge, Credentials, Duration, Peer, Principal
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Network, PairTransport

RULES = (
    AccessRule(publish=("devices/{username}/#",), subscribe=("devices/{username}/commands/#",)),
    AccessRule(principals=("reader*",), subscribe=("device/{device}/telemetry/#", "both/#")),
    AccessRule(principals=("platform",), publish=("#",), subscribe=("#",)),
)
TELEMETRY = "device/+/telemetry/#"


@attrs.define
class Door:
    """Lets "name@organisation" in; `gone` are users who may not stay."""

    access: Access
    gone: set[str] = attrs.field(factory=set)
    broken: bool = False
    failure: Exception | None = None

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        if self.failure is not None:
            raise self.failure
        text = credentials.username or (credentials.data or b"").decode()
        if not text:
            raise NotApplicable("there is no username")
        name, _, organisation = text.partition("@")

        def refusal() -> str:
            if self.broken:
                raise RuntimeError("the disk is gone")
            return f"{name} was removed" if name in self.gone else ""

        return self.access.principal(name, organisation=organisation or None, refusal=refusal)


class House:
    """A broker with an organisations file, over connections in memory."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "organisations.toml"
        self.file.write_text('acme = ["d1", "d2"]\nother = ["e1"]\n')
        self.door = Door(Access(rules=RULES, organisations_file=self.file))
        self.transport: PairTransport
        self.live: Broker

    async def enter(self, user: str, client_id: str = "", **options: Any) -> EnginePeer:
        peer = await self.knock(user, client_id, **options)
        await peer.connack()
        return peer

    async def knock(self, user: str, client_id: str = "", **options: Any) -> EnginePeer:
        client_id = client_id or user.replace("@", "-")
        return await EnginePeer.open(self.transport, client_id, username=user, **options)

    async def tell(self, *topics: str, qos: int = 1, retain: bool = False) -> None:
        """The platform publishes; the topic is the payload."""
        await self.live.publish([Message(topic, topic.encode(), qos, retain) for topic in topics])


def run(
    folder: Path, test: Callable[[House], Awaitable[None]], *, house: House | None = None, **options: Any
) -> House:
    house = house or House(folder)

    async def main() -> None:
        house.transport = Network().transport()
        house.live = Broker(BrokerOptions(**{"recheck": Duration(0.01), **options}))
        listener = ListenerSpec("pair", house.transport, house.door)
        async with asyncio.timeout(60), house.live.serving([listener]):
            await test(house)

    asyncio.run(main())
    return house


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The organisations file is looked at whenever there is an occasion."""
    monkeypatch.setattr(access_module, "_LOOK", -1.0)


def topics(messages: list[Message]) -> list[str]:
    return [message.topic for message in messages]


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
def test_a_refusal_is_told_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int
) -> None:
    async def test(house: House) -> None:
        device = await house.enter("d1@acme", version=version)
        watcher = await house.enter("platform", version=version)
        await watcher.subscribe("devices/#")
        codes = await device.subscribe("devices/d1/commands/#", "#", "$share/g/devices/+/x")
        assert codes == ((2, 0x87, 0x87) if version == 5 else (2, 0x80, 0x80))
        for _ in range(3):
            for qos in (0, 1, 2):
                await device.publish(Message("devices/d2/t", b"no", qos), Message("devices/d1/t", b"", qos))
        refused = set(device.refused.values())
        assert refused == ({R.NOT_AUTHORIZED} if version == 5 else set())
        assert len(device.refused) == (6 if version == 5 else 0)  # QoS 0 has no answer
        assert set(topics(await watcher.received(9))) == {"devices/d1/t"}
        await watcher.nothing_more()
        assert house.live.stats.dropped["not_authorized"] == 9

    run(tmp_path, test, recheck=Duration(3600))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(": ", 1)[1] for text in said] == [
        "no rule of [access] lets 'd1' subscribe to '#'",
        "no rule of [access] lets 'd1' subscribe to '$share/g/devices/+/x'",
        "no rule of [access] lets 'd1' publish to 'devices/d2/t'",
    ]
    assert said[0].startswith("client 'd1-acme' at ")


def test_the_log_is_not_flooded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(house: House) -> None:
        device = await house.enter("d1@acme")
        await device.publish(*(Message(f"no/{n}/" + "x" * 1000, b"", 1) for n in range(200)))
        assert len(device.refused) == 200

    run(tmp_path, test)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 21
    assert said[-1].endswith("further refusals are not logged")
    assert max(map(len, said)) < 400


def test_the_answer_says_why(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        device = await house.enter("d1@acme")
        raw = bytes.fromhex("82 07 0009 00 0001 23 02")  # SUBSCRIBE 9 "#"
        await device.stream.send(raw)
        data = b""
        while b"no rule of [access] lets 'd1' subscribe to '#'" not in data:
            data += await device.stream.receive()

    run(tmp_path, test)


# --- scopes -------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_an_organisation_gets_what_its_devices_send(tmp_path: Path, qos: int) -> None:
    async def test(house: House) -> None:
        await house.tell("device/d1/telemetry/kept", "device/e1/telemetry/kept", retain=True)
        reader = await house.enter("reader@acme")
        stranger = await house.enter("reader@other")
        for peer in (reader, stranger):
            assert await peer.subscribe(TELEMETRY, "both/#", qos=qos) == (qos, qos)
        await house.tell("device/d1/telemetry/t", "device/e1/telemetry/t", "device/zz/telemetry/t", "both/x")
        want = ["device/{}/telemetry/kept", "device/{}/telemetry/t", "both/x"]
        assert topics(await reader.received(3)) == [one.format("d1") for one in want]
        assert topics(await stranger.received(3)) == [one.format("e1") for one in want]
        await house.tell("both/fence")
        assert topics(await reader.received(1)) == topics(await stranger.received(1)) == ["both/fence"]

    run(tmp_path, test)


def test_rights_that_shrink_hold_at_once_for_who_is_connected(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        house.door.access = attrs.evolve(
            house.door.access,
            rules=(*RULES, AccessRule(principals=("reader",), publish=("cmd/{device}",))),
        )
        reader = await house.enter("reader@acme")
        watcher = await house.enter("platform")
        await watcher.subscribe("cmd/#")
        await reader.subscribe(TELEMETRY, "both/#")
        await house.tell("device/d2/telemetry/t")
        await reader.publish(Message("cmd/d2", b"", 1))
        assert topics(await reader.received(1)) == ["device/d2/telemetry/t"]
        house.file.write_text('acme = ["d1"]\nother = ["d2"]\n')
        keys = [0]
        while not reader.refused:  # at the next recheck
            keys = await reader.send(Message("cmd/d2", b"", 1))
            await reader.until(lambda keys=keys: keys[0] in {*reader.acknowledged, *reader.refused})
        await house.tell("device/d2/telemetry/t", "device/d1/telemetry/t")
        assert topics(await reader.received(1)) == ["device/d1/telemetry/t"]
        house.file.write_text('acme = ["d1", "d2"]\n')  # and when they grow, nobody need subscribe again
        while "device/d2/telemetry/t" not in topics(reader.messages):
            await house.tell("device/d2/telemetry/t", "both/fence")
            await reader.received(1)

    run(tmp_path, test)


def test_what_waited_for_a_slow_client_is_judged_again(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        reader = await house.enter("reader@acme", settle=False, properties={P.RECEIVE_MAXIMUM: 1})
        await reader.subscribe(TELEMETRY, "both/#", qos=1)
        await house.tell("device/d1/telemetry/1", "device/d2/telemetry/2", "device/d2/telemetry/3", "both/4")
        await reader.received(1)
        assert house.live.stats.queued == 3
        house.file.write_text('acme = ["d1"]\n')
        (client,) = house.live._connections
        client.recheck()
        while reader.tokens:
            reader.engine.settle(reader.tokens.pop())
            await reader.flush()
        assert topics(await reader.received(1)) == ["both/4"]
        assert house.live.stats.queued == 0

    run(tmp_path, test)


@pytest.mark.parametrize("restart", [False, True])
def test_what_waited_for_a_client_that_was_away_is_judged_at_its_return(
    tmp_path: Path, restart: bool
) -> None:
    async def before(house: House) -> None:
        reader = await house.enter("reader@acme", "r", expiry=1000, settle=False)
        await reader.subscribe(TELEMETRY, "both/#")
        await house.tell("device/d1/telemetry/1", "device/d2/telemetry/2", "both/3")
        await house.tell("device/d1/telemetry/4", "device/d2/telemetry/5", "both/6", qos=2)
        await reader.received(6)
        await reader.vanish()
        await until(lambda: house.live.stats.clients == 0)
        await house.tell("device/d1/telemetry/7", "device/e1/telemetry/x", "both/8", "device/d2/telemetry/9")
        assert house.live.stats.queued == 3  # what it never may have does not push out what is its own
        if not restart:
            await after(house)

    async def after(house: House) -> None:
        if restart:  # nobody knows who the session's principal is now: what comes is kept for it
            await house.tell("device/e1/telemetry/y", "device/d1/telemetry/10")
        house.file.write_text('acme = ["d1"]\n')
        reader = await house.enter("reader@acme", "r", expiry=1000, clean=False)
        await house.tell("both/last")
        want = [f"device/d1/telemetry/{n}" for n in (1, 4, 7)] + [f"both/{n}" for n in (3, 6, 8, "last")]
        want += ["device/d1/telemetry/10"] if restart else []
        await reader.until(lambda: "both/last" in topics(reader.messages))
        assert sorted(topics(reader.messages)) == sorted(want)
        reader.messages.clear()
        await house.tell("both/again", qos=2)
        await reader.received(1)
        await reader.nothing_more()
        await until(lambda: house.live.stats.queued_bytes == 0)  # no half-done handshake stays behind

    options = {"state_file": tmp_path / "state.db"} if restart else {}
    house = run(tmp_path, before, **options)
    if restart:
        run(tmp_path, after, house=house, **options)


def test_subscriptions_that_are_not_allowed_any_more_end(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        reader = await house.enter("reader@acme", "r", expiry=1000)
        await reader.subscribe(TELEMETRY, "both/#", "device/d2/telemetry/x")
        await reader.disconnect()
        await house.tell("device/d1/telemetry/1", "both/2", "device/d2/telemetry/x")
        house.door.access = Access(rules=(AccessRule(subscribe=("both/#",)),))
        reader = await house.enter("reader@acme", "r", expiry=1000, clean=False)
        assert topics(await reader.received(1)) == ["both/2"]
        assert house.live.stats.subscriptions == 1
        await house.tell("device/d1/telemetry/3", "both/4")
        assert topics(await reader.received(1)) == ["both/4"]

    run(tmp_path, test)


# --- shared subscriptions -----------------------------------------------------------------


def test_a_group_gives_each_message_to_a_member_who_may_have_it(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        ours = [await house.enter("reader@acme", f"a{n}") for n in range(2)]
        theirs = await house.enter("reader@other", "b")
        for peer in (*ours, theirs):
            await peer.subscribe(f"$share/g/{TELEMETRY}", "both/fence")
        sent = [f"device/{device}/telemetry/{n}" for n in range(20) for device in ("d1", "e1", "zz")]
        await house.tell(*sent)
        await house.tell("both/fence")
        for peer in (*ours, theirs):
            await peer.until(lambda peer=peer: "both/fence" in topics(peer.messages))
            peer.messages.pop()
        assert set(topics(theirs.messages)) == {one for one in sent if "/e1/" in one}
        assert len(ours[0].messages) == len(ours[1].messages) == 10  # in turns
        got = {*topics(ours[0].messages), *topics(ours[1].messages)}
        assert got == {one for one in sent if "/d1/" in one}

    run(tmp_path, test)


def test_what_waited_for_a_member_goes_to_one_who_may_have_it(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        away = await house.enter("reader@acme", "a", expiry=1000)
        await away.subscribe(f"$share/g/{TELEMETRY}")
        await away.disconnect()
        await house.tell("device/d1/telemetry/1", "device/d2/telemetry/2")
        stranger = await house.enter("reader@other", "b")
        await stranger.subscribe(f"$share/g/{TELEMETRY}", "both/#")
        house.file.write_text('acme = ["d1"]\nother = ["d2", "e1"]\n')
        back = await house.enter("reader@acme", "a", expiry=1000, clean=False)
        assert topics(await back.received(1)) == ["device/d1/telemetry/1"]
        assert topics(await stranger.received(1)) == ["device/d2/telemetry/2"]
        await back.nothing_more()
        await back.vanish()  # the session stays, and so does what only it may have
        await until(lambda: house.live.stats.clients == 1)
        await house.tell("device/d1/telemetry/3", "both/fence")
        assert topics(await stranger.received(1)) == ["both/fence"]
        back = await house.enter("reader@acme", "a", clean=False)
        assert topics(await back.received(1)) == ["device/d1/telemetry/3"]

    run(tmp_path, test)


def test_a_member_that_leaves_keeps_what_no_other_may_have(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        reader = await house.enter(
            "reader@acme", "a", expiry=9, settle=False, properties={P.RECEIVE_MAXIMUM: 1}
        )
        stranger = await house.enter("reader@other", "b")
        for peer in (reader, stranger):
            await peer.subscribe(f"$share/g/{TELEMETRY}", qos=1)
        await house.tell("device/d1/telemetry/1", "device/d1/telemetry/2")
        await reader.received(1)
        await reader.vanish()
        await until(lambda: house.live.stats.clients == 1)
        back = await house.enter("reader@acme", "a", clean=False)
        assert topics(await back.received(2)) == ["device/d1/telemetry/1", "device/d1/telemetry/2"]
        await stranger.nothing_more()

    run(tmp_path, test)


# --- wills --------------------------------------------------------------------------------


def test_a_will_is_judged_when_it_is_made_and_when_it_is_due(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        rules = (*RULES, AccessRule(principals=("gate",), publish=("wills/{device}",)))
        house.door.access = attrs.evolve(house.door.access, rules=rules)
        watcher = await house.enter("platform")
        await watcher.subscribe("wills/#")
        for version in (4, 5):
            will = Will(Message("wills/e1", b""))
            refused = await house.knock("gate@acme", will=will, version=version)
            assert (await refused.closed()).reason_code == R.NOT_AUTHORIZED
        first = await house.enter("gate@acme", "1", will=Will(Message("wills/d1", b"")))
        second = await house.enter("gate@acme", "2", will=Will(Message("wills/d2", b"")))
        house.file.write_text('acme = ["d1"]\n')
        for client in house.live._connections:
            client.recheck()
        await second.vanish()
        await until(lambda: house.live.stats.clients == 2)
        await first.vanish()
        assert topics(await watcher.received(1)) == ["wills/d1"]
        assert house.live.stats.dropped["not_authorized"] == 1

    run(tmp_path, test)


# --- who may stay -------------------------------------------------------------------------


def test_who_may_not_stay_is_disconnected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def test(house: House) -> None:
        gone, old, stays = [
            await house.enter(user, version=version) for user, version in (("d1", 5), ("d1x", 4), ("d2", 5))
        ]
        await stays.subscribe("devices/d2/commands/#")
        house.door.gone |= {"d1", "d1x"}
        closed = await gone.closed()
        assert (closed.reason_code, closed.text) == (R.NOT_AUTHORIZED, "d1 was removed")
        assert (await old.closed()).reason_code is None  # 3.1.1 has no words for it
        await house.tell("devices/d2/commands/x")
        await stays.received(1)
        assert house.live.stats.clients == 1

    run(tmp_path, test)
    assert "client 'd1' must leave: d1 was removed" in caplog.text


def test_a_look_that_fails_ends_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(house: House) -> None:
        peers = [await house.enter(f"d{n}") for n in range(3)]
        house.door.broken = True
        await until(lambda: "cannot be said" in caplog.text)
        house.door.broken = False
        house.door.gone.add("d0")
        await peers[0].closed()
        await peers[1].publish(Message("devices/d1/x", b"", 1))

    run(tmp_path, test)


@pytest.mark.parametrize("failure", [ConnectorError("the directory is down", fix="start it"), KeyError("x")])
@pytest.mark.parametrize(("version", "code"), [(4, 3), (5, 0x88)])
def test_an_authenticator_that_fails_lets_nobody_in_and_the_client_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: Exception, version: int, code: int
) -> None:
    async def test(house: House) -> None:
        house.door.failure = failure
        peer = await house.knock("d1@acme", version=version)
        data = b""
        while len(data) < 4:
            more = await peer.stream.receive()
            assert more, "hung up without a word"
            data += more
        assert (data[0], data[3]) == (0x20, code)
        assert b"directory" not in data  # what it is about is for the log
        house.door.failure = None
        await house.enter("d1@acme", version=version)

    run(tmp_path, test)
    (record,) = [one for one in caplog.records if one.levelname == "ERROR"]
    assert "cannot be authenticated" in record.getMessage()
    assert isinstance(failure, ConnectorError) == ("the directory is down" in record.getMessage())
    assert isinstance(failure, KeyError) == bool(record.exc_info)


def test_a_session_is_of_one_name_in_one_organisation(tmp_path: Path) -> None:
    options = {"state_file": tmp_path / "state.db"}

    async def before(house: House) -> None:
        owner = await house.enter("reader@acme", "r", expiry=1000)
        await owner.subscribe(TELEMETRY, "both/#")
        await thieves(house)
        await house.tell("both/1")
        assert topics(await owner.received(1)) == ["both/1"]  # it did not lose its connection
        await owner.disconnect()
        await thieves(house)
        await house.tell("both/2")

    async def thieves(house: House) -> None:
        for user in ("reader@other", "reader", "reader2@acme", "platform"):
            for clean in (False, True):
                thief = await house.knock(user, "r", clean=clean, expiry=1000)
                assert (await thief.closed()).reason_code == R.CLIENT_IDENTIFIER_NOT_VALID, user

    async def after(house: House) -> None:
        await thieves(house)
        owner = await house.knock("reader@acme", "r", expiry=1000, clean=False)
        assert (await owner.connack()).session_present
        assert topics(await owner.received(1)) == ["both/2"]

    house = run(tmp_path, before, **options)
    run(tmp_path, after, house=house, **options)


def test_authenticating_again_cannot_change_who_it_is(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        async def enter() -> EnginePeer:
            properties = {P.AUTH_METHOD: "name", P.AUTH_DATA: b"reader@acme"}
            peer = await EnginePeer.open(house.transport, "r", properties=properties)
            await peer.connack()
            await peer.subscribe(TELEMETRY, "both/#")
            return peer

        async def again(peer: EnginePeer, who: bytes) -> None:
            peer.engine.auth(who, reauthenticate=True)
            await peer.flush()

        reader = await enter()
        house.door.access = attrs.evolve(
            house.door.access, rules=(AccessRule(subscribe=("both/#",), publish=("fence/#",)),)
        )
        await again(reader, b"reader@acme")
        assert (await reader.challenge()).final
        await house.tell("device/d1/telemetry/1", "both/2")
        assert topics(await reader.received(1)) == ["both/2"]
        assert house.live.stats.subscriptions == 1
        for who in (b"reader@other", b"platform", b"reader"):
            reader = await enter()
            await again(reader, who)
            assert (await reader.closed()).reason_code == R.NOT_AUTHORIZED

    run(tmp_path, test)


# --- the file -----------------------------------------------------------------------------


@attrs.frozen
class Users:
    """An authenticator that asks for rules."""

    access: Access
    file: Path | None = None

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        return self.access.principal("x")


@attrs.frozen
class Open:
    """One that knows nothing of rules."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        raise NotApplicable("never")


class Fake:
    """A plugin as an object."""

    @staticmethod
    @hookspecs.hookimpl
    def tesaiot_authenticators() -> dict[str, Any]:
        return {"users": Users, "open": Open}


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ServerConfig]:
    real = list(plugins.metadata.entry_points(group=hookspecs.GROUP))
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [*real, EntryPoint(Fake)])

    def load(text: str) -> ServerConfig:
        file = tmp_path / "broker.toml"
        file.write_text(text)
        return load_server(file)

    return load


LISTENER = '[listeners.a]\nscheme = "mqtt"\nport = 0\n'
ACCESS = """
[access]
organisations = { acme = ["d1"] }
[[access.rules]]
publish = ["devices/{username}/#"]
[[access.rules]]
principals = ["token:*"]
subscribe = ["device/{device}/telemetry/#"]
"""


def test_the_file_gives_every_authenticator_its_rules(read: Callable[[str], ServerConfig]) -> None:
    own = '{ type = "users", access = { rules = [{ publish = ["x"] }] } }'
    auth = f'auth = [{{ type = "open" }}, {{ type = "users" }}, {own}]\n'
    config = read(LISTENER + auth + '[listeners.b]\nport = 0\nauth = { type = "users" }\n' + ACCESS)
    first, second = (one.authenticator for one in config.listeners)
    assert isinstance(first, FirstOf)
    assert isinstance(second, Users)
    _, shared, special = first.authenticators
    assert isinstance(shared, Users)
    assert isinstance(special, Users)
    assert shared.access is second.access
    assert len(second.access.rules) == 2
    assert special.access.rules == (AccessRule(publish=("x",)),)
    account = asyncio.run(second.begin(Peer("", ""), Credentials()))
    assert isinstance(account, Account)
    assert account.may_publish("devices/x/t")
    assert config.warnings == ()


def test_rules_that_are_missing_or_do_not_hold_are_warned_of(read: Callable[[str], ServerConfig]) -> None:
    (warning,) = read(LISTENER + 'auth = { type = "users" }\n').warnings
    assert (warning.key, warning.line) == ("listeners.a.auth", 4)
    assert "nobody who comes in this way may publish or subscribe" in warning.message
    (warning,) = read(LISTENER + ACCESS).warnings
    assert warning.key == "listeners.a"
    assert "who may do everything" in warning.message
    assert read(LISTENER + 'auth = { type = "open" }\n').warnings == ()


def test_everything_that_is_wrong_is_told(read: Callable[[str], ServerConfig], tmp_path: Path) -> None:
    text = """
[access]
organisations = { acme = "d1" }
organisation_file = "x"
[[access.rules]]
publish = ["devices/{user}/#"]
subscribe = "a"
[listeners.a]
scheme = "mqtt"
port = 0
auth = [{ type = "users", access = { rules = 3 } }, { type = "userz" }, 4]
[listeners.b]
port = 0
auth = []
"""
    with pytest.raises(ConfigError) as error:
        read(text)
    keys = [problem.key for problem in error.value.problems]
    assert keys == [
        "access.organisations.acme",
        "access.organisation_file",
        "access.rules[0].publish",
        "access.rules[0].subscribe",
        "listeners.a.auth[0].access.rules",
        "listeners.a.auth[1].type",
        "listeners.a.auth[2]",
        "listeners.b.auth",
    ]
    assert "{username}, {organisation}, {device}" in str(error.value)
    text = LISTENER + 'auth = { type = "users" }\n[access]\norganisations_file = "organisations.toml"\n'
    with pytest.raises(
        ConfigError, match=r"access.organisations_file: the organisations file .*cannot be read"
    ):
        read(text)
    (tmp_path / "organisations.toml").write_text("acme = [")
    with pytest.raises(ConfigError, match=r"is damaged"):
        read(text)
    (tmp_path / "organisations.toml").write_text('acme = ["d1"]')
    read(text)


def test_the_schema_knows_the_table(read: Callable[[str], ServerConfig]) -> None:
    schema = serve_schema(plugins.load())
    rule = schema["properties"]["access"]["properties"]["rules"]["items"]
    assert set(rule["properties"]) == {"principals", "organisations", "publish", "subscribe"}
    listener = schema["properties"]["listeners"]["additionalProperties"]["anyOf"][0]
    table, several = listener["properties"]["auth"]["anyOf"]
    assert several["items"] == table
    users = next(one for one in table["anyOf"] if one["properties"]["type"] == {"const": "users"})
    assert users["required"] == ["type"]
