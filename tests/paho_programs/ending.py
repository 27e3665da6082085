"""A client with a will, and a program that ends: by disconnecting, by just ending, or killed (by --topic)."""

from __future__ import annotations

import os
import threading
from typing import Any

from common import client, fail, say, start

mqtt, arguments = start(__doc__)
how = arguments.topic.rpartition("/")[2]
published = threading.Event()


def on_connect(client: Any, _userdata: Any, _flags: Any, _reason: Any, _properties: Any = None) -> None:
    client.publish(arguments.topic, "here", 1)


own = client(mqtt, arguments)
own.will_set(arguments.topic, "the will", 1)
own.on_connect = on_connect
own.on_publish = lambda *_: published.set()
own.connect(arguments.host, arguments.port)
own.loop_start()
if not published.wait(20):
    fail("not published")
own.loop_stop()
if how == "killed":
    os._exit(0)
own.publish(arguments.topic, "the last words", 0)  # written at once: there is no loop any more
if how == "disconnected":
    own.disconnect()
say("main ends")
