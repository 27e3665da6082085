"""Rules, patterns and organisations: what a principal may do."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, strategies as st

from tesaiot_connect import access as access_module
from tesaiot_connect.access import Access, AccessRule, Account, Anybody, FirstOf
from tesaiot_connect.accounts import file_stamp
from tesaiot_connect.errors import ConnectorError, NotApplicable, Refused
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.topics import matches
from tesaiot_connect.protocols import (
    Challenge,
    Credentials,
    Peer,
    Principal,
    RevocablePrincipal,
    ScopedPrincipal,
)
from tesaiot_connect.server.options import covers

PLATFORM = Access(
    rules=(
        AccessRule(publish=("devices/{username}/#",), subscribe=("devices/{username}/commands/#",)),
        AccessRule(
            principals=("token:*",),
            subscribe=("device/{device}/telemetry/#", "{organisation}/events", "{device}/x"),
            publish=("device/{device}/commands",),
        ),
    ),
    organisations={"acme": ["d1", "d2", "$SYS"], "other": ["e1"]},
)
TOKEN = PLATFORM.principal("token:acme:1", organisation="acme")


def test_what_no_rule_allows_is_forbidden() -> None:
    nobody = Access().principal("d1", organisation="acme")
    assert not nobody.may_publish("a")
    assert not nobody.may_subscribe("a")
    assert not nobody.may_receive("a")
    silent = Access(rules=(AccessRule(publish=("#",)),)).principal("d1")
    assert silent.may_publish("a")
    assert not silent.may_subscribe("a")  # publish and subscribe are apart
    assert not silent.may_receive("a")


def test_a_device_has_its_own_topics() -> None:
    device = PLATFORM.principal("d1", organisation="acme")
    assert device.may_publish("devices/d1/telemetry")
    assert device.may_publish("devices/d1")
    assert not device.may_publish("devices/d2/telemetry")
    assert not device.may_publish("devices/D1/telemetry")
    assert not device.may_publish("devices/d1x/telemetry")
    assert device.may_subscribe("devices/d1/commands/#")
    assert device.may_subscribe("devices/d1/commands/+/now")
    for wide in ("#", "+/#", "devices/#", "devices/+/commands/#", "devices/d1/#", "devices/d1/+/#", "+/d1/#"):
        assert not device.may_subscribe(wide), wide
    assert not device.scoped


def test_an_organisation_reads_what_its_devices_send() -> None:
    assert TOKEN.scoped
    assert TOKEN.may_subscribe("device/+/telemetry/#")
    assert TOKEN.may_subscribe("device/+/telemetry")
    assert TOKEN.may_subscribe("device/d1/telemetry/t")
    assert not TOKEN.may_subscribe("device/e1/telemetry/t")  # not only silent: it would be a mistake
    assert not TOKEN.may_subscribe("device/#")
    assert not TOKEN.may_subscribe("+/d1/telemetry/#")
    assert TOKEN.may_receive("device/d2/telemetry/t/u")
    assert not TOKEN.may_receive("device/e1/telemetry/t/u")
    assert not TOKEN.may_receive("device/+/telemetry/t")
    assert not TOKEN.may_receive("device//telemetry/t")
    assert TOKEN.may_publish("device/d2/commands")
    assert not TOKEN.may_publish("device/e1/commands")
    assert not TOKEN.may_publish("device/+/commands")
    assert TOKEN.may_receive("acme/events")
    assert not TOKEN.may_receive("other/events")


def test_no_name_is_a_way_into_more() -> None:
    for name in ("#", "+", "", "d1/..", "a/b", "d1\0", "{device}", "{username}", "$SYS", "*"):
        device = PLATFORM.principal(name, organisation="acme")
        allowed = device.may_publish(f"devices/{name}/x")
        assert allowed == (name in ("{device}", "{username}", "$SYS", "*")), name
        for other in ("devices/d1/x", "devices/+/x", "devices/x/x", "devices//x"):
            assert not device.may_publish(other), name
            assert not device.may_subscribe(other), name
        assert not device.may_subscribe("devices/+/commands/#"), name
    for organisation in ("#", "+", "", "acme/x", None):
        token = PLATFORM.principal("token:1", organisation=organisation)
        assert not token.may_subscribe("device/+/telemetry/#")
        assert not token.may_subscribe("+/events")
        assert not token.may_receive(f"{organisation}/events")


def test_topics_that_begin_with_a_dollar_need_a_rule_that_says_so() -> None:
    everything = Access(rules=(AccessRule(publish=("#",), subscribe=("#", "+/x", "{username}/#")),))
    for principal in (everything.principal("$SYS"), TOKEN):
        for topic in ("$SYS/x", "$SYS", "$share/g/x"):
            assert not principal.may_publish(topic)
            assert not principal.may_subscribe(topic)
            assert not principal.may_receive(topic)
        assert not principal.may_subscribe("$SYS/#")
    operator = Access(rules=(AccessRule(subscribe=("$SYS/#",)),)).principal("operator")
    assert operator.may_subscribe("$SYS/broker/+")
    assert not operator.may_subscribe("#")


def test_rules_are_for_names_and_organisations() -> None:
    def may(rule: AccessRule, name: str, organisation: str | None = None) -> bool:
        return Access(rules=(rule,)).principal(name, organisation=organisation).may_publish("t")

    by_name = AccessRule(principals=("gate-*", "ann"), publish=("t",))
    assert may(by_name, "ann")
    assert may(by_name, "gate-1")
    assert may(by_name, "gate-")
    assert may(by_name, "gate-\n")
    assert not may(by_name, "annex")
    assert not may(by_name, "a.n")
    assert not may(by_name, "my-gate-1")
    assert not may(AccessRule(principals=("[ab]", "?"), publish=("t",)), "a")  # only * is special
    by_organisation = AccessRule(organisations=("ac*",), publish=("t",))
    assert may(by_organisation, "x", "acme")
    assert not may(by_organisation, "x", "other")
    assert not may(by_organisation, "x")
    assert not may(AccessRule(organisations=("*",), publish=("t",)), "x")
    assert not may(AccessRule(principals=("x",), organisations=("acme",), publish=("t",)), "x", "other")


@pytest.mark.parametrize(
    "pattern", ["", "a/#/b", "a#", "{user}/#", "x{username}/#", "{device", "$share/g/a", "a/\0"]
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|filter|placeholder|shared|level"):
        AccessRule(publish=(pattern,))
    with pytest.raises(ValueError, match=r"pattern|filter|placeholder|shared|level"):
        AccessRule(subscribe=("a", pattern))


LEVELS = st.sampled_from(["a", "d1", "e1", "", "$x", "é", "e\u0301"])
FILTERS = st.builds(
    lambda levels, rest: "/".join([*levels, "#"] if rest else levels),
    st.lists(st.one_of(LEVELS, st.just("+")), min_size=1, max_size=4),
    st.booleans(),
).filter(bool)
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)


@given(FILTERS, FILTERS, TOPICS)
def test_patterns_agree_with_the_matching_of_the_protocol(pattern: str, asked: str, topic: str) -> None:
    someone = Access(rules=(AccessRule(publish=(pattern,), subscribe=(pattern,)),)).principal("x")
    assert someone.may_publish(topic) == someone.may_receive(topic) == matches(pattern, topic)
    assert someone.may_subscribe(asked) == covers(pattern, asked)
    if someone.may_subscribe(asked) and matches(asked, topic):
        assert someone.may_receive(topic)


@given(FILTERS, TOPICS)
def test_an_organisation_never_receives_of_others(asked: str, topic: str) -> None:
    rule = AccessRule(subscribe=("{device}/#", "a/{device}/#"))
    principal = Access(rules=(rule,), organisations={"acme": ["d1"]}).principal("x", organisation="acme")
    levels = topic.split("/")
    own = levels[0] == "d1" or levels[:2] == ["a", "d1"]
    assert principal.may_receive(topic) == own
    if principal.may_subscribe(topic):
        assert own


def test_an_account_is_what_the_broker_asks_for() -> None:
    reason = [""]
    account = PLATFORM.principal("d1", valid_until=5.0, refusal=lambda: reason[0])
    principal: Principal = account
    assert isinstance(account, ScopedPrincipal)
    assert isinstance(account, RevocablePrincipal)
    assert (principal.name, principal.organisation, principal.valid_until) == ("d1", None, 5.0)
    assert account.refusal() == ""
    reason[0] = "removed"
    assert account.refusal() == "removed"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "_DECISIONS", 10)
    own = Access(rules=PLATFORM.rules, organisations=PLATFORM.organisations)
    principal = own.principal("token:1", organisation="acme")
    for n in range(100):
        assert principal.may_receive(f"device/d1/telemetry/{n}")
        assert not principal.may_receive(f"device/e1/telemetry/{n}" + "x" * 600)
        assert 0 < len(own._now.decisions) <= 10


# --- the organisations file ---------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at whenever there is an occasion."""
    monkeypatch.setattr(access_module, "_LOOK", -1.0)


@pytest.mark.usefixtures("at_once")
def test_the_organisations_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "organisations.toml"
    file.write_text('acme = ["d1"]\n')
    access = Access(rules=PLATFORM.rules, organisations={"acme": ["d0"]}, organisations_file=file)
    access.check()
    principal = access.principal("token:1", organisation="acme")

    def may(device: str) -> bool:
        assert principal.refusal() == ""  # the broker asks this now and then
        return principal.may_receive(f"device/{device}/telemetry/t")

    assert (may("d0"), may("d1"), may("d2")) == (True, True, False)
    file.write_text('acme = ["d2"]\nother = []\n')
    assert (may("d0"), may("d1"), may("d2")) == (True, False, True)
    for damage in (
        "acme = [",
        'acme = "d1"',
        "acme = [1]",
        'acme = ["#"]',
        '"a/b" = []',
        "acme = ['d\\'",
        "\ud800",
    ):
        file.write_bytes(damage.encode("utf-8", "surrogatepass"))
        caplog.clear()
        assert (may("d0"), may("d1"), may("d2")) == (True, False, True), damage
        assert sum(str(file) in record.message for record in caplog.records) == 1, damage
        assert "what it said before holds" in caplog.text
    file.unlink()
    assert may("d2")
    file.write_text('acme = ["d3"]\n')
    assert (may("d2"), may("d3")) == (False, True)


@pytest.mark.usefixtures("at_once")
def test_a_trouble_that_passes_is_told_once_and_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "organisations.toml"
    file.write_text('acme = ["d1"]\n')
    access = Access(rules=PLATFORM.rules, organisations_file=file)
    principal = access.principal("token:1", organisation="acme")
    file.write_text('acme = ["d1", "d2"]\n')
    with monkeypatch.context() as patched:

        def no_files_left(*_: object, **__: object) -> str:
            raise OSError(errno.EMFILE, "Too many open files")

        patched.setattr(Path, "read_text", no_files_left)
        for _ in range(3):
            principal.refusal()
    (record,) = (one for one in caplog.records if one.levelname == "ERROR")
    assert "Too many open files" in record.getMessage()
    principal.refusal()
    assert principal.may_receive("device/d2/telemetry/t")


@pytest.mark.skipif(sys.platform == "win32", reason="a file has no time of change there")
@pytest.mark.usefixtures("at_once")
def test_a_change_that_hides_its_time_and_size_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "organisations.toml"
    file.write_text('acme = ["d1"]\n')
    principal = Access(rules=PLATFORM.rules, organisations_file=file).principal(
        "token:1", organisation="acme"
    )
    before, stamp = file.stat(), file_stamp(file)
    while file_stamp(file) == stamp:  # the clock of the file system is coarse
        with file.open("r+b") as opened:
            opened.write(b'acme = ["d2"]\n')
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    principal.refusal()
    assert principal.may_receive("device/d2/telemetry/t")
    assert not principal.may_receive("device/d1/telemetry/t")


@pytest.mark.usefixtures("at_once")
def test_who_is_away_has_no_more_than_is_in_the_file_now(tmp_path: Path) -> None:
    """Nobody asks whether it may stay; a will of it may be due."""
    file = tmp_path / "organisations.toml"
    file.write_text('acme = ["d1"]\n')
    principal = Access(rules=PLATFORM.rules, organisations_file=file).principal(
        "token:1", organisation="acme"
    )
    assert principal.may_publish("device/d1/commands")
    file.write_text('other = ["d1"]\n')
    assert not principal.may_publish("device/d1/commands")
    assert not principal.may_subscribe("device/d1/telemetry/#")


def test_the_file_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "organisations.toml"
    file.write_text('acme = ["d1"]\n')
    access = Access(rules=PLATFORM.rules, organisations_file=file)
    now = [100.0]
    monkeypatch.setattr("tesaiot_connect.access.time.monotonic", lambda: now[0])
    principal = access.principal("token:1", organisation="acme")
    file.write_text('acme = ["d1", "d2"]\n')
    principal.refusal()
    assert not principal.may_publish("device/d2/commands")
    now[0] += 1.0
    principal.refusal()
    assert principal.may_publish("device/d2/commands")


@pytest.mark.parametrize(
    ("text", "said"), [(None, "No such file"), ("acme = [", "damaged"), ("acme = 1", "list of names")]
)
@pytest.mark.usefixtures("at_once")
def test_a_file_that_never_was_right_lets_nobody_in(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "organisations.toml"
    if text is not None:
        file.write_text(text)
    access = Access(rules=PLATFORM.rules, organisations_file=file)
    with pytest.raises(ConnectorError, match=said) as told:
        access.check()
    assert told.value.fix
    with pytest.raises(Refused, match="does not know its organisations") as refused:
        access.principal("d1")
    assert refused.value.reason_code == R.SERVER_UNAVAILABLE
    assert not refused.value.permanent
    file.write_text("acme = []")
    assert access.principal("d1").may_publish("devices/d1/x")


def test_names_of_devices_are_checked() -> None:
    with pytest.raises(ValueError, match="no name of a topic level"):
        Access(organisations={"acme": ["a/b"]})


# --- several authenticators ---------------------------------------------------------------


@attrs.frozen
class Sort:
    """Takes the users of one kind."""

    begins: str
    wrong: str = ""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        name = credentials.username or ""
        if not name.startswith(self.begins):
            raise NotApplicable(f"the username does not begin with {self.begins!r}", fix=f"use {self.begins}")
        if name == self.wrong:
            raise Refused("wrong", reason_code=R.BAD_USER_NAME_OR_PASSWORD, permanent=True)
        return Anybody(f"{self.begins}:{name}")


@attrs.frozen
class Riddle:
    """Enhanced authentication by its own method."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        if credentials.method != "riddle":
            raise NotApplicable("there is no riddle")
        return Question(b"?")


@attrs.define
class Question:
    data: bytes

    async def respond(self, data: bytes, /) -> Challenge | Principal:
        return Anybody("riddler")


def ask(first: FirstOf, **credentials: Any) -> Any:
    return asyncio.run(first.begin(Peer("here", "none"), Credentials(**credentials)))


def test_the_first_that_applies_decides() -> None:
    first = FirstOf((Sort("t", wrong="to"), Riddle(), Sort("u"), Sort("")))
    assert ask(first, username="tu").name == "t:tu"
    assert ask(first, username="ut").name == "u:ut"
    assert ask(first, username="x").name == ":x"
    assert ask(first, method="riddle").data == b"?"
    with pytest.raises(Refused, match="wrong") as error:  # the last one would have taken it
        ask(first, username="to")
    assert not isinstance(error.value, NotApplicable)


def test_when_none_applies_all_say_why() -> None:
    first = FirstOf((Sort("t"), Sort("u")))
    with pytest.raises(Refused) as error:
        ask(first, username="x")
    assert not isinstance(error.value, NotApplicable)
    assert "begin with 't'; the username does not begin with 'u'" in error.value.what
    assert error.value.fix == "use t or use u"
    assert (error.value.reason_code, error.value.permanent) == (0x86, True)
    with pytest.raises(Refused) as error:
        ask(first, method="kerberos")
    assert error.value.reason_code == R.BAD_AUTHENTICATION_METHOD
    with pytest.raises(ValueError, match="authenticators"):
        FirstOf(())


def test_the_account_shows_what_it_may() -> None:
    shown: Callable[[Account], str] = repr
    assert "{device}" in shown(TOKEN)
