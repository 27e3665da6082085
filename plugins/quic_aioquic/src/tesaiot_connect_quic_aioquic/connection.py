"""A QUIC connection on the event loop: the contract's `Connection`, client or server.

Owns: the streams, the timer, and the words for the end. Rules: everything that happens in one
turn of the loop leaves in one flush; the timer may come early, never late; the endpoint below
only moves datagrams.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import operator
from collections.abc import Sequence
from typing import Any

from aioquic.quic import events
from aioquic.quic.packet import QuicErrorCode, QuicFrameType

from tesaiot_connect import CloseReason, ConnectionStatus, Disconnected, PathLost, Peer, Unsupported

from .endpoint import NAME, Budget, Endpoint, Tuning, address_text
from .explain import IDLE_TIMEOUT, explain_close, forgotten
from .figures import Figures
from .liveness import Liveness
from .pacer import TICK
from .quic import Quic
from .stream import CLOSE_TIMEOUT, Incoming, QuicStream
from .udp import Datagram

log = logging.getLogger(__name__)

_TIGHT = 16 * 1024
"""Bytes a stream may leave unacknowledged whatever its siblings and other connections hold."""
_BAD_CERTIFICATE = 42
"""The TLS alert of that name."""
_SPREAD = 4
"""Times the watermark of a stream that all streams of a connection may hold together."""


class QuicConnection:
    """A `Connection` with many streams, which the client opens."""

    multistream = True

    def __init__(
        self, quic: Quic, endpoint: Endpoint, tuning: Tuning, budget: Budget, *, accepted: bool
    ) -> None:
        self.quic = quic
        self.tuning = tuning
        self.early_sent = False
        self.local: Any = None
        """Which of our addresses the peer talks to, where the socket has several."""
        self.handshake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the handshake is complete; fails with the connection."""
        self.closed_here = False
        """`aclose` or `abort` was called."""
        self.timed_out = False
        """The handshake was given up."""
        self._endpoint = endpoint
        self._budget = budget
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._streams: dict[int, QuicStream] = {}
        self._incoming = Incoming()
        self._control: QuicStream | None = None
        self._waiting: set[QuicStream] = set()
        """Whose senders wait for room."""
        self._flush_handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self.figures = Figures(self._loop.time())
        self._liveness = Liveness(quic, self.figures, tuning, client=not accepted, clock=self._loop.time)
        self._held = 0
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._ping_id = 0
        self._told_ready = False
        self._end: CloseReason | None = None
        self._error: Disconnected | None = None
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._sent: asyncio.Event = asyncio.Event()
        """Set after each datagram that came: something may have been acknowledged."""
        self._address: Any = quic.address

    # --- the contract -------------------------------------------------------------------------

    @property
    def peer(self) -> Peer:
        return Peer(
            address_text(self.quic.address),
            NAME,
            secure=True,
            alpn=self.quic.alpn,
            certificate=self.quic.peer_certificate,
            tls_version="TLSv1.3",
        )

    async def open_stream(self, *, priority: int = 0) -> QuicStream:
        """Waits while the peer allows no more streams."""
        if self._accepted:
            raise Unsupported("in MQTT over QUIC only clients open streams", fix="use accept_stream here")
        stream, self._control = self._control, None
        while stream is None and not self.over and not self.quic.may_open_stream:
            self._sent.clear()
            await self._sent.wait()
        if self.over:
            raise self.gone()
        stream = stream or self._new_stream()
        self.quic.set_priority(stream.stream_id, priority)
        return stream

    def _new_stream(self) -> QuicStream:
        stream_id = self.quic.next_stream_id()
        stream = self._streams[stream_id] = QuicStream(self, stream_id)
        return stream

    async def accept_stream(self) -> QuicStream:
        stream = await self._incoming.take()
        if stream is None:
            raise self.gone()
        if self.quic.stream_accepted():
            self.schedule()
        return stream

    def status(self) -> ConnectionStatus:
        return self.figures.status(self.quic, self._loop.time(), self._end)

    def set_keepalive(self, seconds: float) -> None:
        """The server's idle timeout follows it: 1.5 times, as MQTT has it (MQTT 5 section 3.1.2.10).

        A client keeps the path open with PINGs of its own, see `keepalive` of the endpoint.
        """
        if self.over or not self._accepted:
            return
        idle = self.tuning.idle_timeout if seconds <= 0 else 1.5 * seconds + 1
        self.quic.set_idle(idle, self._loop.time())
        self.arm()

    async def probe(self) -> None:
        if self.over:
            raise self.gone()
        answer = self._loop.create_future()
        ping = self.ping()
        self._pings[ping] = answer
        try:
            await answer
        finally:
            del self._pings[ping]
        if self.over:
            raise self.gone()

    async def migrate(self) -> None:
        """A new socket, a new connection id, the path validated; streams notice nothing."""
        if self._accepted:
            raise Unsupported("only the client of a QUIC connection moves", fix="ask the client")
        if self.over:
            raise self.gone()
        if self.quic.stationary:
            raise Unsupported("the broker does not allow its clients to move", fix="reconnect")
        if not self.quic.can_migrate():
            raise Unsupported("the broker gave no spare connection id to move with", fix="reconnect")
        await self._endpoint.migrate(self)
        await self.probe()

    def moved(self) -> None:
        """The endpoint has a new socket: go on from there."""
        self.figures.migrations += 1
        self.quic.change_connection_id()
        self._liveness.moved(self._loop.time())
        self.ping()
        log.info("%s: moved to another local address", self.tuning.place)

    def ping(self) -> int:
        """Something that the peer must answer. Gives its number."""
        self._ping_id += 1
        self.quic.send_ping(self._ping_id)
        self.schedule()
        return self._ping_id

    async def wait_closed(self) -> CloseReason:
        await asyncio.shield(self._gone)
        assert self._end is not None
        return self._end

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        """What was sent is acknowledged first, for some seconds: a closing QUIC connection forgets it."""
        self.closed_here = True
        if self.over:
            return
        for stream in self._streams.values():
            if stream.sends:
                stream._end()
        try:
            await self.wait_sent(list(self._streams), CLOSE_TIMEOUT)
        finally:
            self._close(code, reason)

    def give_up(self, error: Disconnected) -> None:
        """Before the handshake is complete. A server is told, for it may have taken early data; a client that
        has not proved its address is not."""
        if self._accepted:
            self.lost(error)
        elif not self.over:
            self._error = error
            self._close(QuicErrorCode.NO_ERROR, error.what)

    def abort(self, code: int = 0) -> None:
        self.closed_here = True
        self._close(code, "")

    def _close(self, code: int, reason: str) -> None:
        if self.over:
            return
        self.quic.close(code, None, reason[:200])
        self._finish(CloseReason(code, reason or "closed on this side"))

    # --- for its streams ----------------------------------------------------------------------

    @property
    def over(self) -> bool:
        return self._end is not None

    def gone(self) -> Disconnected:
        """Why it is over, as an error to raise."""
        error = self._error
        if error is not None:
            return type(error)(error.what, fix=error.fix)
        end = self._end
        if end is None or not end.by_peer:
            return Disconnected("the connection was closed on this side")
        return Disconnected("the connection was closed by the peer")

    def room(self, stream_id: int) -> int:
        """Bytes that may be written to a stream now."""
        most = self.tuning.send_buffer
        if self._budget.tight:
            most = min(most, _TIGHT)
        held = self.quic.buffered(stream_id)
        if len(self._streams) == 1:
            return most - held
        together = sum(self.quic.buffered(one) for one in self._streams)
        return max(min(most - held, _SPREAD * most - together), min(most, _TIGHT) - held)

    def waits(self, stream: QuicStream) -> None:
        self._waiting.add(stream)

    def write(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.quic.send_stream_data(stream_id, data, end)
        self._liveness.active()
        self.schedule()

    def consumed(self, stream_id: int, count: int) -> None:
        if self._end is None and self.quic.consumed(stream_id, count):
            self.schedule()

    def stop(self, stream_id: int) -> None:
        if self.quic.receives(stream_id):
            self.quic.stop_stream(stream_id, 0)
            self.schedule()

    def drop(self, stream_id: int, code: int) -> None:
        self.figures.reset(code)
        self.quic.drop(stream_id, code)
        self.release(stream_id)
        self.schedule()

    def release(self, stream_id: int) -> None:
        """The stream's owner is done with it."""
        self._streams.pop(stream_id, None)
        self.quic.forget(stream_id)

    async def wait_sent(self, streams: Sequence[int], seconds: float) -> None:
        """Returns when the peer has acknowledged everything, or time is up, or it is over."""
        try:
            async with asyncio.timeout(seconds):
                while not self.over and not all(self.quic.sent_all(one) for one in streams):
                    self._sent.clear()
                    await self._sent.wait()
        except TimeoutError:
            pass

    # --- for the endpoint ---------------------------------------------------------------------

    def send_early(self, data: bytes) -> None:
        """Client: the first bytes of the control stream, before the first flush."""
        self._control = self._new_stream()
        self.quic.send_stream_data(self._control.stream_id, data)
        self._liveness.active()
        self.early_sent = True

    def receive(self, datagrams: Sequence[Datagram], now: float) -> None:
        """Takes what came; the flush follows in this turn of the loop, after those it wakes."""
        if self.over:
            return
        quic = self.quic
        before = quic.packets_received
        for datagram in datagrams:
            self.figures.bytes_received += len(datagram.data)
            quic.take_datagram(datagram.data, datagram.address, now)
        if quic.packets_received == before:
            if not self._accepted and any(quic.is_stateless_reset(one.data) for one in datagrams):
                self.lost(forgotten(), by_peer=True)
                return
        else:
            self.figures.last_received = now
            self._liveness.heard(now)
            self.local = datagrams[-1].local
        self.handle()
        if self._end is not None:
            return
        if self._accepted and quic.address != self._address:
            if self._address is not None:
                self.figures.migrations += 1
                old, new = address_text(self._address), address_text(quic.address)
                log.info("a client moved from %s to %s", old, new)
            self._address = quic.address
        self._sent.set()
        for stream in tuple(self._waiting):
            if self.room(stream.stream_id) > 0:
                self._waiting.discard(stream)
                stream.wake_senders()
        self.schedule()

    def handle(self) -> None:
        """Acts on what aioquic has to say."""
        quic = self.quic
        for event in quic.take_events():
            match event:
                case events.StreamDataReceived(data=data, end_stream=end, stream_id=stream_id):
                    self._liveness.active()
                    stream = self._streams.get(stream_id) or self._opened(stream_id)
                    if stream is not None:
                        stream.fed(data, end)
                    elif data:
                        quic.discarded(len(data))
                case events.StreamReset(error_code=code, stream_id=stream_id):
                    self.figures.reset(code)
                    quic.was_reset(stream_id)
                    stream = self._streams.get(stream_id) or self._opened(stream_id)
                    if stream is not None:
                        stream.was_reset(code)
                case events.StopSendingReceived(error_code=code, stream_id=stream_id):
                    self.figures.reset(code)
                    quic.was_stopped(stream_id)
                    stream = self._streams.get(stream_id) or self._opened(stream_id)
                    if stream is not None:
                        stream.was_stopped(code)
                case events.PingAcknowledged(uid=uid):
                    answer = self._pings.get(uid)
                    if answer is not None and not answer.done():
                        answer.set_result(None)
                case events.ConnectionIdIssued(connection_id=connection_id):
                    self._endpoint.issued(self, connection_id)
                case events.ConnectionIdRetired(connection_id=connection_id):
                    self._endpoint.retired(self, connection_id)
                case events.HandshakeCompleted():
                    self._handshaken()
        if quic.ending is not None:
            self._ended()

    def _handshaken(self) -> None:
        self.quic.handshake_completed()
        self.figures.handshake_time = self._loop.time() - self.figures.born
        self._endpoint.handshaken(self)
        if self.over:
            return
        if not self.handshake.done():
            self.handshake.set_result(None)
        self._tell_ready()

    def _opened(self, stream_id: int) -> QuicStream | None:
        """The peer's stream, new to us; None for one that we are done with."""
        if not self._accepted or stream_id & 3 or stream_id < 4 * self.quic.streams_total:
            return None
        if self.quic.early_data_accepted:
            self._tell_ready()
        found = None
        while self.quic.streams_total * 4 <= stream_id:
            one = self.quic.streams_total * 4
            self.quic.streams_total += 1
            found = self._streams[one] = QuicStream(self, one)
            self._incoming.put(found)
        return found

    def _tell_ready(self) -> None:
        if not self._told_ready:
            self._told_ready = True
            self._endpoint.ready(self)

    def schedule(self) -> None:
        """A flush, once those have run who were woken before."""
        if self._flush_handle is None and not self.over:
            self._flush_handle = self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Sends what may be sent now and sets the timer."""
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        if self._endpoint.congested(self):
            return
        quic, now = self.quic, self._loop.time()
        quic.renew_keys()
        try:
            found, more = quic.make_datagrams(now)
        except Exception as error:
            log.exception("%s: the connection failed", self.tuning.place)
            quic.lost(QuicErrorCode.INTERNAL_ERROR, f"internal error: {error!r}")
            self._ended()
            return
        self._transmit(found)
        self.handle()  # the peer may use new connection ids as soon as they went out
        if self.over:
            return
        self._account(now)
        if quic.waiting:
            self._liveness.sent(now, more=bool(found))
        if more:
            self.schedule()
        else:
            self.arm()

    def _transmit(self, found: Sequence[tuple[bytes, Any]]) -> None:
        for address, run in itertools.groupby(found, operator.itemgetter(1)):
            datagrams = [data for data, _ in run]
            self.figures.bytes_sent += sum(map(len, datagrams))
            self._endpoint.transmit(self, datagrams, address)

    def _account(self, now: float) -> None:
        """Keeps the budget, and the time that the peer's flow control costs."""
        quic, held = self.quic, self.quic.held
        self._budget.used += held - self._held
        self._held = held
        self.figures.blocked(bool(self._waiting) and quic.blocked, now)

    def arm(self) -> None:
        """One timer for everything that is due."""
        if self.over:
            return
        due = self.quic.due()
        if not self.handshake.done():
            due = min(due, self.figures.born + self.tuning.handshake_timeout)
        else:
            due = min(due, self._liveness.due())
        if due == math.inf:
            return
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = max(due, self._loop.time() + TICK)
        self._timer = self._loop.call_at(self._due, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if self.over:
            return
        quic, now = self.quic, self._loop.time()
        if not self.handshake.done():
            if now >= self.figures.born + self.tuning.handshake_timeout:
                self.timed_out = True
                self.give_up(Disconnected("the handshake took too long"))
                return
        else:
            liveness = self._liveness
            if liveness.silent(now):
                self.lost(self._endpoint.silence(self, now - liveness.since))
                return
            if liveness.look(now):
                self._endpoint.probing(self)
            if liveness.ping(now):
                self.ping()
        if now >= quic.due():
            before = quic.probe_timeouts
            quic.handle_timer(now)
            self.handle()
            if quic.probe_timeouts != before and self.handshake.done() and not self.over:
                self._endpoint.probing(self)
        if self._end is None:
            self.flush()

    def refuse(self, what: str, fix: str) -> None:
        """The peer's certificate will not do, for a reason that aioquic does not look at."""
        self._error = Disconnected(what, fix=fix)
        self.quic.close(QuicErrorCode.CRYPTO_ERROR + _BAD_CERTIFICATE, QuicFrameType.CRYPTO, what)
        self._finish(CloseReason(QuicErrorCode.CRYPTO_ERROR + _BAD_CERTIFICATE, what))

    # --- the end ------------------------------------------------------------------------------

    def lost(self, error: Disconnected, *, by_peer: bool = False) -> None:
        """It is over without a word to the peer."""
        if self.over:
            return
        self._error = error
        self.quic.lost(QuicErrorCode.NO_ERROR, error.what)
        self._finish(CloseReason(0, error.what, by_peer=by_peer))

    def _ended(self) -> None:
        """aioquic says that it is over."""
        if self.over:
            return
        ending = self.quic.ending
        assert ending is not None
        by_peer = self.quic.closed_by_peer
        what, fix = explain_close(
            ending.error_code,
            frame_type=ending.frame_type,
            reason=ending.reason_phrase,
            by_peer=by_peer,
            handshake_done=self.handshake.done(),
        )
        if ending.reason_phrase == IDLE_TIMEOUT and not by_peer and self.handshake.done():
            self._error = PathLost(what, fix=fix)
        elif ending.frame_type is not None or ending.error_code:
            place = "" if self.handshake.done() else f"{self.tuning.place}: "  # later, others name it
            self._error = Disconnected(f"{place}{what}", fix=fix)
        self._finish(CloseReason(ending.error_code, what, by_peer=by_peer))

    def _finish(self, reason: CloseReason) -> None:
        """From here on the peer gets nothing but what `quic` has to say last."""
        self._end = reason
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            self._transmit(self.quic.make_datagrams(self._loop.time())[0])
        except Exception as error:  # noqa: BLE001 - it is over in any case
            log.debug("%s: the last packet could not be made: %r", self.tuning.place, error)
        self.figures.finish(self.quic, self._loop.time())
        self._budget.used -= self._held
        self._held = 0
        if not self.handshake.done():
            self.handshake.set_exception(self.gone())
            self.handshake.exception()  # somebody may not be waiting for it
        for answer in self._pings.values():
            if not answer.done():
                answer.set_result(None)
        for stream in self._streams.values():
            stream.wake()
        self._incoming.end()
        self._sent.set()
        self._gone.set_result(None)
        self._endpoint.released(self)
