"""The data streams of one connection: which lane is on which stream.

Owns: opening them, and the task of each. Rules: a stream is opened when its lane is first needed,
never before CONNACK; what happens to one happens to no other; a lane whose stream the broker does
not let live goes to the control stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import ConnectorError
from ..mqtt.client import ClientEngine
from ..protocols import ByteStream, Connection, State
from .placement import Placement

log = logging.getLogger(__name__)

_OPENING = 5.0
"""Seconds that opening a stream may take: where the broker's limit is reached, it waits."""
_TRIES = 3
_TRIES_HEARD = 20
"""Streams of one lane that may be lost in a row, each soon: the second where it brought something."""
_LASTED = 5.0
"""Seconds after which a stream was not lost soon."""


class Channel:
    """A stream by the engine's number; 0 is the control stream."""

    def __init__(self, number: int, stream: ByteStream) -> None:
        self.number = number
        self.stream = stream
        self.wake = asyncio.Event()
        """There may be something to write."""
        self.ending = False
        """Nothing will be added: end the sending side once all is written."""
        self.heard = False
        """The broker has sent something on it."""
        self.since = asyncio.get_running_loop().time()


class DataStreams:
    """`serve` reads and writes a channel until its end; `changed` is called when a lane has got
    its stream, or was given up; `broken` with an error that should not be."""

    def __init__(
        self,
        name: str,
        connection: Connection,
        engine: ClientEngine,
        placement: Placement,
        *,
        serve: Callable[[Channel], Coroutine[Any, Any, None]],
        changed: Callable[[], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self.channels: dict[int, Channel] = {}
        self._name = name
        self._connection = connection
        self._engine = engine
        self._placement = placement
        self._serve = serve
        self._changed = changed
        self._broken = broken
        self._numbers: dict[int, int | None] = {0: 0}
        """Lane to stream; None while that is being opened."""
        self._lanes: dict[int, int] = {}
        """Stream to lane, until the stream is lost."""
        self._lost: dict[int, int] = {}
        """Lane to streams lost in a row, each soon."""
        self._last = 0
        self._refused = False
        self._told = False
        self._over = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self._lanes)

    def number(self, lane: int) -> int | None:
        """The stream to use for a lane. None: it is being opened, ask again when `changed`."""
        if self._over and lane:
            return None
        if lane not in self._numbers:
            if self._refused:
                self._numbers[lane] = 0
                return 0
            self._numbers[lane] = None
            task = asyncio.create_task(self._run(lane), name=f"MQTT stream of lane {lane}")
            self._tasks.add(task)
            task.add_done_callback(self._done)
        return self._numbers[lane]

    def lost(self, number: int) -> int:
        """The engine has lost this stream. Gives its lane, which may be opened again."""
        lane = self._lanes.pop(number)
        del self._numbers[lane]
        channel = self.channels.get(number)
        if channel is not None and not channel.ending and self._open:
            lasted = asyncio.get_running_loop().time() - channel.since > _LASTED
            lost = self._lost[lane] = 0 if lasted else self._lost.get(lane, 0) + 1
            if lost >= (_TRIES_HEARD if channel.heard else _TRIES):
                self._give_up(lane, f"{lost} streams in a row ended at once")
        return lane

    async def finish(self, seconds: float) -> None:
        """Ends them in order: the broker has read all of them then, if that takes no longer."""
        self._over = True
        for channel in self.channels.values():
            channel.ending = True
            channel.wake.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def aclose(self) -> None:
        """Ends their tasks."""
        self._over = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    @property
    def _open(self) -> bool:
        return not self._over and self._connection.status().state is State.OPEN

    async def _run(self, lane: int) -> None:
        """A stream of that lane, from its opening to its end."""
        try:
            async with asyncio.timeout(_OPENING):
                stream = await self._connection.open_stream(priority=self._placement.priority(lane))
        except (ConnectorError, TimeoutError) as error:
            del self._numbers[lane]
            if self._open:
                self._refused = True
                self._give_up(lane, str(error) or f"none could be opened within {_OPENING:g} s")
                self._changed()
            return
        number = self._last = self._last + 1
        channel = Channel(number, stream)
        try:
            if self._over:
                return
            self.channels[number] = channel
            self._lanes[number] = lane
            self._numbers[lane] = number
            self._engine.stream_opened(number, now=asyncio.get_running_loop().time())
            self._changed()
            await self._serve(channel)
        finally:
            stream.abort()
            self.channels.pop(number, None)
            self._engine.take(number)  # nobody is left to write it

    def _give_up(self, lane: int, why: str) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "%s: the broker allows fewer streams than `streams` asks for (stream %s: %s); it goes on "
                "without, on the control stream. Lower `max_streams`, or raise the broker's limit",
                self._name,
                self._placement.name(lane),
                why,
            )
        self._numbers[lane] = 0

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken(error)
