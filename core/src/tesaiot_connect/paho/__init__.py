"""paho's client over any installed transport: change the import and the host, and nothing else.

    import tesaiot_connect.paho as mqtt           # was: import paho.mqtt.client as mqtt

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect("quic://broker.example:14567", keepalive=60)      # was: "broker.example", 1883
    client.loop_forever()

Owns: nothing of MQTT; the protocol, the callbacks, the threads and their rules are paho's own.
Rule: every name of `paho.mqtt.client` is here, and a host that is not a URL goes where paho takes
it, byte for byte. Works with paho-mqtt 2.x and 1.6.
"""

from __future__ import annotations

try:
    from paho.mqtt.client import *  # noqa: F403 - whatever the installed paho has
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "paho":
        raise
    raise ModuleNotFoundError(
        "tesaiot_connect.paho needs paho-mqtt: pip install 'tesaiot-connect[paho]'", name=error.name
    ) from error

from .drop_in import Client as Client
