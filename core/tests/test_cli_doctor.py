"""`doctor`, the command: what it takes, and what it prints for people."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from tesaiot_connect.cli import execute, findings
from tesaiot_connect.diagnosis import Diagnosis, Finding, Step, StepName
from tesaiot_connect.diagnosis.certificate import Certificate
from tesaiot_connect.diagnosis.findings import NONE, NOT_REACHED, OK, STEPS, Accepted, Problem, Verdict
from tesaiot_connect.dialing import Attempt
from tesaiot_connect.negotiation import Outlook


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--topic", "a/#", "mqtt://h"],
        ["--topic", "", "mqtt://h"],
        ["--timeout", "soon", "mqtt://h"],
        ["--timeout", "0s", "mqtt://h"],
        ["--timeout", "11m", "mqtt://h"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["doctor", *arguments]) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize("target", ["gopher://h", "mqtt://", "broker.example:8883"])
def test_a_wrong_url(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["doctor", target]) == 78
    assert capsys.readouterr().err


def test_a_file_without_connections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.toml"
    file.write_text("")
    assert execute(["doctor", str(file)]) == 0
    assert "no connections" in capsys.readouterr().out
    assert execute(["doctor", str(file), "-c", "platform"]) == 78
    assert "there is no connection 'platform'" in capsys.readouterr().err
    assert execute(["doctor", str(tmp_path / "none.toml")]) == 78


LONG = "wss://a-rather-long-name-of-a-broker.of-a-platform.example:8085/mqtt?with=a&query=too"


def example() -> Diagnosis:
    """Four endpoints: one fine, one that fails, one that is slow to be renewed, one that is left out."""
    steps: dict[StepName, Step] = dict.fromkeys(STEPS, Step("ok", 0.0123))
    fine = Finding(
        "quic://broker.example:14567", "quic", "broker.example", "broker.example", 0,
        {**steps, "reach": OK, "upgrade": NONE, "throughput": Step("ok", 2.0, rate=3_456_000.0)},
        addresses=("192.0.2.7", "2001:db8::7"), transport="quic_aioquic", address="192.0.2.7:14567",
        verified=True, alpn="mqtt", resumed=True, early_accepted=True,
        certificate=Certificate("00" * 32, "CN=b", "CN=An authority,O=x", ("broker.example",), 0.0, 4e9),
        accepted=Accepted("5", "c", False, {"receive_maximum": 20, "retain_available": False}),
    )  # fmt: skip
    what = "nothing came back to 9 datagrams within 5 s, and that is a long sentence which has to be folded"
    failed = attrs.evolve(
        fine,
        url=LONG,
        scheme="wss",
        place=1,
        steps={
            **dict.fromkeys(STEPS, NOT_REACHED),
            "name": OK,
            "reach": Step("failed", what=what, fix="mend it"),
        },
        certificate=None,
        accepted=None,
        verified=False,
        problem=Problem("reach", what, cause="UDP is blocked", fix="mend it"),
    )
    soon = attrs.evolve(
        fine,
        url="mqtts://broker.example:8883",
        place=2,
        certificate=attrs.evolve(fine.certificate, not_after=1.0),  # type: ignore[type-var]
        steps={**fine.steps, "echo": Step("not allowed", what="the broker refuses", fix="use --topic")},
    )
    last = attrs.evolve(
        fine,
        url="mqtt://broker.example:1883",
        place=3,
        verified=False,
        certificate=None,
        cannot=("check the host name of a server which has one that is as long as this one", "fly"),
    )
    outlook = tuple(Outlook(place, place, 0.2) for place in range(4))
    left_out = (
        Attempt("ws://broker.example", "left out", reason="its plugin is missing", fix="pip install it"),
    )
    verdict = Verdict(0, ("it is the first in order of preference, and works",))
    return Diagnosis("platform", (fine, failed, soon, last), outlook, left_out, verdict)


def test_80_columns_are_enough(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    findings.show([example()])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80, text
    assert "\x1b" not in text, "colours, and no terminal"
    flat = " ".join(text.split())
    for words in (
        "platform",
        "uses now quic://broker.example:14567 it is the first in order of preference, and works.",
        "likely UDP is blocked.",
        "fix Mend it.",
        "echo 3 mqtts://broker.example:8883 The broker refuses. fix Use --topic.",
        "certificate 3 mqtts://broker.example:8883 It ends in 0 days.",
        "left out ws://broker.example Its plugin is missing.",
        "cannot 4 mqtt://broker.example:1883 check the host name of a server which has one",
        "as long as this one fly left out",
        "12 ms, 0-RTT",
        "12 ms, MQTT 5",
        "receive maximum 20",
        "retain available no",
        "3.46 MB/s",
        "verified: broker.example",
        "from An authority",
    ):
        assert words in flat, words
    assert re.search(r"^reach +ok +failed +ok$", text, re.MULTILINE)


def test_lines_stay_whole_where_nobody_limits_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    findings.show([example(), example()])
    text = capsys.readouterr().out
    assert f"1 quic://broker.example:14567  2 {LONG}  3 mqtts://broker.example:8883\n" in text
    assert "which has to be folded.\n" in text
    assert text.count("platform\n") == 2
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_a_word_for_a_url_that_lacks_its_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["doctor", "broker.example:8883"]) == 78
    assert "Write a URL, such as mqtts://broker.example:8883" in capsys.readouterr().err


def test_one_problem_of_several_endpoints_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names itself at the beginning, which does not count."""
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = example()
    fine, failed, soon, last = shown.findings

    def like(found: Finding) -> Finding:
        what = f"{found.url}: the server's certificate is odd"
        return attrs.evolve(found, problem=Problem("secure", what, fix="mend it"))

    findings.show([attrs.evolve(shown, findings=(fine, like(failed), soon, like(last)), left_out=())])
    text = capsys.readouterr().out
    assert f"failed       2 {LONG}\n             4 mqtt://broker.example:1883\n" in text
    assert text.count("The server's certificate is odd.") == 1


def test_who_was_not_verified_is_told_where_there_was_a_connection(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = example()
    fine, failed, soon, last = shown.findings
    anybody = attrs.evolve(fine, verified=False, certificate=None, tls_version="TLSv1.2")
    nobody = attrs.evolve(failed, transport="", steps={**failed.steps, "reach": OK, "secure": OK})
    findings.show([attrs.evolve(shown, findings=(anybody, nobody, soon, last))])
    lines = capsys.readouterr().out.splitlines()
    server, _ = [line for line in lines if line.startswith("server")]
    assert re.fullmatch(r"server +not verified +- +verified: broker.example", server)
    handshake, _ = [line for line in lines if line.startswith("handshake")]
    assert "TLS 1.2" in handshake


def test_a_long_url_does_not_fill_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = example()
    long = "wss://broker.example/" + "p" * 300 + "/the-end"
    fine = attrs.evolve(shown.findings[0], url=long)
    findings.show([attrs.evolve(shown, findings=(fine, *shown.findings[1:]))])
    table, _, sentences = capsys.readouterr().out.partition("uses now")
    assert table.count("p" * 5) < 20
    assert long in "".join(sentences.split())


def test_what_a_broker_says_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = example()
    bad = Step("not allowed", what="the broker says \x1b[2J\r\n" + "x" * 70_000, fix="mend it")
    first = attrs.evolve(shown.findings[0], steps={**shown.findings[0].steps, "echo": bad})
    findings.show([attrs.evolve(shown, findings=(first, *shown.findings[1:]))])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "The broker says  [2J" in text
    assert text.count("x") < 3000
