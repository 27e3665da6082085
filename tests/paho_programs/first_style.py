"""As programs for paho 1.x are written: callbacks of version 1, and loop() in a loop of one's own."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from common import fail, say, start

warnings.simplefilter("ignore", DeprecationWarning)
mqtt, arguments = start(__doc__)
done = False


def on_connect(client: Any, userdata: Any, flags: dict[str, int], rc: int) -> None:
    say(userdata, flags, mqtt.connack_string(rc))
    client.subscribe(arguments.topic)


def on_subscribe(client: Any, _userdata: Any, _mid: int, granted_qos: tuple[int, ...]) -> None:
    say("granted", granted_qos)
    client.message_callback_add(arguments.topic, on_filtered)
    client.publish(arguments.topic, payload="21.5", qos=0, retain=False)


def on_filtered(client: Any, _userdata: Any, message: Any) -> None:
    say("message", message.payload.decode())
    client.disconnect()


def on_disconnect(_client: Any, _userdata: Any, rc: int) -> None:
    global done
    say("disconnected", int(rc), rc == mqtt.MQTT_ERR_SUCCESS)
    done = True


first = mqtt.CallbackAPIVersion.VERSION1 if hasattr(mqtt, "CallbackAPIVersion") else None
named = {"clean_session": True, "userdata": "user data", "protocol": mqtt.MQTTv311}
client = mqtt.Client(first, "first-style", **named) if first else mqtt.Client("first-style", **named)
client.on_connect = on_connect
client.on_subscribe = on_subscribe
client.on_disconnect = on_disconnect
client.username_pw_set("somebody", "something")
if arguments.ca:
    client.tls_set(ca_certs=arguments.ca)
client.connect(arguments.host, arguments.port, 60)
turns = 0
while not done:
    client.loop(timeout=0.5)
    turns += 1
    if turns > 200:
        fail("it takes too long")
sys.exit(0)
