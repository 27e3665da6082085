"""The namespaces that other tests rely on: each fault does what it says, and nothing stays behind."""

from __future__ import annotations

import itertools
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from netlab import Lab, Spaces, call, require_namespaces
from relay import Wan, require_relay

pytestmark = pytest.mark.root

PORT = 14567
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3  # "don't fragment", with no memory of the path's MTU
HEADERS = 28  # IPv4 and UDP


@pytest.fixture(autouse=True)
def capable() -> None:
    require_namespaces()


@pytest.fixture
def lab(capable: None) -> Iterator[Lab]:
    with Lab() as made:
        yield made


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def datagrams(space: Spaces, side: str) -> socket.socket:
    with space.enter(side):
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.settimeout(20)
    found.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
    return found


@contextmanager
def peers(
    space: Spaces, client: str, server: str, address: str
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's socket and a server's, which is bound to `address` and PORT; neither is connected."""
    with datagrams(space, client) as near, datagrams(space, server) as far:
        far.bind((address, PORT))
        yield near, far


def exchange(near: socket.socket, far: socket.socket, to: str, data: bytes = b"x") -> tuple[str, int]:
    """There and back; where `far` saw it come from."""
    near.sendto(data, (to, PORT))
    received, source = far.recvfrom(65536)
    assert received == data
    far.sendto(b"answer", source)
    assert near.recv(65536) == b"answer"
    host, port = source
    return host, port


def test_the_client_reaches_the_server_through_the_nat(lab: Lab) -> None:
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        assert exchange(near, far, lab.server) == exchange(near, far, lab.server)
        assert exchange(near, far, lab.server)[0] == lab.router
    with lab.enter("sv"):
        listener = socket.create_server((lab.server, 0))
    with listener:
        with lab.enter("cl"):
            near = socket.create_connection(listener.getsockname(), timeout=20)
        listener.settimeout(20)
        far, (host, _) = listener.accept()
        with near, far:
            assert host == lab.router


def test_a_rebind_gives_a_flow_under_way_a_new_port(lab: Lab) -> None:
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        seen = {exchange(near, far, lab.server)}
        for _ in range(10):
            ports = lab.rebind_nat()
            host, port = exchange(near, far, lab.server)
            assert host == lab.router and port in ports
            seen.add((host, port))
        assert len(seen) == 11


def test_the_old_port_is_dead_after_a_rebind(lab: Lab) -> None:
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        old = exchange(near, far, lab.server)
        lab.rebind_nat()
        new = exchange(near, far, lab.server)
        far.sendto(b"to the old port", old)
        far.sendto(b"to the new port", new)
        assert near.recv(100) == b"to the new port"


def test_the_client_moves_ten_times(lab: Lab) -> None:
    addresses = {lab.client}
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        seen = {exchange(near, far, lab.server)}
        for _ in range(10):
            address = lab.move_client()
            seen.add(exchange(near, far, lab.server))
            addresses.add(address)
            with datagrams(lab, "cl") as fresh:
                fresh.connect((lab.server, PORT))
                assert fresh.getsockname()[0] == address
            assert lab.ip("cl", "-4", "addr", "show", "dev", "c0").count("inet ") == 1
    assert (len(addresses), len(seen)) == (11, 11)


def test_dropped_udp_vanishes_until_healed(lab: Lab) -> None:
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        source = exchange(near, far, lab.server)
        lab.drop_udp(PORT)
        near.sendto(b"lost", (lab.server, PORT))
        until(lambda: lab.dropped() == 1)
        far.sendto(b"lost", source)
        until(lambda: lab.dropped() == 2)
        lab.heal()
        assert exchange(near, far, lab.server) == source


def test_rejected_udp_is_answered(lab: Lab) -> None:
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        source = exchange(near, far, lab.server)
        near.connect((lab.server, PORT))
        lab.reject_udp(PORT)
        near.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            near.recv(100)
        lab.heal()
        near.send(b"x")
        assert far.recvfrom(100) == (b"x", source)


def test_lost_packets_are_counted(lab: Lab) -> None:
    sent = 200
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        lab.lose(50)
        for _ in range(sent):
            near.sendto(b"x", (lab.server, PORT))
        until(lambda: lab.dropped() > 0)  # a busy kernel handles them later
        lab.heal()
        dropped = lab.dropped()
        # 50 +- 14 sigma
        assert 0 < dropped < sent
        for _ in range(sent - dropped):
            assert far.recv(100) == b"x"


def test_a_narrow_link_takes_small_packets_only(lab: Lab) -> None:
    quic = bytes(1200)  # the smallest maximum that QUIC can live with
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        lab.mtu(1280)
        source = exchange(near, far, lab.server, quic)
        far.sendto(quic, source)
        assert near.recv(65536) == quic

        lab.mtu(1100)
        largest = bytes(1100 - HEADERS)
        far.sendto(quic, source)
        far.sendto(largest, source)
        assert near.recv(65536) == largest
        near.connect((lab.server, PORT))
        near.send(quic)
        with pytest.raises(OSError, match="Message too long"):
            near.recv(100)
        near.send(largest)
        assert far.recv(65536) == largest

        lab.heal()
        near.send(quic)
        assert far.recv(65536) == quic


def test_segments_sent_at_once_travel_one_by_one(lab: Lab) -> None:
    segments, size = 10, 1200
    gso = [(socket.IPPROTO_UDP, 103, struct.pack("=H", size))]  # UDP_SEGMENT
    with peers(lab, "cl", "sv", lab.server) as (near, far):
        lab.mtu(1280)
        source = exchange(near, far, lab.server)
        for sender, receiver, to in ((near, far, (lab.server, PORT)), (far, near, source)):
            sender.sendmsg([bytes(segments * size)], gso, 0, to)
            for _ in range(segments):
                assert receiver.recv(65536) == bytes(size)
            lab.drop_udp(PORT)
            expected = lab.dropped() + segments
            sender.sendmsg([bytes(segments * size)], gso, 0, to)
            until(lambda expected=expected: lab.dropped() == expected)
            lab.heal()
            lab.mtu(1280)


def namespaces() -> set[str]:
    return {line.split()[0] for line in call("ip", "netns", "list").splitlines()}


def test_nothing_stays_behind_when_a_test_fails() -> None:
    with pytest.raises(ZeroDivisionError), Lab() as lab:
        sleeper = lab.run("sv", [sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        names = {lab.name(side) for side in ("cl", "rt", "sv")}
        assert names <= namespaces()
        _ = 1 / 0
    assert sleeper.returncode is not None
    assert not names & namespaces()


def test_what_a_killed_run_left_is_swept_and_nothing_else() -> None:
    waiting = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as gone:
        left = f"tesaiot{gone.pid}n1cl"
        call("ip", "netns", "add", left)  # while it lives: another run may be sweeping
    with Spaces("one") as living, Spaces("two"):
        until(lambda: left not in namespaces())
        assert living.name("one") in namespaces()


def splitmix(seed: int) -> Iterator[int]:
    """The relay's generator, as published."""
    mask = (1 << 64) - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        mixed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        yield mixed ^ (mixed >> 31)


def test_a_round_trip_takes_twice_the_delay() -> None:
    require_relay()
    delay = 0.03
    with Wan(delay) as wan, peers(wan, "a", "b", wan.b) as (near, far):
        began = time.monotonic()
        assert exchange(near, far, wan.b)[0] == wan.a
        assert time.monotonic() - began >= 2 * delay
        assert wan.stop() == {
            way: {"received": 1, "delivered": 1, "lost": 0, "overflowed": 0, "refused": 0, "held": 0}
            for way in ("a_to_b", "b_to_a")
        }


def fates(seed: int, way: int, count: int) -> list[bool]:
    """Which packets the relay keeps of 1000 at a loss of 0.1, up to the last one that it keeps."""
    kept = [value % 1000 >= 100 for value in itertools.islice(splitmix(2 * seed + way), count)]
    while not kept[-1]:
        kept.pop()
    return kept


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_decides_which_packets_are_lost(seed: int) -> None:
    require_relay()
    with Wan(0.001, 0.1, seed=seed) as wan, peers(wan, "a", "b", wan.b) as (near, far):
        near.bind((wan.a, PORT))
        plans = fates(seed, 0, 1000), fates(seed, 1, 1000)
        for kept, sender, receiver, to in ((plans[0], near, far, wan.b), (plans[1], far, near, wan.a)):
            waiting: list[int] = []
            for number, arrives in enumerate(kept):
                sender.sendto(str(number).encode(), (to, PORT))
                if arrives:
                    waiting.append(number)
                if len(waiting) == 100 or number == len(kept) - 1:
                    # in portions that a socket's buffer holds
                    assert [int(receiver.recv(100)) for _ in waiting] == waiting
                    waiting.clear()
        counters = wan.stop()
    assert plans[0] != plans[1]
    for name, kept in zip(("a_to_b", "b_to_a"), plans, strict=True):
        assert counters[name]["received"] == len(kept)
        assert counters[name]["lost"] == kept.count(False)
        assert counters[name]["delivered"] == kept.count(True)


def test_the_rate_holds_and_its_queue_overflows() -> None:
    require_relay()
    packets, size, queue = 200, 1400, 5
    with Wan(rate_mbit=1, queue=queue) as wan, peers(wan, "a", "b", wan.b) as (near, far):
        began = time.monotonic()
        for _ in range(packets):
            near.sendto(bytes(size), (wan.b, PORT))
        for _ in range(queue):
            far.recv(65536)
        assert time.monotonic() - began >= queue * (size + HEADERS) * 8 / 1e6
        counters = wan.stop()["a_to_b"]
    assert counters["overflowed"] > 0
    assert sum(counters.values()) == 2 * counters["received"]


def test_tcp_loses_packets_but_no_bytes() -> None:
    require_relay()
    data = bytes(range(256)) * 1000
    with Wan(0.001, 0.02, seed=3) as wan:
        with wan.enter("b"):
            listener = socket.create_server((wan.b, 0))
        with listener:
            with wan.enter("a"):
                near = socket.create_connection(listener.getsockname(), timeout=20)
            listener.settimeout(20)
            far, _ = listener.accept()
            far.settimeout(60)
            with near, far, far.makefile("rb") as reader:
                near.sendall(data)
                near.close()
                assert reader.read() == data
        assert wan.stop()["a_to_b"]["lost"] > 0
