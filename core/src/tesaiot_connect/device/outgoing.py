"""What a device client has to publish, until the broker has it.

Owns: the messages between the callers' threads and the portal's, and how each of them ended. Rules:
what waits is bounded, in messages and in bytes; every message ends, published or with an error.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from ..errors import ConnectorError, Disconnected
from ..message import Message

_MAX_BYTES = 8 * 1024 * 1024


class Publication:
    """A message on its way to the broker. `mid` is its number, as `on_publish` is told it."""

    __slots__ = ("_outgoing", "done", "error", "message", "mid")

    def __init__(self, message: Message, mid: int, outgoing: Outgoing) -> None:
        self.message = message
        self.mid = mid
        self.done = False
        self.error: ConnectorError | None = None
        self._outgoing = outgoing

    def is_published(self) -> bool:
        """Whether the broker has it (QoS 0: whether it was written)."""
        return self.done and self.error is None

    def wait_for_publish(self, timeout: float | None = None) -> None:
        """Returns when the broker has it (QoS 0: when it was written).

        Raises PublishRefused when the broker does not take it, Disconnected when the client was
        closed first, and after `timeout` seconds; then it is kept, and sent later.
        """
        self._outgoing.wait(self, timeout)


class Outgoing:
    """Its methods are for every thread."""

    def __init__(
        self, name: str, *, max_messages: int, inside: Callable[[], bool], because: Callable[[], str]
    ) -> None:
        """`inside`: whether this is the thread that publishes, which must not wait. `because`: why there
        is no connection, as the end of a sentence."""
        self._name = name
        self._max_messages = max_messages
        self._inside = inside
        self._because = because
        self._changed = threading.Condition()
        """Guards what follows; told of when messages ended, and when no more are taken."""
        self._last = 0
        self._held: dict[int, Publication] = {}
        """By `mid`: what has not ended."""
        self._bytes = 0
        self._unsent: deque[Publication] = deque()
        self._closed = False
        self.lost = 0
        """Messages that nobody will publish any more."""

    def add(self, message: Message, timeout: float | None) -> tuple[Publication, bool]:
        """Also says whether `take` has to be called. At the limit it waits for room, for `timeout`
        seconds at most, and not at all in the thread that publishes. Raises Disconnected."""
        size = _size(message)
        inside = self._inside()

        def room() -> bool:
            fits = len(self._held) < self._max_messages and self._bytes + size <= _MAX_BYTES
            return fits or not self._held or self._closed

        with self._changed:
            if not room() and (inside or not self._changed.wait_for(room, timeout)):
                raise Disconnected(
                    f"{self._name}: {len(self._held)} messages of {self._bytes} bytes wait already"
                    + self._because(),
                    fix="publish less, allow more time, or raise `max_waiting`",
                )
            if self._closed and not inside:  # a callback may still answer while the session ends
                raise Disconnected(f"{self._name} is disconnected", fix="call connect() first")
            self._last += 1
            publication = Publication(message, self._last, self)
            self._held[publication.mid] = publication
            self._bytes += size
            self._unsent.append(publication)
            return publication, len(self._unsent) == 1

    def take(self) -> list[Publication]:
        """What was added since."""
        with self._changed:
            batch = list(self._unsent)
            self._unsent.clear()
        return batch

    def settle(self, batch: Sequence[Publication], errors: Mapping[int, BaseException]) -> None:
        """How they ended: with an error for some positions in `batch`. What ended before stays so."""
        with self._changed:
            for index, publication in enumerate(batch):
                if self._held.pop(publication.mid, None) is None:
                    continue
                error = errors.get(index)
                if error is not None and not isinstance(error, ConnectorError):
                    error = ConnectorError(f"this message could not be published: {error!r}")
                publication.error = error
                publication.done = True
                self._bytes -= _size(publication.message)
                self.lost += isinstance(error, Disconnected)
            self._changed.notify_all()

    def close(self) -> None:
        """From now on nothing is taken from other threads."""
        self._closed = True
        if not self.interrupted:
            with self._changed:
                self._changed.notify_all()

    def give_up(self) -> None:
        """What has not ended is lost."""
        self.close()
        with self._changed:
            left = list(self._held.values())
            self._unsent.clear()
        closed = Disconnected(f"{self._name} was disconnected before this message was published")
        self.settle(left, dict.fromkeys(range(len(left)), closed))

    def wait(self, publication: Publication, timeout: float | None) -> None:
        if not publication.done and self._inside():
            raise ConnectorError(
                "a callback cannot wait for a message: it runs in the thread that publishes",
                fix="set on_publish, or wait outside of callbacks",
            )
        with self._changed:
            if not self._changed.wait_for(lambda: publication.done, timeout):
                raise Disconnected(
                    f"the broker has not acknowledged a message on {publication.message.topic} within "
                    f"{timeout:g} s{self._because()}",
                    fix="it is kept and goes out as soon as possible: do not publish it again",
                )
        if publication.error is not None:
            raise publication.error

    @property
    def interrupted(self) -> bool:
        """Whether this is a signal handler that came in the middle of a call here, which the thread that
        publishes may be waiting for."""
        return bool(self._changed._is_owned())  # type: ignore[attr-defined]

    def __len__(self) -> int:
        """Messages that have not ended."""
        return len(self._held)


def _size(message: Message) -> int:
    return len(message.payload) + len(message.topic)
