"""What the tests of QUIC's handshake, listener and hostile peers share.

`echoing` is a listener that answers and keeps what it got. `Raw` is aioquic's machine on a socket of its
own: a client that can be made to misbehave. `Relay` stands between two sides and keeps their datagrams.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection as AioquicConnection
from quic_clock import steady_loop

from tesaiot_connect import BoundUrl, Connection, Disconnected, ListenerStatus, TlsOptions, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic

HOST = "127.0.0.1"


def run(main: Coroutine[Any, Any, None], seconds: float = 60.0) -> None:
    """Runs the test on a loop that must end without a task or a complaint left behind.

    Its clock is steady: no timeout passes because this process was kept from its work.
    """
    complaints: list[dict[str, Any]] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(seconds):
            await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    with asyncio.Runner(loop_factory=steady_loop) as runner:
        runner.run(bounded())
    assert not complaints


async def until(true: Callable[[], object], what: str = "", seconds: float = 60.0) -> None:
    """Returns once it is true. For what nothing announces."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what or "it did not come about"
        await asyncio.sleep(0.002)


def url(text: str) -> Url:
    return Url.parse(text)


def port_of(bound: str) -> int:
    port = Url.parse(bound).port
    assert port
    return port


class Echo:
    """A listener's handler: every stream's bytes come back, and stay here for the test."""

    def __init__(self, bound: BoundUrl) -> None:
        self.url = bound
        self.port = port_of(bound)
        self.connections: list[Connection] = []
        self.got: list[bytearray] = []
        """What came, one for each stream."""
        self.told: list[str] = []
        """What its connections ended with."""

    def status(self) -> ListenerStatus:
        return self.url.status()


@asynccontextmanager
async def echoing(certificates: Certificates, host: str = HOST, **options: Any) -> AsyncIterator[Echo]:
    """Our listener, which echoes. `options` are the recipe's."""
    options.setdefault("server_tls", certificates.server())
    recipe = QuicAioquic(Url.parse(f"quic://{host}:0" if "://" not in host else host), **options)
    found: list[Echo] = []

    async def serve(connection: Connection) -> None:
        echo = found[0]
        echo.connections.append(connection)
        streams: list[asyncio.Task[None]] = []
        try:
            while True:
                stream = await connection.accept_stream()
                got = bytearray()
                echo.got.append(got)
                streams.append(asyncio.create_task(_echo(stream, got)))
        except Disconnected as error:
            echo.told.append(str(error))
            raise
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async with recipe.listen(serve) as bound:
        assert isinstance(bound, BoundUrl)
        found.append(Echo(bound))
        yield found[0]


async def _echo(stream: Any, got: bytearray) -> None:
    try:
        while data := await stream.receive():
            got += data
            await stream.send(data)
        await stream.send_eof()
    except Disconnected:
        pass


def client(bound: str, certificates: Certificates, folder: Path, **options: Any) -> QuicAioquic:
    options.setdefault("tls", TlsOptions(ca_file=certificates.ca_file))
    options.setdefault("connect_timeout", 30.0)
    return QuicAioquic(Url.parse(bound), ticket_folder=folder, **options)


async def exactly(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive()
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return data


async def ask(connection: Any, data: bytes) -> None:
    """A stream there and back."""
    stream = await connection.open_stream()
    await stream.send(data)
    assert await exactly(stream, len(data)) == data
    await stream.aclose()


async def resumable(recipe: QuicAioquic, folder: Path) -> None:
    """Connects and leaves once the server's ticket is there."""
    connection = await recipe.connect()
    await ask(connection, b"for a ticket")
    await until(lambda: any(folder.glob("*.ticket")), "no ticket came")
    await connection.aclose()


class Raw:
    """aioquic's own client machine on a socket of its own: `async with Raw(port) as raw`."""

    def __init__(self, port: int, host: str = HOST, **configuration: Any) -> None:
        configuration.setdefault("alpn_protocols", ["mqtt"])
        configuration.setdefault("server_name", "localhost")
        configuration.setdefault("verify_mode", ssl.CERT_NONE)
        self.quic = AioquicConnection(configuration=QuicConfiguration(is_client=True, **configuration))
        self.address = (host, port)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.connect(self.address)
        self.socket.setblocking(False)
        self.events: list[events.QuicEvent] = []
        self.received: list[bytes] = []
        self.sent: list[bytes] = []

    async def __aenter__(self) -> Raw:
        self.loop = asyncio.get_running_loop()
        self._inbox: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        self.loop.add_reader(self.socket, self._readable)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.loop.remove_reader(self.socket)
        self.socket.close()

    def _readable(self) -> None:
        try:
            self._inbox.append(self.socket.recv(65536))
        except ConnectionRefusedError:
            return
        self._arrived.set()

    def connect(self) -> None:
        self.quic.connect(self.address, self.loop.time())
        self.flush()

    async def handshake(self) -> None:
        self.connect()
        await self.until(lambda: self.event(events.HandshakeCompleted))

    def event(self, kind: type[Any]) -> Any:
        return next((event for event in self.events if isinstance(event, kind)), None)

    @property
    def ended(self) -> Any:
        """aioquic's ConnectionTerminated, at once."""
        return self.quic._close_event if self.quic._state.value >= 2 else None

    def flush(self) -> None:
        for data, _ in self.quic.datagrams_to_send(self.loop.time()):
            self.send(data)

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        self.socket.send(data)

    async def receive(self, seconds: float = 30.0) -> bytes:
        async with asyncio.timeout(seconds):
            while not self._inbox:
                self._arrived.clear()
                await self._arrived.wait()
        data = self._inbox.popleft()
        self.received.append(data)
        return data

    def take(self, data: bytes) -> None:
        self.quic.receive_datagram(data, self.address, self.loop.time())
        while event := self.quic.next_event():
            self.events.append(event)

    async def until(self, true: Callable[[], object], seconds: float = 30.0) -> None:
        """Plays its part until it is true."""
        async with asyncio.timeout(seconds):
            while not true():
                self.flush()
                due = self.quic.get_timer()
                now = self.loop.time()
                try:
                    self.take(await self.receive(60 if due is None else max(0.001, due - now)))
                except TimeoutError:
                    if due is not None and self.loop.time() >= due:
                        self.quic.handle_timer(self.loop.time())
                        while event := self.quic.next_event():
                            self.events.append(event)
        self.flush()


class Relay:
    """Between a client and a server on loopback: keeps what passed, and may drop it.

    `passes` says of each datagram (from the client?, its number in that direction, its bytes) whether it may.
    """

    def __init__(self, port: int, passes: Callable[[bool, int, bytes], bool] | None = None) -> None:
        self.to_server: list[bytes] = []
        self.to_client: list[bytes] = []
        self._passes = passes or (lambda *_: True)
        self._server = (HOST, port)
        self._client: Any = None
        self.near = self._socket()
        self.near.bind((HOST, 0))
        self.far = self._socket()
        self.far.connect(self._server)
        self.url = f"quic://localhost:{self.near.getsockname()[1]}"

    @staticmethod
    def _socket() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        return sock

    async def __aenter__(self) -> Relay:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.near, self._from_client)
        loop.add_reader(self.far, self._from_server)
        return self

    async def __aexit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for sock in (self.near, self.far):
            loop.remove_reader(sock)
            sock.close()

    def _from_client(self) -> None:
        data, self._client = self.near.recvfrom(65536)
        self.to_server.append(data)
        if self._passes(True, len(self.to_server), data):
            try:
                self.far.send(data)
            except ConnectionRefusedError:
                pass

    def _from_server(self) -> None:
        try:
            data = self.far.recv(65536)
        except ConnectionRefusedError:
            return
        self.to_client.append(data)
        if self._passes(False, len(self.to_client), data):
            self.near.sendto(data, self._client)


async def throw(port: int, datagrams: Sequence[bytes], *, answers: int = 0) -> list[bytes]:
    """Sends them from a new socket, and returns the first answers."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((HOST, port))
        for data in datagrams:
            sock.send(data)
        async with asyncio.timeout(30):
            return [await loop.sock_recv(sock, 65536) for _ in range(answers)]
