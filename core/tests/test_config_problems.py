"""Wrong configurations: each gives one clear message with its place, exit code 78, no traceback."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import attrs
import pytest
from installed import EntryPoint

from tesaiot_connect import hookspecs, plugins
from tesaiot_connect.cli import execute
from tesaiot_connect.config import load
from tesaiot_connect.errors import ConfigError, ConnectorError
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import Connection, Duration, Secret, Url
from tesaiot_connect.tls import TlsOptions


@attrs.frozen
class Tcp:
    """A transport that is never dialed."""

    schemes: ClassVar[Mapping[str, int]] = {"mqtt": 1883, "mqtts": 8883}
    rank: ClassVar[int] = 1
    races: ClassVar[bool] = True

    url: Url
    tls: TlsOptions = attrs.field(factory=TlsOptions)
    nodelay: bool = True
    linger: Duration | None = None

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError


@attrs.frozen
class Plain:
    """A transport that has no TLS options."""

    schemes: ClassVar[Mapping[str, int]] = {"plain": 0}
    rank: ClassVar[int] = 1
    races: ClassVar[bool] = True

    url: Url

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError


@attrs.frozen
class Token:
    """An auth with a secret."""

    token: Secret

    async def begin(self) -> Any: ...
    async def identity(self) -> None: ...


class Fake:
    """A plugin as an object."""

    @staticmethod
    @hookspecs.hookimpl
    def tesaiot_transports() -> dict[str, Any]:
        return {"tcp_tls": Tcp, "plain": Plain}

    @staticmethod
    @hookspecs.hookimpl
    def tesaiot_auths() -> dict[str, Any]:
        return {"token": Token}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [EntryPoint(Fake)])
    monkeypatch.delenv("NOT_SET", raising=False)


GOOD = """\
[connections.platform]
client_id = "dashboard-1"
endpoints = ["mqtts://broker.example:8883"]
auth = { type = "token", token = "tesa_secret_value" }

[sources.telemetry]
type = "mqtt"
connection = "platform"
subscribe = ["device/+/telemetry/#"]
topic_fields = "device/{device_id}/telemetry/{sensor_type}"

[sources.simulated]
type = "generator"

[sinks.archive]
type = "sqlite"
path = "telemetry.db"

[sinks.log]
type = "jsonl"
path = "telemetry.jsonl"

[pipelines.archive]
from = "telemetry"
to = ["archive"]

[pipelines.raw]
from = "simulated"
to = ["log"]
"""


def change(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def add(table: str, line: str) -> str:
    return change(f"[{table}]\n", f"[{table}]\n{line}\n")


LINE = {table: GOOD[: GOOD.index(f"[{table}]")].count("\n") + 1 for table in
        ("connections.platform", "sources.telemetry", "sources.simulated", "sinks.archive", "sinks.log",
         "pipelines.archive", "pipelines.raw")}  # fmt: skip

# name: (text, what the one line of output holds)
WRONG: dict[str, tuple[str, list[str]]] = {
    "typo in a key": (
        change("client_id =", "client_idd ="),
        [":2: connections.platform.client_idd: unknown key", "'client_id'"],
    ),
    "typo in a type": (
        change('type = "sqlite"', 'type = "sqlit"'),
        ["sinks.archive.type: there is no sink 'sqlit'", "'sqlite'"],
    ),
    "string is a number": (
        change('client_id = "dashboard-1"', "client_id = 3"),
        [":2: connections.platform.client_id: expected a string, got 3", 'quotes: "3"'],
    ),
    "number is a string": (
        add("connections.platform", 'receive_maximum = "20"'),
        [":2: connections.platform.receive_maximum: expected a whole number", "without quotes: 20"],
    ),
    "number is a bool": (
        add("connections.platform", "receive_maximum = true"),
        ["receive_maximum: expected a whole number, got true"],
    ),
    "number is a float": (
        add("connections.platform", "receive_maximum = 1.5"),
        ["receive_maximum: expected a whole number, got 1.5"],
    ),
    "bool is a string": (
        add("connections.platform", 'clean_session = "true"'),
        ["clean_session: expected true or false", "without quotes: true"],
    ),
    "bool is a number": (
        add("connections.platform", "clean_session = 1"),
        ["clean_session: expected true or false, got 1"],
    ),
    "list is a string": (
        change('["device/+/telemetry/#"]', '"device/+/telemetry/#"'),
        ["sources.telemetry.subscribe: expected an array", 'Write ["device/+/telemetry/#"]'],
    ),
    "element of a list": (
        change('["device/+/telemetry/#"]', '["device/+/telemetry/#", 7]'),
        ["sources.telemetry.subscribe[1]: expected a string, got 7"],
    ),
    "not a choice": (
        add("connections.platform", 'protocol = "3.1.2"'),
        ["protocol: expected one of", "'3.1.1'"],
    ),
    "choice in quotes": (
        add("sources.telemetry", 'qos = "1"'),
        ["qos: expected one of 0, 1, 2", "without quotes: 1"],
    ),
    "choice is a bool": (
        add("sources.telemetry", "qos = true"),
        ["qos: expected one of 0, 1, 2; got true"],
    ),
    "table is a string": (
        add("connections.platform", 'tls = "ca.pem"'),
        ["connections.platform.tls: expected a table", "ca_file"],
    ),
    "typo in an inherited table": (
        add("connections.platform", 'tls = { ca_fil = "ca.pem" }'),
        [":2: connections.platform.tls.ca_fil: unknown key", "'ca_file'"],
    ),
    "table that nobody takes": (
        change("mqtts://broker.example:8883", "plain://broker.example").replace(
            "[sources.telemetry]", 'tls = { ca_file = "ca.pem" }\n[sources.telemetry]'
        ),
        [":6: connections.platform.tls: no endpoint of this connection has TLS options"],
    ),
    "out of range": (
        add("connections.platform", "receive_maximum = 70000"),
        ["connections.platform.receive_maximum"],
    ),
    "rule between keys": (
        add("connections.platform", 'tls = { verify = "none" }'),
        ["connections.platform.tls", "insecure"],
    ),
    "duration without a unit": (
        add("connections.platform", "keepalive = 60"),
        ["keepalive: expected a duration with a unit, got 60", 'Write "60s"'],
    ),
    "bad unit": (
        add("connections.platform", 'keepalive = "60 fortnights"'),
        ["keepalive: a duration has no unit 'fortnights'", "ms, s, m, h, d"],
    ),
    "unit of the wrong case": (
        add("connections.platform", 'maximum_packet_size = "10mb"'),
        ["maximum_packet_size: a size has no unit 'mb'", 'Write "10MB"'],
    ),
    "bad URL": (
        change("mqtts://broker.example:8883", "broker.example:8883"),
        [":3: connections.platform.endpoints[0]", "scheme://host:port"],
    ),
    "bad port": (
        change("mqtts://broker.example:8883", "mqtts://broker.example:99999"),
        ["connections.platform.endpoints[0]", "is not a URL", "ort"],
    ),
    "credentials in a URL": (
        change("mqtts://broker.example:8883", "mqtts://me:hunter2@broker.example"),
        ["endpoints[0]", "must not hold credentials", "auth"],
    ),
    "plugin not installed": (
        change("mqtts://broker.example:8883", "mqtt-quic://broker.example"),
        ["endpoints[0]: no installed transport serves quic://", "pip install tesaiot-connect-quic-aioquic"],
    ),
    "unknown scheme": (
        change("mqtts://broker.example:8883", "mqttz://broker.example"),
        ["endpoints[0]: no installed transport serves mqttz://", "Did you mean"],
    ),
    "unknown transport": (
        change('"mqtts://broker.example:8883"', '{ url = "mqtts://broker.example", via = "tcp" }'),
        ["endpoints[0].via: transport 'tcp' does not serve mqtts://", "tcp_tls"],
    ),
    "transport not installed": (
        change('"mqtts://broker.example:8883"', '{ url = "mqtts://broker.example", via = "quic_nng" }'),
        ["endpoints[0].via: transport 'quic_nng' is not installed", "pip install tesaiot-connect-quic-nng"],
    ),
    "transport and scheme not installed": (
        change('"mqtts://broker.example:8883"', '{ url = "quic://broker.example", via = "quic_nng" }'),
        ["no installed transport serves quic://", "pip install tesaiot-connect-quic-nng"],
    ),
    "option of a transport": (
        change('"mqtts://broker.example:8883"', '{ url = "mqtts://broker.example", nodely = true }'),
        ["endpoints[0].nodely: unknown key", "'nodelay'"],
    ),
    "no endpoints": (
        change('endpoints = ["mqtts://broker.example:8883"]\n', ""),
        [":1: connections.platform: the key `endpoints` is missing"],
    ),
    "endpoints is a string": (
        change('["mqtts://broker.example:8883"]', '"mqtts://broker.example:8883"'),
        [":3: connections.platform.endpoints", 'Write endpoints = ["mqtts://broker.example:8883"]'],
    ),
    "secret of the wrong type": (
        change('token = "tesa_secret_value"', "token = 987654321"),
        [":4: connections.platform.auth.token: expected a string"],
    ),
    "auth not installed": (
        change('"token", token = "tesa_secret_value"', '"mtls"'),
        ["auth.type: there is no auth 'mtls'", "pip install tesaiot-connect-auth-mtls"],
    ),
    "unset variable": (
        change("dashboard-1", "${NOT_SET}"),
        [":2: connections.platform.client_id: the environment variable NOT_SET is not set"],
    ),
    "unset variable with a message": (
        change("tesa_secret_value", "${NOT_SET:?ask the operator}"),
        ["auth.token: the environment variable NOT_SET is not set: ask the operator"],
    ),
    "not a variable": (
        change("dashboard-1", "${NOT SET}"),
        ["client_id: '${NOT SET}' is not a variable", "$$"],
    ),
    "missing key": (
        change('path = "telemetry.db"\n', ""),
        [f":{LINE['sinks.archive']}: sinks.archive: the key `path` is missing"],
    ),
    "missing type": (
        change('type = "generator"\n', ""),
        [f":{LINE['sources.simulated']}: sources.simulated: the key `type` is missing", "generator"],
    ),
    "unknown table": (
        GOOD + "[pipeline.x]\n",
        [f":{GOOD.count(chr(10)) + 1}: pipeline: unknown table", "'pipelines'"],
    ),
    "table of another command": (
        GOOD + "[listeners.tcp]\nport = 1883\n",
        ["listeners: unknown table", "`serve`"],
    ),
    "unknown connection": (
        change('connection = "platform"', 'connection = "platfrm"'),
        ["sources.telemetry.connection: there is no connection 'platfrm'", "'platform'"],
    ),
    "unknown source": (
        change('from = "telemetry"', 'from = "telemetri"'),
        ["pipelines.archive.from: there is no source 'telemetri'", "'telemetry'"],
    ),
    "unknown sink": (
        change('to = ["archive"]', 'to = ["arhive"]'),
        ["pipelines.archive.to[0]: there is no sink 'arhive'", "'archive'"],
    ),
    "no sink": (change('to = ["archive"]', "to = []"), ["pipelines.archive.to: no sink is named"]),
    "sink named twice": (
        change('to = ["archive"]', 'to = ["archive", "archive"]'),
        ["pipelines.archive.to[1]: 'archive' is named twice"],
    ),
    "duplicate name": (
        GOOD + '[sinks.archive]\ntype = "null"\n',
        [f":{GOOD.count(chr(10)) + 1}: not valid TOML", "archive"],
    ),
    "bad TOML": (change('from = "telemetry"', "from = telemetry"), ["not valid TOML", "Strings take quotes"]),
    "end in a string": (GOOD + '[x]\ny = """never ends', ["not valid TOML"]),
    "no pipelines": ("", ["there is no pipeline"]),
    "dead letter without a sink": (
        add("pipelines.archive", 'on_error = "dead_letter"'),
        ["pipelines.archive.on_error: the key `dead_letter` is missing"],
    ),
    "dead letter to its own sink": (
        add("pipelines.archive", 'on_error = "dead_letter"\ndead_letter = "archive"'),
        ["pipelines.archive.dead_letter: 'archive' is a sink of this pipeline too"],
    ),
    "dead letter that is not used": (
        add("pipelines.archive", 'dead_letter = "log"'),
        ["pipelines.archive.dead_letter: is not used", 'on_error = "dead_letter"'],
    ),
    "not a process": (
        add("pipelines.archive", 'process = "steps.clean"'),
        ["pipelines.archive.process: 'steps.clean' is not a function", "module:function"],
    ),
    "process without a module": (
        add("pipelines.archive", 'process = "no_such_steps:clean"'),
        ["pipelines.archive.process: there is no module 'no_such_steps'", "no_such_steps.py"],
    ),
    "bad topic fields": (
        change("{sensor_type}", "x{sensor_type}"),
        ["sources.telemetry.topic_fields", "a whole level"],
    ),
    "bad filter": (change("telemetry/#", "#/telemetry"), ["sources.telemetry.subscribe", "#"]),
    "unknown serializer": (
        add("sources.telemetry", 'serializer = "jsn"'),
        ["sources.telemetry.serializer: there is no serializer 'jsn'", "'json'"],
    ),
    "pipeline into itself": (
        GOOD + '[sinks.back]\ntype = "mqtt"\nconnection = "platform"\n'
        '[pipelines.loop]\nfrom = "telemetry"\nto = ["back"]\n',
        ["pipelines.loop.to[0]: what it writes comes back to it (loop -> loop)"],
    ),
    "circle of pipelines": (
        GOOD + '[sources.other]\ntype = "mqtt"\nconnection = "platform"\nsubscribe = ["copy/#"]\n'
        '[sinks.copy]\ntype = "mqtt"\nconnection = "platform"\ntopic = "copy/x"\n'
        '[sinks.back]\ntype = "mqtt"\nconnection = "platform"\ntopic = "device/1/telemetry/2"\n'
        '[pipelines.there]\nfrom = "telemetry"\nto = ["copy"]\n'
        '[pipelines.back]\nfrom = "other"\nto = ["back"]\n',
        ["what it writes comes back to it (there -> back -> there)"],
    ),
}  # fmt: skip


def lint(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str]]:
    file = tmp_path / "pipeline.toml"
    file.write_text(text)
    code = execute(["lint", str(file), *more])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return code, captured.err.splitlines()


def test_the_good_one_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(tmp_path, GOOD, capsys) == (0, [])


@pytest.mark.parametrize("name", WRONG)
def test_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = WRONG[name]
    code, lines = lint(tmp_path, text, capsys)
    assert code == 78
    assert len(lines) == 1, lines
    for part in expected:
        assert part in lines[0]
    for secret in ("tesa_secret_value", "987654321"):
        assert secret not in lines[0]


@pytest.mark.parametrize("name", ["typo in a key", "bad TOML", "pipeline into itself"])
@pytest.mark.parametrize("verb", ["run", "check"])
def test_other_commands_say_the_same(
    name: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = lint(tmp_path, WRONG[name][0], capsys)
    assert execute([verb, str(tmp_path / "pipeline.toml")]) == code == 78
    assert capsys.readouterr().err.splitlines() == lines


def test_all_at_once_in_the_order_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        GOOD.replace("client_id =", "client_idd =")
        .replace('"dashboard-1"', '"${NOT_SET}"')
        .replace('type = "generator"', 'type = "genrator"')
        .replace("telemetry.db", "${NOT_SET}.db")
        .replace('from = "simulated"', 'frm = "simulated"')
    )
    code, lines = lint(tmp_path, text, capsys)
    assert code == 78
    keys = [line.split(": ")[1] for line in lines[:-1]]
    assert keys == [
        "connections.platform.client_idd",
        "connections.platform.client_idd",
        "sources.simulated.type",
        "sinks.archive.path",
        "pipelines.raw",
        "pipelines.raw.frm",
    ]
    assert lines[-1] == "6 problems"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sinks.archive.pth=x", "--set: sinks.archive.pth: unknown key. Did you mean 'path'?"),
        ("sinks.archive", "--set: sinks.archive: is not an assignment"),
        ("sinks..archive=1", "--set: sinks..archive: is not an assignment"),
        ("connections.platform.keepalive=60", "--set: connections.platform.keepalive: "),
        ("connections.platform.endpoints.3=x", "--set: connections.platform.endpoints.3: "),
        ("connections.platform.client_id.x=1", "connections.platform.client_id is not a table"),
        ("pipelines.raw.to=log", "--set: pipelines.raw.to: expected an array"),
        ('sinks.archive={type="sqlit"}', "--set: sinks.archive.type: there is no sink 'sqlit'"),
        ("pipeline.raw.from=x", "--set: pipeline: unknown table. Did you mean 'pipelines'?"),
    ],
)
def test_bad_overrides(
    override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = lint(tmp_path, GOOD, capsys, "--set", override)
    assert code == 78
    assert len(lines) == 1, lines
    assert expected in lines[0]


STEPS: dict[str, tuple[str, str]] = {
    "no such function": ("def clean(records): return records", "has no 'claen'"),
    "not callable": ("claen = 3", "is not a function"),
    "takes nothing": ("def claen(): return []", "cannot be called with a batch"),
    "raises": ("raise RuntimeError('no licence')", "cannot be imported: RuntimeError: no licence"),
    "exits": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "syntax": ("def claen(:", "cannot be imported: SyntaxError"),
    "needs another": ("import no_such_library", "Install no_such_library"),
}


@pytest.mark.parametrize("name", STEPS)
def test_bad_steps(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, expected = STEPS[name]
    module = f"steps_{name.replace(' ', '_')}"
    (tmp_path / f"{module}.py").write_text(source)
    text = add("pipelines.archive", f'process = "{module}:claen"')
    code, lines = lint(tmp_path, text, capsys)
    assert code == 78
    assert len(lines) == 1, lines
    assert "pipelines.archive.process: " in lines[0]
    assert expected in lines[0]


def test_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.toml")
    for verb in ("run", "lint", "check", "serve"):
        assert execute([verb, missing]) == 78
        assert capsys.readouterr().err.startswith(f"{missing}: cannot be read: No such file")
    file = tmp_path / "pipeline.toml"
    file.write_text(GOOD)
    assert execute(["lint", str(file), "--env-file", missing]) == 78
    assert capsys.readouterr().err.startswith(f"{missing}: cannot be read: No such file")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert execute(["lint", str(tmp_path / "binary.toml")]) == 78
    assert "is not a text in UTF-8" in capsys.readouterr().err


Serve = Callable[[str], tuple[int, list[str]]]


@pytest.fixture
def serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Serve:
    def run(text: str) -> tuple[int, list[str]]:
        file = tmp_path / "broker.toml"
        file.write_text(text)
        code = execute(["lint", str(file)])
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[broker]\n", "there is no listener"),
        ("[listeners.tcp]\nprt = 1\n", ":2: listeners.tcp.prt: unknown key. Did you mean 'port'?"),
        ("[listeners.tcp]\nport = 70000\n", ":2: listeners.tcp.port"),
        ("[listeners.tcp]\nport = 1\n", "Tcp has no server half"),
        ('[listeners.tcp]\nscheme = "quic"\n', ":2: listeners.tcp.scheme: no installed transport"),
        ('[listeners.tcp]\nurl = "mqtt://h"\nport = 1\n', ":3: listeners.tcp.port: stands in `url`"),
        ("[listeners.tcp]\ntls = {}\n", "Write server_tls"),
        ("[broker]\nmax_conections = 1\n[listeners.tcp]\nprt = 1\n", "broker.max_conections: unknown key"),
        ('[listeners.tcp]\nauth = { type = "x" }\n', "tcp.auth.type: there is no authenticator 'x'"),
    ],
)
def test_wrong_server_files(serve: Serve, text: str, expected: str) -> None:
    code, lines = serve(text)
    assert code == 78
    assert any(expected in line for line in lines), lines


def test_an_endpoint_without_its_plugin_is_left_out_where_another_remains(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(
        change("mqtts://broker.example:8883", 'quic://broker.example", "mqtts://broker.example:8883')
    )
    config = load(file)
    [connection] = config.connections.values()
    assert isinstance(connection.dialer, Negotiator)
    assert [str(one.url) for one in connection.dialer.endpoints] == ["mqtts://broker.example:8883"]  # type: ignore[attr-defined]
    [left_out] = [one for one in config.warnings if "left out" in one.message]
    assert "pip install tesaiot-connect-quic-aioquic" in left_out.fix
    assert left_out.key.endswith("endpoints[0]")


class Unfit:
    """A plugin whose transport does not keep its contract."""

    @staticmethod
    @hookspecs.hookimpl
    def tesaiot_transports() -> dict[str, Any]:
        return {"boat": Token}


@pytest.mark.parametrize(
    ("endpoint", "plugin", "package", "told"),
    [
        (
            '"ferry://h"',
            "ferry",
            "ferry-plugin",
            "Broken plugins (see `tesaiot-connect plugins`): ferry-plugin",
        ),
        ('"quic://h"', "quic_aioquic", "tesaiot-connect-quic-aioquic", "cannot be imported: ImportError"),
        ('{ url = "mqtts://h", via = "ferry" }', "ferry", "ferry-plugin", "transport 'ferry' does not serve"),
        ('{ url = "mqtts://h", via = "boat" }', "harbour", "harbour-plugin", "Token lacks connect"),
        (
            '{ url = "mqtts://h", via = "quic_nng" }',
            "other",
            "other-plugin",
            "transport 'quic_nng' is not installed. Install it: pip install tesaiot-connect-quic-nng",
        ),
    ],
)
def test_an_endpoint_whose_plugin_is_broken_is_left_out_where_another_remains(
    tmp_path: Path, endpoint: str, plugin: str, package: str, told: str
) -> None:
    class Point:
        name, value, group = plugin, "module", hookspecs.GROUP
        dist = SimpleNamespace(name=package, version="1.2")

        def load(self) -> Any:
            if plugin == "harbour":
                return Unfit
            raise ImportError("no library")

    catalog = plugins.load([EntryPoint(Fake), Point()])  # type: ignore[list-item]
    file, good = tmp_path / "pipeline.toml", '"mqtts://broker.example:8883"'
    file.write_text(change(good, f"{endpoint}, {good}"))
    config = load(file, catalog=catalog)
    [connection] = config.connections.values()
    assert isinstance(connection.dialer, Negotiator)
    assert len(connection.dialer.endpoints) == 1
    [left_out] = connection.dialer.left_out
    assert told in f"{left_out.reason}. {left_out.fix}"
    assert [one.message for one in config.warnings if "left out" in one.message] == [
        f"{left_out.endpoint} is left out: {left_out.reason}"
    ]
    file.write_text(change(good, endpoint))
    with pytest.raises(ConfigError, match=re.escape(left_out.reason)):
        load(file, catalog=catalog)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (ConnectorError("it cannot swim", fix="use a boat"), "it cannot swim"),
        (RuntimeError("no idea"), "Careful.refusal() failed: RuntimeError: no idea"),
        ("never", "Careful.refusal() returned str, not a ConnectorError or None"),
        (ConnectorError("it cannot swim", fix=None), "whose `what` or `fix` is no text"),  # type: ignore[arg-type]
    ],
    ids=["refuses", "raises", "text", "no_fix"],
)
def test_an_endpoint_that_its_transport_refuses_is_left_out_however_it_says_so(
    tmp_path: Path, reply: Any, told: str
) -> None:
    @attrs.frozen
    class Careful(Plain):
        def refusal(self) -> Any:
            if isinstance(reply, RuntimeError):
                raise reply
            return reply

    class Point:
        name, value, group = "careful", "module", hookspecs.GROUP
        dist = SimpleNamespace(name="careful-plugin", version="1.2")

        def load(self) -> Any:
            class Offered:
                @staticmethod
                @hookspecs.hookimpl
                def tesaiot_transports() -> dict[str, Any]:
                    return {"careful": Careful}

            return Offered

    catalog = plugins.load([EntryPoint(Fake), Point()])  # type: ignore[list-item]
    endpoint = '{ url = "plain://h:1", via = "careful" }'
    file, good = tmp_path / "pipeline.toml", '"mqtts://broker.example:8883"'
    file.write_text(change(good, f"{endpoint}, {good}"))
    config = load(file, catalog=catalog)
    [connection] = config.connections.values()
    assert isinstance(connection.dialer, Negotiator)
    [left_out] = connection.dialer.left_out
    assert told in left_out.reason
    file.write_text(change(good, endpoint))
    with pytest.raises(ConfigError, match=re.escape(told)):
        load(file, catalog=catalog)
