"""The asyncio client: the MQTT engine over any connection, again and again.

Owns: dialling, reconnecting, subscribing and publishing. Rule: it knows no transport by name.
"""

from .driver import Client
from .options import ClientOptions, ClientState, ClientStatus, StreamRule, WillOptions
from .shared import MqttConnection

__all__ = [
    "Client",
    "ClientOptions",
    "ClientState",
    "ClientStatus",
    "MqttConnection",
    "StreamRule",
    "WillOptions",
]
