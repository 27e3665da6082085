"""The bench's job with gmqtt: PORT QOS FILE. Subscribe, parse, append {"topic", "value"} as a JSON line."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import gmqtt
import msgspec
import uvloop


async def main(port: int, qos: int, path: str) -> None:
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder().decode
    with open(path, "wb", buffering=1 << 20) as file:

        def on_message(_client: Any, topic: str, payload: bytes, _qos: int, _properties: Any) -> int:
            file.write(encode({"topic": topic, "value": decode(payload)}) + b"\n")
            if "sensor-last" in topic:
                file.flush()
            return 0

        client = gmqtt.Client("bench-gmqtt")
        client.on_message = on_message
        client.on_connect = lambda client, *_: client.subscribe("device/+/telemetry/#", qos=qos)
        await client.connect("127.0.0.1", port, version=gmqtt.constants.MQTTv50)
        await asyncio.Event().wait()


uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
