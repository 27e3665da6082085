"""Verifying passwords without being overrun.

Owns: the threads that compute argon2, who may wait for one, and the memory of logins that were
right. Rules: the event loop never computes a hash; memory is bounded however many clients come;
a remembered login is as good as the hash it was verified with, and no longer.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from tesaiot_connect import Refused

from .users import COST, User

WAITING = 64
"""Logins that may wait or be under way: a few seconds' work even for a Raspberry Pi, so that who
is let in to wait is served before the connection times out."""
REMEMBERED = 10_000
"""Logins, the ones used last; a megabyte or two. As many as a broker's `max_connections` by default."""
_SERVER_BUSY = 0x89

log = logging.getLogger(__name__)


class Verifier:
    """Compares passwords with hashes, half of the machine's cores at most busy with it.

    A login that was right is remembered by a MAC of hash and password under a random key that
    is in memory alone: when a thousand clients come back at once, none of them costs a hash, and
    one whose hash is another now is not remembered.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._waiting = 0
        threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._threads = ThreadPoolExecutor(threads, "password")  # starts one at the first login
        self._salt, self._digest = _base64(16), _base64(32)

    def decoy(self, name: str, users: Mapping[str, User]) -> str:
        """A hash of nothing for a name that nobody has: it costs as much to compare with as the one of
        a user, the same for each attempt, and as one of ours if there are none."""
        cost = COST
        if users:
            number = int.from_bytes(hmac.digest(self._key, name.encode(), "sha256")) % len(users)
            user = next(islice(users.values(), number, None))
            cost = "$".join(user.hash.split("$")[:4])
        return f"{cost}${self._salt}${self._digest}"

    async def verify(self, hashed: str, password: bytes) -> bool:
        """Whether a password is the one of a hash. Raises Refused (server busy) if too many wait, or
        there is no memory to compute it."""
        mark = hmac.digest(self._key, hashed.encode() + b"\0" + password, "sha256")
        if mark in self._right:
            self._right.move_to_end(mark)
            return True
        if self._waiting >= WAITING:
            raise Refused("too many logins at once: try again soon", reason_code=_SERVER_BUSY)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            right = await loop.run_in_executor(self._threads, _matches, hashed, password)
        finally:
            self._waiting -= 1
        if right:
            self._right[mark] = None
            if len(self._right) > REMEMBERED:
                self._right.popitem(last=False)
        return right


def _matches(hashed: str, password: bytes) -> bool:
    from argon2 import PasswordHasher
    from argon2.exceptions import Argon2Error, InvalidHash, VerifyMismatchError

    try:
        return PasswordHasher().verify(hashed, password)
    except VerifyMismatchError:
        return False
    except (Argon2Error, InvalidHash) as error:  # no memory for it, or parameters that argon2 does not take
        log.error("a password cannot be compared with its hash: %s", error)
        raise Refused("the password cannot be verified now", reason_code=_SERVER_BUSY) from None


def _base64(size: int) -> str:
    return base64.b64encode(secrets.token_bytes(size)).decode().rstrip("=")
