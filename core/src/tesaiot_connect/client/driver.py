"""The asyncio driver: an engine over any connection, again and again.

Owns: dialling, reconnecting, subscribing and reading. Rules: it knows neither transports nor
files; no per-message await or callback; while a reader lags, the socket waits; nothing is
acknowledged before its delivery is settled, except what nobody subscribed to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NoReturn, Self, TypeVar

from ..errors import ConnectFailed, ConnectorError, Disconnected, Refused
from ..message import Batch, Delivery, Message
from ..mqtt.client import ClientEngine
from ..mqtt.events import AuthChallenge, Closed, Connected, Event, Received, Send, Suback
from ..mqtt.packets import V3, V5, Connack, Connect, Subscription
from ..mqtt.properties import P
from ..mqtt.reasons import R
from ..mqtt.session import Session
from ..mqtt.topics import check_filter
from ..protocols import (
    Auth,
    ByteStream,
    ClientCertificate,
    Connection,
    Credentials,
    Dialer,
    RotatingAuth,
)
from .connection import Live
from .handshake import connect_packet, explain
from .inbox import Inbox, LazyReader, Switchboard
from .options import ClientOptions, ClientState, ClientStatus
from .outbox import Outbox
from .placement import Placement

log = logging.getLogger(__name__)

_STABLE = 5.0
"""Seconds a connection must last for the reconnect delay to start afresh."""
_LEAVE = 5.0
"""Seconds leaving may take while the broker does not read."""

T = TypeVar("T")

OnState = Callable[[ClientState, ConnectorError | None], None]


class Client:
    """An MQTT client that stays connected.

    Use it as `async with Client(...) as client`. It dials at the first `read`, `publish` or
    `connected`, and from then on reconnects for ever; subscriptions and unacknowledged
    publishes survive. Leaving flushes acknowledgements and says DISCONNECT.

    Who reads from a client must not wait for a publish by the same client meanwhile: while a
    reader lags the socket is not read, and the PUBACKs are behind the messages.
    """

    def __init__(
        self,
        dialer: Dialer,
        options: ClientOptions | None = None,
        *,
        auth: Auth | None = None,
        name: str = "",
        on_state: OnState | None = None,
    ) -> None:
        """`on_state` is called with each state, in order, and with the error that ended the one
        before, if one did; it must be quick and not raise."""
        self._dialer = dialer
        self._on_state = on_state
        self._options = options or ClientOptions()
        self._auth = auth
        self._keep_session = bool(self._options.client_id) and not self._options.clean_session
        self._client_id = self._options.client_id or f"tesaiot-{secrets.token_hex(8)}"
        self._name = name or self._client_id
        self._version = V3 if self._options.protocol == "3.1.1" else V5
        self._session = Session()
        self._switchboard = Switchboard()
        self._outbox = Outbox()
        self._placement: Placement | None = None
        if self._options.streams not in ("single", ()):
            self._placement = Placement(self._options, keep_session=self._keep_session)
        self._told_single = False
        self._task: asyncio.Task[None] | None = None
        self._live: Live | None = None
        self._connack: Connack | None = None
        self._fatal: Refused | None = None
        self._failure: ConnectorError | None = None
        self._unsettled: dict[int, tuple[Inbox, ...]] = {}
        """Tokens of what was received, and who was given it."""
        self._changed = asyncio.Event()
        """Set and replaced whenever the state changes."""
        self._closing = False
        self._opened = False
        self._state: ClientState = "idle"
        self._since = time.time()
        self._up_since = math.inf
        """When the present or latest connection was accepted, on the loop's clock."""
        self._connects = 0
        self._received = 0
        self._endpoint = ""
        self._transport = ""

    async def __aenter__(self) -> Self:
        self._opened = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        closed = Disconnected(f"the client {self._name} was closed")
        for inbox in self._switchboard.inboxes:
            inbox.close(closed)
        live, task = self._live, self._task
        try:
            if task is not None and live is not None and live.up:
                await live.leave()
                ends = not self._keep_session and self._version == V5
                live.engine.disconnect(properties={P.SESSION_EXPIRY: 0} if ends else {})
                live.notify()
                await asyncio.wait([task], timeout=_LEAVE)
        finally:
            self._outbox.fail(closed)
            self._set_state("closed")
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    # --- what users call ------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def subscribe(
        self,
        subscriptions: Sequence[Subscription | str],
        *,
        max_messages: int = 16_384,
        max_bytes: int = 8 * 1024 * 1024,
    ) -> AsyncIterator[LazyReader]:
        """A reader of what these subscriptions bring; a plain string is a filter at QoS 1.

        Settling a delivery sends PUBACK or PUBREC, a nack reconnects so that the broker sends
        again. Beyond `max_messages` or `max_bytes` that wait, the socket is not read. Leaving
        does not unsubscribe: what the session brings from then on stays at the broker,
        unacknowledged. Opening the same filters again reconnects for it. The reader raises Refused
        when the broker refuses a filter, ProtocolError is raised for an invalid one.
        """
        wanted = [Subscription(one) if isinstance(one, str) else one for one in subscriptions]
        for one in wanted:
            check_filter(one.topic_filter)
        inbox = self._switchboard.open(wanted, max_messages=max_messages, max_bytes=max_bytes)
        live = self._live
        if live is not None and live.up:
            if any(one.closed for inboxes in self._unsettled.values() for one in inboxes):
                self._reconnect(live, "a subscription that was closed left messages unsettled")
            else:
                live.subscribe()
        try:
            yield LazyReader(self._start, inbox)
        finally:
            inbox.close()

    async def publish(self, messages: Sequence[Message]) -> None:
        """Returns when the broker has taken over every message (QoS 0: when it was written).

        Waits through reconnects. Raises PartialDelivery with a PublishRefused for each message
        that the broker refused, TypeError for a payload that is not bytes.
        """
        if not messages:
            return
        for kind in {type(message.payload) for message in messages}:
            if not issubclass(kind, (bytes, bytearray)):
                raise TypeError(f"a payload must be bytes, not {kind.__name__}")
        self._start()
        done = self._outbox.add(messages)
        if self._live is not None:
            self._live.flush()
        await done

    async def connected(self, *, once: bool = False) -> Connack:
        """Waits for a connection. Raises Refused when the broker says no for good; with `once`,
        also the error of the first attempt that fails, for callers who do not want to wait."""
        self._start()
        while True:
            if self._live is not None and self._live.up and self._connack is not None:
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
            streams=self._live.streams if self._live is not None else 0,
            unrouted=self._switchboard.unrouted,
            last_error=str(self._failure or ""),
            connection=self._live.connection.status() if self._live is not None else None,
        )

    def _start(self) -> None:
        if not self._opened or self._closing:
            raise Disconnected(
                f"the client {self._name} is not open", fix="use it inside `async with client:`"
            )
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"client {self._name}")

    # --- connecting, for ever -------------------------------------------------------------

    async def _run(self) -> None:
        delays = self._options.reconnect.delays()
        taken_over = False
        while True:
            self._set_state("connecting")
            self._up_since = math.inf
            delay = None
            try:
                await self._connect_and_serve()
            except Refused as error:
                self._note(error)
                if error.reason_code == R.UNSUPPORTED_PROTOCOL_VERSION and self._fall_back():
                    continue
                again = taken_over and not self._stable
                taken_over = taken_over or error.reason_code == R.SESSION_TAKEN_OVER
                # once may be our own CONNECT that came late, or one that was replayed; then it is a rival
                if error.permanent or (again and error.reason_code == R.SESSION_TAKEN_OVER):
                    delay = float(self._options.reconnect.max)
                if error.permanent:
                    self._fatal = error
            except ConnectorError as error:
                self._note(error)
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and self._cancelled():
                    raise
                self._note(Disconnected(f"this attempt failed in an unexpected way: {error!r}"), error)
            if self._closing:
                return
            if not self._connects and self._options.protocol == "auto":
                self._version = V5
            if self._stable:
                delays = self._options.reconnect.delays()
            delay = next(delays) if delay is None else delay
            self._set_state("waiting")
            log.info("%s: trying again in %.1f s", self._name, delay)
            await self._pause(delay)

    async def _pause(self, delay: float) -> None:
        """Before the next attempt; shorter when the auth has other credentials meanwhile."""
        begun = self._now()
        auth: object = self._auth
        if isinstance(auth, RotatingAuth):
            try:
                async with asyncio.timeout(delay):
                    await auth.changed()
                log.info("%s: the credentials have changed, trying again now", self._name)
                delay = min(delay, float(self._options.reconnect.min))
            except TimeoutError:
                pass
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and self._cancelled():
                    raise
                log.warning("%s: cannot tell when the credentials change: %r", self._name, error)
        await asyncio.sleep(max(0.0, begun + delay - self._now()))

    @property
    def _stable(self) -> bool:
        """Whether the latest connection lasted."""
        return self._now() - self._up_since > _STABLE

    def _cancelled(self) -> bool:
        """Whether this client is cancelled, and not something that an auth or a transport awaits."""
        return self._task is None or self._task.cancelling() > 0

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _note(self, error: ConnectorError, cause: BaseException | None = None) -> None:
        if not self._closing:
            again = str(error) == str(self._failure)
            self._failure = error
            log.warning("%s: %s", self._name, error, exc_info=None if again else cause)

    def _fall_back(self) -> bool:
        """To 3.1.1, if that is allowed, until a connection was accepted in either version."""
        if self._options.protocol == "auto" and self._version == V5 and not self._connects:
            log.info("%s: the broker does not seem to speak MQTT 5, trying 3.1.1", self._name)
            self._version = V3
            return True
        return False

    async def _connect_and_serve(self) -> NoReturn:
        """One connection from dialling to its end. Raises Disconnected or Refused at the end."""
        self._forget_dropped()
        auth = self._auth
        login = await self._ask(auth.begin()) if auth is not None else None
        identity = await self._ask(auth.identity()) if auth is not None else None
        credentials = login.credentials if login is not None else Credentials()
        engine = self._engine(
            connect_packet(
                self._options,
                credentials,
                client_id=self._client_id,
                version=self._version,
                keep_session=self._keep_session,
                first=not self._connects,
            )
        )
        connection, stream, first = await self._dial(engine, identity)
        live = Live(
            self._name,
            connection,
            stream,
            engine,
            login,
            outbox=self._outbox,
            switchboard=self._switchboard,
            first=first,
        )
        try:
            connection.set_keepalive(self._options.keepalive)
            self._endpoint = connection.peer.address
            self._transport = connection.peer.transport
            self._live = live
            await live.serve(lambda events, size: self._handle(live, events, size))
        finally:
            self._live = None
            live.gone()
            connection.abort()
        broken = live.broken or Disconnected("the broker closed the connection")
        raise explain(
            live.closed or Closed(None, broken.what, True, False),
            broker=self._endpoint,
            client_id=self._client_id,
            accepted=live.accepted,
            origin=credentials.origin or (f"the `auth` table of {self._name}" if self._auth else ""),
            may_fall_back=self._options.protocol == "auto" and self._version == V5 and not broken.fix,
            version=self._version,
            fix=broken.fix,
        )

    def _engine(self, connect: Connect) -> ClientEngine:
        """With CONNECT in its output, and behind it what may be published early."""
        engine = ClientEngine(
            connect,
            self._session,
            now=self._now(),
            connect_timeout=self._options.connect_timeout,
            maximum_streams=self._options.max_streams + 1,
        )
        if self._options.early_publish:
            known = self._connack if self._connects else None
            self._outbox.offer_early(
                lambda messages, keys: (engine.publish_early(messages, keys, known=known), {})
            )
        return engine

    async def _dial(
        self, engine: ClientEngine, identity: ClientCertificate | None
    ) -> tuple[Connection, ByteStream, bytes]:
        """A connection with its first stream, and what is still to be written there first."""
        early = b"".join(output.data for output in engine.outputs() if isinstance(output, Send))
        try:
            connection = await self._dialer.connect(identity=identity, early=early)
            try:
                stream = await connection.open_stream()
            except BaseException:
                connection.abort()
                raise
        except BaseException:
            self._outbox.put_back(engine.withdraw())
            raise
        engine.opened(self._now())
        return connection, stream, b"" if connection.early_sent else early

    async def _ask(self, answer: Awaitable[T]) -> T:
        """An answer of the auth, which has as long as the broker has for its own."""
        seconds = self._options.connect_timeout
        try:
            async with asyncio.timeout(seconds) as deadline:
                return await answer
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise ConnectFailed(
                f"the `auth` of this connection gave no answer within {seconds:g} s",
                fix="see what it waits for, or raise `connect_timeout`",
            ) from error

    def _forget_dropped(self) -> None:
        """Between connections: QoS 2 messages that nobody will settle are new when they come again."""
        self._unsettled = {
            token: inboxes
            for token, inboxes in self._unsettled.items()
            if not any(inbox.closed for inbox in inboxes)
        }
        unsettled = self._session.unsettled
        for packet_id in [one for one, token in unsettled.items() if token not in self._unsettled]:
            del unsettled[packet_id]

    def _reconnect(self, live: Live, why: str) -> None:
        """So that the broker sends again what is not acknowledged."""
        live.engine.disconnect()
        live.end(Closed(None, why, False, False))

    # --- one connection -------------------------------------------------------------------

    async def _handle(self, live: Live, events: list[Event], size: int) -> tuple[int, bool]:
        """Acts on events. Returns how many messages came and whether some want acknowledgement."""
        count = 0
        acknowledged = False
        live.absorb(events)  # first, because what follows may fail or be cancelled
        for event in events:
            if isinstance(event, Received):
                count += len(event.messages)
                acknowledged = acknowledged or event.token > 0
                self._deliver(live, event, size)
            elif isinstance(event, Connected):
                await self._accepted(live, event.connack)
            elif isinstance(event, Suback):
                live.subacked(event)
            elif isinstance(event, AuthChallenge):
                assert live.login is not None
                if event.final:
                    await self._ask(live.login.finish(event.data))
                else:
                    live.engine.auth(await self._ask(live.login.respond(event.data)))
            elif isinstance(event, Closed):
                live.finish(event)
        self._received += count
        return count, acknowledged

    def _deliver(self, live: Live, event: Received, size: int) -> None:
        token = event.token

        async def settle(error: BaseException | None) -> None:
            if token:
                self._settle(live, token, error)

        delivery = Delivery(Batch(event.messages, time.time()), settle)
        news = not self._switchboard.unrouted
        inboxes = self._switchboard.dispatch(delivery, size)
        if token and inboxes:
            self._unsettled[token] = inboxes
        elif token:
            live.engine.settle(token)
            live.notify()
        if news and self._switchboard.unrouted:
            log.warning(
                "%s: messages come that no source of this connection subscribes to, first on %s or after; "
                "they are counted and dropped",
                self._name,
                event.messages[0].topic,
            )

    def _settle(self, live: Live, token: int, error: BaseException | None) -> None:
        """`live` brought it; the connection may be another one now."""
        self._unsettled.pop(token, None)
        current = self._live
        if error is not None:
            # QoS 2 messages of an earlier connection have come again unnoticed
            again = self._session.forget(token) or current is live
            if again and current is not None:
                self._reconnect(current, f"a batch was refused downstream: {error}")
        elif current is None or not current.up:
            self._session.settle_unconnected(token)
        elif current is live or self._session.unsettled:
            current.engine.settle(token)
            current.notify()

    async def _accepted(self, live: Live, connack: Connack) -> None:
        data = connack.properties.get(P.AUTH_DATA)
        if live.login is not None and data is not None:
            await self._ask(live.login.finish(data))
        self._connects += 1
        self._up_since = self._now()
        self._connack = connack
        self._fatal = None
        self._failure = None
        live.accept(self._placement)
        live.connection.set_keepalive(live.engine.keepalive)
        if not connack.session_present:
            self._switchboard.session_lost()
        if self._placement is not None and not live.connection.multistream and not self._told_single:
            self._told_single = True
            log.info("%s: %s has one stream only: everything goes on it", self._name, self._transport)
        told = "session kept" if connack.session_present else "new session"
        if live.subscribe():
            told += ", subscribing"
        elif self._switchboard.inboxes:
            told += ", not subscribing again"
        self._set_state("connected")
        how = self._transport + _how(live.connection)
        log.info("%s: connected to %s by %s, %s", self._name, self._endpoint, how, told)

    def _set_state(self, state: ClientState) -> None:
        self._state = state
        self._since = time.time()
        self._announce()
        if self._on_state is not None:
            self._on_state(state, self._failure if state == "waiting" else None)

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _how(connection: Connection) -> str:
    """What is worth telling about a connection's handshake."""
    quic = connection.status().quic
    if quic is None:
        return ""
    if quic.early_data_accepted:
        return ", resumed with 0-RTT"
    return ", resumed" if quic.resumed else ""
