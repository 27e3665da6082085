"""Wire primitives: integers, strings and binary data (MQTT 5 section 1.5).

Owns: reading them with bounds checked, and writing them. Rule: whatever the bytes, the only
exception is `ProtocolError`.
"""

from __future__ import annotations

from ..errors import ProtocolError
from .reasons import R

MAX_VARINT = 268_435_455


def malformed(what: str) -> ProtocolError:
    return ProtocolError(what, reason_code=R.MALFORMED_PACKET)


class Cursor:
    """Reads one packet's body from front to back."""

    __slots__ = ("data", "end", "pos")

    def __init__(self, data: bytes, pos: int, end: int) -> None:
        self.data = data
        self.pos = pos
        self.end = end

    def left(self) -> int:
        return self.end - self.pos

    def take(self, count: int) -> bytes:
        start = self.pos
        stop = start + count
        if stop > self.end:
            raise malformed("a field reaches beyond its packet")
        self.pos = stop
        return self.data[start:stop]

    def u8(self) -> int:
        if self.pos >= self.end:
            raise malformed("a packet ends where a byte was expected")
        value = self.data[self.pos]
        self.pos += 1
        return value

    def u16(self) -> int:
        return int.from_bytes(self.take(2))

    def u32(self) -> int:
        return int.from_bytes(self.take(4))

    def varint(self) -> int:
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if shift and not byte:
                    raise malformed("a variable byte integer is not in its shortest form")
                return value
        raise malformed("a variable byte integer is longer than four bytes")

    def binary(self) -> bytes:
        return self.take(self.u16())

    def string(self) -> str:
        return text(self.binary())

    def rest(self) -> bytes:
        return self.take(self.end - self.pos)

    def packet_id(self) -> int:
        value = self.u16()
        if not value:
            raise ProtocolError("a packet identifier is 0", reason_code=R.PROTOCOL_ERROR)
        return value

    def finish(self) -> None:
        if self.pos != self.end:
            raise malformed("a packet holds bytes beyond its last field")


def text(raw: bytes) -> str:
    """A UTF-8 string as section 1.5.4 wants it: well-formed and without U+0000."""
    try:
        value = raw.decode()
    except UnicodeDecodeError as error:
        raise malformed("a string is not valid UTF-8") from error
    if "\0" in value:
        raise malformed("a string holds the null character")
    return value


def varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    if value > MAX_VARINT:
        raise ProtocolError(f"{value} is too large for an MQTT packet", reason_code=R.PACKET_TOO_LARGE)
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def binary(value: bytes) -> bytes:
    if len(value) > 0xFFFF:
        raise ProtocolError(
            f"a field of {len(value)} bytes is longer than the 65535 MQTT allows",
            reason_code=R.PACKET_TOO_LARGE,
        )
    return len(value).to_bytes(2) + value


def string(value: str) -> bytes:
    try:
        raw = value.encode()
    except UnicodeEncodeError as error:
        raise malformed(f"{value!r} cannot be written as UTF-8") from error
    if b"\0" in raw:
        raise malformed(f"{value!r} holds the null character, which MQTT forbids")
    return binary(raw)


def packet(first_byte: int, body: bytes) -> bytes:
    return bytes((first_byte,)) + varint(len(body)) + body
