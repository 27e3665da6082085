"""What a bundle gives to a connection, in which order, and what is said of one that is damaged."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from installed import EntryPoint

from tesaiot_connect import hookspecs, plugins
from tesaiot_connect.config import Bundle, bundle_connection, connection, load, read_bundle
from tesaiot_connect.config.bundle_files import _SHAPE
from tesaiot_connect.config.positions import find_json_lines
from tesaiot_connect.errors import ConfigError, ConnectorError, Problem
from tesaiot_connect.plugins import Catalog
from tesaiot_connect.protocols import Connection, Secret, Url
from tesaiot_connect.secret import SecretFrom, read_secret
from tesaiot_connect.tls import TlsOptions

# --- a catalog, so that nothing depends on what is installed --------------------------------


@attrs.frozen
class Tls:
    """A transport that is never dialed."""

    schemes: ClassVar[Mapping[str, int]] = {"mqtt": 1883, "mqtts": 8883, "wss": 443, "ws": 80, "quic": 14567}
    rank: ClassVar[int] = 1
    races: ClassVar[bool] = True

    url: Url
    tls: TlsOptions = attrs.field(factory=TlsOptions)

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class Password:
    username: str
    password: Secret | SecretFrom

    async def begin(self) -> Any: ...
    async def identity(self) -> None: ...


@attrs.frozen
class Token:
    token: Secret | SecretFrom

    async def begin(self) -> Any: ...
    async def identity(self) -> None: ...


@attrs.frozen(kw_only=True)
class Mtls:
    certificate: Path | None = None
    key: Path | None = None
    pkcs12: Path | None = None
    username: str | None = None
    password: Secret | SecretFrom | None = None

    async def begin(self) -> Any: ...
    async def identity(self) -> None: ...


class Fake:
    """A plugin as an object."""

    @staticmethod
    @hookspecs.hookimpl
    def tesaiot_transports() -> dict[str, Any]:
        return {"tls": Tls}

    @staticmethod
    @hookspecs.hookimpl
    def tesaiot_auths() -> dict[str, Any]:
        return {"password": Password, "token": Token, "mtls": Mtls}


CATALOG: Catalog = plugins.load([EntryPoint(Fake)])  # type: ignore[list-item]

# --- bundles --------------------------------------------------------------------------------

PLATFORM = {
    "protocol": "mqtts",
    "host": "tesaiot.com",
    "port": 14567,
    "transport": "quic",
    "tls": {
        "enabled": True,
        "version": "1.3",
        "ca_file": "ca-chain.pem",
        "verify_server": True,
        "verify_mode": "server-only",
    },
    "auth": {"method": "username_password", "username": "<device_id>", "password": "<from_bundle>"},
    "connection": {"keepalive": 45, "clean_session": True, "connect_timeout": 7.5},
}
"""As the platform documents it."""
DEVICE = "TESAIOT_DEVICE_ID=d1\nTESAIOT_PASSWORD=s3cret-of-the-file\n"
NOTHING: Mapping[str, str] = {}

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(config: Any = PLATFORM, env: str | None = DEVICE, *files: str, name: str = "d1") -> Path:
        folder = tmp_path / "bundles" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("ca-chain.pem", *files):
            (folder / file).write_text("PEM")
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config, indent=2)
            (folder / "mqtt-quic-config.json").write_text(text)
        if env is not None:
            (folder / ".env").write_text(env)
        return folder

    return make


def changed(**parts: Any) -> dict[str, Any]:
    """PLATFORM with other values; tables are laid over, None removes."""
    made: dict[str, Any] = json.loads(json.dumps(PLATFORM))
    for name, part in parts.items():
        if part is None:
            made.pop(name, None)
        elif isinstance(part, dict) and name in made:
            made[name] = {k: v for k, v in {**made[name], **part}.items() if v is not None}
        else:
            made[name] = part
    return made


def problems(folder: Path, environ: Mapping[str, str] = NOTHING, **given: Any) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        read_bundle(folder, environ, given=given)
    return list(caught.value.problems)


def origins(bundle: Bundle) -> dict[str, str]:
    return {one.key: one.origin for one in bundle.settings}


def endpoints(bundle: Bundle) -> list[str]:
    found: list[str] = bundle.table()["endpoints"]
    return found


def test_the_bundle_of_the_platform(make: Make) -> None:
    folder = make()
    bundle = read_bundle(folder, NOTHING)
    assert bundle.table() == {
        "endpoints": ["quic://tesaiot.com:14567", "mqtts://tesaiot.com:8883"],
        "auth": {
            "type": "password",
            "username": "d1",
            "password": {"file": str(folder / ".env"), "variable": "TESAIOT_PASSWORD"},
        },
        "client_id": "d1",
        "tls": {"ca_file": str(folder / "ca-chain.pem"), "minimum_version": "1.3"},
        "keepalive": "45s",
        "clean_session": True,
        "connect_timeout": "7.5s",
    }
    assert bundle.device_id == "d1"
    assert bundle.warnings == ()
    told = origins(bundle)
    assert told["endpoints[0]"] == "mqtt-quic-config.json: transport, host, port"
    assert told["endpoints[1]"] == "default: where QUIC does not get through"
    assert told["auth.password"] == ".env: TESAIOT_PASSWORD"
    assert told["keepalive"] == "mqtt-quic-config.json: connection.keepalive"
    assert "s3cret" not in repr(bundle)


def test_a_connection_of_it(make: Make) -> None:
    folder = make()
    made = bundle_connection(folder, environ=NOTHING, catalog=CATALOG)
    first, second = made.dialer.endpoints  # type: ignore[attr-defined]
    assert (first.url, second.url) == (Url("quic", "tesaiot.com", 14567), Url("mqtts", "tesaiot.com", 8883))
    assert first.tls == TlsOptions(ca_file=folder / "ca-chain.pem", minimum_version="1.3") == second.tls
    assert made.name == "d1"
    assert made.options.client_id == "d1"
    assert (made.options.keepalive, made.options.connect_timeout) == (45.0, 7.5)
    assert made.options.clean_session
    secret = SecretFrom(file=folder / ".env", variable="TESAIOT_PASSWORD")
    assert made.auth == Password(username="d1", password=secret)


def test_the_order_in_which_values_count(make: Make) -> None:
    """TOML, then the JSON, then the environment, then .env, then defaults."""
    environ = {"TESAIOT_DEVICE_ID": "of-environment", "TESAIOT_PASSWORD": "pw-of-environment"}

    def username(config: Any, env: str | None, environ: Mapping[str, str], *overrides: str) -> Any:
        folder = make(config, env)
        made = bundle_connection(folder, environ=environ, overrides=overrides, catalog=CATALOG)
        assert isinstance(made.auth, Password)
        return made.auth.username

    full = changed(auth={"username": "of-json", "password": "pw-of-json"})
    assert username(full, DEVICE, environ, "auth.username=of-toml") == "of-toml"
    assert username(full, DEVICE, environ) == "of-json"
    assert username(PLATFORM, DEVICE, environ) == "of-environment"
    assert username(PLATFORM, DEVICE, NOTHING) == "d1"
    placeholder = {"TESAIOT_DEVICE_ID": "<your device>", "TESAIOT_PASSWORD": " "}
    assert username(PLATFORM, DEVICE, placeholder) == "d1"
    bundle = read_bundle(make(changed(connection=None, tls=None)), NOTHING)
    assert origins(bundle)["keepalive"] == "default"
    assert "keepalive" not in bundle.table()
    assert bundle.table()["tls"] == {"ca_file": str(bundle.folder / "ca-chain.pem")}


def test_a_secret_of_the_environment_is_the_value(make: Make) -> None:
    made = bundle_connection(make(), environ={"TESAIOT_PASSWORD": "of-environment"}, catalog=CATALOG)
    assert isinstance(made.auth, Password)
    assert isinstance(made.auth.password, Secret)
    assert made.auth.password.reveal() == "of-environment"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"transport": "quic"}, ["quic://tesaiot.com:14567", "mqtts://tesaiot.com:8883"]),
        ({"transport": "QUIC", "port": None}, ["quic://tesaiot.com", "mqtts://tesaiot.com:8883"]),
        ({"transport": "tcp", "port": 8883}, ["mqtts://tesaiot.com:8883"]),
        ({"transport": "tls", "port": None}, ["mqtts://tesaiot.com"]),
        ({"transport": "tcp", "port": 1883, "tls": {"enabled": False}}, ["mqtt://tesaiot.com:1883"]),
        ({"transport": "websocket", "port": None}, ["wss://tesaiot.com:8085/mqtt"]),
        ({"transport": "ws", "port": 443, "path": "broker"}, ["wss://tesaiot.com:443/broker"]),
        ({"transport": "wss", "port": 443, "path": "/a/b"}, ["wss://tesaiot.com:443/a/b"]),
        ({"transport": "wss", "port": 443, "path": "/a?k=v"}, ["wss://tesaiot.com:443/a?k=v"]),
        ({"transport": "ws", "port": 80, "tls": {"enabled": False}}, ["ws://tesaiot.com:80/mqtt"]),
        ({"transport": None, "port": 8883}, ["mqtts://tesaiot.com:8883"]),
        ({"transport": None, "protocol": "wss", "port": 1}, ["wss://tesaiot.com:1/mqtt"]),
        (
            {"transport": None, "protocol": None},
            ["quic://tesaiot.com:14567", "mqtts://tesaiot.com:8883"],
        ),
        ({"host": "::1", "transport": "tcp", "port": 1}, ["mqtts://[::1]:1"]),
        ({"host": "[::1]", "transport": "tcp", "port": 1}, ["mqtts://[::1]:1"]),
        ({"endpoints": ["wss://a/mqtt", "mqtt-quic://b:1"]}, ["wss://a/mqtt", "mqtt-quic://b:1"]),
    ],
)
def test_transport_decides_the_scheme(parts: dict[str, Any], expected: list[str], make: Make) -> None:
    folder = make(changed(**parts))
    assert endpoints(read_bundle(folder, NOTHING)) == expected
    assert bundle_connection(folder, environ=NOTHING, catalog=CATALOG)


def test_no_json_takes_the_broker_of_the_variables(make: Make) -> None:
    env = "MQTT_API_TOKEN=tesa_mqtt_x\nMQTT_BROKER_URL=wss://localhost:8085/mqtt\n"
    folder = make(None, env, name="organisation")
    bundle = read_bundle(folder, NOTHING)
    assert bundle.table() == {
        "endpoints": ["wss://localhost:8085/mqtt"],
        "auth": {"type": "token", "token": {"file": str(folder / ".env"), "variable": "MQTT_API_TOKEN"}},
        "tls": {"ca_file": str(folder / "ca-chain.pem")},
    }
    assert bundle.device_id == ""
    assert origins(bundle)["client_id"] == "default"
    other = read_bundle(folder, {"TESAIOT_HOST": "h"})
    assert endpoints(other) == ["quic://h", "mqtts://h:8883"], "the environment before .env"
    aliased = make(None, env.replace("wss://", "mqtt+quic://").replace("/mqtt\n", "\n"), name="aliased")
    made = bundle_connection(aliased, environ=NOTHING, catalog=CATALOG)
    assert made.dialer.endpoints[0].url.scheme == "quic"  # type: ignore[attr-defined]


def test_methods_of_logging_in(make: Make) -> None:
    token = read_bundle(make(changed(auth={"method": "token"}), "MQTT_API_TOKEN=t"), NOTHING).table()
    assert token["auth"]["type"] == "token"
    assert "client_id" not in token, "an organisation's bundle serves many clients"
    nobody = read_bundle(make(changed(auth={"method": "none"}), None), NOTHING)
    assert "auth" not in nobody.table()
    assert bundle_connection(nobody.folder, environ=NOTHING, catalog=CATALOG).auth is None
    bare = read_bundle(make(changed(auth=None)), NOTHING).table()
    assert bare["auth"]["type"] == "password"


def test_a_client_certificate_leaves_quic_out(make: Make) -> None:
    folder = make(changed(auth={"method": "mtls"}), DEVICE, "client.pem", "client.key")
    bundle = read_bundle(folder, NOTHING)
    table = bundle.table()
    assert table["endpoints"] == ["mqtts://tesaiot.com:8883"]
    assert table["auth"] == {
        "type": "mtls",
        "certificate": str(folder / "client.pem"),
        "key": str(folder / "client.key"),
    }
    (warning,) = bundle.warnings
    assert warning.key == "host"
    assert warning.line == 3
    assert "quic://tesaiot.com:14567 is left out: QUIC takes no client certificate" in warning.message
    mutual = make(changed(tls={"verify_mode": "mutual"}), DEVICE, "client.pem", "client.key")
    auth = read_bundle(mutual, NOTHING).table()["auth"]
    assert (auth["type"], auth["username"]) == ("mtls", "d1"), "both, where the platform wants both"
    assert bundle_connection(mutual, environ=NOTHING, catalog=CATALOG).auth


def test_another_type_of_login_takes_what_the_bundle_has_for_it(make: Make) -> None:
    folder = make(PLATFORM, DEVICE, "client.pem", "client.key")
    made = bundle_connection(folder, overrides=["auth.type=mtls"], environ=NOTHING, catalog=CATALOG)
    assert made.auth == Mtls(certificate=folder / "client.pem", key=folder / "client.key")
    assert [one.url.scheme for one in made.dialer.endpoints] == ["mqtts"]  # type: ignore[attr-defined]
    (barred,) = made.dialer.left_out  # type: ignore[attr-defined]
    assert barred.endpoint.startswith("quic://"), "check, doctor and the status tell it"
    assert (barred.outcome, barred.reason) == ("left out", "QUIC takes no client certificate here")
    own = ['auth={type="mtls", pkcs12="/own.p12"}']
    made = bundle_connection(make(), overrides=own, environ=NOTHING, catalog=CATALOG)
    assert made.auth == Mtls(pkcs12=Path("/own.p12"))
    given = ['auth={type="token", token="t"}']
    made = bundle_connection(make(), overrides=given, environ=NOTHING, catalog=CATALOG)
    assert isinstance(made.auth, Token)


def test_bundle_beside_other_keys_of_a_file(make: Make, tmp_path: Path) -> None:
    make()
    file = tmp_path / "pipeline.toml"
    file.write_text(
        '[connections.platform]\nbundle = "bundles/d1"\nclient_id = "other"\nkeepalive = "10s"\n'
        'tls = { server_name = "platform" }\nauth = { password = { env = "NAME" } }\n'
    )
    made = load(file, environ=NOTHING, catalog=CATALOG, need_pipelines=False).connections["platform"]
    assert made.options.client_id == "other"
    assert (made.options.keepalive, made.options.connect_timeout) == (10.0, 7.5)
    tls = made.dialer.endpoints[0].tls  # type: ignore[attr-defined]
    assert (tls.server_name, tls.minimum_version) == ("platform", "1.3")
    assert made.auth == Password(username="d1", password=SecretFrom(env="NAME"))


def test_a_url_takes_the_rest_from_a_bundle(make: Make) -> None:
    folder = make()
    overrides = [f"bundle={folder}"]
    made = connection("mqtts://other:1", overrides=overrides, environ=NOTHING, catalog=CATALOG)
    assert [str(one.url) for one in made.dialer.endpoints] == ["mqtts://other:1"]  # type: ignore[attr-defined]
    assert made.auth is not None
    plain = connection("mqtt://other:1", overrides=overrides, environ=NOTHING, catalog=CATALOG)
    assert plain.dialer.endpoints[0].tls == TlsOptions()  # type: ignore[attr-defined]


# --- what is wrong ----------------------------------------------------------------------------


def test_a_missing_folder(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "nowhere")
    assert problem.file == str(tmp_path / "nowhere")
    assert problem.message == "there is no such folder"
    assert "tesaiot-connect sandbox DIR" in problem.fix
    assert "Download the bundle" in problem.fix
    archive = tmp_path / "d1.zip"
    archive.write_bytes(b"PK")
    assert problems(archive)[0].fix == "Unpack it, and name the folder"
    (tmp_path / "file").write_text("")
    assert "is a file" in problems(tmp_path / "file")[0].message


def test_an_empty_folder_says_all_that_is_missing(tmp_path: Path) -> None:
    found = problems(tmp_path)
    assert all(one.file == str(tmp_path) and "mqtt-quic-config.json" in one.message for one in found)
    assert "no credentials" in found[0].message
    assert "where the broker is" in found[1].message
    assert "Download" in found[1].fix


def test_only_what_is_needed_must_be_there(tmp_path: Path) -> None:
    own = {"endpoints": ["mqtts://h"], "auth": {"type": "token", "token": "t"}}
    assert read_bundle(tmp_path, NOTHING, given=own).table() == {}
    (problem,) = problems(tmp_path, endpoints=["mqtts://h"])
    assert "no credentials" in problem.message


def test_a_ca_file_that_is_not_there(make: Make) -> None:
    folder = make()
    (folder / "ca-chain.pem").unlink()
    (problem,) = problems(folder)
    assert problem.file == str(folder / "mqtt-quic-config.json")
    assert (problem.line, problem.key) == (9, "tls.ca_file")
    assert problem.message == f"there is no file {folder / 'ca-chain.pem'}"
    assert read_bundle(folder, NOTHING, given={"tls": {"ca_file": "own.pem"}})
    assert read_bundle(folder, NOTHING, given={"endpoints": ["mqtt://plain"]})
    make(changed(tls=None))
    (folder / "ca-chain.pem").unlink()
    assert origins(read_bundle(folder, NOTHING))["tls.ca_file"] == "default"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{\n  "host": "h",\n  "port": 1,,\n}', 3, "line 3, column 13"),
        ("", 1, "not valid JSON"),
        ("[1, 2]", 1, "expected a JSON object"),
        ("[" * 100_000, 0, "nested too deeply"),
        ('{"host": "h", "tls": {"verify_server": false}, "tls": {}}', 0, 'the key "tls" is there twice'),
        ('{"port": ' + "1" * 5000 + "}", 0, "not valid JSON"),
    ],
)
def test_damaged_json(text: str, line: int, words: str, make: Make) -> None:
    (problem,) = problems(make(text))
    assert problem.file.endswith("mqtt-quic-config.json")
    assert problem.line == line
    assert words in problem.message
    assert problem.fix


def test_bytes_that_are_no_text(make: Make) -> None:
    folder = make()
    (folder / "mqtt-quic-config.json").write_bytes(b'{"host": "\xff"}')
    assert "UTF-8" in problems(folder)[0].message
    (folder / "mqtt-quic-config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(PLATFORM).encode())
    assert read_bundle(folder, NOTHING).table()["client_id"] == "d1"


@pytest.mark.parametrize(
    ("parts", "key", "words"),
    [
        ({"host": 3}, "host", "expected a string, got 3"),
        ({"port": "14567"}, "port", 'expected a whole number, got "14567"'),
        ({"port": 0}, "port", "from 1 to 65535"),
        ({"port": True}, "port", "expected a whole number, got true"),
        ({"transport": "pigeon"}, "transport", 'expected one of "quic", "tcp"'),
        ({"endpoints": "mqtts://h"}, "endpoints", "expected a list of URLs"),
        ({"endpoints": []}, "endpoints", "expected a list of URLs"),
        ({"endpoints": ["mqtts://h", "nothing"]}, "endpoints", "has no scheme"),
        ({"client_id": "\ud800"}, "client_id", "is not text"),
        ({"host": "mqtts://h:1"}, "host", "is not the name of a host"),
        ({"tls": {"enabled": "yes"}}, "tls.enabled", "expected true or false"),
        ({"tls": {"enabled": False}}, "tls.enabled", "QUIC is always encrypted"),
        ({"tls": {"version": 1.3}}, "tls.version", 'expected one of "1.2", "1.3"; got 1.3'),
        ({"tls": {"verify_server": False}}, "tls.verify_server", "anybody may pose as the platform"),
        ({"tls": {"verify_mode": "often"}}, "tls.verify_mode", "expected one of"),
        ({"auth": {"method": "magic"}}, "auth.method", "expected one of"),
        ({"auth": {"password": ["s3cret"]}}, "auth.password", "expected a string, got something else"),
        ({"connection": {"keepalive": "60s"}}, "connection.keepalive", "a number of seconds"),
        ({"connection": {"keepalive": -1}}, "connection.keepalive", "a number of seconds"),
        ({"connection": {"keepalive": float("nan")}}, "connection.keepalive", "a number of seconds"),
        ({"connection": {"connect_timeout": 0}}, "connection.connect_timeout", "nothing connects in 0"),
        ({"connection": []}, "connection", "expected an object, got an array"),
        ({"auth": "s3cret"}, "auth", "expected an object"),
        ({"host": "d1:s3cret@h"}, "host", "what stands before the @ is not the name of a host"),
        ({"host": "a\u0000b"}, "host", "is not the name of a host"),
        ({"host": "a%40b"}, "host", "is not the name of a host"),
        ({"tls": {"ca_file": "x" * 5000}}, "tls.ca_file", "there is no file"),
        ({"tls": {"ca_file": "~nobody-of-this-name/ca"}}, "tls.ca_file", "there is no file"),
        ({"auth": {"method": "token"}}, "auth", "the bundle has no token"),
    ],
)
def test_wrong_values_have_their_place(parts: dict[str, Any], key: str, words: str, make: Make) -> None:
    folder = make(changed(**parts))
    (problem,) = problems(folder)
    assert problem.file == str(folder / "mqtt-quic-config.json")
    assert problem.key == key
    assert words in problem.message
    assert "s3cret" not in str(problem)
    written = (folder / "mqtt-quic-config.json").read_text().splitlines()[problem.line - 1]
    assert f'"{key.split(".")[-1]}"' in written or key == "endpoints", written


def test_everything_that_is_wrong_is_said_at_once(make: Make, tmp_path: Path) -> None:
    make(changed(port="1", tls={"version": "0"}), "what is this\n")
    file = tmp_path / "pipeline.toml"
    file.write_text('[connections.platform]\nbundle = "bundles/d1"\nkeepalive = 3\n')
    with pytest.raises(ConfigError) as caught:
        load(file, environ=NOTHING, catalog=CATALOG, need_pipelines=False)
    places = [(Path(one.file).name, one.line, one.key) for one in caught.value.problems]
    assert places == [
        ("pipeline.toml", 3, "connections.platform.keepalive"),
        (".env", 1, ""),
        ("mqtt-quic-config.json", 4, "port"),
        ("mqtt-quic-config.json", 8, "tls.version"),
    ]


def test_what_the_composer_refuses_is_said_of_the_bundle(make: Make, tmp_path: Path) -> None:
    folder = make(changed(client_id="a\0b", endpoints=["mqtts://h", "pigeon://h"]))
    with pytest.raises(ConfigError) as caught:
        bundle_connection(folder, environ=NOTHING, catalog=CATALOG)
    places = [(one.file, one.key) for one in caught.value.problems]
    config = str(folder / "mqtt-quic-config.json")
    assert sorted(places) == [(config, "client_id"), (config, "endpoints")]


def test_a_certificate_that_is_missing(make: Make) -> None:
    folder = make(changed(auth={"method": "certificate"}), DEVICE, "client.pem")
    (problem,) = problems(folder)
    assert problem.file == str(folder / "client.key")
    assert "Download" in problem.fix
    only = make(changed(auth={"method": "mtls"}, endpoints=["quic://h"]), DEVICE, "client.pem", "client.key")
    (problem,) = problems(only)
    assert problem.key == "endpoints"
    assert "QUIC endpoints alone" in problem.message


def test_what_is_wrong_with_several_values_is_said_of_the_bundle(make: Make, tmp_path: Path) -> None:
    """As an auth does, which looks at its keys together."""

    class Picky:
        @staticmethod
        @hookspecs.hookimpl
        def tesaiot_auths() -> dict[str, Any]:
            return {"password": PickyAuth}

        @staticmethod
        @hookspecs.hookimpl
        def tesaiot_transports() -> dict[str, Any]:
            return {"tls": Tls}

    @attrs.frozen(kw_only=True)
    class PickyAuth(Password):
        def __attrs_post_init__(self) -> None:
            raise ValueError("these do not go together")

    catalog = plugins.load([EntryPoint(Picky)])  # type: ignore[list-item]
    folder = make()
    file = tmp_path / "pipeline.toml"
    file.write_text('[connections.platform]\nbundle = "bundles/d1"\n')
    for environ, place in (
        (NOTHING, (str(folder / ".env"), 2, "TESAIOT_PASSWORD")),
        ({"TESAIOT_PASSWORD": "pw"}, ("environment", 0, "TESAIOT_PASSWORD")),
    ):
        for compose in (
            partial(bundle_connection, folder),
            partial(load, file, need_pipelines=False),
        ):
            with pytest.raises(ConfigError) as caught:
                compose(environ=environ, catalog=catalog)
            (problem,) = caught.value.problems
            assert (problem.file, problem.line, problem.key) == place


def test_the_environment_counts_before_the_file_whatever_the_way_to_log_in(make: Make) -> None:
    config = changed(auth=None)
    environ = {"TESAIOT_DEVICE_ID": "d2", "TESAIOT_PASSWORD": "pw"}
    assert read_bundle(make(config, "MQTT_API_TOKEN=t\n"), environ).table()["auth"]["type"] == "password"
    environ = {"MQTT_API_TOKEN": "t"}
    assert read_bundle(make(config, DEVICE), environ).table()["auth"]["type"] == "token"


def test_an_unverified_server_must_be_meant(make: Make) -> None:
    folder = make(changed(tls={"verify_server": False}))
    overrides = ["tls.insecure=true"]
    made = bundle_connection(folder, overrides=overrides, environ=NOTHING, catalog=CATALOG)
    assert made.dialer.endpoints[0].tls.verify == "none"  # type: ignore[attr-defined]
    made = bundle_connection(folder, overrides=["tls.verify=full"], environ=NOTHING, catalog=CATALOG)
    assert made.dialer.endpoints[0].tls.verify == "full"  # type: ignore[attr-defined]


def test_unknown_keys_are_a_warning(make: Make) -> None:
    bundle = read_bundle(make(changed(hots="h", tls={"sni": "x"}, region={"a": 1})), NOTHING)
    told = {one.key: one for one in bundle.warnings}
    assert set(told) == {"hots", "tls.sni", "region"}
    assert told["hots"].fix == "Did you mean 'host'?"
    assert told["tls.sni"].line == 12


def test_a_url_with_credentials_is_not_repeated(make: Make) -> None:
    env = "MQTT_API_TOKEN=t\nMQTT_BROKER_URL=mqtts://user:s3cret@h:port\n"
    (problem,) = problems(make(None, env))
    assert (Path(problem.file).name, problem.line, problem.key) == (".env", 2, "MQTT_BROKER_URL")
    assert "s3cret" not in str(problem)


def test_missing_credentials_say_where_they_go(make: Make) -> None:
    folder = make(PLATFORM, "TESAIOT_DEVICE_ID=d1\n")
    (problem,) = problems(folder)
    assert (problem.key, problem.message) == ("auth.password", "the bundle has no password")
    assert f"Write TESAIOT_PASSWORD=... into {folder / '.env'}" in problem.fix
    assert len(problems(make(PLATFORM, ""))) == 2


def test_text_of_a_bundle_is_no_variable(make: Make) -> None:
    config = changed(auth={"username": "${HOME}", "password": "$${x}"})
    made = bundle_connection(make(config), environ={"HOME": "/root"}, catalog=CATALOG)
    assert isinstance(made.auth, Password)
    assert made.auth.username == "${HOME}"
    assert isinstance(made.auth.password, Secret)
    assert made.auth.password.reveal() == "$${x}"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70_000) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["quic", "ws", "mutual", "token", "mtls", "1.3", "a.b", "<x>", "mqtts://h"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["host", "enabled", "version", "method", "username", "keepalive", "verify_mode"]),
        inner,
        max_size=4,
    ),
)  # fmt: skip
CONFIGS = st.dictionaries(
    st.sampled_from([*PLATFORM, "endpoints", "path", "device_id", "client_id", "other"]), VALUES
)


@given(config=CONFIGS, env=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bundle_gives_settings_or_problems(
    config: dict[str, Any], env: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "mqtt-quic-config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / ".env").write_bytes(env.encode("utf-8", "surrogatepass"))
    found: Sequence[Problem] = ()
    try:
        complete = "endpoints" in read_bundle(folder, NOTHING).table()
    except ConfigError as error:
        complete, found = False, error.problems
    assert complete or found
    assert all(one.message and one.file.startswith(str(folder)) for one in found)


@given(value=CONFIGS, indent=st.sampled_from([None, 0, 2]))
def test_every_key_of_json_is_found(value: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    lines = text.split("\n")
    found = find_json_lines(text)

    def walk(at: Any, path: tuple[Any, ...]) -> int:
        pairs = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
        count = 0
        for part, inner in pairs:
            line = lines[found[*path, part] - 1]
            assert json.dumps(part) in line if isinstance(part, str) else line
            count += 1 + walk(inner, (*path, part))
        return count

    assert walk(value, ()) == len(found)


# --- secrets of a file of variables -----------------------------------------------------------


def test_a_variable_of_a_file_is_a_secret(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("# comment\nA=1\nexport TOKEN='${A} b'\n")
    file.chmod(0o600)
    secret = SecretFrom(file=file, variable="TOKEN")
    assert asyncio.run(read_secret(secret)) == "${A} b"
    assert str(secret) == f"TOKEN in {file}"
    with pytest.raises(ConnectorError, match="has no OTHER") as caught:
        asyncio.run(read_secret(SecretFrom(file=file, variable="OTHER")))
    assert caught.value.fix == "write a line OTHER=... into it"
    file.write_text("TOKEN=\n")
    with pytest.raises(ConnectorError, match="holds no secret: it is empty"):
        asyncio.run(read_secret(secret))
    with pytest.raises(ValueError, match="`variable` is one of a `file`"):
        SecretFrom(env="A", variable="TOKEN")


# --- the page ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "bundle.md").read_text(encoding="utf-8")


def test_the_file_of_the_page_is_right(make: Make, tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "bundles" / "pipeline.toml"
    make(changed(auth={"method": "token"}), "MQTT_API_TOKEN=t\n", name="organisation")
    file.write_text(block)
    (pipeline,) = load(file, environ=NOTHING, catalog=CATALOG).pipelines
    assert pipeline.name == "archive"


def test_every_key_and_name_is_on_the_page(make: Make) -> None:
    for key in [*_SHAPE, "MQTT_API_TOKEN", "MQTT_BROKER_URL", "TESAIOT_HOST", "TESAIOT_DEVICE_ID"]:
        assert f"`{key}`" in PAGE or f'"{key}"' in PAGE, key


def test_what_the_page_shows_is_what_is_shown(make: Make) -> None:
    shown = re.findall(
        r"^(\S+) {2,}(\S+) {2,}(\S.*)$", PAGE.split("$ tesaiot-connect bundle show")[1], re.MULTILINE
    )
    folder = make(changed(connection={"keepalive": 60, "connect_timeout": 10}))
    bundle = read_bundle(folder, NOTHING)
    rows = [
        (one.key, one.shown.replace(str(folder), "/home/me/devices/d1"), one.origin)
        for one in bundle.settings
    ]
    assert shown[1:] == rows
