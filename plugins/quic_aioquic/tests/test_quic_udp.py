"""The UDP socket: whole datagrams in order, on every path through the system.

Every test of the data path runs with offload (GSO and GRO, where the system has them), on the plain
calls, and on a loop without `add_reader`; on asyncio and on uvloop.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
import warnings
from typing import Any

import pytest
from udp_peer import (
    HOST,
    LOOPS,
    V4,
    V6,
    NoReaders,
    Peer,
    Run,
    bound,
    connected,
    families,
    has_v6,
    linux,
    mixed,
    runner,
)

import tesaiot_connect_quic_aioquic.udp as udp
from tesaiot_connect_quic_aioquic.udp import Address, Datagram, open_socket


@pytest.fixture(params=[*LOOPS, "no readers"])
def run(request: pytest.FixtureRequest) -> Run:
    return runner(LOOPS.get(request.param, NoReaders))


@pytest.fixture(params=LOOPS)
def run_readers(request: pytest.FixtureRequest) -> Run:
    """Only the loops with `add_reader`."""
    return runner(LOOPS[request.param])


@pytest.fixture(params=[True, False], ids=["offload", "plain"])
def offload(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# --- the data path


@families
@pytest.mark.parametrize("dial", [True, False], ids=["connected", "unconnected"])
def test_datagrams_arrive_whole_and_in_order(run: Run, offload: bool, family: int, dial: bool) -> None:
    async def main() -> None:
        server = Peer(bound(family), offload=offload)
        if dial:
            client = Peer(connected(server.address, family), connected=server.address, offload=offload)
        else:
            client = Peer(bound(family), offload=offload)
        sent = mixed(200)
        for start in range(0, 200, 50):  # less at once than a socket's buffer takes
            assert client.udp.send(sent[start : start + 50], server.address)
            await server.received(start + 50)
        assert await server.received(200) == sent
        assert {d.address for d in server.got} == {client.address}
        assert server.udp.send(sent[:50], client.address)
        assert await client.received(50) == sent[:50]
        assert {d.address for d in client.got} == {server.address}
        for one, other, count in ((client, server, 200), (server, client, 50)):
            assert one.udp.datagrams_sent == other.udp.datagrams_received == count
            assert one.udp.bytes_sent == other.udp.bytes_received == sum(map(len, sent[:count]))
            assert one.udp.dropped == one.udp.too_big == 0
            assert not one.errors
        client.close()
        server.close()

    run(main())


@linux
def test_offload_takes_few_calls(run_readers: Run) -> None:
    """64 datagrams or 65,000 bytes a call out; what was joined comes in with its boundaries."""

    async def main() -> None:
        server, client = Peer(bound()), Peer(bound())
        if not client.udp._gso:
            pytest.skip("no UDP_SEGMENT in this kernel")
        small, large = [bytes([i]) * 100 for i in range(130)], [bytes([i]) * 1200 for i in range(108)]
        client.udp.send(small, server.address)
        assert client.udp.writes == 3  # 64 + 64 + 2
        assert await server.received(130) == small
        client.udp.send(large, server.address)
        assert client.udp.writes == 5  # 54 + 54
        assert await server.received(238) == small + large
        assert server.udp.reads < 30
        client.close()
        server.close()

    run_readers(main())


def test_the_largest_the_smallest_and_the_empty(run: Run, offload: bool) -> None:
    async def main() -> None:
        server, client = Peer(bound(), offload=offload), Peer(bound(), offload=offload)
        sent = [b"", b"a", b"b" * 65_507, b"c" * 40_000, b"c" * 40_000, b"", b"", b"d", b"d", b""]
        for one in range(0, len(sent), 2):
            client.udp.send(sent[one : one + 2], server.address)
            await server.received(one + 2)
        assert await server.received(10) == sent
        assert client.udp.send([], server.address)
        client.close()
        server.close()

    run(main())


def test_a_wakeup_is_one_call_and_bounded(run: Run) -> None:
    async def main() -> None:
        server, client = Peer(bound(), offload=False), Peer(bound(), offload=False)
        client.udp.send([b"x" * 100] * 150, server.address)  # they wait before anything is read
        await server.received(150)
        assert max(server.bursts) <= 65  # one more where the first was waited for
        assert len(server.bursts) == 3
        server.bursts.clear()
        client.udp.send([b"x" * 30_000] * 12, server.address)
        await server.received(162)
        assert max(server.bursts) <= 10  # 256 KiB
        client.close()
        server.close()

    run(main())


def test_pause_and_resume(run: Run, offload: bool) -> None:
    async def main() -> None:
        server, client = Peer(bound(), offload=offload), Peer(bound(), offload=offload)
        client.udp.send([b"before"], server.address)
        await server.received(1)
        server.udp.pause()
        client.udp.send([b"while"], server.address)
        for _ in range(20):  # turns in which it could have been read
            client.udp.send([b"echo"], client.address)
            await client.received(len(client.got) + 1)
        assert len(server.got) == 1
        server.udp.resume()
        server.udp.pause()
        server.udp.resume()
        await server.received(2)
        client.udp.send([b"after"], server.address)
        assert await server.received(3) == [b"before", b"while", b"after"]
        client.close()
        server.close()

    run(main())


def test_pause_inside_the_callback(run: Run) -> None:
    async def main() -> None:
        server, client = Peer(bound(), offload=False), Peer(bound(), offload=False)
        got: list[bytes] = []
        news = asyncio.Event()

        def take(datagrams: list[Datagram]) -> None:
            got.extend(d.data for d in datagrams)
            server.udp.pause()
            news.set()

        server.udp._on_datagrams = take
        client.udp.send([b"x"] * 100, server.address)
        await news.wait()
        assert len(got) < 100
        news.clear()
        server.udp.resume()
        await news.wait()
        assert len(got) == 100
        client.close()
        server.close()

    run(main())


def test_a_callback_that_raises_does_not_end_the_reading(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        raised: list[Any] = []
        loop.set_exception_handler(lambda _, context: raised.append(context["exception"]))
        server, client = Peer(bound()), Peer(bound())
        bug, take = RuntimeError("a bug"), server.udp._on_datagrams

        def once(datagrams: list[Datagram]) -> None:
            server.udp._on_datagrams = take
            client.udp.send([b"second"], server.address)
            raise bug

        server.udp._on_datagrams = once
        client.udp.send([b"first"], server.address)
        assert await server.received(1) == [b"second"]
        assert raised == [bug]
        client.close()
        server.close()

    run(main())


# --- which of our addresses


@linux
@pytest.mark.parametrize("offload_first", [True, False], ids=["offload", "plain"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_answer_leaves_from_the_address_that_was_asked(
    run_readers: Run, offload_first: bool, host: str
) -> None:
    if host == "::" and not has_v6():
        pytest.skip("no IPv6 here")
    family = V6 if host == "::" else V4

    async def main() -> None:
        sock = open_socket(family, local=(host, 0), v6only=False if family == V6 else None)
        server = Peer(sock, offload=offload_first)
        port = server.address[1]
        asked: list[tuple[int, Address]] = [(V4, ("127.0.0.1", port)), (V4, ("127.0.0.2", port))]
        if family == V6:
            asked.append((V6, ("::1", port, 0, 0)))
        locals_ = []
        for number, (kind, address) in enumerate(asked, 1):
            client = Peer(connected(address, kind), connected=address)  # hears nobody else
            client.udp.send([b"a" * 20] * 2, address)
            await server.received(2 * number)
            one, two = server.got[-2:]
            assert one.local is not None
            assert one.local == two.local
            locals_.append(one.local)
            for answer in ([b"one"], [b"more"] * 3):
                server.udp.send(answer, one.address, one.local)
            assert await client.received(4) == [b"one", b"more", b"more", b"more"]
            client.close()
        assert len(set(locals_)) == len(asked)
        assert not server.errors
        server.close()

    run_readers(main())


@linux
def test_an_answer_from_an_address_that_is_gone_is_lost_and_told(run_readers: Run, offload: bool) -> None:
    async def main() -> None:
        server = Peer(open_socket(V4), offload=offload)
        client = Peer(bound())
        gone = udp._local(socket.IPPROTO_IP, bytes(4) + socket.inet_aton("198.51.100.7") + bytes(4))
        assert server.udp.send([b"x" * 9] * 3, client.address, gone)
        await server.until(lambda: bool(server.errors))
        assert server.udp.dropped == 3
        assert server.udp.send([b"y" * 9] * 3, client.address)
        assert await client.received(3) == [b"y" * 9] * 3
        assert server.udp._gso == client.udp._gso or not offload  # EINVAL was about the address
        client.close()
        server.close()

    run_readers(main())


def test_a_link_local_address_keeps_its_interface() -> None:
    link, world = socket.inet_pton(V6, "fe80::1"), socket.inet_pton(V6, "2001:db8::1")
    assert udp._local(socket.IPPROTO_IPV6, link + b"\3\0\0\0") == link + b"\3\0\0\0"
    assert udp._local(socket.IPPROTO_IPV6, world + b"\3\0\0\0") == world + bytes(4)


@pytest.mark.parametrize("remote", [True, False])
def test_one_address_needs_no_local(run: Run, remote: bool) -> None:
    async def main() -> None:
        server, client = Peer(bound()), Peer(bound())
        if remote:
            client.close()
            client = Peer(connected(server.address), connected=server.address)
        client.udp.send([b"x"], server.address)
        await server.received(1)
        server.udp.send([b"y"], server.got[0].address)
        await client.received(1)
        assert server.got[0].local is client.got[0].local is None
        client.close()
        server.close()

    run(main())


# --- opening and closing


@families
def test_what_is_known_of_a_socket(run: Run, family: int) -> None:
    async def main() -> None:
        server = Peer(bound(family))
        client = Peer(connected(server.address, family), connected=server.address)
        assert client.udp.family == family
        assert client.address[0] == HOST[socket.AddressFamily(family)]
        assert client.address[1] != 0
        assert server.udp.path_mtu is None
        if sys.platform == "linux":
            assert client.udp.path_mtu is not None
            assert 1280 <= client.udp.path_mtu <= 65_536
        client.close()
        server.close()
        assert client.udp.path_mtu is None
        assert client.address[1] != 0

    run(main())


@linux
@families
def test_it_never_fragments(family: int) -> None:
    level, option = (
        (socket.IPPROTO_IPV6, 23) if family == V6 else (socket.IPPROTO_IP, 10)
    )  # {IP,IPV6}_MTU_DISCOVER
    with open_socket(family, receive_buffer=100_000, send_buffer=100_000) as sock:
        assert sock.getsockopt(level, option) == 2
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 200_000  # Linux doubles
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 200_000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
        assert sock.getsockname()[1] != 0
    with open_socket(family, receive_buffer=1 << 30) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > 100_000


def test_a_port_in_use_is_refused_and_leaves_no_socket() -> None:
    with bound() as taken:
        address = taken.getsockname()
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            with pytest.raises(OSError) as caught:
                open_socket(V4, local=address)
            assert caught.value.errno == errno.EADDRINUSE
            del caught
            gc.collect()


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="no SO_REUSEPORT")
def test_a_port_can_be_shared_when_asked() -> None:
    with bound(reuse_port=True) as one:
        with open_socket(V4, local=one.getsockname(), reuse_port=True) as other:
            assert one.getsockname() == other.getsockname()
