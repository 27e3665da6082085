"""Commands and clients at an endpoint that speaks MQTT 3.1.1 alone, from the beginning or all of a sudden."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest
from paho_world import our_broker

from tesaiot_connect import MQTTQUICClient, Url
from tesaiot_connect.cli import execute
from tesaiot_connect.portal import Portal
from tesaiot_connect.testing import Certificates


class Front:
    """A relay to a broker. While `old`, it refuses MQTT 5."""

    def __init__(self, broker: Url) -> None:
        self.old = True
        self.versions: list[int] = []
        self.url = ""
        self._broker = broker
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        async with await asyncio.start_server(self._client, "127.0.0.1", 0) as server:
            self.url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            await stop.wait()
            await self.drop()

    async def drop(self) -> None:
        for one in self._writers:
            one.transport.abort()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError):
            first = await reader.read(65536)
            if b"MQTT" in first:
                self.versions.append(first[first.index(b"MQTT") + 4])
                if self.old and self.versions[-1] == 5:
                    writer.write(b"\x20\x02\x00\x01")
                else:
                    await self._relay(first, reader, writer)
        writer.close()
        self._writers.discard(writer)

    async def _relay(self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, onward = await asyncio.open_connection(self._broker.host, self._broker.port)
        onward.write(first)
        flows = {asyncio.create_task(_flow(reader, onward)), asyncio.create_task(_flow(inner, writer))}
        await asyncio.wait(flows, return_when=asyncio.FIRST_COMPLETED)
        for flow in flows:
            flow.cancel()
        await asyncio.gather(*flows, return_exceptions=True)
        onward.close()


async def _flow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@pytest.fixture
def front(certificates: Certificates) -> Iterator[tuple[Front, Portal]]:
    with our_broker(certificates, ["mqtt"]) as urls, Portal(name="front") as portal:
        made, ready, stop = Front(urls["mqtt"]), threading.Event(), asyncio.Event()
        serving = portal.start(made.serve(ready, stop))
        assert ready.wait(30)
        yield made, portal

        async def end() -> None:
            stop.set()

        portal.call(end)
        serving.result(30)


def test_the_commands(
    front: tuple[Front, Portal], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = front[0].url
    assert execute(["pub", url, "a/b", "hello", "--retain"]) == 0
    assert execute(["sub", url, "a/#", "--count", "1"]) == 0
    assert "hello" in capsys.readouterr().out
    file = tmp_path / "pipeline.toml"
    file.write_text(
        f'[connections.c]\nendpoints = ["{url}"]\n[sources.a]\ntype = "mqtt"\nconnection = "c"\n'
        'subscribe = ["a"]\n[sinks.b]\ntype = "null"\n[pipelines.p]\nfrom = "a"\nto = ["b"]\n'
    )
    assert execute(["check", str(file)]) == 0
    capsys.readouterr()
    assert execute(["doctor", url, "--json"]) == 0
    (endpoint,) = json.loads(capsys.readouterr().out)["connections"][0]["endpoints"]
    assert (endpoint["mqtt"]["version"], endpoint["problem"]) == ("3.1.1", None)
    assert endpoint["steps"]["echo"]["outcome"] == "ok"
    assert set(front[0].versions) == {4, 5}
    assert "refused" not in capsys.readouterr().err


def test_a_device_notices_a_lost_connection_and_no_refusal(front: tuple[Front, Portal]) -> None:
    made, portal = front
    made.old = False
    told: Queue[tuple[str, int]] = Queue()
    got: Queue[bytes] = Queue()
    device = MQTTQUICClient(
        None, url=made.url, device_id="d", password="p", client_id="d", reconnect={"min": "10ms"}
    )
    device.on_connect = lambda _client, _data, _flags, rc: told.put(("connect", rc))
    device.on_disconnect = lambda _client, _data, rc: told.put(("disconnect", rc))
    device.on_message = lambda _client, _data, message: got.put(message.payload)

    def event() -> tuple[str, int]:
        return told.get(timeout=30)

    device.connect(30)
    try:
        device.subscribe("a/#", qos=1)
        assert event() == ("connect", 0)
        device.publish("a/b", b"before", qos=1).wait_for_publish(30)
        assert got.get(timeout=30) == b"before"
        made.old = True
        portal.call(made.drop)
        assert [event(), event()] == [("disconnect", 7), ("connect", 0)]
        device.publish("a/b", b"after", qos=1).wait_for_publish(30)
        while got.get(timeout=30) != b"after":
            pass  # what was not acknowledged came again
        assert made.versions == [5, 5, 4]
    finally:
        device.disconnect()
