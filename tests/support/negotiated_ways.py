"""A broker that is reached in three ways, a network between that fails, and a client that always publishes.

What the tests of negotiation and its benchmark share. `World` has the broker, `tesaiot-connect serve` in
the lab's `sv`, and beside it a subscriber that collects what it gets; a `Trip` is one client in `cl`.
`LongLab` is a lab whose path takes time.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import relay
from netlab import Lab
from quic_peers import gives_up_after
from real_brokers import until_listening

from tesaiot_connect import (
    Backoff,
    Client,
    ClientOptions,
    ClientStatus,
    Dialer,
    Duration,
    Message,
    NegotiationOptions,
    Negotiator,
    Reader,
    ServerTls,
    Subscription,
    TlsOptions,
    Transport,
    Url,
)
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls
from tesaiot_connect_wss import Wss

TOOL = Path(sys.executable).with_name("tesaiot-connect")
QUIC, H3, TLS, STRANGER, WSS, STALLING, MUTE, LOCAL = 14567, 14568, 8883, 8884, 8085, 8886, 8887, 1883
PAUSE = 0.005
"""Seconds between two messages of a trip."""
QUICK = Backoff(min=Duration(0.05), max=Duration(0.5))
NOWHERE = "no-such-host.invalid"
_numbers = itertools.count(1)

_BROKER = """
[broker]
max_queue_messages = 1000000
drain_timeout = "200ms"

[listeners.quic]
url = "quic://{host}:{quic}"
server_tls = {own}

[listeners.h3]
url = "quic://{host}:{h3}"
alpn = ["h3"]
server_tls = {own}

[listeners.tls]
url = "mqtts://{host}:{tls}"
server_tls = {own}

[listeners.stranger]
url = "mqtts://{host}:{stranger}"
server_tls = {other}

[listeners.wss]
url = "wss://{host}:{wss}/mqtt"
server_tls = {own}

[listeners.local]
url = "mqtt://127.0.0.1:{local}"
"""


class LongLab(Lab):
    """Between router and server every packet takes `delay` seconds, each way by itself."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        self._delay = delay

    def _join(self) -> None:
        super()._join()
        self.ip("rt", "link", "del", "rs")  # and "s0" with it
        command = [str(relay.build()), f"--delay-us={round(self._delay * 1e6)}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = self.run("rt", [*command, self.name("rt"), self.name("sv")], **pipes)
        assert relay.ready(process)
        for side, name, address in (("rt", "rs", "10.99.2.1/24"), ("sv", "s0", "10.99.2.2/24")):
            self.sysctl(side, "net.ipv6.conf.wan0.disable_ipv6", "1")
            self.ip(side, "link", "set", "wan0", "name", name)
            self.ip(side, "addr", "add", address, "dev", name)
            self.ip(side, "link", "set", name, "mtu", "1500", "txqueuelen", "10000", "up")
        self.ip("sv", "route", "add", "default", "via", "10.99.2.1")


_NAMES = """
add table inet names
add chain inet names input { type filter hook input priority 0; }
add chain inet names output { type filter hook output priority 0; }
flush chain inet names input
flush chain inet names output
"""


def without_names(lab: Lab, *, silent: bool) -> None:
    """The client's name server does not answer, or is not there at all."""
    ask = "output udp dport 53 reject"
    rules = ("input udp dport 53 drop", "input udp sport 53 drop") if silent else (ask,)
    lab.nft("cl", _NAMES + "".join(f"add rule inet names {rule}\n" for rule in rules))


def healed(lab: Lab) -> None:
    """No fault is left, nor what a kernel has learned of one."""
    lab.heal()
    lab.nft("cl", _NAMES)
    for side in ("cl", "rt", "sv"):
        lab.ip(side, "route", "flush", "cache")


class World:
    """The broker's process, the subscriber, and two ports that stall."""

    def __init__(self, lab: Lab, folder: Path, certificates: Certificates) -> None:
        self.lab = lab
        self.folder = folder
        self.got: dict[str, list[int]] = defaultdict(list)
        """By client id, the numbers that came, in their order."""
        self._trust = certificates.ca_file
        self._log = folder / "broker.log"
        self._config = folder / "broker.toml"
        other = Certificates(folder / "stranger", name="another authority")
        self._wrong = other.ca_file
        own, strange = (_table(one.server(lab.server)) for one in (certificates, other))
        ports = {"quic": QUIC, "h3": H3, "tls": TLS, "stranger": STRANGER, "wss": WSS, "local": LOCAL}
        self._config.write_text(_BROKER.format(host=lab.server, own=own, other=strange, **ports))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        # where it does not end in time, a test fails; it must not keep the whole run from ending
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> World:
        with self._log.open("wb") as log:
            command = [str(TOOL), "serve", str(self._config)]
            self._process = self.lab.run("sv", command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        with self.lab.enter("sv"):
            until_listening(LOCAL, self._process, self._log)
        self._thread.start()
        try:
            assert self._ready.wait(60), self.log()
            if self._error is not None:
                raise self._error
        except BaseException as broken:
            self.__exit__(type(broken), broken, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._process.terminate()
        self._process.wait(30)
        if error is None and self._error is not None:
            raise self._error
        assert error is not None or not self._thread.is_alive(), "the subscriber's thread does not end"

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def accepted(self, client_id: str) -> list[str]:
        """Transports of the CONNECTs that the broker has accepted of that client, in their order."""
        return re.findall(rf"client '{client_id}' connected from \S+ over (\w+)", self.log())

    def endpoint(
        self, way: str, folder: Path, quic_options: Mapping[str, Any], tcp_options: Mapping[str, Any]
    ) -> Transport:
        """`way` is the scheme, or what is amiss with it. QUIC keeps its tickets in `folder`."""
        tls, host = TlsOptions(ca_file=self._trust), self.lab.server
        quic = functools.partial(QuicAioquic, tls=tls, ticket_folder=folder / "tickets", **quic_options)
        tcp = functools.partial(TcpTls, tls=tls, **tcp_options)
        match way:
            case "quic":
                return quic(Url("quic", host, QUIC))
            case "quic that speaks h3":
                return quic(Url("quic", host, H3))
            case "quic without a name":
                return quic(Url("quic", NOWHERE, QUIC))
            case "quic distrusted":
                return quic(Url("quic", host, QUIC), tls=TlsOptions(ca_file=self._wrong))
            case "mqtts":
                return tcp(Url("mqtts", host, TLS))
            case "mqtts distrusted":
                return tcp(Url("mqtts", host, STRANGER))
            case "mqtts that stalls":
                return tcp(Url("mqtts", host, STALLING))
            case "mqtts that falls silent":
                return tcp(Url("mqtts", host, MUTE))
            case "wss":
                return Wss(Url("wss", host, WSS, "/mqtt"), tls=tls, **tcp_options)
        raise ValueError(way)

    def dialer(
        self,
        folder: Path,
        ways: Sequence[str],
        *,
        timeout: float = 10.0,
        quic: Mapping[str, Any] | None = None,
        tcp: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Negotiator:
        """`quic` and `tcp` are options of such endpoints, `options` are NegotiationOptions'."""
        endpoints = [self.endpoint(way, folder, quic or {}, tcp or {}) for way in ways]
        chosen = NegotiationOptions(memory_folder=folder / "memory", **options)
        return Negotiator(endpoints, chosen, timeout=timeout)

    # --- the thread in `sv`

    def _run(self) -> None:
        try:
            with self.lab.enter("sv"):
                asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        local = TcpTls(Url("mqtt", "127.0.0.1", LOCAL))
        subscriber = Client(Negotiator([local]), ClientOptions(receive_maximum=65535))
        with socket.create_server((self.lab.server, STALLING)):  # it accepts, and that is all
            async with (
                await asyncio.start_server(self._swallow, self.lab.server, MUTE),
                subscriber,
                subscriber.subscribe([Subscription("trips/#", qos=1)]) as reader,
            ):
                collecting = asyncio.create_task(self._collect(reader))
                async with Client(Negotiator([local])) as first:
                    while not self.got["first"] and not collecting.done():
                        await first.publish([Message("trips/first", b"0")])
                        await asyncio.wait([collecting], timeout=0.02)
                self._ready.set()
                stopping = asyncio.create_task(self._stop.wait())
                await asyncio.wait([stopping, collecting], return_when=asyncio.FIRST_COMPLETED)
                for task in (stopping, collecting):
                    task.cancel()
                await asyncio.wait([stopping, collecting])

    async def _collect(self, reader: Reader) -> None:
        while True:
            delivery = await reader.read()
            for message in delivery.batch.messages:
                self.got[message.topic.partition("/")[2]].append(int(message.payload[:9]))
            await delivery.ack()

    async def _swallow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A proxy that carries the TLS handshake, and what the client says afterwards to nobody."""
        there, beyond = await asyncio.open_connection(self.lab.server, TLS)
        try:
            beyond.write(await reader.read(65536))
            answering = asyncio.create_task(_copy(there, writer))
            while await reader.read(65536):
                pass
            answering.cancel()
            await asyncio.wait([answering])
        except OSError:
            pass
        finally:
            for one in (beyond, writer):
                one.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)


def _table(tls: ServerTls) -> str:
    return f'{{ certificate = "{tls.certificate}", key = "{tls.key}" }}'


class Trip:
    """A client that publishes numbered QoS 1 messages all the time, whatever becomes of its connection."""

    def __init__(self, world: World, client: Client, client_id: str) -> None:
        self.world = world
        self.lab = world.lab
        self.client = client
        self.client_id = client_id
        self.sent = 0
        self.size = 9
        """Bytes of a message."""
        self.times: list[float] = []
        """When each acknowledgement came, on the monotonic clock."""
        self.began = time.monotonic()
        self.first: ClientStatus | None = None
        """When the first message was acknowledged."""
        self.enough = False

    @property
    def status(self) -> ClientStatus:
        return self.client.status

    @property
    def way(self) -> str:
        """The scheme of the endpoint that it is connected by; empty while it is not."""
        status = self.client.status
        return status.url.partition(":")[0] if status.state == "connected" else ""

    @property
    def missing(self) -> set[int]:
        return set(range(self.sent)) - set(self.world.got[self.client_id])

    def gap(self) -> float:
        """The longest time between two acknowledgements, in seconds."""
        return max((later - earlier for earlier, later in itertools.pairwise(self.times)), default=0.0)

    async def until(self, true: Callable[[], object], seconds: float = 40.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.status
            await asyncio.sleep(0.005)

    async def by(self, way: str) -> None:
        """Until it is connected by that, and messages go."""
        await self.until(lambda: self.way == way)
        await self.more(20)

    def watch(self, seconds: float = 1.0) -> None:
        """From here on silence of that length ends its QUIC connection. One that is good has more patience,
        for a machine that stands still."""
        live = self.client._live
        assert live is not None
        gives_up_after(live.connection, seconds)

    async def more(self, count: int = 60) -> None:
        """Until so many more are acknowledged."""
        goal = len(self.times) + count
        await self.until(lambda: len(self.times) >= goal)

    async def change(self, change: Callable[..., object], *arguments: object) -> None:
        """The lab's changes run programs: the event loop does not wait for them."""
        await asyncio.to_thread(change, *arguments)

    async def feed(self) -> None:
        """Until `enough`; then everything is acknowledged."""
        self.began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while not self.enough:
                tasks.create_task(self._send(self.sent))
                self.sent += 1
                if self.sent > 1:
                    await asyncio.sleep(PAUSE)
                else:  # how soon that one is acknowledged is a figure of its own
                    await self.until(lambda: self.times)

    async def _send(self, number: int) -> None:
        await self.client.publish([Message(f"trips/{self.client_id}", b"%-*d" % (self.size, number), 1)])
        self.times.append(time.monotonic())
        self.first = self.first or self.client.status


@asynccontextmanager
async def trip(world: World, dialer: Dialer, **options: Any) -> AsyncIterator[Trip]:
    """It is under way inside the block; behind it everything has arrived. `options` are ClientOptions'."""
    client_id = f"trip-{next(_numbers)}"
    async with Client(dialer, ClientOptions(client_id=client_id, reconnect=QUICK, **options)) as client:
        made = Trip(world, client, client_id)
        feeding = asyncio.create_task(made.feed())
        try:
            await made.until(lambda: made.times or feeding.done())
            yield made
            made.enough = True
            await made.until(feeding.done)
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
        feeding.result()
        await made.until(lambda: not made.missing)


def inside(lab: Lab, main: Coroutine[Any, Any, None], seconds: float = 120.0) -> None:
    """Runs it in `cl`; it must end in that time. The lab has no fault then."""

    async def bounded() -> None:
        try:
            async with asyncio.timeout(seconds):
                await main
        finally:
            healed(lab)

    with lab.enter("cl"):
        asyncio.run(bounded())
