"""The asyncio driver: an engine over any connection, again and again.

Owns: dialling, reconnecting, subscribing and the tasks of one client. Rules: it knows neither
transports nor files; no per-message await or callback; while a reader lags, the socket waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Self

from ..errors import ConnectorError, Disconnected, Refused
from ..message import Batch, Delivery, Message
from ..mqtt.client import ClientEngine
from ..mqtt.events import (
    Acknowledged,
    AuthChallenge,
    Close,
    Closed,
    Connected,
    Event,
    Received,
    Send,
    Suback,
)
from ..mqtt.packets import V3, V5, Connack, Subscription
from ..mqtt.properties import P
from ..mqtt.reasons import R, words
from ..mqtt.session import Session
from ..mqtt.topics import check_filter
from ..protocols import Auth, ByteStream, Connection, Credentials, Dialer, Login, Pausable, Reader
from .coalesce import Coalescer
from .handshake import connect_packet, explain
from .inbox import Inbox, Switchboard
from .options import ClientOptions, ClientState, ClientStatus
from .outbox import Outbox

log = logging.getLogger(__name__)

_READ = 262_144
_STABLE = 5.0
"""Seconds a connection must last for the reconnect delay to start afresh."""
_FLUSH = 2.0
"""Seconds a connection that is over has to take the last words."""


class _Connection:
    """One accepted transport connection with its engine. Lives until the transport ends."""

    def __init__(self, connection: Connection, stream: ByteStream, engine: ClientEngine, login: Login | None):
        self.connection = connection
        self.stream = stream
        self.engine = engine
        self.login = login
        self.closed: Closed | None = None
        self.accepted = False
        self.flushing = False
        """The engine has said its last: the writer flushes that and closes."""
        self.wake = asyncio.Event()
        """There may be something to write, or a deadline has moved."""
        self.subacks: dict[int, tuple[Inbox, ...]] = {}
        self.fix = ""

    def broken(self, error: ConnectorError) -> None:
        """The transport failed, which ends the connection if nothing else had ended it."""
        if self.closed is None:
            self.closed = Closed(None, error.what, True, False)
            self.fix = error.fix


class Client:
    """An MQTT client that stays connected.

    Use it as `async with Client(...) as client`. It dials at the first `read`, `publish` or
    `connected`, and from then on reconnects for ever; subscriptions and unacknowledged
    publishes survive. Leaving flushes acknowledgements and says DISCONNECT.
    """

    def __init__(
        self,
        dialer: Dialer,
        options: ClientOptions | None = None,
        *,
        auth: Auth | None = None,
        name: str = "",
    ) -> None:
        self._dialer = dialer
        self._options = options or ClientOptions()
        self._auth = auth
        self._keep_session = bool(self._options.client_id) and not self._options.clean_session
        self._client_id = self._options.client_id or f"tesaiot-{secrets.token_hex(8)}"
        self._name = name or self._client_id
        self._version = V3 if self._options.protocol == "3.1.1" else V5
        self._session = Session()
        self._switchboard = Switchboard()
        self._outbox = Outbox()
        self._task: asyncio.Task[None] | None = None
        self._live: _Connection | None = None
        self._connack: Connack | None = None
        self._fatal: Refused | None = None
        self._failure: ConnectorError | None = None
        self._changed = asyncio.Event()
        """Set and replaced whenever the state changes."""
        self._closing = False
        self._opened = False
        self._state: ClientState = "idle"
        self._since = time.time()
        self._connects = 0
        self._received = 0
        self._endpoint = ""
        self._transport = ""

    async def __aenter__(self) -> Self:
        self._opened = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        live, task = self._live, self._task
        if live is not None and live.accepted:
            if not self._keep_session and self._version == V5:
                live.engine.disconnect(properties={P.SESSION_EXPIRY: 0})
            else:
                live.engine.disconnect()
            live.wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.shield(asyncio.wait([task] if task else []))
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._set_state("closed")
        closed = Disconnected(f"the client {self._name} was closed")
        self._switchboard.fail(closed)
        self._outbox.fail(closed)
        for inbox in self._switchboard.inboxes:
            inbox.close()

    # --- what users call ------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def subscribe(
        self,
        subscriptions: Sequence[Subscription | str],
        *,
        max_messages: int = 16_384,
        max_bytes: int = 8 * 1024 * 1024,
    ) -> AsyncIterator[Reader]:
        """A reader of what these subscriptions bring; a plain string is a filter at QoS 1.

        Settling a delivery sends PUBACK or PUBREC, a nack reconnects so that the broker sends
        again. Beyond `max_messages` or `max_bytes` that wait, the socket is not read. Leaving
        does not unsubscribe: what the session brings from then on stays at the broker. The
        reader raises Refused when the broker refuses a filter, ProtocolError is raised for an
        invalid one.
        """
        wanted = [Subscription(one) if isinstance(one, str) else one for one in subscriptions]
        for one in wanted:
            check_filter(one.topic_filter)
        inbox = Inbox(
            wanted, len(self._switchboard.inboxes) + 1, max_messages=max_messages, max_bytes=max_bytes
        )
        self._switchboard.add(inbox)
        live = self._live
        if live is not None and live.accepted:
            self._subscribe(live, (inbox,))
        try:
            yield _LazyReader(self, inbox)
        finally:
            inbox.close()

    async def publish(self, messages: Sequence[Message]) -> None:
        """Returns when the broker has taken over every message (QoS 0: when it was written).

        Waits through reconnects. Raises PartialDelivery with a PublishRefused for each message
        that the broker refused.
        """
        if not messages:
            return
        self._start()
        done = self._outbox.add(messages)
        live = self._live
        if live is not None and live.accepted:
            self._flush(live)
        await done

    async def connected(self, *, once: bool = False) -> Connack:
        """Waits for a connection. Raises Refused when the broker says no for good; with `once`,
        also the error of the first attempt that fails, for callers who do not want to wait."""
        self._start()
        while True:
            if self._live is not None and self._live.accepted and self._connack is not None:
                return self._connack
            if self._fatal is not None:
                raise self._fatal
            if once and self._state == "waiting" and self._failure is not None:
                raise self._failure
            if self._closing:
                raise Disconnected(f"the client {self._name} was closed")
            await self._changed.wait()

    @property
    def status(self) -> ClientStatus:
        return ClientStatus(
            name=self._name,
            state=self._state,
            since=self._since,
            client_id=self._client_id,
            endpoint=self._endpoint,
            transport=self._transport,
            version="5" if self._version == V5 else "3.1.1",
            session_present=self._connack.session_present if self._connack else False,
            connects=self._connects,
            received=self._received,
            published=self._outbox.published,
            unrouted=self._switchboard.unrouted,
            last_error=str(self._failure or ""),
        )

    def _start(self) -> None:
        if not self._opened or self._closing:
            raise Disconnected(
                f"the client {self._name} is not open", fix="use it inside `async with client:`"
            )
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"client {self._name}")
        elif self._task.done() and not self._task.cancelled() and (error := self._task.exception()):
            raise Disconnected(f"the client {self._name} failed: {error}") from error

    # --- connecting, for ever -------------------------------------------------------------

    async def _run(self) -> None:
        delays = self._options.reconnect.delays()
        try:
            while not self._stopping():
                began = time.monotonic()
                self._set_state("connecting")
                delay = None
                try:
                    await self._connect_and_serve()
                except Refused as error:
                    self._note(error)
                    if error.reason_code == R.UNSUPPORTED_PROTOCOL_VERSION and self._fall_back():
                        continue
                    if error.permanent or error.reason_code == R.SESSION_TAKEN_OVER:
                        delay = float(self._options.reconnect.max)
                    if error.permanent:
                        self._fatal = error
                        self._announce()
                except ConnectorError as error:
                    if not self._stopping():
                        self._note(error)
                if self._stopping():
                    return
                if not self._connects and self._options.protocol == "auto":
                    self._version = V5
                if time.monotonic() - began > _STABLE:
                    delays = self._options.reconnect.delays()
                delay = next(delays) if delay is None else delay
                self._set_state("waiting")
                log.info("%s: trying again in %.1f s", self._name, delay)
                await asyncio.sleep(delay)
        except Exception as error:
            log.exception("%s: the client failed in an unexpected way", self._name)
            failure = Disconnected(f"the client {self._name} failed: {error!r}")
            self._switchboard.fail(failure)
            self._outbox.fail(failure)
            raise

    def _stopping(self) -> bool:
        return self._closing

    def _note(self, error: ConnectorError) -> None:
        self._failure = error
        log.warning("%s: %s", self._name, error)

    def _fall_back(self) -> bool:
        """To 3.1.1, if that is allowed, until a connection was accepted in either version."""
        if self._options.protocol == "auto" and self._version == V5 and not self._connects:
            log.info("%s: the broker does not seem to speak MQTT 5, trying 3.1.1", self._name)
            self._version = V3
            return True
        return False

    async def _connect_and_serve(self) -> None:
        """One connection from dialling to its end. Raises Disconnected or Refused at the end."""
        auth = self._auth
        login = await auth.begin() if auth is not None else None
        identity = await auth.identity() if auth is not None else None
        connection = await self._dialer.connect(identity=identity)
        live: _Connection | None = None
        try:
            stream = await connection.open_stream()
            credentials = login.credentials if login is not None else Credentials()
            engine = ClientEngine(
                connect_packet(
                    self._options,
                    credentials,
                    client_id=self._client_id,
                    version=self._version,
                    keep_session=self._keep_session,
                    first=not self._connects,
                ),
                self._session,
                now=asyncio.get_running_loop().time(),
                connect_timeout=self._options.connect_timeout,
            )
            connection.set_keepalive(self._options.keepalive)
            self._endpoint = connection.peer.address
            self._transport = connection.peer.transport
            live = self._live = _Connection(connection, stream, engine, login)
            writer = asyncio.create_task(self._write(live), name=f"writer of {self._name}")
            try:
                await self._read(live)
            finally:
                if live.flushing:
                    await asyncio.wait([writer], timeout=_FLUSH)
                writer.cancel()
                await asyncio.wait([writer])
        finally:
            self._live = None
            connection.abort()
            self._announce()
        raise explain(
            live.closed or Closed(None, "the broker closed the connection", True, False),
            broker=self._endpoint,
            client_id=self._client_id,
            accepted=live.accepted,
            origin=credentials.origin,
            may_fall_back=self._options.protocol == "auto" and self._version == V5 and not live.fix,
            fix=live.fix,
        )

    # --- one connection -------------------------------------------------------------------

    async def _read(self, live: _Connection) -> None:
        """Reads until the connection ends; the events happen here."""
        engine, receive = live.engine, live.stream.receive
        clock = asyncio.get_running_loop().time
        coalescer = Coalescer(clock())
        switchboard = self._switchboard
        while live.closed is None:
            try:
                data = await receive(_READ)
            except Disconnected as error:
                live.broken(error)
                engine.stream_reset(0, now=clock())
                break
            now = clock()
            if not data:
                await self._handle(live, engine.stream_eof(0, now=now), 0)
                break
            count, acknowledged = await self._handle(live, engine.receive_data(data, now=now), len(data))
            self._flush(live)
            if switchboard.full:
                engine.pause_reading(now)
                await switchboard.room()
                engine.resume_reading(clock())
            if pause := coalescer.pause(len(data), count, acknowledged, now):
                if isinstance(live.stream, Pausable):
                    live.stream.pause()
                await asyncio.sleep(pause)
                coalescer.resumed(clock())

    async def _handle(self, live: _Connection, events: list[Event], size: int) -> tuple[int, bool]:
        """Acts on events. Returns how many messages came and whether some want acknowledgement."""
        count = 0
        acknowledged = False
        for event in events:
            if isinstance(event, Received):
                count += len(event.messages)
                acknowledged = acknowledged or event.token > 0
                self._deliver(live, event, size)
            elif isinstance(event, Acknowledged):
                self._outbox.acknowledged(event.keys, event.refused)
            elif isinstance(event, Connected):
                await self._accepted(live, event.connack)
            elif isinstance(event, Suback):
                self._subacked(live, event)
            elif isinstance(event, AuthChallenge):
                assert live.login is not None
                if event.final:
                    await live.login.finish(event.data)
                else:
                    live.engine.auth(await live.login.respond(event.data))
            elif isinstance(event, Closed):
                live.closed = live.closed or event
                live.flushing = True
                live.wake.set()
            else:
                raise AssertionError(f"{type(event).__name__} is no event of a client's control stream")
        self._received += count
        return count, acknowledged

    def _deliver(self, live: _Connection, event: Received, size: int) -> None:
        token = event.token

        async def settle(error: BaseException | None) -> None:
            if not token:
                return
            if error is None:
                current = self._live
                if current is None or not current.accepted:
                    self._session.settle_unconnected(token)
                elif current is live or self._session.unsettled:
                    current.engine.settle(token)
                    current.wake.set()
            else:
                current = self._live if self._session.forget(token) else live
                if current is not None and current is self._live:
                    log.warning("%s: a batch was refused downstream, reconnecting: %s", self._name, error)
                    current.closed = current.closed or Closed(
                        None, f"a batch was refused: {error}", False, False
                    )
                    current.connection.abort()

        delivery = Delivery(Batch(event.messages, time.time()), settle)
        left = self._switchboard.dispatch(delivery, size)
        if left is not None:
            if token:
                live.engine.settle(token)
            log.warning(
                "%s: %d messages that no source of this connection subscribes to, first on %s",
                self._name,
                len(left.batch.messages),
                left.batch.messages[0].topic,
            )

    async def _accepted(self, live: _Connection, connack: Connack) -> None:
        data = connack.properties.get(P.AUTH_DATA)
        if live.login is not None and data is not None:
            await live.login.finish(data)
        first = self._connects == 0
        self._connects += 1
        self._connack = connack
        self._fatal = None
        self._failure = None
        live.accepted = True
        inboxes = tuple(self._switchboard.inboxes)
        if not first and connack.session_present:
            told = "session kept, not subscribing again"
        else:
            told = "session kept" if connack.session_present else "new session"
            told += ", subscribing" if inboxes else ""
            self._subscribe(live, inboxes)
        self._set_state("connected")
        log.info("%s: connected to %s by %s, %s", self._name, self._endpoint, self._transport, told)

    def _subscribe(self, live: _Connection, inboxes: tuple[Inbox, ...]) -> None:
        connack = self._connack
        v5 = self._version == V5
        usable = bool(connack and connack.properties.get(P.SUBSCRIPTION_IDS_AVAILABLE, 1))
        several = len(self._switchboard.inboxes) > 1
        for inbox in inboxes:
            if inbox.closed:
                continue
            properties = {P.SUBSCRIPTION_ID: [inbox.identifier]} if v5 and usable and several else {}
            packet_id = live.engine.subscribe(inbox.subscriptions, properties=properties)
            live.subacks[packet_id] = (inbox,)
        live.wake.set()

    def _subacked(self, live: _Connection, suback: Suback) -> None:
        for inbox in live.subacks.pop(suback.packet_id, ()):
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

    def _flush(self, live: _Connection) -> None:
        """Offers what waits to be published, and has the writer look."""
        self._outbox.offer(live.engine.publish)
        if live.engine.has_output:
            live.wake.set()

    async def _write(self, live: _Connection) -> None:
        """The one writer of the stream; watches the engine's clock as well."""
        engine, stream, wake = live.engine, live.stream, live.wake
        clock = asyncio.get_running_loop().time
        try:
            while True:
                wrote = False
                for output in engine.outputs():
                    if isinstance(output, Send):
                        await stream.send(output.data)
                        wrote = True
                    elif isinstance(output, Close):
                        await live.connection.aclose(output.code)
                        return
                if wrote and live.accepted:
                    self._outbox.offer(engine.publish)
                    self._outbox_refused(live)
                    continue
                due = engine.next_timeout()
                wake_at = None if due is None else max(0.0, due - clock())
                try:
                    async with asyncio.timeout(wake_at):
                        await wake.wait()
                except TimeoutError:
                    await self._handle(live, engine.handle_timeout(clock()), 0)
                wake.clear()
        except ConnectorError as error:
            live.broken(error)
            live.connection.abort()

    def _outbox_refused(self, live: _Connection) -> None:
        for event in live.engine.take_events():
            if isinstance(event, Acknowledged):
                self._outbox.acknowledged(event.keys, event.refused)

    def _set_state(self, state: ClientState) -> None:
        self._state = state
        self._since = time.time()
        self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class _LazyReader:
    """An inbox whose first read makes the client dial."""

    def __init__(self, client: Client, inbox: Inbox) -> None:
        self._client = client
        self._inbox = inbox

    async def read(self) -> Delivery:
        self._client._start()
        return await self._inbox.read()
