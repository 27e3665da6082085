"""A broker with WebSocket listeners in a process of its own, for tests that attack it.

`Served` knows its ports, the most memory it took, and what it logged; a `Neighbour` is the client that must
notice nothing of what others do.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from real_brokers import free_port, stop, until_listening

from tesaiot_connect import Client, ClientOptions, Message, Negotiator, Reader, Subscription, Url
from tesaiot_connect_wss import Wss

TOOL = Path(sys.executable).with_name("tesaiot-connect")
CONNECTIONS = 150
"""How many the broker takes at once."""
MIB = 1024 * 1024

_FILE = f"""
[broker]
max_connections = {CONNECTIONS}
connect_timeout = "{{connect_timeout}}"

[listeners.ws]
url = "ws://127.0.0.1:{{port}}/mqtt"

[listeners.hasty]
url = "ws://127.0.0.1:{{hasty}}/mqtt"
handshake_timeout = "300ms"

[listeners.curious]
url = "ws://127.0.0.1:{{curious}}/mqtt"
ping_interval = "200ms"
ping_timeout = "60s"

[listeners.impatient]
url = "ws://127.0.0.1:{{impatient}}/mqtt"
ping_interval = "200ms"
ping_timeout = "1s"
"""


class Served:
    """The process. More ports: at `hasty` a handshake has little time, `curious` asks soon whether a client
    is still there, and `impatient` does not wait long for the answer."""

    def __init__(self, folder: Path, *, connect_timeout: str = "60s") -> None:
        self.port, self.hasty, self.curious, self.impatient = (free_port() for _ in range(4))
        self.log = folder / "broker.log"
        file = folder / "broker.toml"
        ports = {"port": self.port, "hasty": self.hasty, "curious": self.curious, "impatient": self.impatient}
        file.write_text(_FILE.format(connect_timeout=connect_timeout, **ports))
        with self.log.open("wb") as log:
            command = [TOOL, "serve", file, "--log-level", "debug"]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until_listening(self.impatient, self._process, self.log)  # the last one

    def check(self) -> None:
        """It runs, and has said nothing that an operator would have to worry about."""
        assert self._process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        lines = self.log.read_text(errors="replace").splitlines()
        bad = [line for line in lines if "Traceback" in line or "ERROR" in line or "WARNING" in line]
        assert not bad, "\n".join(lines[-60:])

    @contextmanager
    def bounded(self, most: int = 24 * MIB) -> Iterator[None]:
        """It takes at most so many bytes of memory more, at any moment (Linux; else it is not known)."""
        process = Path(f"/proc/{self._process.pid}")
        if not (process / "clear_refs").exists():
            yield
            return
        (process / "clear_refs").write_text("5")  # the peak begins anew
        before = self._memory(process)
        yield
        assert self._memory(process) - before < most

    @staticmethod
    def _memory(process: Path) -> int:
        """Peak, in bytes."""
        lines = (process / "status").read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(peak) * 1024

    def stop(self) -> None:
        assert stop(self._process) == 0
        assert "Traceback" not in self.log.read_text(errors="replace")


class Neighbour:
    """Sends itself messages, one after the other, for as long as it is there."""

    def __init__(self, port: int) -> None:
        options = ClientOptions(client_id=f"neighbour-{id(self)}", clean_session=True)
        self.client = Client(Negotiator([Wss(Url("ws", "127.0.0.1", port, "/mqtt"))]), options)
        self._topic = f"neighbours/{id(self)}"
        self._turns = 0
        self._back: asyncio.Queue[bytes] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def more(self, turns: int = 3) -> None:
        """Returns when it has got so many more messages back."""
        task, goal = self._task, self._turns + turns
        assert task is not None
        async with asyncio.timeout(60):
            while self._turns < goal and not task.done():
                await asyncio.sleep(0.005)
        if task.done():
            task.result()

    async def _talk(self) -> None:
        async with self.client, self.client.subscribe([Subscription(self._topic, qos=1)]) as reader:
            reading = asyncio.create_task(self._read(reader))  # this dials
            try:
                await self.client.connected()
                while True:
                    await self._turn()
                    self._turns += 1
                    await asyncio.sleep(0.005)  # the broker has others too
            finally:
                reading.cancel()
                await asyncio.wait([reading])

    async def _turn(self) -> None:
        """A message to itself. The first may be there before the subscription is: it is retained."""
        payload = b"%d" % self._turns
        await self.client.publish([Message(self._topic, payload, qos=1, retain=True)])
        while await self._back.get() != payload:
            pass
        assert self.client.status.connects == 1, self.client.status.last_error

    async def _read(self, reader: Reader) -> None:
        while True:
            delivery = await reader.read()
            await delivery.ack()
            for message in delivery.batch.messages:
                self._back.put_nowait(message.payload)

    async def __aenter__(self) -> Neighbour:
        self._task = asyncio.create_task(self._talk())
        await self.more()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        if error is None and not self._task.cancelled():
            self._task.result()
