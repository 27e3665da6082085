"""Print so many messages, then leave: loop_forever, and disconnect from a callback."""

from __future__ import annotations

from typing import Any

from common import client, number, say, start

mqtt, arguments = start(__doc__)
left = arguments.count


def on_connect(client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any = None) -> None:
    say("connected", number(reason))
    client.subscribe([(f"{arguments.topic}/+", 2), (f"{arguments.topic}/deep/#", 1)])


def on_subscribe(_client: Any, _userdata: Any, _mid: int, granted: Any, _properties: Any = None) -> None:
    say("subscribed", [number(one) for one in granted])


def on_message(client: Any, _userdata: Any, message: Any) -> None:
    global left
    say(message.topic.removeprefix(arguments.topic), message.payload, message.qos, message.retain)
    left -= 1
    if left == 0:
        client.disconnect()


def on_disconnect(_client: Any, _userdata: Any, *rest: Any) -> None:
    say("disconnected", number(rest[0] if len(rest) < 3 else rest[1]))


reader = client(mqtt, arguments, protocol=mqtt.MQTTv311)
reader.on_connect = on_connect
reader.on_subscribe = on_subscribe
reader.on_message = on_message
reader.on_disconnect = on_disconnect
reader.connect(arguments.host, arguments.port, 60)
say("ended with", int(reader.loop_forever()))
