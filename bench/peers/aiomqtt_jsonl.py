"""The bench's job with aiomqtt: PORT QOS FILE. Subscribe, parse, append {"topic", "value"} as a JSON line."""

from __future__ import annotations

import sys

import aiomqtt
import msgspec
import uvloop


async def main(port: int, qos: int, path: str) -> None:
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder().decode
    with open(path, "wb", buffering=1 << 20) as file:
        async with aiomqtt.Client(
            "127.0.0.1", port, identifier="bench-aiomqtt", protocol=aiomqtt.ProtocolVersion.V5
        ) as client:
            await client.subscribe("device/+/telemetry/#", qos=qos)
            async for message in client.messages:
                topic = message.topic.value
                assert isinstance(message.payload, bytes)
                file.write(encode({"topic": topic, "value": decode(message.payload)}) + b"\n")
                if "sensor-last" in topic:
                    file.flush()


uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
