"""Clients for synchronous programs: a device that publishes, an application that subscribes.

Owns: `MQTTQUICClient` and `TESAIoTMQTTClient`. Rule: they are thin: connecting, reconnecting and
redelivery are the core client's, what is configured is the configuration's.
"""

from .device import MQTTQUICClient
from .outgoing import Publication
from .subscriber import TESAIoTMQTTClient

__all__ = ["MQTTQUICClient", "Publication", "TESAIoTMQTTClient"]
