"""What the platform's topics and payloads say.

Owns: a telemetry payload, and device, sensor and data of what a subscriber gets. Rule: a payload
that is not JSON is not an error here: it is passed on as what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from ..errors import PayloadError


def telemetry(data: Mapping[str, Any], when: datetime) -> bytes:
    """`{"timestamp": "2025-12-09T10:30:45.123456Z", "data": {...}}`. Raises PayloadError.

    JSON has neither NaN nor infinity: they become null. Arrays and numbers of NumPy are taken too.
    """
    if not isinstance(data, Mapping):
        raise PayloadError(
            f"telemetry is a mapping of names to values, not {type(data).__name__}",
            fix='write {"temperature": 25.5}',
        )
    time = when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    try:
        return msgspec.json.encode({"timestamp": time, "data": data}, enc_hook=_as_list)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise PayloadError(
            f"this telemetry cannot be written as JSON: {error}",
            fix="use numbers, texts, booleans, None, lists and mappings with texts as keys",
        ) from error


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} has no form in JSON")


def device_and_sensor(topic: str) -> tuple[str, str] | None:
    """Of `device/<device_id>/telemetry/<sensor_type>` and of `devices/<device_id>/telemetry`, whose
    sensor is ""; None for other topics. What is behind `telemetry` is the sensor, slashes included.
    """
    levels = topic.split("/", 3)
    if len(levels) < 3 or levels[0] not in ("device", "devices") or levels[2] != "telemetry":
        return None
    return levels[1], levels[3] if len(levels) > 3 else ""


def decode(payload: bytes) -> Any:
    """The JSON value; of what is not JSON the text, and of what is no text (UTF-8) the bytes."""
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return payload


def printable(value: Any, limit: int = 1000) -> str:
    """For a line of a log: one line, however long the value is and whatever is in it."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
