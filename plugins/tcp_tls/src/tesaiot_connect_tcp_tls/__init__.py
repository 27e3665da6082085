"""MQTT over TCP and TLS: `mqtt://` and `mqtts://`, client and listener."""

from __future__ import annotations

from collections.abc import Mapping

from tesaiot_connect import Transport, hookimpl

from .transport import TcpTls

__all__ = ["TcpTls"]


@hookimpl
def tesaiot_transports() -> Mapping[str, type[Transport]]:
    return {"tcp_tls": TcpTls}
