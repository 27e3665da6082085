"""Both ends of `quic_nng`: our broker, and the plugin with one of two libraries.

"stub" is the stand-in built from C in this repository. It speaks TCP, so our broker listens for MQTT over TCP
there. "real" is the library that TESAIOT_NNG_LIBRARY names, with QUIC between the two. What is true of one is
to be true of the other.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nng_stub
import pytest

from tesaiot_connect import (
    Backoff,
    Broker,
    BrokerOptions,
    Client,
    ClientCertificate,
    ClientOptions,
    Connection,
    Duration,
    Listener,
    ListenerSpec,
    Message,
    Negotiator,
    Subscription,
    TlsOptions,
    Url,
)
from tesaiot_connect.mqtt import (
    V3,
    ClientEngine,
    Connect,
    Event,
    Send,
    Session,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_quic_nng import QuicNng
from tesaiot_connect_tcp_tls import TcpTls

HOST = "127.0.0.1"
PATIENCE = 30.0
LONG = Duration(PATIENCE)
PATIENT = ClientOptions(protocol="3.1.1", connect_timeout=LONG)
QUICK = Backoff(min=Duration(0.02), max=Duration(0.1))
Name = Literal["stub", "real"]
NAMES: Sequence[Name] = ("stub", "real")
REAL = "TESAIOT_NNG_LIBRARY"
CLOSED_PORT = 1
"""Of TCP and UDP: nobody listens there."""


class Ends(NamedTuple):
    name: Name
    certificates: Certificates
    library: Path | None
    """With libmsquic beside it. None: as the environment says."""

    @property
    def options(self) -> dict[str, Any]:
        """What an endpoint needs beside its url."""
        if self.library is None:
            return {"verify_hostname": False}
        return {
            "verify_hostname": False,
            "library": self.library,
            "msquic": self.library.with_name("libmsquic.so"),
        }

    def recipe(self, url: str, **options: Any) -> QuicNng:
        """It may take its time, where `options` say nothing else."""
        long = {"connect_timeout": LONG, "ack_timeout": LONG}
        options = {"tls": TlsOptions(ca_file=self.certificates.ca_file), **long, **self.options, **options}
        return QuicNng(Url.parse(url), **options)

    def endpoint(self, url: str) -> str:
        """The same in TOML, on one line."""
        long = {"connect_timeout": f"{LONG:g}s", "ack_timeout": f"{LONG:g}s"}
        options = {"tls.ca_file": self.certificates.ca_file, **long, **self.options}
        rest = ", ".join(
            f"{key} = {'false' if value is False else repr(str(value))}" for key, value in options.items()
        )
        return f'{{ url = "{url}", via = "quic_nng", {rest} }}'

    def listener(self, port: int = 0) -> Listener:
        if self.name == "stub":
            return TcpTls(Url.parse(f"mqtt://{HOST}:{port}"))
        return QuicAioquic(Url.parse(f"quic://{HOST}:{port}"), server_tls=self.certificates.server(HOST))


def ends(name: Name, certificates: Certificates, folder: Path) -> Ends:
    """Skips what cannot be had. The stand-in is installed in `folder`."""
    if os.name != "posix":
        pytest.skip("quic_nng is for POSIX systems")
    if name == "stub":
        library = folder / "libnng.so"
        return Ends(name, certificates, library if library.exists() else nng_stub.installed(folder))
    if not os.environ.get(REAL):
        pytest.skip(f"{REAL} names no NanoSDK: set it to run this against the real library")
    return Ends(name, certificates, None)


class Served(NamedTuple):
    """Our broker, at `url` for the plugin and at `tcp` for everybody else."""

    broker: Broker
    url: str
    tcp: str


@asynccontextmanager
async def serving(
    ends: Ends, *, port: int = 0, authenticator: Any = None, options: BrokerOptions | None = None
) -> AsyncIterator[Served]:
    guarded = () if authenticator is None else (authenticator,)
    specs = [
        ListenerSpec("plugin", ends.listener(port), *guarded),
        ListenerSpec("tcp", TcpTls(Url.parse(f"mqtt://{HOST}:0"))),
    ]
    broker = Broker(options)
    async with broker.serving(specs) as (url, tcp):
        yield Served(broker, f"quic://{HOST}:{Url.parse(url).port}", str(tcp))


class Watched:
    """A dialer that shows the connections it has made."""

    def __init__(self, transport: QuicNng) -> None:
        self.connections: list[Any] = []
        self._transport = transport

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.connections.append(await self._transport.connect(identity=identity, early=early))
        return self.connections[-1]  # type: ignore[no-any-return]


def client(dialer: QuicNng | Watched, **options: Any) -> Client:
    if isinstance(dialer, QuicNng):
        dialer = Watched(dialer)
    patient = {"protocol": "3.1.1", "reconnect": QUICK, "connect_timeout": LONG}
    return Client(dialer, ClientOptions(**{**patient, **options}))


class Collected:
    """What a subscriber beside the broker has got."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._news = asyncio.Event()

    def put(self, messages: Sequence[Message]) -> None:
        self.messages += messages
        self._news.set()

    async def until(self, reached: Callable[[], object], patience: float = PATIENCE) -> None:
        """Looks whenever something came."""
        async with asyncio.timeout(patience):
            while not reached():
                self._news.clear()
                await self._news.wait()

    async def count(self, number: int) -> list[Message]:
        try:
            await self.until(lambda: len(self.messages) >= number)
        except TimeoutError:
            raise AssertionError(f"{len(self.messages)} of {number} messages came") from None
        return self.messages

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]


@asynccontextmanager
async def subscriber(tcp: str, *filters: str, qos: int = 2) -> AsyncIterator[Collected]:
    """Collects over TCP, from when this is entered until it is left."""
    collected = Collected()
    beside = Client(Negotiator([TcpTls(Url.parse(tcp))]), ClientOptions(reconnect=QUICK))
    async with beside, beside.subscribe([Subscription(one, qos) for one in filters]) as reader:
        await reader.grant()

        async def collect() -> None:
            while True:
                delivery = await reader.read()
                collected.put(delivery.batch.messages)
                await delivery.ack()

        task = asyncio.create_task(collect())
        try:
            yield collected
        finally:
            task.cancel()
            await asyncio.wait([task])


async def read(reader: Any, count: int) -> list[Message]:
    """So many messages, or more where they come together."""
    found: list[Message] = []
    try:
        async with asyncio.timeout(PATIENCE):
            while len(found) < count:
                delivery = await reader.read()
                found += delivery.batch.messages
                await delivery.ack()
    except TimeoutError:
        raise AssertionError(f"{len(found)} of {count} messages came") from None
    return found


async def until(reached: Callable[[], object], what: str = "", patience: float = PATIENCE) -> None:
    """For what nothing announces."""
    deadline = time.monotonic() + patience
    while not reached():
        assert time.monotonic() < deadline, what or "it did not come about"
        await asyncio.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether the process has ended; nobody need have asked for its status yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    if not sys.platform.startswith("linux"):
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return True


class Speaker:
    """An MQTT client for what `Client` does not do. It settles what comes at once."""

    def __init__(self, connection: Connection, stream: Any, engine: ClientEngine) -> None:
        self.connection = connection
        self.engine = engine
        self.events: list[Event] = []
        self._stream = stream

    async def until(self, kind: type[Event]) -> Any:
        """The next event of that kind, which is taken away with those before it."""
        async with asyncio.timeout(PATIENCE):
            while not (found := [one for one in self.events if isinstance(one, kind)]):
                await self.flush()
                data = await self._stream.receive()
                assert data, "the connection ended"
                self.events += self.engine.receive_data(data, now=time.monotonic())
        del self.events[: self.events.index(found[0]) + 1]
        return found[0]

    async def flush(self) -> None:
        await self._stream.send(b"".join(one.data for one in self.engine.outputs() if isinstance(one, Send)))


@asynccontextmanager
async def speaking(recipe: QuicNng, **connect: Any) -> AsyncIterator[Speaker]:
    connection = await recipe.connect()
    try:
        packet = Connect(**{"client_id": "speaker", "version": V3, "keepalive": 0, **connect})
        engine = ClientEngine(packet, Session(), now=time.monotonic())
        yield Speaker(connection, await connection.open_stream(), engine)
    finally:
        connection.abort()
