"""What a network does to a client with several ways to its broker, and what becomes of that.

Each `Scenario` is a change of the lab before the client starts, or while it publishes, and what is true
afterwards: the tests assert that, and the benchmark measures how long it takes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from negotiated_ways import QUIC, Trip, World, healed, trip, without_names
from netlab import Lab

from tesaiot_connect import Attempt, ClientStatus, Duration

ALL = ("quic", "mqtts", "wss")
NEVER = Duration(600.0)
"""A head start that nobody outlasts: whoever stands behind runs because the one before has failed."""
SOON = Duration(0.1)
DEFAULT = Duration(300.0)
BACK = Duration(0.3)
"""A penalty for those who wait for its end."""
WATCHFUL = {"path_timeout": 60.0, "keepalive": 1.0}
"""Until the course of a scenario says `watch`."""


def drop(lab: Lab) -> None:
    lab.drop_udp(QUIC)


def reject(lab: Lab) -> None:
    lab.reject_udp(QUIC)


def narrow(lab: Lab) -> None:
    """As with a tunnel that has so small an MTU: its router tells TCP, and cannot tell QUIC."""
    lab.mtu(1100)
    lab._rule("tcp flags syn tcp option maxseg size set 1060")


def cut(lab: Lab) -> None:
    """Nothing gets through, neither UDP nor TCP."""
    lab._fault("meta l4proto { tcp, udp }")


def no_names(lab: Lab) -> None:
    without_names(lab, silent=False)


def silent_names(lab: Lab) -> None:
    without_names(lab, silent=True)


async def udp_dropped(trip: Trip) -> None:
    await trip.change(drop, trip.lab)
    trip.watch()
    await trip.by("mqtts")


async def udp_rejected(trip: Trip) -> None:
    await trip.change(reject, trip.lab)
    trip.watch()
    await trip.by("mqtts")


async def udp_back(trip: Trip) -> None:
    await trip.more()
    await trip.change(trip.lab.heal)
    await trip.by("quic")


async def udp_dropped_and_back(trip: Trip) -> None:
    await udp_dropped(trip)
    await udp_back(trip)


async def narrower(trip: Trip) -> None:
    await trip.change(narrow, trip.lab)
    await trip.more()  # small ones pass
    trip.watch()
    trip.size = 2000
    await trip.by("mqtts")


async def all_dead_and_back(trip: Trip) -> None:
    await trip.change(cut, trip.lab)
    trip.watch()
    await trip.until(lambda: trip.way == "" and all(one.outcome == "failed" for one in trip.status.attempts))
    await trip.change(trip.lab.heal)
    await trip.by("quic")


async def address_moved(trip: Trip) -> None:
    await trip.change(trip.lab.move_client)


async def address_moved_over_tls(trip: Trip) -> None:
    await trip.change(trip.lab.move_client)
    await trip.until(lambda: trip.status.connects == 2)


async def nat_rebound(trip: Trip) -> None:
    await trip.change(trip.lab.rebind_nat)


@attrs.frozen
class Scenario:
    name: str
    first: str
    """The scheme of the endpoint by which the first message went."""
    tried: str
    """Outcomes of that dial, in the order of the starts, up to the winner's."""
    ways: tuple[str, ...] = ALL
    before: Callable[[Lab], None] | None = None
    course: Callable[[Trip], Awaitable[None]] | None = None
    """What happens while messages go; it returns when the client has got over it."""
    last: str = ""
    """The scheme at the end, where it is another one; or several, where that does not matter."""
    connects: tuple[int, ...] = (1,)
    """How many connections that takes, in all."""
    moves: int = 0
    reason: str = ""
    """What is said of the first failure."""
    race_delay: Duration = NEVER
    penalty: Duration = DEFAULT
    timeout: float = 10.0
    quic: Mapping[str, Any] = attrs.field(factory=dict)
    tcp: Mapping[str, Any] = attrs.field(factory=dict)
    client: Mapping[str, Any] = attrs.field(factory=dict)


SCENARIOS = (
    Scenario("everything open", "quic", "won"),
    Scenario("UDP dropped", "mqtts", "lost won", before=drop, race_delay=SOON),
    Scenario("UDP rejected", "mqtts", "failed won", before=reject, reason="nothing listens on that UDP port"),
    Scenario(
        "UDP dropped after connect",
        *("quic", "won"),
        course=udp_dropped,
        last="mqtts",
        connects=(2,),
        quic=WATCHFUL,
    ),
    Scenario(
        "UDP rejected after connect",
        *("quic", "won"),
        course=udp_rejected,
        last="mqtts",
        connects=(2,),
        quic=WATCHFUL,
    ),
    Scenario(
        "UDP back after a while",
        *("mqtts", "lost won"),
        before=drop,
        course=udp_back,
        last="quic",
        connects=(2,),
        moves=1,
        race_delay=SOON,
        penalty=BACK,
    ),
    Scenario(
        "UDP dropped after connect, then back",
        *("quic", "won"),
        course=udp_dropped_and_back,
        last="quic",
        connects=(3,),
        moves=1,
        penalty=BACK,
        quic=WATCHFUL,
    ),
    Scenario("an MTU of 1100", "mqtts", "lost won", before=narrow, race_delay=SOON),
    Scenario(
        "an MTU of 1100 after connect",
        *("quic", "won"),
        course=narrower,
        last="mqtts",
        connects=(2,),
        quic=WATCHFUL,
    ),
    Scenario(
        "TCP and UDP dead, then back",
        *("quic", "won"),
        course=all_dead_and_back,
        last="quic",
        connects=(2, 3),  # whichever comes back first
        penalty=BACK,
        timeout=1.0,
        quic=WATCHFUL,
    ),
    Scenario(
        "DNS fails for one endpoint",
        *("mqtts", "failed won"),
        ways=("quic without a name", "mqtts", "wss"),
        before=no_names,
        reason="no-such-host.invalid",
    ),
    Scenario(
        "DNS is silent for one endpoint",
        *("mqtts", "lost won"),
        ways=("quic without a name", "mqtts", "wss"),
        before=silent_names,
        race_delay=SOON,
    ),
    Scenario(
        "a server with another ALPN",
        *("mqtts", "failed won"),
        ways=("quic that speaks h3", "mqtts", "wss"),
        reason="ALPN",
    ),
    Scenario(
        "UDP dropped, and a proxy that accepts TCP and stalls",
        *("wss", "lost lost won"),
        ways=("quic", "mqtts that stalls", "wss"),
        before=drop,
        race_delay=SOON,
    ),
    Scenario(
        "a proxy that stalls behind the TLS handshake",
        *("wss", "won"),  # the second dial, once nobody has answered the CONNECT of the first
        ways=("mqtts that falls silent", "wss"),
        client={"connect_timeout": 3.0},
    ),
    Scenario(
        "TLS of another authority",
        *("wss", "failed won"),
        ways=("mqtts distrusted", "wss"),
        reason="not from a trusted authority",
    ),
    Scenario(
        "QUIC of another authority",
        *("mqtts", "failed won"),
        ways=("quic distrusted", "mqtts", "wss"),
        reason="not from a trusted authority",
    ),
    Scenario("address moved", "quic", "won", course=address_moved),
    Scenario("NAT rebound", "quic", "won", course=nat_rebound),
    Scenario(
        "address moved, over TLS",
        *("mqtts", "won"),
        ways=("mqtts", "wss"),
        course=address_moved_over_tls,
        last="mqtts wss",
        connects=(2,),
        tcp={"keepalive_idle": 1.0, "keepalive_interval": 1.0, "keepalive_count": 1},
    ),
)


@attrs.frozen
class Outcome:
    first: ClientStatus
    """When the first message was acknowledged."""
    seconds: float
    """Until then."""
    last: ClientStatus
    """While messages went still."""
    accepted: tuple[str, ...]
    """Transports of the CONNECTs that the broker took."""
    sent: int
    lost: int
    twice: int
    gap: float
    """The longest time between two acknowledgements, in seconds."""

    @property
    def tried(self) -> str:
        """Outcomes of the first dial, up to the winner's."""
        words = [one.outcome for one in self.first.attempts]
        return " ".join(words[: words.index("won") + 1])

    @property
    def failed(self) -> Attempt | None:
        return next((one for one in self.first.attempts if one.outcome == "failed"), None)

    def check(self, scenario: Scenario) -> None:
        first, last = scheme(self.first.url), scheme(self.last.url)
        assert self.lost == 0
        assert (first, self.tried) == (scenario.first, scenario.tried)
        assert self.failed is None or scenario.reason in self.failed.reason
        assert last in (scenario.last or scenario.first).split()
        assert self.last.moves == scenario.moves
        assert self.last.connects in scenario.connects
        assert len(self.accepted) == self.last.connects, "one CONNECT for each connection, and no other"
        assert (self.last.better_after is None) == scenario.ways[0].startswith(last)


def scheme(url: str) -> str:
    return url.partition(":")[0]


async def travel(
    world: World, scenario: Scenario, folder: Path, *, race_delay: Duration | None = None
) -> Outcome:
    """Runs it once. `race_delay` in place of its own: to measure, not to be sure."""
    try:
        if scenario.before is not None:
            scenario.before(world.lab)
        dialer = world.dialer(
            folder,
            scenario.ways,
            timeout=scenario.timeout,
            quic=scenario.quic,
            tcp=scenario.tcp,
            race_delay=scenario.race_delay if race_delay is None else race_delay,
            penalty=scenario.penalty,
        )
        async with trip(world, dialer, **scenario.client) as made:
            await made.more()
            if scenario.course is not None:
                await scenario.course(made)
            await made.more()
            last = made.status
    finally:
        healed(world.lab)
    assert made.first is not None
    got = world.got[made.client_id]
    return Outcome(
        first=made.first,
        seconds=made.times[0] - made.began,
        last=last,
        accepted=tuple(world.accepted(made.client_id)),
        sent=made.sent,
        lost=len(made.missing),
        twice=len(got) - len(set(got)),
        gap=made.gap(),
    )
