"""A UDP port that drops everything until it is opened."""

from __future__ import annotations

import asyncio
from typing import Any


class Gate(asyncio.DatagramProtocol):
    """A UDP port that answers only once it is `open`: then it is that of the listener behind it."""

    def __init__(self, behind: int) -> None:
        self.open = False
        self.port = 0
        self._behind = behind
        self._transport: asyncio.DatagramTransport | None = None
        self._beyond: dict[Any, asyncio.DatagramTransport] = {}
        self._opening: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Gate:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._opening:
            task.cancel()
        assert self._transport is not None
        for transport in (self._transport, *self._beyond.values()):
            transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if not self.open:
            return
        if addr in self._beyond:
            self._beyond[addr].sendto(data)
            return
        task = asyncio.create_task(self._connect(data, addr))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, data: bytes, addr: Any) -> None:
        gate = self

        class Back(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, _addr: Any) -> None:
                assert gate._transport is not None
                if not gate._transport.is_closing():
                    gate._transport.sendto(data, addr)

        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(Back, remote_addr=("127.0.0.1", self._behind))
        self._beyond.setdefault(addr, transport)
        if self._beyond[addr] is not transport:
            transport.close()
        self._beyond[addr].sendto(data)
