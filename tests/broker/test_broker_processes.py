"""Our broker as a process of its own: what a stop or a kill leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import pytest
from engine_peer import EnginePeer
from real_brokers import free_port, until_listening

from tesaiot_connect.errors import Disconnected
from tesaiot_connect.message import Message
from tesaiot_connect.mqtt.events import Closed, Connected
from tesaiot_connect.mqtt.session import Session
from tesaiot_connect.protocols import Url
from tesaiot_connect_tcp_tls import TcpTls

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "broker.toml"


class Served:
    """`tesaiot-connect serve` on the shipped example; `start`, `stop` and `kill` may alternate."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.port = free_port()
        self.log = folder / "broker.log"
        self._settings = [f"listeners.tcp.port={self.port}", *settings]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def transport(self) -> TcpTls:
        return TcpTls(Url.parse(f"mqtt://127.0.0.1:{self.port}"))

    def start(self) -> None:
        command = [sys.executable, "-m", "tesaiot_connect", "serve", str(EXAMPLE)]
        for setting in self._settings:
            command += ["--set", setting]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until_listening(self.port, self._process, self.log)

    def end(self, how: int) -> int:
        process, self._process = self._process, None
        assert process is not None
        process.send_signal(how)
        return process.wait(20)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.end(signal.SIGKILL)


async def connected(served: Served, client_id: str, session: Session, *, clean: bool) -> EnginePeer:
    """Tries until the broker is there."""
    while True:
        try:
            peer = await EnginePeer.open(
                served.transport, client_id, expiry=1000, clean=clean, session=session
            )
        except Disconnected:
            await asyncio.sleep(0.02)
            continue
        while not any(isinstance(event, Connected | Closed) for event in peer.events):
            await peer.read()
        if isinstance(peer.events[0], Connected):
            return peer
        peer.connection.abort()


async def publish_all(served: Served, count: int, qos: int, acknowledged: list[int]) -> None:
    """Publishes 0..count-1, over as many connections as it takes, in one session."""
    session = Session()
    peer = await connected(served, "writer", session, clean=True)
    done: set[int] = set()
    following = 0
    while len(done) < count:
        try:
            keys = list(range(following, min(count, following + 50)))
            messages = [Message("t", str(key).encode(), qos) for key in keys]
            following += peer.engine.publish(messages, keys)
            await peer.flush()
            if any(isinstance(event, Closed) for event in peer.events):
                raise Disconnected("the broker went")
            await peer.read()
        except Disconnected:
            pass
        done.update(peer.acknowledged)
        acknowledged[:] = done
        if any(isinstance(event, Closed) for event in peer.events) or peer.connection.status().close_reason:
            await peer.connection.aclose()
            known = {item.key for item in session.outbound.values()}
            peer = await connected(served, "writer", session, clean=False)
            assert peer.engine.connack is not None
            if not peer.engine.connack.session_present and qos == 2:
                raise AssertionError(f"the session was lost with {len(known)} in flight")
    await peer.disconnect()


async def collect(served: Served, session: Session, count: int, *, clean: bool) -> list[int]:
    peer = await connected(served, "reader", session, clean=clean)
    got: list[int] = []
    while len(set(got)) < count:
        await peer.read()
        got += [int(message.payload) for message in peer.messages]
        peer.messages.clear()
        if any(isinstance(event, Closed) for event in peer.events):
            await peer.connection.aclose()
            peer = await connected(served, "reader", session, clean=False)
    await peer.disconnect()
    return got


async def subscribe(served: Served, session: Session) -> None:
    peer = await connected(served, "reader", session, clean=True)
    assert await peer.subscribe("t", qos=2) == (2,)
    await peer.disconnect()


@contextlib.asynccontextmanager
async def restarting(served: Served, how: int, acknowledged: list[int]) -> AsyncIterator[None]:
    """Meanwhile ends and starts the broker each time a few hundred more are acknowledged."""
    given_up = threading.Event()

    def restart() -> None:
        for mark in (500, 1400, 2500):
            while len(acknowledged) < mark:
                if given_up.wait(0.001):
                    return
            code = served.end(how)
            assert code == (0 if how == signal.SIGTERM else -how)
            served.start()

    thread = asyncio.create_task(asyncio.to_thread(restart))
    try:
        yield
    finally:
        given_up.set()
        await thread


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("synchronous", ["full", "normal"])
def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path, synchronous: str) -> None:
    count, session, acknowledged = 3000, Session(), list[int]()

    async def main(served: Served) -> list[int]:
        async with asyncio.timeout(120):
            await subscribe(served, session)
            async with restarting(served, signal.SIGKILL, acknowledged):
                await publish_all(served, count, 1, acknowledged)
            return await collect(served, session, count, clean=False)

    settings = (f"broker.state_file={tmp_path / 'state.db'}", f"broker.synchronous={synchronous}")
    with Served(tmp_path, *settings) as served:
        got = asyncio.run(main(served))
    assert set(got) == set(range(count))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_qos_2_is_exactly_once_while_the_broker_restarts(tmp_path: Path) -> None:
    count, session, acknowledged = 3000, Session(), list[int]()

    async def main(served: Served) -> list[int]:
        async with asyncio.timeout(120):
            await subscribe(served, session)
            async with restarting(served, signal.SIGTERM, acknowledged):
                got, _ = await asyncio.gather(
                    collect(served, session, count, clean=False),
                    publish_all(served, count, 2, acknowledged),
                )
            return got

    with Served(tmp_path, f"broker.state_file={tmp_path / 'state.db'}") as served:
        got = asyncio.run(main(served))
    assert sorted(got) == list(range(count))


def test_a_second_broker_on_one_state_file_is_refused(tmp_path: Path) -> None:
    state = f"broker.state_file={tmp_path / 'state.db'}"
    with Served(tmp_path, state):
        other = Served(tmp_path, state)
        with pytest.raises(AssertionError, match="another broker has it open"):
            other.start()
