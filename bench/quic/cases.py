"""The cases of the benchmark that are about QUIC. See `wan.py` and `endpoint.py` for the two ends.

The long paths are two namespaces joined by a relay that delays and loses packets, TCP's and UDP's
alike; they need root. Each case gives rows as `run.py` prints them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))

RTT = 0.1  # seconds, of the connect cases
LOSS_RTT = 0.05
LOSS = 0.02  # each way
RATE = 200.0  # messages a second
TOPICS = 16
FRAMES = 600_000
CLIENTS = 2000

Row = dict[str, object]
Pin = Callable[[int], Callable[[], None] | None]

BROKER = """
[broker]
max_streams = 17

[listeners.quic]
scheme = "quic"
host = "{host}"
port = 14567
max_streams = 20
server_tls = {{ certificate = "{certificate}", key = "{key}" }}

[listeners.tls]
scheme = "mqtts"
host = "{host}"
port = 8883
server_tls = {{ certificate = "{certificate}", key = "{key}" }}

[listeners.local]
scheme = "mqtt"
host = "127.0.0.1"
port = 1883
"""


class Unavailable(Exception):
    """This machine cannot run a case."""


class Keys(NamedTuple):
    ca: Path
    certificate: Path
    key: Path


def keys(folder: Path) -> Keys:
    from tesaiot_connect.testing import Certificates

    made = Certificates(folder / "certificates")
    tls = made.server("127.0.0.1", "10.98.0.2")
    return Keys(Path(made.ca_file), Path(tls.certificate), Path(tls.key))


def row(case: str, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    return {
        "case": case,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "peer_name": peer_name,
        "ratio": round(ours / peer, 3),
        "unit": unit,
    }


# --- frames over loopback -----------------------------------------------------------------


def frames(who: str, datagram: int, count: int, folder: Path, pin: Pin) -> float:
    """Frames a second, in thousands."""
    command = [sys.executable, str(HERE / "endpoint.py")]
    words = [who, str(count), str(datagram), str(folder)]
    with subprocess.Popen(
        [*command, "serve", *words], stdout=subprocess.PIPE, text=True, preexec_fn=pin(0)
    ) as server:
        assert server.stdout is not None
        try:
            port = server.stdout.readline().split()[1]
            subprocess.run([*command, "send", *words, port], check=True, timeout=120, preexec_fn=pin(1))
            return float(server.stdout.readline().split()[1]) / 1000
        finally:
            server.kill()


def endpoint(folder: Path, repetitions: int, scale: float, only: str, pin: Pin) -> Iterator[Row]:
    found = keys(folder)
    for source, name in zip(found, ("ca.pem", "cert.pem", "key.pem"), strict=True):
        shutil.copy(source, folder / name)
    count = max(20_000, int(FRAMES * scale) // 20 * 20)
    cases = {"quic-endpoint-frames": 1200, "quic-endpoint-frames-1452": 1452}
    wanted = {case: datagram for case, datagram in cases.items() if only in case}
    ours, peer = defaultdict(list), []
    for _ in range(repetitions if wanted else 0):
        peer.append(frames("aioquic", 1200, count // 2, folder, pin))
        for case, datagram in wanted.items():
            ours[case].append(frames("ours", datagram, count, folder, pin))
    for case in wanted:
        yield row(
            case, statistics.median(ours[case]), statistics.median(peer), "aioquic asyncio", "k frames/s"
        )


# --- idle connections ---------------------------------------------------------------------


def idle_memory(who: str, clients: int, folder: Path, ca: Path) -> float:
    """KiB of the listener's memory for each connection."""
    command = [sys.executable, str(HERE / "idle.py")]

    def start(*words: object) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen([*command, *map(str, words)], text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    def told(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()

    def ask(process: subprocess.Popen[str]) -> int:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return int(told(process))

    with start("serve", who, folder, clients) as server:
        try:
            port = told(server).split()[1]
            with start("hold", port, ca, 20) as few:  # so that what is loaded once is there
                told(few)
                few.communicate("\n")
            before = ask(server)
            with start("hold", port, ca, clients) as many:
                if told(many) != "held\n":
                    raise Unavailable("the clients could not connect")
                after = ask(server)
                many.communicate("\n")
        finally:
            server.kill()
    return (after - before) / clients / 1024


def idle(folder: Path, scale: float, only: str) -> Iterator[Row]:
    if only in "quic-idle-memory":
        found = keys(folder)
        for source, name in zip(found, ("ca.pem", "cert.pem", "key.pem"), strict=True):
            shutil.copy(source, folder / name)
        clients = max(100, int(CLIENTS * scale))
        ours, peer = (idle_memory(who, clients, folder, found.ca) for who in ("ours", "aioquic"))
        yield row("quic-idle-memory", ours, peer, "aioquic asyncio", "KiB/client")


# --- long paths ---------------------------------------------------------------------------


@contextlib.contextmanager
def broker(wan: Any, folder: Path, found: Keys) -> Iterator[None]:
    """Ours, at the far end."""
    config = folder / "broker.toml"
    config.write_text(BROKER.format(host=wan.b, certificate=found.certificate, key=found.key))
    tool = Path(sys.executable).with_name("tesaiot-connect")
    with (folder / "broker.log").open("wb") as log:
        process = wan.run("b", [str(tool), "serve", str(config)], stdout=log, stderr=log)
        try:
            with wan.enter("b"):
                until_listening(1883, process, folder / "broker.log")
            yield
        finally:
            process.terminate()
            process.wait(20)


def until_listening(port: int, process: subprocess.Popen[Any], log: Path) -> None:
    import socket

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise Unavailable(f"the broker did not start: {log.read_text()[-500:]}")


@contextlib.contextmanager
def path(delay: float, loss: float, seed: int = 1) -> Iterator[Any]:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    from relay import Wan

    try:
        wan = Wan(delay, loss, seed=seed)
        wan.__enter__()
    except BaseException as error:
        raise Unavailable(f"no long path here: {error}") from error
    try:
        yield wan
    finally:
        wan.__exit__()


def client(wan: Any, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "wan.py"), *map(str, words)]
    process: subprocess.Popen[str] = wan.run("a", command, stdout=subprocess.PIPE, text=True)
    return process


def connect(folder: Path, repetitions: int, only: str) -> Iterator[Row]:
    names = {
        "quic-1rtt-connack-rtts": ("1rtt", 0),
        "quic-resumed-connack-rtts": ("resumed", 0),
        "quic-0rtt-connack-rtts": ("0rtt", 0),
        "tls-connack-rtts": ("tls", 0),
        "quic-1rtt-puback-rtts": ("1rtt", 1),
        "quic-resumed-puback-rtts": ("resumed", 1),
        "quic-0rtt-puback-rtts": ("0rtt-early", 1),
        "quic-0rtt-puback-after-connack-rtts": ("0rtt", 1),
        "tls-puback-rtts": ("tls", 1),
    }
    if not any(only in case for case in names):
        return
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with path(RTT / 2, 0.0) as wan, broker(wan, folder, found := keys(folder)):
        process = client(wan, "connect", wan.b, 14567, 8883, found.ca, repetitions)
        output, _ = process.communicate(timeout=60 + 10 * repetitions)
        for line in output.splitlines():
            mode, connack, puback = line.split()
            times[mode].append((float(connack), float(puback)))
    if process.returncode or not times:
        raise Unavailable("the client of the long path failed")
    for case, (mode, which) in names.items():
        if only in case:
            seconds = statistics.median(one[which] for one in times[mode])
            yield row(case, seconds * 1000, RTT * 1000, "one round trip", "ms")


async def latencies(count: int, ready: Callable[[], None]) -> list[float]:
    """Of `count` messages, as a subscriber beside the broker gets them, in ms."""
    from tesaiot_connect import Client, ClientOptions, Negotiator, Url
    from tesaiot_connect_tcp_tls import TcpTls

    found: list[float] = []
    endpoint = Negotiator([TcpTls(Url("mqtt", "127.0.0.1", 1883))])
    async with Client(endpoint, ClientOptions()) as subscriber:
        async with subscriber.subscribe(["bench/load/#"]) as reader:
            reading = asyncio.create_task(reader.read())
            await subscriber.connected()
            # the retained answer of a first message would do too; a SUBACK is not shown to us
            await asyncio.sleep(0.5)
            ready()
            while len(found) < count:
                delivery = await asyncio.wait_for(reading, 60)
                now = time.monotonic()
                found += [(now - float(message.payload)) * 1000 for message in delivery.batch.messages]
                await delivery.ack()
                if len(found) < count:
                    reading = asyncio.create_task(reader.read())
    return found


def p95(found: list[float]) -> float:
    return statistics.quantiles(found, n=100)[94]


def loss(folder: Path, repetitions: int, scale: float, only: str) -> Iterator[Row]:
    cases = {"loss2-streams16-p95": "streams", "loss2-stream1-p95": "stream"}
    wanted = [kind for case, kind in cases.items() if only in case]
    if not wanted:
        return
    seconds = max(2.0, 20 * scale)
    count = int(seconds * RATE)
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(repetitions):
        with path(LOSS_RTT / 2, LOSS, number + 1) as wan, broker(wan, folder, made := keys(folder)):
            for kind in (*wanted, "tls"):
                port = 8883 if kind == "tls" else 14567
                started: list[subprocess.Popen[str]] = []

                def start(kind: str = kind, port: int = port, started: Any = started) -> None:
                    started.append(client(wan, "stream", kind, wan.b, port, made.ca, seconds, RATE, TOPICS))

                with wan.enter("b"):
                    found[kind].append(p95(asyncio.run(latencies(count, start))))
                output, _ = started[0].communicate(timeout=60)
                words = output.split()
                if words[3] != "1" or (kind == "streams" and int(words[1]) <= TOPICS // 2):
                    raise Unavailable(f"the load did not run as meant: {output}")
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    tls = statistics.median(found["tls"])
    for case, kind in cases.items():
        if only in case:
            yield row(case, statistics.median(found[kind]), tls, f"TLS, TCP {control}", "ms p95")


def rows(folder: Path, repetitions: int, scale: float, only: str, pin: Pin) -> Iterator[Row]:
    """All rows whose name contains `only`. Says on stderr what this machine cannot run."""
    yield from endpoint(folder, repetitions, scale, only, pin)
    dials = max(1, min(15, round(15 * scale)))
    for case in (
        lambda: idle(folder, scale, only),
        lambda: connect(folder, dials, only),
        lambda: loss(folder, max(1, repetitions // 2), scale, only),
    ):
        try:
            yield from case()
        except Unavailable as error:
            print(f"left out: {error}", file=sys.stderr)
