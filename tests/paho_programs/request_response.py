"""Ask and answer with MQTT 5: response topic, correlation data, user properties, two clients."""

from __future__ import annotations

import threading
from typing import Any

from common import client, fail, number, say, start
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

mqtt, arguments = start(__doc__)
answered = threading.Event()
ready = {"server": threading.Event(), "asker": threading.Event()}


def make(name: str, topic: str, on_message: Any) -> Any:
    def on_connect(client: Any, _userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        say(name, "connected", number(reason), bool(getattr(properties, "ReceiveMaximum", 1)))
        client.subscribe(topic, options=SubscribeOptions(qos=1, noLocal=True))

    made = client(mqtt, arguments, protocol=mqtt.MQTTv5)
    made.on_connect = on_connect
    made.on_subscribe = lambda *_: ready[name].set()
    made.on_message = on_message
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 60
    made.connect(arguments.host, arguments.port, clean_start=True, properties=properties)
    made.loop_start()
    return made


def answer(client: Any, _userdata: Any, message: Any) -> None:
    asked = message.properties
    say("asked", message.payload, asked.UserProperty, asked.ContentType)
    properties = Properties(PacketTypes.PUBLISH)
    properties.CorrelationData = asked.CorrelationData
    client.publish(asked.ResponseTopic, message.payload.upper(), 1, properties=properties)


def take(_client: Any, _userdata: Any, message: Any) -> None:
    say("answer", message.payload, message.properties.CorrelationData)
    answered.set()


server = make("server", f"{arguments.topic}/ask", answer)
if not ready["server"].wait(20):
    fail("the server is not ready")
asker = make("asker", f"{arguments.topic}/answers", take)
if not ready["asker"].wait(20):
    fail("the asker is not ready")
question = Properties(PacketTypes.PUBLISH)
question.ResponseTopic = f"{arguments.topic}/answers"
question.CorrelationData = b"\x00\x01"
question.ContentType = "text/plain"
question.UserProperty = ("unit", "celsius")
asker.publish(f"{arguments.topic}/ask", "how warm?", 1, properties=question)
if not answered.wait(20):
    fail("no answer")
for one in (asker, server):
    one.disconnect()
    one.loop_stop()
