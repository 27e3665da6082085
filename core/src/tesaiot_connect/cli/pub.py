"""`pub`: publish one message, or one for each line of standard input."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConnectorError, PartialDelivery, ProtocolError
from . import logs
from .target import client, target_options

if TYPE_CHECKING:
    from ..client import Client


@click.command("pub")
@target_options
@click.argument("topic", metavar="TOPIC")
@click.argument("payload", metavar="[PAYLOAD]", required=False)
@click.option("-q", "--qos", type=click.IntRange(0, 2), default=1, show_default=True)
@click.option("-r", "--retain", is_flag=True, help="The broker keeps it for later subscribers.")
@click.option("-l", "--lines", is_flag=True, help="One message for each line of standard input.")
@click.pass_context
def command(
    ctx: click.Context,
    target: str,
    file: str | None,
    overrides: tuple[str, ...],
    env_file: str | None,
    topic: str,
    payload: str | None,
    qos: int,
    retain: bool,
    lines: bool,
) -> None:
    """Publish PAYLOAD to TOPIC at TARGET.

    TARGET is a URL such as mqtts://host:8883, or the folder of a bundle.

    Without PAYLOAD all of standard input is the payload. Returns when the broker has taken
    everything over (QoS 0: when it was written).
    """
    from ..mqtt.topics import check_topic

    if lines and payload is not None:
        raise click.UsageError("give either PAYLOAD or --lines")
    try:
        check_topic(topic)
    except ProtocolError as error:
        raise click.UsageError(str(error)) from error
    logs.configure("human", "error", debug=ctx.obj["debug"])
    chosen = client(target, file, overrides, env_file)
    payloads = _lines() if lines else _one(payload)
    asyncio.run(_publish(chosen, topic, payloads, qos, retain))


async def _publish(
    chosen: Client, topic: str, payloads: AsyncIterator[list[bytes]], qos: int, retain: bool
) -> None:
    from ..message import Message

    async with chosen as connected:
        await connected.connected(once=True)
        async for batch in payloads:
            try:
                await connected.publish([Message(topic, payload, qos, retain) for payload in batch])
            except PartialDelivery as error:
                first = next(iter(error.failures.values()))
                raise ConnectorError(
                    f"{len(error.failures)} of {len(batch)} messages were refused: {first}"
                ) from first


async def _one(payload: str | None) -> AsyncIterator[list[bytes]]:
    if payload is None:
        _say_that_it_waits()
        yield [b"".join([chunk async for chunk in _input()])]
    else:
        yield [payload.encode("utf-8", "surrogateescape")]


async def _lines() -> AsyncIterator[list[bytes]]:
    """Batches of lines: what is there at once goes together, and a lone line at once."""
    tail = b""
    _say_that_it_waits()
    async for chunk in _input():
        *lines, tail = (tail + chunk).split(b"\n")
        if lines:
            yield [line.removesuffix(b"\r") for line in lines]
    if tail:
        yield [tail]


def _say_that_it_waits() -> None:
    if sys.stdin.isatty():
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        click.echo(f"type what to publish; {end} ends it", err=True)


async def _input() -> AsyncIterator[bytes]:
    """Standard input as it comes. Read by a daemon thread, which no exit waits for.

    It reads below Python's buffer: whoever waits in the buffer holds its lock, which the interpreter
    wants at its end, and without which it aborts.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(16)

    def read() -> None:
        stdin: Any = sys.stdin.buffer
        raw: Any = getattr(stdin, "raw", stdin)
        data = b"-"
        while data:
            data = raw.read(65536) or b""
            asyncio.run_coroutine_threadsafe(queue.put(data), loop).result()

    threading.Thread(target=read, name="standard input", daemon=True).start()
    while data := await queue.get():
        yield data
