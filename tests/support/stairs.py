"""Ways for a client to go, the better one on demand, and broker ends that do what a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import attrs
from many_streams import FAST

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions
from tesaiot_connect.dialing import Attempt, Dialed
from tesaiot_connect.errors import ConnectorError, PathLost
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.events import ConnectRequest, Received, Send, SubscribeRequest
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.protocols import ClientCertificate, Connection, Credentials, Duration, Transport
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Network, connected_pair

NEVER = Backoff(min=Duration(1e6), max=Duration(1e6))


class Stairs:
    """A dialer with a row of ways, the best one first. It dials the last; a better one is found one step up,
    whenever a test allows it."""

    def __init__(self, *ways: Transport) -> None:
        self.ways = ways
        self.allowed = asyncio.Semaphore(0)
        self.identities: list[ClientCertificate | None] = []
        self.dialled: list[Connection] = []
        self.prepared: list[Connection] = []
        self.blamed: list[tuple[str, str]] = []

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        return (await self.dial(identity=identity, early=early)).connection

    async def dial(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Dialed:
        place = len(self.ways) - 1
        connection = await self.ways[place].connect(identity=identity, early=early)
        self.dialled.append(connection)
        failed = [
            Attempt(self.name(one), "failed", 1.0, 2.0, "it is off", "switch it on") for one in range(place)
        ]
        return Dialed(connection, self.name(place), place, (*failed, Attempt(self.name(place), "won", 3.0)))

    async def better(self, than: Dialed, *, identity: ClientCertificate | None = None) -> Dialed:
        assert than.place, "nothing is better than the best"
        self.identities.append(identity)
        await self.allowed.acquire()
        place = than.place - 1
        connection = await self.ways[place].connect(identity=identity)
        self.prepared.append(connection)
        return Dialed(connection, self.name(place), place, (Attempt(self.name(place), "won", 4.0),))

    def better_after(self, than: Dialed) -> float | None:
        return 5e9 if set(range(than.place)) - than.barred else None

    def lost(self, dialed: Dialed, error: ConnectorError) -> None:
        self.blamed.append((dialed.endpoint, error.what))

    def name(self, place: int) -> str:
        return str(getattr(self.ways[place], "url", f"way://{place}"))


@contextlib.asynccontextmanager
async def two_listeners(
    options: BrokerOptions | None = None, *, better: Network | None = None, fallback: Network | None = None
) -> AsyncIterator[tuple[Broker, Transport, Transport]]:
    """A broker with two ways to it."""
    network = Network()
    one = (better or network).transport("pair://better")
    other = (fallback or network).transport("pair://fallback")
    broker = Broker(options)
    async with broker.serving([ListenerSpec("better", one), ListenerSpec("fallback", other)]):
        yield broker, one, other


def client(
    dialer: Any, client_id: str = "mover", *, auth: Any = None, on_state: Any = None, **options: Any
) -> Client:
    options.setdefault("reconnect", FAST)
    options.setdefault("connect_timeout", Duration(1000))
    return Client(dialer, ClientOptions(client_id=client_id, **options), auth=auth, on_state=on_state)


def go_silent(connection: Any) -> None:
    """As a transport tells of a path that brings nothing any more."""

    def lost() -> None:
        raise PathLost("nothing came for 5 s")

    stream = connection._stream
    stream._check_open = lost
    stream._in.notify()
    stream._out.notify()


class Login:
    """An auth and its own login. Each answer is what `answers` has next: an error, an event to wait for, or
    None; at their end it is None."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.begun = 0

    async def begin(self) -> Login:
        self.begun += 1
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None:
            await answer.wait()
        return self

    async def identity(self) -> ClientCertificate:
        return ClientCertificate(f"certificate {self.begun}", "key")

    credentials = Credentials("user", b"password")

    async def respond(self, data: bytes, /) -> bytes:
        raise AssertionError

    async def finish(self, data: bytes, /) -> None:
        raise AssertionError


@attrs.define
class Script:
    """A way whose broker ends come out of `accept`."""

    url: str
    far: asyncio.Queue[Any] = attrs.field(factory=asyncio.Queue)
    races: bool = True
    schemes: Any = None
    rank: int = 0

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        near, far = connected_pair()
        self.far.put_nowait(far)
        return near

    async def next(self) -> Far:
        far = await self.far.get()
        return Far(far, await far.accept_stream())

    async def accept(self, session: Session | None = None, **properties: Any) -> Far:
        far = await self.next()
        far.request = await far.wait(ConnectRequest)
        found = {P[name.upper()]: value for name, value in properties.items()}
        far.engine.accept(
            session or Session(), now=0.0, session_present=session is not None, properties=found
        )
        await far.flush()
        return far


class Far:
    """The broker's end of one connection."""

    request: ConnectRequest

    def __init__(self, connection: Any, stream: Any) -> None:
        self.connection = connection
        self.stream = stream
        self.engine = ServerEngine(ServerLimits(), now=0.0)
        self.events: list[Any] = []

    async def flush(self) -> None:
        for output in self.engine.outputs():
            if isinstance(output, Send):
                await self.stream.send(output.data)

    async def wait(self, kind: type[Any]) -> Any:
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            data = await self.stream.receive()
            more = self.engine.receive_data(data, now=0.0) if data else self.engine.stream_eof(0, now=0.0)
            self.events += more
            await self.flush()

    async def publish(self, *messages: Message) -> None:
        assert self.engine.publish(messages, range(1, len(messages) + 1)) == len(messages)
        await self.flush()

    async def subscribed(self) -> None:
        request = await self.wait(SubscribeRequest)
        self.engine.suback(request, [one.qos for one in request.packet.subscriptions])
        await self.flush()

    async def takes(self) -> None:
        self.engine.settle((await self.wait(Received)).token)
        await self.flush()


def scripts() -> tuple[Script, Script, Stairs]:
    high, low = Script("script://better"), Script("script://fallback")
    return high, low, Stairs(high, low)  # type: ignore[arg-type]
