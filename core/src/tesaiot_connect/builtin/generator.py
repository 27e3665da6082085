"""Simulated devices.

Owns: their topics, payloads and timing. Rule: values come from the seed alone, so two runs send
the same; only the time stamps are the clock's.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Literal

import attrs

from ..errors import EndOfInput
from ..message import Batch, Delivery, Message
from ..protocols import Reader

MAX_BATCH = 1000
TICK = 0.01
"""Seconds; at higher rates what became due within a tick goes out as one batch."""

SENSORS = {
    "temperature": (25.0, 5.0, "celsius"),
    "humidity": (55.0, 10.0, "percent"),
    "pressure": (1013.0, 8.0, "hPa"),
}
"""Mean, swing and unit."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@attrs.frozen(kw_only=True)
class GeneratorSource:
    """Devices that publish telemetry at a steady rate."""

    devices: int = attrs.field(
        default=3, validator=attrs.validators.ge(1), metadata=_help("How many devices; they take turns.")
    )
    rate: float = attrs.field(
        default=10.0,
        validator=attrs.validators.ge(0),
        metadata=_help("Messages per second of all devices together; 0 is as fast as the sinks take them."),
    )
    count: int = attrs.field(
        default=0,
        validator=attrs.validators.ge(0),
        metadata=_help("Messages in all, after which the source ends; 0 never ends."),
    )
    seed: int = attrs.field(default=1, metadata=_help("Two runs with the same seed send the same values."))
    layout: Literal["sensors", "device"] = attrs.field(
        default="sensors",
        metadata=_help(
            '"sensors": one message a sensor, on device/<id>/telemetry/<sensor>, with value, unit and '
            'timestamp. "device": one message a device, on devices/<id>/telemetry, with timestamp and data.'
        ),
    )
    prefix: str = attrs.field(
        default="sim-", metadata=_help("What device ids begin with; a number follows, from 0001.")
    )
    qos: Literal[0, 1, 2] = attrs.field(
        default=1, metadata=_help("QoS the messages carry; a sink to a broker keeps it.")
    )

    def once(self) -> GeneratorSource:
        """One message of each kind, unless a count says how many."""
        per_device = len(SENSORS) if self.layout == "sensors" else 1
        return self if self.count else attrs.evolve(self, count=self.devices * per_device)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Reader]:
        yield _Generator(self)


class _Generator:
    def __init__(self, recipe: GeneratorSource) -> None:
        self._rate = recipe.rate
        self._left = recipe.count or math.inf
        self._started = asyncio.get_running_loop().time()
        self._epoch = time.time()
        self._sent = 0
        self._messages = messages(recipe, self._epoch)

    async def read(self) -> Delivery:
        if self._left <= 0:
            raise EndOfInput
        if self._rate:
            while (due := self._due()) < 1:
                wait = self._started + (self._sent + 1) / self._rate - asyncio.get_running_loop().time()
                await asyncio.sleep(max(wait, TICK))
        else:
            await asyncio.sleep(0)
            due = MAX_BATCH
        number = int(min(due, MAX_BATCH, self._left))
        batch = [next(self._messages) for _ in range(number)]
        self._sent += number
        self._left -= number
        return Delivery(Batch(batch, time.time()))

    def _due(self) -> int:
        elapsed = asyncio.get_running_loop().time() - self._started
        return int(elapsed * self._rate) - self._sent


def messages(recipe: GeneratorSource, epoch: float) -> Iterator[Message]:
    """What the devices send, for ever; the first message is `1 / rate` seconds after `epoch`."""
    rng = random.Random(recipe.seed)  # noqa: S311 - simulated values
    step = 1 / recipe.rate if recipe.rate else 1e-6
    ids = [f"{recipe.prefix}{number:04d}" for number in range(1, recipe.devices + 1)]
    phases = [rng.uniform(0, math.tau) for _ in ids]
    sent = 0
    turn = 0
    while True:
        values: list[dict[str, float]] = []
        for phase in phases:
            wave = math.sin(phase + turn / 20)
            values.append(
                {
                    name: round(mean + swing * (0.8 * wave + rng.uniform(-0.2, 0.2)), 2)
                    for name, (mean, swing, _) in SENSORS.items()
                }
            )
        turn += 1
        if recipe.layout == "device":
            for device, reading in zip(ids, values, strict=True):
                sent += 1
                stamp = _stamp(epoch + sent * step, "microseconds")
                data = f'"temperature":{reading["temperature"]:.2f},"humidity":{reading["humidity"]:.2f}'
                payload = f'{{"timestamp":"{stamp}","data":{{{data}}}}}'
                yield Message(f"devices/{device}/telemetry", payload.encode(), recipe.qos)
        else:
            for sensor, (_, _, unit) in SENSORS.items():
                for device, reading in zip(ids, values, strict=True):
                    sent += 1
                    stamp = _stamp(epoch + sent * step, "milliseconds")
                    payload = f'{{"value":{reading[sensor]},"unit":"{unit}","timestamp":"{stamp}"}}'
                    yield Message(f"device/{device}/telemetry/{sensor}", payload.encode(), recipe.qos)


def _stamp(seconds: float, precision: str) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=precision).replace("+00:00", "Z")
