"""`MQTTQUICClient`: a device that publishes its telemetry.

Owns: what a device calls and what calls it back. Rules: a call returns when the broker has the
message; no callback can end the client.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Self

from ..client import ClientStatus
from ..errors import ConnectorError, Disconnected
from ..message import Delivery, Message
from ..mqtt.topics import check_filter, check_topic
from .outgoing import Publication
from .payloads import telemetry
from .session import Notice, Session, is_answer
from .settings import Arguments, read

log = logging.getLogger("tesaiot_connect.device")

_RECEIVED = 100
"""Messages that may wait for `on_message`; beyond it the socket is not read."""


def _nothing(*_: Any) -> None:
    return None


class MQTTQUICClient:
    """A device of the platform, over whichever transport its bundle or its URL names.

        with MQTTQUICClient("devices/pump-1") as device:
            device.publish_telemetry({"temperature": 25.5})

    Once connected it reconnects by itself. What is published meanwhile is kept, up to `max_waiting`
    messages and 8 MiB, and goes out in order when there is a connection again.

    The callbacks may be assigned, or overridden in a subclass; either way they get the arguments
    that stand there. They run one at a time in the client's own thread, and while one runs nothing
    is received or sent: keep them short. In a callback every method may be called, and none waits:
    `publish` gives a message that is still on its way, `disconnect` begins. What a callback raises
    is logged.
    """

    userdata: Any = None
    """Yours; every callback gets it."""
    on_connect: Callable[[Any, Any, Mapping[str, int], int], None] = staticmethod(_nothing)
    """`on_connect(client, userdata, flags, rc)`: the broker answered CONNECT, the first time and after
    each loss. `rc` is 0 for yes, 4 for a wrong password, 5 for not authorized (MQTT 3.1.1 section
    3.2.2.3), else the reason code of MQTT 5. `flags["session present"]` is 1 if the broker knew the
    session."""
    on_disconnect: Callable[[Any, Any, int], None] = staticmethod(_nothing)
    """`on_disconnect(client, userdata, rc)`: the connection is gone. `rc` is 0 after `disconnect`, 7
    when it was lost, else the reason code of the broker's DISCONNECT. It connects again unless `rc`
    is 0."""
    on_message: Callable[[Any, Any, Message], None] = staticmethod(_nothing)
    """`on_message(client, userdata, message)`: something came for a subscription: topic, payload
    (bytes), qos, retain, properties. It is acknowledged when this has returned or raised."""
    on_publish: Callable[[Any, Any, int], None] = staticmethod(_nothing)
    """`on_publish(client, userdata, mid)`: the broker has the message whose `Publication` has this
    `mid`."""

    def __init__(
        self,
        bundle: str | os.PathLike[str] | None = ".",
        *,
        url: str | Sequence[str] | None = None,
        host: str | None = None,
        port: int | None = None,
        transport: str | None = None,
        device_id: str | None = None,
        password: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        max_waiting: int = 10_000,
        **options: Any,
    ) -> None:
        """Reads the configuration and checks it; connects to nothing.

        `bundle` is the folder that the platform handed out: `mqtt-quic-config.json`, `.env` and
        `ca-chain.pem`; None is none. What is given beside counts before it: `url` (one, or several
        in order of preference) or `host`, `port` and `transport` ("quic", "tls", "wss"; quic
        without it), `device_id` and `password`, `ca_file`, and any key of a connection's table as it
        stands in the configuration: `client_id="x"`, `keepalive=30`, `protocol="3.1.1"`,
        `auth={"type": "mtls", ...}`.

        Raises ConfigError with everything that is wrong or missing and where it was looked for,
        PluginError, and ConnectorError for credentials that cannot be used.
        """
        auth = {"type": "password", "username": device_id, "password": password}
        if device_id is None and password is None:
            auth = {}
        settings = read(
            Arguments(
                owner=type(self).__name__,
                bundle=bundle,
                url=url,
                host=host,
                port=port,
                transport=transport,
                auth={key: value for key, value in auth.items() if value is not None},
                prefers="password",
                ca_file=ca_file,
                options=options,
                default_transport="quic",
            )
        )
        self._connection = settings.connection
        self._max_waiting = max_waiting
        self.device_id = device_id or settings.device_id
        self._filters: dict[str, int] = {}
        self._session: Session | None = None
        self._beginning = threading.Lock()
        """Held while a session is replaced: two threads must not both begin one."""

    # --- what users call ------------------------------------------------------------------

    def connect(self, timeout: float | None = None) -> Literal[True]:
        """Returns True when the broker has accepted, after `on_connect`; at once if it has already.

        Each endpoint has `connect_timeout` (10 s) to answer, and with `timeout` all of it together
        has so many seconds. Raises Refused (`reason_code`: 0x86 for a wrong password, 0x87 for not
        authorized), ConnectFailed, and other ConnectorErrors; then nothing goes on in the
        background. In a callback it does not wait.
        """
        session = self._session
        if session is not None and session.inside:
            if session.alive:
                return True
            raise ConnectorError(
                "a callback cannot connect a client that is disconnecting",
                fix="call connect() outside of callbacks; a lost connection comes back by itself",
            )
        with self._beginning:
            session = self._session
            if began := session is None or not session.alive:
                if session is not None:
                    session.join()
                self._session = session = self._new_session()
                session.begin()
        assert session is not None
        if began:
            session.connect(timeout)
        else:
            session.wait_connected(timeout)
        return True

    def publish_telemetry(
        self,
        data: Mapping[str, Any],
        *,
        topic: str | None = None,
        qos: Literal[0, 1, 2] = 1,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Publication:
        """Publish readings of now, `{"temperature": 25.5}`, on `devices/{device_id}/telemetry`, as
        `{"timestamp": "2025-12-09T10:30:45.123456Z", "data": {...}}`.

        As `publish`; raises PayloadError too, for data that JSON does not know. NaN and infinities
        become null.
        """
        if topic is None:
            if not self.device_id:
                raise ConnectorError(
                    "which device this is was not said, so its topic is not known",
                    fix="give `device_id`, or `topic`; in a bundle it is TESAIOT_DEVICE_ID",
                )
            topic = f"devices/{self.device_id}/telemetry"
        return self.publish(topic, telemetry(data, datetime.now(UTC)), qos, wait=wait, timeout=timeout)

    def publish(
        self,
        topic: str,
        payload: bytes | bytearray | str = b"",
        qos: Literal[0, 1, 2] = 1,
        retain: bool = False,
        *,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Publication:
        """Returns when the broker has the message (QoS 0: when it was written), through reconnects;
        without `wait` when there is room for it among those that wait.

        Raises PublishRefused when the broker does not take it, ProtocolError for a topic that none
        is, and Disconnected: when the client is not connected at all, is disconnected meanwhile, or
        after `timeout` seconds. Of these, a message that waited for its acknowledgement is kept and
        sent; one that found no room was not taken.
        """
        check_topic(topic)
        if qos not in (0, 1, 2):
            raise ValueError(f"qos is 0, 1 or 2, not {qos!r}")
        if isinstance(payload, str):
            payload = payload.encode()
        elif not isinstance(payload, bytes | bytearray):
            raise TypeError(f"a payload is bytes or text, not {type(payload).__name__}")
        session = self._connected()
        message = Message(topic, bytes(payload), int(qos), bool(retain))
        publication = session.publish(message, timeout)
        if wait and not session.inside:
            publication.wait_for_publish(timeout)
        return publication

    def subscribe(self, topic_filter: str, qos: Literal[0, 1, 2] = 1, timeout: float | None = 10.0) -> None:
        """From now on, and after every further `connect`, messages come to `on_message`.

        Returns when the broker has granted it. Before `connect`, and in a callback, it is only noted;
        what a broker kept for a lasting session is not missed if it is noted before `connect`.
        Raises ProtocolError for a filter that none is, Refused when the broker says no, Disconnected
        after `timeout` seconds; then it is asked for again at the next connection.
        """
        check_filter(topic_filter)
        if qos not in (0, 1, 2):
            raise ValueError(f"qos is 0, 1 or 2, not {qos!r}")
        if self._filters.setdefault(topic_filter, qos) != qos:
            raise ConnectorError(
                f"{topic_filter} is subscribed to already, at another QoS", fix="use one QoS for it"
            )
        session = self._session
        if session is None or not session.alive:
            return
        granted = session.subscribe(topic_filter, qos)
        if session.inside:
            return
        try:
            granted.result(timeout)
        except ConnectorError as error:
            if is_answer(error):
                self._filters.pop(topic_filter, None)
            raise
        except TimeoutError as error:
            raise Disconnected(
                f"the broker has not granted {topic_filter} within {timeout or 0:g} s{session.because()}",
                fix="it is asked again at each connection",
            ) from error

    def disconnect(self, timeout: float = 10.0) -> bool:
        """What waits has `timeout` seconds to be published, then DISCONNECT. Idempotent.

        True if nothing was left; what was left is given up, and its `Publication`s raise
        Disconnected. In a callback it begins, and True means nothing. It ends a `connect` of another
        thread too, unless that comes later.
        """
        session = self._session
        return session is None or session.close(timeout)

    def is_connected(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._session is not None and self._session.alive and self._session.up

    @property
    def status(self) -> ClientStatus | None:
        """Endpoint, transport, counts and the latest error; None while disconnected."""
        return self._session.status() if self._session is not None else None

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def _new_session(self) -> Session:
        return Session(
            self._connection,
            name=self.device_id or self._connection.options.client_id or type(self).__name__,
            filters=[{one: qos} for one, qos in self._filters.items()],
            max_waiting=self._max_waiting,
            max_received=_RECEIVED,
            notify=self._notice,
            published=lambda mid: self._call(self.on_publish, mid),
            deliver=self._deliver,
        )

    # --- the portal's thread --------------------------------------------------------------

    def _connected(self) -> Session:
        if self._session is None:
            raise Disconnected("this client is not connected", fix="call connect() first")
        return self._session

    def _notice(self, notice: Notice) -> None:
        if notice.what == "connect":
            self._call(self.on_connect, {"session present": int(notice.session_present)}, notice.rc)
        elif notice.what == "disconnect":
            self._call(self.on_disconnect, notice.rc)

    async def _deliver(self, delivery: Delivery) -> None:
        for message in delivery.batch.messages:
            self._call(self.on_message, message)
            await asyncio.sleep(0)  # the keepalive has its turn
        await delivery.ack()

    def _call(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(self, self.userdata, *args)
        except BaseException:  # nothing is awaited here: whatever it is, the callback raised it
            name = getattr(callback, "__name__", "a callback")
            log.exception("%s of %s failed", name, self.device_id or "a device")
