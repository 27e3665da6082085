"""What the platform hands out, a folder of files -> a connection's table.

Owns: `bundle = "dir/"`: which files there are, the order in which they count, and the words for what
is missing or damaged. Rule: every value knows where it came from, and what is wrong is said of the
bundle's own file and key; what is missing is wrong only where it is needed.

The order is: keys of the TOML table, `mqtt-quic-config.json`, the environment, `.env`, defaults.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import attrs

from ..dialing import Attempt
from ..errors import ConfigError, Problem
from ..protocols import Url
from .bundle_files import (
    CA_FILE,
    CONFIG_FILE,
    DOWNLOAD,
    ENV_FILE,
    METHODS,
    PROTOCOLS,
    TRANSPORTS,
    BundleFiles,
    Carrier,
    Found,
)
from .document import Document, Text, dotted, show
from .lines import Path

CERTIFICATE, KEY = "client.pem", "client.key"
_QUIC = ("quic", "mqtt-quic", "mqtt+quic")
_PLAIN = ("mqtt", "ws")
_SCHEMES: Mapping[Carrier, tuple[str, str]] = {
    "quic": ("quic", "quic"),
    "tcp": ("mqtt", "mqtts"),
    "websocket": ("ws", "wss"),
}
_ORDER = (
    "endpoints",
    "auth",
    "device_id",
    "client_id",
    "tls",
    "keepalive",
    "clean_session",
    "connect_timeout",
)
_ENCRYPT = f'Write "tls": {{ "enabled": true }} into {CONFIG_FILE}, with the port for it'
SECURED = {
    "host": _ENCRYPT,
    "TESAIOT_HOST": _ENCRYPT,
    "tls.verify_server": "Write true",
    "tls.version": 'Write "1.3"',
}
"""What to write for a security policy, by the bundle's own keys; the others are as in TOML."""
_PORTS = {"wss": 8085, "ws": 8085}
"""Where the platform has another port than the scheme."""


@attrs.frozen
class Setting:
    """One value that a bundle gives to a connection."""

    key: str
    """In the connection's table: "endpoints[0]", "auth.password", "tls.ca_file". `device_id` is in
    none: it is for those who speak as the device."""
    value: Any = attrs.field(repr=False)
    """As it would stand in TOML. Of a secret in `.env` it is where to read it, at each connect."""
    origin: str
    """Where it came from."""
    secret: bool = False
    """Whether it is not to be shown."""
    given: bool = True
    """False: it holds because nothing else was said, and is no part of the table."""
    path: Path = attrs.field(default=(), repr=False)
    found: Found | None = attrs.field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """The value for people."""
        if self.secret:
            return "***"
        text = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        return text if text.isprintable() else text.encode("unicode_escape").decode()


@attrs.frozen
class Bundle:
    """A bundle, read."""

    folder: FilePath
    settings: tuple[Setting, ...]
    warnings: tuple[Problem, ...] = ()
    left_out: tuple[Attempt, ...] = ()
    """Endpoints that its login keeps from taking part."""

    @property
    def device_id(self) -> str:
        """The device that the bundle is for, "" for an organisation's."""
        return next((str(one.value) for one in self.settings if one.key == "device_id"), "")

    def table(self) -> dict[str, Any]:
        """The connection's table: endpoints, auth, tls, client_id, keepalive, and so on."""
        made: dict[str, Any] = {}
        for setting in self.settings:
            if setting.given:
                _put(made, setting)
        return made


def read_bundle(
    folder: str | os.PathLike[str],
    environ: Mapping[str, str] = os.environ,
    *,
    given: Mapping[str, Any] | None = None,
) -> Bundle:
    """Read a bundle. Raises ConfigError with every problem there is, each with its file and key.

    `given` is a connection's table: what it has counts before the bundle, which then does not
    need to have it.
    """
    files = BundleFiles(FilePath(folder).expanduser().absolute(), environ)
    reader = _Reader(files, given or {})
    if not files.problems:  # what else there would be to say follows from these
        reader.read()
    if files.problems:
        raise ConfigError(sorted(files.problems, key=lambda one: (one.file, one.line)))
    return Bundle(files.folder, tuple(reader.settings), tuple(files.warnings), tuple(reader.left_out))


def lay_under(doc: Document, path: Path, table: dict[str, Any], folder: FilePath) -> Bundle:
    """Fill a connection's table, at `path` of the document, with what only its bundle has.

    Raises ConfigError.
    """
    bundle = read_bundle(folder, doc.environ, given=table)
    for setting in bundle.settings:
        if setting.given:
            _put(table, setting)
            found = setting.found
            if found is not None and found.file:
                doc.came_from((*path, *setting.path), found.file, found.line, found.key)
    return bundle


def _put(table: dict[str, Any], setting: Setting) -> None:
    first, *rest = setting.path
    if not rest:
        table[str(first)] = setting.value
    elif isinstance(rest[0], int):
        table.setdefault(str(first), []).append(setting.value)
    else:
        table.setdefault(str(first), {})[rest[0]] = setting.value


class _Reader:
    """Decides what each setting of one bundle is, beside what a TOML table has."""

    def __init__(self, files: BundleFiles, given: Mapping[str, Any]) -> None:
        self.settings: list[Setting] = []
        self.left_out: list[Attempt] = []
        self._files = files
        self._folder = files.folder
        self._given = given

    def read(self) -> None:
        kind = self._auth()
        self._device(kind)
        if self._endpoints(mtls=kind == "mtls"):
            self._tls()
        self._options()
        self.settings.sort(key=lambda one: _ORDER.index(dotted(one.path[:1]) or one.key.partition(".")[0]))

    def _set(self, path: Path, found: Found, *, value: Any = None, secret: bool = False) -> None:
        value = found.value if value is None else value
        if isinstance(value, str):
            value = Text.make(value, written="***" if secret else value, folder=self._folder)
        self.settings.append(Setting(dotted(path), value, found.origin, secret, True, path, found))

    def _default(self, key: str, value: Any, origin: str = "default") -> None:
        self.settings.append(Setting(key, value, origin, given=False))

    def _has(self, *path: str) -> bool:
        """Whether the TOML table has a key, so that the bundle's does not count."""
        at: Any = self._given
        for part in path:
            if not isinstance(at, Mapping):
                return True  # a mistake there, which is reported there
            if part not in at:
                return False
            at = at[part]
        return True

    # --- auth -----------------------------------------------------------------------------

    def _auth(self) -> str:
        """The type of the connection's auth, "" for none; the settings that the bundle has of it."""
        fill = {"password": self._password, "token": self._token, "mtls": self._certificate}
        given = self._given.get("auth", {})
        chosen = given.get("type") if isinstance(given, Mapping) else "?"
        kind, found = self._kind()
        if chosen is not None:
            kind = str(chosen)
        elif kind in fill:
            self._set(("auth", "type"), found, value=kind)
        elif kind == "none" and not given:
            self._default("auth", "none", found.origin)
        elif not kind:
            what = "the bundle has no credentials: neither MQTT_API_TOKEN nor TESAIOT_PASSWORD is set"
            fix = f"Write one of them into {self._folder / ENV_FILE}, or set it in the environment"
            self._files.missing("auth", what, fix)
        fill.get(kind, lambda: None)()
        return "" if kind == "none" else kind

    def _kind(self) -> tuple[str, Found]:
        method, mode = self._files.config("auth.method"), self._files.config("tls.verify_mode")
        if mode is not None and mode.value == "mutual":
            return "mtls", mode
        if method is not None:
            return METHODS[method.value], method
        found = self._files.config("auth.password") or self._files.variable(
            "MQTT_API_TOKEN", "TESAIOT_PASSWORD"
        )
        if found is None:
            return "", Found("", "default")
        return "token" if found.key == "MQTT_API_TOKEN" else "password", found

    def _password(self) -> None:
        name, password = self._login()
        if not self._has("auth", "username"):
            if name is None:
                self._lost("auth.username", "username", "TESAIOT_DEVICE_ID")
            else:
                self._set(("auth", "username"), name)
        if not self._has("auth", "password"):
            if password is None:
                self._lost("auth.password", "password", "TESAIOT_PASSWORD")
            else:
                self._secret(("auth", "password"), password)

    def _login(self) -> tuple[Found | None, Found | None]:
        """Username and password, as far as the bundle has them."""
        files = self._files
        name = files.config("auth.username") or files.config("device_id")
        password = files.config("auth.password") or files.variable("TESAIOT_PASSWORD")
        return name or files.variable("TESAIOT_DEVICE_ID"), password

    def _token(self) -> None:
        if not self._has("auth", "token"):
            token = self._files.variable("MQTT_API_TOKEN")
            if token is None:
                self._lost("auth", "token", "MQTT_API_TOKEN")
            else:
                self._secret(("auth", "token"), token)

    def _secret(self, path: Path, found: Found) -> None:
        """One in `.env` is left there: it is read at each connect, so it may be changed."""
        if found.file == str(self._folder / ENV_FILE):
            kept = Text.make(found.file, written=found.file, folder=self._folder)
            self._set(path, found, value={"file": kept, "variable": found.key}, secret=True)
        else:
            self._set(path, found, secret=True)

    def _lost(self, key: str, what: str, name: str) -> None:
        env = self._folder / ENV_FILE
        where = f"Write {name}=... into {env}, or set it in the environment"
        if name == "MQTT_API_TOKEN":
            where += "; tokens are made in the platform's Admin UI, Organization Settings, MQTT Tokens"
        else:
            where += "; it is in the bundle that the platform gave out for the device"
        self._files.missing(key, f"the bundle has no {what}", where)

    def _certificate(self) -> None:
        if not self._has("auth", "certificate") and not self._has("auth", "pkcs12"):
            for key, name in (("certificate", CERTIFICATE), ("key", KEY)):
                file = self._folder / name
                if _is_file(file):
                    self._set(("auth", key), Found(str(file), name, str(file)))
                else:
                    what = "is needed to log in with a certificate, and is not in the bundle"
                    self._files.say(str(file), 0, "", what, DOWNLOAD)
        mode, method = self._files.config("tls.verify_mode"), self._files.config("auth.method")
        mutual = mode is not None and mode.value == "mutual"
        if (
            mutual
            and method is not None
            and METHODS[method.value] == "password"
            and None not in self._login()
        ):
            self._password()  # the platform wants both

    def _device(self, kind: str) -> None:
        for_device = kind in ("password", "mtls")
        login = self._files.config("auth.username") if for_device else None
        name = self._files.config("device_id") or login or self._files.variable("TESAIOT_DEVICE_ID")
        if name is not None:
            self.settings.append(Setting("device_id", name.value, name.origin, given=False))
        if self._has("client_id"):
            return
        own = self._files.config("client_id") or (name if for_device else None)
        if own is not None:
            self._set(("client_id",), own)
        else:
            self._default("client_id", "a random one")

    # --- endpoints and trust --------------------------------------------------------------

    def _endpoints(self, *, mtls: bool) -> bool:
        """Whether any of the endpoints is encrypted."""
        if self._has("endpoints"):
            own = self._given["endpoints"]
            urls = [one.get("url") if isinstance(one, Mapping) else one for one in _listed(own)]
            return any(_scheme(url) not in _PLAIN for url in urls)
        found = self._addresses()
        kept = [one for one in found if not (mtls and _scheme(one.value) in _QUIC)]
        for one in found:
            if one not in kept:
                why, fix = "QUIC takes no client certificate here", "TLS 8883 does"
                what = f"{one.value} is left out: {why}"
                self._files.warnings.append(Problem(one.file, one.line, one.key, what, fix))
                self.left_out.append(Attempt(str(one.value), "left out", reason=why, fix=fix))
        if found and not kept:
            what = "the bundle has QUIC endpoints alone, and a client certificate needs mqtts:// or wss://"
            self._files.wrong("endpoints", what, 'Add endpoints = ["mqtts://<host>:8883"] beside `bundle`')
        for index, one in enumerate(kept):
            self._set(("endpoints", index), one)
        return any(_scheme(one.value) not in _PLAIN for one in kept)

    def _addresses(self) -> list[Found]:
        listed = self._files.config("endpoints")
        if listed is not None:
            parts = [
                attrs.evolve(listed, value=url, line=self._files.lines.get(("endpoints", index), listed.line))
                for index, url in enumerate(listed.value)
            ]
            return [one for one in parts if self._is_url(one)]
        found = self._files.config("host") or self._files.variable("MQTT_BROKER_URL", "TESAIOT_HOST")
        if found is None:
            what = "the bundle does not say where the broker is: `host` is missing, and MQTT_BROKER_URL too"
            self._files.missing("host", what, DOWNLOAD)
            return []
        if found.key == "MQTT_BROKER_URL":
            return [found] if self._is_url(found) else []
        return self._from_host(found)

    def _from_host(self, host: Found) -> list[Found]:
        if not _is_host(host.value):
            fix = 'Write the name alone: "tesaiot.com"; `transport` and `port` say the rest'
            shown = "what stands before the @" if "@" in host.value else show(host.value)  # a password?
            self._files.say(host.file, host.line, host.key, f"{shown} is not the name of a host", fix)
            return []
        transport, protocol = self._files.config("transport"), self._files.config("protocol")
        enabled, port, path = (
            self._files.config("tls.enabled"),
            self._files.config("port"),
            self._files.config("path"),
        )
        carrier: Carrier = "quic"
        if transport is not None:
            carrier = TRANSPORTS[transport.value]
        elif protocol is not None:
            carrier = PROTOCOLS[protocol.value]
        encrypted = enabled is None or enabled.value
        if carrier == "quic" and not encrypted:
            self._files.wrong("tls.enabled", "QUIC is always encrypted", 'Write true, or another "transport"')
            return []
        scheme = _SCHEMES[carrier][encrypted]
        number = port.value if port is not None else _PORTS.get(scheme, 0)
        way = ""
        if carrier == "websocket":
            way = "/" + (path.value.lstrip("/") if path is not None else "mqtt")
        name = host.value.strip("[]")
        parts = [one.key for one in (transport or protocol, host, port, path) if one is not None and one.key]
        source = (
            host.origin.partition(":")[0] + ": " + ", ".join(parts) if host.key == "host" else host.origin
        )
        first = attrs.evolve(host, value=Url(scheme, name, number, way).reveal(), origin=source)
        if carrier != "quic":
            return [first]
        fallback = Found(str(Url("mqtts", name, 8883)), "default: where QUIC does not get through")
        return [first, fallback]

    def _is_url(self, found: Found) -> bool:
        try:
            Url.parse(found.value)
        except ValueError as error:
            text = str(error)
            if "@" in found.value:  # it may hold a password
                text = "a URL must not hold credentials: those are in `auth`, or in .env"
            fix = 'Write "scheme://host:port", for example "mqtts://tesaiot.com:8883"'
            self._files.say(found.file, found.line, found.key, text, fix)
            return False
        return True

    def _tls(self) -> None:
        version, verify = self._files.config("tls.version"), self._files.config("tls.verify_server")
        if not self._has("tls", "ca_file"):
            self._authorities()
        if not self._has("tls", "minimum_version"):
            if version is not None:
                self._set(("tls", "minimum_version"), version)
            else:
                self._default("tls.minimum_version", "1.2")
        if self._has("tls", "verify"):
            return
        if verify is None or verify.value:
            self._default("tls.verify", "full", verify.origin if verify else "default")
        elif str(self._given.get("tls", {}).get("insecure", False)).lower() == "true":
            self._set(("tls", "verify"), verify, value="none")
        else:
            what = "the server is not to be verified, so that anybody may pose as the platform"
            fix = "Write true; where it is really meant, add tls = { insecure = true } beside `bundle`"
            self._files.wrong("tls.verify_server", what, fix)

    def _authorities(self) -> None:
        named = self._files.config("tls.ca_file")
        name = named.value if named is not None else CA_FILE
        file = self._folder / name
        with contextlib.suppress(RuntimeError):  # no such user
            file = self._folder / FilePath(name).expanduser()
        if _is_file(file):
            found = named or Found(name, f"default: {CA_FILE} of the bundle", str(file))
            self._set(("tls", "ca_file"), found, value=str(file))
        elif named is not None:
            self._files.wrong("tls.ca_file", f"there is no file {file}", DOWNLOAD)
        else:
            self._default("tls.ca_file", "the operating system's")

    def _options(self) -> None:
        for key, default in (("keepalive", "60s"), ("clean_session", False), ("connect_timeout", "10s")):
            found = self._files.config(f"connection.{key}")
            if self._has(key):
                continue
            if found is None:
                self._default(key, default)
            elif isinstance(found.value, bool):
                self._set((key,), found)
            else:
                self._set((key,), found, value=f"{found.value:g}s")


def _is_file(file: FilePath) -> bool:
    try:
        return file.is_file()
    except OSError:  # its name is too long, or it is out of reach
        return False


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _scheme(url: Any) -> str:
    return url.partition("://")[0].lower() if isinstance(url, str) else ""


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return text.isprintable() and not any(sign in text for sign in " %,/:?#@[]\\")
    return True
