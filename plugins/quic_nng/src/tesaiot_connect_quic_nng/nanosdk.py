"""NanoSDK's MQTT client over QUIC, called through ctypes.

Owns: one client, the threads that call it, who owns which message, and that no acknowledgement and no message
is lost between the library and `events`. Rules: methods return at once; what happens is told in batches by
`events`, with a byte to read from `wake` when there is something; nothing that C calls back or reads later is
freed.

Read in the source of NanoSDK (NNG 1.8), and not to be unlearned:

- The aio of a PUBLISH with QoS 1 or 2 is finished when the library has queued the message, and once more when
  the connection ends without its acknowledgement. `nng_sendmsg` keeps it on the stack, which is corrupt then.
  So each has an aio on the heap, used again after the acknowledgement.
- An acknowledgement that comes while the callback for one before runs waits in a queue that only
  `nng_recv_aio` with the callback's own aio empties, and that is safe from inside the callback only. One that
  comes while the callback hears that the queue is empty waits until the next. So the callback never returns
  without asking again: it sleeps while nothing is awaited, and asks each millisecond or less often otherwise.
- A message is the library's once sent, whatever comes of it, except where the result is NNG_EPROTO. The aio
  still points to it, and so it does when a SUBSCRIBE ends with an error: that pointer dangles.
- The lock that receiving and sending take is held while the library ends a connection, so such calls release
  the GIL. It is never held while the library calls Python: `nng_mqtt_quic_set_disconnect_cb` would do that.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import byref, c_uint32, c_void_p
from functools import partial
from typing import Any, NamedTuple

from tesaiot_connect import Message
from tesaiot_connect.mqtt import Connect, Subscription

from .abi import BLOCKING, ON_ACK, ON_SENT, SHORT, Quic, Socket, Topic, TopicQos, bound
from .library import Library

PUBACK, PUBCOMP = 4, 7
_CONNECT, _CONNACK, _PUBLISH, _SUBSCRIBE, _UNSUBSCRIBE, _DISCONNECT = 1, 2, 3, 8, 10, 14
_SUBACK, _UNSUBACK = 9, 11
_EBUSY, _EPROTO, _ECANCELED = 4, 13, 20

_POSTED = 16_384
"""Receives that wait. What comes while none waits goes into a queue that drops."""
_RUN = 512
"""Messages told together at most."""
_POLL, _SLOW_POLL = 0.001, 0.02
_LAST_ID = 65_535
_LEAST_KEEPALIVE = 10
"""Seconds. The library looks at its clock every 5: it would ask too late for less."""


SYMBOLS = ("nng_version", *BLOCKING, *SHORT)


class Connack(NamedTuple):
    return_code: int
    session_present: bool


class Acknowledged(NamedTuple):
    packet_ids: list[int]


class Sent(NamedTuple):
    packets: int


class Answered(NamedTuple):
    """SUBACK with its codes, or UNSUBACK where `codes` is None."""

    number: int
    codes: bytes | None


class Received(NamedTuple):
    messages: list[Message]


class Lost(NamedTuple):
    what: str
    fix: str = ""
    by_peer: bool = False


class Malformed(Exception):
    """A packet of the server that is none."""


Event = Connack | Acknowledged | Sent | Answered | Received | Lost


class Settings(NamedTuple):
    """Paths of PEM files, times in seconds. The server is verified where there is a `certificate`."""

    ca_file: str
    certificate: str
    key: str
    connect_timeout: float
    idle_timeout: float
    keepalive: float


class NanoSdk:
    """A client that connects once: `open`, wait until `ready`, `start`; then it is an `outgoing.Library`."""

    def __init__(self, library: Library) -> None:
        self._blocking = bound(library.blocking, BLOCKING)
        self._short = bound(library.short, SHORT)
        self._socket = Socket()
        self._quic = Quic()
        self._on_ack = ON_ACK(self._acknowledge)
        self._on_sent = ON_SENT(self._count_sent)
        self._on_answer = ON_ACK(self._answer)

        self._next_id = 1
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._flying: dict[int, int] = {}
        """Packet id to aio."""
        self._spare: list[int] = []
        self._asking: dict[int, tuple[int, int, bool]] = {}
        """Key to aio, number, whether it is a SUBSCRIBE."""
        self._keys = itertools.count(1)
        self._awaited = threading.Event()
        self._since = 0.0
        """When the last acknowledgement came, or a message went out with none awaited."""
        self._leaving = False
        self.lost_at: float | None = None
        """When the connection was found to be over, on the monotonic clock. A second later the library makes
        another one."""
        self.unproven = False
        """Messages of QoS 0 went out: sent, the library says, but nothing proves that they arrived."""

        self._acks: deque[int] = deque()
        self._sent = self._told_sent = 0
        self._others: deque[Event] = deque()
        self._told = False
        self.wake, self._bell = socket.socketpair()
        """The first is readable when `events` has something."""
        self.wake.setblocking(False)
        self._bell.setblocking(False)

    # --- the start

    def open(self, url: str, settings: Settings) -> str:
        """Starts the handshake; why it could not, or ""."""
        quic = self._quic
        tls = quic.tls
        # The library reads the structure's strings again whenever it connects.
        tls.enable = bool(settings.certificate)
        tls.cafile = settings.ca_file.encode() or None
        tls.certfile = settings.certificate.encode() or None
        tls.keyfile = settings.key.encode() or None
        tls.verify_peer = tls.set_fail = True
        quic.qkeepalive = _seconds(settings.keepalive)
        quic.qconnect_timeout = _seconds(settings.connect_timeout)
        quic.qdiscon_timeout = quic.qidle_timeout = _seconds(settings.idle_timeout)
        socket_ = byref(self._socket)
        if code := self._blocking.nng_mqtt_quic_client_open_conf(socket_, url.encode(), byref(quic)):
            why = "it cannot read certificate and key, or has no open files or threads left"
            return f"NanoSDK could not be opened: {why if code < 0 else self._words(code)}"
        self._blocking.nng_mqtt_quic_ack_callback_set(socket_, self._on_ack, None)
        self._blocking.nng_mqtt_quic_set_msg_send_cb(socket_, self._on_sent, None)
        return ""

    def ready(self) -> bool:
        """Whether the handshake is complete. The library does not tell, but it refuses to send DISCONNECT
        with one error before and another after."""
        message = self._message(_DISCONNECT)
        code: int = self._blocking.nng_sendmsg(self._socket, message, 0)
        if code == _EPROTO:
            self._short.nng_msg_free(message)
        return code != _EBUSY

    def start(self) -> None:
        """Call it once, when `ready`."""
        posted = [self._aio() for _ in range(_POSTED)]
        for aio in posted:
            self._blocking.nng_recv_aio(self._socket, aio)
        self._thread("receive", partial(self._receive, posted))
        self._thread("send", self._send)

    def close(self) -> None:
        """Ends the connection, which may abort the process or never return."""
        self._leaving = True
        self._awaited.set()
        # After a loss there is nothing to close.
        if self.lost_at is None:
            self._blocking.nng_close(self._socket)

    # --- what happens

    def events(self) -> list[Event]:
        """What happened since the last call. What the library sent comes last: its own packets count there,
        which answer what is told before. After `Lost` nothing counts."""
        with contextlib.suppress(BlockingIOError):
            self.wake.recv(4096)
        self._told = False
        sent = self._sent - self._told_sent
        self._told_sent += sent
        others = [self._others.popleft() for _ in range(len(self._others))]
        found: list[Event] = []
        if acks := [self._acks.popleft() for _ in range(len(self._acks))]:
            found.append(Acknowledged(acks))
        found += others
        if sent:
            found.append(Sent(sent))
        return found

    def _tell(self, event: Event | None = None) -> None:
        if event is not None:
            self._others.append(event)
        if not self._told:
            self._told = True
            self._bell.send(b"\0")

    def _thread(self, name: str, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except Malformed as error:
                self._tell(Lost(f"the server sent a malformed {error}", by_peer=True))
            except Exception as error:  # noqa: BLE001 - told as the end
                self._tell(_broken(name, error))

        threading.Thread(target=guarded, name=name, daemon=True).start()

    # --- outgoing.Library: on the thread that serves

    def connect(self, connect: Connect) -> None:
        self._orders.put(partial(self._send_connect, connect))

    def publish(self, messages: Sequence[Message]) -> list[int]:
        ids = [self._take_id() if message.qos else 0 for message in messages]
        self.unproven = self.unproven or 0 in ids
        self._orders.put(partial(self._send_publish, messages, ids))
        return ids

    def subscribe(self, number: int, subscriptions: Sequence[Subscription]) -> None:
        self._take_id()
        self._orders.put(partial(self._send_subscribe, number, subscriptions))

    def unsubscribe(self, number: int, filters: Sequence[str]) -> None:
        self._take_id()
        self._orders.put(partial(self._send_unsubscribe, number, filters))

    def _take_id(self) -> int:
        """The library counts the same way, in the order of calls, and does not say what it took."""
        taken = self._next_id
        self._next_id = taken % _LAST_ID + 1
        return taken

    # --- the thread that sends

    def _send(self) -> None:
        while True:
            self._orders.get()()

    def _send_connect(self, connect: Connect) -> None:
        short = self._short
        message = self._message(_CONNECT)
        short.nng_mqtt_msg_set_connect_proto_version(message, 4)
        keepalive = max(connect.keepalive, _LEAST_KEEPALIVE) if connect.keepalive else 0
        short.nng_mqtt_msg_set_connect_keep_alive(message, keepalive)
        short.nng_mqtt_msg_set_connect_clean_session(message, connect.clean_start)
        short.nng_mqtt_msg_set_connect_client_id(message, connect.client_id.encode())
        if connect.username is not None:
            short.nng_mqtt_msg_set_connect_user_name(message, connect.username.encode())
        if connect.password is not None:
            short.nng_mqtt_msg_set_connect_password(message, connect.password)
        if connect.will is not None:
            will = connect.will.message
            short.nng_mqtt_msg_set_connect_will_topic(message, will.topic.encode())
            short.nng_mqtt_msg_set_connect_will_msg(message, will.payload, len(will.payload))
            short.nng_mqtt_msg_set_connect_will_qos(message, will.qos)
            short.nng_mqtt_msg_set_connect_will_retain(message, will.retain)
        # `nng_sendmsg` would wait for the next connection where this one has just ended.
        self._send_with(self._aio(), message)

    def _send_publish(self, messages: Sequence[Message], ids: Sequence[int]) -> None:
        short, blocking, socket_ = self._short, self._blocking, self._socket
        made = c_void_p()
        for message, packet_id in zip(messages, ids, strict=True):
            short.nng_mqtt_msg_alloc(byref(made), 0)
            pointer = made.value
            short.nng_mqtt_msg_set_packet_type(pointer, _PUBLISH)
            short.nng_mqtt_msg_set_publish_topic(pointer, message.topic.encode())
            short.nng_mqtt_msg_set_publish_payload(pointer, message.payload, len(message.payload))
            short.nng_mqtt_msg_set_publish_qos(pointer, message.qos)
            if message.retain:
                short.nng_mqtt_msg_set_publish_retain(pointer, True)
            if not packet_id:
                code = blocking.nng_sendmsg(socket_, pointer, 0)
            else:
                if not self._flying:
                    self._since = time.monotonic()
                aio = self._spare.pop() if self._spare else self._aio()
                self._flying[packet_id] = aio
                if not self._awaited.is_set():
                    self._awaited.set()
                code = self._send_with(aio, pointer)
            if code:
                self._tell(self._lost(code))
                return

    def _send_subscribe(self, number: int, subscriptions: Sequence[Subscription]) -> None:
        filters = [one.topic_filter.encode() for one in subscriptions]
        topics = (TopicQos * len(filters))(
            *(
                TopicQos(Topic(len(name), name), one.qos, 0, 0, 0)
                for name, one in zip(filters, subscriptions, strict=True)
            )
        )
        message = self._message(_SUBSCRIBE)
        self._short.nng_mqtt_msg_set_subscribe_topics(message, topics, len(filters))  # which copies
        self._ask(number, message, subscribe=True)

    def _send_unsubscribe(self, number: int, filters: Sequence[str]) -> None:
        names = [name.encode() for name in filters]
        topics = (Topic * len(names))(*(Topic(len(name), name) for name in names))
        message = self._message(_UNSUBSCRIBE)
        self._short.nng_mqtt_msg_set_unsubscribe_topics(message, topics, len(names))
        self._ask(number, message, subscribe=False)

    def _ask(self, number: int, message: int, *, subscribe: bool) -> None:
        """The answer completes the aio. It is rare, and an aio is small: none is used again or freed."""
        key = next(self._keys)
        aio = self._aio(self._on_answer, key)
        self._asking[key] = (aio, number, subscribe)
        self._send_with(aio, message)

    def _send_with(self, aio: int, message: int | None) -> int:
        self._short.nng_aio_set_msg(aio, message)
        self._blocking.nng_send_aio(self._socket, aio)
        code: int = self._short.nng_aio_result(aio)
        return code

    # --- threads of the library

    def _acknowledge(self, aio: int) -> None:
        """CONNACK, which starts it, PUBACK, PUBCOMP; or NNG_ECANCELED: none waits."""
        try:
            code = self._short.nng_aio_result(aio)
            if not code:
                message = self._short.nng_aio_get_msg(aio)
                if message:
                    if self._short.nng_mqtt_msg_get_packet_type(message) in (PUBACK, PUBCOMP):
                        self._land(self._short.nng_mqtt_msg_get_puback_packet_id(message))
                    self._short.nng_msg_free(message)
                    self._short.nng_aio_set_msg(aio, None)
            elif code == _ECANCELED:
                self._pause()
            else:
                return
            if not self._leaving:
                # Last: from here on it may be called for the next on another thread.
                self._blocking.nng_recv_aio(self._socket, aio)
        except Exception as error:  # noqa: BLE001 - told as the end
            self._tell(_broken("acknowledge", error))

    def _land(self, packet_id: int) -> None:
        self._since = time.monotonic()
        aio = self._flying.pop(packet_id, None)
        if aio is not None:
            self._spare.append(aio)
        self._acks.append(packet_id)
        self._tell()

    def _pause(self) -> None:
        """Until an acknowledgement may have come: the longer it takes, the less a wait adds to it."""
        if not self._flying:
            self._awaited.clear()
            if not self._flying and not self._leaving:
                self._awaited.wait()
        time.sleep(min(max((time.monotonic() - self._since) / 16, _POLL), _SLOW_POLL))

    def _count_sent(self, _message: int | None, _arg: int | None) -> int:
        self._sent += 1
        self._tell()
        return 0

    def _answer(self, key: int) -> None:
        try:
            aio, number, subscribe = self._asking.pop(key)
            if code := self._short.nng_aio_result(aio):
                self._tell(self._lost(code))
                return
            message = self._short.nng_aio_get_msg(aio)
            kind = self._short.nng_mqtt_msg_get_packet_type(message)
            if kind != (_SUBACK if subscribe else _UNSUBACK):
                asked = "SUBSCRIBE" if subscribe else "UNSUBSCRIBE"
                self._tell(Lost(f"the server answered {asked} by a packet of type {kind}", by_peer=True))
                return
            codes = None
            if subscribe:
                length = c_uint32()
                start = self._short.nng_mqtt_msg_get_suback_return_codes(message, byref(length))
                codes = ctypes.string_at(start, length.value)
            self._short.nng_msg_free(message)
            self._tell(Answered(number, codes))
        except Exception as error:  # noqa: BLE001 - told as the end
            self._tell(_broken("answer", error))

    # --- the thread that receives

    def _receive(self, posted: Sequence[int]) -> None:
        short, blocking, socket_ = self._short, self._blocking, self._socket
        run: list[Message] = []
        for aio in itertools.cycle(posted):
            if short.nng_aio_busy(aio):
                if run:
                    self._tell(Received(run))
                    run = []
                blocking.nng_aio_wait(aio)
            if code := short.nng_aio_result(aio):
                if run:
                    self._tell(Received(run))
                self._tell(self._lost(code))
                return
            message = short.nng_aio_get_msg(aio)
            kind = short.nng_mqtt_msg_get_packet_type(message)
            if kind == _PUBLISH:
                run.append(self._read(message))
            elif kind == _CONNACK:
                present = bool(short.nng_mqtt_msg_get_connack_flags(message) & 1)
                self._tell(Connack(short.nng_mqtt_msg_get_connack_return_code(message), present))
            short.nng_msg_free(message)
            short.nng_aio_set_msg(aio, None)
            blocking.nng_recv_aio(socket_, aio)
            if len(run) >= _RUN:
                self._tell(Received(run))
                run = []

    def _read(self, message: int) -> Message:
        short = self._short
        length = c_uint32()
        start = short.nng_mqtt_msg_get_publish_topic(message, byref(length))
        topic = _topic(ctypes.string_at(start, length.value) if start else b"")
        start = short.nng_mqtt_msg_get_publish_payload(message, byref(length))
        payload = ctypes.string_at(start, length.value) if length.value else b""
        qos, retain = (
            short.nng_mqtt_msg_get_publish_qos(message),
            short.nng_mqtt_msg_get_publish_retain(message),
        )
        return Message(topic, payload, qos, retain)

    # --- small calls

    def _message(self, kind: int) -> int:
        made = c_void_p()
        if self._short.nng_mqtt_msg_alloc(byref(made), 0) or made.value is None:
            raise MemoryError("NanoSDK has no memory for a message")
        self._short.nng_mqtt_msg_set_packet_type(made, kind)
        return made.value

    def _aio(self, callback: Any = None, key: int | None = None) -> int:
        made = c_void_p()
        if self._short.nng_aio_alloc(byref(made), callback, key) or made.value is None:
            raise MemoryError("NanoSDK has no memory for an aio")
        return made.value

    def _lost(self, code: int) -> Lost:
        """Whichever call notices first."""
        if self.lost_at is None:
            self.lost_at = time.monotonic()
        return Lost(f"the QUIC connection ended: {self._words(code)}")

    def _words(self, code: int) -> str:
        words = self._short.nng_strerror(code) or b""
        return f"{words.decode(errors='replace')} (error {code})"


def _seconds(seconds: float) -> int:
    """Whole ones, at least one: 0 would be "never" or the library's own default."""
    return max(1, round(seconds)) if seconds else 0


def _topic(name: bytes) -> str:
    """Raises Malformed. Where the name's length was beyond the end of the packet the library gives none."""
    try:
        topic = name.decode()
    except UnicodeDecodeError:
        topic = ""
    if not topic or any(one in topic for one in "\0+#"):
        raise Malformed("PUBLISH")
    return topic


def _broken(where: str, error: Exception) -> Lost:
    return Lost(f"the connector's thread that should {where} failed: {type(error).__name__}: {error}")
