"""The worker process, seen from the process that started it.

Owns: its start, its signs of life, its last word, its end, and what it prints. Rules: whatever happens to it
becomes one `Ended` with a reason; no process, descriptor or timer outlives `gone`.

`subprocess.Popen` and not asyncio's: that one starts a thread for each process (or needs the main thread's
signals), and cannot be ended in one step. A worker's end shows as the end of its control socket, and it is
reaped from the loop's timers then. It has a session of its own, so that Ctrl-C in a terminal is for us alone:
we let it finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec

from tesaiot_connect import ConnectFailed, ConnectorError, Unsupported

from . import control
from .control import Ended, Failed, Job, Loaded, Ping, Pong, Report, Secured

log = logging.getLogger(__name__)

COMMAND = ("-P", "-m", "tesaiot_connect_quic_nng.worker")
"""Behind the interpreter; the numbers of the data and the control socket follow."""
PROBE = 5.0
"""Seconds a worker has to say whether the library is there."""
_PING = 2.0
_LEAVE = 2.0
"""Seconds between a worker's last word and its end; then it is killed."""
_REAP = 0.05
"""Seconds that `kill` waits for a process to be gone; it takes a few milliseconds where nothing else runs."""
_TAIL = 4096
_LINE = 200
_DROPPED = b"msg lost"
"""What NanoSDK prints when a queue is full."""
_LONGEST = 1024 * 1024
"""Bytes of a report. What is longer is none."""


class Crashed(ConnectFailed):
    """The process died by a signal that we did not send, before it had a connection."""


class _Process(NamedTuple):
    """A process that was started, with our ends of what connects us."""

    popen: subprocess.Popen[bytes]
    data: socket.socket
    control: socket.socket
    output: int
    """Descriptor: what it prints."""


def _start() -> _Process:
    """Raises Unsupported where the system has no such processes, ConnectFailed where it gave none."""
    if os.name != "posix" or not sys.executable or getattr(sys, "frozen", False):
        raise Unsupported(
            "quic_nng needs a POSIX system (Linux, macOS) and a Python interpreter, no frozen program, to "
            "start its process with",
            fix='use via = "quic_aioquic"',
        )
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as theirs:
        try:
            data, far_data = socket.socketpair()
            opened.callback(data.close)
            theirs.callback(far_data.close)
            orders, far_orders = socket.socketpair()
            opened.callback(orders.close)
            theirs.callback(far_orders.close)
            output, far_output = os.pipe()
            opened.callback(os.close, output)
            theirs.callback(os.close, far_output)
            numbers = (far_data.fileno(), far_orders.fileno())
            popen = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                (sys.executable, *COMMAND, *map(str, numbers)),
                stdin=subprocess.DEVNULL,
                stdout=far_output,
                stderr=far_output,
                pass_fds=numbers,
                start_new_session=True,
            )
        except OSError as error:
            raise ConnectFailed(
                f"the process of quic_nng cannot be started: {error.strerror or error}",
                fix="see to the limits of processes, open files and memory (ulimit -a)",
            ) from error
        os.set_blocking(output, False)
        data.setblocking(False)
        orders.setblocking(False)
        opened.pop_all()
    return _Process(popen, data, orders, output)


class Worker:
    """A worker process. Of the event loop that runs when it is made; nothing here needs its thread to be
    the main one, and nothing here is a task.

    `place` names the endpoint in messages, `patience` is how long a sign of life may take, in seconds.
    """

    def __init__(self, place: str, *, patience: float) -> None:
        """Raises Unsupported and ConnectFailed."""
        self._loop = asyncio.get_running_loop()
        self._place = place
        self._interval = min(_PING, patience / 4)
        self._patience = patience
        self._popen, self.data, self._control, self._output = _start()
        self._received = b""
        self._printed = b""
        self._open = True
        self._ends = False
        """Its control socket has ended, or it was killed."""
        self._timer: asyncio.TimerHandle | None = None
        self._pings = 0
        self._answered = 0
        self._warned = False
        self._why: Ended | None = None
        """Why we killed it, where we did."""
        self.loaded: Loaded | None = None
        self._secured: asyncio.Future[Secured] = self._loop.create_future()
        self.last_word: asyncio.Future[Ended] = self._loop.create_future()
        """What it said last, or what is known of its end where it could not say anything."""
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """It was reaped, and only `data` may still be open."""
        self._loop.add_reader(self._control.fileno(), self.look)
        self._loop.add_reader(self._output, self._hear)

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def secure(self, job: Job) -> Secured:
        """Gives it the job, and returns when a connection is there. Not bounded in time.

        Raises Unsupported and ConnectFailed, as it says why not, and Crashed. Whoever cancels this kills it.
        """
        with contextlib.suppress(OSError):  # it has left: its last word says why
            await self._loop.sock_sendall(self._control, control.line(job))
        await asyncio.wait((self._secured, self.last_word), return_when=asyncio.FIRST_COMPLETED)
        if not self._secured.done():
            ended, code = self.last_word.result(), self._popen.returncode
            crashed = self._why is None and code is not None and code < 0
            raise (Crashed if crashed else ConnectFailed)(f"{self._place}: {ended.what}", fix=ended.fix)
        secured = self._secured.result()
        self._answered = self._pings
        self._beat()
        return secured

    def look(self) -> None:
        """Takes what it has said up to now."""
        if self._ends:
            return
        ended = False
        while not ended:
            try:
                piece = self._control.recv(65536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # it left with orders of ours unread
                piece = b""
            ended = not piece
            self._received += piece
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._received) > _LONGEST:
            self.kill(Ended(what=f"the process of quic_nng said more than {_LONGEST} bytes in one line"))
        elif ended:
            self._ending()

    def kill(self, why: Ended | None = None) -> None:
        """Ends it at once. Idempotent. It blocks for the few milliseconds the system takes for that; where it
        takes longer a thread waits, since the event loop may end before the process."""
        if not self._open:
            return
        self._why = self._why or why or Ended(what="the connection was closed on this side")
        self._popen.kill()
        end = time.monotonic() + _REAP
        while self._popen.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)
        if self._popen.poll() is None:
            threading.Thread(target=self._popen.wait, daemon=True).start()
        self._ending()

    async def finish(self, timeout: float) -> None:
        """Returns when it is gone, which it should be after its data socket ended; kills it after `timeout`
        seconds, or when cancelled, and then does not wait."""
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self.gone)
        except TimeoutError:
            what = (
                f"the process of quic_nng was not done within {timeout:g} s, and what it had not sent is lost"
            )
            self.kill(Ended(what=what, fix="raise ack_timeout, or use QoS 1"))
            await asyncio.shield(self.gone)  # which may take longer than `kill` waits
        except asyncio.CancelledError:
            self.kill()
            raise

    # --- what it says

    def _take(self, line: bytes) -> None:
        try:
            report: Report = control.reports.decode(line)
        except msgspec.MsgspecError:
            log.warning("%s: the process of quic_nng said what is no report: %.200r", self._place, line)
            return
        if isinstance(report, Pong):
            self._answered = report.number
        elif isinstance(report, Loaded):
            self.loaded = report
            log.debug("%s: %s, version %s", self._place, report.library, report.version)
        elif isinstance(report, Secured):
            if not self._secured.done():
                self._secured.set_result(report)
        elif isinstance(report, Failed):
            if not self._secured.done():
                self._secured.set_exception(_failure(self._place, report))
                self._secured.exception()  # nobody need ask for it
            self._last(Ended(what=report.what, fix=report.fix))
        else:
            self._last(report)

    def _last(self, word: Ended) -> None:
        if self.last_word.done():
            return
        self.last_word.set_result(word)
        self._later(_LEAVE, self.kill)

    def _hear(self) -> None:
        """Takes what it printed."""
        try:
            piece = os.read(self._output, 65536)
        except (BlockingIOError, InterruptedError):
            return
        if not piece:
            self._loop.remove_reader(self._output)
            return
        self._printed = (self._printed + piece)[-_TAIL:]
        if _DROPPED in piece and not self._warned:
            self._warned = True
            log.warning(
                "%s: more comes in than is taken, and the library drops messages: %s",
                self._place,
                _last_line(piece),
            )
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "%s: pid %d printed: %s", self._place, self.pid, piece.decode(errors="replace").rstrip()
            )

    # --- signs of life

    def _beat(self) -> None:
        """Asks for a sign of life. Turns are counted, not seconds: both of us may have been stopped."""
        self.look()
        if self._ends or self.last_word.done():  # then something else is waited for
            return
        if (self._pings - self._answered) * self._interval >= self._patience:
            what = f"the process of quic_nng hangs: no sign of life for {self._patience:g} s"
            self.kill(Ended(what=what, fix=_AGAIN, silent=True))
            return
        self._pings += 1
        with contextlib.suppress(OSError):  # full, or it has left: silence tells either
            self._control.send(control.line(Ping(self._pings)))
        self._later(self._interval, self._beat)

    def _later(self, delay: float, do: Callable[[], None]) -> None:
        """There is one thing to wait for at a time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, do)

    # --- its end

    def _ending(self, delay: float = 0.001, waited: float = 0.0) -> None:
        """It has closed its control socket, or was killed: reap it. What was waited is counted, no clock is
        looked at: both of us may have been stopped."""
        self._ends = True
        running = self._popen.poll() is None
        if running and self._why is None:  # what it prints is still of use
            self._loop.remove_reader(self._control.fileno())
        elif self._open:
            self._open = False
            self._hear()
            self._loop.remove_reader(self._control.fileno())
            self._loop.remove_reader(self._output)
            self._control.close()
            os.close(self._output)
        if running and waited >= _LEAVE and self._open:
            self.kill(Ended(what="the process of quic_nng closed its control socket and stayed"))
        elif running:
            self._later(delay, partial(self._ending, min(delay * 1.5, 0.1), waited + delay))
        else:
            self._reaped()

    def _reaped(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.last_word.done():
            self.last_word.set_result(self._why or self._died())
        self.gone.set_result(None)

    def _died(self) -> Ended:
        how, printed = _how(self._popen.returncode), _last_line(self._printed)
        return Ended(what=f"the process of quic_nng {how}" + (f": {printed}" if printed else ""), fix=_AGAIN)


_AGAIN = "the session goes on with the next connection; should it come again, update the library"


def missing() -> ConnectorError | None:
    """Why the library of the default places cannot be used, None where it can. Blocks, for `PROBE` seconds
    at most."""
    try:
        process = _start()
    except ConnectorError as error:
        return error
    with process.data, process.control as told, process.popen, os.fdopen(process.output, "rb") as output:
        told.settimeout(PROBE)
        end = time.monotonic() + PROBE
        received = b""
        try:
            told.sendall(control.line(Job()))
            while b"\n" not in received and (left := end - time.monotonic()) > 0:
                told.settimeout(left)
                piece = told.recv(65536)
                if not piece:
                    break
                received += piece
        except OSError:  # it is slow, or has left: what came says more
            pass
        finally:
            in_time = time.monotonic() < end
            if not in_time:
                process.popen.kill()
            else:
                told.close()  # which ends it
            code = _wait(process.popen)
            printed = _last_line(output.read() or b"")
    line, ended, _ = received.partition(b"\n")
    if ended:
        with contextlib.suppress(msgspec.MsgspecError):
            report: Report = control.reports.decode(line)
            if isinstance(report, Loaded):
                return None
            if isinstance(report, Failed):
                return _failure("", report)
    how = _how(code) if in_time else f"said nothing for {PROBE:g} s"
    what = f"the process of quic_nng {how}" + (f": {printed}" if printed else "")
    return ConnectFailed(what, fix="the library is broken, it seems: update it, or use another one")


def _wait(popen: subprocess.Popen[bytes]) -> int:
    try:
        return popen.wait(_LEAVE)
    except subprocess.TimeoutExpired:
        popen.kill()
        return popen.wait()


def _failure(place: str, report: Failed) -> ConnectorError:
    what = f"{place}: {report.what}" if place else report.what
    if report.unsupported:
        return Unsupported(what, fix=report.fix)
    return ConnectFailed(what, fix=report.fix, stage=report.stage)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended without a word (exit status {code})"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _last_line(printed: bytes) -> str:
    lines = printed.decode(errors="replace").split("\n")
    shown = ("".join(c if c.isprintable() else " " for c in line).strip() for line in reversed(lines))
    told = [line for line in shown if line]
    panic = next((line for line in told if line.startswith("panic: ")), "")  # advice to report it follows
    return (panic or "".join(told[:1]))[:_LINE]
