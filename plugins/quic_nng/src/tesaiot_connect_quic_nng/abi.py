"""What NanoSDK's headers say (NNG 1.8), for ctypes.

Owns: structures and prototypes. Rule: no function is called that has none here: ctypes would cut its pointers
to an int.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_int,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any


class Socket(ctypes.Structure):
    _fields_ = (("id", c_uint32),)


class Tls(ctypes.Structure):
    _fields_ = (
        ("enable", c_bool),
        ("url", c_char_p),
        ("cafile", c_char_p),
        ("certfile", c_char_p),
        ("keyfile", c_char_p),
        ("ca", c_char_p),
        ("cert", c_char_p),
        ("key", c_char_p),
        ("key_password", c_char_p),
        ("verify_peer", c_bool),
        ("set_fail", c_bool),
    )


class Quic(ctypes.Structure):
    _fields_ = (
        ("tls", Tls),
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
    _fields_ = (
        ("topic", Topic),
        ("qos", c_uint8),
        ("nolocal", c_uint8),
        ("rap", c_uint8),
        ("retain_handling", c_uint8),
    )


ON_ACK = ctypes.CFUNCTYPE(None, c_void_p)
ON_SENT = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)

BLOCKING: dict[str, tuple[Any, ...]] = {
    "nng_mqtt_quic_client_open_conf": (c_int, POINTER(Socket), c_char_p, POINTER(Quic)),
    "nng_mqtt_quic_ack_callback_set": (c_int, POINTER(Socket), ON_ACK, c_void_p),
    "nng_mqtt_quic_set_msg_send_cb": (c_int, POINTER(Socket), ON_SENT, c_void_p),
    "nng_sendmsg": (c_int, Socket, c_void_p, c_int),
    "nng_send_aio": (None, Socket, c_void_p),
    "nng_recv_aio": (None, Socket, c_void_p),
    "nng_aio_wait": (None, c_void_p),
    "nng_close": (c_int, Socket),
}
"""Name: result, arguments. They take a lock of the library, or wait."""
SHORT: dict[str, tuple[Any, ...]] = {
    "nng_strerror": (c_char_p, c_int),
    "nng_aio_alloc": (c_int, POINTER(c_void_p), c_void_p, c_void_p),
    "nng_aio_busy": (c_bool, c_void_p),
    "nng_aio_result": (c_int, c_void_p),
    "nng_aio_get_msg": (c_void_p, c_void_p),
    "nng_aio_set_msg": (None, c_void_p, c_void_p),
    "nng_msg_free": (None, c_void_p),
    "nng_mqtt_msg_alloc": (c_int, POINTER(c_void_p), c_size_t),
    "nng_mqtt_msg_set_packet_type": (None, c_void_p, c_int),
    "nng_mqtt_msg_get_packet_type": (c_int, c_void_p),
    "nng_mqtt_msg_set_connect_proto_version": (None, c_void_p, c_uint8),
    "nng_mqtt_msg_set_connect_keep_alive": (None, c_void_p, c_uint16),
    "nng_mqtt_msg_set_connect_clean_session": (None, c_void_p, c_bool),
    "nng_mqtt_msg_set_connect_client_id": (None, c_void_p, c_char_p),
    "nng_mqtt_msg_set_connect_user_name": (None, c_void_p, c_char_p),
    "nng_mqtt_msg_set_connect_password": (None, c_void_p, c_char_p),
    "nng_mqtt_msg_set_connect_will_topic": (None, c_void_p, c_char_p),
    "nng_mqtt_msg_set_connect_will_msg": (None, c_void_p, c_char_p, c_uint32),
    "nng_mqtt_msg_set_connect_will_qos": (None, c_void_p, c_uint8),
    "nng_mqtt_msg_set_connect_will_retain": (None, c_void_p, c_bool),
    "nng_mqtt_msg_get_connack_return_code": (c_uint8, c_void_p),
    "nng_mqtt_msg_get_connack_flags": (c_uint8, c_void_p),
    "nng_mqtt_msg_set_publish_topic": (c_int, c_void_p, c_char_p),
    "nng_mqtt_msg_set_publish_payload": (None, c_void_p, c_char_p, c_uint32),
    "nng_mqtt_msg_set_publish_qos": (None, c_void_p, c_uint8),
    "nng_mqtt_msg_set_publish_retain": (None, c_void_p, c_bool),
    "nng_mqtt_msg_get_publish_topic": (c_void_p, c_void_p, POINTER(c_uint32)),
    "nng_mqtt_msg_get_publish_payload": (c_void_p, c_void_p, POINTER(c_uint32)),
    "nng_mqtt_msg_get_publish_qos": (c_uint8, c_void_p),
    "nng_mqtt_msg_get_publish_retain": (c_bool, c_void_p),
    "nng_mqtt_msg_get_puback_packet_id": (c_uint16, c_void_p),
    "nng_mqtt_msg_set_subscribe_topics": (None, c_void_p, POINTER(TopicQos), c_uint32),
    "nng_mqtt_msg_set_unsubscribe_topics": (None, c_void_p, POINTER(Topic), c_uint32),
    "nng_mqtt_msg_get_suback_return_codes": (c_void_p, c_void_p, POINTER(c_uint32)),
}


def bound(library: ctypes.CDLL, prototypes: dict[str, tuple[Any, ...]]) -> Any:
    for name, (result, *arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
