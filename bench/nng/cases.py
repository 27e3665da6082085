"""The cases of the benchmark that are about NanoSDK: the same job over `quic_nng` and `quic_aioquic`.

They need an installed NanoSDK, named by TESAIOT_NNG_LIBRARY. `publish.py` is the client, our broker the other
end. CPU is that of the client with its worker, per message: a run with many messages less one with few.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quic.cases import Row, Unavailable, keys, row, until_listening

HERE = Path(__file__).resolve().parent
COUNT = 20_000
FEW = 100
WAYS = ("quic_nng", "quic_aioquic")

BROKER = """
[listeners.quic]
scheme = "quic"
host = "127.0.0.1"
port = {port}
server_tls = {{ certificate = "{certificate}", key = "{key}" }}

[listeners.local]
scheme = "mqtt"
host = "127.0.0.1"
port = {port}
"""

Pin = Callable[[int], Callable[[], None] | None]


@contextmanager
def broker(folder: Path, pin: Pin) -> Iterator[tuple[int, Path]]:
    """The port of our broker, and the authority to trust."""
    made = keys(folder)
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    config, log = folder / "broker.toml", folder / "broker.log"
    config.write_text(BROKER.format(port=port, certificate=made.certificate, key=made.key))
    tool = Path(sys.executable).with_name("tesaiot-connect")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(tool), "serve", str(config)], stdout=output, stderr=output, preexec_fn=pin(0)
        )
        try:
            until_listening(port, process, log)
            yield port, made.ca
        finally:
            process.terminate()
            process.wait(20)


def publish(via: str, port: int, ca: Path, qos: int, count: int, pin: Pin) -> tuple[float, float]:
    """Messages a second, and CPU seconds of the whole client."""
    words = [sys.executable, HERE / "publish.py", via, port, ca, qos, count]
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, timeout=300, preexec_fn=pin(1), check=False
    )
    if done.returncode:
        raise Unavailable(f"{via}: {done.stderr.strip()[-300:]}")
    seconds, cpu = map(float, done.stdout.split())
    return count / seconds, cpu


def rows(folder: Path, repetitions: int, scale: float, only: str, pin: Pin) -> Iterator[Row]:
    """All rows whose name contains `only`. Says on stderr why there are none."""
    wanted = [qos for qos in (0, 1) if any(only in f"nng-qos{qos}-{what}" for what in ("publish", "cpu"))]
    if not wanted:
        return
    if not os.environ.get("TESAIOT_NNG_LIBRARY"):
        print("left out: nng-*: TESAIOT_NNG_LIBRARY names no NanoSDK", file=sys.stderr)
        return
    count = max(10 * FEW, int(COUNT * scale))
    for qos in wanted:
        rates, cpus = defaultdict(list), defaultdict(list)
        try:
            with broker(folder, pin) as (port, ca):
                for _ in range(repetitions):
                    for via in WAYS:
                        _, idle = publish(via, port, ca, qos, FEW, pin)
                        rate, cpu = publish(via, port, ca, qos, count, pin)
                        rates[via].append(rate)
                        cpus[via].append((cpu - idle) / (count - FEW) * 1e6)
                        time.sleep(0.2)
        except Unavailable as error:
            print(f"left out: nng-qos{qos}: {error}", file=sys.stderr)
            continue
        for what, found, unit in (("publish", rates, "msg/s"), ("cpu", cpus, "us CPU/msg")):
            if only in f"nng-qos{qos}-{what}":
                ours, peer = (statistics.median(found[via]) for via in WAYS)
                yield row(f"nng-qos{qos}-{what}", ours, peer, WAYS[1], unit)
