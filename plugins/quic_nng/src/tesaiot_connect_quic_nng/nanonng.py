"""The client's bytes and a QUIC stream of NanoNNG: the loop between them, in a worker process.

Owns: what waits in it, and why it ends. Rule: nothing waits without a bound, and whatever ends it is told as
one last word.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections import deque

from .control import Ended, Failed, Job, Secured
from .library import Library
from .nng_stream import SYMBOLS, NngError, Stream
from .packets import Watchdog
from .secret_file import secret_file
from .watches import Company
from .wire import Interest, Orders, say

__all__ = ["SYMBOLS", "serve"]

_PIECE = 65536
_WAITING = 1024 * 1024
"""Bytes for the client from which on no more are asked for."""
_LINGER = 0.5
"""Seconds the server has to take what was sent, once the client has closed: the library does not tell whether
it did, and closing discards what it did not."""
_CLOSE = 0.3
_PART = 0.02
"""Seconds for the library's thread to send its farewell: it reports the end before it does."""
_NUDGE, _NUDGE_BETWEEN = 0.02, 0.2
"""Seconds without bytes after which the library may be waiting for us: in the middle of a packet, and between
two, where it seldom is. It seldom does harm: when something comes within the microsecond it takes."""

_GONE = Ended(what="the process that started this one is gone")
_AGAIN = (
    "NanoNNG as it is released stops receiving now and then; the session goes on with the next connection"
)


def serve(library: Library, job: Job, data: socket.socket, orders: socket.socket) -> Ended | Failed:
    """Dials, says `Secured`, and relays until the end, which it gives. Answers every `Ping` meanwhile."""
    if bool(job.ca_file and job.certificate) is not job.verify:
        return _UNVERIFIED
    with contextlib.closing(_Wire(data, orders, Company(job.ack_timeout))) as wire:
        stream = Stream(library, wire.wake)
        with secret_file(job.certificate) as certificate, secret_file(job.key) as key:
            try:
                stream.dial(job, certificate=certificate, key=key)
            except NngError as error:
                return Failed(
                    what=f"NanoNNG cannot dial: {error}", fix="see what it prints, with --log-level debug"
                )
        while not stream.secured and stream.error is None:
            if not wire.wait():
                return _GONE
            stream.look()
        if stream.error is not None:
            return _failed(job, stream.error)
        say(orders, Secured())
        ended = _Relay(stream, Watchdog(job.watchdog), wire, job).run()
        stream.close()
        end = time.monotonic() + _CLOSE
        while stream.error is None and time.monotonic() < end and wire.wait(end - time.monotonic()):
            stream.look()
        time.sleep(_PART)
        return ended


_UNVERIFIED = Failed(
    what="NanoNNG verifies a server only with a CA file and a client certificate, and then always",
    fix="set ca_file in the tls table, and verify to its default where there is a client certificate",
    stage="secure",
    unsupported=True,
)


def _failed(job: Job, error: NngError) -> Failed:
    verified = f", and that its certificate is of an authority in {job.ca_file}" if job.verify else ""
    return Failed(
        what=f"no QUIC handshake with {job.url.partition('://')[2]}: nothing answers there, or one of the "
        f"two sides refused it (NanoNNG says: {error})",
        fix="check that a broker speaks MQTT over QUIC there (UDP, ALPN mqtt), that no firewall drops UDP"
        + verified,
        stage="reach",
    )


class _Wire:
    """The sockets of a worker, and how a thread of the library wakes the loop that waits for them."""

    def __init__(self, data: socket.socket, orders: socket.socket, company: Company) -> None:
        self.data = data
        self._orders = Orders(orders, company)
        self._company = company
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(orders, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self.want = Interest(self._selector, data).want

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full: it wakes all the same
            os.write(self._waker, b"\0")

    def wait(self, timeout: float | None = None) -> bool:
        """Returns when there is something to do, or after `timeout` seconds. False: the parent has gone."""
        due = self._company.next_timeout()
        left = None if due is None else due - time.monotonic()
        least = min((one for one in (timeout, left) if one is not None), default=None)
        for found, _ in self._selector.select(None if least is None else max(least, 0)):
            if found.fileobj is self._orders.socket and not self._orders.hear():
                return False
            if found.fd == self._woken:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
        return not self._company.gone(time.monotonic())

    def close(self) -> None:
        """The pipe stays: the library may still write to it."""
        self._selector.close()


class _Relay:
    def __init__(self, stream: Stream, watchdog: Watchdog, wire: _Wire, job: Job) -> None:
        self._stream = stream
        self._watchdog = watchdog
        self._wire = wire
        self._job = job
        self._most = min(job.memory, _WAITING)
        self._waiting: deque[bytes] = deque()
        """For the client."""
        self._size = 0
        self._nudge_at: float | None = None
        self._closed_at: float | None = None
        """When the client had closed, and what it said was given to the library."""
        self._open = True
        """The client may still say something."""

    def run(self) -> Ended:
        while True:
            now = time.monotonic()
            self._from_server(now)
            self._to_client(now)
            self._to_server(now)
            if (ended := self._ended(now)) is not None:
                return ended
            self._wire.want(
                read=self._open and not self._stream.sending and self._stream.error is None,
                write=bool(self._waiting),
            )
            deadline = self._next_timeout()
            if not self._wire.wait(None if deadline is None else deadline - time.monotonic()):
                return _GONE

    def _from_server(self, now: float) -> None:
        was_sending = self._stream.sending
        pieces = self._stream.look()
        if was_sending and not self._stream.sending:
            self._watchdog.alive(now)  # only now may the server have the question
        for piece in pieces:
            given = self._watchdog.from_server(piece, now=now)
            if given:
                self._waiting.append(given)
                self._size += len(given)
        if pieces:
            self._nudge_at = now + (_NUDGE_BETWEEN if self._watchdog.between else _NUDGE)
        if self._size >= self._most:
            self._stream.reading = False

    def _to_client(self, now: float) -> None:
        if not self._waiting:
            return
        while self._waiting:
            piece = self._waiting[0]
            try:
                count = self._wire.data.send(piece)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # it is gone: what it said before is still to be sent
                count = len(piece)
            self._size -= count
            self._waiting.popleft()
            if count < len(piece):
                self._waiting.appendleft(piece[count:])
        if not self._waiting:
            self._watchdog.alive(now)
        if not self._stream.reading and self._size < self._most // 2:
            self._nudge_at = now + _NUDGE
            self._stream.resume()

    def _to_server(self, now: float) -> None:
        if self._stream.sending or self._stream.error is not None:
            return
        if question := self._watchdog.ask(now=now):
            self._stream.send(question)
            return
        if not self._open:
            return
        try:
            data = self._wire.data.recv(_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._stream.send(self._watchdog.from_client(data, now=now))
        else:
            self._open = False

    def _ended(self, now: float) -> Ended | None:
        if not self._open and not self._stream.sending and self._closed_at is None:
            self._closed_at = now
        if self._nudge_at is not None and now >= self._nudge_at:
            self._nudge_at = None
            self._stream.nudge()
        if self._stream.error is not None:
            return self._lost(self._stream.error) if not self._waiting else None
        if self._closed_at is not None and now >= self._closed_at + _LINGER:
            return Ended(what="the client has closed", orderly=True)
        if self._watched and self._watchdog.silent(now):
            return Ended(
                what=f"the server answers no PINGREQ: nothing came for {self._job.watchdog:g} s",
                fix=_AGAIN,
                silent=True,
            )
        return None

    def _lost(self, error: NngError) -> Ended:
        if not (self._stream.sending or self._stream.cut) and self._client_closed():
            return Ended(what="the client has closed", orderly=True, by_peer=True)
        silent = self._watchdog.asking
        return Ended(
            what=("nothing came from the server any more" if silent else "the server closed the connection")
            + f" (NanoNNG says: {error})",
            silent=silent,
            by_peer=not silent,
        )

    def _client_closed(self) -> bool:
        try:
            return not (self._open and self._wire.data.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    @property
    def _watched(self) -> bool:
        """While one of them does not take what the other said, no answer can be expected."""
        return not self._waiting and not self._stream.sending

    def _next_timeout(self) -> float | None:
        times = [self._nudge_at]
        if self._watched:
            times.append(self._watchdog.next_timeout())
        if self._closed_at is not None:
            times.append(self._closed_at + _LINGER)
        return min((at for at in times if at is not None), default=None)
