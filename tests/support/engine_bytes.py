"""Engines without any transport: bytes given as hex, connected clients and servers, and what they wrote."""

from __future__ import annotations

from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.events import (
    Close,
    Closed,
    Connected,
    ConnectRequest,
    Send,
)
from tesaiot_connect.mqtt.packets import Connack, Connect
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session

PUBLISH_Q1 = "32 07 0001 74 {:04x} 00 78"
PUBLISH_Q2 = "34 07 0001 74 {:04x} 00 78"


def raw(text):
    return bytes.fromhex(text.replace("|", ""))


def written(engine):
    return b"".join(one.data for one in engine.outputs() if isinstance(one, Send))


def closing(engine):
    """The bytes that still go out, and whether the transport is closed behind them."""
    outputs = engine.outputs()
    assert not any(isinstance(one, Close) for one in outputs[:-1])
    return b"".join(one.data for one in outputs if isinstance(one, Send)), bool(outputs) and isinstance(
        outputs[-1], Close
    )


def client(
    version=5, *, session=None, connack=None, clean_start=True, keepalive=60, announced=None, **options
):
    """A connected client."""
    connect = Connect(
        client_id="c",
        version=version,
        clean_start=clean_start,
        keepalive=keepalive,
        properties=announced or {},
    )
    engine = ClientEngine(connect, Session() if session is None else session, now=0.0, **options)
    assert written(engine) == codec.encode_connect(connect)
    found = Connack(session_present=False, properties={}) if connack is None else connack
    events = engine.receive_data(codec.encode_connack(found, version), now=0.0)
    assert isinstance(events[0], Connected)
    return engine


def server(version=5, *, limits=None, session=None, present=False, announced=None, **connect):
    """A server with a client that was accepted."""
    engine = ServerEngine(limits or ServerLimits(), now=0.0)
    packet = Connect(client_id="c", version=version, properties=announced or {}, **connect)
    [request] = engine.receive_data(codec.encode_connect(packet), now=0.0)
    assert request == ConnectRequest(packet)
    engine.accept(Session() if session is None else session, now=0.0, session_present=present)
    assert written(engine)[:1] == b"\x20"
    assert engine.take_events() == []
    return engine


def ended(events, code=None):
    """The Closed with which these events end; checks its reason if one is given."""
    assert isinstance(events[-1], Closed), events
    assert not any(isinstance(one, Closed) for one in events[:-1])
    if code is not None:
        assert events[-1].reason_code == code, events[-1]
    return events[-1]


def disconnect_code(data):
    """The reason code of the DISCONNECT that these bytes end with."""
    at = data.rindex(b"\xe0")
    assert len(data) == at + 2 + data[at + 1]
    return data[at + 2] if data[at + 1] else 0
