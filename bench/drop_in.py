"""What the bridge costs: paho over TCP and the drop-in for paho over mqtt://, alternating, through mosquitto.

Each run is a process with a client that publishes and one that receives, so a message crosses the bridge
twice. `python bench/drop_in.py [--messages 20000] [--repetitions 5]`; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SIDES = {
    "paho over TCP": ("paho.mqtt.client", "127.0.0.1"),
    "drop-in, mqtt://": ("tesaiot_connect.paho", "mqtt://127.0.0.1"),
}
CONFIG = "listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nset_tcp_nodelay true\n"


def work(module: str, host: str, port: int, count: int, qos: int) -> None:
    """Prints messages per second, and microseconds of CPU per message."""
    mqtt: Any = importlib.import_module(module)
    ready, done = threading.Event(), threading.Event()
    received = 0

    def on_message(*_: Any) -> None:
        nonlocal received
        received += 1
        if received == count:
            done.set()

    reader, writer = (mqtt.Client(mqtt.CallbackAPIVersion.VERSION2) for _ in range(2))
    reader.on_connect = lambda client, *_: client.subscribe("bench", qos)
    reader.on_subscribe = lambda *_: writer.connect(host, port)
    writer.on_connect = lambda *_: ready.set()
    reader.on_message = on_message
    writer.max_inflight_messages_set(100)
    reader.connect(host, port)
    reader.loop_start()
    while writer.socket() is None:
        time.sleep(0.01)
    writer.loop_start()
    ready.wait(20)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        module, host, *numbers = options.work
        return work(module, host, *map(int, numbers))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "mosquitto.conf")
        config.write_text(CONFIG.format(port=port))
        broker = subprocess.Popen(["mosquitto", "-c", str(config)], stderr=subprocess.DEVNULL)
        try:
            time.sleep(1)
            for qos in (0, 1):
                measure(port, options.messages, qos, options.repetitions)
        finally:
            broker.terminate()
            broker.wait()
    return None


def measure(port: int, count: int, qos: int, repetitions: int) -> None:
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for _ in range(repetitions):
        for name, (module, host) in SIDES.items():
            url = host if "://" not in host else f"{host}:{port}"
            command = [sys.executable, __file__, "--work", module, url, str(port), str(count), str(qos)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rate, cpu = map(float, done.stdout.split())
            figures[name].append((rate, cpu))
    for name, runs in figures.items():
        rate, cpu = (statistics.median(one) for one in zip(*runs, strict=True))
        print(f"QoS {qos}  {name:<18} {rate:8,.0f} messages/s  {cpu:6.1f} us of CPU per message", flush=True)


main()
