"""MQTT over QUIC: `quic://`, client and listener, on aioquic's protocol machine."""

from __future__ import annotations

from collections.abc import Mapping

from tesaiot_connect import Transport, hookimpl

from .transport import QuicAioquic

__all__ = ["QuicAioquic"]


@hookimpl
def tesaiot_transports() -> Mapping[str, type[Transport]]:
    return {"quic_aioquic": QuicAioquic}
