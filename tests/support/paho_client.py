"""paho-mqtt as tests want it: messages come out of a queue, and each step waits for its answer."""

from __future__ import annotations

import queue
import threading
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


class Paho:
    """A paho client whose messages come out of a queue."""

    def __init__(
        self,
        port: int,
        version: int,
        client_id: str = "",
        *,
        keep: bool = False,
        ca: str = "",
        path: str = "",
    ) -> None:
        """A `path` means over WebSocket."""
        options: dict[str, Any] = {} if version == paho.MQTTv5 else {"clean_session": not keep}
        if path:
            options["transport"] = "websockets"
        self.client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTProtocolVersion(version), **options
        )
        if path:
            self.client.ws_set_options(path)
        self.messages: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.session_present = False
        self._connected = threading.Event()
        self._subscribed = threading.Event()
        self.client.on_message = lambda _client, _user, message: self.messages.put(message)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        if ca:
            self.client.tls_set(ca)
        connecting: dict[str, Any] = {}
        if version == paho.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 300 if keep else 0
            connecting |= {"clean_start": not keep, "properties": properties}
        self.client.connect("localhost" if ca else "127.0.0.1", port, **connecting)
        self.client.loop_start()
        assert self._connected.wait(20)

    def _on_connect(self, _client: Any, _user: Any, flags: Any, reason: Any, _properties: Any) -> None:
        assert not reason.is_failure
        self.session_present = flags.session_present
        self._connected.set()

    def subscribe(self, topic_filter: str, qos: int) -> None:
        self._subscribed.clear()
        self.client.subscribe(topic_filter, qos)
        assert self._subscribed.wait(20)

    def publish(self, topic: str, payloads: list[bytes], qos: int, *, retain: bool = False) -> None:
        sent = [self.client.publish(topic, payload, qos, retain) for payload in payloads]
        for one in sent:
            one.wait_for_publish(20)

    def take(self, count: int) -> list[paho.MQTTMessage]:
        return [self.messages.get(timeout=20) for _ in range(count)]

    def __enter__(self) -> Paho:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()
