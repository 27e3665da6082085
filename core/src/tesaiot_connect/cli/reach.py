"""One attempt to connect, for commands that a person waits for.

Owns: giving up. Rule: a client reconnects for ever; a command says why and ends.
"""

from __future__ import annotations

import asyncio

from ..client import Client
from ..errors import ConnectFailed
from ..mqtt.packets import Connack


async def reach(client: Client) -> Connack:
    """Returns when connected. Raises Refused, or ConnectFailed after the first round of attempts."""
    waiting = asyncio.ensure_future(client.connected())
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=0.05)
            if done:
                return waiting.result()
            status = client.status
            if status.state == "waiting" and not status.connects:
                raise ConnectFailed(status.last_error.rstrip("."))
    finally:
        waiting.cancel()
