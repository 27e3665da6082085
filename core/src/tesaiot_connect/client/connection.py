"""One connection of a client while it lasts: its writer, its clock, its subscriptions and its end.

Owns: the tasks of one connection. Rule: whatever ends first, the transport, the engine or a
task, ends all of it; what the broker had said is still read, what was to be said still written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from ..errors import ConnectorError, Refused
from ..message import Message
from ..mqtt.client import ClientEngine
from ..mqtt.events import Acknowledged, Close, Closed, Send, Suback
from ..mqtt.packets import V5
from ..mqtt.properties import P
from ..mqtt.reasons import words
from ..protocols import ByteStream, Connection, Login
from .inbox import Inbox

log = logging.getLogger(__name__)

_FLUSH = 2.0
"""Seconds a connection that is over has for the last words of either side."""


class Live:
    """A transport connection with its engine, from CONNECT to the end of the transport."""

    def __init__(
        self,
        name: str,
        connection: Connection,
        stream: ByteStream,
        engine: ClientEngine,
        login: Login | None,
    ) -> None:
        self._name = name
        self.connection = connection
        self.stream = stream
        self.engine = engine
        self.login = login
        self.accepted = False
        self.closed: Closed | None = None
        self.broken: ConnectorError | None = None
        """How the transport failed; what the engine has in `closed` says more."""
        self.wake = asyncio.Event()
        """There may be something to write."""
        self._subacks: dict[int, Inbox] = {}
        self._over = False
        self._flushing = False
        self._reader: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def up(self) -> bool:
        """Whether messages, acknowledgements and subscriptions may be given to the engine."""
        return self.accepted and self.engine.connected and not self._over

    async def serve(self, read: Coroutine[Any, Any, None], more: Callable[[], None]) -> None:
        """Until the connection is over. `more` is called when there is room to publish."""
        self._reader = asyncio.create_task(read, name="MQTT reader")
        writer = asyncio.create_task(self._write(more), name="MQTT writer")
        tasks = (self._reader, writer)
        self.arm()
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self._over = True
            if self._flushing or writer.done():
                await asyncio.wait(tasks, timeout=_FLUSH)
        finally:
            self._over = True
            if self._timer is not None:
                self._timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for error in [task.exception() for task in tasks if not task.cancelled()]:
            if error is not None:
                raise error

    def finish(self, closed: Closed) -> None:
        """For the reader: the engine has said its last, which is still to be written."""
        self.closed = self.closed or closed
        self._flushing = True
        self.wake.set()

    def end(self, closed: Closed) -> None:
        """For everybody else: do not wait for the reader, whatever it waits for."""
        self.finish(closed)
        if self._reader is not None:
            self._reader.cancel()

    def publish(self, messages: Sequence[Message], keys: Sequence[int]) -> tuple[int, Mapping[int, int]]:
        """How many the engine took, and which of them exceed what the broker announced."""
        taken = self.engine.publish(messages, keys)
        refused: dict[int, int] = {}
        for event in self.engine.take_events():
            if isinstance(event, Acknowledged):
                refused.update(event.refused)
        return taken, refused

    def subscribe(self, inboxes: Sequence[Inbox]) -> bool:
        """Asks for what the session at the broker does not have yet. Says whether that was any.

        Identifiers are used among several inboxes, and then for all, since the broker may send a
        message once for all subscriptions it matches.
        """
        engine, asked = self.engine, tuple(self._subacks.values())
        usable = engine.connack is None or engine.connack.properties.get(P.SUBSCRIPTION_IDS_AVAILABLE, 1)
        tag = engine.connect.version == V5 and bool(usable) and len(inboxes) > 1
        for inbox in inboxes:
            under_way = inbox.subscribed or inbox in asked
            if inbox.error is not None or (under_way and inbox.tagged >= tag):
                continue
            wanted = inbox.subscriptions
            if under_way:  # its retained messages have come already
                wanted = tuple(msgspec.structs.replace(one, retain_handling=2) for one in wanted)
            properties = {P.SUBSCRIPTION_ID: [inbox.identifier]} if tag else {}
            try:
                packet_id = engine.subscribe(wanted, properties=properties)
            except ConnectorError as error:
                inbox.fail(error)
                continue
            self._subacks[packet_id] = inbox
            inbox.tagged = tag
            inbox.subscribed = False
        self.wake.set()
        return len(self._subacks) > len(asked)

    def subacked(self, suback: Suback) -> None:
        inbox = self._subacks.pop(suback.packet_id)
        inbox.subscribed = inbox not in self._subacks.values()
        for one, code in zip(inbox.subscriptions, suback.codes, strict=False):
            if code >= 0x80:
                told = f", {suback.text}" if suback.text else ""
                inbox.fail(
                    Refused(
                        f"the broker refused the subscription to {one.topic_filter!r}: {words(code)}{told}",
                        fix="check the filter and the rights of this connection's user",
                        reason_code=code,
                        permanent=True,
                    )
                )
            elif code < one.qos:
                log.warning(
                    "%s: the broker granted QoS %d instead of %d for %s",
                    self._name,
                    code,
                    one.qos,
                    one.topic_filter,
                )

    def arm(self) -> None:
        """Keep one timer for the engine, apart from a writer that may be stuck: it comes early
        perhaps, never late, if this is called whenever a deadline may have come nearer."""
        due = self.engine.next_timeout()
        if due is not None and (self._timer is None or due < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        for event in self.engine.handle_timeout(self._loop.time()):
            if isinstance(event, Closed):
                self.end(event)
        self.wake.set()
        self.arm()

    async def _write(self, more: Callable[[], None]) -> None:
        """The one writer of the stream."""
        engine, stream, wake = self.engine, self.stream, self.wake
        try:
            while True:
                wrote = False
                for output in engine.outputs():
                    if isinstance(output, Send):
                        await stream.send(output.data)
                        wrote = True
                    elif isinstance(output, Close):
                        await self.connection.aclose(output.code)
                        return
                if wrote:
                    more()
                else:
                    await wake.wait()
                    wake.clear()
        except ConnectorError as error:
            self.broken = self.broken or error
