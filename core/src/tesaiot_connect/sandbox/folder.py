"""What is in a sandbox's folder: made where it is missing, used where it is there.

Owns: the layout of DIR and the order in which it comes to be. Rules: a second start changes
nothing that a client holds; what is damaged is named; devices are added, never removed.

    platform.toml            a file for `serve`; written at each start
    broker.db                sessions and queues
    ca/ server.pem server.key
    users tokens             accounts, hashed
    organisations.toml       which devices are whose
    devices/<id>/            a bundle for each device, with its client certificate
    organisation/            a bundle for the organisation; of further ones organisation-<name>/
"""

from __future__ import annotations

import json
import re
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
    missing: tuple[str, ...]
    """Why there is no other."""


def prepare(options: SandboxOptions, catalog: Catalog) -> Estate:
    """Make what is missing, and the file for `serve`. Raises ConnectorError, naming the file."""
    folder = options.folder.absolute()
    ways, missing = _ways(catalog)
    authority = Authority(folder / "ca")
    names = ["localhost", "127.0.0.1", "::1"]
    names += [options.host] if options.host not in (*names, "0.0.0.0", "::") else []  # noqa: S104 - compared
    authority.server(folder / "server.pem", folder / "server.key", names)
    owned = _organisations(folder / "organisations.toml", options)

    known = {
        device: (organisation, _secret(folder / "devices" / device / ".env", "TESAIOT_PASSWORD"))
        for organisation, devices in owned.items()
        for device in devices
    }
    passwords = accounts.passwords(catalog, folder / "users", known)
    devices: list[Device] = []
    for name, (organisation, _) in known.items():
        place = folder / "devices" / name
        authority.client(place / "client.pem", place / "client.key", name, organisation)
        write(place / "ca-chain.pem", authority.ca_file.read_bytes())
        devices.append(Device(name=name, organisation=organisation, folder=place, password=passwords[name]))
    organisations: list[Organisation] = []
    for name, members in owned.items():
        place = folder / ("organisation" if not organisations else f"organisation-{name}")
        token = accounts.token(catalog, folder / "tokens", name, _secret(place / ".env", "MQTT_API_TOKEN"))
        write(place / "ca-chain.pem", authority.ca_file.read_bytes())
        organisations.append(Organisation(name=name, devices=members, folder=place, token=token))
    write(folder / "platform.toml", _platform(options, ways, catalog))
    return Estate(
        folder=folder,
        ca_file=authority.ca_file,
        organisations=tuple(organisations),
        devices=tuple(devices),
        ways=ways,
        missing=missing,
    )


def _ways(catalog: Catalog) -> tuple[tuple[Way, ...], tuple[str, ...]]:
    ways: list[Way] = []
    missing: list[str] = []
    for way in WAYS:
        try:
            catalog.transports(way.scheme)
        except PluginError as error:
            missing.append(f"no {way.scheme}://: {error}")
        else:
            ways.append(way)
    if not ways:
        raise PluginError("; ".join(missing))
    return tuple(ways), tuple(missing)


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
        if not _ORGANISATION.match(name):
            raise ConnectorError(
                f"{name!r} cannot be the name of an organisation",
                fix="use lower case letters, digits, - and _, as in acme",
            )
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


_PLATFORM = """\
# The sandbox's broker, as a file for `tesaiot-connect serve`. `tesaiot-connect sandbox` writes it anew
# at each start: change a copy. `serve` brings neither the routing of readings nor simulated devices.

[broker]
state_file = "broker.db"

# What no rule allows is forbidden.
[access]
organisations_file = "organisations.toml"

# A device: its own telemetry and its own commands.
[[access.rules]]
publish = ["devices/{username}/#"]
subscribe = ["devices/{username}/commands/#"]

# An organisation's token: what its devices send, and commands to them.
[[access.rules]]
principals = ["token:*"]
publish = ["devices/{device}/commands/#"]
subscribe = ["device/{device}/telemetry/#", "devices/{device}/telemetry"]
"""

_ACCOUNTS = {"mtls": "", "token": ', file = "tokens"', "password": ', file = "users"'}
"""In the order in which they are asked."""


def _platform(options: SandboxOptions, ways: Sequence[Way], catalog: Catalog) -> str:
    known = catalog.names("authenticator")
    text = _PLATFORM
    for way in ways:
        # QUIC knows no client certificates
        kinds = [kind for kind in _ACCOUNTS if kind in known and (kind != "mtls" or way.name != "quic")]
        auth = "\n".join(f'  {{ type = "{kind}"{_ACCOUNTS[kind]} }},' for kind in kinds)
        clients = "" if way.name == "quic" else ', ca_file = "ca/ca.pem", client_certificate = "optional"'
        text += (
            f'\n[listeners.{way.name}]\nscheme = "{way.scheme}"\nhost = {json.dumps(options.host)}\n'
            f"port = {options.port(way)}\n"
            f'server_tls = {{ certificate = "server.pem", key = "server.key"{clients} }}\n'
            f"auth = [\n{auth}\n]\n"
        )
    return text
