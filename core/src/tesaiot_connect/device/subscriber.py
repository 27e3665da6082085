"""`TESAIoTMQTTClient`: an application that gets the telemetry of its organisation's devices.

Owns: the loop of a subscriber, its callbacks and its signals. Rules: what is called back runs in the
thread that called, one at a time; a message is acknowledged when it has been processed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from datetime import UTC, datetime
from typing import Any, Literal, Self

from ..client import ClientStatus
from ..errors import ConnectorError, Disconnected, Refused
from ..message import Delivery, Message
from ..mqtt.topics import check_filter
from ..signals import SecondSignal
from .payloads import decode, device_and_sensor, printable
from .session import Notice, Session
from .settings import Arguments, read

log = logging.getLogger("tesaiot_connect.device")

TOPIC = "device/+/telemetry/#"
"""What the platform calls the telemetry of all devices that one may see."""
_MAX_UNACKNOWLEDGED = 100
_NOTICES = 1000
"""Notices that are kept while nobody is called back; of more, the oldest are forgotten."""


class Mailbox:
    """What waits for the thread that is called back: notices, and one delivery at a time. Its methods
    are the portal's thread's; `stopped` may be set by every thread, and `wake` after it."""

    def __init__(self) -> None:
        self.notices: deque[Notice] = deque(maxlen=_NOTICES)
        self.stopped = False
        self._deliveries: deque[tuple[Delivery, asyncio.Event]] = deque()
        self._news = asyncio.Event()
        self._taken: asyncio.Event | None = None

    def notice(self, notice: Notice) -> None:
        self.notices.append(notice)
        self._news.set()

    def wake(self) -> None:
        self._news.set()

    async def deliver(self, delivery: Delivery) -> None:
        """Returns when it has been processed and acknowledged."""
        done = asyncio.Event()
        entry = (delivery, done)
        self._deliveries.append(entry)
        self._news.set()
        try:
            await done.wait()
        finally:
            if entry in self._deliveries:
                self._deliveries.remove(entry)

    async def next(self, processed: Delivery | None) -> Notice | Delivery | None:
        """Acknowledges what was processed; then what is next, None once it is stopped."""
        if processed is not None:
            await processed.ack()
            if self._taken is not None:
                self._taken.set()
        while True:
            if self.notices:
                return self.notices.popleft()
            if self.stopped:
                return None
            if self._deliveries:
                delivery, self._taken = self._deliveries.popleft()
                return delivery
            self._news.clear()
            await self._news.wait()


class TESAIoTMQTTClient:
    """Gets what the devices of an organisation send, over whichever transport its bundle names.

        class Dashboard(TESAIoTMQTTClient):
            def process_telemetry(self, device_id, sensor_type, data):
                print(device_id, sensor_type, data["value"])

        Dashboard("organisation").run_forever()

    Override `process_telemetry` or `process_message` for what to do with a reading, `_on_connect`,
    `_on_message`, `_on_disconnect` and `_on_subscribe` for the rest. All of them are called in the
    thread that called `connect` or `run_forever`, one at a time. They may be slow: meanwhile the
    connection is kept alive, and the broker is held back once 1000 messages wait here.

    A message is acknowledged after it was processed, so what a program had not finished when it was
    killed comes again: at least once, for messages at QoS 1. That takes a session that outlasts the
    program, `client_id="..."` and `clean_session=False`; without, what is sent while the program does
    not run is not kept. What comes together is acknowledged together, at most `receive_maximum` (100)
    messages, and so comes again together. A message whose processing raises is logged, counted in
    `failed`, and acknowledged: it would fail again.
    """

    userdata: Any = None
    """Yours; every callback gets it."""

    def __init__(
        self,
        bundle: str | os.PathLike[str] | None = ".",
        *,
        url: str | Sequence[str] | None = None,
        host: str | None = None,
        port: int | None = None,
        transport: str | None = None,
        token: str | None = None,
        topic: str | Sequence[str] = TOPIC,
        ca_file: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """Reads the configuration and checks it, the token too; connects to nothing.

        `bundle` is a folder with what the platform handed out, `.env` (MQTT_API_TOKEN and
        MQTT_BROKER_URL) and `ca-chain.pem`; None is none. The environment counts before `.env`, and
        what is given beside before both: `url` (one, or several in order of preference) or `host`,
        `port` and `transport` (wss without it), `token`, `ca_file`, and any key of a connection's
        table as it stands in the configuration: `client_id="x"`, `clean_session=False`,
        `auth={"type": "password", ...}`. `topic` is one topic filter or several.

        Raises ConfigError with everything that is wrong or missing and where it was looked for,
        PluginError, ConnectorError for a token that cannot be one, and ProtocolError for a topic
        filter that none is.
        """
        self.topic = topic
        self._filters = dict.fromkeys(_checked(topic), 1)
        self._connection = read(
            Arguments(
                owner=type(self).__name__,
                bundle=bundle,
                url=url,
                host=host,
                port=port,
                transport=transport,
                auth={"type": "token", "token": token} if token is not None else {},
                prefers="token",
                ca_file=ca_file,
                options={"receive_maximum": _MAX_UNACKNOWLEDGED, **options},
                default_transport="wss",
            )
        ).connection
        self.processed = 0
        """Messages that were processed, those that failed included."""
        self.failed = 0
        """Messages whose processing raised."""
        self._session: Session | None = None
        self._mailbox = Mailbox()
        self._runner: threading.Thread | None = None
        self._connecting = False
        self._drain_until: float | None = None
        """On the clock `time.monotonic`, once it was asked to stop."""

    # --- to override ----------------------------------------------------------------------

    def process_telemetry(self, device_id: str, sensor_type: str, data: Any) -> None:
        """A reading: the levels of its topic `device/<device_id>/telemetry/<sensor_type>`, and its
        payload decoded from JSON; text or bytes where it is not JSON."""
        self.process_message(device_id, sensor_type, data)

    def process_message(self, device_id: str, sensor_type: str, data: Any) -> None:
        """Another name for the same; it is not called where `process_telemetry` is overridden."""

    def _on_connect(
        self, client: Any, userdata: Any, flags: Mapping[str, int], rc: int, properties: Any = None
    ) -> None:
        """The broker answered CONNECT, the first time and after each loss. `rc` is 0 for yes, 4 for
        bad credentials, 5 for not authorized (MQTT 3.1.1 section 3.2.2.3), else the reason code of
        MQTT 5. `properties` is there for the sake of old code and always None."""

    def _on_message(self, client: Any, userdata: Any, msg: Message) -> None:
        """Logs a message (topic, payload, qos, retain, properties) and has it processed. Messages on
        topics that are not of the form `device/<device_id>/telemetry/...` are only logged."""
        found = device_and_sensor(msg.topic)
        data = decode(msg.payload)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if found is None:
            log.info("%s %s %s", now, printable(msg.topic), printable(data))
            return
        device_id, sensor_type = found
        if log.isEnabledFor(logging.INFO):
            log.info(
                "%s device=%s sensor=%s data=%s",
                now,
                printable(device_id),
                printable(sensor_type),
                printable(data),
            )
        self.process_telemetry(device_id, sensor_type, data)

    def _on_disconnect(self, client: Any, userdata: Any, rc: int, properties: Any = None) -> None:
        """The connection is gone. `rc` is 0 after `disconnect`, 7 when it was lost, else the reason
        code of the broker's DISCONNECT. It connects again unless `rc` is 0."""

    def _on_subscribe(
        self, client: Any, userdata: Any, mid: int, granted_qos: Sequence[int], properties: Any = None
    ) -> None:
        """The broker answered a subscription, with a QoS or a reason code from 0x80 for each filter.
        `mid` is 1 for the filters of `topic`, and counts up for those that were added."""

    # --- what users call ------------------------------------------------------------------

    def connect(self, timeout: float | None = None) -> Literal[True]:
        """Returns True when the broker has accepted, after `_on_connect`; at once if it has already.
        Messages wait for `run_forever`.

        Each endpoint has `connect_timeout` (10 s) to answer, and with `timeout` all of it together
        has so many seconds. Raises Refused (`reason_code`: 0x86 for bad credentials, 0x87 for not
        authorized), ConnectFailed, and other ConnectorErrors; then nothing goes on in the
        background.
        """
        session = self._session
        if session is not None and session.alive:
            session.wait_connected(timeout)
            return True
        if session is not None:
            session.join()
        self._mailbox = mailbox = Mailbox()
        self._session = session = Session(
            self._connection,
            name=self._connection.options.client_id or type(self).__name__,
            filters=[self._filters],
            max_waiting=0,
            max_received=1000,
            notify=mailbox.notice,
            published=lambda _: None,
            deliver=mailbox.deliver,
        )
        self._connecting = True
        if self._runner is not None and self._drain_until is not None:  # it was asked to stop before
            session.ask_to_stop(0.0)
        session.begin()
        try:
            session.connect(timeout)
        finally:
            self._connecting = False
            self._tell_all()
        return True

    def subscribe(self, topic: str | Sequence[str], qos: Literal[0, 1, 2] = 1) -> None:
        """Asks for further topic filters, one or several, now and at every further `connect`; what
        comes of each is told to `_on_subscribe`. Asking again changes nothing. What a broker kept for
        a lasting session is missed if the filter is not known before `connect`: name it as `topic`.

        Raises ProtocolError for a filter that none is.
        """
        if qos not in (0, 1, 2):
            raise ValueError(f"qos is 0, 1 or 2, not {qos!r}")
        for one in _checked(topic):
            self._filters.setdefault(one, qos)
            if self._session is not None and self._session.alive:
                self._session.subscribe(one, qos)

    def run_forever(self, *, drain: float = 10.0) -> None:
        """Processes messages until `disconnect` is called or, in the main thread, SIGINT or SIGTERM
        comes; connects before, if that was not done.

        Then it processes what came with the message it is at, for `drain` seconds at most, and
        disconnects; what is left stays at the broker. A second signal raises KeyboardInterrupt at
        once. Signal handlers are put back.

        Raises what `connect` raises, and Refused when the broker refuses `topic`. What a callback
        raises is logged, except KeyboardInterrupt and SystemExit.
        """
        if self._runner is not None:
            raise ConnectorError(
                "this client runs already", fix="call run_forever() once, and disconnect() to end it"
            )
        self._drain_until = None
        self._runner = threading.current_thread()
        flush = 0.0
        try:
            with _stopping_on_signals(lambda: self._stop(drain)):
                if self._session is None or not self._session.alive:
                    self.connect()
                session = self._session
                assert session is not None
                self._process(session, self._mailbox)
            flush = 1.0
        except Refused:
            raise
        except Disconnected:
            if self._drain_until is None:
                raise  # else it is how `disconnect` ended the connecting
        finally:
            self._runner = None
            if self._session is not None:
                self._session.close(flush)
                self._tell_all()

    def run(self) -> None:
        """Another name for `run_forever`."""
        self.run_forever()

    def disconnect(self) -> None:
        """Says DISCONNECT. While `run_forever` runs, in whichever thread, it is that which ends, after
        the message it is at; otherwise this returns when it is done. Idempotent."""
        if self._runner is not None:
            self._stop(10.0)
        elif self._session is not None:
            self._session.close(0.0)
            self._tell_all()

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

    # --- the thread that is called back ---------------------------------------------------

    def _stop(self, drain: float) -> bool:
        """Whether it was not asked before. In a signal handler too."""
        first = self._drain_until is None
        if first:
            self._drain_until = time.monotonic() + drain
        if self._session is not None:
            if self._connecting:
                self._session.ask_to_stop(0.0)
            self._mailbox.stopped = True
            self._session.soon(self._mailbox.wake)
        return first

    def _process(self, session: Session, mailbox: Mailbox) -> None:
        if self._drain_until is not None:  # asked to stop before `mailbox` could be told
            mailbox.stopped = True
        processed = None
        while (found := _wait(session.start(mailbox.next(processed)))) is not None:
            processed = None
            if isinstance(found, Notice):
                self._tell(found)
                continue
            for message in found.batch.messages:
                if self._drain_until is not None and time.monotonic() > self._drain_until:
                    log.warning("stopping: what was not processed in time will come again")
                    return
                self.failed += not self._call(self._on_message, message, what=f"a message on {message.topic}")
                self.processed += 1
            processed = found

    def _tell_all(self) -> None:
        while self._mailbox.notices:
            self._tell(self._mailbox.notices.popleft())

    def _tell(self, notice: Notice) -> None:
        """Raises the error of a refused `topic`."""
        if notice.what == "connect":
            self._call(self._on_connect, {"session present": int(notice.session_present)}, notice.rc)
        elif notice.what == "disconnect":
            self._call(self._on_disconnect, notice.rc)
        else:
            self._call(self._on_subscribe, notice.mid, notice.qos)
            if notice.error is not None and notice.mid == 1:
                raise notice.error

    def _call(self, callback: Callable[..., None], *args: Any, what: str = "") -> bool:
        try:
            callback(self, self.userdata, *args)
        except Exception:
            name = getattr(callback, "__name__", "a callback")
            log.exception(
                "%s failed%s", name, f" with {printable(what)}, which counts as processed" * bool(what)
            )
            return False
        return True


def _checked(topic: str | Sequence[str]) -> Sequence[str]:
    """Raises ProtocolError."""
    filters = (topic,) if isinstance(topic, str) else tuple(topic)
    for one in filters:
        check_filter(one)
    return filters


def _wait(future: Future[Any]) -> Any:
    """Its result, None when it was cancelled. On Windows a wait without an end could not be
    interrupted by a signal."""
    while True:
        try:
            return future.result(0.5 if sys.platform == "win32" else None)
        except TimeoutError:
            continue
        except CancelledError:
            return None
        except BaseException:
            future.cancel()
            raise


@contextlib.contextmanager
def _stopping_on_signals(stop: Callable[[], bool]) -> Iterator[None]:
    """In the main thread, SIGINT and SIGTERM call `stop`; when it says False, KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    again = SecondSignal()

    def handler(number: int, _frame: Any) -> None:
        if stop():
            again.first(number)
        elif again.counts(number):
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
