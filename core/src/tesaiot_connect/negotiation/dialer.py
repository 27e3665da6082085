"""Which endpoint a connection uses, and when there is a better one.

Owns: the order of the attempts, what is learned of them, and the search for a better way. Rule: it knows
transports by their contract alone, so every transport plugin takes part on equal terms.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence

from ..dialing import Attempt, Dialed
from ..errors import ConnectFailed, ConnectorError, Refused, Unsupported
from ..protocols import ClientCertificate, Connection, LazyTransport, Transport, Url
from . import memory
from .memory import Kind, Outlook, Record
from .options import NegotiationOptions
from .race import Lane, Race
from .store import Store, default_folder
from .track import Track

log = logging.getLogger(__name__)

_Failure = tuple[Kind, str]
"""What counts against an endpoint, and the words for it."""
_LOOK = 30.0
"""Seconds between two looks at the clock and the network while a penalty lasts."""
_PAUSE = 1.0
"""Least seconds between two attempts at a better way, should neither memory nor clock hold them apart."""


class Negotiator:
    """A `Dialer` over several endpoints, in order of preference; clients may share one.

    `timeout` bounds each attempt, in seconds; None leaves it to the transports. `left_out` are endpoints that
    cannot take part from the start, for the status of who asks. `clock` gives seconds since the epoch. Raises
    ValueError without endpoints, TypeError for one that does not keep the contract of `Transport`.

    What it learns it keeps on disk, which it reads and writes when it dials; one endpoint needs no memory.
    """

    def __init__(
        self,
        endpoints: Sequence[Transport],
        options: NegotiationOptions | None = None,
        *,
        timeout: float | None = 10.0,
        left_out: Sequence[Attempt] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not endpoints:
            raise ValueError("a connection needs at least one endpoint")
        for endpoint in endpoints:
            _check(endpoint)
        self.endpoints = tuple(endpoints)
        self.options = options or NegotiationOptions()
        self.timeout = timeout
        self.left_out = tuple(left_out)
        self._names = tuple(_name(endpoint) for endpoint in endpoints)
        self._keys = tuple(f"{type(one).__qualname__} {_whole_name(one)}" for one in endpoints)
        """Under which they are remembered: one URL may have several implementations."""
        self._clock = clock
        folder = self.options.memory_folder or default_folder()
        self._store = Store(folder if self.options.memory else None)
        self._network = ""
        self._known = [memory.UNKNOWN] * len(self.endpoints)
        """What the last look at the memory of `_network` gave."""
        self._suspects: dict[int, ConnectorError] = {}
        """Places whose connection was lost, and how: until a race has told more, on the same network."""
        self._unable: frozenset[int] = frozenset()
        """Places that are left out for what they said of themselves."""
        self._stragglers: set[asyncio.Task[Connection]] = set()

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """Raises ConnectFailed with the reason of every endpoint tried, or Refused where each
        of them refused for good."""
        return (await self.dial(identity=identity, early=early)).connection

    async def dial(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Dialed:
        """As `connect`; the error has what was tried in its `attempts`."""
        before = self._network
        self._recall()
        network, records, now = self._network, self._known, self._clock()
        if network != before:  # whoever moves to another network loses what went over the old one
            self._suspects.clear()
        suspects = dict(self._suspects)
        places = memory.order(records, now, suspects)
        # early data to one alone, and only where nobody else is likely to win
        first, delay = places[0], self.options.race_delay
        favourite = len(places) == 1 or (first not in suspects and memory.trusted(records[first], now, delay))
        race, track = self._track(places, identity, early if favourite else b"")
        if len(places) > 1 and isinstance(favoured := self.endpoints[first], LazyTransport):
            favoured.load()  # before its head start begins
        connection = await track.run()
        for place, error in suspects.items():
            if self._suspects.get(place) is error:
                del self._suspects[place]
        self._unable = frozenset(
            places[lane] for lane, error in track.errors.items() if isinstance(error, Unsupported)
        )
        attempts = (*track.attempts, *self.left_out)
        if connection is None or race.winner is None:
            raise _failure(attempts, list(track.errors.values()))
        winner = places[race.winner]
        beaten = _beaten(race, track, places)
        beaten |= {place: ("lost", error.what) for place, error in suspects.items() if place != winner}
        won = track.attempt(race.winner)
        assert won is not None
        for lane, place in enumerate(places):
            if place < winner and track.attempt(lane) is None and (why := memory.reason(records[place], now)):
                log.info("%s was not tried, because %s", self._names[place], why)
        self._learn(network, beaten, {winner: won.seconds})
        return Dialed(connection, self._names[winner], winner, attempts)

    def lost(self, dialed: Dialed, error: ConnectorError) -> None:
        """It counts against the endpoint if another one works in the next race."""
        if len(self.endpoints) > 1:
            self._suspects[dialed.place] = error

    def better_after(self, than: Dialed) -> float | None:
        """By what is known already: asks neither the disk nor the network."""
        return min((due for _, due in self._better(than)), default=None)

    def outlook(self) -> list[Outlook]:
        """What is remembered, read anew, in the order in which a race would start the endpoints."""
        self._recall()
        now, delay = self._clock(), self.options.race_delay
        return [
            memory.outlook(
                self._known[place],
                now,
                place=place,
                turn=turn,
                delay=delay,
                alone=not self.endpoints[place].races,
            )
            for turn, place in enumerate(memory.order(self._known, now, self._suspects))
        ]

    async def better(self, than: Dialed, *, identity: ClientCertificate | None = None) -> Dialed:
        """Never returns where `upgrade` is off or nothing is preferred."""
        while True:
            place = await self._next_better(than)
            network, name = self._network, self._names[place]
            _, track = self._track([place], identity, b"")
            connection = await track.run()
            attempt, error = track.attempt(0), track.errors.get(0)
            if connection is not None and attempt is not None:
                self._learn(network, {}, {place: attempt.seconds})
                return Dialed(connection, name, place, (attempt, *self.left_out))
            if isinstance(error, Unsupported):
                log.info("%s is left out: %s", name, error)
                self._unable |= {place}
                continue
            self._learn(network, {place: ("failed", error.what if error is not None else "given up")}, {})
            await asyncio.sleep(min(_PAUSE, self.options.penalty))

    def _better(self, than: Dialed) -> list[tuple[int, float]]:
        """Places that are preferred and can prove themselves, and when each is due."""
        if not self.options.upgrade:
            return []
        now = self._clock()
        return [
            (place, record.penalty_until if memory.penalised(record, now) else now)
            for place, record in enumerate(self._known[: than.place])
            if self.endpoints[place].races and place not in self._unable | than.barred
        ]

    async def _next_better(self, than: Dialed) -> int:
        """The place whose turn it is, when it is; it may be never."""
        while self._better(than):
            self._recall()
            place, due = min(self._better(than), key=lambda way: (way[1], way[0]))
            if due <= self._clock():
                return place
            # a look at the disk is for those who dial: until then, clock and network will do
            while self._store.network() == self._network:
                record, now = self._known[place], self._clock()
                if not memory.penalised(record, now):
                    break
                await asyncio.sleep(min(record.penalty_until - now, _LOOK))
        await asyncio.Event().wait()
        raise AssertionError  # it is never set

    # --- attempts -----------------------------------------------------------------------------

    def _track(
        self, places: Sequence[int], identity: ClientCertificate | None, early: bytes
    ) -> tuple[Race, Track]:
        """`early` goes to the first."""

        async def begin(lane: int) -> Connection:
            return await self._attempt(places[lane], identity, b"" if lane else early)

        race = Race([self._lane(place) for place in places])
        return race, Track(race, [self._names[place] for place in places], begin, self._stragglers)

    def _lane(self, place: int) -> Lane:
        delay = memory.head_start(self._known[place], self.options.race_delay)
        return Lane(delay, alone=not self.endpoints[place].races)

    async def _attempt(self, place: int, identity: ClientCertificate | None, early: bytes) -> Connection:
        """Raises ConnectorError; what is none is logged and translated."""
        name = self._names[place]
        try:
            async with asyncio.timeout(self.timeout) as deadline:
                return await self.endpoints[place].connect(identity=identity, early=early)
        except ConnectorError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                raise ConnectFailed(
                    f"{name} gave no connection within {self.timeout:g} s",
                    fix="check that a broker listens there and that no firewall drops the packets",
                ) from error
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                raise
            log.exception("the transport of %s failed in an unexpected way", name)
            raise ConnectFailed(f"{name} failed in an unexpected way: {error!r}") from error

    # --- what is learned ----------------------------------------------------------------------

    def _recall(self) -> None:
        """Where this machine is, and what is remembered of each endpoint there."""
        if len(self.endpoints) > 1:
            self._network = self._store.network()
            self._known = [self._store.read(key, self._network) for key in self._keys]

    def _learn(self, network: str, failed: Mapping[int, _Failure], worked: Mapping[int, float]) -> None:
        """Of places, why they failed and how many seconds they took, when that began on `network`."""
        if len(self.endpoints) == 1:
            return
        self._recall()  # others have learned too meanwhile
        if self._network != network:
            return  # it tells of a move, not of an endpoint
        now = self._clock()
        for place, (kind, reason) in failed.items():
            luck = random.random()  # noqa: S311 - no secret
            penalty = self.options.penalty
            record = memory.after_failure(self._known[place], now, kind, penalty=penalty, luck=luck)
            if record is not self._known[place]:
                self._write(place, record)
                wait = record.penalty_until - now
                log.info("%s is not tried first for the next %.0f s: %s", self._names[place], wait, reason)
        for place, seconds in worked.items():
            self._write(place, memory.after_success(self._known[place], now, seconds))

    def _write(self, place: int, record: Record) -> None:
        self._known[place] = record
        self._store.write(self._keys[place], self._network, record)


def _beaten(race: Race, track: Track, places: Sequence[int]) -> dict[int, _Failure]:
    """Places that the race speaks against, and why: those that failed, and those that were outrun."""
    found: dict[int, _Failure] = {}
    for lane, place in enumerate(places):
        attempt = track.attempt(lane)
        if attempt is None:
            continue
        if attempt.outcome == "failed":
            found[place] = "failed", attempt.reason
        elif lane in race.outrun and attempt.outcome == "lost":
            reason = f"no answer within {attempt.seconds:.1f} s, when another endpoint had answered"
            found[place] = "unanswered", reason
    return found


def _failure(attempts: Sequence[Attempt], errors: Sequence[ConnectorError]) -> ConnectorError:
    took_part = [error for error in errors if not isinstance(error, Unsupported)]
    if len(errors) == 1:
        failure = errors[0]
    elif took_part and all(isinstance(error, Refused) and error.permanent for error in took_part):
        failure = took_part[0]
    else:
        tried = [attempt for attempt in attempts if attempt.began]
        reasons = "; ".join(f"({number}) {_told(attempt)}" for number, attempt in enumerate(tried, 1))
        fixes = dict.fromkeys(error.fix for error in errors if error.fix)
        failure = ConnectFailed(f"no endpoint gave a connection: {reasons}", fix="; ".join(fixes))
        failure.__cause__ = errors[-1] if errors else None
    failure.attempts = tuple(attempts)
    return failure


def _told(attempt: Attempt) -> str:
    """Most reasons name their endpoint themselves."""
    named = attempt.reason.startswith(attempt.endpoint)
    return attempt.reason if named else f"{attempt.endpoint}: {attempt.reason}"


def _check(endpoint: Transport) -> None:
    """Before a client finds out, which would try again for ever."""
    found: object = endpoint
    if isinstance(found, type) or not callable(getattr(found, "connect", None)):
        raise TypeError(f"{found!r} is no transport: give a recipe, for example TcpTls(Url.parse(...))")
    if not isinstance(getattr(found, "races", None), bool):
        raise TypeError(
            f"the transport {type(found).__name__} lacks `races`: True where `connect` proves a handshake, "
            "False where it has to be tried alone"
        )


def _name(endpoint: Transport) -> str:
    url = getattr(endpoint, "url", None)
    return str(url) if url is not None else type(endpoint).__name__


def _whole_name(endpoint: Transport) -> str:
    """With what a URL does not show."""
    url = getattr(endpoint, "url", None)
    return url.reveal() if isinstance(url, Url) else _name(endpoint)
