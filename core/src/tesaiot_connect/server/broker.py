"""The broker as an embedder and `tesaiot-connect serve` run it.

Owns: listeners, connections, the housekeeping task, and an orderly start and stop. Rule: when
`serving` ends, everything acknowledged is in the state file and every client was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import msgspec

from ..access import Anonymous
from ..errors import ConnectorError
from ..message import Message
from ..protocols import BoundUrl, Connection, ListenerStatus, Url
from .connection import ClientConnection
from .hub import Derive, Hub
from .options import BrokerOptions, ListenerSpec
from .store import Store

log = logging.getLogger(__name__)

_SWEEP = 60.0
"""Seconds between searches for expired retained and queued messages."""
_TURN = 200
"""Clients that are asked whether they may stay before others have their turn."""


@attrs.frozen(kw_only=True)
class BrokerStats:
    """A snapshot. Counts are since the start, everything else is the present."""

    connections: int
    """Transport connections, those that have not said CONNECT included."""
    clients: int
    """Connected clients."""
    sessions: int
    """Connected or not."""
    subscriptions: int
    retained: int
    retained_bytes: int
    queued: int
    """Messages that wait in queues; those in flight are not among them."""
    queued_bytes: int
    """Memory of the queued and the in-flight QoS 1 and 2 messages."""
    received: int
    """Count of messages from clients, wills and embedders."""
    sent: int
    """Count of messages to clients."""
    dropped: Mapping[str, int]
    """Count of messages that somebody should have got, by reason: queue_full, send_buffer_full
    (QoS 0), client_gone (QoS 0), expired, retained_full, not_authorized, refused_by_client."""
    refused_connections: int
    """Count of those beyond `max_connections`."""
    commits: int
    """Count of the state file's."""
    state_file_error: str | None
    """What keeps the state file from being written now; acknowledgements wait for it."""


class Broker:
    """An MQTT 5 and 3.1.1 broker.

    Serve it once at a time; a state file carries its state to the next time. `derive` gives further
    messages that those which arrive bring about: they are routed with them, and a publisher's
    acknowledgement waits for them too. It is called for each batch, so it must be quick, and must not
    raise.
    """

    def __init__(
        self,
        options: BrokerOptions | None = None,
        *,
        clock: Callable[[], float] = time.time,
        derive: Derive | None = None,
    ) -> None:
        self.options = options or BrokerOptions()
        self._clock = clock
        self._derive = derive
        self._hub: Hub | None = None
        self._connections: set[ClientConnection] = set()
        self._listeners: dict[str, str] = {}
        self._stopping = False
        self._refused = 0

    @asynccontextmanager
    async def serving(self, listeners: Sequence[ListenerSpec]) -> AsyncIterator[list[str]]:
        """While open, serve clients on these listeners; gives their bound URLs, in order.

        Leaving it tells all clients (DISCONNECT 0x8B), saves and stops. Raises ConnectorError
        if the state file cannot be opened, or a listener not be bound.
        """
        if self._hub is not None:
            raise ConnectorError("this broker is serving already", fix="make another Broker")
        wake = asyncio.Event()
        store, rows = None, None
        if self.options.state_file:
            store, rows = await Store.open(str(self.options.state_file), self.options.synchronous)
        async with AsyncExitStack() as stack:
            if store is not None:
                stack.push_async_callback(store.aclose)
            try:
                self._hub = hub = Hub(
                    self.options, store, rows, clock=self._clock, wake=wake.set, derive=self._derive
                )
            except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
                raise ConnectorError(
                    f"the state file {self.options.state_file} holds what cannot be read: {error}",
                    fix="put a copy of it in its place, or move it away to start empty",
                ) from error
            stack.callback(self._forget)
            hub.tick()
            housekeeping = asyncio.create_task(self._housekeeping(hub, wake))
            stack.push_async_callback(_cancel, housekeeping)
            rechecking = asyncio.create_task(self._rechecking())
            stack.push_async_callback(_cancel, rechecking)
            addresses = [
                await stack.enter_async_context(spec.transport.listen(self._handler(hub, spec)))
                for spec in listeners
            ]
            for spec, address in zip(listeners, addresses, strict=True):
                self._listeners[spec.name] = address
                log.info("listener %s on %s", spec.name, address)
                if isinstance(spec.authenticator, Anonymous) and not _private(address):
                    log.warning(
                        "listener %s lets everybody who reaches %s do everything: give it an authenticator",
                        spec.name, address,
                    )  # fmt: skip
            try:
                yield addresses
            finally:
                await self._goodbye()
                for name, status in self.listeners().items():
                    if status is not None:
                        log.info("listener %s: %s", name, _figures(status))

    async def publish(self, messages: Sequence[Message]) -> None:
        """Publish as the broker itself; returns when it is as safe as an acknowledged message."""
        hub = self._serving()
        if hub.route(messages) and hub.store is not None:
            await hub.store.commit()

    @property
    def stats(self) -> BrokerStats:
        hub = self._serving()
        usage, store = hub.usage, hub.store
        return BrokerStats(
            connections=len(self._connections),
            clients=sum(session.link is not None for session in hub.sessions),
            sessions=len(hub.sessions),
            subscriptions=len(hub.router),
            retained=len(hub.retained),
            retained_bytes=hub.retained.bytes,
            queued=usage.queued,
            queued_bytes=usage.bytes,
            received=hub.received,
            sent=usage.sent,
            dropped=dict(usage.dropped),
            refused_connections=self._refused,
            commits=store.commits if store is not None else 0,
            state_file_error=store.error if store is not None else None,
        )

    def listeners(self) -> Mapping[str, ListenerStatus | None]:
        """By name, how each listener is doing; None where its transport keeps no figures."""
        self._serving()
        return {
            name: address.status() if isinstance(address, BoundUrl) else None
            for name, address in self._listeners.items()
        }

    def _serving(self) -> Hub:
        if self._hub is None:
            raise ConnectorError(
                "the broker is not serving", fix="use it inside `async with broker.serving(...)`"
            )
        return self._hub

    def _forget(self) -> None:
        self._hub = None
        self._stopping = False
        self._listeners.clear()

    def _handler(self, hub: Hub, spec: ListenerSpec) -> Callable[[Connection], Awaitable[None]]:
        async def serve(connection: Connection) -> None:
            if self._stopping or len(self._connections) >= self.options.max_connections:
                self._refused += 1
                connection.abort()
                return
            client = ClientConnection(connection, hub, spec.authenticator)
            self._connections.add(client)
            try:
                await client.serve()
            finally:
                self._connections.discard(client)

        return serve

    async def _goodbye(self) -> None:
        """Tell every client that we go, and wait until they are told, for a while."""
        self._stopping = True
        for client in list(self._connections):
            client.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.drain_timeout):
                for client in list(self._connections):
                    await client.over.wait()

    async def _rechecking(self) -> None:
        """Disconnect those whose right to be here has ended."""
        while True:
            await asyncio.sleep(self.options.recheck)
            failed = False
            for count, client in enumerate(list(self._connections), 1):
                try:
                    client.recheck()
                except Exception:
                    if not failed:
                        log.exception("whether %s may stay cannot be said", client.peer.address)
                    failed = True
                if count % _TURN == 0:
                    await asyncio.sleep(0)

    async def _housekeeping(self, hub: Hub, wake: asyncio.Event) -> None:
        swept = self._clock()
        while True:
            due = hub.next_due()
            delay = _SWEEP if due is None else min(_SWEEP, max(0.0, due - self._clock()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await wake.wait()
            wake.clear()
            hub.tick()
            if self._clock() - swept >= _SWEEP:
                swept = self._clock()
                hub.sweep()


def _figures(status: ListenerStatus) -> str:
    """What a listener did, in words; what never happened is left out."""
    said = [f"{status.accepted} connections accepted"]
    counts = {
        "resumed": status.resumed,
        "with early data": status.early_data_accepted,
        "address validations": status.retries,
        "migrations": status.migrations,
        "stateless resets": status.stateless_resets,
        "datagrams dropped": status.datagrams_dropped,
    }
    said += [f"{count} {what}" for what, count in counts.items() if count]
    if status.refused:
        why = ", ".join(f"{reason} {count}" for reason, count in status.refused.items())
        said.append(f"{sum(status.refused.values())} refused ({why})")
    if status.bytes_received or status.bytes_sent:
        said.append(f"{status.bytes_received} bytes received and {status.bytes_sent} sent")
    return ", ".join(said)


def _private(address: str) -> bool:
    """Whether only this machine can reach an address; names are taken at their word."""
    try:
        return ipaddress.ip_address(Url.parse(address).host).is_loopback
    except ValueError:
        return True


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
