"""Payload formats: JSON, MessagePack, and bytes left as they are.

Owns: how a payload becomes a value and back. Rule: one payload at a time, so that no payload can
reach into its neighbour, and whatever bytes come, decoding never raises: what is wrong becomes
`Undecodable` in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import msgspec

from ..errors import PayloadError
from ..message import Undecodable

_JSON = msgspec.json.Decoder()
_JSON_RAW = msgspec.json.Decoder(msgspec.Raw)
_JSON_ENCODER = msgspec.json.Encoder()
_MSGPACK = msgspec.msgpack.Decoder()
_MSGPACK_ENCODER = msgspec.msgpack.Encoder()


@attrs.frozen
class JsonSerializer:
    """JSON (RFC 8259) in UTF-8.

    NaN and Infinity are not JSON: decoding refuses them, encoding writes null. Bytes are encoded
    as base64, dates as RFC 3339 text. Whole numbers keep all their digits.
    """

    def decode(self, payloads: Sequence[bytes], /) -> list[Any]:
        try:
            return list(map(_JSON.decode, payloads))
        except Exception:  # noqa: BLE001 - found one by one below
            return _one_by_one(_JSON.decode, payloads, "JSON")

    def decode_raw(self, payloads: Sequence[bytes], /) -> list[Any]:
        """Checks the syntax and the UTF-8, and builds no values."""
        decode = _JSON_RAW.decode if all(map(bytes.isascii, payloads)) else _raw
        try:
            return list(map(decode, payloads))
        except Exception:  # noqa: BLE001 - found one by one below
            return _one_by_one(decode, payloads, "JSON")

    def encode(self, values: Sequence[Any], /) -> list[bytes]:
        return _encode(_JSON_ENCODER.encode, values, "JSON")


@attrs.frozen
class MsgpackSerializer:
    """MessagePack. Timestamps become dates; bytes stay bytes."""

    def decode(self, payloads: Sequence[bytes], /) -> list[Any]:
        try:
            return list(map(_MSGPACK.decode, payloads))
        except Exception:  # noqa: BLE001 - found one by one below
            return _one_by_one(_MSGPACK.decode, payloads, "MessagePack")

    def encode(self, values: Sequence[Any], /) -> list[bytes]:
        return _encode(_MSGPACK_ENCODER.encode, values, "MessagePack")


@attrs.frozen
class RawPayload:
    """No format: the value is the payload, as bytes. Every payload is good.

    Sinks that write JSON or text show UTF-8 as text and other bytes as {"base64": "..."}.
    """

    def decode(self, payloads: Sequence[bytes], /) -> list[Any]:
        return list(payloads)

    def encode(self, values: Sequence[Any], /) -> list[bytes]:
        return _encode(self._encode_one, values, "raw bytes")

    def _encode_one(self, value: Any) -> bytes:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes | bytearray | memoryview | msgspec.Raw):
            return bytes(value)
        raise TypeError("only bytes and text can be sent raw")


def _raw(payload: bytes) -> msgspec.Raw:
    value: msgspec.Raw = _JSON_RAW.decode(payload)
    if not payload.isascii():
        payload.decode()  # msgspec leaves the text inside a Raw unchecked
    return value


def _one_by_one(decode: Callable[[bytes], Any], payloads: Sequence[bytes], format: str) -> list[Any]:
    values: list[Any] = []
    for payload in payloads:
        try:
            values.append(decode(payload))
        except Exception as error:  # noqa: BLE001 - bytes of anybody's; RecursionError, too
            wrong = PayloadError(f"a payload of {len(payload)} bytes is not {format}: {error}")
            wrong.__cause__ = error
            values.append(Undecodable(wrong, payload))
    return values


def _encode(encode: Callable[[Any], bytes], values: Sequence[Any], format: str) -> list[bytes]:
    try:
        return list(map(encode, values))
    except Exception:  # noqa: BLE001 - found one by one below
        out = []
        for value in values:
            try:
                out.append(encode(value))
            except Exception as error:
                raise PayloadError(f"{repr(value)[:200]} cannot be written as {format}: {error}") from error
        return out
