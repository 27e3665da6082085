"""A publisher that moves to a better endpoint, and stops dead at one moment of that: a program.

    python killed_moves.py LOW_URL HIGH_URL FIRST MOMENT self|broker

It publishes numbers from FIRST on at QoS 1, on four topics, and prints "acknowledged FIRST LAST" for those
the broker has. At MOMENT it kills itself, or prints "now", stands still until a line comes in, and goes on
until it is connected by the better endpoint.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from tesaiot_connect import (
    Backoff,
    Client,
    ClientOptions,
    ConnectFailed,
    Connection,
    Duration,
    Message,
    NegotiationOptions,
    Negotiator,
    Url,
)
from tesaiot_connect.client.connection import Live
from tesaiot_connect.client.moving import Mover
from tesaiot_connect.client.ways import Ways
from tesaiot_connect_tcp_tls import TcpTls

TOPICS = 4
_BATCH = 20
_WINDOW = 5
MOMENTS: Mapping[str, tuple[type[Any], str, bool]] = {
    "found": (Mover, "_leave", False),
    "held": (Live, "hold", True),
    "quiet": (Live, "leave", False),
    "left": (Live, "depart", True),
    "gone": (Live, "gone", True),
    "going on": (Ways, "open", False),
    "connecting": (Live, "serve", False),
    "accepted": (Ways, "accepted", True),
}
"""A method that runs then, and whether the moment is behind it."""


class Later:
    """A transport that fails the first time, and then waits until it is `wanted`."""

    schemes: ClassVar[Mapping[str, int]] = {}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    def __init__(self, inner: TcpTls) -> None:
        self._inner = inner
        self.url = inner.url
        self.tried = 0
        self.wanted = asyncio.Event()

    async def connect(self, **how: Any) -> Connection:
        self.tried += 1
        if self.tried == 1:
            raise ConnectFailed("it is off")
        await self.wanted.wait()
        return await self._inner.connect(**how)


def strike_at(moment: str, strike: Callable[[], None], ready: Callable[[], bool]) -> None:
    """`strike` is called once, at the first such moment when `ready`."""
    kind, name, behind = MOMENTS[moment]
    method = getattr(kind, name)

    def struck(*arguments: Any, **keywords: Any) -> Any:
        if not ready():
            return method(*arguments, **keywords)
        if not behind:
            strike()
        result = method(*arguments, **keywords)
        if behind:
            strike()
        return result

    setattr(kind, name, struck)


async def main(low: str, high: str, first: str, moment: str, who: str) -> None:
    better = Later(TcpTls(Url.parse(high)))
    struck = False

    def strike() -> None:
        nonlocal struck
        struck = True
        if who == "self":
            os.kill(os.getpid(), signal.SIGKILL)
        print("now", flush=True)
        sys.stdin.readline()

    def ready() -> bool:
        """A move is under way: the better endpoint was connected to."""
        return better.wanted.is_set() and not struck

    strike_at(moment, strike, ready)
    dialer = Negotiator(
        [better, TcpTls(Url.parse(low))],
        NegotiationOptions(race_delay=Duration(0.0), penalty=Duration(0.05), memory=False),
    )
    options = ClientOptions(
        client_id="publisher", reconnect=Backoff(min=Duration(0.01), max=Duration(0.2)), protocol="5"
    )
    number = int(first)
    async with Client(dialer, options) as client, client.subscribe(["nothing"]):
        publishing: set[asyncio.Task[None]] = set()

        async def publish(start: int) -> None:
            numbers = range(start, start + _BATCH)
            await client.publish([Message(f"kills/{n % TOPICS}", b"%d" % n, 1) for n in numbers])
            print(f"acknowledged {start} {numbers[-1]}", flush=True)
            if start > int(first) + 200:
                better.wanted.set()

        while not (struck and (client.status.state, client.status.url) == ("connected", high)):
            if len(publishing) >= _WINDOW:
                await asyncio.wait(publishing, return_when=asyncio.FIRST_COMPLETED)
                publishing = {one for one in publishing if not one.done()}
            publishing.add(asyncio.create_task(publish(number)))
            number += _BATCH
        await asyncio.wait(publishing)


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 90))
