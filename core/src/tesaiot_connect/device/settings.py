"""The arguments of a device client, its bundle and its environment -> a connection.

Owns: which argument stands for which key of a connection's table. Rule: arguments count before the
bundle; everything else is the business of the configuration, which says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from ..client import MqttConnection
from ..config.bundle import Bundle, read_bundle
from ..config.compose import Composer
from ..config.document import Document, Text
from ..errors import ConfigError, Problem
from ..plugins import Catalog, load as load_catalog
from ..portal import Portal
from ..protocols import Auth

_TRANSPORTS = {
    "quic": "quic",
    "tcp": "mqtts",
    "tls": "mqtts",
    "mqtts": "mqtts",
    "mqtt": "mqtt",
    "websockets": "wss",
    "websocket": "wss",
    "wss": "wss",
    "ws": "ws",
}
_PORTS = {"wss": 8085, "ws": 8085}
"""Where the platform has another port than the scheme."""
_LOGINS = {"MQTT_API_TOKEN": "token", "TESAIOT_PASSWORD": "password"}
"""Environment variables that decide about the auth by being there."""
_DURATIONS = ("keepalive", "connect_timeout", "session_expiry")
"""Of which a number counts seconds."""


@attrs.frozen
class Settings:
    """What a client was told."""

    connection: MqttConnection
    device_id: str


@attrs.frozen(kw_only=True)
class Arguments:
    """Arguments as they were given; None is "not given"."""

    owner: str
    """The class that was given them, for messages."""
    bundle: str | os.PathLike[str] | None
    url: str | Sequence[str] | None
    host: str | None
    port: int | None
    transport: str | None
    auth: Mapping[str, Any]
    """Type and values; where it is empty, the bundle's auth counts."""
    prefers: Literal["password", "token"]
    """Which counts where both are in the environment or in `.env` and the bundle does not choose."""
    ca_file: str | os.PathLike[str] | None
    options: Mapping[str, Any]
    """Other keys of a connection's table."""
    default_transport: str

    def problem(self, key: str, message: str, fix: str = "") -> ConfigError:
        return ConfigError([Problem(f"{self.owner}()", 0, key, message, fix)])


def read(
    arguments: Arguments, *, environ: Mapping[str, str] | None = None, catalog: Catalog | None = None
) -> Settings:
    """Raises ConfigError with every problem there is, and whatever the auth says of its credentials:
    they are read once now, before there is any traffic."""
    environ = os.environ if environ is None else environ
    doc = Document(f"{arguments.owner}()", "", Path.cwd())
    doc.data = _plain(_table(arguments))
    doc.expand(environ)
    device_id = ""
    if arguments.bundle is not None:
        folder = os.fspath(arguments.bundle)
        bundle = _bundle(folder, environ, doc.data, arguments.prefers)
        device_id = bundle.device_id
        doc.data["bundle"] = Text.make(folder, written=folder, folder=doc.folder)
    composer = Composer(doc, catalog or load_catalog())
    connection = composer.connection("", (), doc.data)
    doc.check()
    assert connection is not None
    if connection.auth is not None:
        _check_login(connection.auth)
    return Settings(connection, device_id)


def _bundle(folder: str, environ: Mapping[str, str], given: dict[str, Any], prefers: str) -> Bundle:
    """Puts the auth that is preferred into `given`, if the bundle has it and happens to take another."""
    bundle = read_bundle(folder, environ, given=given)
    chosen = next((one.found.key for one in bundle.settings if one.key == "auth.type" and one.found), "")
    if "auth" not in given and _LOGINS.get(chosen, prefers) != prefers:
        try:
            bundle = read_bundle(folder, environ, given={**given, "auth": {"type": prefers}})
        except ConfigError:
            return bundle
        given["auth"] = {"type": prefers}
    return bundle


def _table(arguments: Arguments) -> dict[str, Any]:
    table = dict(arguments.options)
    for name in _DURATIONS:
        if isinstance(table.get(name), int | float):
            table[name] = f"{table[name]:g}s"
    urls = arguments.url
    if arguments.host is not None:
        if urls is not None:
            raise arguments.problem("host", "is given beside `url`", "Give one of them")
        urls = _url(arguments, arguments.host)
    elif arguments.port is not None or arguments.transport is not None:
        name = "port" if arguments.port is not None else "transport"
        raise arguments.problem(name, "is of no use without `host`", "Give `host` too, or `url` instead")
    if urls is not None:
        table["endpoints"] = [urls] if isinstance(urls, str) else list(urls)
    if arguments.auth:
        if "auth" in table:
            raise arguments.problem("auth", "is given beside credentials", "Give one of them")
        table["auth"] = dict(arguments.auth)
    if arguments.ca_file is not None:
        file = Path(arguments.ca_file).expanduser()
        if not file.is_file():
            fix = "Give the file with the certificates of the authority, ca-chain.pem of the bundle"
            raise arguments.problem("ca_file", f"there is no file {file.absolute()}", fix)
        table["tls"] = {**table.get("tls", {}), "ca_file": os.fspath(file)}
    return table


def _url(arguments: Arguments, host: str) -> str:
    transport = (arguments.transport or arguments.default_transport).lower()
    if transport not in _TRANSPORTS:
        raise arguments.problem(
            "transport", f"there is no transport {transport!r}", f"Known transports: {', '.join(_TRANSPORTS)}"
        )
    scheme = _TRANSPORTS[transport]
    port = arguments.port or _PORTS.get(scheme)
    name = f"[{host}]" if ":" in host and not host.startswith("[") else host
    path = "/mqtt" if scheme in ("ws", "wss") else ""
    return f"{scheme}://{name}" + (f":{port}" if port else "") + path


def _plain(value: Any) -> Any:
    """As TOML would have it: no variables are looked for in what Python gave."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return str.__str__(value).replace("$", "$$")
    return value


def _check_login(auth: Auth) -> None:
    with Portal(name="tesaiot-credentials") as portal:
        portal.call(auth.begin)
