"""The cases of the benchmark that are about WebSocket: our plugin beside other ways to do its work.

CPU of the measured process for each frame. `ws-small` is what brokers send: a frame for each packet of
100 bytes. Reading is a client's side (frames without a mask), echo a listener's (masked frames in, coalesced
frames out). The other ends are blocking sockets in processes of their own; see `endpoint.py`.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from quic.cases import Row, keys, row

HERE = Path(__file__).resolve().parent
Pin = Callable[[int], Callable[[], None] | None]
PEERS = ("picows", "websockets", "sansio")
NAMES = {"websockets": "websockets asyncio", "sansio": "websockets sans-I/O", "picows": "picows"}


class Case(NamedTuple):
    name: str
    side: str
    size: int
    frames: int
    loop: str = "uvloop"
    tls: bool = False


CASES = [
    Case("ws-small-read", "read", 100, 500_000),
    Case("ws-small-read-asyncio", "read", 100, 500_000, "asyncio"),
    Case("wss-small-read", "read", 100, 500_000, tls=True),
    Case("ws-small-echo", "echo", 100, 500_000),
    Case("ws-2k-read", "read", 2_000, 100_000),
    Case("ws-64k-read", "read", 65_000, 10_000),
    Case("ws-64k-echo", "echo", 65_000, 10_000),
    Case("wss-64k-read", "read", 65_000, 10_000, tls=True),
]


def cpu(case: Case, who: str, frames: int, folder: str, pin: Pin) -> float:
    """Nanoseconds for each frame."""
    command = [sys.executable, str(HERE / "endpoint.py")]
    common = [str(case.size), str(frames), folder]
    measured = [*command, case.side, who, case.loop, *common]
    other = [*command, "feed" if case.side == "read" else "send", *common]
    first, second = (other, measured) if case.side == "read" else (measured, other)
    with subprocess.Popen(first, stdout=subprocess.PIPE, text=True, preexec_fn=pin(0)) as server:
        assert server.stdout is not None
        try:
            port = server.stdout.readline().split()[1]
            client = subprocess.run(
                [*second, port], check=case.side == "read", timeout=120, stdout=subprocess.PIPE, text=True,
                stderr=None if case.side == "read" else subprocess.DEVNULL, preexec_fn=pin(1),
            )  # fmt: skip
            told = client.stdout if case.side == "read" else server.stdout.readline()
            return float(told.split()[1])
        finally:
            server.kill()


def rows(folder: Path, repetitions: int, scale: float, only: str, pin: Pin) -> Iterator[Row]:
    """All rows whose name contains `only`: one for each case and peer."""
    wanted = [case for case in CASES if any(only in f"{case.name}-{peer}" for peer in PEERS)]
    if wanted:
        found = keys(folder)
        for source, name in zip(found, ("ca.pem", "cert.pem", "key.pem"), strict=True):
            shutil.copy(source, folder / name)
    for case in wanted:
        frames = max(2_000, int(case.frames * scale))
        peers = [peer for peer in PEERS if only in f"{case.name}-{peer}"]
        figures: dict[str, list[float]] = defaultdict(list)
        for _ in range(repetitions):
            for who in ("ours", *peers):
                figures[who].append(cpu(case, who, frames, str(folder) if case.tls else "-", pin))
        ours = statistics.median(figures["ours"])
        for peer in peers:
            yield row(f"{case.name}-{peer}", ours, statistics.median(figures[peer]), NAMES[peer], "ns/frame")
