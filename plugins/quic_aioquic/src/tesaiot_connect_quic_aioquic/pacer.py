"""When a datagram may leave.

Owns: pacing (RFC 9002 section 7.7) and the bound of one flush. Rule: no finer than an event loop
wakes up; a pace that it cannot follow would only spin.
"""

from __future__ import annotations

_BURST = 16
"""Datagrams that may leave at once however low the rate (RFC 9002 section 7.7 allows about ten)."""
TICK = 0.001
"""Seconds: event loops wake up about that often, and a finer timer would only spin."""
_FLUSH = 32
"""Datagrams that are made before those before them go out."""


class Pacer:
    """Spreads what is sent over the round trip, in steps that an event loop can follow, and bounds
    one flush, so that reading and sending take turns.

    The interface is that of aioquic's own, and `begin`.
    """

    def __init__(self, datagram_size: int) -> None:
        self._size = datagram_size
        self._left = _FLUSH
        self._packet_time: float | None = None
        self._credit = 0.0
        self._most = 0.0
        self._since = 0.0

    def begin(self) -> None:
        """A flush begins."""
        self._left = _FLUSH

    def sent(self, size: int) -> None:
        """The flush made so many bytes: small datagrams cost no more than they are."""
        if self._packet_time is not None:
            self._credit += self._packet_time * (_FLUSH - self._left - size / self._size)

    @property
    def exhausted(self) -> bool:
        """Whether the flush ended because it was one: more may go out at once, in another."""
        return self._left <= 0

    def next_send_time(self, now: float) -> float | None:
        if self._left <= 0:
            return now
        if self._packet_time is None:
            return None
        if now > self._since:
            self._credit = min(self._most, self._credit + now - self._since)
            self._since = now
        if self._credit > 0:
            return None
        return now + max(TICK, self._packet_time - self._credit)

    def update_after_send(self, now: float) -> None:
        self._left -= 1
        if self._packet_time is not None:
            self._credit -= self._packet_time

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        # 5/4 of the window a round trip, so that pacing never limits what the window allows
        self._packet_time = self._size * smoothed_rtt / (1.25 * congestion_window)
        self._most = max(_BURST * self._packet_time, 2 * TICK)
