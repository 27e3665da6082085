"""What is in a sandbox's folder: made where it is missing, used where it is there.

Owns: the layout of DIR and the order in which it comes to be. Rules: a second start changes
nothing that a client holds; what is damaged is named; devices are added, never removed.

    sandbox.lock             held while one runs
    platform.toml            a file for `serve`; written at each start
    broker.db                sessions and queues
    ca/ server.pem server.key
    users tokens             accounts, hashed
    organisations.toml       which devices are whose
    devices/<id>/            a bundle for each device, with its client certificate
    organisation/            a bundle for the organisation; of further ones organisation-<name>/
"""

from __future__ import annotations

import ipaddress
import json
import re
import threading
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from ..errors import ConfigError, ConnectorError, PluginError
from ..plugins import Catalog
from . import accounts
from .certificates import Authority
from .files import damaged, read, write

_ORGANISATION = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
"""It is a folder, a level of a topic, and a name in certificate and password file."""
_OWN = {"sandbox.lock", "ca", "organisations.toml"}
"""One of them is in every folder that the sandbox has begun."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")


@attrs.frozen(kw_only=True)
class Way:
    """One way in that the platform has."""

    name: str
    scheme: str
    port: int
    """The usual one."""
    path: str = ""


WAYS = (
    Way(name="quic", scheme="quic", port=14567),
    Way(name="tls", scheme="mqtts", port=8883),
    Way(name="wss", scheme="wss", port=8085, path="/mqtt"),
)
"""Best first."""


@attrs.frozen(kw_only=True)
class SandboxOptions:
    """What a sandbox is asked to be."""

    folder: Path = attrs.field(converter=Path)
    devices: int = attrs.field(default=3, validator=[attrs.validators.ge(1), attrs.validators.le(1000)])
    """Of each organisation, at least; those that are there stay."""
    organisations: tuple[str, ...] = ("acme",)
    host: str = "127.0.0.1"
    ports: Mapping[str, int] = attrs.field(factory=dict)
    """Way in ("tls") to port, 0 is any free one. Default: the platform's."""

    def port(self, way: Way) -> int:
        return self.ports.get(way.name, way.port)


@attrs.frozen(kw_only=True)
class Device:
    """A device's account. `folder` is its bundle."""

    name: str
    organisation: str
    folder: Path
    password: str = attrs.field(repr=lambda _: "***")


@attrs.frozen(kw_only=True)
class Organisation:
    """An organisation with its token. `folder` is its bundle."""

    name: str
    devices: tuple[str, ...]
    folder: Path
    token: str = attrs.field(repr=lambda _: "***")


@attrs.frozen(kw_only=True)
class Estate:
    """Everything that there is in the folder."""

    folder: Path
    ca_file: Path
    organisations: tuple[Organisation, ...]
    devices: tuple[Device, ...]
    ways: tuple[Way, ...]
    """Those whose plugin is installed, best first."""
    certificates: bool
    """Whether clients may come with a certificate."""
    missing: tuple[str, ...]
    """Why there is no more: in words."""


def prepare(options: SandboxOptions, catalog: Catalog, stop: threading.Event | None = None) -> Estate:
    """Make what is missing, and the file for `serve`. The folder must be ours (`files.alone`).

    Raises ConnectorError, naming the file; also when `stop` is set before everything is there.
    """
    folder = options.folder.absolute()
    check_own(folder)
    _check(options, folder)
    platform = folder / "platform.toml"
    ways, certificates, missing = _possible(catalog)
    authority = Authority(folder / "ca")
    names = ["localhost", "127.0.0.1", "::1"]
    names += [options.host] if options.host not in (*names, "0.0.0.0", "::") else []  # noqa: S104 - compared
    authority.server(folder / "server.pem", folder / "server.key", names)
    owned = _organisations(folder / "organisations.toml", options)

    users = folder / "users"
    there = accounts.names(users)
    devices: list[Device] = []
    for organisation, name in ((owner, name) for owner, members in owned.items() for name in members):
        if stop is not None and stop.is_set():
            raise ConnectorError(f"{folder} is not complete", fix="start the sandbox again: it goes on")
        place = folder / "devices" / name
        password = _secret(place / ".env", "TESAIOT_PASSWORD")
        if password is None or name not in there:
            password = accounts.add_password(catalog, users, name, organisation, password)
        authority.client(place / "client.pem", place / "client.key", name, organisation)
        write(place / "ca-chain.pem", authority.ca_file.read_bytes())
        devices.append(Device(name=name, organisation=organisation, folder=place, password=password))
    organisations: list[Organisation] = []
    for name, members in owned.items():
        place = folder / ("organisation" if not organisations else f"organisation-{name}")
        token = accounts.token(catalog, folder / "tokens", name, _secret(place / ".env", "MQTT_API_TOKEN"))
        write(place / "ca-chain.pem", authority.ca_file.read_bytes())
        organisations.append(Organisation(name=name, devices=members, folder=place, token=token))
    write(platform, _platform(options, ways, certificates=certificates))
    return Estate(
        folder=folder,
        ca_file=authority.ca_file,
        organisations=tuple(organisations),
        devices=tuple(devices),
        ways=ways,
        certificates=certificates,
        missing=missing,
    )


def check_own(folder: Path) -> None:
    """Raises ConnectorError where the folder holds what is not the sandbox's."""
    fix = "give the sandbox a folder of its own"
    platform = folder / "platform.toml"
    written = read(platform)
    if written is not None:
        if not written.startswith(_TITLE):
            raise ConnectorError(f"{platform} is not the sandbox's, which would write its own there", fix=fix)
        return
    try:
        there = {one.name for one in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConnectorError(f"{folder} cannot be used: {error.strerror or error}", fix=fix) from error
    if there and not there & _OWN:
        raise ConnectorError(f"{folder} holds other things, such as {min(there)}", fix=fix)


def _check(options: SandboxOptions, folder: Path) -> None:
    """Whether what is asked for can stand in certificates, topics and files."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ConnectorError(
            f"the name of the folder {str(folder)!a} is not UTF-8", fix="give it another name"
        ) from error
    try:
        ipaddress.ip_address(options.host)
    except ValueError as error:
        if not _HOST.match(options.host):
            raise ConnectorError(
                f"{options.host!r} is no address to listen on", fix="use an IP address or a host name"
            ) from error
    for name in options.organisations:
        if not _ORGANISATION.match(name):
            raise ConnectorError(
                f"{name!r} cannot be the name of an organisation",
                fix="use lower case letters, digits, - and _, as in acme",
            )


def _possible(catalog: Catalog) -> tuple[tuple[Way, ...], bool, tuple[str, ...]]:
    """The ways in, whether certificates are taken, and why there is no more. Raises PluginError
    where nobody could come in."""
    ways: list[Way] = []
    missing: list[str] = []
    for way in WAYS:
        try:
            catalog.listeners(way.scheme)
        except PluginError as error:
            missing.append(f"no {way.scheme}://: {error}")
        else:
            ways.append(way)
    if not ways:
        raise PluginError("; ".join(missing))
    for kind in ("password", "token"):
        catalog.get("authenticator", kind)
    try:
        catalog.get("authenticator", "mtls")
    except PluginError as error:
        missing.append(f"no client certificates: {error}")
        return tuple(ways), False, tuple(missing)
    return tuple(ways), True, tuple(missing)


def _organisations(file: Path, options: SandboxOptions) -> dict[str, tuple[str, ...]]:
    """Organisation to its devices: those of the file, and those that are asked for beyond."""
    owned: dict[str, list[str]] = {}
    try:
        for name, devices in tomllib.loads(read(file) or "").items():
            if not _ORGANISATION.match(name):
                raise damaged(file, f"{name!r} cannot be the name of an organisation")
            if not isinstance(devices, list):
                raise damaged(file, f'{name} is not an array of device names: write {name} = ["device-1"]')
            for device in devices:
                if not isinstance(device, str) or not _DEVICE.match(device):
                    raise damaged(file, f"{device!r} of {name} cannot be the name of a device")
            owned[name] = devices
    except tomllib.TOMLDecodeError as error:
        raise damaged(file, str(error)) from error
    taken = [device for devices in owned.values() for device in devices]
    if len(set(taken)) < len(taken):
        twice = next(device for device in taken if taken.count(device) > 1)
        raise damaged(file, f"{twice} stands there twice")
    number = 0
    for name in options.organisations:
        mine = owned.setdefault(name, [])
        while len(mine) < options.devices:
            number += 1
            if (device := f"device-{number}") not in taken:
                mine.append(device)
    lines = ["# Organisation to its devices: they are what {device} stands for in platform.toml."]
    lines += [f"{name} = {json.dumps(devices)}" for name, devices in owned.items()]
    write(file, "\n".join((*lines, "")))
    return {name: tuple(devices) for name, devices in owned.items()}


def _secret(file: Path, name: str) -> str | None:
    """A value of a bundle's `.env`, None where there is none."""
    from ..config.document import read_env_file

    if not file.exists():
        return None
    try:
        return read_env_file(file).get(name)
    except ConfigError as error:
        raise damaged(file, error.problems[0].message) from error


_TITLE = "# The sandbox's broker, as a file for `tesaiot-connect serve`."
_PLATFORM = f"""\
{_TITLE} `tesaiot-connect sandbox` writes it anew
# at each start: change a copy. `serve` brings neither the routing of readings nor simulated devices.

[broker]
state_file = "broker.db"

# What no rule allows is forbidden.
[access]
organisations_file = "organisations.toml"

# A device: its own telemetry and its own commands.
[[access.rules]]
publish = ["devices/{{username}}/#"]
subscribe = ["devices/{{username}}/commands/#"]

# An organisation's token: what its devices send, and commands to them.
[[access.rules]]
principals = ["token:*"]
publish = ["devices/{{device}}/commands/#"]
subscribe = ["device/{{device}}/telemetry/#", "devices/{{device}}/telemetry"]
"""

_ACCOUNTS = {"mtls": "", "token": ', file = "tokens"', "password": ', file = "users"'}
"""Authenticators and their settings, in the order in which they are asked."""


def _platform(options: SandboxOptions, ways: Sequence[Way], *, certificates: bool) -> str:
    text = _PLATFORM
    for way in ways:
        shown = certificates and way.name != "quic"  # QUIC knows no client certificates
        kinds = [kind for kind in _ACCOUNTS if kind != "mtls" or shown]
        auth = "\n".join(f'  {{ type = "{kind}"{_ACCOUNTS[kind]} }},' for kind in kinds)
        clients = ', ca_file = "ca/ca.pem", client_certificate = "optional"' if shown else ""
        text += (
            f'\n[listeners.{way.name}]\nscheme = "{way.scheme}"\nhost = {json.dumps(options.host)}\n'
            f"port = {options.port(way)}\n"
            f'server_tls = {{ certificate = "server.pem", key = "server.key"{clients} }}\n'
            f"auth = [\n{auth}\n]\n"
        )
    return text
