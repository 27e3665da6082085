"""A client among endpoints each of which speaks one version of MQTT."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import attrs
import pytest
from many_streams import run, until
from stairs import NEVER, client, scripts
from versions import REFUSALS, SOON, Speaks, negotiator, refuse, speaking

from tesaiot_connect.client import Client, ClientOptions
from tesaiot_connect.client.handshake import connect_packet
from tesaiot_connect.client.version import Version
from tesaiot_connect.errors import Refused
from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt.events import ConnectRequest
from tesaiot_connect.mqtt.packets import V3, V5, Subscription
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.protocols import ClientCertificate, Credentials


def among(*endpoints: Speaks, **options: Any) -> Client:
    return client(negotiator(*endpoints), options.pop("client_id", "c"), reconnect=SOON, **options)


async def publishes(one: Client) -> None:
    await one.publish([Message("x", b"y", 1)])


async def left_for(one: Client, version: str, url: str) -> None:
    await until(lambda: (one.status.state, one.status.version, one.status.url) == ("connected", version, url))


# --- back and forth ------------------------------------------------------------------------


def test_an_endpoint_that_changes_its_mind_is_followed_each_time() -> None:
    async def main() -> None:
        async with speaking(5) as (only,), among(only) as one:
            await publishes(one)
            for version in (4, 5, 4, 5):
                only.only = version
                only.drop()
                await publishes(one)
            assert only.versions == [5, 5, 4, 4, 5, 5, 4, 4, 5]
            await one.connected()

    run(main)


@pytest.mark.parametrize("first", [5, 4])
@pytest.mark.parametrize("client_id", ["c", ""], ids=["kept", "clean"])
def test_each_of_two_endpoints_is_spoken_to_in_its_own_version(first: int, client_id: str) -> None:
    """Whichever is up."""

    async def main() -> None:
        async with speaking(first, 9 - first) as (a, b), among(a, b, client_id=client_id) as one:
            b.up = False
            for up, down in ((a, b), (b, a), (a, b), (b, a)):
                up.up, down.up = True, False
                down.drop()
                await publishes(one)
                await left_for(one, "5" if up.only == 5 else "3.1.1", str(up.url))
            await one.connected()

    run(main)


def test_a_move_changes_the_version_in_either_direction() -> None:
    async def main() -> None:
        async with speaking(5, 4) as (a, b), among(a, b) as one:
            a.up = False
            await publishes(one)
            assert (one.status.version, one.status.url) == ("3.1.1", "old://b")
            a.up = True
            await left_for(one, "5", "old://a")
            assert one.status.session_present
            assert a.versions == [4, 5]

    run(main)


def test_both_refused_by_one_endpoint_the_others_have_their_turn() -> None:
    async def main() -> None:
        async with speaking(0, 5) as (a, b), among(a, b) as one:
            await publishes(one)
            a.only = 7
            a.drop()
            await publishes(one)
            assert (one.status.version, one.status.url) == ("5", "old://b")
            assert a.versions[:3] == [5, 5, 4]

    run(main)


def test_between_two_pauses_there_are_two_attempts_at_most() -> None:
    told: list[str] = []
    asked: list[list[int]] = []
    """What was tried so far, at each pause."""

    async def main() -> None:
        async with speaking(0) as (only,):  # which does not negotiate

            def tell(state: str, _: object) -> None:
                told.append(state)
                if state == "waiting":
                    asked.append(list(only.versions))

            options = ClientOptions(client_id="c", reconnect=SOON)
            async with Client(only, options, on_state=tell) as one:
                await publishes(one)
                only.only = 7
                only.drop()
                await until(lambda: len(asked) >= 4)
                assert asked[3] == [5, 5, 4, 5, 4, 5, 4]
                assert told[2:12] == [*("waiting", "connecting", "connecting") * 3, "waiting"]
                waiting, pauses = asyncio.create_task(one.connected()), len(asked)
                await until(lambda: len(asked) >= pauses + 2)
                assert not waiting.done(), "it was connected once, so it may be again"
                only.only = 0
                await waiting

    run(main)


def refusal() -> Refused:
    return Refused("no", reason_code=R.UNSUPPORTED_PROTOCOL_VERSION, permanent=True)


def test_a_second_change_waits_for_a_pause() -> None:
    """As where each of two endpoints speaks one version, and the race is won by the other one each time."""
    version = Version("c", ClientOptions(), keep_session=True)
    for _ in range(2):
        assert version.refused(refusal(), place=0, once_connected=False, others=True) == "at once"
        assert version.current == V3
        assert version.refused(refusal(), place=1, once_connected=False, others=True) == "later"
        assert version.current == V5
        version.paused(once_connected=False)
        version.accepted()


def test_what_was_refused_before_a_connection_was_accepted_does_not_count() -> None:
    version = Version("c", ClientOptions(), keep_session=True)
    for _ in range(3):
        assert version.refused(refusal(), place=0, once_connected=True, others=True) == "at once"
        version.accepted()


def test_a_login_that_needs_mqtt_5_brings_it_back() -> None:
    version = Version("c", ClientOptions(), keep_session=True)
    version.refused(refusal(), place=0, once_connected=True, others=True)
    assert version.choose(Credentials("user")) == V3
    assert version.choose(Proof.credentials) == V5


def test_both_refused_from_the_beginning_is_a_refusal_for_good() -> None:
    async def main() -> None:
        async with speaking(7) as (only,):
            async with Client(only, ClientOptions(client_id="c", reconnect=NEVER)) as one:
                with pytest.raises(Refused, match="version"):
                    await one.connected()
                assert only.versions == [5, 4]

    run(main)


# --- what the change costs -----------------------------------------------------------------


def test_a_session_that_would_end_is_taken_to_another_endpoint_first() -> None:
    async def main() -> None:
        async with speaking(4, 5) as (a, b), among(a, b, client_id="") as one:
            a.up = False
            await publishes(one)
            b.drop()
            a.up = True
            await publishes(one)
            assert (one.status.version, one.status.url) == ("5", "old://b")
            assert set(a.versions) <= {5}
            b.up = False
            b.drop()
            await publishes(one)
            assert (one.status.version, one.status.url) == ("3.1.1", "old://a"), "when none is left"

    run(main)


@pytest.mark.parametrize("options", [{"client_id": ""}, {"protocol": "5"}])
def test_where_one_place_refuses_the_version_there_are_moves_to_the_others(options: dict[str, Any]) -> None:
    async def main() -> None:
        async with speaking(4, 0, 0) as (a, b, c), among(a, b, c, **options) as one:
            a.up = b.up = False
            await publishes(one)
            a.up = True
            await until(lambda: a.versions)
            await left_for(one, "5", "old://c")
            b.up = True
            await left_for(one, "5", "old://b")
            assert one.status.better_after is None
            assert a.versions == [5]

    run(main)


def test_what_3_1_1_has_no_room_for_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    found = Properties(content_type="text/plain")

    async def main() -> None:
        async with speaking(0) as (only,), among(only) as one:
            async with one.subscribe([Subscription("t", no_local=True)]) as reader:
                await reader.grant()
                await one.publish([Message("a", b"", 1, properties=found)])
                assert "MQTT 3.1.1" not in caplog.text
                only.only = 4
                only.drop()
                await one.publish([Message("b", b"", 1, properties=Properties(subscription_ids=(1,)))])
                await one.publish([Message("c", b"", 1, properties=found)])
                await one.publish([Message("d", b"", 1, properties=found)])
                async with one.subscribe([Subscription("u", retain_handling=2)]) as another:
                    await another.grant()

    run(main)
    told = [one.message for one in caplog.records if "MQTT 3.1.1 is spoken" in one.message]
    assert len(told) == 2
    assert "`no_local` of the subscription to 't' " in told[0]
    assert "the properties of the message on 'c' " in told[1]


def test_what_waits_at_the_change_is_looked_at_too(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with speaking(4) as (only,), among(only) as one:
            await one.publish([Message("early", b"", 1, properties=Properties(content_type="x"))])

    run(main)
    assert "the properties of the message on 'early' are left out" in caplog.text


def test_who_asked_for_3_1_1_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with speaking(4) as (only,), among(only, protocol="3.1.1") as one:
            await one.publish([Message("a", b"", 1, properties=Properties(content_type="x"))])

    run(main)
    assert "MQTT 3.1.1" not in caplog.text


# --- enhanced authentication ---------------------------------------------------------------


@attrs.define
class Proof:
    """An auth, and its login, in which the server proves itself."""

    credentials: ClassVar = Credentials("user", method="SCRAM-SHA-256", data=b"n,,n=user,r=1")
    finished: list[bytes] = attrs.field(factory=list)

    async def begin(self) -> Proof:
        return self

    async def identity(self) -> ClientCertificate | None:
        return None

    async def respond(self, data: bytes, /) -> bytes:
        raise AssertionError

    async def finish(self, data: bytes, /) -> None:
        self.finished.append(data)


@pytest.mark.parametrize("refusal", REFUSALS, ids=bytes.hex)
def test_enhanced_authentication_is_not_left_out_for_the_sake_of_3_1_1(refusal: bytes) -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        auth = Proof()
        async with client(dialer, auth=auth) as one:

            async def accept() -> Any:
                far = await low.next()
                assert (await far.wait(ConnectRequest)).connect.properties[P.AUTH_METHOD] == "SCRAM-SHA-256"
                proof = {P.AUTH_METHOD: "SCRAM-SHA-256", P.AUTH_DATA: b"v=server"}
                far.engine.accept(Session(), now=0.0, session_present=False, properties=proof)
                await far.flush()
                return far

            connecting = asyncio.create_task(one.connected())
            await (await low.next()).connection.aclose()  # which may be a refusal of MQTT 5
            far = await accept()
            await connecting
            far.connection.abort()
            await refuse(await low.next(), refusal)
            await accept()
            await until(lambda: one.status.connects == 2)
            assert auth.finished == [b"v=server"] * 2
            assert one.status.version == "5"

    run(main)


@pytest.mark.parametrize(("protocol", "match"), [("auto", "version"), ("3.1.1", "SCRAM-SHA-256.*`protocol`")])
def test_a_broker_without_it_is_a_refusal_for_good(protocol: str, match: str) -> None:
    async def main() -> None:
        _, low, dialer = scripts()
        async with client(dialer, auth=Proof(), protocol=protocol, reconnect=NEVER) as one:
            connecting = asyncio.create_task(one.connected())
            if protocol == "auto":
                await refuse(await low.next())
            with pytest.raises(Refused, match=match):
                await connecting

    run(main)


@pytest.mark.parametrize("version", [V5, V3])
def test_a_connect_of_3_1_1_has_no_method(version: int) -> None:
    def made() -> Any:
        credentials = Proof().credentials
        how = {"client_id": "c", "version": version, "keep_session": True, "first": True}
        return connect_packet(ClientOptions(), credentials, **how)  # type: ignore[arg-type]

    if version == V5:
        assert made().properties[P.AUTH_METHOD] == "SCRAM-SHA-256"
    else:
        with pytest.raises(Refused, match=r"MQTT 3\.1\.1 has no authentication by SCRAM-SHA-256"):
            made()
