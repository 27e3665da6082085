"""Simulated devices: real clients that publish telemetry for ever.

Owns: what they measure and how they connect. Rule: they are clients like any other, over a
listener of the sandbox, with the device's own password; they stop when they are cancelled.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import math
import random
from collections.abc import Sequence

from ..client import Client
from ..config.compose import bundle_connection
from ..message import Message
from ..plugins import Catalog
from .folder import Device


def telemetry(device: Device, values: random.Random, now: datetime.datetime) -> Message:
    """A device's report: {"timestamp", "data": {sensor: value}}, QoS 1."""
    day = math.tau * (now.timestamp() % 86400) / 86400
    data = {
        "temperature": round(25 + 4 * math.sin(day) + values.gauss(0, 0.3), 2),
        "humidity": round(55 - 10 * math.sin(day) + values.gauss(0, 1), 2),
        "pressure": round(1013 + values.gauss(0, 0.5), 1),
    }
    report = {"timestamp": now.isoformat().replace("+00:00", "Z"), "data": data}
    return Message(f"devices/{device.name}/telemetry", json.dumps(report).encode(), qos=1)


def device_client(device: Device, url: str, catalog: Catalog) -> Client:
    """A client as the device's bundle says, beside one that the bundle is used for elsewhere.

    Raises ConfigError.
    """
    name = f"{device.name}-simulated"
    own = [f"endpoints=[{json.dumps(url)}]", f"client_id={json.dumps(name)}"]
    made = bundle_connection(device.folder, overrides=own, environ={}, catalog=catalog)
    return Client(made.dialer, made.options, auth=made.auth, name=name)


async def simulate(devices: Sequence[Device], url: str, catalog: Catalog, *, interval: float) -> None:
    """Publish for every device, each `interval` seconds, until cancelled."""

    async def run(device: Device) -> None:
        values = random.Random(device.name)  # noqa: S311 - weather, not secrets
        await asyncio.sleep(interval * values.random())  # so that they do not all speak at once
        async with device_client(device, url, catalog) as client:
            while True:
                await client.publish([telemetry(device, values, datetime.datetime.now(datetime.UTC))])
                await asyncio.sleep(interval)

    async with asyncio.TaskGroup() as group:
        for device in devices:
            group.create_task(run(device))
