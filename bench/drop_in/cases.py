"""The cases of the benchmark that are about the drop-in for paho: what its bridge costs beside paho over TCP.

Each run is a process with a client that publishes and one that receives, through mosquitto, so a message
crosses the bridge twice; see `endpoint.py`. CPU of the process for each message, and messages a second.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from quic.cases import Row, row

HERE = Path(__file__).resolve().parent
Pin = Callable[[int], Callable[[], None] | None]
CONFIG = "listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nset_tcp_nodelay true\n"
MESSAGES = 20_000
SIDES = {"ours": ("tesaiot_connect.paho", "mqtt://127.0.0.1"), "peer": ("paho.mqtt.client", "127.0.0.1")}


def rows(folder: Path, repetitions: int, scale: float, only: str, pin: Pin) -> Iterator[Row]:
    """All rows whose name contains `only`: CPU and rate at QoS 0 and 1."""
    count = max(500, int(MESSAGES * scale))
    for qos in (0, 1):
        names = (f"drop-in-qos{qos}-cpu", f"drop-in-qos{qos}")
        if not any(only in name for name in names):
            continue
        rates, cpus = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = folder / "drop-in.conf"
        config.write_text(CONFIG.format(port=port))
        tool = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin") or "mosquitto"
        with subprocess.Popen(
            [tool, "-c", str(config)], stderr=subprocess.DEVNULL, preexec_fn=pin(0)
        ) as broker:
            try:
                _listening(port)
                for _ in range(repetitions):
                    for side, words in SIDES.items():
                        told = _run([*words, str(port), str(count), str(qos)], pin)
                        rates[side].append(told[0])
                        cpus[side].append(told[1])
            finally:
                broker.terminate()
        for name, figures, unit in zip(names, (cpus, rates), ("us/message", "messages/s"), strict=True):
            if only in name:
                ours, peer = (statistics.median(figures[side]) for side in SIDES)
                yield row(name, ours, peer, "paho over TCP", unit)


def _listening(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise RuntimeError("mosquitto did not start")


def _run(words: list[str], pin: Pin) -> tuple[float, float]:
    command = [sys.executable, str(HERE / "endpoint.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=pin(1))
    rate, cpu = map(float, done.stdout.split())
    return rate, cpu
