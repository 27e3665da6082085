"""MQTT over WebSocket: `ws://` and `wss://`, client and listener."""

from __future__ import annotations

from collections.abc import Mapping

from tesaiot_connect import Transport, hookimpl

from .transport import Wss

__all__ = ["Wss"]


@hookimpl
def tesaiot_transports() -> Mapping[str, type[Transport]]:
    return {"wss": Wss}
