"""What a worker process and the process that started it tell each other beside MQTT.

Owns: those messages, one JSON document a line. Rule: secrets travel here, never in arguments or the
environment.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Stage = Literal["", "name", "reach", "secure", "upgrade"]


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="job"):
    """The first message to a worker: what to do. Times in seconds, sizes in bytes."""

    backend: Literal["nanosdk", "nanonng"] = "nanosdk"
    library: str = ""
    """Path of libnng; "" is to be searched."""
    msquic: str = ""
    url: str = ""
    """"mqtt-quic://host:port"; "" is only to say whether the library is there."""
    verify: bool = True
    """Whether the server's chain must lead to `ca_file`."""
    ca_file: str = ""
    certificate: str = ""
    """The client's, PEM; NanoSDK verifies nothing without one."""
    key: str = ""
    """PEM, not encrypted."""
    connect_timeout: float = 5.0
    ack_timeout: float = 10.0
    idle_timeout: float = 30.0
    keepalive: float = 10.0
    """Silence after which QUIC asks whether the path is alive."""
    watchdog: float = 10.0
    """NanoNNG: how often a PINGREQ asks whether bytes still come in, and how long its answer may take."""
    window: int = 16
    accept_early_acks: bool = False
    max_packet_size: int = 1_048_576
    memory: int = 67_108_864
    """Bytes from the server that may wait for the client to read."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """To a worker: answer, from the loop that serves the connection."""

    number: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """From a worker: the library is there and has what is needed."""

    library: str
    version: str


class Secured(msgspec.Struct, frozen=True, kw_only=True, tag="secured"):
    """From a worker: the QUIC handshake is complete; MQTT may follow."""

    address: str = ""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """From a worker, instead of `Secured`, and its last word."""

    what: str
    fix: str = ""
    stage: Stage = ""
    unsupported: bool = False
    """Not here, whatever the network does: no library, or one that lacks what is needed."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    number: int


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """From a worker, its last word: why the connection is over."""

    what: str
    fix: str = ""
    orderly: bool = False
    """The client ended it, and everything it said has gone out."""
    silent: bool = False
    """The other side, or the way there, does not answer any more."""
    by_peer: bool = False


Order = Job | Ping
Report = Loaded | Secured | Failed | Pong | Ended

_encoder = msgspec.json.Encoder()
orders = msgspec.json.Decoder(Order)
reports = msgspec.json.Decoder(Report)


def line(message: Order | Report) -> bytes:
    return _encoder.encode(message) + b"\n"
