"""`sub`: subscribe, and print what comes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import ProtocolError
from . import logs
from .target import client, target_options

if TYPE_CHECKING:
    from ..client import Client
    from ..message import Message


@click.command("sub")
@target_options
@click.argument("filters", metavar="FILTER...", nargs=-1, required=True)
@click.option("-q", "--qos", type=click.IntRange(0, 2), default=1, show_default=True)
@click.option("-C", "--count", type=click.IntRange(1), help="End after so many messages.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with all a message has.")
@click.pass_context
def command(
    ctx: click.Context,
    target: str,
    file: str | None,
    overrides: tuple[str, ...],
    env_file: str | None,
    filters: tuple[str, ...],
    qos: int,
    count: int | None,
    as_json: bool,
) -> None:
    """Print topic and payload of every message at TARGET.

    TARGET is a URL such as mqtts://host:8883, or the folder of a bundle.

    Goes on, through reconnects, until it is interrupted or has --count messages.
    """
    from ..mqtt.topics import check_filter

    for one in filters:
        try:
            check_filter(one)
        except ProtocolError as error:
            raise click.UsageError(str(error)) from error
    logs.configure("human", "error", debug=ctx.obj["debug"])
    chosen = client(target, file, overrides, env_file)
    try:
        asyncio.run(_print(chosen, filters, qos, count, as_json))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return


async def _print(chosen: Client, filters: Sequence[str], qos: int, count: int | None, as_json: bool) -> None:
    from ..mqtt.packets import Subscription

    render = _as_json if as_json else _as_text
    output = sys.stdout.buffer
    left = count
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):  # scripts start jobs with the latter ignored
        with contextlib.suppress(NotImplementedError):  # Windows, where nobody sends the former
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with chosen as connected:
        subscriptions = [Subscription(one, qos) for one in filters]
        async with connected.subscribe(subscriptions) as reader:
            await connected.connected(once=True)  # a failure so far is the command's own message
            if logging.getLogger().level > logging.WARNING:
                logging.getLogger().setLevel(logging.WARNING)
            while left is None or left > 0:
                delivery = await reader.read()
                messages = delivery.batch.messages
                if left is not None:
                    messages = messages[:left]
                    left -= len(messages)
                output.write(b"".join(render(one, delivery.batch.received) for one in messages))
                output.flush()
                await delivery.ack()


def _as_text(message: Message, _received: float) -> bytes:
    payload = message.payload.decode("utf-8", "backslashreplace")
    return f"{message.topic} {payload}\n".encode()


def _as_json(message: Message, received: float) -> bytes:
    import msgspec

    line: dict[str, Any] = {"topic": message.topic}
    try:
        line["payload"] = msgspec.json.decode(message.payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            line["payload"] = message.payload.decode()
        except UnicodeDecodeError:
            line["payload_base64"] = base64.b64encode(message.payload).decode()
    line |= {"qos": message.qos, "retain": message.retain, "time": received}
    return msgspec.json.encode(line) + b"\n"
