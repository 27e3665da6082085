"""What findings mean together, without I/O: who would win, what is behind a failure, and the document."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from stairs import two_listeners

from tesaiot_connect.client import ClientOptions, MqttConnection, WillOptions
from tesaiot_connect.diagnosis import (
    Diagnosis,
    Finding,
    Plan,
    Step,
    StepName,
    certificate,
    diagnose,
    document,
)
from tesaiot_connect.diagnosis.causes import Surroundings, explain
from tesaiot_connect.diagnosis.endpoint import quiet
from tesaiot_connect.diagnosis.findings import NONE, NOT_REACHED, OK, STEPS, WAY, Accepted, Problem, Verdict
from tesaiot_connect.diagnosis.verdict import forecast, judge
from tesaiot_connect.errors import Unsupported
from tesaiot_connect.negotiation import Negotiator, Outlook
from tesaiot_connect.negotiation.race import Lane
from tesaiot_connect.protocols import Connection, Transport, Url
from tesaiot_connect.testing import Certificates

NOW = 1_800_000_000.0
HERE = Surroundings(now=NOW, installed=NOW - 86400 * 100)


def finding(
    place: int,
    url: str,
    *,
    fails: StepName | None = None,
    what: str = "it fails",
    fix: str = "mend it",
    seconds: float = 0.05,
    code: int | None = None,
    verified: bool | None = None,
) -> Finding:
    scheme, _, rest = url.partition("://")
    steps: dict[StepName, Step] = dict.fromkeys(STEPS, OK)
    steps["throughput"] = NONE
    problem = None
    if fails is not None:
        problem = Problem(fails, what, fix=fix, reason_code=code)
        after = WAY[WAY.index(fails) + 1 :]
        steps |= {fails: Step("failed", what=what, fix=fix), **dict.fromkeys(after, NOT_REACHED)}
    if verified is None:
        verified = steps["secure"].outcome == "ok" and scheme in ("quic", "mqtts", "wss")
    host = rest.partition("/")[0].partition(":")[0]
    return Finding(url, scheme, host, host, place, steps, seconds, problem=problem, verified=verified)


def outlook(findings: Sequence[Finding], *penalised: int, head_start: float = 0.2) -> list[Outlook]:
    order = sorted(range(len(findings)), key=lambda place: place in penalised)
    return [
        Outlook(
            place,
            turn,
            head_start,
            penalty_until=NOW + 240 if place in penalised else 0.0,
            reason="it failed before" if place in penalised else "",
        )
        for turn, place in enumerate(order)
    ]


QUIC, TLS, WSS = "quic://h:14567", "mqtts://h:8883", "wss://h/mqtt"


# --- which one --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_starts", "ends", "winner"),
    [
        ([0.2], [(0.1, True)], 0),
        ([0.2], [(0.1, False)], None),
        ([0.2, 0.2], [(0.1, True), (0.01, True)], 0),
        ([0.2, 0.2], [(0.3, True), (0.05, True)], 1),
        ([0.2, 0.2], [(0.3, True), (0.15, True)], 0),
        ([0.2, 0.2], [(0.01, False), (5.0, True)], 1),
        ([0.2, 0.2, 0.2], [(9.0, False), (9.0, False), (0.1, True)], 2),
        ([0.2, 0.2], [(9.0, False), (8.0, False)], None),
        ([0.0, 0.0], [(0.2, True), (0.1, True)], 1),
    ],
)
def test_who_wins(head_starts: list[float], ends: list[tuple[float, bool]], winner: int | None) -> None:
    assert forecast([Lane(one) for one in head_starts], ends) == winner


def test_one_that_runs_alone_has_all_its_time() -> None:
    assert forecast([Lane(0.1, alone=True), Lane(0.1)], [(5.0, True), (0.01, True)]) == 0
    assert forecast([Lane(0.1, alone=True), Lane(0.1)], [(5.0, False), (0.01, True)]) == 1


@pytest.mark.parametrize(
    ("findings", "penalised", "place", "why"),
    [
        ([finding(0, TLS)], (), 0, "it is the only endpoint, and works"),
        ([finding(0, QUIC), finding(1, TLS)], (), 0, "it is the first in order of preference, and works"),
        ([finding(0, QUIC, fails="reach"), finding(1, TLS)], (), 1, f"{QUIC} is preferred, but fails"),
        (
            [finding(0, QUIC), finding(1, TLS)],
            (0,),
            1,
            f"{QUIC} is preferred, but not tried first for another 4 min: it failed before",
        ),
        (
            [finding(0, QUIC, seconds=2.5), finding(1, TLS)],
            (),
            1,
            (
                f"{QUIC} is preferred, but takes 2.50 s, longer than its head start of 0.20 s: "
                f"{TLS} is there first"
            ),
        ),
        ([finding(0, QUIC, fails="reach")], (), None, "no endpoint can be used"),
        ([finding(0, TLS, fails="mqtt")], (), None, "no endpoint can be used"),
        (
            [finding(0, QUIC, fails="mqtt"), finding(1, TLS)],
            (),
            1,
            f"{QUIC} is there first, but its broker does not answer CONNECT: then others go before it",
        ),
        (
            [finding(0, QUIC, fails="mqtt", code=0x86), finding(1, TLS)],
            (),
            None,
            f"{QUIC} is there first, and its broker refuses: no other one is asked then",
        ),
    ],
)
def test_the_verdict(
    findings: list[Finding], penalised: tuple[int, ...], place: int | None, why: str
) -> None:
    assert judge(findings, outlook(findings, *penalised), NOW) == Verdict(place, (why,))


# --- causes -----------------------------------------------------------------------------------


def cause(findings: list[Finding], around: Surroundings = HERE, place: int = 0) -> tuple[str, str]:
    problem = explain(findings, around)[place].problem
    assert problem is not None
    return problem.cause, problem.fix


SILENT = {"fails": "reach", "what": "nothing came back to 9 datagrams within 5 s"}
EXPIRED = {"fails": "secure", "what": "the server's certificate has expired", "verified": False}
FOREIGN = {
    "fails": "secure",
    "what": "the certificate is not from a trusted authority (x)",
    "verified": False,
}


def test_udp_is_suspected_where_tcp_works() -> None:
    blocked: Finding = finding(0, QUIC, **SILENT)  # type: ignore[arg-type]
    told, fix = cause([blocked, finding(1, TLS)])
    assert told.startswith(f"UDP port 14567 is blocked on the way, or nothing listens there: {TLS}")
    assert TLS in fix
    assert cause([blocked]) == ("", "mend it")
    assert cause([blocked, finding(1, "mqtts://elsewhere:8883")]) == ("", "mend it")
    assert cause([blocked, finding(1, TLS, fails="reach")]) == ("", "mend it")
    mute = finding(1, TLS, fails="secure", what="it gave no connection within 5 s")
    told, fix = cause([blocked, mute])
    assert told.startswith(f"not UDP alone: {TLS} takes the connection, and then nothing comes back")
    assert fix.startswith("look at the broker")
    expired: Finding = finding(1, TLS, **EXPIRED)  # type: ignore[arg-type]
    told, fix = cause([blocked, expired])
    assert told.startswith("UDP port 14567 is blocked")
    assert "until then" not in fix, "nothing goes over an endpoint that fails"
    assert f"until then connections go over {WSS}" in cause([blocked, expired, finding(2, WSS)])[1]
    refused = finding(0, QUIC, fails="reach", what="nothing listens on that UDP port")
    assert cause([refused, finding(1, TLS)]) == ("", "mend it")


def test_the_clock_is_wrong_where_the_program_is_younger() -> None:
    expired: Finding = finding(0, TLS, **EXPIRED)  # type: ignore[arg-type]
    told, fix = cause([expired, finding(1, QUIC)], Surroundings(now=0.0, installed=NOW))
    assert (
        told
        == "this machine's clock is wrong: it says 1970-01-01, and this program was installed on 2027-01-15"
    )
    assert fix.startswith("set the clock")
    assert cause([expired])[0] == "this machine's clock says 2027-01-15"
    assert cause([expired, finding(1, QUIC)])[0].startswith("the clock is right")


def test_a_proxy_is_suspected_where_there_is_one() -> None:
    around = Surroundings(NOW, NOW - 86400, proxies=("https",))
    foreign: Finding = finding(0, WSS, **FOREIGN)  # type: ignore[arg-type]
    assert cause([foreign, finding(1, TLS)], around)[0].endswith("(the environment names a proxy)")
    silent = finding(0, WSS, fails="upgrade")
    assert "proxy" in cause([silent, finding(1, TLS)], around)[0]
    assert cause([silent, finding(1, TLS)]) == ("", "mend it")
    dead = finding(0, WSS, fails="reach", what="the proxy http://p:1 cannot be reached", fix="check it")
    told, fix = cause([dead], around)
    assert told == "the environment names that proxy (HTTPS_PROXY), or the endpoint does"
    assert 'proxy = "none"' in fix
    assert cause([dead, finding(1, TLS)], around)[0].endswith(f"{TLS} reaches the same host without it")
    assert cause([dead]) == ("", "check it")
    nothing = finding(0, WSS, fails="upgrade", what="there is nothing at this path (404)")
    assert cause([nothing, finding(1, TLS)], around) == ("", "mend it")


def test_an_own_client_id_may_be_what_is_refused() -> None:
    assert "a client id of its own" in cause([finding(0, TLS, fails="mqtt", code=0x85)])[0]
    assert cause([finding(0, TLS, fails="mqtt", code=0x97)]) == ("", "mend it")


@pytest.mark.parametrize(
    ("url", "step", "what", "told", "fix"),
    [
        ("mqtt://h", "mqtt", "h:1883: the peer closed the connection, before CONNACK", "TLS", "mqtts://"),
        ("ws://h/mqtt", "upgrade", "the connection ended during the upgrade to WebSocket", "TLS", "wss://"),
        ("mqtt://h", "mqtt", "h: packet type 1 with the reserved flags 5, before CONNACK", "TLS", "mqtts://"),
        ("mqtts://h", "mqtt", "h: packet type 4 with the reserved flags 8, before CONNACK", "HTTP", "wss://"),
        ("mqtts://h", "mqtt", "h:8883: the peer closed the connection, before CONNACK", "", "mend it"),
    ],
)
def test_another_protocol_is_suspected(url: str, step: StepName, what: str, told: str, fix: str) -> None:
    found, mending = cause([finding(0, url, fails=step, what=what)])
    assert (told in found) if told else not found
    assert fix in mending


def test_what_stands_already_is_not_said_again() -> None:
    one = finding(0, "mqtts://h/x")
    assert one.bare("mqtts://h:8883/x: the server left") == "the server left"
    for whole in (
        "the proxy of mqtts://h: it left",
        "mqtts://h gave nothing: it left",
        "it left",
        "h: it left",
    ):
        assert one.bare(whole) == whole


# --- what it is made of -----------------------------------------------------------------------


def test_a_guest_disturbs_nobody() -> None:
    options = ClientOptions(
        client_id="dash", will=WillOptions(topic="w"), streams="per-topic", early_publish=True
    )
    one, two = quiet(options, None), quiet(options, 3.0)
    assert one.client_id.startswith("dash-doctor-")
    assert one.client_id != two.client_id, "two at a time would throw each other out"
    assert (one.clean_session, one.session_expiry, one.will, one.early_publish) == (True, 0, None, False)
    assert (one.streams, one.connect_timeout, two.connect_timeout) == ("single", 10.0, 3.0)
    assert quiet(ClientOptions(), None).client_id == ""
    assert Plan().topic != Plan().topic


def test_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = Certificates(tmp_path).server("broker.example", "192.0.2.7")
    made = x509.load_pem_x509_certificate(tls.certificate.read_bytes())
    der = made.public_bytes(Encoding.DER)
    read = certificate.read(der)
    assert read.names == ("broker.example", "192.0.2.7")
    assert read.issuer == made.issuer.rfc4514_string()
    left = read.days_left(time.time())
    assert left is not None and 29 < left < 30.1
    assert read.sha256 == hashlib.sha256(der).hexdigest()
    alone = certificate.Certificate(hashlib.sha256(b"no certificate").hexdigest())
    assert certificate.read(b"no certificate") == alone
    assert alone.days_left(0.0) is None

    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "cryptography":
            raise ImportError(name)
        return importing(name, *rest)

    authority = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    assert read.chain == ()
    both = Certificates(tmp_path / "other").ca_file.read_bytes() + (tmp_path / "ca.pem").read_bytes()
    assert certificate.read(der, both).chain == (authority.subject.rfc4514_string(),)
    assert certificate.read(der, b"-----BEGIN CERTIFICATE-----\nx").chain == ()

    monkeypatch.setattr(builtins, "__import__", without)
    assert certificate.read(der) == certificate.Certificate(read.sha256)


def test_the_document_has_stable_names() -> None:
    findings = explain([finding(0, QUIC, **SILENT), finding(1, TLS)], HERE)  # type: ignore[arg-type]
    known = outlook(findings)
    found = Diagnosis("c", tuple(findings), tuple(known), (), judge(findings, known, NOW))
    made = msgspec.json.decode(msgspec.json.encode(document([found])))
    assert list(made) == ["usable", "connections"]
    (connection,) = made["connections"]
    assert list(connection) == ["name", "usable", "uses", "why", "endpoints", "left_out"]
    assert connection["uses"] == TLS
    for endpoint in connection["endpoints"]:
        assert list(endpoint) == [
            "url",
            "usable",
            "transport",
            "addresses",
            "address",
            "steps",
            "verified",
            "server_name",
            "alpn",
            "tls_version",
            "certificate",
            "quic",
            "resumed",
            "early_data_accepted",
            "mqtt",
            "memory",
            "problem",
        ]
        assert list(endpoint["steps"]) == list(STEPS)
        assert {"outcome", "ms"} <= endpoint["steps"]["name"].keys()
        assert list(endpoint["memory"]) == ["turn", "penalty_until", "reason", "succeeded", "handshake_ms"]
    assert list(connection["endpoints"][0]["problem"]) == [
        "step",
        "what",
        "cause",
        "fix",
        "reason_code",
        "left_out",
    ]
    assert Accepted("5", "c", session_present=False).limits == {}
    limited = [attrs.evolve(findings[0], cannot=("fly",)), findings[1]]
    found = Diagnosis("c", tuple(limited), tuple(known), (), judge(limited, known, NOW))
    endpoints = document([found])["connections"][0]["endpoints"]
    assert [one.get("cannot") for one in endpoints] == [["fly"], None]


class Shown:
    """A connection whose peer has shown a certificate, as far as it says."""

    def __init__(self, inner: Connection) -> None:
        self._inner = inner
        self.peer = attrs.evolve(inner.peer, secure=True, certificate=b"not DER")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@attrs.frozen
class Secured:
    """A transport in memory that says of itself what a test wants."""

    inner: Transport
    url: Url
    verify_hostname: bool = True
    cannot: Any = ("fly",)
    schemes: ClassVar[Mapping[str, int]] = {"pair": 1}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True
    secure: ClassVar[bool] = True

    async def connect(self, **options: Any) -> Connection:
        return Shown(await self.inner.connect(**options))  # type: ignore[return-value] # it has all of it


def test_what_a_transport_says_of_itself_is_found() -> None:
    async def main() -> list[Finding]:
        async with two_listeners() as (_, one, other):
            endpoints = [
                Secured(one, Url("pair", "a")),
                Secured(other, Url("pair", "b"), verify_hostname=False, cannot="a text is no phrases"),
                other,
            ]
            connection = MqttConnection("c", Negotiator(endpoints))
            return list((await diagnose({"c": connection}, Plan()))[0].findings)

    found = asyncio.run(main())
    assert [one.usable for one in found] == [True, True, True]
    assert [one.verified for one in found] == [True, False, False]
    assert [one.cannot for one in found] == [("fly",), None, None]


async def _diagnosed() -> None:
    class Own:
        async def connect(self, **_: Any) -> Any:
            raise NotImplementedError

    await diagnose({"own": MqttConnection("own", Own())}, Plan())


def test_a_dialer_of_ones_own_has_no_endpoints() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(_diagnosed())
    assert caught.group_contains(Unsupported, match="own has a dialer of its own")
