"""quic_nng where its library is not, or is another one: a clear line, and the next endpoint is taken."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nng_stub
import pytest
from nng_peers import ServingBroker, broker

from tesaiot_connect import Duration, NegotiationOptions, Negotiator, TlsOptions, Unsupported, Url
from tesaiot_connect.testing import Network
from tesaiot_connect_quic_nng import QuicNng, supervisor

pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")

TOOL = Path(sys.executable).with_name("tesaiot-connect")
UNVERIFIED = TlsOptions(verify="none", insecure=True)
URL = Url.parse("quic://127.0.0.1")
LONG = Duration(60.0)
PATIENT = 'connect_timeout = "60s", ack_timeout = "60s"'


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library but the one that a test names, and time to find that out."""
    monkeypatch.setattr(supervisor, "PROBE", 60.0)
    monkeypatch.setenv("TESAIOT_NNG_LIBRARY", str(tmp_path / "libnng.so"))
    monkeypatch.delenv("TESAIOT_MSQUIC_LIBRARY", raising=False)


@pytest.fixture(scope="module")
def serving() -> Iterator[ServingBroker]:
    with broker() as one:
        yield one


def refusal(**options: Any) -> Unsupported:
    with pytest.raises(Unsupported) as caught:
        asyncio.run(QuicNng(URL, tls=UNVERIFIED, connect_timeout=LONG, **options).connect())
    return caught.value


# --- what is said -----------------------------------------------------------------------------


def test_no_library_is_named_with_the_place_and_the_variable(tmp_path: Path) -> None:
    told = refusal()
    assert told.what.startswith("quic://127.0.0.1:14567: ")
    assert str(tmp_path / "libnng.so") in told.what
    assert "TESAIOT_NNG_LIBRARY" in told.fix
    missing = QuicNng.missing()
    assert isinstance(missing, Unsupported)
    assert str(tmp_path / "libnng.so") in missing.what


def test_plain_nng_is_called_that() -> None:
    told = refusal(library=nng_stub.plain())
    assert "is plain NNG, without MQTT over QUIC" in told.what
    assert "TESAIOT_NNG_LIBRARY" in told.fix


def test_a_symbol_that_is_missing_is_named() -> None:
    symbol = "nng_mqtt_quic_ack_callback_set"
    told = refusal(library=nng_stub.without(symbol), msquic=nng_stub.libraries()[1])
    assert f"lacks {symbol}" in told.what


def test_what_is_no_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "libnng.so").write_text("a text")
    assert "cannot be loaded from" in refusal().what


def test_no_msquic_is_named(tmp_path: Path) -> None:
    library = nng_stub.installed(tmp_path)
    told = refusal(library=library, msquic=tmp_path / "libother.so")
    assert str(tmp_path / "libother.so") in told.what
    assert "TESAIOT_MSQUIC_LIBRARY" in told.fix


def test_nothing_is_missing_where_it_is_installed(tmp_path: Path) -> None:
    nng_stub.installed(tmp_path)
    assert QuicNng.missing() is None


# --- what happens then ------------------------------------------------------------------------


def test_the_next_endpoint_is_taken() -> None:
    """And it counts against nobody: what is not there is looked for again each time."""

    async def run() -> None:
        network = Network()
        async with network.transport("pair://broker").listen(_serve) as url:
            options = NegotiationOptions(memory=False)
            left_out = QuicNng(URL, tls=UNVERIFIED, connect_timeout=LONG)
            negotiator = Negotiator([left_out, network.transport(url)], options)
            for _ in range(2):
                dialed = await negotiator.dial()
                reasons = {one.endpoint: one.reason for one in dialed.attempts if one.outcome == "left out"}
                assert dialed.place == 1
                assert "libnng.so" in reasons["quic://127.0.0.1"]
                await dialed.connection.aclose()

    asyncio.run(run())


async def _serve(connection: Any) -> None:
    await connection.wait_closed()


def command(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, **more
    )
    assert "Traceback" not in done.stderr
    return done


def pipeline(folder: Path, endpoints: list[str]) -> Path:
    file = folder / "pipeline.toml"
    file.write_text(f"""
[connections.platform]
client_id = "absence"
endpoints = [{", ".join(endpoints)}]
tls = {{ verify = "none", insecure = true }}

[sources.made]
type = "generator"
count = 100
rate = 1000.0
[sinks.broker]
type = "mqtt"
connection = "platform"
[pipelines.p]
from = "made"
to = ["broker"]
""")
    return file


def nng(port: int = 14567) -> str:
    return f'{{ url = "quic://127.0.0.1:{port}", via = "quic_nng", {PATIENT} }}'


def test_a_pipeline_runs_over_the_next_endpoint(serving: ServingBroker, tmp_path: Path) -> None:
    file = pipeline(tmp_path, [nng(), f'"mqtt://127.0.0.1:{serving.port}"'])
    assert command("lint", file).returncode == 0
    checked = command("check", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "by tcp_tls" in checked.stdout
    assert f"quic://127.0.0.1:14567 left out: NanoSDK cannot be loaded from {tmp_path}" in checked.stdout
    assert "TESAIOT_NNG_LIBRARY" in checked.stdout
    done = command("run", file, "--once")
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_knows_what_cannot_be_had(tmp_path: Path) -> None:
    named = '{ url = "quic://h", via = "quic_nng", tls = { verify = "full" } }'
    done = command("lint", pipeline(tmp_path, [named]))
    assert done.returncode == 78
    assert "quic_nng cannot do what verify_hostname = true asks for" in done.stdout + done.stderr
    done = command("lint", pipeline(tmp_path, [named, '"mqtt://127.0.0.1:1"']))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quic://h is left out: quic_nng cannot do" in done.stdout + done.stderr


def test_a_pipeline_with_nothing_else_says_what_to_install(tmp_path: Path) -> None:
    checked = command("check", pipeline(tmp_path, [nng()]))
    assert checked.returncode == 69
    assert str(tmp_path / "libnng.so") in checked.stdout
    assert "TESAIOT_NNG_LIBRARY" in checked.stdout


def test_a_pipeline_runs_over_it_where_it_is_installed(serving: ServingBroker, tmp_path: Path) -> None:
    nng_stub.installed(tmp_path)
    file = pipeline(tmp_path, [nng(serving.port)])
    checked = command("check", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "by quic_nng, MQTT 3.1.1" in checked.stdout
    observer = serving.observer("#")
    try:
        done = command("run", file, "--once")
        assert done.returncode == 0, done.stdout + done.stderr
        observer.until(lambda: len(observer.messages) >= 100)
        assert len({one.payload for one in observer.messages}) == 100
    finally:
        observer.sock.close()


def test_commands_list_what_is_missing() -> None:
    rows = json.loads(patient("plugins", "--json"))["implementations"]
    (row,) = [one for one in rows if one["name"] == "quic_nng"]
    assert (row["rank"], row["races"], row["schemes"]) == (50, False, ["quic"])
    assert row["cannot"] == list(QuicNng.cannot)
    assert "libnng.so" in row["missing"]["what"]
    assert "TESAIOT_NNG_LIBRARY" in row["missing"]["fix"]
    ranks = {one["name"]: one["rank"] for one in rows if "quic" in one["schemes"]}
    assert max(ranks, key=lambda name: ranks[name]) == "quic_aioquic"


def patient(*arguments: str) -> str:
    """What a command prints that lets a plugin take its time for its answer."""
    code = """
import sys
from tesaiot_connect import plugins
from tesaiot_connect.cli import main
from tesaiot_connect_quic_nng import supervisor
plugins._PATIENCE = supervisor.PROBE = 60.0
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_mistakes_in_its_table_have_a_line(tmp_path: Path) -> None:
    wrong = '{ url = "quic://127.0.0.1", via = "quic_nng", window = 64, tls = { verify = "full" } }'
    done = command("lint", pipeline(tmp_path, [wrong]))
    assert done.returncode == 78
    assert "window must be from 1 to 32" in done.stdout + done.stderr
    waived = '{ url = "quic://h", via = "quic_nng", verify_hostname = false, tls = { verify = "full" } }'
    done = command("lint", pipeline(tmp_path, [waived]))
    assert done.returncode == 78
    assert "verify_hostname = false needs `ca_file`" in done.stdout + done.stderr
