"""The asyncio driver: an engine over any connection, again and again.

Owns: dialling, reconnecting, subscribing and reading. Rules: it knows neither transports nor
files; no per-message await or callback; while a reader lags, the socket waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

from ..dialing import Dialer
from ..errors import ConnectorError, Disconnected, Refused
from ..message import Message
from ..mqtt.client import ClientEngine
from ..mqtt.events import AuthChallenge, Closed, Connected, Event, Received, Send, Suback
from ..mqtt.packets import V5, Connack, Connect, Subscription
from ..mqtt.properties import P
from ..mqtt.reasons import R
from ..mqtt.session import Session
from ..mqtt.topics import check_filter
from ..protocols import Auth, ByteStream, ClientCertificate, Connection, Credentials
from .connection import Live
from .deliveries import Deliveries
from .handshake import connect_packet, explain
from .inbox import LazyReader, Switchboard
from .logins import Logins, cancelled
from .moving import Prepared
from .options import ClientOptions, ClientState, ClientStatus
from .outbox import Outbox
from .placement import Placement
from .version import WORDS, Version
from .ways import Ways

log = logging.getLogger(__name__)

_STABLE = 5.0
"""Seconds a connection must last for the reconnect delay to start afresh."""
_LEAVE = 5.0
"""Seconds leaving may take while the broker does not read."""
_PARTING = 1.0
"""The same of a connection that is left for another anyway, or has a CONNECT without an answer."""

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
        """Where `dialer` is a `NegotiatingDialer`, the client moves to what that finds to be better, as
        long as the session outlives the change: nobody who reads or publishes notices. QoS 0
        messages that come meanwhile are lost, unless the broker keeps them.

        `on_state` is called with each state, in order, and with the error that ended the one
        before, if one did; it must be quick and not raise. A move is "connecting", then "connected"
        with one more in `status.moves`; so is a way that went silent, behind a "waiting" that takes no time.
        """
        self._on_state = on_state
        self._options = options or ClientOptions()
        self._keep_session = bool(self._options.client_id) and not self._options.clean_session
        self._client_id = self._options.client_id or f"tesaiot-{secrets.token_hex(8)}"
        self._name = name or self._client_id
        self._logins = Logins(self._name, auth, self._options)
        self._version = Version(self._name, self._options, keep_session=self._keep_session)
        self._session = Session()
        self._switchboard = Switchboard()
        self._outbox = Outbox()
        self._deliveries = Deliveries(
            self._name,
            self._session,
            self._switchboard,
            current=lambda: self._live,
            again=self._reconnect,
        )
        self._ways = Ways(self._name, dialer, self._logins, self._deliveries)
        self._placement: Placement | None = None
        if self._options.streams not in ("single", ()):
            self._placement = Placement(self._options, keep_session=self._keep_session)
        self._told_single = False
        self._task: asyncio.Task[None] | None = None
        self._live: Live | None = None
        self._connack: Connack | None = None
        self._fatal: Refused | None = None
        self._failure: ConnectorError | None = None
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

    async def __aenter__(self) -> Self:
        self._opened = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        closed = Disconnected(f"the client {self._name} was closed")
        for inbox in self._switchboard.inboxes:
            inbox.close(closed)
        task = self._task
        try:
            await self._ways.close()
            live = self._live
            # a broker that has accepted a CONNECT and not said so yet has the will
            said = live is not None and (live.accepted or self._options.will is not None)
            if task is not None and live is not None and said and live.closed is None:
                patience = _LEAVE if live.up else _PARTING
                if live.up:
                    await live.leave()
                ends = not self._keep_session and self._version.current == V5
                live.engine.disconnect(properties={P.SESSION_EXPIRY: 0} if ends else {})
                live.notify()
                await asyncio.wait([task], timeout=patience)
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
            self._version.warn(subscriptions=wanted)
            if self._deliveries.left:
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
            if self._live.up:
                self._version.warn(messages=messages)
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
            endpoint=self._ways.peer.address,
            url=self._ways.url,
            transport=self._ways.peer.transport,
            version=WORDS[self._version.current],
            session_present=self._connack.session_present if self._connack else False,
            connects=self._connects,
            moves=self._ways.moves,
            better_after=self._ways.better_after if self._state == "connected" else None,
            attempts=self._ways.attempts,
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
            departed = False
            self._set_state("connecting")
            self._up_since = math.inf
            delay = None
            try:
                await self._connect_and_serve(self._ways.take())
                departed = True
            except Refused as error:
                self._ways.drop()
                self._note(error)
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
                if isinstance(error, asyncio.CancelledError) and cancelled():
                    raise
                self._note(Disconnected(f"this attempt failed in an unexpected way: {error!r}"), error)
            if self._closing:
                return
            if self._stable:
                delays = self._options.reconnect.delays()
                self._ways.lasted()
            if departed:
                continue
            self._set_state("waiting")
            self._version.paused(once_connected=bool(self._connects))
            if not self._ways.at_once():
                delay = next(delays) if delay is None else delay
                log.info("%s: trying again in %.1f s", self._name, delay)
                await self._logins.pause(delay)

    @property
    def _stable(self) -> bool:
        """Whether the latest connection lasted."""
        return self._now() - self._up_since > _STABLE

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _note(self, error: ConnectorError, cause: BaseException | None = None) -> None:
        if not self._closing:
            again = str(error) == str(self._failure)
            self._failure = error
            log.warning("%s: %s", self._name, error, exc_info=None if again else cause)

    async def _connect_and_serve(self, prepared: Prepared | None) -> None:
        """One connection from dialling, unless it is there already, to its end. Returns when it was left for
        a better one, or is to be tried in the other version, else raises Disconnected or Refused."""
        self._deliveries.forget_dropped()
        login, identity = (prepared.login, None) if prepared is not None else (None, None)
        try:
            if prepared is None or not prepared.asked:
                login = await self._logins.begin()
            if prepared is None:
                identity = await self._logins.identity()
            credentials = login.credentials if login is not None else Credentials()
            engine = self._engine(
                connect_packet(
                    self._options,
                    credentials,
                    client_id=self._client_id,
                    version=self._version.choose(credentials),
                    keep_session=self._keep_session,
                    first=not self._connects,
                )
            )
            connection, stream, first = await self._dial(engine, identity, prepared)
        except BaseException:
            if prepared is not None:
                prepared.abort()
            raise
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
            self._live = live
            await live.serve(lambda events, size: self._handle(live, events, size))
        finally:
            self._live = None
            live.gone()
            connection.abort()
            await self._ways.left()
        if live.departed:
            return
        broken = live.broken or Disconnected("the broker closed the connection")
        error = explain(
            live.closed or Closed(None, broken.what, True, False),
            broker=connection.peer.address,
            client_id=self._client_id,
            accepted=live.accepted,
            origin=credentials.origin or self._logins.origin,
            may_fall_back=self._version.may_guess and not broken.fix,
            version=engine.connect.version,
            fix=broken.fix,
        )
        then = self._version.refused(
            error,
            place=self._ways.place,
            once_connected=bool(self._connects),
            others=self._ways.several,
        )
        if then == "at once":  # which says nothing against the way
            return
        if isinstance(error, Refused) and then is not None and (then == "later" or self._connects):
            error.permanent = False
        raise self._ways.judge(live, error, advice=self._version.advice if then == "elsewhere" else None)

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
        self, engine: ClientEngine, identity: ClientCertificate | None, prepared: Prepared | None
    ) -> tuple[Connection, ByteStream, bytes]:
        """A connection with its first stream, and what is still to be written there first."""
        early = b"".join(output.data for output in engine.outputs() if isinstance(output, Send))
        try:
            connection, stream = await self._ways.open(prepared, identity, early)
        except BaseException:
            self._outbox.put_back(engine.withdraw())
            raise
        engine.opened(self._now())
        return connection, stream, b"" if connection.early_sent else early

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
                self._deliveries.deliver(live, event, size)
            elif isinstance(event, Connected):
                await self._accepted(live, event.connack)
            elif isinstance(event, Suback):
                live.subacked(event)
            elif isinstance(event, AuthChallenge):
                assert live.login is not None
                live.answered = True
                if event.final:
                    await self._logins.answer(live.login.finish(event.data))
                else:
                    live.engine.auth(await self._logins.answer(live.login.respond(event.data)))
            elif isinstance(event, Closed):
                live.finish(event)
        self._received += count
        return count, acknowledged

    async def _accepted(self, live: Live, connack: Connack) -> None:
        data = connack.properties.get(P.AUTH_DATA)
        if live.login is not None and data is not None:
            await self._logins.answer(live.login.finish(data))
        self._connects += 1
        self._up_since = self._now()
        self._connack = connack
        self._fatal = None
        self._failure = None
        self._version.accepted()
        live.accept(self._placement)
        live.connection.set_keepalive(live.engine.keepalive)
        if not connack.session_present:
            self._switchboard.session_lost()
        if self._placement is not None and not live.connection.multistream and not self._told_single:
            self._told_single = True
            log.info(
                "%s: %s has one stream only: everything goes on it", self._name, self._ways.peer.transport
            )
        told = "session kept" if connack.session_present else "new session"
        if live.subscribe():
            told += ", subscribing"
        elif self._switchboard.inboxes:
            told += ", not subscribing again"
        how, choice = self._ways.accepted(live, connack)
        self._set_state("connected")
        log.info("%s: %s, %s%s", self._name, how, told, choice)
        inboxes = [inbox for inbox in self._switchboard.inboxes if not inbox.closed]
        self._version.warn((one for inbox in inboxes for one in inbox.subscriptions), self._outbox.unfinished)

    def _set_state(self, state: ClientState) -> None:
        if self._state == "closed":  # leaving was cancelled, and what it waited for goes on for a moment
            return
        self._state = state
        self._since = time.time()
        self._announce()
        if self._on_state is not None:
            self._on_state(state, self._failure if state == "waiting" else None)

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
