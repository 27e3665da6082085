"""What a right configuration becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tesaiot_connect.builtin import MqttSource, SqliteSink
from tesaiot_connect.client import MqttConnection
from tesaiot_connect.config import connection, load
from tesaiot_connect.config.serving import load_server
from tesaiot_connect.errors import ConfigError
from tesaiot_connect.protocols import Url

pytest.importorskip("tesaiot_connect_tcp_tls", reason="uses the schemes mqtt:// and mqtts://")

TEXT = """\
[connections.platform]
client_id = "dashboard-${SITE:-1}"
keepalive = "30s"
endpoints = ["mqtts://broker.example:8883", { url = "mqtt://[::1]", nodelay = false }]
tls = { ca_file = "certs/ca.pem" }
reconnect = { max = "10s" }

[connections.spare]
endpoints = ["mqtt://broker.example"]

[sources.telemetry]
type = "mqtt"
connection = "platform"
subscribe = ["device/+/telemetry/#"]
topic_fields = "device/{device_id}/telemetry/{sensor_type}"

[sinks.archive]
type = "sqlite"
path = "data/telemetry.db"

[sinks.bridge]
type = "mqtt"
connection = "platform"
topic = "copy/{topic}"

[sinks.unused]
type = "null"

[pipelines.archive]
from = "telemetry"
to = ["archive"]
retry = { min = "1s" }

[pipelines.bridge]
from = "telemetry"
to = ["bridge"]
process = "steps_of_load:twice"
on_error = "dead_letter"
dead_letter = "archive"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "certs").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "certs" / "ca.pem").write_text("")
    (tmp_path / "steps_of_load.py").write_text("def twice(records):\n    return records * 2\n")
    file = tmp_path / "pipeline.toml"
    file.write_text(TEXT)
    return file


def test_everything_is_composed(file: Path) -> None:
    config = load(file, environ={"SITE": "7"})
    platform = config.connections["platform"]
    assert (platform.name, platform.options.client_id) == ("platform", "dashboard-7")
    assert platform.options.keepalive == 30.0
    assert platform.options.reconnect.max == 10.0
    endpoints: tuple[Any, ...] = platform.dialer.endpoints  # type: ignore[attr-defined]
    urls = [Url("mqtts", "broker.example", 8883), Url("mqtt", "::1")]
    assert [endpoint.url for endpoint in endpoints] == urls
    assert [endpoint.nodelay for endpoint in endpoints] == [True, False]
    assert {endpoint.tls.ca_file for endpoint in endpoints} == {file.parent / "certs" / "ca.pem"}

    archive, bridge = config.pipelines
    assert archive.source is bridge.source  # one reader for both
    assert isinstance(archive.source.recipe, MqttSource)
    assert archive.source.recipe.connection is platform
    assert isinstance(archive.sinks[0].recipe, SqliteSink)
    assert archive.sinks[0].recipe.path == file.parent / "data" / "telemetry.db"
    assert archive.retry.min == 1.0
    assert bridge.process is not None
    assert bridge.process([]) == []
    assert (bridge.on_error, bridge.dead_letter) == ("dead_letter", archive.sinks[0])


def test_warnings_have_places(file: Path) -> None:
    warnings = {warning.key: (warning.line, warning.message) for warning in load(file).warnings}
    lines = TEXT.splitlines()
    assert set(warnings) == {"connections.spare", "sinks.unused", "sinks.bridge"}
    for key, (line, _) in warnings.items():
        assert lines[line - 1] == f"[{key}]"
    assert "client id of its own" in warnings["sinks.bridge"][1]


def test_warnings_of_what_would_only_show_in_a_run(file: Path) -> None:
    (file.parent / "data").rmdir()
    endpoint = '{ url = "mqtts://broker.example:8883" }'  # the same one, written otherwise
    twin = f'[connections.twin]\nclient_id = "dashboard-1"\nendpoints = [{endpoint}]\n'
    sink = '[sinks.twin]\ntype = "mqtt"\nconnection = "twin"\n'
    file.write_text(TEXT.replace('to = ["archive"]', 'to = ["archive", "twin"]') + twin + sink)
    warnings = {warning.key: warning for warning in load(file).warnings}
    assert warnings["sinks.archive.path"].message == f"there is no folder {file.parent / 'data'}"
    assert "client_id of 'platform'" in warnings["connections.twin.client_id"].message
    file.write_text(file.read_text().replace("8883", "8884", 1))  # another broker
    assert "connections.twin.client_id" not in {warning.key for warning in load(file).warnings}


def test_a_byte_order_mark_is_no_text(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(file).connections["platform"].options.client_id == "dashboard-1"


def test_env_file_fills_in_what_the_environment_does_not_have(file: Path, tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("# sites\n\nexport SITE = '9' \nOTHER=a # comment\n")
    assert load(file, environ={}, env_file=env).connections["platform"].options.client_id == "dashboard-9"
    environ = {"SITE": "7"}
    config = load(file, environ=environ, env_file=env)
    assert config.connections["platform"].options.client_id == "dashboard-7"
    env.write_text("SITE=1\nnonsense\n")
    with pytest.raises(ConfigError, match=r"\.env:2: is not a NAME=value line"):
        load(file, env_file=env)


def test_a_file_that_must_exist(file: Path) -> None:
    (file.parent / "certs" / "ca.pem").unlink()
    place = r"pipeline\.toml:5: connections\.platform\.tls\.ca_file"
    with pytest.raises(ConfigError, match=rf"{place}: the file .* does not exist"):
        load(file)


def test_a_url_takes_the_keys_of_a_connection() -> None:
    made = connection("mqtt://h", overrides=["client_id=x", "keepalive=5s", "tls={server_name='s'}"])
    assert isinstance(made, MqttConnection)
    assert (made.options.client_id, made.options.keepalive) == ("x", 5.0)
    assert made.dialer.endpoints[0].tls.server_name == "s"  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"command line: endpoints\[0\]: no installed transport serves xyz://"
    ):
        connection("xyz://h")
    with pytest.raises(ConfigError, match=r"--set: client_idd: unknown key"):
        connection("mqtt://h", overrides=["client_idd=x"])


@pytest.mark.parametrize(
    ("table", "url"),
    [
        ("", Url("mqtt", "127.0.0.1", 1883)),
        ("port = 18830", Url("mqtt", "127.0.0.1", 18830)),
        ("port = 0", Url("mqtt", "127.0.0.1", 0)),
        (
            'host = "::"\nscheme = "mqtts"\nserver_tls = { certificate = "c.pem", key = "k.pem" }',
            Url("mqtts", "::", 8883),
        ),
        ('url = "mqtt://0.0.0.0:1884"', Url("mqtt", "0.0.0.0", 1884)),
        ('url = "mqtt://127.0.0.1:0"\nbacklog = 4', Url("mqtt", "127.0.0.1", 0)),
    ],
)
def test_listeners(table: str, url: Url, tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    for name in ("c.pem", "k.pem"):
        (tmp_path / name).touch()
    file.write_text(f'[broker]\nstate_file = "state.db"\nmax_sessions = 5\n[listeners.tcp]\n{table}\n')
    config = load_server(file)
    (listener,) = config.listeners
    assert listener.name == "tcp"
    assert listener.transport.url == url  # type: ignore[attr-defined]
    assert config.options.max_sessions == 5
    assert config.options.state_file == tmp_path / "state.db"


def test_the_example_broker(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "docs" / "examples" / "broker.toml"
    config = load_server(example, overrides=["listeners.tcp.port=18830"])
    assert config.listeners[0].transport.url.port == 18830  # type: ignore[attr-defined]
