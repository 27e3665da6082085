"""The server room: an embedded MQTT broker.

Owns: routing, sessions, retained messages, wills and their state file. Rule: it knows transports
and authenticators by their contracts only.
"""

from ..access import Anonymous, Anybody
from .broker import Broker, BrokerStats
from .options import BrokerOptions, ListenerSpec

__all__ = ["Anonymous", "Anybody", "Broker", "BrokerOptions", "BrokerStats", "ListenerSpec"]
