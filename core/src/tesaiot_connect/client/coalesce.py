"""When to let a socket fill before it is read again.

Owns: that decision, free of clocks and sockets. Rules (measured): below 50,000 messages a second
a client's cost is wakeups, not parsing, so while small reads follow each other closely a
millisecond of waiting, up to four where that still brings little, saves most of the CPU; but a
sender that stops after a few unacknowledged messages must never be made to wait, and a lone
message is never late.
"""

from __future__ import annotations

_PAUSE = 0.001
_LONGEST = 0.004
_CLOSE = 0.0002
"""Reads closer than this, in seconds, are a stream of messages."""
_ENOUGH = 65_536
"""Bytes in a read that show that waiting gains nothing more."""
_WORTH = 4
"""Messages a millisecond that a pause must bring to have been worth it."""
_PLENTY = 64
"""Messages in a read after a pause for which it need not become longer."""
_WIDE = 40
"""The same, where messages want acknowledgement: more than the 20 or 32 that common brokers
send before they wait, so the window is a large one."""
_PROBE = 256
"""Reads with acknowledgement between two trials whether the window has become large."""


class Coalescer:
    """Ask `pause` after each read; sleep that long, then say `resumed`, before the next.

    Times are seconds of one monotonic clock.
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._paused = False
        self._length = _PAUSE
        self._wide = False
        self._reads = 0

    def pause(self, size: int, messages: int, acknowledged: bool, now: float) -> float:
        """Seconds to wait. `size` in bytes; `acknowledged`: some of the messages want a PUBACK."""
        worth = _WORTH * self._length / _PAUSE
        close = messages >= worth if self._paused else now - self._since < _CLOSE
        self._since = now
        if acknowledged:
            self._reads += 1
            if self._paused or messages >= _WIDE:
                self._wide = messages >= _WIDE
            close = close and (self._wide or self._reads % _PROBE == 0)
        if not (self._paused and close) or acknowledged or messages >= 2 * _PLENTY:
            self._length = _PAUSE
        elif messages < _PLENTY:
            self._length = min(2 * self._length, _LONGEST)
        self._paused = close and size < _ENOUGH
        return self._length if self._paused else 0.0

    def resumed(self, now: float) -> None:
        """Reading goes on: what comes at once from now on is still the same stream."""
        self._since = now
