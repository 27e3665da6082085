"""An attempt that is given up is gone: a rival's CONNECT may follow at once.

Its early data may be with the broker already, which must hear that nobody waits for the answer; and when
`connect` has returned or raised, there is neither a socket nor a task of it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from quic_ends import HOST, Echo, Relay, client, echoing, resumable, run, until

from tesaiot_connect import ConnectFailed
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import QuicAioquic

EARLY = b"CONNECT, in the first packet"

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts sockets in /proc")


def open_sockets() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(fd.readlink()))
        except OSError:
            continue
    return {name for name in found if name.startswith("socket:")}


async def cancelled(dialling: asyncio.Task[Any]) -> None:
    dialling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialling


async def times_out(dialling: asyncio.Task[Any]) -> None:
    with pytest.raises(ConnectFailed) as failed:
        await dialling
    assert failed.value.stage == "reach"


@pytest.mark.parametrize("end", [cancelled, times_out])
def test_the_broker_hears_that_early_data_was_given_up(
    end: Callable[[asyncio.Task[Any]], Awaitable[None]], certificates: Certificates, tmp_path: Path
) -> None:
    async def main() -> None:
        answers = True
        async with (
            echoing(certificates, handshake_timeout=100.0) as far,
            Relay(far.port, lambda ours, *_: ours or answers) as relay,
        ):
            await resumable(client(relay.url, certificates, tmp_path), tmp_path)
            await until(lambda: not far.status().connections)
            far.got.clear()
            answers = False
            recipe = client(
                relay.url, certificates, tmp_path, connect_timeout=20.0 if end is cancelled else 0.5
            )
            sockets, tasks = open_sockets(), asyncio.all_tasks()
            dialling = asyncio.create_task(recipe.connect(early=EARLY))
            await until(lambda: far.got and bytes(far.got[0]) == EARLY, "the broker got no early data")
            served = asyncio.all_tasks() - tasks
            await end(dialling)
            assert open_sockets() <= sockets
            assert asyncio.all_tasks() - tasks <= served
            # only CONNECTION_CLOSE can tell it in time: its own timeouts are longer than this test
            await until(lambda: not far.status().connections, "the broker keeps a connection")

    run(main())


def test_a_certificate_that_will_not_do_leaves_nothing(certificates: Certificates, tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other")

    async def main() -> None:
        async with echoing(certificates) as far:
            sockets, tasks = open_sockets(), asyncio.all_tasks()
            with pytest.raises(ConnectFailed) as failed:
                await client(far.url, other, tmp_path / "t").connect(early=EARLY)
            assert failed.value.stage == "secure"
            assert open_sockets() <= sockets
            assert asyncio.all_tasks() == tasks
            await until(lambda: not far.status().connections)

    run(main())


def test_cancelling_at_any_time_with_early_data(certificates: Certificates, tmp_path: Path) -> None:
    async def at(far: Echo, recipe: QuicAioquic, turns: int) -> bool:
        """Whether it was cancelled before there was a connection."""
        await resumable(recipe, tmp_path)
        await until(lambda: not far.status().connections)
        await until(lambda: len(asyncio.all_tasks()) == 1, "something still runs")
        sockets, tasks = open_sockets(), asyncio.all_tasks()
        dialling = asyncio.create_task(recipe.connect(early=EARLY))
        for _ in range(turns):
            await asyncio.sleep(0)
        dialling.cancel()
        try:
            connection = await dialling
        except asyncio.CancelledError:
            assert open_sockets() <= sockets
            new = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks() - tasks}
            assert not {name for name in new if "race" in name}, "an attempt goes on"
            return True
        connection.abort()
        return False

    async def main() -> None:
        async with echoing(certificates) as far:
            recipe = client(f"quic://{HOST}:{far.port}", certificates, tmp_path)
            outcomes = [await at(far, recipe, turns) for turns in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)]
            assert outcomes[0]
            await until(lambda: not far.status().connections, "the broker keeps a connection")

    run(main())


def test_cancelling_while_the_name_is_resolved(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def never(host: str, port: int) -> list[Any]:
        asked.set()
        return await asyncio.Event().wait()  # type: ignore[return-value]

    monkeypatch.setattr("tesaiot_connect_quic_aioquic.client.resolve", never)

    async def main() -> None:
        tasks = asyncio.all_tasks()
        dialling = asyncio.create_task(
            client("quic://broker.example", certificates, tmp_path).connect(early=EARLY)
        )
        await asked.wait()
        await cancelled(dialling)
        assert asyncio.all_tasks() == tasks

    run(main())


def test_cancelling_a_race_of_addresses(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        silent = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        for one in silent:
            one.bind((HOST, 0))

        async def resolve(host: str, port: int) -> list[Any]:
            return [(int(socket.AF_INET), one.getsockname()) for one in silent]

        monkeypatch.setattr("tesaiot_connect_quic_aioquic.client.resolve", resolve)
        sockets, tasks = open_sockets(), asyncio.all_tasks()
        recipe = client("quic://broker.example", certificates, tmp_path, attempt_delay=0.001)
        dialling = asyncio.create_task(recipe.connect(early=EARLY))
        await until(lambda: len(open_sockets() - sockets) == 3, "not all addresses are tried")
        await cancelled(dialling)
        assert open_sockets() <= sockets
        assert asyncio.all_tasks() == tasks
        for one in silent:
            one.close()

    run(main())
