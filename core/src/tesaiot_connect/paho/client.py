"""The same under paho's own name, for `from paho.mqtt import client` with another package in front.

Owns: nothing. Rule: what is in `tesaiot_connect.paho` is here, and the other way round.
"""

from __future__ import annotations

from paho.mqtt.client import *  # noqa: F403

from .drop_in import Client as Client
