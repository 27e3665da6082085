"""One connection of a configuration, used by many sources and sinks.

Owns: which of them share a client. Rule: a client lives while somebody uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import attrs

from ..dialing import Dialer
from ..protocols import Auth
from .driver import Client
from .options import ClientOptions


class MqttConnection:
    """What `[connections.<name>]` becomes: the clients of one connection, made when needed.

    All sources of a connection share one client and so one session; all its sinks share
    another, because a sink that waits for its own PUBACKs behind messages that wait for the sink
    would never end. Where both are used, the sinks' client id is `<client_id>-sink`.
    """

    def __init__(
        self, name: str, dialer: Dialer, options: ClientOptions | None = None, auth: Auth | None = None
    ) -> None:
        self.name = name
        self.dialer = dialer
        self.options = options or ClientOptions()
        self.auth = auth
        self._sources = _Shared()
        self._sinks = _Shared()
        self._has_sources = False

    def source_client(self) -> contextlib.AbstractAsyncContextManager[Client]:
        """The client that reads. Open all sources before the first of them is read: it dials then."""
        self._has_sources = True
        return self._sources.use(lambda: Client(self.dialer, self.options, auth=self.auth, name=self.name))

    def sink_client(self) -> contextlib.AbstractAsyncContextManager[Client]:
        """The client that publishes. Open sources first, so that it knows of them."""

        def make() -> Client:
            # It starts clean: what an earlier run left unacknowledged was never settled at its
            # source and comes again from there, while the broker would take a new QoS 2 message
            # under an identifier of that run for a duplicate, and drop it.
            options = attrs.evolve(self.options, clean_session=True)
            if not self._has_sources:
                return Client(self.dialer, options, auth=self.auth, name=self.name)
            own = options.client_id and f"{options.client_id}-sink"
            options = attrs.evolve(options, client_id=own, will=None)
            return Client(self.dialer, options, auth=self.auth, name=f"{self.name}-sink")

        return self._sinks.use(make)

    def clients(self) -> list[Client]:
        """Those that are open now, for status displays."""
        return [shared.client for shared in (self._sources, self._sinks) if shared.client is not None]


class _Shared:
    """A client that lives while somebody uses it."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self._users = 0
        self._free = asyncio.Event()
        """No client is just leaving: a new one of the same name would take its session from it."""
        self._free.set()

    @contextlib.asynccontextmanager
    async def use(self, make: Callable[[], Client]) -> AsyncIterator[Client]:
        while not self._free.is_set():
            await self._free.wait()
        if self.client is None:
            self.client = make()
            await self.client.__aenter__()
        client = self.client
        self._users += 1
        try:
            yield client
        finally:
            self._users -= 1
            if not self._users:
                self.client = None
                self._free.clear()
                try:
                    await client.__aexit__(None, None, None)
                finally:
                    self._free.set()
