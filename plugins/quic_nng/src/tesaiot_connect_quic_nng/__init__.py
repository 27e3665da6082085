"""MQTT over QUIC through NanoSDK or NanoNNG: `quic://`, client only."""

from __future__ import annotations

from collections.abc import Mapping

from tesaiot_connect import Transport, hookimpl

from .transport import QuicNng

__all__ = ["QuicNng"]


@hookimpl
def tesaiot_transports() -> Mapping[str, type[Transport]]:
    return {"quic_nng": QuicNng}
