"""An event loop of one's own: select on the client's socket, with the four socket callbacks."""

from __future__ import annotations

import selectors
import time
from typing import Any

from common import client, fail, number, say, start

mqtt, arguments = start(__doc__)
selector = selectors.DefaultSelector()
received: list[bytes] = []
registered = 0


def on_socket_open(_client: Any, _userdata: Any, sock: Any) -> None:
    say("socket opened", sock.fileno() >= 0)
    selector.register(sock, selectors.EVENT_READ)


def on_socket_close(_client: Any, _userdata: Any, sock: Any) -> None:
    say("socket closes", sock.fileno() >= 0)
    selector.unregister(sock)


def on_socket_register_write(_client: Any, _userdata: Any, sock: Any) -> None:
    global registered
    registered += 1
    selector.modify(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)


def on_socket_unregister_write(_client: Any, _userdata: Any, sock: Any) -> None:
    selector.modify(sock, selectors.EVENT_READ)


def on_connect(client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any = None) -> None:
    say("connected", number(reason))
    client.subscribe(arguments.topic, 1)


def on_subscribe(client: Any, *_: Any) -> None:
    for one in range(arguments.count):
        client.publish(arguments.topic, bytes([one]) * 10_000, 1)


def on_message(client: Any, _userdata: Any, message: Any) -> None:
    received.append(message.payload)
    if len(received) == arguments.count:
        client.disconnect()


own = client(mqtt, arguments)
own.on_socket_open = on_socket_open
own.on_socket_close = on_socket_close
own.on_socket_register_write = on_socket_register_write
own.on_socket_unregister_write = on_socket_unregister_write
own.on_connect = on_connect
own.on_subscribe = on_subscribe
own.on_message = on_message
own.connect(arguments.host, arguments.port)
ends = time.monotonic() + 30
while own.socket() is not None:
    if time.monotonic() > ends:
        fail(f"{len(received)} messages only")
    for key, events in selector.select(1):
        if events & selectors.EVENT_READ and own.socket() is key.fileobj:
            own.loop_read()
        if events & selectors.EVENT_WRITE and own.socket() is key.fileobj:
            own.loop_write()
    own.loop_misc()
say("received", len(received), received == [bytes([one]) * 10_000 for one in range(arguments.count)])
say("asked to write", registered > 0)
