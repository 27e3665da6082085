"""NanoSDK through ctypes alone, and a server that says what a test tells it: for tests of the stand-in."""

from __future__ import annotations

import ctypes
import socket
import time
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

from nng_stub import libraries

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK, UNSUBSCRIBE = range(1, 11)
UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = range(11, 15)
EBUSY, ECLOSED, EPROTO, ECANCELED, ECONNSHUT = 4, 7, 13, 20, 31
PATIENCE = 20.0

ON_AIO = ctypes.CFUNCTYPE(None, c_void_p)
ON_EVENT = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)


class Socket(ctypes.Structure):
    _fields_ = (("id", c_uint32),)


class Conf(ctypes.Structure):
    """`conf_quic`, its `conf_tls` first."""

    _fields_ = (
        ("enable", c_bool),
        *(
            (name, c_char_p)
            for name in ("url", "cafile", "certfile", "keyfile", "ca", "cert", "key", "password")
        ),
        ("verify_peer", c_bool),
        ("set_fail", c_bool),
        ("_to_eight", c_uint8 * 6),
        ("qos_first", c_bool),
        ("multi_stream", c_bool),
        ("qkeepalive", c_uint64),
        ("qconnect_timeout", c_uint64),
        ("qdiscon_timeout", c_uint32),
        ("qidle_timeout", c_uint32),
        ("qcongestion_control", c_uint8),
    )


class Topic(ctypes.Structure):
    _fields_ = (("length", c_uint32), ("buf", c_char_p))


class TopicQos(ctypes.Structure):
    _fields_ = (("topic", Topic), ("qos", c_uint8), ("options", c_uint8 * 3))


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """What `condition` gives once that is true; an error after a long time."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited for {what} in vain")
        time.sleep(0.002)
    return value


_CLIENTS: list[Nng] = []
"""All there were: a thread of the library may be on its way into a callback while its client is closed."""


class Nng:
    """One client. What C may call or read later lives as long as this process."""

    def __init__(self) -> None:
        _CLIENTS.append(self)
        library, msquic = libraries()
        ctypes.CDLL(str(msquic), ctypes.RTLD_GLOBAL)
        self.c = c = ctypes.CDLL(str(library))
        c.nng_sendmsg.argtypes = (Socket, c_void_p, c_int)
        c.nng_send_aio.argtypes = c.nng_recv_aio.argtypes = (Socket, c_void_p)
        c.nng_close.argtypes = c.stub_timer.argtypes = (Socket,)
        for name in ("wait", "free", "cancel", "result", "get_msg", "busy"):
            getattr(c, f"nng_aio_{name}").argtypes = (c_void_p,)
        c.nng_aio_get_msg.restype = c_void_p
        c.nng_aio_busy.restype = c_bool
        c.nng_aio_set_msg.argtypes = (c_void_p, c_void_p)
        c.nng_msg_free.argtypes = (c_void_p,)
        c.nng_strerror.restype = c.nng_version.restype = c_char_p
        for name in ("packet_type", "connack_return_code", "connack_flags", "publish_qos", "publish_dup"):
            getattr(c, f"nng_mqtt_msg_get_{name}").argtypes = (c_void_p,)
        c.nng_mqtt_msg_get_puback_packet_id.argtypes = (c_void_p,)
        c.nng_mqtt_msg_get_puback_packet_id.restype = c_uint16
        for name in ("publish_topic", "publish_payload", "suback_return_codes"):
            getattr(c, f"nng_mqtt_msg_get_{name}").argtypes = (c_void_p, POINTER(c_uint32))
            getattr(c, f"nng_mqtt_msg_get_{name}").restype = c_void_p
        self.conf = Conf(qconnect_timeout=1, qkeepalive=10, qidle_timeout=30, qdiscon_timeout=10)
        self.socket = Socket()
        self.sent = 0
        """How often the send callback was called."""
        self._kept: list[Any] = []

    def open(self, port: int) -> int:
        code: int = self.c.nng_mqtt_quic_client_open_conf(
            byref(self.socket), b"mqtt-quic://127.0.0.1:%d" % port, byref(self.conf)
        )
        if code == 0:
            self._on_event("msg_send", self._count)
        return code

    def _count(self) -> None:
        self.sent += 1

    def _on_event(self, name: str, action: Callable[[], None]) -> None:
        def called(_msg: int | None, _arg: int | None) -> int:
            action()
            return 0

        callback = ON_EVENT(called)
        self._kept.append(callback)
        assert getattr(self.c, f"nng_mqtt_quic_set_{name}_cb")(byref(self.socket), callback, None) == 0

    def on_disconnect(self, action: Callable[[], None]) -> None:
        self._on_event("disconnect", action)

    def on_ack(self, action: Callable[[int], None]) -> None:
        """`action(aio)` on a thread of the library."""
        callback = ON_AIO(action)
        self._kept.append(callback)
        assert self.c.nng_mqtt_quic_ack_callback_set(byref(self.socket), callback, None) == 0

    def message(self, kind: int, **fields: Any) -> int:
        """Each field is set by the function named after it: `publish_qos=1`. A list: several arguments."""
        made = c_void_p()
        assert self.c.nng_mqtt_msg_alloc(byref(made), 0) == 0
        self.c.nng_mqtt_msg_set_packet_type(made, kind)
        for name, value in fields.items():
            values = value if isinstance(value, list) else [value]
            getattr(self.c, f"nng_mqtt_msg_set_{name}")(made, *values)
        assert made.value
        return made.value

    def publish(self, payload: bytes, qos: int = 0, topic: bytes = b"t") -> int:
        return self.message(
            PUBLISH, publish_topic=topic, publish_payload=[payload, len(payload)], publish_qos=qos
        )

    def subscribe(self, *filters: tuple[bytes, int]) -> int:
        topics = (TopicQos * len(filters))(*(TopicQos(Topic(len(name), name), qos) for name, qos in filters))
        return self.message(SUBSCRIBE, subscribe_topics=[topics, len(filters)])

    def unsubscribe(self, *filters: bytes) -> int:
        topics = (Topic * len(filters))(*(Topic(len(name), name) for name in filters))
        return self.message(UNSUBSCRIBE, unsubscribe_topics=[topics, len(filters)])

    def send(self, message: int) -> int:
        code: int = self.c.nng_sendmsg(self.socket, message, 0)
        return code

    def connect(self, **fields: Any) -> None:
        """CONNECT goes out; waits until the library has sent it."""
        fields = {"connect_client_id": b"c", "connect_keep_alive": 60, **fields}
        assert self.send(self.message(CONNECT, **fields)) == 0

    def probe(self) -> int:
        """What sending DISCONNECT gives, which sends nothing: whether the handshake is complete."""
        message = self.message(DISCONNECT)
        code = self.send(message)
        if code == EPROTO:  # then it is still ours
            assert self.c.nng_mqtt_msg_get_packet_type(message) == DISCONNECT
            self.c.nng_msg_free(message)
        return code

    def aio(self, action: Callable[[int | None], None] | None = None) -> int:
        made = c_void_p()
        callback = ON_AIO(action) if action is not None else None
        self._kept.append(callback)
        assert self.c.nng_aio_alloc(byref(made), callback, None) == 0
        assert made.value
        return made.value

    def send_aio(self, aio: int, message: int) -> None:
        self.c.nng_aio_set_msg(aio, message)
        self.c.nng_send_aio(self.socket, aio)

    def receive(self) -> int:
        """An aio that waits for what comes in."""
        aio = self.aio()
        self.c.nng_recv_aio(self.socket, aio)
        return aio

    def waited(self, aio: int) -> int:
        """The message that completed `aio`, which is the caller's to free."""
        until(lambda: not self.c.nng_aio_busy(aio), "an aio")
        assert self.c.nng_aio_result(aio) == 0
        message: int = self.c.nng_aio_get_msg(aio)
        self.c.nng_aio_set_msg(aio, None)
        return message

    def error(self, aio: int) -> int:
        until(lambda: not self.c.nng_aio_busy(aio), "an aio")
        code: int = self.c.nng_aio_result(aio)
        return code

    def text(self, message: int) -> tuple[bytes, bytes]:
        """Topic and payload of a PUBLISH."""
        length = c_uint32()
        topic = ctypes.string_at(self.c.nng_mqtt_msg_get_publish_topic(message, byref(length)), length.value)
        start = self.c.nng_mqtt_msg_get_publish_payload(message, byref(length))
        return topic, ctypes.string_at(start, length.value) if start else b""

    def close(self) -> int:
        code: int = self.c.nng_close(self.socket)
        return code


class Peer:
    """The server's end of one connection: whole packets, as they are on the wire."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(PATIENCE)

    def packet(self) -> tuple[int, bytes]:
        """First byte and body of the next packet."""
        first, length, shift = self._exactly(1)[0], 0, 0
        while True:
            digit = self._exactly(1)[0]
            length |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                return first, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            if not (some := self.socket.recv(count - len(data))):
                raise EOFError
            data += some
        return bytes(data)

    def say(self, first: int, body: bytes = b"") -> None:
        assert len(body) < 128
        self.socket.sendall(bytes((first, len(body))) + body)

    def accept_mqtt(self, flags: int = 0, code: int = 0) -> bytes:
        """Takes CONNECT and answers it; its body."""
        first, body = self.packet()
        assert first == CONNECT << 4
        self.say(CONNACK << 4, bytes((flags, code)))
        return body

    def ack(self, *ids: int, kind: int = PUBACK) -> None:
        for packet_id in ids:
            self.say(kind << 4 | (2 if kind == PUBREL else 0), packet_id.to_bytes(2, "big"))

    def close(self) -> None:
        self.socket.close()


class Server:
    """A listener on 127.0.0.1; `accept` gives the next connection. Where `closed`, nobody gets in before
    `listen`."""

    def __init__(self, *, closed: bool = False) -> None:
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self._listening.settimeout(PATIENCE)
        self.port: int = self._listening.getsockname()[1]
        self._peers: list[Peer] = []
        if not closed:
            self.listen()

    def listen(self) -> None:
        self._listening.listen()

    def accept(self) -> Peer:
        peer = Peer(self._listening.accept()[0])
        self._peers.append(peer)
        return peer

    def refuse(self) -> None:
        """No more connections."""
        self._listening.close()

    def close(self) -> None:
        self.refuse()
        for peer in self._peers:
            peer.close()
