"""NanoNNG's QUIC streams, called as they are: a dial, bytes both ways, an end. Runs in a worker process.

Owns: the C calls, and the order in which receives are posted. Rule: NanoNNG never has bytes for a stream
without a receive posted: from then on it would deliver nothing any more.

Read in its source: of what msquic shows it, it takes the first buffer only. Where the posted receives take
all, msquic goes on by itself; where not, it waits until a receive is posted while none is. So each large
receive is followed by one of a single byte: when all are used up, it leaves something over, and msquic waits.
One is the first of them too, since msquic goes on as soon as that is posted. And where msquic waits though
some are posted, `nudge` takes them back.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int32, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from .control import Job
from .library import Library

LARGE = 65536
"""Bytes of a large receive."""
_COUNT = 16
_CANCELED = 20

_DIAL, _SEND = 1, 2

_Callback = ctypes.CFUNCTYPE(None, c_void_p)


class _Iov(ctypes.Structure):
    _fields_ = (("iov_buf", c_void_p), ("iov_len", c_size_t))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "nng_strerror": (c_char_p, (c_int,)),
    "nng_aio_alloc": (c_int, (POINTER(c_void_p), _Callback, c_void_p)),
    "nng_aio_set_iov": (c_int, (c_void_p, c_uint, POINTER(_Iov))),
    "nng_aio_set_timeout": (None, (c_void_p, c_int32)),
    "nng_aio_result": (c_int, (c_void_p,)),
    "nng_aio_count": (c_size_t, (c_void_p,)),
    "nng_aio_cancel": (None, (c_void_p,)),
    "nng_aio_get_output": (c_void_p, (c_void_p, c_uint)),
    "nng_stream_dialer_alloc": (c_int, (POINTER(c_void_p), c_char_p)),
    "nng_stream_dialer_set_string": (c_int, (c_void_p, c_char_p, c_char_p)),
    "nng_stream_dialer_set_bool": (c_int, (c_void_p, c_char_p, c_bool)),
    "nng_stream_dialer_set_uint64": (c_int, (c_void_p, c_char_p, c_uint64)),
    "nng_stream_dialer_set_int": (c_int, (c_void_p, c_char_p, c_int)),
    "nng_stream_dialer_dial": (None, (c_void_p, c_void_p)),
    "nng_stream_send": (None, (c_void_p, c_void_p)),
    "nng_stream_recv": (None, (c_void_p, c_void_p)),
    "nng_stream_close": (None, (c_void_p,)),
}
SYMBOLS = tuple(_SIGNATURES)
"""What a NanoNNG must have."""


class NngError(Exception):
    """A call that failed: `code` and what the library says of it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Receive:
    """A receive operation, and where its bytes go."""

    __slots__ = ("aio", "buffer", "number")

    def __init__(self, aio: int, number: int, size: int) -> None:
        self.aio = aio
        self.number = number
        self.buffer = ctypes.create_string_buffer(size)


class Stream:
    """One QUIC stream, to be used by one thread. No call waits.

    `wake` is called on threads of the library whenever `look` is worth a call.
    """

    def __init__(self, library: Library, wake: Callable[[], None]) -> None:
        self._nng, self._short = library.blocking, library.short
        for name, (result, arguments) in _SIGNATURES.items():
            for handle in (self._nng, self._short):
                function = getattr(handle, name)
                function.restype, function.argtypes = result, arguments
        self._wake = wake
        self._completed: deque[int] = deque()
        self._callback = _Callback(self._complete)
        self._dial = self._aio(_DIAL)
        self._send = self._aio(_SEND)
        self._handle: int | None = None
        self._sent = b""
        self._posted: deque[_Receive] = deque()
        first, between, end = _SEND + 1, _SEND + 1 + _COUNT, _SEND + 3 + 2 * _COUNT
        self._large = deque(self._receive(number, LARGE) for number in range(first, between))
        self._single = deque(self._receive(number, 1) for number in range(between, end))
        self._ready: set[int] = set()
        self.secured = False
        """The handshake is complete."""
        self.error: NngError | None = None
        """Why there is no connection, or none any more."""
        self.sending = False
        """Whether what was given to `send` is still under way."""
        self.cut = False
        """Whether it was not sent."""
        self.reading = True
        """Whether to go on receiving; what was asked of the library before comes all the same."""

    def dial(self, job: Job, *, certificate: str, key: str) -> None:
        """Begins the handshake. `certificate` and `key` are paths, "" for none. Raises NngError.

        Without them NanoNNG verifies nothing; with them it verifies whatever `job.verify` says.
        """
        dialer = c_void_p()
        self._check(self._nng.nng_stream_dialer_alloc(ctypes.byref(dialer), job.url.encode()), job.url)
        options: list[tuple[str, str, Any]] = [
            ("uint64", "quic-idle-timeout", max(1, math.ceil(job.idle_timeout))),
            ("uint64", "quic-connect-timeout", max(1, math.ceil(job.connect_timeout))),
            ("int", "quic-keepalive", math.ceil(job.keepalive)),
        ]
        if certificate:
            options += [
                ("string", "quic-tls-ca", os.fsencode(job.ca_file)),
                ("string", "quic-tls-cacert", os.fsencode(certificate)),
                ("string", "quic-tls-key", os.fsencode(key)),
                ("bool", "quic-tls-verify", job.verify),
            ]
        for kind, name, value in options:
            setter = getattr(self._nng, f"nng_stream_dialer_set_{kind}")
            self._check(setter(dialer, name.encode(), value), f"option {name}")
        self._nng.nng_aio_set_timeout(self._dial, max(1, math.ceil(job.connect_timeout * 1000)))
        self._nng.nng_stream_dialer_dial(dialer, self._dial)

    def look(self) -> list[bytes]:
        """Takes what was completed; gives what was received, in order."""
        while self._completed:
            number = self._completed.popleft()
            if number == _DIAL:
                self._dialed()
            elif number == _SEND:
                self.sending = False
                self.cut = bool(self._nng.nng_aio_result(self._send))
                self._failed(self._nng.nng_aio_result(self._send))
            else:
                self._ready.add(number)
        received = []
        while self._posted and self._posted[0].number in self._ready:
            receive = self._posted.popleft()
            self._ready.remove(receive.number)
            (self._single if len(receive.buffer) == 1 else self._large).append(receive)
            count = self._nng.nng_aio_count(receive.aio)
            if count:  # though a cancelling that came too late may have made it look like a failure
                received.append(ctypes.string_at(receive.buffer, count))
            else:
                code = self._nng.nng_aio_result(receive.aio)
                self._failed(0 if code == _CANCELED else code)
        self._post()
        return received

    def resume(self) -> None:
        self.reading = True
        self._post()

    def nudge(self) -> None:
        """Makes msquic go on where it waits though receives are posted; they are posted again by `look`."""
        if self.reading and self.error is None and self._single:
            for receive in self._posted:
                self._short.nng_aio_cancel(receive.aio)
            self._post_one(self._single)

    def send(self, data: bytes) -> None:
        """Of `data`, all; the next after `sending` is false again."""
        assert not self.sending
        self._sent = data  # msquic reads it until the send is complete
        iov = _Iov(ctypes.cast(c_char_p(data), c_void_p).value, len(data))
        self.sending = True
        self._nng.nng_aio_set_iov(self._send, 1, ctypes.byref(iov))
        self._nng.nng_stream_send(self._handle, self._send)

    def close(self) -> None:
        """Tells the server; what was not yet sent is lost. `error` is set when that is done."""
        if self._handle is not None and self.error is None:
            self.reading = False
            self._nng.nng_stream_close(self._handle)

    # --- inside

    def _aio(self, number: int) -> int:
        aio = c_void_p()
        self._check(self._nng.nng_aio_alloc(ctypes.byref(aio), self._callback, number), "memory")
        assert aio.value is not None
        return aio.value

    def _receive(self, number: int, size: int) -> _Receive:
        receive = _Receive(self._aio(number), number, size)
        iov = _Iov(ctypes.addressof(receive.buffer), size)
        self._check(self._nng.nng_aio_set_iov(receive.aio, 1, ctypes.byref(iov)), "memory")
        return receive

    def _complete(self, number: int) -> None:
        self._completed.append(number)
        self._wake()

    def _dialed(self) -> None:
        self._failed(self._nng.nng_aio_result(self._dial))
        if self.error is None:
            self._handle = self._nng.nng_aio_get_output(self._dial, 0)
            self.secured = True

    def _post(self) -> None:
        """All but one, which is for `nudge`."""
        while self.secured and self.reading and self.error is None and len(self._single) > 1:
            if not self._posted or self._short.nng_aio_count(self._posted[-1].aio):  # all are used up
                self._post_one(self._single)
            elif self._large:
                self._post_one(self._large)
                self._post_one(self._single)
            else:
                break

    def _post_one(self, idle: deque[_Receive]) -> None:
        receive = idle.popleft()
        self._posted.append(receive)
        self._short.nng_stream_recv(self._handle, receive.aio)

    def _failed(self, code: int) -> None:
        if code and self.error is None:
            text = self._nng.nng_strerror(code) or b""
            self.error = NngError(code, text.decode(errors="replace"))

    def _check(self, code: int, what: str) -> None:
        if code:
            self._failed(code)
            raise NngError(code, f"{what}: {self.error}")
