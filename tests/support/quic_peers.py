"""A broker and a client on either side of a `Lab`, each on an event loop inside its namespace.

`serving` runs our broker in a thread: QUIC for the outside, TCP on its loopback for the subscriber that
collects numbered messages. `Keeping` is a dialer that shows the connections its client has had, and
`Moved` a client to which something happens in mid-stream.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

from netlab import Lab

from tesaiot_connect import (
    Backoff,
    BoundUrl,
    Broker,
    BrokerOptions,
    Client,
    ClientCertificate,
    ClientOptions,
    Connection,
    Duration,
    ListenerSpec,
    ListenerStatus,
    Message,
    Negotiator,
    Subscription,
    TlsOptions,
    Transport,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_quic_aioquic.connection import QuicConnection
from tesaiot_connect_tcp_tls import TcpTls

PORT = 14567
TOPIC = "device/d1/telemetry"
_CHUNK = 1000
Streams = Literal["single", "per-topic"]
QUICK = Backoff(min=Duration(0.05), max=Duration(0.5))


async def until(true: Callable[[], object], what: str = "", seconds: float = 60.0) -> None:
    """Returns once it is true. For what nothing announces."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what or "it did not come about"
        await asyncio.sleep(0.005)


class Served:
    """A broker that runs, and the numbers that its subscriber has got."""

    def __init__(self) -> None:
        self.url = ""
        self.numbers: list[int] = []
        self.seen: set[int] = set()
        """The same without duplicates."""
        self.subscriber_connects = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._status: Callable[[], ListenerStatus] | None = None
        self._ready = threading.Event()
        self._error: BaseException | None = None

    def status(self) -> ListenerStatus:
        """The QUIC listener's."""

        async def ask() -> ListenerStatus:
            assert self._status is not None
            return self._status()

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(20)

    def _run(self, side: Any, transport: QuicAioquic, options: BrokerOptions) -> None:
        try:
            with side:
                asyncio.run(self._serve(transport, options))
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self, transport: QuicAioquic, options: BrokerOptions) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        specs = [
            ListenerSpec("quic", transport),
            ListenerSpec("tcp", TcpTls(Url.parse("mqtt://127.0.0.1:0"))),
        ]
        async with Broker(options).serving(specs) as (quic, tcp):
            assert isinstance(quic, BoundUrl)
            self._status = quic.status
            subscriber = Client(Negotiator([TcpTls(Url.parse(tcp))]), ClientOptions(receive_maximum=65535))
            async with subscriber, subscriber.subscribe([Subscription(f"{TOPIC}/#", qos=1)]) as reader:
                subscribed = asyncio.create_task(reader.read())
                async with Client(Negotiator([TcpTls(Url.parse(tcp))])) as first:
                    while not subscribed.done():
                        await first.publish([Message(TOPIC, b"-1")])
                        await asyncio.wait([subscribed], timeout=0.05)
                await (await subscribed).ack()
                collecting = asyncio.create_task(self._collect(reader))
                self.url = str(quic)
                self._ready.set()
                await self._stop.wait()
                collecting.cancel()
                await asyncio.wait([collecting])
                self.subscriber_connects = subscriber.status.connects

    async def _collect(self, reader: Any) -> None:
        while True:
            delivery = await reader.read()
            found = [int(message.payload[:12]) for message in delivery.batch.messages]
            self.numbers += [number for number in found if number >= 0]
            self.seen.update(self.numbers[-len(found) :])
            await delivery.ack()


@contextmanager
def serving(
    lab: Lab | None,
    certificates: Certificates,
    options: BrokerOptions | None = None,
    *,
    port: int | None = None,
    **quic: Any,
) -> Iterator[Served]:
    """Our broker in the lab's `sv`, or on a port of loopback. `quic` are the listener's options."""
    host = lab.server if lab else "127.0.0.1"
    if port is None:
        port = PORT if lab else 0
    served = Served()
    transport = QuicAioquic(Url.parse(f"quic://{host}:{port}"), server_tls=certificates.server(host), **quic)
    side = lab.enter("sv") if lab else nullcontext()
    thread = threading.Thread(target=served._run, args=(side, transport, options or BrokerOptions()))
    thread.start()
    try:
        assert served._ready.wait(60)
        if served._error is None:
            yield served
    finally:
        if served._loop is not None and thread.is_alive():
            served._loop.call_soon_threadsafe(served._stop.set)
        thread.join()
    if served._error is not None:
        raise served._error


class Keeping:
    """A `Dialer` that keeps what it has dialled."""

    def __init__(self, transport: Transport) -> None:
        self.connections: list[Connection] = []
        self._dialer = Negotiator([transport])

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        connection = await self._dialer.connect(identity=identity, early=early)
        self.connections.append(connection)
        return connection


@asynccontextmanager
async def connected(
    url: str, certificates: Certificates, folder: Path, streams: Streams = "single", **quic: Any
) -> AsyncIterator[tuple[Client, Keeping]]:
    """A client of that broker, connected, with its dialer."""
    transport = QuicAioquic(
        Url.parse(url), tls=TlsOptions(ca_file=certificates.ca_file), ticket_folder=folder, **quic
    )
    dialer = Keeping(transport)
    async with Client(dialer, ClientOptions(client_id="mover", reconnect=QUICK, streams=streams)) as client:
        await client.connected()
        yield client, dialer


def messages(numbers: Sequence[int], size: int = 100) -> list[Message]:
    """QoS 1 messages on eight topics, `size` bytes each, that begin with their number."""
    return [Message(f"{TOPIC}/{number % 8}", b"%-*d" % (size, number), qos=1) for number in numbers]


def gives_up_after(connection: Connection, seconds: float) -> None:
    """From here on this connection has that `path_timeout`: before it, and those after it, keep theirs."""
    life = cast("QuicConnection", connection)._liveness
    life._limit, life._early = seconds, min(life._early, seconds / 4)


async def apart(change: Callable[..., object], *arguments: object) -> None:
    """The lab's changes run programs: the event loop does not wait for them."""
    await asyncio.to_thread(change, *arguments)


class Moved:
    """A client in `cl`, and what it sends through the faults of a test."""

    def __init__(self, lab: Lab, served: Served, certificates: Certificates, folder: Path) -> None:
        self.lab, self.served = lab, served
        self._certificates, self._folder = certificates, folder
        self.sent = 0

    def run(self, test: Callable[[Client, Keeping], Awaitable[None]], **quic: Any) -> None:
        """With a client that is connected. Its patience is for a machine that stands still for seconds: what
        must end a connection sooner says so itself."""
        for name, seconds in (("connect_timeout", 30.0), ("path_timeout", 60.0), ("idle_timeout", 100.0)):
            quic.setdefault(name, seconds)

        async def main() -> None:
            async with (
                asyncio.timeout(200),
                connected(self.served.url, self._certificates, self._folder, **quic) as (client, dialer),
            ):
                await test(client, dialer)

        self.run_alone(main())

    def run_alone(self, main: Coroutine[Any, Any, None]) -> None:
        with self.lab.enter("cl"):
            asyncio.run(main)

    def recipe(self, **quic: Any) -> QuicAioquic:
        quic.setdefault("connect_timeout", 30.0)
        tls = TlsOptions(ca_file=self._certificates.ca_file)
        return QuicAioquic(Url.parse(self.served.url), tls=tls, ticket_folder=self._folder, **quic)

    async def publish(self, client: Client, count: int, meanwhile: Callable[[], Awaitable[object]]) -> None:
        """`meanwhile` happens in the midst of `count` messages or more. Returns when all have arrived."""
        first, goal = self.sent, self.sent + count
        changed = False

        async def feed() -> None:
            while self.sent < goal or not changed:
                numbers = range(self.sent, self.sent + _CHUNK)
                self.sent += _CHUNK
                await client.publish(messages(numbers))

        feeding = asyncio.create_task(feed())
        try:
            await until(lambda: len(self.served.seen) >= first + count // 4)
            await meanwhile()
            changed = True
            await feeding
            await until(lambda: len(self.served.seen) >= self.sent)
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])

    def check(self, client: Client) -> None:
        """Nothing lost, nothing twice, and MQTT noticed nothing."""
        assert sorted(self.served.numbers) == list(range(self.sent))
        assert client.status.connects == 1
