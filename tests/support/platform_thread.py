"""The sandbox platform, in a thread of the test's own process, on ports that stay."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from real_brokers import free_port, free_udp_port

from tesaiot_connect.portal import Portal
from tesaiot_connect.sandbox import Estate, Sandbox, SandboxOptions, running


class Platform:
    """`start` and `stop` may alternate; ports, accounts and kept messages stay."""

    def __init__(self, folder: Path, *, devices: int = 1) -> None:
        ports = {"quic": free_udp_port(), "tls": free_port(), "wss": free_port()}
        self._options = SandboxOptions(folder=folder, devices=devices, ports=ports)
        self._portal = Portal(name="platform")
        self._stop = asyncio.Event()
        self._task: Future[None] | None = None
        self.sandbox: Sandbox

    @property
    def estate(self) -> Estate:
        return self.sandbox.estate

    @property
    def urls(self) -> Mapping[str, str]:
        """By "quic", "tls" and "wss"."""
        return self.sandbox.urls

    @property
    def device(self) -> Path:
        """The bundle of a device."""
        return self.estate.devices[0].folder

    @property
    def organisation(self) -> Path:
        """The bundle of its organisation."""
        return self.estate.organisations[0].folder

    def start(self) -> None:
        ready = threading.Event()
        self._stop = asyncio.Event()
        self._task = self._portal.start(self._run(ready.set))
        self._task.add_done_callback(lambda _: ready.set())
        assert ready.wait(60)
        if self._task.done():
            self._task.result()

    async def _run(self, ready: Callable[[], None]) -> None:
        async with running(self._options) as self.sandbox:
            ready()
            await self._stop.wait()

    def stop(self) -> None:
        if self._task is not None:
            self._portal.call(self._ask)
            self._task.result(60)
            self._task = None

    async def _ask(self) -> None:
        self._stop.set()

    def ask(self, question: Callable[[Sandbox], Any]) -> Any:
        """The answer, worked out where the platform runs."""

        async def answer() -> Any:
            return question(self.sandbox)

        return self._portal.call(answer)

    def __enter__(self) -> Platform:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._portal.close()
