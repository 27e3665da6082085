"""The bench's job with paho-mqtt: PORT QOS FILE. Subscribe, parse, append {"topic", "value"} as JSON."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import paho.mqtt.client as mqtt


def main(port: int, qos: int, path: str) -> None:
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder().decode
    with open(path, "wb", buffering=1 << 20) as file:

        def on_message(_client: mqtt.Client, _user: Any, message: mqtt.MQTTMessage) -> None:
            topic = message.topic
            file.write(encode({"topic": topic, "value": decode(message.payload)}) + b"\n")
            if "sensor-last" in topic:
                file.flush()

        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "bench-paho", protocol=mqtt.MQTTv5)
        client.on_message = on_message
        client.on_connect = lambda client, *_: client.subscribe("device/+/telemetry/#", qos=qos)
        client.connect("127.0.0.1", port)
        client.loop_forever()


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
