"""Where MQTT packets begin and end in a byte stream, and the question that shows whether it still brings any.

Owns: the boundaries (fixed header and remaining length only, MQTT 5 section 2.1), our own PINGREQ between two
of the client's packets, and its PINGRESP, which the client never sees. Rule: no I/O and no clock; all else
passes untouched, whatever it is.
"""

from __future__ import annotations

from collections import deque

_CONNECT, _CONNACK, _PINGREQ, _PINGRESP, _DISCONNECT = 1, 2, 12, 13, 14
_QUESTION = b"\xc0\x00"


class Boundaries:
    """Of one direction."""

    __slots__ = ("_body", "_first", "_length", "_shift", "_size", "broken")

    def __init__(self) -> None:
        self.broken = False
        """A remaining length of five bytes: what follows cannot be told apart."""
        self._first = -1
        self._size = self._length = self._shift = self._body = 0

    @property
    def between(self) -> bool:
        """Whether the last byte was the last of a packet, or there was none."""
        return self._first < 0 and not self.broken

    def begun(self, first: int) -> bool:
        """Whether nothing but its first byte is there of the present packet, and that is `first`."""
        return self._first == first and self._size == 1

    def feed(self, data: bytes) -> list[tuple[int, int, int]]:
        """(type, size, end) of each packet that ends in `data`; the end is an offset in `data`."""
        ends: list[tuple[int, int, int]] = []
        at, total = 0, len(data)
        while at < total and not self.broken:
            if self._body:
                step = min(self._body, total - at)
                at += step
                self._body -= step
                if not self._body:
                    ends.append(self._complete(at))
                continue
            byte = data[at]
            at += 1
            if self._first < 0:
                self._first, self._size, self._length, self._shift = byte, 1, 0, 0
                continue
            self._size += 1
            self._length |= (byte & 127) << self._shift
            self._shift += 7
            if byte & 128:
                self.broken = self._shift > 21
                continue
            self._size += self._length
            self._body = self._length
            if not self._body:
                ends.append(self._complete(at))
        return ends

    def _complete(self, at: int) -> tuple[int, int, int]:
        kind, self._first = self._first >> 4, -1
        return kind, self._size, at


class Watchdog:
    """Asks, every `interval` seconds since CONNACK, whether bytes still come in.

    A stream that does not begin with CONNECT passes as it is, and is not watched.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._client = Boundaries()
        self._server = Boundaries()
        self._begun = self._mqtt = self._over = False
        self._pings: deque[bool] = deque()
        """The PINGREQs on their way, in order; True is ours."""
        self._held = b""
        self._due: float | None = None
        self._deadline: float | None = None

    @property
    def asking(self) -> bool:
        """A question is out, and nothing has come since."""
        return self._deadline is not None

    @property
    def between(self) -> bool:
        """Whether all packets of the server that began are complete. False where nobody can know."""
        return self._mqtt and self._server.between

    def from_client(self, data: bytes, *, now: float) -> bytes:
        """What is to go to the server instead of `data`."""
        if not self._begun and data:
            self._begun, self._mqtt = True, data[0] >> 4 == _CONNECT
        if not self._mqtt:
            return data
        asked = 0
        for kind, _, end in self._client.feed(data):
            if kind == _PINGREQ:
                self._pings.append(False)
            self._over = self._over or kind == _DISCONNECT
            if self._wanted(now):
                self._asked(now)
                asked = end
        self._give_up_where_broken(self._client)
        return data[:asked] + _QUESTION + data[asked:] if asked else data

    def from_server(self, data: bytes, *, now: float) -> bytes:
        """What the client is to get instead of `data`."""
        self.alive(now)
        if not self._mqtt:
            return data
        held, self._held = self._held, b""
        pieces, begin = [], 0
        for kind, size, end in self._server.feed(data):
            if kind == _CONNACK and self._due is None and self._deadline is None:
                self._due = now + self._interval
            elif kind == _PINGRESP and self._pings and self._pings.popleft():
                self._deadline, self._due = None, now + self._interval
                if size == 2:
                    pieces.append(data[begin : max(end - 2, 0)])
                    begin = end
                    held = b"" if end == 1 else held
        pieces.append(data[begin:])
        given = held + b"".join(pieces)
        if self._pings and self._pings[0] and self._server.begun(_PINGRESP << 4):
            given, self._held = given[:-1], given[-1:]
        self._give_up_where_broken(self._server)
        return given

    def ask(self, *, now: float) -> bytes:
        """A PINGREQ to send, where one is due and the client is between two packets; else nothing."""
        if not (self._wanted(now) and self._client.between):
            return b""
        self._asked(now)
        return _QUESTION

    def alive(self, now: float) -> None:
        """Something came, or nothing could: the answer may take as long again."""
        if self._deadline is not None:
            self._deadline = now + self._interval

    def silent(self, now: float) -> bool:
        return self._deadline is not None and now >= self._deadline

    def next_timeout(self) -> float | None:
        """When to `ask`, or to see whether it is `silent`."""
        if self._deadline is not None:
            return self._deadline
        return self._due if self._client.between and not self._over else None

    def _wanted(self, now: float) -> bool:
        return self._due is not None and now >= self._due and not self._over

    def _asked(self, now: float) -> None:
        self._pings.append(True)
        self._due, self._deadline = None, now + self._interval

    def _give_up_where_broken(self, side: Boundaries) -> None:
        if side.broken:
            self._mqtt, self._due, self._deadline = False, None, None
