"""The process that loads the library: `python -P -m tesaiot_connect_quic_nng.worker DATA CONTROL`.

Owns: the job, the loop that serves one connection, and the end of the process. Rules: it says why it ends, as
its last word, and leaves by `os._exit` whatever the library's threads do, before the library makes another
connection; nothing is read from DATA that the session does not want, and nothing taken from the session that
DATA does not take; when the other end of CONTROL is gone, so is this process, at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn, assert_never

from . import control, nanosdk
from .control import Ended, Failed, Job, Loaded, Secured
from .library import Library, load
from .secret_file import secret_file
from .session import Session
from .watches import Company, Progress
from .wire import Interest, Orders, say

_CLOSE = 0.3
"""Seconds the library gets to close its connection; it may hang or abort then."""
_FLUSH = 2.0
"""Seconds for the last bytes of both sides where the client ended it."""
_FLUSH_LOST = 0.3
"""Seconds the client's side gets to take the last bytes otherwise. A second after its connection is lost the
library makes another one, and the server would send what waits for the client into it."""
_LOOK = 0.01
"""Seconds between two looks at the handshake."""
_PIECE = 65_536
_LAST = 0
"""Number of an UNSUBSCRIBE of our own; the session's begin with 1."""


def main(arguments: list[str]) -> NoReturn:
    data, orders = (socket.socket(fileno=int(number)) for number in arguments)
    _settle_in(orders)
    word: Ended | Failed
    sdk = None
    try:
        job = _job(orders)
        library = _load(job)
        if isinstance(library, Failed):
            _leave(library, data, orders)
        say(orders, Loaded(library=library.path, version=library.version))
        if not job.url:
            _leave(None, data, orders)
        if job.backend == "nanonng":
            from . import nanonng

            word = nanonng.serve(library, job, data, orders)
        else:
            sdk = nanosdk.NanoSdk(library)
            failed = _secure(sdk, job, orders)
            word = failed if failed is not None else _serve(sdk, job, data, orders)
    except Exception as error:  # noqa: BLE001 - nobody above reads a traceback
        word = Ended(what=f"the process of quic_nng failed: {type(error).__name__}: {error}")
    _leave(word, data, orders, sdk)


def _settle_in(orders: socket.socket) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold keys, and what clients say
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever stops all of a service leaves us to our parent
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_guard, args=(orders.fileno(),), name="guard", daemon=True).start()


def _guard(descriptor: int) -> NoReturn:
    """Leaves when the other end of the control socket is gone, whatever the other threads are stuck in."""
    poll = select.poll()
    poll.register(descriptor, 0)  # no data, only the end
    while not poll.poll():
        pass
    os._exit(0)


def _job(orders: socket.socket) -> Job:
    """Reads the first line and no more: what follows belongs to whoever serves."""
    length = 0
    while True:
        seen = orders.recv(max(_PIECE, 2 * length), socket.MSG_PEEK)
        if not seen:
            os._exit(0)
        end = seen.find(b"\n")
        if end >= 0 or len(seen) == length:
            break
        length = len(seen)
    line = b""
    while not line.endswith(b"\n"):
        line += orders.recv(end + 1 - len(line) if end >= 0 else 1)
    job = control.orders.decode(line)
    if not isinstance(job, Job):
        raise TypeError(f"the first message is no job: {job}")
    return job


def _leave(
    word: Ended | Failed | None,
    data: socket.socket,
    orders: socket.socket,
    sdk: nanosdk.NanoSdk | None = None,
) -> NoReturn:
    """The last word, then the end of the data, and of the process. Where that is orderly the server hears of
    it first, because the client need not wait for this process once its data has ended."""
    try:
        if word is not None:
            say(orders, word)
        if not (isinstance(word, Ended) and word.orderly):
            data.close()
        if sdk is not None:
            closing = threading.Thread(target=sdk.close, daemon=True)
            closing.start()
            closing.join(_CLOSE)
    finally:
        os._exit(0)


def _load(job: Job) -> Library | Failed:
    if job.backend == "nanonng":
        from . import nanonng

        return load("nanonng", job.library, job.msquic, nanonng.SYMBOLS)
    return load("nanosdk", job.library, job.msquic, nanosdk.SYMBOLS)


# --- NanoSDK


def _secure(sdk: nanosdk.NanoSdk, job: Job, orders: socket.socket) -> Failed | None:
    end = time.monotonic() + job.connect_timeout
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(_Gate(job.ca_file)) if job.verify else None
        settings = nanosdk.Settings(
            ca_file=gate.path if gate is not None else "",
            certificate=stack.enter_context(secret_file(job.certificate)) if job.verify else "",
            key=stack.enter_context(secret_file(job.key)) if job.verify else "",
            connect_timeout=job.connect_timeout,
            idle_timeout=job.idle_timeout,
            keepalive=job.keepalive,
        )
        if why := sdk.open(job.url, settings):
            fix = (
                "check that ca_file, certificate and key are PEM files, the endpoint's host, and the limits "
                "of open files and threads (ulimit -n, ulimit -u)"
            )
            return Failed(what=why, fix=fix, stage="secure")
        if gate is not None:
            gate.open()
        while not sdk.ready():
            if time.monotonic() >= end:
                return _no_handshake(job)
            time.sleep(_LOOK)
    sdk.start()
    say(orders, Secured())
    return None


def _no_handshake(job: Job) -> Failed:
    where = job.url.partition("://")[2]
    return Failed(
        what=f"no QUIC handshake with {where} in time, and NanoSDK does not tell why",
        fix="check that a broker listens there for MQTT over QUIC (UDP, IPv4, ALPN mqtt)"
        + (", and that its certificate is of an authority in ca_file" if job.verify else ""),
        stage="reach",
    )


def _serve(sdk: nanosdk.NanoSdk, job: Job, data: socket.socket, orders: socket.socket) -> Ended:
    return _Service(sdk, job, data, orders).run()


class _Service:
    """The loop: the client's bytes, the library's events, timers, signs of life."""

    def __init__(self, sdk: nanosdk.NanoSdk, job: Job, data: socket.socket, orders: socket.socket) -> None:
        self._sdk = sdk
        self._data = data
        self._waiting = memoryview(b"")
        """For the client, taken from the session."""
        self._gone = False
        """The client takes nothing any more."""
        self._asked = False
        """Whether the server has all of QoS 0, at the end."""
        self._lost: nanosdk.Lost | None = None
        """What came instead of that answer."""
        now = time.monotonic()
        self._progress = Progress(job.ack_timeout, now=now, cpu=_library_cpu())
        self._company = Company(job.ack_timeout)
        self._orders = Orders(orders, self._company)
        self._session = Session(
            sdk,
            window=job.window,
            ack_timeout=job.ack_timeout,
            accept_early_acks=job.accept_early_acks,
            max_packet_size=job.max_packet_size,
            memory=job.memory,
            now=now,
        )

    def run(self) -> Ended:
        session, orders, sdk = self._session, self._orders, self._sdk
        since = None
        with selectors.DefaultSelector() as selector:
            selector.register(orders.socket, selectors.EVENT_READ)
            selector.register(sdk.wake, selectors.EVENT_READ)
            interest = Interest(selector, self._data)
            while True:
                now = time.monotonic()
                if session.ended is None:
                    due = self._next_timeout()
                else:
                    if since is None:
                        since = now
                        self._ask_for_the_rest(session.ended)
                    due = self._last(session.ended, since)
                    if not (self._waiting or self._asked) or now >= due:
                        return self._word(session.ended)
                interest.want(read=session.reading, write=bool(self._waiting))
                ready = selector.select(None if due is None else max(0.0, due - now))
                now = time.monotonic()
                for key, what in ready:
                    if key.fileobj is orders.socket:
                        if not orders.hear():
                            os._exit(0)
                    elif key.fileobj is sdk.wake:
                        self._happen(now)
                    elif what & selectors.EVENT_READ:
                        self._read(now)
                if due is not None and now >= due:
                    self._handle_timeout(now)
                self._write()

    def _next_timeout(self) -> float | None:
        times = (
            self._session.next_timeout(),
            self._progress.next_timeout(),
            self._company.next_timeout(),
        )
        return min((one for one in times if one is not None), default=None)

    def _handle_timeout(self, now: float) -> None:
        self._session.handle_timeout(now)
        if self._company.gone(now):
            self._session.lost("the process that started this one does not ask for signs of life any more")
        if self._progress.none(now=now, cpu=_library_cpu()):
            self._session.lost(
                "the library is busy and makes no progress: a packet from the server is incomplete or large",
                "have the server send smaller messages, or use another transport for them",
                silent=True,
            )

    def _last(self, ended: Ended, since: float) -> float:
        """When to leave, whatever was not taken."""
        if self._sdk.lost_at is not None:
            return min(since + _FLUSH, self._sdk.lost_at + _FLUSH_LOST)
        return since + (_FLUSH if ended.orderly else _FLUSH_LOST)

    def _ask_for_the_rest(self, ended: Ended) -> None:
        """What the library has "sent" is in its buffers, and is dropped there when this process ends. What
        the server answers now, it answers behind that; and UNSUBSCRIBE is always answered."""
        if ended.orderly and self._sdk.unproven:
            self._asked = True
            self._sdk.unsubscribe(_LAST, [f"tesaiot-connect/{os.urandom(8).hex()}"])

    def _word(self, ended: Ended) -> Ended:
        if self._lost is not None:
            what, fix, by_peer = self._lost
            what += ", before the server confirmed that it has the last of QoS 0"
            return Ended(what=what, fix=fix, by_peer=by_peer)
        if not self._asked:
            return ended
        what = f"{ended.what}; the server did not confirm within {_FLUSH:g} s that it has the last of QoS 0"
        return Ended(what=what, silent=True)

    def _read(self, now: float) -> None:
        try:
            piece = self._data.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:  # reset: it left without reading all
            piece = b""
        if piece:
            self._session.receive_data(piece, now=now)
        else:
            self._session.eof(now=now)

    def _write(self) -> None:
        while True:
            if not self._waiting:
                self._waiting = memoryview(self._session.outputs())
                if not self._waiting:
                    return
            if self._gone:
                self._waiting = memoryview(b"")
                continue
            try:
                taken = self._data.send(self._waiting)
            except BlockingIOError:
                return
            except OSError:
                self._gone = True
                continue
            self._waiting = self._waiting[taken:]

    def _happen(self, now: float) -> None:
        session = self._session
        events = self._sdk.events()
        if events:
            self._progress.made(now=now, cpu=_library_cpu())
        for event in events:
            match event:
                case nanosdk.Acknowledged(ids):
                    session.acknowledged(ids, now=now)
                case nanosdk.Received(messages):
                    session.received(messages, now=now)
                case nanosdk.Sent(count):
                    session.sent(count, now=now)
                case nanosdk.Connack(code, present):
                    session.connack(code, present, now=now)
                case nanosdk.Answered(number, codes):
                    if number == _LAST:
                        self._asked = False
                    elif codes is None:
                        session.unsuback(number, now=now)
                    else:
                        session.suback(number, codes, now=now)
                case nanosdk.Lost(what, fix, by_peer):
                    if self._asked:
                        self._asked, self._lost = False, event
                    session.lost(what, fix, by_peer=by_peer)
                case _:
                    assert_never(event)


def _library_cpu() -> float:
    """Seconds of all threads but that of the loop."""
    return time.process_time() - time.thread_time()


class _Gate:
    """Holds the handshake back while the library opens its client: `path` is that of the authorities, which
    it reads to verify the server, and cannot before `open`.

    NanoSDK crashes where the handshake is complete before its function for opening returns: the thread of the
    handshake uses what that function stores last. Between two processes of one machine that is frequent.
    """

    def __init__(self, ca_file: str) -> None:
        self._file = os.open(ca_file, os.O_RDONLY | os.O_CLOEXEC)
        self._text = Path(ca_file).read_bytes()
        self._read, self._write = os.pipe()
        own = Path("/proc/self/fd")
        self.path = str((own if own.is_dir() else Path("/dev/fd")) / str(self._read))

    def __enter__(self) -> _Gate:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        os.close(self._file)

    def open(self) -> None:
        """Whoever comes now finds the file itself, and who has come and waits is told what is in it."""
        os.dup2(self._file, self._read, inheritable=False)
        threading.Thread(target=self._tell, name="gate", daemon=True).start()

    def _tell(self) -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._write, "wb", buffering=0) as pipe:
            left = memoryview(self._text)
            while left:
                left = left[pipe.write(left) :]


if __name__ == "__main__":
    main(sys.argv[1:])
