"""A wide-area path for tests: two namespaces joined by `relay.c`, with delay, loss and rate per packet."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from compiled import compiled, unavailable
from netlab import Spaces, require_namespaces

_SOURCE = Path(__file__).with_name("relay.c")
_DEVICE = "wan0"

Counters = dict[str, dict[str, int]]


def build() -> Path:
    """The relay; skips, or fails where servers are required, without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        unavailable("no C compiler (packages gcc, libc6-dev)")
    return compiled(
        "relay",
        [_SOURCE],
        lambda output: [compiler, "-O2", "-Wall", "-Wextra", "-o", str(output), _SOURCE.name],
    )


def require_relay() -> None:
    """Skips where namespaces or TUN devices cannot be had."""
    require_namespaces()
    reason = _obstacle()
    if reason:
        pytest.skip(f"no TUN devices: {reason}")


@functools.cache
def _obstacle() -> str:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return str(error)
    return ""


def ready(process: subprocess.Popen[str]) -> bool:
    """Whether the relay has said so; one that says nothing at all is killed."""
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        return process.stdout.readline() == "READY\n"
    finally:
        timer.cancel()
        timer.join()


class Wan(Spaces):
    """Namespaces `a` (10.98.0.1) and `b` (10.98.0.2) with a long path between them.

    Each way by itself: `delay` in seconds, `loss` as a share of packets (steps of 0.001), `rate_mbit` (0: no
    limit) with a `queue` of so many full-size packets before it. The same `seed` loses the same packets.
    """

    a = "10.98.0.1"
    b = "10.98.0.2"

    def __init__(
        self,
        delay: float = 0.0,
        loss: float = 0.0,
        *,
        rate_mbit: int = 0,
        queue: int = 1000,
        seed: int = 1,
        mtu: int = 1500,
    ) -> None:
        super().__init__("a", "b")
        self._mtu = mtu
        self._options = {
            "delay-us": round(delay * 1e6),
            "loss-permille": round(loss * 1000),
            "seed": seed,
            "rate-mbit": rate_mbit,
            "queue": queue,
        }
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Wan:
        super().__enter__()
        try:
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self) -> None:
        options = [f"--{name}={value}" for name, value in self._options.items()]
        self._process = process = self.run(
            "a",
            [str(build()), *options, self.name("a"), self.name("b")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert ready(process), process.stderr.read()
        for side, near, far in (("a", self.a, self.b), ("b", self.b, self.a)):
            # or the kernel's own neighbour discovery is counted
            self.sysctl(side, f"net.ipv6.conf.{_DEVICE}.disable_ipv6", "1")
            self.ip(side, "addr", "add", near, "peer", far, "dev", _DEVICE)
            self.ip(side, "link", "set", _DEVICE, "mtu", str(self._mtu), "txqueuelen", "10000", "up")

    def stop(self) -> Counters:
        """Ends the path. Counts of packets `a_to_b` and `b_to_a`, by what became of them."""
        assert self._process is not None
        self._process.terminate()
        output, errors = self._process.communicate(timeout=20)
        assert self._process.returncode == 0, errors
        counters: Counters = json.loads(output)
        return counters
