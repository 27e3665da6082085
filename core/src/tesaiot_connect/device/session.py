"""A device client's connection, from `connect` to `disconnect`.

Owns: the core's client in the portal's thread, and the subscriptions. Rules: what is published goes
out in the order of the calls; a delivery is acknowledged by whoever it is handed to; nobody waits for
a session that has ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Literal

import attrs

from ..client import Client, ClientStatus, MqttConnection
from ..client.inbox import LazyReader
from ..client.options import ClientState
from ..errors import ConnectFailed, ConnectorError, Disconnected, PartialDelivery, Refused
from ..message import Delivery, Message
from ..mqtt.packets import Subscription
from ..mqtt.reasons import TO_CONNACK_V3, R
from ..portal import Portal
from .outgoing import Outgoing, Publication

log = logging.getLogger("tesaiot_connect.device")

_AT_EXIT = 2.0
"""Seconds that what waits has to go out when the program ends without `disconnect`."""
_LEAVE = 10.0
"""Seconds that leaving may take beyond flushing."""
_RETURN_CODES: Mapping[int, int] = {int(R.SERVER_UNAVAILABLE): 3} | {
    int(r): rc for r, rc in TO_CONNACK_V3.items()
}
_CONNECTION_LOST = 7
"""What paho-mqtt calls MQTT_ERR_CONN_LOST."""


@attrs.frozen
class Notice:
    """The broker accepted or refused the client (`rc`), the connection ended (`rc`), or a
    subscription was granted (`qos`) or refused (`error`)."""

    what: Literal["connect", "disconnect", "subscribe", "refused"]
    rc: int = 0
    session_present: bool = False
    mid: int = 0
    qos: tuple[int, ...] = ()
    error: ConnectorError | None = None


class Session:
    """One run of a client: `connect` once, `close` once. Public methods are for every thread.

    At most `max_waiting` messages wait to be published, and `max_received` to be delivered. `filters`
    are groups of topic filters with their QoS; what one of a group brings goes together with the
    others', and if one is refused so is the group.
    `notify`, `published` (a message's number) and `deliver` are called in the portal's thread. The
    first two must be quick and not raise; `deliver` is awaited for each delivery and settles it.
    """

    def __init__(
        self,
        connection: MqttConnection,
        *,
        name: str,
        filters: Sequence[Mapping[str, int]],
        max_waiting: int,
        max_received: int,
        notify: Callable[[Notice], None],
        published: Callable[[int], None],
        deliver: Callable[[Delivery], Awaitable[None]],
    ) -> None:
        self._connection = connection
        self._name = name
        self._max_received = max_received
        self._notify = notify
        self._published = published
        self._deliver = deliver
        self._pid = os.getpid()
        self._portal = Portal(name=f"tesaiot-{name}")
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Client | None = None
        self._running: Future[None] | None = None
        self._started = asyncio.Event()
        self._stop = asyncio.Event()
        self._outgoing = Outgoing(
            name, max_messages=max_waiting, inside=lambda: self.inside, because=self.because
        )
        self._idle = asyncio.Event()
        """Nothing waits to be published."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._reading: set[asyncio.Task[None]] = set()
        """The pumps that have nothing to hand on."""
        self._flush = 0.0
        self._subscribed = 0
        self.stopping = False
        self.up = False
        """Whether there is a connection now."""
        self.error: ConnectorError | None = None
        """Why there is none."""
        self._filters = [(dict(group), Future[None]()) for group in filters]
        self._granted = {one: granted for group, granted in self._filters for one in group}
        """Filters that are or were asked for, to the broker's answer."""

    # --- for every thread -----------------------------------------------------------------

    @property
    def inside(self) -> bool:
        """Whether this is the portal's thread: a callback."""
        return threading.current_thread() is self._thread

    @property
    def alive(self) -> bool:
        return self._running is not None and not self.stopping and self._pid == os.getpid()

    def begin(self) -> None:
        """Starts its thread. Once; before everything else but `close`, which ends it at once then."""
        self._running = self._portal.start(self._run())

    def connect(self, timeout: float | None) -> None:
        """Returns when the broker has accepted. Raises Refused, ConnectFailed, and Disconnected when it
        is closed meanwhile; it is closed then."""
        try:
            self._portal.call(self._first, timeout=timeout)
        except TimeoutError as error:
            reason = self.because()
            self.close(0.0)
            raise ConnectFailed(
                f"{self._name}: no connection within {timeout or 0:g} s{reason}",
                fix="see that the broker runs and that no firewall drops its packets, or allow more time",
            ) from error
        except Exception as error:
            stopped = self.stopping
            self.close(0.0)
            if stopped:
                raise self._stopped() from error
            raise
        except BaseException:
            self.close(0.0)
            raise

    def wait_connected(self, timeout: float | None) -> None:
        """Of a session that runs: returns when there is a connection, however many attempts that
        takes. Raises ConnectFailed, Refused, Disconnected when it is closed meanwhile."""
        try:
            self._portal.call(self._again, timeout=timeout)
        except TimeoutError as error:
            raise ConnectFailed(
                f"{self._name}: no connection within {timeout or 0:g} s{self.because()}",
                fix="it goes on trying; see that the broker runs",
            ) from error
        except Exception as error:
            if self.stopping:
                raise self._stopped() from error
            raise

    def _stopped(self) -> Disconnected:
        return Disconnected(f"{self._name} was disconnected while it was connecting")

    def publish(self, message: Message, timeout: float | None) -> Publication:
        """Keeps a message until the broker has it. At the limit it waits for room, for `timeout`
        seconds at most, and not at all in a callback. Raises Disconnected."""
        if not self.inside:
            self.check_alive()
        publication, first = self._outgoing.add(message, timeout)
        if first:
            self.soon(self._send_unsent)
        return publication

    def subscribe(self, topic_filter: str, qos: int) -> Future[None]:
        """Asks the broker, unless that is done already. The future ends with its answer, or raises
        Refused, or Disconnected when it is closed before. Raises Disconnected."""
        own: Future[None] = Future()
        granted = self._granted.setdefault(topic_filter, own)
        if not self.inside:  # asked now, so that the end of the session either is seen or sees `own`
            self.check_alive()
        if granted is own:
            self.soon(lambda: self._open({topic_filter: qos}, own))
        return granted

    def status(self) -> ClientStatus | None:
        """None while disconnected."""
        client = self._client
        if client is None or not self.alive:
            return None
        if self.inside:
            return client.status

        async def read() -> ClientStatus:
            return client.status

        try:
            return self._portal.call(read)
        except (RuntimeError, CancelledError):
            return None

    def ask_to_stop(self, flush: float) -> None:
        """Returns at once, in a signal handler too. What waits has `flush` seconds to go out."""
        self._flush = flush
        self.stopping = True
        self.soon(self._stop.set)

    def close(self, flush: float) -> bool:
        """Stops, and waits for the end, unless in a callback or before `begin`. True if nothing was left
        unpublished."""
        if self._pid != os.getpid():
            return True
        self.ask_to_stop(flush)
        if self._running is None or self.inside or self._outgoing.interrupted:
            return True
        self._outgoing.close()
        try:
            self._running.result(flush + _LEAVE)
        except TimeoutError:
            log.warning(
                "%s: could not leave within %.0f s, a callback may still run", self._name, flush + _LEAVE
            )
            self._portal.close(0.0)
            return False
        except CancelledError:
            pass
        self._portal.close()
        return not self._outgoing.lost

    def join(self) -> None:
        """Waits until a session that is stopping has ended."""
        if self._pid == os.getpid() and self._running is not None and not self.inside:
            self.close(self._flush)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run it in the portal's thread. Raises Disconnected when the session is over."""
        try:
            return self._portal.start(coroutine)
        except RuntimeError as error:
            raise Disconnected(f"{self._name} is disconnected", fix="call connect() first") from error

    def check_alive(self) -> None:
        """Raises Disconnected."""
        if self._pid != os.getpid():
            raise Disconnected(
                f"{self._name} was connected in another process",
                fix="call connect() in the process that uses it, after the fork",
            )
        if not self.alive:
            raise Disconnected(f"{self._name} is disconnected", fix="call connect() first")

    def because(self) -> str:
        """The latest error as the end of a sentence, "" if there is none."""
        return f": {self.error}" if self.error is not None else ""

    def soon(self, function: Callable[[], object]) -> None:
        """Call it in the portal's thread, if there is one still. In a signal handler too."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function)
            elif self._running is not None:  # it begins right now
                self._portal.start(_call(function))
        except RuntimeError:  # the loop has ended
            pass

    # --- the portal's thread --------------------------------------------------------------

    async def _first(self) -> None:
        await self._started.wait()
        assert self._client is not None
        await self._client.connected(once=True)

    async def _again(self) -> None:
        await self._started.wait()
        assert self._client is not None
        await self._client.connected()

    async def _run(self) -> None:
        self._thread = threading.current_thread()
        self._loop = asyncio.get_running_loop()
        connection = self._connection
        try:
            async with Client(
                connection.dialer,
                connection.options,
                auth=connection.auth,
                name=self._name,
                on_state=self._on_state,
            ) as self._client:
                for group, granted in self._filters:  # before it dials, for what a lasting session brings
                    await self._open(group, granted).wait()
                self._started.set()
                ending = self._task(self._end(), "end")
                try:
                    await asyncio.shield(ending)
                except asyncio.CancelledError:  # the program ends
                    flush = _AT_EXIT if self.up else 0.0
                    self.ask_to_stop(min(self._flush, flush) if self.stopping else flush)
                    await asyncio.wait({ending}, timeout=flush)
                    ending.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self.stopping = True
            self._give_up()
            self._portal.close()

    async def _end(self) -> None:
        """Once it is asked for: what was received is handed on, what waits is published, both as far as
        time allows."""
        if not self.stopping:  # asked for before there was a loop
            await self._stop.wait()
        deadline = self._loop_time() + self._flush
        for task in self._reading:
            task.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=max(0.0, deadline - self._loop_time()))
        for task in self._pumps:
            task.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)
        self._send_unsent()
        if len(self._outgoing):
            self._idle.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - self._loop_time())):
                    await self._idle.wait()
            except TimeoutError:
                pass

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()

    def _on_state(self, state: ClientState, error: ConnectorError | None) -> None:
        if state == "connecting" and self.up:  # a move to a better endpoint: nothing is lost meanwhile
            return
        was_up, self.up = self.up, state == "connected"
        self.error = None if self.up else error or self.error
        if self.up and was_up:
            return
        if self.up:
            assert self._client is not None
            self._notify(Notice("connect", session_present=self._client.status.session_present))
        elif was_up:
            code = error.reason_code if isinstance(error, Refused) else _CONNECTION_LOST
            self._notify(Notice("disconnect", rc=code if error is not None else 0))
        elif state == "waiting" and isinstance(error, Refused):
            self._notify(Notice("connect", rc=return_code(error), error=error))

    def _task(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=f"{self._name} {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _open(self, filters: Mapping[str, int], granted: Future[None]) -> asyncio.Event:
        """Subscribes; the event tells that the client knows of it."""
        opened = asyncio.Event()
        self._subscribed += 1
        self._granted.update(dict.fromkeys(filters, granted))
        pump = self._task(self._pump(filters, self._subscribed, opened, granted), "subscription")
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
        return opened

    async def _pump(
        self, filters: Mapping[str, int], mid: int, opened: asyncio.Event, granted: Future[None]
    ) -> None:
        assert self._client is not None
        own = asyncio.current_task()
        assert own is not None
        subscriptions = [Subscription(one, qos) for one, qos in filters.items()]
        async with self._client.subscribe(subscriptions, max_messages=self._max_received) as reader:
            watch = self._task(self._watch(reader, mid, granted), "grants")
            opened.set()
            try:
                while not self.stopping:
                    self._reading.add(own)
                    try:
                        delivery = await reader.read()
                    finally:
                        self._reading.discard(own)
                    await self._deliver(delivery)
            except ConnectorError as error:
                if is_answer(error):
                    self._refused(filters, mid, granted, error)
            finally:
                watch.cancel()

    def _refused(
        self, filters: Mapping[str, int], mid: int, granted: Future[None], error: ConnectorError
    ) -> None:
        log.error("%s: %s", self._name, error)
        for one in filters:
            self._granted.pop(one, None)
        if not granted.done():
            granted.set_exception(error)
        code = int(getattr(error, "reason_code", R.UNSPECIFIED_ERROR))
        self._notify(Notice("refused", mid=mid, qos=(code,) * len(filters), error=error))

    async def _watch(self, reader: LazyReader, mid: int, granted: Future[None]) -> None:
        seen = 0
        while True:
            try:
                codes = await reader.grant(seen)
            except ConnectorError:  # the pump tells
                return
            seen = reader.grants
            if not granted.done():
                granted.set_result(None)
            self._notify(Notice("subscribe", mid=mid, qos=codes))

    def _send_unsent(self) -> None:
        if batch := self._outgoing.take():
            self._task(self._send(batch), "publish")

    async def _send(self, batch: list[Publication]) -> None:
        assert self._client is not None
        errors: Mapping[int, BaseException] = {}
        try:
            await self._client.publish([one.message for one in batch])
        except PartialDelivery as error:
            errors = error.failures
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            errors = dict.fromkeys(range(len(batch)), error)
        self._outgoing.settle(batch, errors)
        if not len(self._outgoing):
            self._idle.set()
        for publication in batch:
            if publication.error is None:
                self._published(publication.mid)
            elif not isinstance(publication.error, Disconnected):
                log.error("%s: %s", self._name, publication.error)

    def _give_up(self) -> None:
        """At the end: nobody is to wait any more."""
        self._outgoing.give_up()
        closed = Disconnected(f"{self._name} was disconnected before the broker granted this")
        for granted in tuple(self._granted.values()):
            if not granted.done():
                granted.set_exception(closed)
        if self._outgoing.lost:
            log.warning("%s: %d messages were not published before the end", self._name, self._outgoing.lost)


async def _call(function: Callable[[], object]) -> None:
    function()


def is_answer(error: ConnectorError) -> bool:
    """Whether it tells what will be said again, and not that the connection is gone."""
    return isinstance(error, Refused) or not isinstance(error, Disconnected)


def return_code(error: Refused) -> int:
    """The return code of a CONNACK (MQTT 3.1.1 section 3.2.2.3): 4 for bad credentials, 5 for not
    authorized; the MQTT 5 reason code where that has no counterpart."""
    return _RETURN_CODES.get(error.reason_code, error.reason_code)
