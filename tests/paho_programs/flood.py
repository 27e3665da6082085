"""Publish to oneself as fast as it goes, at QoS 0 and 1, and count what comes back."""

from __future__ import annotations

import threading
from typing import Any

from common import client, fail, say, start

mqtt, arguments = start(__doc__)
ready, all_there = threading.Event(), threading.Event()
received: dict[int, list[int]] = {0: [], 1: []}


def on_connect(client: Any, _userdata: Any, _flags: Any, _reason: Any, _properties: Any = None) -> None:
    client.subscribe(f"{arguments.topic}/#", 1)


def on_message(_client: Any, _userdata: Any, message: Any) -> None:
    received[message.qos].append(int(message.payload[:8]))
    if len(received[0]) + len(received[1]) == 2 * arguments.count:
        all_there.set()


own = client(mqtt, arguments)
own.max_inflight_messages_set(1000)
own.on_connect = on_connect
own.on_subscribe = lambda *_: ready.set()
own.on_message = on_message
own.connect(arguments.host, arguments.port)
own.loop_start()
if not ready.wait(20):
    fail("not subscribed")
for one in range(arguments.count):
    for qos in (0, 1):
        own.publish(f"{arguments.topic}/{qos}", b"%08d" % one + bytes(400), qos)
all_there.wait(60)
own.disconnect()
own.loop_stop()
for qos, numbers in received.items():
    say(f"QoS {qos}:", len(numbers), "in order" if numbers == list(range(arguments.count)) else numbers)
