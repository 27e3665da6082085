"""Stay connected: loop_forever reconnects, whatever happens to the broker; ends with a message "stop"."""

from __future__ import annotations

from typing import Any

from common import client, number, say, start

mqtt, arguments = start(__doc__)


def on_connect(client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any = None) -> None:
    say("connected", number(reason))
    client.subscribe(arguments.topic, 1)


def on_message(client: Any, _userdata: Any, message: Any) -> None:
    say("message", message.payload)
    if message.payload == b"stop":
        client.disconnect()


def on_disconnect(_client: Any, _userdata: Any, *rest: Any) -> None:
    reason = rest[0] if len(rest) < 3 else rest[1]
    say("disconnected", "as asked" if number(reason) == 0 else "not asked")


own = client(mqtt, arguments)
own.reconnect_delay_set(0.1, 0.1)
own.on_connect = on_connect
own.on_subscribe = lambda *_: say("subscribed")
own.on_message = on_message
own.on_disconnect = on_disconnect
own.on_connect_fail = lambda *_: say("connect failed")
own.connect_async(arguments.host, arguments.port, 60)
own.loop_forever(retry_first_connection=True)
