"""Network namespaces for tests: made by the test, entered by its threads, gone with it.

A `Spaces` is a set of namespaces whose names hold the process id, so that runs side by side do not meet and
the remains of a killed run are found. A `Lab` joins three: client `cl` - NAT router `rt` - server `sv`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path("/run/netns")
_PREFIX = "tesaiot"
_CLONE_NEWNET = 0x40000000
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_numbers = itertools.count(1)


def call(*command: str, text: str = "") -> str:
    """Runs a command of the network set-up; what it printed, or AssertionError with what it complained of."""
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PATH": _PATH},
    )
    assert done.returncode == 0, f"{' '.join(command)} {text}: {done.stderr.strip()}"
    return done.stdout


def require_namespaces() -> None:
    """Skips where namespaces cannot be had, and says why: containers often forbid them, even to root."""
    reason = _obstacle()
    if reason:
        pytest.skip(f"no network namespaces: {reason}")


@functools.cache
def _obstacle() -> str:
    if not sys.platform.startswith("linux"):
        return "not Linux"
    if os.geteuid() != 0:
        return "not root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables"), ("conntrack", "conntrack")):
        if shutil.which(tool, path=_PATH) is None:
            return f"{tool} is not installed (package {package})"
    try:
        with Lab():
            return ""
    except (AssertionError, OSError) as error:
        return str(error)


class Spaces:
    """Namespaces named by `sides`, each with its loopback up.

    Leaving the context removes them and ends what `run` started there.
    """

    def __init__(self, *sides: str) -> None:
        number = next(_numbers)
        self._names = {side: f"{_PREFIX}{os.getpid()}n{number}{side}" for side in sides}
        self._stack = ExitStack()

    def __enter__(self) -> Spaces:
        _sweep()
        with ExitStack() as stack:
            for side, name in self._names.items():
                call("ip", "netns", "add", name)
                stack.callback(call, "ip", "netns", "del", name)
                self.ip(side, "link", "set", "lo", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def name(self, side: str) -> str:
        """What `ip netns` calls it."""
        return self._names[side]

    def ip(self, side: str, *arguments: str) -> str:
        return call("ip", "-n", self._names[side], *arguments)

    def nft(self, side: str, rules: str) -> None:
        """Applies rules all at once or not at all."""
        with self.enter(side):
            call("nft", "-f", "-", text=rules)

    def sysctl(self, side: str, key: str, value: str) -> None:
        with self.enter(side):
            Path("/proc/sys", *key.split(".")).write_text(value)

    @contextmanager
    def enter(self, side: str) -> Iterator[None]:
        """Moves the calling thread into the namespace for the duration of the block.

        Sockets, processes and threads that it makes meanwhile belong there for good; other threads stay
        where they are. Do not `await` inside unless the event loop runs inside altogether.
        """
        with (
            Path("/proc/thread-self/ns/net").open("rb") as home,
            (_FOLDER / self.name(side)).open("rb") as there,
        ):
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def run(self, side: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a program there; it is killed at the end unless it has ended. `options` are Popen's."""
        with self.enter(side):
            process = subprocess.Popen(command, **options)
        self._stack.callback(_end, process)
        return process


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _sweep() -> None:
    """Removes what runs that were killed left behind."""
    for path in _FOLDER.glob(f"{_PREFIX}*") if _FOLDER.is_dir() else ():
        match = re.match(rf"{_PREFIX}(\d+)n", path.name)
        if match and not Path("/proc", match[1]).exists():
            with suppress(AssertionError):  # another run may be sweeping, too
                call("ip", "netns", "del", path.name)


_NAT = """
add table ip nat
add chain ip nat post {{ type nat hook postrouting priority 100; }}
flush chain ip nat post
add rule ip nat post oifname "rs" ip protocol udp masquerade to :{first}-{last}
add rule ip nat post oifname "rs" masquerade
"""
_FAULTS = """
add table inet faults
add counter inet faults dropped
add chain inet faults forward { type filter hook forward priority 0; }
flush chain inet faults forward
"""


class Lab(Spaces):
    """Client `cl` (10.99.1.2), NAT router `rt`, server `sv` (10.99.2.2), which sees the client as 10.99.2.1.

    Faults add up until `heal`; they hold for packets in both directions, for flows under way as well.
    """

    server = "10.99.2.2"
    router = "10.99.2.1"  # as the server sees the client

    def __init__(self) -> None:
        super().__init__("cl", "rt", "sv")
        self.client = "10.99.1.2"
        self._ports = itertools.cycle(range(20000, 60000, 100))
        self._hosts = itertools.cycle(range(100, 200))

    def __enter__(self) -> Lab:
        super().__enter__()
        try:
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self) -> None:
        for side, near, far, network in (("cl", "c0", "rc", "10.99.1"), ("sv", "s0", "rs", "10.99.2")):
            veth = ("link", "add", near, "netns", self.name(side), "type", "veth", "peer", "name", far)
            call("ip", *veth, "netns", self.name("rt"))
            self.ip(side, "addr", "add", f"{network}.2/24", "dev", near)
            self.ip("rt", "addr", "add", f"{network}.1/24", "dev", far)
            # what the kernel would carry across as one large packet has to travel, and get lost, as many
            self.ip("rt", "link", "set", far, "gso_max_segs", "1", "up")
            self.ip(side, "link", "set", near, "gso_max_segs", "1", "up")
            self.ip(side, "route", "add", "default", "via", f"{network}.1")
        self.sysctl("rt", "net.ipv4.ip_forward", "1")
        # the second address must outlive the first
        self.sysctl("cl", "net.ipv4.conf.c0.promote_secondaries", "1")
        self.nft("rt", _FAULTS)
        self.rebind_nat()

    def rebind_nat(self) -> range:
        """Forgets all mappings. The client's UDP leaves from the returned range from its next packet on."""
        first = next(self._ports)
        self.nft("rt", _NAT.format(first=first, last=first + 99))
        with self.enter("rt"):
            call("conntrack", "-F")
        return range(first, first + 100)

    def move_client(self) -> str:
        """Gives the client a new address, which is returned, and takes its old one away."""
        old, self.client = self.client, f"10.99.1.{next(self._hosts)}"
        self.ip("cl", "addr", "add", f"{self.client}/24", "dev", "c0")
        self.ip("cl", "addr", "del", f"{old}/24", "dev", "c0")
        self.ip("cl", "route", "replace", "default", "via", "10.99.1.1")
        return self.client

    def drop_udp(self, port: int) -> None:
        """UDP to and from the server's `port` vanishes."""
        self._fault(f"udp dport {port}", f"udp sport {port}")

    def reject_udp(self, port: int) -> None:
        """UDP to the server's `port` is answered with ICMP port unreachable; from it, it vanishes."""
        self._fault(f"udp sport {port}")
        self._rule(f"udp dport {port} counter name dropped reject")

    def lose(self, percent: float) -> None:
        """That share of all packets is lost, each way."""
        self._fault(f"numgen random mod 10000 < {round(percent * 100)}")

    def mtu(self, size: int) -> None:
        """The link between router and server carries IP packets of at most `size` bytes.

        As in the field, who sends a larger packet with "don't fragment" towards the server gets ICMP; larger
        packets from the server, which knows nothing of the bottleneck, vanish.
        """
        self.ip("rt", "link", "set", "rs", "mtu", str(size))
        # veth lets a few bytes more than its MTU in
        self._fault(f'iifname "rs" meta length > {size}')

    def heal(self) -> None:
        """Undoes every fault. Addresses and port mappings stay as they are."""
        self.ip("rt", "link", "set", "rs", "mtu", "1500")
        self.nft("rt", _FAULTS)

    def dropped(self) -> int:
        """Packets that `drop_udp`, `reject_udp` and `lose` have taken so far."""
        with self.enter("rt"):
            found = json.loads(call("nft", "-j", "list", "counter", "inet", "faults", "dropped"))
        counters = [entry["counter"]["packets"] for entry in found["nftables"] if "counter" in entry]
        assert len(counters) == 1
        packets = counters[0]
        assert isinstance(packets, int)
        return packets

    def _fault(self, *matches: str) -> None:
        for match in matches:
            self._rule(f"{match} counter name dropped drop")

    def _rule(self, rule: str) -> None:
        self.nft("rt", f"add rule inet faults forward {rule}\n")
