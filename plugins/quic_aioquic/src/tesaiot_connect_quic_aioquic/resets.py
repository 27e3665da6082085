"""Stateless resets: how a listener says that it knows nothing of a connection.

Owns: the tokens (RFC 9000 section 10.3). Rule: they are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

RESET_TOKEN = 16
"""Bytes of a stateless reset token (RFC 9000 section 10.3)."""
LEAST_RESET = 5 + RESET_TOKEN
"""Bytes of the smallest datagram that can be one."""


def reset_token(key: bytes, connection_id: bytes) -> bytes:
    """The token of a connection id: the same after a restart with the same key."""
    return hmac.digest(key, connection_id, hashlib.sha256)[:RESET_TOKEN]


def is_reset(data: bytes, tokens: Iterable[bytes]) -> bool:
    """Whether a datagram ends with one of the tokens; empty ones stand for none."""
    if len(data) < LEAST_RESET or data[0] & 0x80:
        return False
    tail, told = data[-RESET_TOKEN:], False
    for token in tokens:
        told |= bool(token) and hmac.compare_digest(tail, token)
    return told
