"""What goes wrong under the UDP socket: it is told and counted, bounds hold, and nothing is left behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import warnings
from typing import Any

import pytest
from udp_peer import (
    LOOPS,
    V4,
    Fussy,
    NoReaders,
    Peer,
    Run,
    bound,
    connected,
    families,
    linux,
    mixed,
    refused,
    runner,
)

import tesaiot_connect_quic_aioquic.udp as udp
from tesaiot_connect_quic_aioquic.udp import Datagram, UdpSocket, open_socket


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


# --- errors


@families
def test_a_refused_port_is_told_and_the_socket_goes_on(run: Run, offload: bool, family: int) -> None:
    async def main() -> None:
        dead = bound(family)
        address = dead.getsockname()
        dead.close()
        client = Peer(connected(address, family), connected=address, offload=offload)
        for told in range(1, 4):  # uvloop forgets its reader at each one
            client.udp.send([b"anybody?"], address)
            await client.until(lambda told=told: len(client.errors) >= told)  # type: ignore[misc]
        assert {e.errno for e in client.errors} == {errno.ECONNREFUSED}
        server = Peer(open_socket(family, local=address), offload=offload)
        client.udp.send([b"a" * 50] * 3, address)
        assert await server.received(3) == [b"a" * 50] * 3
        server.udp.send([b"yes"], client.address)
        assert await client.received(1) == [b"yes"]
        client.close()
        server.close()

    run(main())


@linux
def test_an_earlier_error_costs_no_datagram(run: Run, offload: bool) -> None:
    """A connected socket reports at a send what became of an earlier one: that one still goes out."""

    async def main() -> None:
        dead = bound()
        address = dead.getsockname()
        dead.close()
        client = Peer(connected(address), connected=address, offload=offload)
        client.udp.pause()
        client.udp.send([b"lost"], address)
        refused(client.udp._sock)
        server = Peer(open_socket(V4, local=address), offload=offload)
        client.udp.send([b"one!", b"two!"], address)
        assert await server.received(2) == [b"one!", b"two!"]
        await client.until(lambda: len(client.errors) == 1)
        assert client.errors[0].errno == errno.ECONNREFUSED
        assert (client.udp.datagrams_sent, client.udp.dropped) == (3, 0)
        client.udp.resume()
        server.udp.send([b"still here"], client.address)
        assert await client.received(1) == [b"still here"]
        client.close()
        server.close()

    run(main())


def test_what_is_too_big_is_counted_and_told(run: Run, offload: bool) -> None:
    async def main() -> None:
        server, client = Peer(bound(), offload=offload), Peer(bound(), offload=offload)
        assert client.udp.send([b"a", b"x" * 65_536, b"b", b"x" * 65_536], server.address)
        assert await server.received(2) == [b"a", b"b"]
        await client.until(lambda: bool(client.errors))
        assert [e.errno for e in client.errors] == [errno.EMSGSIZE]  # once a turn
        assert (client.udp.too_big, client.udp.dropped, client.udp.datagrams_sent) == (2, 0, 2)
        client.close()
        server.close()

    run(main())


@linux
@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.EINVAL])  # as newer and older kernels say it
def test_a_path_too_narrow_for_a_run_leaves_gso_on(run: Run, number: int) -> None:
    async def main() -> None:
        server = Peer(bound())
        fussy = Fussy(bound(), number, errno.EMSGSIZE, errno.EMSGSIZE)
        client = Peer(fussy)
        assert client.udp.send([b"a" * 100, b"b" * 100, b"c" * 50], server.address)
        assert await server.received(1) == [b"c" * 50]
        assert client.udp.too_big == 2
        client.udp.send([b"d" * 100] * 9, server.address)
        await server.received(10)
        assert fussy.calls == [250, 100, 100, 50, 900]
        await client.until(lambda: bool(client.errors))
        client.close()
        server.close()

    run(main())


@linux
@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_a_device_without_gso_switches_it_off(run: Run, number: int) -> None:
    async def main() -> None:
        server = Peer(bound())
        fussy = Fussy(bound(), number)
        client = Peer(fussy)
        sent = [bytes([i]) * 100 for i in range(5)]
        client.udp.send(sent, server.address)
        client.udp.send(sent, server.address)
        assert await server.received(10) == sent * 2
        assert fussy.calls == [500, *[100] * 10]
        assert not client.errors
        assert client.udp.dropped == 0
        client.close()
        server.close()

    run(main())


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EPERM, errno.EADDRNOTAVAIL])
def test_a_lost_datagram_does_not_hold_up_the_next(run: Run, number: int) -> None:
    async def main() -> None:
        server = Peer(bound())
        client = Peer(Fussy(bound(), None, number), offload=False)
        assert client.udp.send([b"a", b"lost", b"c"], server.address)
        assert await server.received(2) == [b"a", b"c"]
        await client.until(lambda: bool(client.errors))
        assert [e.errno for e in client.errors] == [number]
        assert client.udp.dropped == 1
        client.close()
        server.close()

    run(main())


# --- no room


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS])
def test_what_finds_no_room_waits_and_goes_out_in_order(run: Run, offload: bool, number: int) -> None:
    async def main() -> None:
        server = Peer(bound(), offload=offload)
        other = errno.ENOBUFS if number == errno.EAGAIN else errno.EAGAIN
        client = Peer(Fussy(bound(), None, number, number, other, None, number), offload=offload)
        sent = mixed(16)
        assert not client.udp.send(sent, server.address)
        assert client.udp.blocked
        assert not client.udp.send([b"later"], server.address)
        assert await server.received(17) == [*sent, b"later"]
        await client.until(lambda: client.writable == 1)
        assert not client.udp.blocked
        assert client.udp.send([b"last"], server.address)
        assert (await server.received(18))[-1] == b"last"
        assert (client.writable, client.udp.dropped, client.errors) == (1, 0, [])
        client.close()
        server.close()

    run(main())


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
def test_a_socket_that_is_really_full(run: Run, offload: bool) -> None:
    """A Unix datagram socket says EAGAIN where UDP on loopback would drop: the rest comes later."""

    async def main() -> None:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        client, server = Peer(one, connected=("other",), offload=offload), Peer(other, connected=("one",))
        server.udp.pause()
        sent = [b"%d" % i for i in range(1500)]
        assert not client.udp.send(sent[:1400], ("other",))
        assert not client.udp.send(sent[1400:], ("other",))
        assert client.udp.blocked
        assert client.udp.datagrams_sent < 1400
        server.udp.resume()
        await client.until(lambda: client.writable > 0)
        assert await server.received(1500) == sent
        assert (client.writable, client.udp.datagrams_sent, client.udp.dropped) == (1, 1500, 0)
        client.close()
        server.close()

    run(main())


def test_a_full_device_is_not_asked_through_the_socket(run_readers: Run) -> None:
    """ENOBUFS leaves the socket writable: a writer would spin, so a timer it is."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        fussy = Fussy(bound(), errno.EAGAIN, always=errno.ENOBUFS)
        client = Peer(fussy, offload=False)
        client.udp.send([b"x"], client.address)
        while len(fussy.calls) < 2:
            await asyncio.sleep(0)
        assert not loop.remove_writer(client.udp._fd)
        fussy.always = None
        await client.until(lambda: client.writable == 1)
        assert await client.received(1) == [b"x"]
        client.close()

    run_readers(main())


def test_the_queue_is_bounded(run: Run) -> None:
    async def main() -> None:
        server = Peer(bound(), offload=False)
        fussy = Fussy(bound(), always=errno.EAGAIN)
        client = Peer(fussy, offload=False)
        client.udp.send([b"x"] * 3000, server.address)
        assert client.udp.dropped == 3000 - udp._QUEUE_DATAGRAMS
        client.close()
        assert client.udp.dropped == 3000
        assert len(fussy.calls) == 1

        client = Peer(Fussy(bound(), always=errno.EAGAIN), offload=False)
        for _ in range(3):
            client.udp.send([b"x" * 60_000] * 20, server.address)
        assert client.udp.dropped == 60 - udp._QUEUE_BYTES // 60_000
        client.close()
        server.close()

    run(main())


def test_room_in_the_queue_comes_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "_QUEUE_DATAGRAMS", 3)
    monkeypatch.setattr(udp, "_QUEUE_BYTES", 30)

    async def main() -> None:
        server = Peer(bound(), offload=False)
        fussy = Fussy(bound())
        client = Peer(fussy, offload=False)
        for round_ in range(1, 4):
            fussy.answers = [errno.EAGAIN]
            assert not client.udp.send([b"0123456789"] * 4, server.address)
            assert client.udp.dropped == round_
            await client.until(lambda r=round_: client.writable == r)  # type: ignore[misc]
        assert await server.received(9) == [b"0123456789"] * 9
        client.close()
        server.close()

    run(main())


# --- closing


@pytest.mark.parametrize(
    "state", ["fresh", "started", "paused", "blocked", "full", "told", "in the callback"]
)
def test_close_leaves_nothing(run: Run, offload: bool, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "_RETRY", 0.0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        fussy = Fussy(bound(), always={"blocked": errno.EAGAIN, "full": errno.ENOBUFS}.get(state))
        server = UdpSocket(fussy, offload=offload)  # type: ignore[arg-type]
        address = server.local_address
        late: list[Any] = []
        closed = asyncio.Event()

        def take(datagrams: list[Datagram]) -> None:
            server.close()
            closed.set()

        if state != "fresh":
            server.start(take, late.append, lambda: late.append("writable"))
            for _ in range(3):  # it waits by now, where waiting is a task
                await asyncio.sleep(0)
        if state == "paused":
            server.pause()
        if state in ("blocked", "full"):
            assert not server.send([b"x"], ("127.0.0.1", 9))
        if state == "told":
            server.send([b"x" * 70_000], ("127.0.0.1", 9))
        if state == "in the callback":
            server.send([b"x"], address)
            await closed.wait()
        fd = server._fd
        server.close()
        server.close()
        assert fussy.fileno() == -1
        assert not server.blocked
        bound_again = open_socket(V4, local=address)  # at once
        if not isinstance(loop, NoReaders):
            assert not loop.remove_reader(fd)
            assert not loop.remove_writer(fd)
        dropped = server.dropped
        assert server.send([b"x"], address)
        assert server.dropped == dropped + 1
        server.pause()
        server.resume()
        for _ in range(3):
            await asyncio.sleep(0)
        assert late == []
        assert asyncio.all_tasks() == {asyncio.current_task()}
        bound_again.close()

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        run(main())
        gc.collect()
