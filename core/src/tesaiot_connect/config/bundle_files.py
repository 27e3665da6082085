"""The files of a bundle, and what stands in them.

Owns: reading `mqtt-quic-config.json` and `.env`, and which keys there may be. Rule: every value comes
with its place, and what is wrong is said of the file and key where it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Literal

import attrs

from ..errors import ConfigError, Problem
from .document import dotted, nearest, read_env_lines, show
from .lines import Path
from .positions import find_json_lines

CONFIG_FILE, ENV_FILE, CA_FILE = "mqtt-quic-config.json", ".env", "ca-chain.pem"
DOWNLOAD = (
    "Download the bundle from the device's page of the platform and unpack it there; "
    "for a stand-in on this machine, run: tesaiot-connect sandbox DIR"
)

Carrier = Literal["quic", "tcp", "websocket"]
TRANSPORTS: Mapping[str, Carrier] = {
    "quic": "quic", "tcp": "tcp", "tls": "tcp",
    "websocket": "websocket", "websockets": "websocket", "ws": "websocket", "wss": "websocket",
}  # fmt: skip
PROTOCOLS: Mapping[str, Carrier] = {
    "mqtts": "tcp", "mqtt": "tcp", "quic": "quic", "mqtt-quic": "quic", "mqtt+quic": "quic",
    "wss": "websocket", "ws": "websocket",
}  # fmt: skip
METHODS = {
    "username_password": "password", "password": "password", "token": "token",
    "mtls": "mtls", "certificate": "mtls", "none": "none",
}  # fmt: skip
_SHAPE: Mapping[str, Any] = {
    "protocol": PROTOCOLS,
    "host": str,
    "port": int,
    "path": str,
    "transport": TRANSPORTS,
    "endpoints": list,
    "device_id": str,
    "client_id": str,
    "tls.enabled": bool,
    "tls.version": {"1.2": "", "1.3": ""},
    "tls.ca_file": str,
    "tls.verify_server": bool,
    "tls.verify_mode": {"server-only": "", "mutual": ""},
    "auth.method": METHODS,
    "auth.username": str,
    "auth.password": str,
    "connection.keepalive": float,
    "connection.clean_session": bool,
    "connection.connect_timeout": float,
}
"""The keys of mqtt-quic-config.json: a type, or the values there are."""
_SECRETS = ("auth.password",)


@attrs.frozen
class Found:
    """A value, and where it stands."""

    value: Any = attrs.field(repr=False)
    origin: str
    """For people: "mqtt-quic-config.json: auth.method", "environment variable TESAIOT_HOST"."""
    file: str = ""
    """Where that is; "" of a default."""
    line: int = 0
    key: str = ""


class BundleFiles:
    """Reads the files of one bundle; what is wrong gathers in `problems`."""

    def __init__(self, folder: FilePath, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self._environ = environ
        self._config: dict[str, Any] = {}
        """Of the JSON: dotted key to value."""
        self.lines: dict[Path, int] = {}
        self._env: dict[str, tuple[str, int]] = {}
        """Of `.env`: name to value and line."""
        if self._is_there():
            self._read_config()
            self._read_env()

    # --- files ----------------------------------------------------------------------------

    def _is_there(self) -> bool:
        if self.folder.is_dir():
            return True
        if not self.folder.exists():
            what, fix = "there is no such folder", DOWNLOAD
        elif self.folder.suffix == ".zip":
            what, fix = "a bundle is a folder, and this is an archive", "Unpack it, and name the folder"
        else:
            what, fix = "a bundle is a folder, and this is a file", "Name the folder that it is in"
        self.problems.append(Problem(str(self.folder), 0, "", what, fix))
        return False

    def _read_config(self) -> None:
        file = self.folder / CONFIG_FILE
        again = "Download the bundle again, or correct the file"
        try:
            text = file.read_bytes().decode("utf-8-sig")
            data = json.loads(text, object_pairs_hook=_unlike)
            self.lines = find_json_lines(text)
        except FileNotFoundError:
            return
        except OSError as error:
            self.say(str(file), 0, "", f"cannot be read: {error.strerror or error}", "Check its permissions")
        except UnicodeDecodeError:
            self.say(str(file), 0, "", "is not a text in UTF-8", again)
        except json.JSONDecodeError as error:
            what = f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
            self.say(str(file), error.lineno, "", what, again)
        except RecursionError:
            self.say(str(file), 0, "", "not valid JSON: it is nested too deeply", again)
        except ValueError as error:  # a key twice, or a number of thousands of digits
            self.say(str(file), 0, "", f"not valid JSON: {error}", again)
        else:
            if isinstance(data, dict):
                self._check_config(data)
            else:
                self.say(str(file), 1, "", "expected a JSON object, { ... }", again)

    def _check_config(self, data: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
        known = [tuple(key.split(".")) for key in _SHAPE]
        here = sorted({key[len(path)] for key in known if key[: len(path)] == path})
        for name, value in data.items():
            at = (*path, name)
            key = dotted(at)
            if at not in known and name not in here:
                fix = nearest(name, here, "keys")
                self.warnings.append(self.at_key(key, "unknown key, not used", fix, at))
            elif value is None:
                continue
            elif at in known:
                self._check_value(key, value)
            elif isinstance(value, dict):
                self._check_config(value, at)
            else:
                got = f", got {show(value)}" if name != "auth" else ""  # it may be the secret
                self.wrong(key, f"expected an object{got}", f'Write "{name}": {{ ... }}')

    def _check_value(self, key: str, value: Any) -> None:
        shape, shown = _SHAPE[key], "something else" if key in _SECRETS else show(value)
        if isinstance(shape, Mapping):
            if not isinstance(value, str) or value.strip().lower() not in shape:
                listed = ", ".join(f'"{one}"' for one in shape)
                self.wrong(key, f"expected one of {listed}; got {shown}", "Write one of them")
                return
            value = value.strip().lower()
        elif shape is list:
            if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
                self.wrong(key, "expected a list of URLs", '"endpoints": ["mqtts://host:8883"]')
                return
        elif shape is float:
            if type(value) not in (int, float) or not 0 <= value <= 65535:
                self.wrong(key, f"expected a number of seconds, got {shown}", "Write for example 60")
                return
            if value == 0 and key == "connection.connect_timeout":
                self.wrong(key, "nothing connects in 0 seconds", "Write for example 10")
                return
        elif type(value) is not shape:
            words = {str: "a string", int: "a whole number", bool: "true or false"}
            fix = {
                str: 'Write it in quotes: "..."',
                int: "Write for example 8883",
                bool: "Write true or false",
            }
            without_quotes = ", without quotes" if isinstance(value, str) else ""
            self.wrong(key, f"expected {words[shape]}, got {shown}", fix[shape] + without_quotes)
            return
        elif shape is int and not 1 <= value <= 65535:
            self.wrong(key, f"expected a port from 1 to 65535, got {value}", "Write for example 8883")
            return
        elif isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            self.wrong(key, "is not text: it has half of a surrogate pair", "Write it anew")
            return
        if not isinstance(value, str) or _is_given(value):
            self._config[key] = value

    def _read_env(self) -> None:
        file = self.folder / ENV_FILE
        if file.exists():
            try:
                self._env = read_env_lines(file, fix="Correct it, or download the bundle again")
            except ConfigError as error:
                self.problems += error.problems

    # --- values ---------------------------------------------------------------------------

    def config(self, key: str) -> Found | None:
        """A value of the JSON, by its dotted key; None if it is missing or was not filled in."""
        if key not in self._config:
            return None
        file = str(self.folder / CONFIG_FILE)
        return Found(self._config[key], f"{CONFIG_FILE}: {key}", file, self.line(key), key)

    def variable(self, *names: str) -> Found | None:
        """The first of these that the environment has; then, that `.env` has."""
        for name in names:
            if _is_given(self._environ.get(name, "")):
                return Found(self._environ[name], f"environment variable {name}", "environment", 0, name)
        for name in names:
            value, line = self._env.get(name, ("", 0))
            if _is_given(value):
                return Found(value, f"{ENV_FILE}: {name}", str(self.folder / ENV_FILE), line, name)
        return None

    def line(self, key: str) -> int:
        parts = tuple(key.split("."))
        return next((self.lines[parts[:n]] for n in range(len(parts), 0, -1) if parts[:n] in self.lines), 0)

    def say(self, file: str, line: int, key: str, message: str, fix: str) -> None:
        self.problems.append(Problem(file, line, key, message, fix))

    def at_key(self, key: str, message: str, fix: str, path: Path | None = None) -> Problem:
        line = self.lines.get(path, 0) if path else self.line(key)
        return Problem(str(self.folder / CONFIG_FILE), line, key, message, fix)

    def wrong(self, key: str, message: str, fix: str) -> None:
        self.problems.append(self.at_key(key, message, fix))

    def missing(self, key: str, what: str, fix: str) -> None:
        """Something that is needed: said of the JSON, or of the folder where that is missing too."""
        if (self.folder / CONFIG_FILE).exists():
            self.wrong(key, what, fix)
        else:
            what += f"; there is no {CONFIG_FILE} in this folder"
            self.say(str(self.folder), 0, "", what, fix)


def _unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys are all different: which of two holds is anybody's guess (RFC 8259 section 4)."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {show(key)} is there twice in one object")
        made[key] = value
    return made


def _is_given(text: str) -> bool:
    """Whether a value was filled in: "" and "<device_id>" stand for one that was not."""
    text = text.strip()
    return bool(text) and not (text.startswith("<") and text.endswith(">"))
