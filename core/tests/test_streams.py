"""The stream over asyncio: bounded both ways, cheap, and clear about its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from loops import Run

from tesaiot_connect.accept import accepting, serving
from tesaiot_connect.errors import Disconnected, PathLost, Unsupported
from tesaiot_connect.protocols import Peer, State
from tesaiot_connect.streams import AsyncioStream, StreamConnection, explain_os_error


async def stream_and_socket() -> tuple[AsyncioStream, socket.socket]:
    """A stream and the plain socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    _, stream = await asyncio.get_running_loop().create_connection(AsyncioStream, sock=ours)
    return stream, theirs


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def with_stream(body: Callable[[AsyncioStream, socket.socket], Awaitable[None]]) -> Any:
    async def main() -> None:
        stream, theirs = await stream_and_socket()
        with theirs:
            await body(stream, theirs)
            stream.abort()
            await stream.wait_gone()

    return main()


def test_a_stream_that_is_not_read_stops_reading_its_socket(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        written = 0
        for _ in range(200):
            try:
                written += theirs.send(b"x" * 65536)
            except BlockingIOError:
                await asyncio.sleep(0)
        assert not stream.transport.is_reading()
        assert 0 < stream.bytes_received <= 2 * 256 * 1024
        assert written < 200 * 65536
        got = 0
        while got < written:
            got += len(await stream.receive(1 << 20))
        assert got == written

    run(with_stream(body))


def test_receive_hands_over_everything_that_is_buffered(run: Run) -> None:
    """A driver that pauses between receives gets what gathered, at one wakeup."""

    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        theirs.send(b"0")
        await until(lambda: stream.bytes_received > 0)
        for number in range(100):  # while nobody receives, these stay in the socket
            theirs.send(b"%02d" % number)
        assert await stream.receive() == b"0"
        assert await stream.receive() == b"".join(b"%02d" % number for number in range(100))

    run(with_stream(body))


def test_chunks_are_cut_to_size_and_joined(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        stream.data_received(b"abcdefgh")
        stream.data_received(b"ijkl")
        assert await stream.receive(3) == b"abc"
        assert await stream.receive(3) == b"def"
        assert await stream.receive(3) == b"gh"
        stream.data_received(b"mn")
        assert await stream.receive(100) == b"ijklmn"

    run(with_stream(body))


def test_two_receivers_at_once_is_a_mistake(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        first = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await stream.receive()
        theirs.send(b"x")
        assert await first == b"x"

    run(with_stream(body))


def test_several_senders_wait_and_go_on(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        data = b"x" * 2_000_000
        sends = [asyncio.create_task(stream.send(data)) for _ in range(3)]
        await asyncio.sleep(0)
        got, loop = 0, asyncio.get_running_loop()
        while got < 3 * len(data):
            got += len(await loop.sock_recv(theirs, 65536))
        await asyncio.gather(*sends)
        assert stream.bytes_sent == got

    run(with_stream(body))


def test_the_end_of_the_peer(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        theirs.send(b"bye")
        theirs.shutdown(socket.SHUT_WR)
        assert await stream.receive() == b"bye"
        assert await stream.receive() == b""
        assert await stream.receive() == b""
        await stream.send(b"still here")  # our own direction is open
        assert await asyncio.get_running_loop().sock_recv(theirs, 100) == b"still here"
        await stream.aclose()
        assert stream.close_reason is not None
        assert stream.close_reason.by_peer

    run(with_stream(body))


def test_a_reset_is_told(run: Run) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
            loop = asyncio.get_running_loop()
            _, stream = await loop.create_connection(AsyncioStream, sock=client)
            receiving = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()  # with a reset
            with pytest.raises(Disconnected, match="reset") as first:
                await receiving
            assert isinstance(first.value.__cause__, OSError)
            for use in (stream.receive, lambda: stream.send(b"x")):
                with pytest.raises(Disconnected, match="reset"):
                    await use()
            await stream.aclose()
            assert stream.state is State.CLOSED
            assert stream.close_reason is not None
            assert "reset" in stream.close_reason.text

    run(main())


def test_a_peer_that_leaves_without_a_word(run: Run) -> None:
    async def main() -> None:
        silent = Disconnected("it never spoke", fix="ask it")
        for speaks, resets in ((False, False), (False, True), (True, False)):
            with socket.create_server(("127.0.0.1", 0)) as server:
                client = socket.create_connection(server.getsockname())
                theirs, _ = server.accept()
                _, stream = await asyncio.get_running_loop().create_connection(
                    lambda: AsyncioStream(silent=silent), sock=client
                )
                if speaks:
                    theirs.send(b"x")
                    assert await stream.receive() == b"x"
                if resets:
                    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                theirs.close()
                if speaks:
                    assert await stream.receive() == b""
                else:
                    with pytest.raises(Disconnected, match=r"it never spoke. ask it"):
                        await stream.receive()
                await stream.aclose()

    run(main())


def test_a_connection_that_broke_before_its_stream_was_taken_says_why(run: Run) -> None:
    async def main() -> None:
        silent = Disconnected("it never spoke", fix="ask it")
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
            theirs.close()
            _, stream = await asyncio.get_running_loop().create_connection(
                lambda: AsyncioStream(silent=silent, half_close=False), sock=client
            )
            connection = StreamConnection(stream, Peer("there", "test"))
            await stream.wait_gone()
            with pytest.raises(Disconnected, match=r"it never spoke. ask it"):
                await connection.open_stream()

    run(main())


def test_after_close_on_this_side(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        theirs.close()
        await stream.aclose()
        await stream.aclose()
        for use in (stream.receive, lambda: stream.send(b"x"), stream.send_eof):
            with pytest.raises(Disconnected):
                await use()

    run(with_stream(body))


def test_send_after_send_eof_is_a_mistake(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        await stream.send_eof()
        await stream.send_eof()
        with pytest.raises(RuntimeError, match="send_eof"):
            await stream.send(b"x")

    run(with_stream(body))


@pytest.mark.parametrize("how", ["aclose", "send_eof"])
def test_a_reset_that_was_not_noticed_yet(run: Run, how: str) -> None:
    """The peer died a moment ago and the event loop has not looked at the socket since."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
            loop = asyncio.get_running_loop()
            _, stream = await loop.create_connection(AsyncioStream, sock=client)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            if how == "send_eof":
                with contextlib.suppress(Disconnected):
                    await stream.send_eof()
            await stream.aclose()
            await stream.wait_gone()

    run(main())


def test_aclose_delivers_although_unread_bytes_wait(run: Run) -> None:
    """Closing a socket with unread bytes in it would throw away what was sent last."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
            theirs.setblocking(False)
            loop = asyncio.get_running_loop()
            _, stream = await loop.create_connection(lambda: AsyncioStream(close_timeout=1000), sock=client)
            theirs.send(b"unread" * 1000)
            await until(lambda: stream.bytes_received > 0)
            theirs.send(b"unread" * 1000)
            data = b"x" * 3_000_000
            sending = asyncio.create_task(stream.send(data))
            await asyncio.sleep(0)

            async def close() -> None:
                await sending
                await stream.aclose()

            closing = asyncio.create_task(close())
            got = bytearray()
            while piece := await loop.sock_recv(theirs, 65536):
                got += piece
            theirs.close()
            await closing
            assert got == data

    run(main())


def test_a_peer_that_takes_nothing_is_cut_off(run: Run) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            _, stream = await asyncio.get_running_loop().create_connection(
                lambda: AsyncioStream(close_timeout=0.05), sock=ours
            )
            sending = asyncio.create_task(stream.send(b"x" * 5_000_000))
            await asyncio.sleep(0)
            await stream.aclose()
            assert stream.state is State.CLOSED
            with pytest.raises(Disconnected):
                await sending

    run(main())


def test_a_connection_has_one_stream(run: Run) -> None:
    async def body(stream: AsyncioStream, theirs: socket.socket) -> None:
        dialled = StreamConnection(stream, Peer("there", "test"))
        assert await dialled.open_stream() is stream
        with pytest.raises(Unsupported, match="one stream"):
            await dialled.open_stream()
        accepted = StreamConnection(stream, Peer("there", "test"), accepted=True)
        with pytest.raises(Unsupported, match="accept_stream"):
            await accepted.open_stream()
        assert await accepted.accept_stream() is stream
        waiting = asyncio.create_task(accepted.accept_stream())
        for call in (accepted.probe, accepted.migrate):
            with pytest.raises(Unsupported):
                await call()
        accepted.set_keepalive(10)
        theirs.close()
        await dialled.aclose()
        with pytest.raises(Disconnected, match="no more streams"):
            await waiting
        assert dialled.status().state is State.CLOSED

    run(with_stream(body))


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (ConnectionResetError(), "reset"),
        (BrokenPipeError(), "reset"),
        (TimeoutError(), "no longer answers"),
        (OSError(errno.EHOSTUNREACH, "x"), "path"),
        (OSError(errno.ENETUNREACH, "x"), "path"),
        (OSError(errno.EIO, "strange"), "strange"),
    ],
)
def test_errors_in_words(error: OSError, word: str) -> None:
    told = explain_os_error(error)
    assert word in str(told)
    assert told.__cause__ is error
    silent = word in ("no longer answers", "path")
    assert isinstance(told, PathLost) == silent
    assert ("goes on over the next endpoint" in told.fix) == silent


def test_a_handshake_that_fails_ends_only_itself(run: Run) -> None:
    async def main() -> None:
        served: list[str] = []
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        addresses = [sock.getsockname() for sock in sockets]
        seen = 0

        async def secure(sock: socket.socket) -> StreamConnection:
            nonlocal seen
            seen += 1
            if seen == 1:
                sock.close()
                raise ValueError("not a handshake")
            loop = asyncio.get_running_loop()
            _, stream = await loop.connect_accepted_socket(AsyncioStream, sock)
            return StreamConnection(stream, Peer(f"peer {seen}", "test"), accepted=True)

        async def handler(connection: Any) -> None:
            served.append(connection.peer.address)

        async with accepting(sockets, secure, handler):
            for number, address in enumerate((addresses[0], addresses[1], addresses[0]), 1):
                with socket.create_connection(address) as client:
                    client.setblocking(False)
                    await until(lambda number=number: seen == number)  # type: ignore[misc]
                    assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        assert served == ["peer 2", "peer 3"]
        for address in addresses:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)

    run(main())


def test_a_handler_that_fails_is_logged(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        stream, theirs = await stream_and_socket()
        theirs.close()
        connection = StreamConnection(stream, Peer("peer 1", "test"), accepted=True)

        async def made() -> StreamConnection:
            return connection

        async def handler(_connection: Any) -> None:
            raise KeyError("oops")

        async with serving(handler) as start:
            start(made)
            await connection.wait_closed()

    run(main())
    assert "the handler of peer 1 failed" in caplog.text
