"""One stream of a client's connection, as the broker uses it.

Owns: what waits to be written on it, and the count of what it brought that is not safe yet. Rule:
each stream waits for itself alone; one whose peer does not read holds back no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..errors import Disconnected
from ..protocols import ByteStream


class ClientStream:
    """A stream and its way out. `number` is 0 for the control stream."""

    def __init__(self, number: int, stream: ByteStream) -> None:
        self.number = number
        self.receive = stream.receive
        self.size = 0
        """Bytes that wait to be written."""
        self.unsettled = 0
        """QoS 1 and 2 messages it brought that are not safe yet."""
        self.ending = False
        """Nothing more may begin on it."""
        self.idle = asyncio.Event()
        """Everything was written."""
        self.idle.set()
        self.room = asyncio.Event()
        """Set whenever `size` or `unsettled` shrank, or it ends."""
        self._stream = stream
        self._chunks: list[bytes] = []
        self._fin = False
        self._over = False
        self._work = asyncio.Event()
        self._cut: asyncio.TimerHandle | None = None

    def add(self, data: bytes, *, fin: bool) -> None:
        """Write this, and then end the stream if `fin`."""
        if self._over:
            return
        if data and not self._fin:
            self._chunks.append(data)
            self.size += len(data)
        self._fin = self._fin or fin
        self.ending = self.ending or fin
        self._work.set()
        self.idle.clear()

    def abort(self, code: int = 0) -> None:
        """End it at once; both its tasks notice. Idempotent."""
        self._discard()
        self._stream.abort(code)

    def abort_after(self, seconds: float) -> None:
        """End it then, if it has not ended by itself. The first call counts."""
        if self._cut is None:
            self._cut = asyncio.get_running_loop().call_later(seconds, self.abort)

    async def wait_while(self, held: Callable[[], bool]) -> None:
        while held():
            self.room.clear()
            await self.room.wait()

    def forget(self) -> None:
        """Both tasks are done with it."""
        if self._cut is not None:
            self._cut.cancel()

    async def write(self, wrote: Callable[[], None]) -> None:
        """Write what is added until the stream ends; `wrote` is called when there is room.

        Raises Disconnected when the peer takes nothing any more. What is added then is thrown
        away; what the peer sent may still be read.
        """
        try:
            while not self._over:
                await self._work.wait()
                self._work.clear()
                while self._chunks:
                    data = b"".join(self._chunks)
                    self._chunks.clear()
                    await self._stream.send(data)
                    self.size = max(0, self.size - len(data))
                    wrote()
                    self.room.set()
                if self._fin:
                    await self._stream.aclose()
                    return
                self.idle.set()
        except Disconnected:
            if not self._over:  # not by `abort`
                raise
        finally:
            self._discard()

    def _discard(self) -> None:
        self._over = self.ending = True
        self._chunks.clear()
        self.size = 0
        self.idle.set()
        self.room.set()
        self._work.set()
