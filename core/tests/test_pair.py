"""Connections in memory: they keep the contract with one stream and with many."""

from __future__ import annotations

import asyncio

import pytest

from tesaiot_connect.errors import Disconnected
from tesaiot_connect.protocols import Connection
from tesaiot_connect.testing import Network, TransportCheck, connected_bundle, transport_checks


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_a_pair_with_many_streams_keeps_the_contract(check: TransportCheck, early: bool) -> None:
    network = Network(multistream=True, early=early)
    check(listen=network.transport(), connect=network.transport)


@pytest.mark.parametrize("check", [one for one in transport_checks if "early" in one.name], ids=str)
def test_a_pair_with_one_stream_sends_early_data(check: TransportCheck) -> None:
    network = Network(early=True)
    check(listen=network.transport(), connect=network.transport)


@pytest.mark.parametrize("multistream", [True, False])
def test_early_bytes_are_there_before_anything_was_opened(multistream: bool) -> None:
    async def main() -> None:
        network = Network(multistream=multistream, early=True)
        got = asyncio.get_running_loop().create_future()

        async def handler(connection: Connection) -> None:
            got.set_result(await (await connection.accept_stream()).receive())
            await connection.wait_closed()

        async with network.transport().listen(handler):
            connection = await network.transport().connect(early=b"hello")
            assert await got == b"hello"
            assert connection.early_sent
            await (await connection.open_stream()).aclose()
            await connection.aclose()
            assert not (await network.transport().connect()).early_sent

    asyncio.run(main())


def test_more_streams_than_the_network_allows_wait_for_one_to_end() -> None:
    async def main() -> None:
        near, far = connected_bundle(max_streams=2)
        first, _ = await near.open_stream(), await near.open_stream()
        third = asyncio.create_task(near.open_stream())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not third.done()
        first.abort()
        await third
        with pytest.raises(Disconnected, match="reset"):
            await (await far.accept_stream()).receive()

    asyncio.run(main())
