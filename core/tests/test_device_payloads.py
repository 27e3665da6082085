"""What the device clients make of topics and payloads, and what a session says of a refusal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from tesaiot_connect.device.payloads import decode, device_and_sensor, printable, telemetry
from tesaiot_connect.device.session import return_code
from tesaiot_connect.errors import PayloadError, Refused

NOON = datetime(2025, 12, 9, 10, 30, 45, 123456, UTC)


class Array:
    """What NumPy's arrays and numbers have in common."""

    def tolist(self) -> Any:
        return [1.5, 2]


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=7))])
def test_telemetry_has_the_platforms_form(zone: timezone) -> None:
    payload = telemetry({"temperature": 25.5, "humidity": 55.3}, NOON.astimezone(zone))
    assert payload == (
        b'{"timestamp":"2025-12-09T10:30:45.123456Z","data":{"temperature":25.5,"humidity":55.3}}'
    )
    assert b"45.000000Z" in telemetry({}, NOON.replace(microsecond=0))


def test_telemetry_of_unusual_values() -> None:
    data = json.loads(telemetry({"nan": float("nan"), "array": Array(), "text": "é", "on": True}, NOON))
    assert data["data"] == {"nan": None, "array": [1.5, 2], "text": "é", "on": True}


@pytest.mark.parametrize("data", [25.5, None, [1], {"sensor": object()}, {(1, 2): 3}])
def test_what_is_no_telemetry(data: Any) -> None:
    with pytest.raises(PayloadError) as refused:
        telemetry(data, NOON)
    assert refused.value.fix


@pytest.mark.parametrize(
    ("topic", "found"),
    [
        ("device/d1/telemetry/temperature", ("d1", "temperature")),
        ("device/d1/telemetry/motor/left/speed", ("d1", "motor/left/speed")),
        ("device/d1/telemetry", ("d1", "")),
        ("devices/d1/telemetry", ("d1", "")),
        ("device//telemetry/", ("", "")),
        ("device/d1/commands/x", None),
        ("site/device/d1/telemetry", None),
        ("device/d1", None),
    ],
)
def test_topics(topic: str, found: tuple[str, str] | None) -> None:
    assert device_and_sensor(topic) == found


@pytest.mark.parametrize(
    ("payload", "value"),
    [
        (b'{"value": 25.5}', {"value": 25.5}),
        (b"25.5", 25.5),
        (b"null", None),
        (b"NaN", "NaN"),
        (b"", ""),
        (b"on", "on"),
        (b"\xff", b"\xff"),
        (b"[" * 100_000, "[" * 100_000),
    ],
)
def test_payloads(payload: bytes, value: Any) -> None:
    assert decode(payload) == value


def test_one_line_for_the_log() -> None:
    assert printable("temperature") == "temperature"
    assert "\n" not in printable("a\nforged line")
    assert printable({"value": 1}) == "{'value': 1}"
    assert printable("x" * 5000).endswith("… (5000 characters)")
    assert len(printable("x" * 5000)) < 1100


@pytest.mark.parametrize(
    ("code", "rc"), [(0x86, 4), (0x87, 5), (0x84, 1), (0x85, 2), (0x88, 3), (0x97, 0x97), (0xF0, 0xF0)]
)
def test_return_codes(code: int, rc: int) -> None:
    """MQTT 3.1.1 section 3.2.2.3, where there is a counterpart."""
    assert return_code(Refused("no", reason_code=code)) == rc
