"""The bundles that the sandbox hands out, as the platform does.

Owns: the files of `devices/<id>/` and `organisation/` and their words. Rules: each bundle is whole:
what it says works when it is pasted, from any folder; a secret is in its `.env` alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write
from .folder import Device, Estate, Organisation

Urls = Mapping[str, str]
"""Where the platform is reached, best first."""


def write_bundles(estate: Estate, urls: Urls) -> None:
    """Write all bundles anew, for these addresses. Raises ConnectorError."""
    for device in estate.devices:
        _write(device.folder, _device_files(estate, device, urls))
    for organisation in estate.organisations:
        _write(organisation.folder, _organisation_files(organisation, urls))


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        write(folder / name, text, secret=name == ".env")


def host_of(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].rpartition(":")[0]


def _config(urls: Urls, first: str, auth: dict[str, Any], **more: Any) -> str:
    url = urls[first]
    config = {
        "protocol": url.partition("://")[0] if first == "wss" else "mqtts",
        "host": host_of(url),
        "port": int(url.partition("://")[2].partition("/")[0].rpartition(":")[2]),
        "transport": first,
        **more,
        "tls": {
            "enabled": True,
            "version": "1.3",
            "ca_file": "ca-chain.pem",
            "verify_server": True,
            "verify_mode": "server-only",
        },
        "auth": auth,
        "connection": {"keepalive": 60, "clean_session": True, "connect_timeout": 10},
    }
    return json.dumps(config, indent=2) + "\n"


def _env(names: Sequence[str], values: Sequence[str]) -> str:
    return "".join(f"{name}={_quoted(value)}\n" for name, value in zip(names, values, strict=True))


def _quoted(value: str) -> str:
    """As `.env` files have it where a value holds what ends it, or begins a comment there."""
    if value.startswith("<") or not set(value) & set(" \t#'\"\\"):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# --- a device's ---------------------------------------------------------------------------


def _device_files(estate: Estate, device: Device, urls: Urls) -> dict[str, str]:
    first = next(iter(urls))
    auth = {"method": "username_password", "username": device.name}
    endpoints = [urls[name] for name in ("quic", "tls") if name in urls] or list(urls.values())
    names = ("TESAIOT_HOST", "TESAIOT_DEVICE_ID", "TESAIOT_PASSWORD")
    host = host_of(urls[first])
    return {
        "mqtt-quic-config.json": _config(
            urls, first, auth, device_id=device.name, client_id=device.name, endpoints=endpoints
        ),
        ".env": _env(names, (host, device.name, device.password)),
        ".env.example": _env(names, (host, "<device id>", "<its password>")),
        "QUICKSTART.md": _device_quickstart(estate, device, urls, endpoints[0]),
    }


def _device_quickstart(estate: Estate, device: Device, urls: Urls, url: str) -> str:
    text = f"""\
# {device.name}

A device of {device.organisation}, on the sandbox, which must be running:

```sh
{start_command(estate.folder)}
```

## Send telemetry, from the command line

```sh
{publish_command(device, url)}
```

## Send telemetry, from Python

```python
from tesaiot_connect import MQTTQUICClient

with MQTTQUICClient({_python(device.folder)}) as device:
    device.publish_telemetry({{"temperature": 25.5, "humidity": 55.3}})
```

It goes to `devices/{device.name}/telemetry` as `{{"timestamp": "...", "data": {{...}}}}`; the platform
delivers each reading on `device/{device.name}/telemetry/<sensor>` too.

## Read it

```sh
{subscribe_command(_organisation(estate, device), urls)}
```
"""
    if estate.certificates and "tls" in urls:
        text += f"""
## With the client certificate instead of the password

```sh
{certificate_command(device, urls["tls"])}
```
"""
    return text


def _organisation(estate: Estate, device: Device) -> Organisation:
    return next(one for one in estate.organisations if one.name == device.organisation)


# --- an organisation's --------------------------------------------------------------------

_PIPELINE = """\
# Everything that the devices of {name} send, into SQLite: tesaiot-connect run pipeline.toml

[connections.platform]
bundle = "."
client_id = "{name}-archive"
clean_session = false   # what is sent while this does not run waits at the platform

# device/<id>/telemetry/<sensor>: {{"value": 25.5, "unit": "celsius", "timestamp": "..."}}
[sources.readings]
type = "mqtt"
connection = "platform"
subscribe = ["device/+/telemetry/#"]
topic_fields = "device/{{device_id}}/telemetry/{{sensor_type}}"

[sinks.archive]
type = "sqlite"
path = "telemetry.db"

[pipelines.archive]
from = "readings"
to = ["archive"]
"""


def _organisation_files(organisation: Organisation, urls: Urls) -> dict[str, str]:
    url = reading_url(urls)
    first = next(name for name in urls if urls[name] == url)
    names = ("MQTT_API_TOKEN", "MQTT_BROKER_URL")
    return {
        "mqtt-quic-config.json": _config(urls, first, {"method": "token"}),
        ".env": _env(names, (organisation.token, url)),
        ".env.example": _env(names, ("tesa_mqtt_<organisation>_<32 characters>", url)),
        "pipeline.toml": _PIPELINE.format(name=organisation.name),
        "QUICKSTART.md": _organisation_quickstart(organisation, urls),
    }


def reading_url(urls: Urls) -> str:
    """Where organisations read: WSS, as the platform has it, or what there is."""
    return next(urls[name] for name in ("wss", "tls", "quic") if name in urls)


def _organisation_quickstart(organisation: Organisation, urls: Urls) -> str:
    return f"""\
# {organisation.name}

An organisation on the sandbox, with {len(organisation.devices)} devices. The sandbox must be running:

```sh
{start_command(organisation.folder.parent)}
```

## Watch what its devices send

```sh
{subscribe_command(organisation, urls)}
```

## Store it, from the command line

```sh
{run_command(organisation)}
```

The rows are in `{organisation.folder / "telemetry.db"}`, table `telemetry`. What the connection is made of:

```sh
{_command("bundle", "show", organisation.folder)}
```

## Read it, from Python

```python
from tesaiot_connect import TESAIoTMQTTClient


class Dashboard(TESAIoTMQTTClient):
    def process_telemetry(self, device_id, sensor_type, data):
        print(device_id, sensor_type, data["value"], data["unit"])


Dashboard({_python(organisation.folder)}).run_forever()
```
"""


# --- commands that can be pasted ----------------------------------------------------------


def _command(*words: str | Path) -> str:
    return shlex.join(["tesaiot-connect", *map(str, words)])


def _python(path: Path) -> str:
    """As a string of a Python program, where a character outside the BMP is one."""
    return json.dumps(str(path), ensure_ascii=False)


def start_command(folder: Path) -> str:
    return _command("sandbox", folder)


def publish_command(device: Device, url: str) -> str:
    payload = '{"data": {"temperature": 25.5, "humidity": 55.3}}'
    topic = f"devices/{device.name}/telemetry"
    return _command("pub", url, topic, payload, "--set", f"bundle={device.folder}")


def certificate_command(device: Device, url: str) -> str:
    own = ("--set", f"bundle={device.folder}", "--set", "auth.type=mtls")
    return _command("pub", url, f"devices/{device.name}/telemetry", '{"data": {"temperature": 26.5}}', *own)


def subscribe_command(organisation: Organisation, urls: Urls) -> str:
    return _command(
        "sub", reading_url(urls), "device/+/telemetry/#", "--set", f"bundle={organisation.folder}"
    )


def run_command(organisation: Organisation) -> str:
    return _command("run", organisation.folder / "pipeline.toml")


def next_steps(estate: Estate, urls: Urls) -> list[tuple[str, str]]:
    """What to try, in order: words and command."""
    organisation, device = estate.organisations[0], estate.devices[0]
    url = next(iter(urls.values()))
    steps = [
        ("see what the organisation's devices send", subscribe_command(organisation, urls)),
        (f"be {device.name}", publish_command(device, url)),
        ("store everything in telemetry.db, beside the file", run_command(organisation)),
    ]
    if estate.certificates and "tls" in urls:
        words = f"be {device.name}, with its certificate"
        steps.insert(2, (words, certificate_command(device, urls["tls"])))
    return steps
