"""The platform's message routing: a device's report, and each of its readings on a topic of its own.

Owns: `devices/{id}/telemetry` -> `device/{id}/telemetry/{sensor}`, and the units. Rule: what is no
report is left as it is, and said once for each device; nothing raises, and the readings take little more
room than the report and a fixed amount for each of them.

{"timestamp": "...", "data": {"temperature": 25.5}} brings about
{"value": 25.5, "unit": "celsius", "timestamp": "..."} on .../temperature, with the report's QoS and
lifetime. It is done where the report arrives (`Broker(derive=...)`): the device's acknowledgement waits for
both.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from typing import Annotated

import msgspec

from ..message import NO_PROPERTIES, Message, Properties

log = logging.getLogger(__name__)

UNITS = {
    "temperature": "celsius",
    "humidity": "percent",
    "pressure": "hPa",
    "battery": "percent",
    "level": "percent",
    "voltage": "volt",
    "current": "ampere",
    "power": "watt",
    "energy": "kWh",
    "frequency": "hertz",
    "co2": "ppm",
    "pm25": "ug/m3",
    "pm10": "ug/m3",
    "light": "lux",
    "illuminance": "lux",
    "noise": "dB",
    "rssi": "dBm",
    "speed": "m/s",
    "distance": "m",
    "altitude": "m",
    "weight": "kg",
    "flow": "l/min",
}
"""Of sensors that are named for what they measure; others have ""."""

_READINGS = 1000
_TIMESTAMP = 64
"""Sensors and characters of a timestamp that a report may have: each reading repeats the timestamp."""
_TOLD = 1000
"""Devices whose faults are remembered."""


_Text = Annotated[str, msgspec.Meta(max_length=_TIMESTAMP)]
_Number = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | float


class _Report(msgspec.Struct):
    data: Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=_READINGS)]
    timestamp: _Text | _Number | None = None


class _Reading(msgspec.Struct):
    value: msgspec.Raw
    unit: str
    timestamp: str | int | float


_decode = msgspec.json.Decoder(_Report).decode
_encode = msgspec.json.Encoder().encode


class Routing:
    """What `Broker(derive=...)` asks."""

    def __init__(self) -> None:
        self.readings = 0
        """How many were made so far."""
        self._told: set[str] = set()

    def __call__(self, messages: Sequence[Message], /) -> list[Message]:
        """The readings in those of the messages that are reports, in order."""
        made: list[Message] = []
        for message in messages:
            levels = message.topic.split("/")
            if len(levels) == 3 and levels[0] == "devices" and levels[2] == "telemetry" and levels[1]:
                made += self._readings(message, levels[1])
        self.readings += len(made)
        return made

    def _readings(self, message: Message, device: str) -> list[Message]:
        if not message.payload:  # how a retained message is taken back
            return []
        try:
            report = _decode(message.payload.decode())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._tell(device, f"its telemetry is no report: {error}")
            return []
        timestamp = report.timestamp
        if timestamp is None:
            timestamp = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        lifetime = message.properties.message_expiry
        properties = NO_PROPERTIES if lifetime is None else Properties(message_expiry=lifetime)
        made = []
        for sensor, value in report.data.items():
            topic = f"device/{device}/telemetry/{sensor}"
            fits = sensor.isprintable() and not set(sensor) & {"/", "+", "#"}
            if not sensor or not fits or len(topic.encode()) > 65535:
                self._tell(device, f"a sensor's name must be one level of a topic, not {sensor[:60]!r}")
                continue
            payload = _encode(_Reading(value, UNITS.get(sensor, ""), timestamp))
            made.append(Message(topic, payload, message.qos, False, properties))
        return made

    def _tell(self, device: str, what: str) -> None:
        if device not in self._told and len(self._told) < _TOLD:
            self._told.add(device)
            log.warning(
                '%s: %s; the platform expects {"timestamp": "...", "data": {"temperature": 25.5}} '
                "(said once for each device)",
                device, what,
            )  # fmt: skip
