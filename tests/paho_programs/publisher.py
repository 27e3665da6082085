"""Publish from several threads, and wait for each message: loop_start, wait_for_publish, loop_stop."""

from __future__ import annotations

import threading
from typing import Any

from common import client, fail, number, say, start

mqtt, arguments = start(__doc__)
connected = threading.Event()
acknowledged: list[int] = []


def on_connect(_client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any = None) -> None:
    say("connected", number(reason))
    connected.set()


def publish(qos: int) -> None:
    for one in range(arguments.count):
        info = writer.publish(f"{arguments.topic}/{qos}", f"{one}", qos)
        info.wait_for_publish(20)
        if not info.is_published():
            fail(f"message {one} at QoS {qos} was not published: {info.rc}")


writer = client(mqtt, arguments, protocol=mqtt.MQTTv311)
writer.on_connect = on_connect
writer.on_publish = lambda _client, _userdata, mid, *_: acknowledged.append(mid)
writer.connect(arguments.host, arguments.port)
writer.loop_start()
if not connected.wait(20):
    fail("not connected")
threads = [threading.Thread(target=publish, args=(qos,)) for qos in (0, 1, 2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
say("is connected", writer.is_connected())
writer.disconnect()
writer.loop_stop()
say("is connected", writer.is_connected())
say("acknowledged", len(acknowledged), "different", len(set(acknowledged)))
