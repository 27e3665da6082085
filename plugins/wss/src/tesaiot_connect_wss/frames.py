"""WebSocket frames in and out, without I/O: the library `websockets`, and a short cut for plain data.

Owns: where one frame ends and the next begins. Rule: whatever is not a whole, unfragmented binary frame of
at most 64 KiB is the library's business: fragments, large frames, control frames, and every violation.
MQTT brokers send a frame for each packet, so the frames of the short cut are nearly all there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from websockets.exceptions import PayloadTooBig
from websockets.frames import PONG, Close, Frame, Opcode
from websockets.protocol import OPEN, Protocol, Side

try:
    from websockets.speedups import apply_mask as _apply_mask
except ImportError:  # an interpreter without the C extension
    from websockets.utils import apply_mask as _apply_mask

apply_mask = cast("Callable[[bytes, bytes], bytes]", _apply_mask)

LARGEST = 65535
"""Payload of the largest frame that is sent, and of the largest that takes the short cut."""
_PATIENT = 4096  # payload of the largest frame whose rest is waited for; the library gathers larger ones
_BINARY = 0x82  # a whole message: FIN and opcode 2 (RFC 6455 section 5.2)
_ANSWERS = (0x88, 0x8A)  # close and pong
_MOST_SLOW = 4096
"""Frames of one read that do not take the short cut. More would hold up everybody else (7 us each)."""
TEXT_REFUSED = "MQTT travels in binary frames (MQTT 5 section 6.0)"


class Frames:
    """Both directions of an open connection. `library` has done its opening handshake."""

    def __init__(self, library: Protocol, limit: int) -> None:
        self._library = library
        self._masked = library.side is Side.SERVER  # what comes in
        self._largest = min(LARGEST, limit)
        self._limit = limit
        self._rest = b""  # the beginning of a frame that may take the short cut
        self._owed = 0  # bytes that the library still wants of its frame
        self._fragmented = False
        self._failed = ""
        self.pongs: list[bytes] = []
        """Payloads of the pongs that came since this was emptied."""

    # --- in

    def feed(self, data: bytes) -> list[bytes]:
        """The payload of what came, in order, in pieces of about `LARGEST`, none empty. Never raises."""
        size = len(data)
        if self._rest:
            data, self._rest = self._rest + data, b""
        out: list[bytes] = []
        at, end, slow = 0, len(data), 0
        while at < end and not self.over():
            if not self._owed:
                if not self._fragmented:
                    at = (self._masked_frames if self._masked else self._bare_frames)(data, at, out)
                if not self._begin(data, at):
                    self._rest = data[at:]
                    break
                if self._masked and data[at] in _ANSWERS and data[at + 1] < 126:
                    # paho-mqtt does not mask its answers: a mask of zeros changes nothing
                    self._through_library(bytes((data[at], data[at + 1] | 0x80, 0, 0, 0, 0)), out)
                    self._owed -= 2
                    at += 2
                    continue
            took = data[at : at + self._owed]
            self._owed -= len(took)
            at += len(took)
            self._through_library(took, out)
            slow += 1
            if slow > _MOST_SLOW and not self.over():
                self.fail(1008, "it sends many small fragments, or many pings")
        if len(out) < 2:
            return out if out and out[0] else []
        # joined as a whole, what one read brought would be too large for the allocator's free lists
        some = len(out) if size <= LARGEST else max(1, len(out) * LARGEST // size)
        pieces = [b"".join(out[begin : begin + some]) for begin in range(0, len(out), some)]
        return [piece for piece in pieces if piece]

    def _bare_frames(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Takes the plain frames from `at` on, and says where they end."""
        end, largest, append = len(data), self._largest, out.append
        while at + 4 <= end and data[at] == _BINARY:
            begin, size = at + 2, data[at + 1]
            if size > 125:
                if size != 126:
                    break
                begin, size = at + 4, data[at + 2] << 8 | data[at + 3]
            stop = begin + size
            if stop > end or size > largest:
                break
            append(data[begin:stop])
            at = stop
        return at

    def _masked_frames(self, data: bytes, at: int, out: list[bytes]) -> int:
        end, largest, append = len(data), self._largest, out.append
        while at + 8 <= end and data[at] == _BINARY:
            begin, size = at + 6, data[at + 1] - 128
            if size > 125:
                if size != 126:
                    break
                begin, size = at + 8, data[at + 2] << 8 | data[at + 3]
            stop = begin + size
            if size < 0 or stop > end or size > largest:
                break
            append(apply_mask(data[begin:stop], data[begin - 4 : begin]))
            at = stop
        return at

    def _begin(self, data: bytes, at: int) -> bool:
        """Whether the frame at `at` is for the library; False: wait for more of it."""
        have = len(data) - at
        if have < 2:
            return False
        short = data[at + 1] & 0x7F
        more = 2 if short == 126 else 8 if short == 127 else 0
        head = 2 + more + (4 if data[at + 1] & 0x80 else 0)
        if have < head:
            return False
        size = int.from_bytes(data[at + 2 : at + 2 + more], "big") if more else short
        plain = data[at] == _BINARY and size <= min(_PATIENT, self._largest) and not self._fragmented
        if plain and have < head + size and bool(data[at + 1] & 0x80) == self._masked:
            return False
        self._owed = head + size
        return True

    def _through_library(self, data: bytes, out: list[bytes]) -> None:
        self._library.receive_data(data)
        for event in self._library.events_received():
            assert isinstance(event, Frame)
            if event.opcode is Opcode.TEXT:
                self.fail(1003, TEXT_REFUSED)
                return
            if event.opcode is PONG:
                self.pongs.append(bytes(event.data))
            elif event.opcode in (Opcode.BINARY, Opcode.CONT):
                self._fragmented = not event.fin
                if event.data:
                    out.append(bytes(event.data))

    # --- out

    def binary(self, data: bytes) -> None:
        """One frame, or several where `data` is longer than `LARGEST`."""
        for begin in range(0, len(data), LARGEST):
            self._library.send_binary(data[begin : begin + LARGEST])

    def ping(self, payload: bytes) -> None:
        self._library.send_ping(payload)

    def close(self, code: int, reason: str) -> None:
        """Begins the closing handshake, unless it has begun. `reason` is cut to what fits (123 bytes)."""
        if self.open:
            self._library.send_close(code, reason.encode()[:123].decode(errors="ignore"))

    def fail(self, code: int, reason: str) -> None:
        """Gives the connection up because of what the peer did (RFC 6455 section 7.1.7)."""
        self._failed = reason
        self._library.fail(code, reason.encode()[:123].decode(errors="ignore"))

    def taken(self) -> bytes:
        """What is to be written now."""
        return b"".join(self._library.data_to_send())

    # --- how it stands

    @property
    def open(self) -> bool:
        """Neither side has begun to close."""
        return self._library.state is OPEN

    def over(self) -> bool:
        """Nothing more is read: the peer's close frame came, or it broke the protocol."""
        library = self._library
        return library.close_rcvd is not None or library.parser_exc is not None or bool(self._failed)

    @property
    def close_received(self) -> Close | None:
        return self._library.close_rcvd if not self.violation else None

    @property
    def close_sent(self) -> Close | None:
        return self._library.close_sent

    @property
    def violation(self) -> str:
        """What the peer did that RFC 6455 or our limits forbid, "" where nothing."""
        error = self._library.parser_exc
        if isinstance(error, PayloadTooBig):
            return f"a WebSocket message is larger than `max_message_size` ({self._limit} bytes)"
        return self._failed or (str(error) or type(error).__name__ if error is not None else "")
