"""Policies: what each level asks for, that it holds, and what lint says of files without one."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from installed import EntryPoint

from tesaiot_connect import hookspecs, plugins
from tesaiot_connect.cli import execute
from tesaiot_connect.config import load
from tesaiot_connect.config.security import SecurityOptions, is_loopback, judge, raised
from tesaiot_connect.config.serving import load_server
from tesaiot_connect.errors import ConfigError, ConnectFailed
from tesaiot_connect.plugins import Catalog
from tesaiot_connect.protocols import Connection, Handler, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect.tls import ServerTls, TlsOptions

# --- a catalog, so that nothing depends on what is installed --------------------------------


@attrs.frozen
class Tls:
    schemes: ClassVar[Mapping[str, int]] = {"mqtt": 1883, "mqtts": 8883, "wss": 443, "ws": 80, "quic": 14567}
    rank: ClassVar[int] = 1
    races: ClassVar[bool] = True

    url: Url
    tls: TlsOptions = attrs.field(factory=TlsOptions)
    server_tls: ServerTls | None = None
    hosts: tuple[str, ...] = ()
    verify_hostname: bool = True

    @property
    def secure(self) -> bool:
        return self.url.scheme in ("mqtts", "wss", "quic")

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError

    def listen(self, handler: Handler, /) -> AbstractAsyncContextManager[str]:
        raise NotImplementedError


@attrs.frozen
class Socket:
    """A local transport: says nothing of encryption."""

    schemes: ClassVar[Mapping[str, int]] = {"unix": 0}
    rank: ClassVar[int] = 1
    races: ClassVar[bool] = True

    url: Url

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError


@attrs.frozen
class Vouching:
    """A transport that says it is secure, and has no TLS table."""

    schemes: ClassVar[Mapping[str, int]] = {"tunnel": 0}
    rank: ClassVar[int] = 1
    races: ClassVar[bool] = True

    url: Url
    secure: ClassVar[bool] = True

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError


class Fake:
    @staticmethod
    @hookspecs.hookimpl
    def tesaiot_transports() -> dict[str, Any]:
        return {"tls": Tls, "local": Socket, "vouching": Vouching}


CATALOG: Catalog = plugins.load([EntryPoint(Fake)])  # type: ignore[list-item]

REST = """
[sources.in]
type = "mqtt"
connection = "platform"
subscribe = ["a/#"]
[sinks.out]
type = "null"
[pipelines.main]
from = "in"
to = ["out"]
"""


def pipeline(tmp_path: Path, connection: str, policy: str = "") -> Path:
    file = tmp_path / "pipeline.toml"
    security = f'[security]\npolicy = "{policy}"\n' if policy else "\n\n"
    file.write_text(f"{security}[connections.platform]\n{connection}\n{REST}")
    return file


def problems(file: Path, environ: Mapping[str, str] | None = None) -> list[str]:
    """Key, message and fix of each; [] where the file is right."""
    try:
        load(file, environ=environ or {}, catalog=CATALOG)
    except ConfigError as error:
        return [f"{one.line} {one.key}: {one.message}. {one.fix}" for one in error.problems]
    return []


# --- connections ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("connection", "level"),
    [
        ('endpoints = ["mqtt://h"]', 0),
        ('endpoints = ["ws://h"]', 0),
        ('endpoints = ["unix:///run/mqtt.sock"]', 0),
        ('endpoints = ["ws://h", "mqtt://h"]', 0),
        ('endpoints = ["mqtts://h"]\ntls = { verify = "none", insecure = true }', 0),
        ('endpoints = ["quic://h"]\ntls = { verify = "none", insecure = true }', 0),
        ('endpoints = [{ url = "mqtts://h", tls = { verify = "none", insecure = true } }]', 0),
        ('endpoints = [{ url = "quic://h", verify_hostname = false }]', 0),
        ('endpoints = [{ url = "quic://h", verify_hostname = true }]', 2),
        ('endpoints = ["mqtts://h"]\ntls = { minimum_version = "1.2" }', 1),
        ('endpoints = [{ url = "wss://h", tls = { minimum_version = "1.2" } }]', 1),
        ('endpoints = ["tunnel://h"]', 1),
        ('endpoints = ["mqtts://h", "wss://h", "quic://h"]', 2),
        ('endpoints = ["mqtts://h"]\ntls = { server_name = "x" }', 2),
        ('endpoints = ["mqtts://h"]\ntls = { minimum_version = "1.3" }', 2),
        ('endpoints = ["quic://h"]\ntls = { minimum_version = "1.2" }', 2),
    ],
)
def test_levels(connection: str, level: int, tmp_path: Path) -> None:
    """`level` is the highest that the connection meets."""
    assert not problems(pipeline(tmp_path, connection))
    for number, policy in enumerate(("ncsa-1", "ncsa-2"), 1):
        found = problems(pipeline(tmp_path, connection, policy))
        assert bool(found) == (number > level), (policy, found)
        assert all(f'which the policy "{policy}" forbids' in one for one in found)


def test_a_policy_raises_what_is_not_set(tmp_path: Path) -> None:
    connection = 'endpoints = ["mqtts://h", { url = "wss://h", tls = { server_name = "x" } }]'
    for policy, expected in (("", "1.2"), ("ncsa-1", "1.2"), ("ncsa-2", "1.3")):
        config = load(pipeline(tmp_path, connection, policy), environ={}, catalog=CATALOG)
        dialed: tuple[Any, ...] = config.connections["platform"].dialer.endpoints  # type: ignore[attr-defined]
        assert [one.tls.minimum_version for one in dialed] == [expected, expected]
        for one in dialed:
            version = one.tls.client_context().minimum_version
            assert version is (ssl.TLSVersion.TLSv1_3 if expected == "1.3" else ssl.TLSVersion.TLSv1_2)


def test_what_the_policy_forbids_is_left_out_where_another_endpoint_keeps_it(tmp_path: Path) -> None:
    connection = 'endpoints = [\n  "mqtt://h:1",\n  "mqtts://h:2",\n  "ws://h:3",\n]'
    config = load(pipeline(tmp_path, connection, "ncsa-1"), environ={}, catalog=CATALOG)
    dialer: Any = config.connections["platform"].dialer
    assert [str(one.url) for one in dialer.endpoints] == ["mqtts://h:2"]
    assert [(one.endpoint, one.outcome, one.fix) for one in dialer.left_out] == [
        ("mqtt://h:1", "left out", "Use mqtts://"),
        ("ws://h:3", "left out", "Use wss://"),
    ]
    assert dialer.left_out[0].reason == 'mqtt:// is not encrypted, which the policy "ncsa-1" forbids'
    first, second = (one for one in config.warnings if "is left out" in one.message)
    assert (first.line, first.key) == (5, "connections.platform.endpoints[0]")
    assert first.message == f"mqtt://h:1 is left out: {dialer.left_out[0].reason}"
    assert (second.line, second.key) == (7, "connections.platform.endpoints[2]")
    assert not [one for one in config.findings if one.level == 1], "what is left out falls short of nothing"
    # what is wrong with another endpoint is the error then, and only that
    wrong = connection.replace("mqtts://h:2", "mqtss://h:2")
    (problem,) = problems(pipeline(tmp_path, wrong, "ncsa-1"))
    assert "mqtss" in problem


def test_violations_have_their_line_key_and_fix(tmp_path: Path) -> None:
    connection = 'endpoints = [\n  "mqtts://h",\n  "mqtt://h",\n]\ntls = { minimum_version = "1.2" }'
    assert problems(pipeline(tmp_path, connection, "ncsa-2")) == [
        (
            "6 connections.platform.endpoints[1]: mqtt:// is not encrypted, which the policy "
            '"ncsa-2" forbids. Use mqtts://'
        ),
        (
            "8 connections.platform.tls.minimum_version: TLS 1.2 is accepted, which the policy "
            '"ncsa-2" forbids. Set tls.minimum_version = "1.3"'
        ),
    ]
    (only,) = problems(
        pipeline(tmp_path, 'endpoints = ["mqtts://h"]\ntls = { verify = "none", insecure = true }', "ncsa-1")
    )
    assert only.startswith("5 connections.platform.tls.verify: the server is not verified")
    (only,) = problems(
        pipeline(tmp_path, 'endpoints = [{ url = "mqtts://h", verify_hostname = false }]', "ncsa-1")
    )
    assert only == (
        "4 connections.platform.endpoints[0]: the server's name is not verified, which the policy "
        '"ncsa-1" forbids. Use a transport that checks the name, without `verify_hostname`'
    )


def test_a_variable_or_override_is_judged_by_its_value(tmp_path: Path) -> None:
    file = pipeline(tmp_path, 'endpoints = ["${BROKER}"]', "ncsa-1")
    assert not problems(file, {"BROKER": "mqtts://h"})
    assert "is not encrypted" in problems(file, {"BROKER": "mqtt://h"})[0]
    with pytest.raises(ConfigError, match=r"--set: security\.policy: expected one of"):
        load(file, overrides=["security.policy=ncsa-3"], environ={"BROKER": "mqtts://h"}, catalog=CATALOG)
    good = pipeline(tmp_path, 'endpoints = ["mqtt://h"]')
    with pytest.raises(ConfigError, match="mqtt:// is not encrypted"):
        load(good, overrides=["security.policy=ncsa-1"], environ={}, catalog=CATALOG)


def test_a_bundle_is_judged_too(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    config = tmp_path / "b" / "mqtt-quic-config.json"
    config.write_text(
        '{"host": "h", "transport": "tcp",\n"tls": {\n"version": "1.2"},\n"auth": {"method": "none"}}'
    )
    with pytest.raises(ConfigError) as caught:
        load(pipeline(tmp_path, 'bundle = "b"', "ncsa-2"), environ={}, catalog=CATALOG)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.key) == (str(config), 3, "tls.version")
    beside = 'bundle = "b"\ntls = { minimum_version = "1.3" }'
    assert not problems(pipeline(tmp_path, beside, "ncsa-2"))


def test_what_a_bundle_falls_short_of_is_mended_in_the_bundle(tmp_path: Path) -> None:
    config = tmp_path / "mqtt-quic-config.json"
    file = tmp_path / "f.toml"
    file.write_text(
        '[security]\npolicy = "ncsa-2"\n[connections.c]\nbundle = "."\ntls = { insecure = true }\n'
    )
    told = set()
    for tls in ({"verify_server": False}, {"version": "1.2"}, {"enabled": False}):
        host = {"host": "h", "transport": "tcp", "auth": {"method": "none"}}
        config.write_text(json.dumps({**host, "tls": {"version": "1.3", **tls}}))
        with pytest.raises(ConfigError) as caught:
            load(file, environ={}, need_pipelines=False)
        (problem,) = caught.value.problems
        assert problem.file == str(config)
        told.add((problem.key, problem.fix.partition(" into ")[0]))
    assert told == {
        ("tls.verify_server", "Write true"),
        ("tls.version", 'Write "1.3"'),
        ("host", 'Write "tls": { "enabled": true }'),
    }


def test_wrong_tables(tmp_path: Path) -> None:
    (one,) = problems(pipeline(tmp_path, 'endpoints = ["mqtts://h"]', "ncsa1"))
    assert "Did you mean 'ncsa-1'?" in one
    file = tmp_path / "pipeline.toml"
    file.write_text(
        '[security]\npolice = "ncsa-1"\n[connections.platform]\nendpoints = ["mqtts://h"]\n' + REST
    )
    assert "Did you mean 'policy'?" in problems(file)[0]


def test_recipes_alone() -> None:
    plain = raised(Tls(Url("mqtt", "h")), {}, 2)
    assert [one.level for one in judge(plain, listener=False)] == [1]
    assert [one.level for one in judge(Vouching(Url("tunnel", "h")), listener=False)] == [2]
    assert SecurityOptions().level == 0
    hosts = ["127.0.0.1", "::1", "localhost", "127.8.8.8", "0.0.0.0", "::", "10.0.0.1", "broker.example"]
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4


# --- listeners --------------------------------------------------------------------------------


def served(tmp_path: Path, listener: str, policy: str, certificates: Certificates, more: str = "") -> Path:
    own = certificates.server()
    tls = f'certificate = "{own.certificate}", key = "{own.key}"{more}'
    file = tmp_path / "broker.toml"
    security = f'[security]\npolicy = "{policy}"\n' if policy else ""
    file.write_text(f"{security}[listeners.one]\n{listener}\n".replace("TLS", f"server_tls = {{ {tls} }}"))
    return file


@pytest.mark.parametrize(
    ("listener", "more", "level"),
    [
        ('scheme = "mqtt"', "", 0),
        ('url = "ws://127.0.0.1"', "", 0),
        ('scheme = "mqtts"\nTLS', ', minimum_version = "1.2"', 1),
        ('scheme = "mqtts"\nTLS', "", 2),
        ('scheme = "wss"\nTLS', ', minimum_version = "1.3"', 2),
        ('scheme = "quic"\nTLS', ', minimum_version = "1.2"', 2),
    ],
)
def test_listeners(listener: str, more: str, level: int, tmp_path: Path, certificates: Certificates) -> None:
    for number, policy in enumerate(("ncsa-1", "ncsa-2"), 1):
        file = served(tmp_path, listener, policy, certificates, more)
        try:
            config = load_server(file, environ={}, catalog=CATALOG)
        except ConfigError as error:
            (problem,) = error.problems
            assert number > level
            assert problem.key.startswith("listeners.one.")
            assert problem.fix
        else:
            assert number <= level
            recipe: Any = config.listeners[0].transport
            if policy == "ncsa-2" and recipe.url.scheme != "quic":
                assert recipe.server_tls.server_context().minimum_version is ssl.TLSVersion.TLSv1_3
    assert load_server(served(tmp_path, listener, "", certificates, more), environ={}, catalog=CATALOG)


def test_who_lets_everybody_in_is_warned_of(tmp_path: Path, certificates: Certificates) -> None:
    def warnings(listener: str, policy: str = "ncsa-1") -> list[str]:
        file = served(tmp_path, f'scheme = "mqtts"\n{listener}\nTLS', policy, certificates)
        found = load_server(file, environ={}, catalog=CATALOG).warnings
        return [f"{one.line} {one.key}: {one.message}" for one in found]

    told = ["3 listeners.one: lets everybody in who reaches it"]
    assert warnings('host = "0.0.0.0"') == told
    assert warnings('host = "localhost"') == warnings('host = "0.0.0.0"', "") == []
    assert warnings('hosts = ["10.0.0.1"]') == told


def test_a_server_below_the_policy_is_not_connected_to(tmp_path: Path, certificates: Certificates) -> None:
    """What the policy says holds for the handshake, not for the file alone."""
    pytest.importorskip("tesaiot_connect_tcp_tls", reason="dials")
    own = certificates.server("127.0.0.1")
    context = own.server_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    async def main() -> None:
        async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            connection = (
                f'endpoints = ["mqtts://127.0.0.1:{port}"]\ntls = {{ ca_file = "{certificates.ca_file}" }}'
            )
            loose = load(pipeline(tmp_path, connection, "ncsa-1"), environ={})
            made = await loose.connections["platform"].dialer.connect()
            await made.aclose()
            strict = load(pipeline(tmp_path, connection, "ncsa-2"), environ={})
            with pytest.raises(ConnectFailed, match="minimum_version"):
                await strict.connections["platform"].dialer.connect()

    asyncio.run(main())


# --- lint's report ----------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tesaiot_connect.plugins.metadata.entry_points", lambda group: [EntryPoint(Fake)])


def lint(file: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> list[str]:
    assert execute(["lint", str(file)]) == code
    return capsys.readouterr().out.replace(str(file), file.name).splitlines()


@pytest.mark.usefixtures("installed")
def test_lint_reports_the_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pipeline(tmp_path, 'endpoints = ["quic://h", "mqtts://h"]')
    assert lint(file, capsys) == [
        "pipeline.toml: right, 1 pipeline",
        "pipeline.toml: meets ncsa-1; ncsa-2 is not met:",
        (
            "  pipeline.toml:4: connections.platform.endpoints[1]: TLS 1.2 is accepted. "
            'Set tls.minimum_version = "1.3"'
        ),
    ]
    file = pipeline(tmp_path, 'endpoints = ["quic://h", "mqtt://h"]')
    assert lint(file, capsys)[1:] == [
        "pipeline.toml: ncsa-1 and ncsa-2 are not met:",
        "  pipeline.toml:4: connections.platform.endpoints[1]: mqtt:// is not encrypted. Use mqtts://",
    ]
    file = pipeline(tmp_path, 'endpoints = ["quic://h", "mqtts://h"]', "ncsa-2")
    assert lint(file, capsys)[1:] == ["pipeline.toml: meets ncsa-1 and ncsa-2"]
    file = pipeline(tmp_path, 'endpoints = ["quic://h", "mqtt://h"]', "ncsa-1")
    warning, right, meets = lint(file, capsys)
    assert warning == (
        "warning: pipeline.toml:4: connections.platform.endpoints[1]: mqtt://h is left out: "
        'mqtt:// is not encrypted, which the policy "ncsa-1" forbids. Use mqtts://'
    )
    assert [right, meets] == ["pipeline.toml: right, 1 pipeline", "pipeline.toml: meets ncsa-1 and ncsa-2"]
    file = pipeline(tmp_path, 'endpoints = ["ws://h", "mqtt://h"]', "ncsa-1")
    assert lint(file, capsys, 78) == []


@pytest.mark.usefixtures("installed")
def test_lint_reports_the_levels_of_a_serve_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], certificates: Certificates
) -> None:
    file = served(tmp_path, 'scheme = "mqtts"\nTLS', "ncsa-1", certificates)
    assert lint(file, capsys) == [
        "broker.toml: right, 1 listener",
        "broker.toml: meets ncsa-1; ncsa-2 is not met:",
        (
            "  broker.toml:5: listeners.one.server_tls: TLS 1.2 is accepted. "
            'Set server_tls.minimum_version = "1.3"'
        ),
    ]
    file = served(tmp_path, 'scheme = "mqtts"\nhost = "0.0.0.0"\nTLS', "ncsa-2", certificates)
    assert lint(file, capsys) == [
        (
            "warning: broker.toml:3: listeners.one: lets everybody in who reaches it. "
            'Add auth = { type = "password", file = "users" }, or listen on 127.0.0.1'
        ),
        "broker.toml: right, 1 listener",
        "broker.toml: meets ncsa-1 and ncsa-2",
    ]


@pytest.mark.usefixtures("installed")
def test_lint_of_a_file_without_connections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(
        '[sources.in]\ntype = "generator"\n[sinks.out]\ntype = "null"\n'
        '[pipelines.main]\nfrom = "in"\nto = ["out"]\n'
    )
    assert lint(file, capsys) == ["pipeline.toml: right, 1 pipeline"]


def test_lint_finds_client_certificates_on_a_quic_listener(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], certificates: Certificates
) -> None:
    pytest.importorskip("tesaiot_connect_quic_aioquic", reason="its recipe is asked")
    more = f', ca_file = "{certificates.ca_file}", client_certificate = "optional"'
    file = served(tmp_path, 'scheme = "quic"\nTLS', "", certificates, more)
    assert execute(["lint", str(file)]) == 78
    told = capsys.readouterr().err
    assert "broker.toml:3: listeners.one.server_tls: a QUIC listener takes no client certificates" in told
    assert "mqtts://" in told


PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "security.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
@pytest.mark.usefixtures("installed")
def test_the_files_of_the_page_are_right(
    block: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], certificates: Certificates
) -> None:
    own = certificates.server()
    (tmp_path / "server.pem").write_bytes(own.certificate.read_bytes())
    (tmp_path / "server.key").write_bytes(own.key.read_bytes())
    file = tmp_path / "file.toml"
    file.write_text(BLOCKS[block])
    assert lint(file, capsys)[-1] == "file.toml: meets ncsa-1 and ncsa-2"
