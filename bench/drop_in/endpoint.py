"""Publishes to itself with either paho. `MODULE HOST PORT COUNT QOS`; prints messages per second, and
microseconds of CPU per message."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from typing import Any


def work(module: str, host: str, port: int, count: int, qos: int) -> None:
    mqtt: Any = importlib.import_module(module)
    listening, ready, done = threading.Event(), threading.Event(), threading.Event()
    received = 0

    def on_message(*_: Any) -> None:
        nonlocal received
        received += 1
        if received == count:
            done.set()

    reader, writer = (mqtt.Client(mqtt.CallbackAPIVersion.VERSION2) for _ in range(2))
    reader.on_connect = lambda client, *_: client.subscribe("bench", qos)
    reader.on_subscribe = lambda *_: listening.set()
    reader.on_message = on_message
    writer.on_connect = lambda *_: ready.set()
    writer.max_inflight_messages_set(100)
    for client, connected in ((reader, listening), (writer, ready)):
        client.connect(host if "://" not in host else f"{host}:{port}", port)
        client.loop_start()
        if not connected.wait(20):
            sys.exit("not connected")
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        writer.publish("bench", bytes(100), qos)
    if not done.wait(120):
        sys.exit(f"{received} of {count} messages arrived")
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(count / seconds, cpu / count * 1e6)
    for client in (reader, writer):
        client.disconnect()
        client.loop_stop()


work(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
