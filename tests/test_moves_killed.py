"""Real processes that are killed in the middle of a move: what was acknowledged is there."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_moves
import pytest
from real_brokers import free_port, until_listening

from tesaiot_connect import Backoff, Client, ClientOptions, Duration, Negotiator, Url
from tesaiot_connect_tcp_tls import TcpTls

TOOL = Path(sys.executable).with_name("tesaiot-connect")
QUICK = Backoff(min=Duration(0.01), max=Duration(0.2))
BROKER = """
[broker]
state_file = "{folder}/broker.db"
synchronous = "normal"

[listeners.low]
url = "mqtt://127.0.0.1:{low}"

[listeners.high]
url = "mqtt://127.0.0.1:{high}"
"""


class Served:
    """`tesaiot-connect serve` on a state file, with two listeners."""

    def __init__(self, folder: Path) -> None:
        self.low, self.high = free_port(), free_port()
        self.log = folder / "broker.log"
        self._config = folder / "broker.toml"
        self._config.write_text(BROKER.format(folder=folder.as_posix(), low=self.low, high=self.high))
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([TOOL, "serve", self._config], stdout=log, stderr=log)
        for port in (self.low, self.high):
            until_listening(port, self._process, self.log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Publisher:
    def __init__(self, broker: Served, first: int, moment: str, who: str) -> None:
        urls = [f"mqtt://127.0.0.1:{port}" for port in (broker.low, broker.high)]
        self.acknowledged: set[int] = set()
        self._broker = broker
        self._process = subprocess.Popen(
            [sys.executable, killed_moves.__file__, *urls, str(first), moment, who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> int:
        """Until it ends; when it says so, the broker is killed and started again. Gives the exit code."""
        with self._process as process:
            try:
                assert process.stdout is not None
                assert process.stdin is not None
                for line in process.stdout:
                    if line == "now\n":
                        self._broker.kill()
                        self._broker.start()
                        process.stdin.write("go on\n")
                        process.stdin.flush()
                    else:
                        first, last = map(int, line.split()[1:])
                        self.acknowledged.update(range(first, last + 1))
                return process.wait()
            finally:
                process.kill()


@pytest.mark.parametrize("moment", killed_moves.MOMENTS)
def test_killed_in_the_middle_of_a_move(tmp_path: Path, moment: str) -> None:
    """First the client, then, with a client that goes on, the broker."""

    async def main(broker: Served) -> None:
        low = Negotiator([TcpTls(Url.parse(f"mqtt://127.0.0.1:{broker.low}"))])
        options = ClientOptions(client_id="witness", reconnect=QUICK, protocol="5")
        got: list[int] = []
        acknowledged: set[int] = set()

        async def collect(reader: Any) -> None:
            while True:
                delivery = await reader.read()
                got.extend(int(one.payload) for one in delivery.batch.messages)
                await delivery.ack()

        async with Client(low, options) as witness, witness.subscribe(["kills/#"]) as reader:
            await reader.grant()
            collecting = asyncio.create_task(collect(reader))
            for first, who in ((0, "self"), (1_000_000, "broker")):
                publisher = Publisher(broker, first, moment, who)
                code = await asyncio.to_thread(publisher.run)
                assert code == (-signal.SIGKILL if who == "self" else 0), broker.log.read_text()
                acknowledged |= publisher.acknowledged
            while not acknowledged <= set(got):
                await asyncio.sleep(0.01)
            collecting.cancel()
        assert min(acknowledged) == 0
        assert max(acknowledged) > 1_000_000
        for topic in range(killed_moves.TOPICS):
            mine = list(dict.fromkeys(number for number in got if number % killed_moves.TOPICS == topic))
            assert mine == sorted(mine), "in order, those that came twice left aside"

    async def bounded(broker: Served) -> None:
        async with asyncio.timeout(200):
            await main(broker)

    broker = Served(tmp_path)
    try:
        asyncio.run(bounded(broker))
    finally:
        broker.kill()
