"""WebSocket between a transport of asyncio and a byte stream, as TLS is: a layer without a task.

Owns: the state of one connection, its pings, and its closing handshake. Rule: to the `AsyncioStream` on top
this is the transport, so backpressure is that of TCP: `send` waits while the transport's buffer is full, and
while nobody receives, what one read of the socket brought waits, then up to `AHEAD` bytes more and one read;
from then on the socket is not read. Until then pings are answered, also of a reader that takes its time.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any, cast

from tesaiot_connect import (
    AsyncioStream,
    CloseReason,
    Disconnected,
    PathLost,
    State,
    Unsupported,
    explain_tls,
)

from .frames import Frames
from .upgrade import Opening
from .words import CUT, CUT_FIX, LOST_FIX, ORDERLY, closed

AHEAD = 64 * 1024
"""Bytes of payload beyond which a socket that nobody receives from is not read any more."""
_AHEAD_AFTER = 0.1
"""Seconds without a receive until the socket is read ahead, for the sake of pings and the peer's close."""
_LINGER = 1.0
"""Seconds for the peer's close frame, or its end of the connection, once everything was written."""
_CLOSE = 5.0
"""Seconds for a peer to take what was written before the connection is cut off."""
_MOST_PONGS = 64 * 1024
"""Bytes of answers to pings that a peer which reads nothing may cause; beyond, it is cut off."""


class WebSocket(asyncio.Protocol):
    """`stream` is the bytes' two flows; `opened` says when the upgrade is done, or why it failed.

    `interval` is the silence before a ping, 0 for none; `timeout` how long its pong may take. `silent` is
    what it means that the peer left before it sent a byte.
    """

    def __init__(
        self,
        opening: Opening,
        *,
        limit: int,
        interval: float,
        timeout: float,
        silent: Disconnected | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._opening: Opening | None = opening
        self._refused = False
        self._frames = Frames(opening.library, limit)
        self._interval, self._timeout = interval, timeout
        self._silent = silent
        self._below: asyncio.Transport | None = None
        self._closing = False
        self._ours = False  # it was we who ended it
        self._paused = False  # by the stream: nobody receives
        self._stopped = False  # the socket is not read
        self._held: list[bytes] = []
        self._held_size = 0
        self._stuck: int | None = None  # bytes of pongs while the peer reads nothing; None: it reads
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._asked: dict[bytes, tuple[float, asyncio.Future[None] | None]] = {}
        self._pings = 0
        self._heard = False  # since the last ping
        self._verdict: Disconnected | None = None
        self._reason: CloseReason | None = None
        self.stream = AsyncioStream(explain=explain_tls, half_close=False)
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.farewell: Callable[[], tuple[int, str]] = lambda: (1000, "")
        """Code and reason of our close frame."""
        self.tls_failed = False
        """It was TLS that ended it, during the upgrade."""
        self.rtt: float | None = None
        self.last_received = self._loop.time()

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._below = cast("asyncio.Transport", transport)
        self.stream.connection_made(cast("asyncio.Transport", _Upper(self, self._below)))
        if self._opening is not None:
            self._put(self._opening.hello())

    def data_received(self, data: bytes) -> None:
        self.last_received = self._loop.time()
        self._heard = True
        if self._opening is not None:
            data = b"" if self._refused else self._open(self._opening, data)
        if not data or self._frames.over():
            return
        pieces = self._frames.feed(data)
        if answers := self._frames.taken():
            self._answer(answers)
        if self._frames.pongs:
            self._answered()
        if pieces and not self._closing:
            if self._paused:
                self._hold(pieces)
            else:
                for piece in pieces:
                    self.stream.data_received(piece)
        if self._frames.over():
            self._end()

    def eof_received(self) -> bool:
        if self._opening is not None and not self._refused:
            try:
                self._opening.eof()
            except Exception as error:  # noqa: BLE001 - also of the library
                self._refuse(error)
        return False

    def pause_writing(self) -> None:
        self._stuck = 0
        self.stream.pause_writing()

    def resume_writing(self) -> None:
        self._stuck = None
        self.stream.resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._settle(exc)
        told = self._verdict
        for _, waiting in self._asked.values():
            if waiting is not None and not waiting.done():
                waiting.set_exception(told or Disconnected("the connection was closed"))
        self._asked.clear()
        self._refuse(told or Disconnected("the connection ended during the upgrade to WebSocket"))
        self._release()
        self.stream.connection_lost(told)

    # --- the opening handshake

    def _open(self, opening: Opening, data: bytes) -> bytes:
        """Gives what came behind it, once it is done."""
        try:
            rest = opening.feed(data)
        except Exception as error:  # noqa: BLE001 - also of the library, which may not have thought of it
            self._refuse(error)
            self._put(opening.reply())
            self._linger(ended=True)
            return b""
        self._put(opening.reply())
        if rest is None:
            return b""
        self._opening = None
        if not self.opened.done():
            self.opened.set_result(None)
        if self._interval > 0:
            self._later("silence", self._interval, self._silence)
        return rest

    def _refuse(self, error: Exception) -> None:
        if not self.opened.done():
            self._refused = True
            self.opened.set_exception(error)
            self.opened.exception()  # nobody may be waiting any more

    # --- for the stream on top, through `_Upper`

    def write(self, data: bytes) -> None:
        if self._frames.open:
            self._frames.binary(data)
            self._put(self._frames.taken())

    def pause_reading(self) -> None:
        self._paused = True
        self._stop()
        if "ahead" not in self._timers:  # one at a time: this is called for nearly every read
            self._later("ahead", _AHEAD_AFTER, self._read_ahead)

    def resume_reading(self) -> None:
        self._paused = False
        self._release()
        if not self._paused:
            self._go()

    def close(self) -> None:
        """The closing handshake (RFC 6455 section 7.1.2), then the end of the connection."""
        if self._closing:
            return
        self._closing = self._ours = True
        if self._opening is None and self._frames.open:
            self._frames.close(*self.farewell())
            self._put(self._frames.taken())
            self._linger()
        elif self._below is not None:
            self._shut(self._below)

    def abort(self) -> None:
        self._ours = self._ours or not self._closing
        self._closing = True
        if self._below is not None:
            self._below.abort()

    # --- reading, and not reading

    def _read_ahead(self) -> None:
        del self._timers["ahead"]
        if self._held_size < AHEAD:
            self._go()

    def _hold(self, pieces: list[bytes]) -> None:
        self._held += pieces
        self._held_size += sum(map(len, pieces))
        if self._held_size >= AHEAD:
            self._stop()

    def _release(self) -> None:
        held, self._held, self._held_size = self._held, [], 0
        for piece in held:
            self.stream.data_received(piece)

    def _stop(self) -> None:
        if not self._stopped and self._below is not None:
            self._stopped = True
            self._below.pause_reading()

    def _go(self) -> None:
        if self._stopped and self._below is not None:
            self._stopped = False
            self._below.resume_reading()

    # --- writing, and the end of it

    def _put(self, data: bytes) -> None:
        if self._below is not None and data:
            self._below.write(data)

    def _answer(self, data: bytes) -> None:
        """Pongs and close frames: they wait for nobody, so they are bounded."""
        if self._stuck is not None:
            self._stuck += len(data)
            if self._stuck > _MOST_PONGS:
                self._cut(Disconnected("the peer sends pings and reads no answers", fix="see its software"))
                return
        self._put(data)

    def _end(self) -> None:
        """The peer's close frame came, or it broke the protocol; our answer is written."""
        ours, self._closing = self._closing, True
        if not ours:
            self._settle(None)
        if self._frames.violation:
            self._linger()  # closing a socket with unread bytes in it would take our close frame back
        elif self._below is not None:
            self._shut(self._below)

    def _linger(self, *, ended: bool = False) -> None:
        """Read on, without looking, until the peer has left or had its time. `ended`: all is said."""
        self._go()
        if ended and self._below is not None and self._below.can_write_eof():
            self._below.write_eof()
        self._later("linger", _LINGER, self._lingered, self._loop.time())

    def _lingered(self, since: float) -> None:
        below = self._below
        if below is None:
            return
        if below.get_write_buffer_size() and self._loop.time() < since + _CLOSE:
            self._later("linger", _LINGER, self._lingered, since)
        else:
            self._shut(below)

    def _shut(self, below: asyncio.Transport) -> None:
        below.close()
        self._later("cut", _CLOSE, below.abort)

    def _cut(self, error: Disconnected) -> None:
        self._verdict = error
        self._reason = CloseReason(1006, error.what)
        if self._below is not None:
            self._below.abort()

    def _later(self, name: str, seconds: float, call: Callable[..., Any], *arguments: Any) -> None:
        if (running := self._timers.get(name)) is not None:
            running.cancel()
        self._timers[name] = self._loop.call_later(seconds, call, *arguments)

    # --- pings

    def _silence(self) -> None:
        """Nothing came for a while: ask, unless it is we who do not read."""
        if not self._frames.open:
            return
        left = self._interval - (self._loop.time() - self.last_received)
        if left > 0 or self._stopped:
            self._later("silence", left if left > 0 else self._interval, self._silence)
            return
        self._heard = False
        self._ask(None)
        self._later("silence", self._timeout, self._unanswered)

    def _unanswered(self) -> None:
        if self._heard or self._stopped:  # whatever came shows that it lives
            self._silence()
            return
        seconds = self._interval + self._timeout
        what = f"the peer sent nothing for {seconds:g} s, not even an answer to a ping"
        self._cut(PathLost(what, fix=LOST_FIX))

    def _ask(self, waiting: asyncio.Future[None] | None) -> bytes:
        self._pings += 1
        payload = self._pings.to_bytes(8, "big")
        self._asked = {one: asked for one, asked in self._asked.items() if asked[1] is not None}
        self._asked[payload] = (time.monotonic(), waiting)
        self._frames.ping(payload)
        self._put(self._frames.taken())
        return payload

    def _answered(self) -> None:
        now = time.monotonic()  # uvloop's own clock counts milliseconds
        for payload in self._frames.pongs:
            if payload not in self._asked:
                continue
            asked, waiting = self._asked.pop(payload)
            self.rtt = now - asked
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
            if self._interval > 0:  # from here on it is silent anew, however long an answer may take
                self._later("silence", self._interval, self._silence)
        self._frames.pongs.clear()

    async def probe(self) -> None:
        """A ping and its pong. Raises Disconnected, Unsupported."""
        if self.stream.state is not State.OPEN or not self._frames.open:
            reason = self._reason
            raise Disconnected(reason.text if reason is not None else "the connection is closing")
        waiting = self._loop.create_future()
        payload = self._ask(waiting)
        try:
            async with asyncio.timeout(self._timeout):
                await waiting
        except TimeoutError as error:
            if self._stopped:
                raise Unsupported(
                    "the path cannot be probed while received bytes wait to be read", fix="receive them first"
                ) from error
            raise PathLost(
                f"the peer did not answer a ping within {self._timeout:g} s", fix=LOST_FIX
            ) from error
        finally:
            self._asked.pop(payload, None)

    # --- how it ended

    def _settle(self, exc: BaseException | None) -> None:
        """Decide on the words for the end, once."""
        if self._reason is not None:
            return
        frames = self._frames
        theirs = frames.close_received
        if self._opening is not None:
            told = explain_tls(exc) if exc is not None else None
            if not self._heard and (exc is None or isinstance(exc, ConnectionError)):
                told = self._silent or told
            self.tls_failed = isinstance(exc, ssl.SSLError) or (told is not None and told is self._silent)
            self._verdict = told
            self._reason = CloseReason(
                1006, told.what if told else "it ended during the upgrade", by_peer=True
            )
        elif frames.violation and not self._ours:
            self._verdict = _violated(frames.violation)
            sent = frames.close_sent
            self._reason = CloseReason(int(sent.code) if sent else 1002, self._verdict.what)
        elif self._ours:
            self._reason = CloseReason(0, "closed on this side")
        elif theirs is not None and theirs.code in ORDERLY:
            self._reason = CloseReason(0, "closed by the peer", by_peer=True)
        elif theirs is not None:
            self._verdict = closed(int(theirs.code), theirs.reason)
            self._reason = CloseReason(int(theirs.code), self._verdict.what, by_peer=True)
        else:
            self._verdict = explain_tls(exc) if exc is not None else Disconnected(CUT, fix=CUT_FIX)
            self._reason = CloseReason(1006, self._verdict.what, by_peer=True)

    @property
    def close_reason(self) -> CloseReason | None:
        """None while the connection is there."""
        return self._reason if self.stream.state is State.CLOSED else None

    # --- for who put it on the socket

    @property
    def error(self) -> Disconnected | None:
        return self._verdict or self.stream.error

    async def wait_gone(self) -> None:
        await self.stream.wait_gone()


def _violated(what: str) -> Disconnected:
    if "max_message_size" in what:
        return Disconnected(what, fix="raise it: a whole MQTT packet may come as one message")
    return Disconnected(
        f"the peer broke the WebSocket protocol: {what}",
        fix="see its software; a device in between may change the bytes",
    )


class _Upper:
    """What the stream takes for its transport."""

    def __init__(self, socket: WebSocket, below: asyncio.Transport) -> None:
        self.write = socket.write
        self.close = socket.close
        self.abort = socket.abort
        self.pause_reading = socket.pause_reading
        self.resume_reading = socket.resume_reading
        self.set_write_buffer_limits = below.set_write_buffer_limits
        self.get_write_buffer_size = below.get_write_buffer_size
        self.get_extra_info = below.get_extra_info
        self.is_closing = below.is_closing

    @staticmethod
    def can_write_eof() -> bool:
        return False
