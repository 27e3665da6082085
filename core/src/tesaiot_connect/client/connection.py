"""One connection of a client while it lasts: its writer, its clock, its subscriptions and its end.

Owns: the tasks of one connection. Rule: whatever ends first, the transport, the engine or a
task, ends all of it; what the broker had said is still read, what was to be said still written.
A data stream is the exception: it ends alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from ..errors import ConnectorError, Disconnected, Refused
from ..message import Message
from ..mqtt.client import ClientEngine
from ..mqtt.events import Acknowledged, Closed, Event, Received, Reset, Send, StreamLost, Suback
from ..mqtt.packets import V5
from ..mqtt.properties import P
from ..mqtt.reasons import words
from ..protocols import ByteStream, Connection, Login, Pausable
from .coalesce import Coalescer
from .inbox import Inbox, Switchboard
from .outbox import Outbox
from .placement import Placement
from .streams import Channel, DataStreams

log = logging.getLogger(__name__)

_READ = 262_144
_FLUSH = 2.0
"""Seconds a connection or a stream that is over has for the last words of either side."""

Handle = Callable[[list[Event], int], Coroutine[Any, Any, tuple[int, bool]]]
"""Acts on events that so many bytes brought. Gives how many messages came, and whether some want
acknowledgement."""


class Live:
    """A transport connection with its engine, from CONNECT to the end of the transport.

    `first` is what the engine gave before there was a connection, if that is still to be written.
    """

    def __init__(
        self,
        name: str,
        connection: Connection,
        stream: ByteStream,
        engine: ClientEngine,
        login: Login | None,
        *,
        outbox: Outbox,
        switchboard: Switchboard,
        first: bytes = b"",
    ) -> None:
        self._name = name
        self.connection = connection
        self.stream = stream
        self.engine = engine
        self.login = login
        self.accepted = False
        self.answered = False
        """The broker said anything to CONNECT that was MQTT."""
        self.departed = False
        """It was left in order, for another connection."""
        self.moment: asyncio.Event | None = None
        """Set whenever something was settled, acknowledged or written, for who waits for a quiet moment."""
        self.closed: Closed | None = None
        self.broken: ConnectorError | None = None
        """How the transport failed; what the engine has in `closed` says more."""
        self._outbox = outbox
        self._switchboard = switchboard
        self._first = first
        self._control = Channel(0, stream)
        self._data: DataStreams | None = None
        self._placement: Placement | None = None
        self._carried: set[int] = set()
        """Keys of QoS 1 messages of earlier, which go or went on the control stream: nothing may
        overtake them on a data stream."""
        self._subacks: dict[int, Inbox] = {}
        self._unexpected: BaseException | None = None
        self._over = False
        self._flushing = False
        self._silent = False
        """The broker stopped answering: it would not answer a close either."""
        self._held = False
        """Nothing more is published or subscribed here."""
        self._reading = asyncio.Event()
        """Cleared while the control stream is not to be read on."""
        self._reading.set()
        self._waiting = 0
        """Readers that stand still."""
        self._handle: Handle
        self._reader: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When the timer fires; a loop need not tell it of a timer that is due already."""
        self._loop = asyncio.get_running_loop()

    @property
    def up(self) -> bool:
        """Whether messages, acknowledgements and subscriptions may be given to the engine."""
        return self.accepted and self.engine.connected and not self._over

    @property
    def streams(self) -> int:
        """Data streams that are open."""
        return self._data.count if self._data is not None else 0

    def accept(self, placement: Placement | None) -> None:
        """CONNACK came: from now on streams may be opened as `placement` wants them."""
        self.accepted = self.answered = True
        self.arm()
        if placement is None or not self.connection.multistream:
            return
        self._placement = placement
        outbound = self.engine.session.outbound.values()
        self._carried = {entry.key for entry in outbound if entry.message.qos == 1}
        self._data = DataStreams(
            self._name,
            self.connection,
            self.engine,
            placement,
            serve=self._serve_data,
            changed=self._streams_changed,
            broken=self._data_failed,
        )

    async def serve(self, handle: Handle) -> None:
        """Until the connection is over."""
        self._handle = handle
        self._reader = asyncio.create_task(self._read(self._control), name="MQTT reader")
        writer = asyncio.create_task(self._write(self._control), name="MQTT writer")
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
            if self._data is not None:
                await self._data.aclose()
        for error in [task.exception() for task in tasks if not task.cancelled()]:
            if error is not None:
                raise error
        if self._unexpected is not None:
            raise self._unexpected

    def _data_failed(self, error: BaseException) -> None:
        self._unexpected = self._unexpected or error
        if self._reader is not None:
            self._reader.cancel()

    def finish(self, closed: Closed) -> None:
        """For the reader: the engine has said its last, which is still to be written."""
        self.closed = self.closed or closed
        self._flushing = True
        self._control.wake.set()

    def end(self, closed: Closed) -> None:
        """For everybody else: do not wait for the reader, whatever it waits for."""
        self.finish(closed)
        if self._reader is not None:
            self._reader.cancel()

    def gone(self) -> None:
        """It is over: what was in flight on data streams is to be published again."""
        self._over = True
        self.absorb(self.engine.stream_reset(0, now=self._loop.time()))
        self.absorb(self.engine.take_events())

    async def leave(self) -> None:
        """Returns when the broker has read what was written on data streams, or will not."""
        if self._data is not None:
            await self._data.finish(_FLUSH)

    # --- leaving it for another one -------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether the broker owes no answer to what was published and subscribed."""
        return not self.engine.in_flight and not self._subacks

    @property
    def fixed(self) -> bool:
        """Whether a subscription lives on a data stream, and would end with this connection."""
        return any(inbox.stream for inbox in self._switchboard.inboxes)

    def hold(self) -> None:
        """From now on what is published and subscribed waits, until `release` or for the next connection."""
        self._held = True

    def stop_reading(self) -> None:
        """Nothing more is delivered until `release`."""
        self._reading.clear()

    def release(self) -> None:
        self._held = False
        self._reading.set()
        if self.up:
            self.subscribe()
            self.flush()

    def depart(self) -> None:
        """Says DISCONNECT, for another connection that goes on with the session; `serve` returns when the
        broker has closed, which proves that it read all, or takes too long. Until then QoS 0 messages
        that were on their way are delivered, since no session keeps them."""
        self.departed = self._flushing = True
        self.engine.disconnect()
        self.absorb(self.engine.take_events())
        self._reading.set()
        self._control.wake.set()

    async def _salvage(self, data: bytes) -> None:
        if messages := self.engine.salvage(data):
            await self._handle([Received(0, messages, [0] * len(messages), 0)], len(data))
        if self._switchboard.full:
            await self._stand_still(self._switchboard.room())

    # --- messages and subscriptions -------------------------------------------------------

    def flush(self) -> None:
        """Offers what waits to be published, and has the writers look."""
        if self.moment is not None:
            self.moment.set()
        ready = self.up and not self._held
        if self._data is None:
            if ready:
                self._outbox.offer(self.publish)
            if self.engine.has_output:
                self._control.wake.set()
            return
        if ready:
            self._offer_lanes(self._data)
        self.notify()

    def _offer_lanes(self, data: DataStreams) -> None:
        assert self._placement is not None
        self._outbox.route(self._placement.lane)
        for lane in self._outbox.lanes:
            if lane and self._carried:
                continue
            number = data.number(lane)
            if number is not None:
                self._outbox.offer(partial(self.publish, stream=number), lane)

    def notify(self) -> None:
        """Has those writers look that have something to write."""
        if self.moment is not None:
            self.moment.set()
        if self._data is None:
            self._control.wake.set()
            return
        channels = self._data.channels
        for number in self.engine.pending():
            channel = channels.get(number) if number else self._control
            if channel is not None:
                channel.wake.set()

    def publish(
        self, messages: Sequence[Message], keys: Sequence[int], stream: int = 0
    ) -> tuple[int, Mapping[int, int]]:
        """How many the engine took, and which of them exceed what the broker announced."""
        taken = self.engine.publish(messages, keys, stream=stream)
        refused: dict[int, int] = {}
        for event in self.engine.take_events():
            if isinstance(event, Acknowledged):
                refused.update(event.refused)
        return taken, refused

    def absorb(self, events: Iterable[Event]) -> None:
        """What events say of messages that were published, and of streams."""
        again = False
        for event in events:
            if isinstance(event, Acknowledged):
                self._outbox.acknowledged(event.keys, event.refused)
                if self._carried:
                    self._carried.difference_update(event.keys, event.refused)
            elif isinstance(event, StreamLost) and self._data is not None:
                lane = self._data.lost(event.stream)
                self._outbox.put_back(event.unacknowledged, lane)
                for inbox in self._switchboard.inboxes:
                    if inbox.stream == event.stream:
                        inbox.stream, inbox.subscribed, again = 0, False, True
                        self._subacks = {
                            packet_id: one for packet_id, one in self._subacks.items() if one is not inbox
                        }
        if again and self.up:
            self.subscribe()

    def subscribe(self) -> bool:
        """Asks for what the session at the broker does not have yet. Says whether that was any.

        Identifiers are used among several inboxes, and then for all, since the broker may send a
        message once for all subscriptions it matches.
        """
        if self._held:
            return False
        engine, asked = self.engine, tuple(self._subacks.values())
        inboxes = self._switchboard.inboxes
        usable = engine.connack is None or engine.connack.properties.get(P.SUBSCRIPTION_IDS_AVAILABLE, 1)
        usable = bool(usable) and engine.connect.version == V5
        tag = usable and len(inboxes) > 1
        opening = False
        for inbox in inboxes:
            under_way = inbox.subscribed or inbox in asked
            if inbox.error is not None or (under_way and inbox.tagged >= tag):
                continue
            stream = inbox.stream if under_way else self._stream_for(inbox) if usable else 0
            if stream is None:
                opening = True
                continue
            wanted = inbox.subscriptions
            if under_way:  # its retained messages have come already
                wanted = tuple(msgspec.structs.replace(one, retain_handling=2) for one in wanted)
            properties = {P.SUBSCRIPTION_ID: [inbox.identifier]} if tag else {}
            try:
                packet_id = engine.subscribe(wanted, properties=properties, stream=stream)
            except ConnectorError as error:
                inbox.fail(error)
                continue
            self._subacks[packet_id] = inbox
            inbox.stream = stream
            inbox.tagged = tag
            inbox.subscribed = False
        self.notify()
        return opening or len(self._subacks) > len(asked)

    def _stream_for(self, inbox: Inbox) -> int | None:
        """None: it is being opened. Without identifiers a message that comes on two streams could
        not be told from two messages, so it is asked only with them."""
        if self._data is None or self._placement is None:
            return 0
        return self._data.number(self._placement.lane_of_filters(inbox.filters))

    def _streams_changed(self) -> None:
        if self.up:
            self.subscribe()
            self.flush()

    def subacked(self, suback: Suback) -> None:
        inbox = self._subacks.pop(suback.packet_id, None)
        if inbox is None:  # its stream broke right behind it
            return
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
        inbox.granted(suback.codes)

    # --- the clock, the readers and the writers -------------------------------------------

    def arm(self) -> None:
        """Keep one timer for the engine, apart from a writer that may be stuck: it comes early
        perhaps, never late, if this is called whenever a deadline may have come nearer."""
        due = self.engine.next_timeout()
        if due is not None and (self._timer is None or due < self._due):
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = self._loop.call_at(due, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        events = self.engine.handle_timeout(self._loop.time())
        self.absorb(events)
        for event in events:
            if isinstance(event, Closed):
                self._silent = True
                self.end(event)
        self.notify()
        self.arm()

    async def _read(self, channel: Channel) -> None:
        """Reads a stream until it or the connection ends; the events happen here."""
        engine, number, receive = self.engine, channel.number, channel.stream.receive
        clock = self._loop.time
        coalescer = Coalescer(clock())
        pausable = channel.stream if isinstance(channel.stream, Pausable) else None
        switchboard = self._switchboard
        while self.closed is None:
            try:
                data = await receive(_READ)
            except Disconnected as error:
                if number:
                    self._lost(channel)
                else:
                    self.broken = self.broken or error
                return
            if data and not number and not self._reading.is_set():
                await self._stand_still(self._reading.wait())
            now = clock()
            if self.departed and not number:
                if not data:
                    return
                await self._salvage(data)
                continue
            if not data:
                await self._handle(engine.stream_eof(number, now=now), 0)
                self.flush()
                return
            channel.heard = True
            events = engine.receive_data(data, stream=number, now=now)
            count, acknowledged = await self._handle(events, len(data))
            self.flush()
            if switchboard.full:
                await self._stand_still(switchboard.room())
            if pause := coalescer.pause(len(data), count, acknowledged, now):
                if pausable is not None:
                    pausable.pause()
                await asyncio.sleep(pause)
                coalescer.resumed(clock())

    async def _stand_still(self, wait: Awaitable[object]) -> None:
        """A reader waits, and perhaps others do: silence that is ours does not count."""
        self._waiting += 1
        self.engine.pause_reading(self._loop.time())
        try:
            await wait
        finally:
            self._waiting -= 1
            if not self._waiting:
                self.engine.resume_reading(self._loop.time())
                self.arm()

    async def _write(self, channel: Channel) -> None:
        """The one writer of a stream."""
        engine, number, stream, wake = self.engine, channel.number, channel.stream, channel.wake
        try:
            if self._first and not number:
                await stream.send(self._first)
            while True:
                wrote = False
                for output in engine.take(number):
                    if isinstance(output, Send):
                        if output.data:
                            await stream.send(output.data)
                            wrote = True
                        if output.fin:
                            return
                    elif isinstance(output, Reset):
                        stream.abort(output.code)
                        return
                    elif self._silent:
                        self.connection.abort(output.code)
                        return
                    else:
                        if self.departed and self._reader is not None:
                            await asyncio.wait((self._reader,), timeout=_FLUSH)
                        await self.connection.aclose(output.code)
                        return
                if wrote:
                    self.flush()
                elif channel.ending:
                    await stream.send_eof()
                    return
                else:
                    await wake.wait()
                    wake.clear()
        except ConnectorError as error:
            if number:
                self._lost(channel)
            else:
                self.broken = self.broken or error

    def _lost(self, channel: Channel) -> None:
        """A data stream broke. Idempotent."""
        self.absorb(self.engine.stream_reset(channel.number, now=self._loop.time()))
        self.flush()

    async def _serve_data(self, channel: Channel) -> None:
        """A data stream until its end. Raises only what should not be."""
        reader = asyncio.create_task(self._read(channel), name="MQTT stream reader")
        writer = asyncio.create_task(self._write(channel), name="MQTT stream writer")
        tasks = (reader, writer)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not reader.done() and channel.ending:
                await asyncio.wait((reader,))
            elif reader.done():
                await asyncio.wait((writer,), timeout=_FLUSH)
                if writer.done() and not self._over:
                    async with asyncio.timeout(_FLUSH):
                        await channel.stream.aclose()
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
