"""Which network this machine is on.

Owns: the fingerprint that keeps what was learned on one network apart from the others. Rule: it sends
nothing and asks nobody; what it looks at never leaves it in clear.

A fingerprint is made of the IPv4 address and the IPv6 prefix (64 bits, since the rest changes with privacy
extensions) that packets to elsewhere would leave from, and on Linux the interface and the gateway of the
default route. Networks that are alike in all of that count as one.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from pathlib import Path

_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses for documentation (RFC 5737, RFC 3849): nobody has them, and nothing is sent there."""
_ROUTES = Path("/proc/thread-self/net/route")


def fingerprint(salt: bytes) -> str:
    """32 hex digits, the same as long as this machine stays where it is. `salt` keeps others from guessing
    what it was made of."""
    text = "\n".join((*(_local(family, address) for family, address in _ELSEWHERE), _gateway()))
    return hashlib.blake2b(text.encode(), key=salt, digest_size=16).hexdigest()


def _local(family: int, elsewhere: str) -> str:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((elsewhere, 9))
            address = sock.getsockname()[0]
    except OSError:
        return "none"
    if family == socket.AF_INET6:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    return str(address)


def _gateway() -> str:
    """Interface and gateway of the IPv4 default route."""
    try:
        lines = _ROUTES.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return "unknown"
    for line in lines[1:]:
        fields = line.split()
        if len(fields) > 2 and fields[1] == "00000000":
            return f"{fields[0]} {fields[2]}"
    return "none"
