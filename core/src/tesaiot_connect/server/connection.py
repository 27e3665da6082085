"""One client's connection: its engine, its streams and its tasks.

Owns: reading, writing and authentication of one transport connection. Rules: a stream whose
messages are not safe yet, or whose peer does not take what it is sent, is not read; what waits to
be written is bounded; what happens to one data stream happens to no other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, cast

from ..errors import ConnectorError, Disconnected, Refused
from ..message import Message
from ..mqtt.events import (
    Acknowledged,
    AuthChallenge,
    Close,
    Closed,
    ConnectRequest,
    Event,
    Received,
    Reset,
    Send,
    StreamLost,
    SubscribeRequest,
    UnsubscribeRequest,
)
from ..mqtt.packets import Connect
from ..mqtt.properties import P
from ..mqtt.reasons import R, words
from ..mqtt.server import ServerEngine
from ..protocols import (
    Authenticator,
    ByteStream,
    Challenge,
    Connection,
    Credentials,
    Peer,
    Principal,
    QuicState,
)
from .hub import Hub
from .outbox import Outbox
from .rights import Rights, owner_of
from .router import Filter
from .sessions import ClientSession
from .stream import ClientStream

log = logging.getLogger(__name__)

_CHUNK = 65536
_GOODBYE = 2.0
"""Seconds the last bytes may take before the connection is cut."""
_LINGER = 30.0
"""Seconds a data stream that the client has ended may take to end on our side."""


class ClientConnection:
    """Serves one connection until it ends: a `sessions.Link`."""

    def __init__(self, connection: Connection, hub: Hub, authenticator: Authenticator) -> None:
        self._connection = connection
        self._hub = hub
        self._authenticator = authenticator
        self._loop = asyncio.get_running_loop()
        self._engine = ServerEngine(hub.options.limits(), now=self._loop.time())
        self._streams: dict[int, ClientStream] = {}
        """Those whose tasks run: open, or about to end."""
        self._fewer = asyncio.Event()
        """Set when one of them is done."""
        self._closed = asyncio.Event()
        self.over = asyncio.Event()
        """Set when `serve` is done."""
        self._paused = 0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When the timer fires; a loop need not tell it of a timer that is due already."""
        self._leave: asyncio.TimerHandle | None = None
        self._connect: Connect | None = None
        self._challenge: Challenge | None = None
        self._rights: Rights | None = None
        self.session: ClientSession | None = None

    @property
    def peer(self) -> Peer:
        return self._connection.peer

    # --- what the hub asks for ------------------------------------------------------------

    def publish(self, stream: int, messages: Sequence[Message], keys: Sequence[int], /) -> int:
        one = self._streams.get(stream)
        if one is None or one.ending or one.size >= self._hub.options.send_buffer:
            return 0
        taken = self._engine.publish(messages, keys, stream=stream)
        if taken:
            self._flush()
        return taken

    def settle(self, token: int, reasons: Sequence[int] | None, /) -> None:
        if self._engine.accepted:
            self._engine.settle(token, reasons)
            self._flush()
        elif self.session is not None:
            self.session.state.settle_unconnected(token)

    def disconnect(self, reason_code: int, text: str = "", /) -> None:
        self._engine.disconnect(reason_code, text=text)
        self._flush()
        self._closed.set()

    def stop(self) -> None:
        """The broker goes: say so."""
        self._lose(R.SERVER_SHUTTING_DOWN, "the broker is stopping")

    def recheck(self) -> None:
        """See whether the client may stay, and forget what it was allowed. Raises what its
        principal does."""
        session, rights = self.session, self._rights
        if session is None or rights is None or session.link is not self:
            return
        refusal = rights.refusal()
        if refusal:
            log.info("client %r must leave: %s", session.client_id, refusal)
            self._lose(R.NOT_AUTHORIZED, refusal)

    # --- its life -------------------------------------------------------------------------

    async def serve(self) -> None:
        """Returns when the connection is over and its last bytes are out."""
        try:
            async with asyncio.TaskGroup() as tasks:
                main = tasks.create_task(self._run(tasks))
                await self._closed.wait()
                await self._say_goodbye()
                main.cancel()
                raise _Over
        except* _Over:
            pass
        except* Disconnected as errors:
            log.debug("connection from %s ended: %s", self.peer.address, errors.exceptions[0])
        finally:
            for timer in (self._timer, self._leave):
                if timer is not None:
                    timer.cancel()
            self._streams.clear()
            self._gone(None)
            self.over.set()

    async def _run(self, tasks: asyncio.TaskGroup) -> None:
        """Take the client's streams. That there will be no more is not the end: what the streams
        brought before is read, and the control stream tells of the end."""
        self._arm()
        most = 2 * self._hub.options.max_streams
        try:
            self._open(0, await self._connection.accept_stream(), tasks)
            for number in itertools.count(1) if self._connection.multistream else ():
                while len(self._streams) >= most:  # those that are about to end count too
                    self._fewer.clear()
                    await self._fewer.wait()
                stream = await self._connection.accept_stream()
                self._engine.stream_opened(number, now=self._loop.time())
                self._open(number, stream, tasks)
                self._flush()
        except Disconnected as error:
            log.debug("no more streams from %s: %s", self.peer.address, error)
            if not self._streams:
                self._closed.set()

    def _open(self, number: int, stream: ByteStream, tasks: asyncio.TaskGroup) -> None:
        one = self._streams[number] = ClientStream(number, stream)
        tasks.create_task(self._serve_stream(one, tasks.create_task(self._write(one))))

    async def _serve_stream(self, one: ClientStream, writing: asyncio.Task[None]) -> None:
        try:
            await self._read(one)
            await writing
        finally:
            one.forget()
            self._streams.pop(one.number, None)
            self._fewer.set()

    async def _read(self, one: ClientStream) -> None:
        engine, loop, store, number = self._engine, self._loop, self._hub.store, one.number
        while not self._closed.is_set():
            if self._must_wait(one):
                await self._holding_back(one.wait_while(lambda: self._must_wait(one)))
            if store is not None and store.behind:
                await self._holding_back(store.commit())
            try:
                data = await one.receive(_CHUNK)
            except Disconnected:
                await self._handle(engine.stream_reset(number, now=loop.time()))
                if number:
                    one.abort()
                return
            if not data:
                if number:  # a client may end its side and still wait for acknowledgements
                    await self._holding_back(one.wait_while(lambda: one.unsettled > 0 and not one.ending))
                    one.abort_after(_LINGER)
                await self._handle(engine.stream_eof(number, now=loop.time()))
                return
            await self._handle(engine.receive_data(data, stream=number, now=loop.time()))

    async def _write(self, one: ClientStream) -> None:
        try:
            await one.write(lambda: self._pump(one.number))
        except Disconnected:
            one.abort_after(_GOODBYE)  # what it brought before, DISCONNECT perhaps, is still read

    def _must_wait(self, one: ClientStream) -> bool:
        """While its messages are not safe, or the peer does not read our answers."""
        if one.ending:
            return False
        if one.number and not self._engine.accepted:
            return True  # the transport holds what comes before the client is known, within its window
        options = self._hub.options
        return one.unsettled >= options.receive_maximum or one.size > 2 * options.send_buffer

    async def _say_goodbye(self) -> None:
        """Let the last bytes go out, for a while. A data stream that is stuck costs nobody else's."""
        deadline = self._loop.time() + _GOODBYE
        try:
            async with asyncio.timeout_at(deadline):
                for one in list(self._streams.values()):
                    await one.idle.wait()
        except TimeoutError:
            control = self._streams.get(0)
            if control is not None and not control.idle.is_set():
                self._connection.abort()
                return
            for one in self._streams.values():
                if not one.idle.is_set():
                    one.abort()
        try:
            async with asyncio.timeout_at(max(deadline, self._loop.time() + _GOODBYE / 2)):
                await self._connection.aclose()
        except (TimeoutError, Disconnected):
            self._connection.abort()

    def _flush(self) -> None:
        for output in self._engine.outputs():
            if type(output) is Send:
                one = self._streams.get(output.stream)
                if one is not None:
                    one.add(output.data, fin=output.fin)
            elif type(output) is Reset:
                one = self._streams.get(output.stream)
                if one is not None:
                    one.abort(output.code)
            elif type(output) is Close:
                self._closed.set()

    def _arm(self) -> None:
        """Keep one timer for the engine; it may come early, never late."""
        due = self._engine.next_timeout()
        if due is not None and (self._timer is None or due < self._due - 0.001):
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = self._loop.call_at(due, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        now = self._loop.time()
        events = self._engine.receive_data(b"", now=now) if self._paused else []
        for event in events + self._engine.handle_timeout(now):
            if isinstance(event, Closed):
                self._gone(event)
            elif isinstance(event, Acknowledged):
                self._acknowledged(event)
        self._flush()
        self._arm()

    # --- events ---------------------------------------------------------------------------

    async def _handle(self, events: list[Event]) -> None:
        for event in events:
            kind = type(event)
            if kind is Received:
                self._received(event)  # type: ignore[arg-type]
            elif kind is Acknowledged:
                self._acknowledged(event)  # type: ignore[arg-type]
            else:
                self._flush()
                await self._control(event)
        self._flush()
        self._arm()

    async def _control(self, event: Event) -> None:
        if isinstance(event, ConnectRequest):
            self._connect = event.connect
            asked = event.connect
            credentials = Credentials(
                asked.username,
                asked.password,
                asked.properties.get(P.AUTH_METHOD),
                asked.properties.get(P.AUTH_DATA),
            )
            await self._authenticate(credentials, None)
        elif isinstance(event, AuthChallenge):
            await self._authenticate(Credentials(method=event.method, data=event.data), self._challenge)
        elif isinstance(event, SubscribeRequest):
            await self._subscribe(event)
        elif isinstance(event, UnsubscribeRequest):
            outbox = self._outbox(event.stream, create=True)
            if outbox is not None:
                codes = self._hub.unsubscribe(outbox, event.packet)
                await self._on_disk(outbox)
                self._engine.unsuback(event, codes)
        elif isinstance(event, StreamLost):
            if self.session is not None and self.session.link is self:
                self._hub.stream_lost(self.session, event.stream)
        elif isinstance(event, Closed):
            self._gone(event)

    async def _authenticate(self, credentials: Credentials, challenge: Challenge | None) -> None:
        again = self.session is not None
        try:
            if challenge is None:
                answer = await self._authenticator.begin(self.peer, credentials)
            else:
                answer = await challenge.respond(credentials.data or b"")
        except Exception as error:  # noqa: BLE001 - an authenticator of anybody's
            refused = _refused(error, self.peer)
            if again:
                self._lose(refused.reason_code, refused.what)
            else:
                self._engine.refuse(refused.reason_code, text=refused.what)
                self._flush()
            return
        if hasattr(answer, "respond"):
            self._challenge = cast("Challenge", answer)
            self._engine.challenge(credentials.method or "", self._challenge.data)
            await self._handle(self._engine.take_events())
            return
        self._challenge = None
        session = self.session
        if session is None:
            self._set_principal(answer)
            await self._accept(answer)
        elif owner_of(answer) != session.owner:
            self._lose(R.NOT_AUTHORIZED, "the session belongs to somebody else")
        elif session.link is self:
            self._set_principal(answer)
            self._hub.authorise(session, answer)
            self._engine.challenge(credentials.method or "", b"", final=True)

    def _set_principal(self, principal: Principal) -> None:
        assert self._connect is not None
        client = f"client {self._connect.client_id!r} at {self.peer.address}"
        self._rights = Rights(self._hub.options, principal, client)
        if self._leave is not None:
            self._leave.cancel()
            self._leave = None
        if principal.valid_until is not None:
            self._leave = self._loop.call_later(
                max(0.0, principal.valid_until - time.time()),
                lambda: self._lose(R.NOT_AUTHORIZED, "the credentials are not valid any more"),
            )

    async def _accept(self, principal: Principal) -> None:
        connect = self._connect
        assert connect is not None
        try:
            session, present, properties = self._hub.connect(self, connect, principal)
        except Refused as error:
            log.info("client %r at %s was refused: %s", connect.client_id, self.peer.address, error.what)
            self._engine.refuse(error.reason_code, text=error.what)
            return
        self.session = session
        if connect.properties.get(P.AUTH_METHOD):
            properties[P.AUTH_METHOD] = connect.properties[P.AUTH_METHOD]
        await self._hub.sessions.forget_state(session)
        if session.link is not self:
            return
        log.info(
            "client %r connected from %s over %s%s",
            session.client_id, self.peer.address, self.peer.transport, _how(self._connection),
        )  # fmt: skip
        self._engine.accept(
            session.state, now=self._loop.time(), session_present=present, properties=properties
        )
        self._connection.set_keepalive(self._engine.keepalive)
        self._flush()
        for one in self._streams.values():
            one.room.set()
        session.outbox.pump(self._hub.clock())
        await self._handle(self._engine.take_events())

    def _received(self, event: Received) -> None:
        session, rights = self.session, self._rights
        if session is None or rights is None:
            return
        stream, messages, ids, token = event
        messages, reasons = rights.permitted(messages)
        if reasons is not None:
            self._hub.usage.dropped["not_authorized"] += len(reasons) - len(messages)
        wait = self._hub.route(messages, session)
        if not token:
            return
        if not wait or self._hub.store is None:
            self._settle(stream, token, reasons)
            return
        one = self._streams.get(stream)
        count = len(ids) - ids.count(0)
        if one is not None:
            one.unsettled += count

        def committed() -> None:
            self._settle(stream, token, reasons)
            if one is not None:
                one.unsettled -= count
                one.room.set()

        self._hub.store.when_committed(committed)

    def _settle(self, stream: int, token: int, reasons: list[int] | None) -> None:
        assert self.session is not None
        if stream == 0:
            self.session.settle(token, reasons)
        else:
            self.settle(token, reasons)

    def _acknowledged(self, event: Acknowledged) -> None:
        outbox = self._outbox(event.stream)
        if outbox is not None:
            outbox.acknowledged(event.keys, event.refused)
            if outbox.queue:
                outbox.pump(self._hub.clock())

    async def _subscribe(self, event: SubscribeRequest) -> None:
        outbox, rights = self._outbox(event.stream, create=True), self._rights
        if outbox is None or rights is None:
            return
        codes, wanting = self._hub.subscribe(outbox, rights.principal, event.packet)
        filters = [asked.topic_filter for asked in event.packet.subscriptions]
        text = rights.refused(filters, codes) if max(codes) >= R.UNSPECIFIED_ERROR else ""
        await self._on_disk(outbox)
        self._engine.suback(event, codes, text=text)
        self._flush()
        if wanting:
            await self._holding_back(self._send_retained(event.stream, outbox, wanting))

    async def _send_retained(self, stream: int, outbox: Outbox, wanting: Sequence[Filter]) -> None:
        if self._outbox(stream) is not outbox:
            return
        for _ in self._hub.send_retained(outbox, wanting):
            await asyncio.sleep(0)
            if self._outbox(stream) is not outbox:
                return

    async def _on_disk(self, outbox: Outbox) -> None:
        """A change of a durable session's subscriptions is promised only once it is on disk."""
        if outbox.session.durable and outbox.stream == 0:
            assert self._hub.store is not None
            await self._holding_back(self._hub.store.commit())

    async def _holding_back(self, wait: Awaitable[None]) -> None:
        """While the client is not read: silence that we impose does not count against the keepalive."""
        self._paused += 1
        try:
            await wait
        finally:
            self._paused -= 1
        await self._handle(self._engine.receive_data(b"", now=self._loop.time()))

    def _outbox(self, stream: int, *, create: bool = False) -> Outbox | None:
        session = self.session
        if session is None or session.link is not self:
            return None
        if create and stream not in session.outboxes:
            one = self._streams.get(stream)
            if one is None or one.ending:
                return None
            session.outboxes[stream] = Outbox(session, stream, self._hub.usage)
        return session.outboxes.get(stream)

    def _pump(self, stream: int) -> None:
        outbox = self._outbox(stream)
        if outbox is not None and outbox.queue:
            outbox.pump(self._hub.clock())

    def _lose(self, reason_code: int, text: str) -> None:
        """End the connection from our side; the will is published."""
        self._gone(None)
        self.disconnect(reason_code, text)

    def _gone(self, event: Closed | None) -> None:
        """Tell the hub, once, that the client is away."""
        session = self.session
        if session is not None and session.link is self:
            reason = "" if event is None else event.text or words(event.reason_code or 0)
            log.info("client %r disconnected: %s", session.client_id, reason or "connection lost")
            properties: Mapping[P, Any] = event.properties if event is not None and event.by_peer else {}
            self._hub.disconnected(
                session,
                self,
                orderly=event is not None and event.orderly,
                expiry=properties.get(P.SESSION_EXPIRY),
            )
        if event is not None:
            self._closed.set()


def _refused(error: Exception, peer: Peer) -> Refused:
    """What a client is told that could not be authenticated; the log is told more."""
    if isinstance(error, Refused):
        log.info("client at %s was refused: %s", peer.address, error.what)
        return error
    known = isinstance(error, ConnectorError)
    shown = error if known else type(error).__name__
    log.error("client at %s cannot be authenticated: %s", peer.address, shown, exc_info=not known)
    return Refused("it cannot be decided now who this is", reason_code=R.SERVER_UNAVAILABLE)


def _how(connection: Connection) -> str:
    """What is worth telling about a connection's handshake."""
    quic = connection.status().quic
    if quic is None:
        return ""
    # before the handshake is complete only early data gets here (RFC 9001 section 5.7)
    if quic.early_data_accepted or quic.state in (QuicState.INITIAL, QuicState.HANDSHAKE):
        return ", resumed with 0-RTT"
    return ", resumed" if quic.resumed else ""


class _Over(Exception):
    """Ends the task group."""
