"""How a client is configured and what can be seen of it.

Owns: the keys of a connection's table that are not about transport, and the status snapshot.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs

from ..backoff import Backoff
from ..dialing import Attempt
from ..errors import ProtocolError
from ..mqtt.topics import check_filter, check_topic
from ..protocols import ConnectionStatus, Duration, Size


def _client_id(_instance: Any, _field: Any, value: str) -> None:
    if len(value.encode()) > 65535 or "\0" in value:
        raise ValueError("client_id must be at most 65535 bytes and hold no null character")


def _seconds(_instance: Any, field: attrs.Attribute[Any], value: float) -> None:
    if not 0 <= value <= 65535:
        raise ValueError(f"{field.name} must be between 0 and 65535 seconds, not {value}")


def _topic(_instance: Any, _field: Any, value: str) -> None:
    try:
        check_topic(value)
    except ProtocolError as error:
        raise ValueError(f"{error.what}: a will goes to one topic, without wildcards") from error


def _filter(_instance: Any, _field: Any, value: str) -> None:
    try:
        check_filter(value)
    except ProtocolError as error:
        raise ValueError(error.what) from error
    if value.startswith("$share/"):
        raise ValueError(f"{value!r} names a group of subscribers: write the filter behind the group alone")


def _named(_instance: Any, _field: Any, value: str) -> None:
    if not value:
        raise ValueError("a stream needs a name, any name")


def _rules(instance: Any, _field: Any, value: str | tuple[StreamRule, ...]) -> None:
    if isinstance(value, str):
        return
    named = list(dict.fromkeys(rule.stream for rule in value))
    if len(named) > instance.max_streams:
        raise ValueError(
            f"`streams` names {len(named)} streams ({', '.join(named)}), and max_streams is "
            f"{instance.max_streams}: use fewer names, or raise max_streams as far as the broker allows"
        )


@attrs.frozen(kw_only=True)
class StreamRule:
    """Topics that have a stream of their own, where the transport has several (QUIC)."""

    filter: str = attrs.field(
        validator=_filter,
        metadata={"help": "Topics that go on this stream. The first rule that matches a topic counts."},
    )
    stream: str = attrs.field(
        validator=_named,
        metadata={"help": "A name for the stream, of your choice; rules with the same name share one."},
    )
    priority: int = attrs.field(
        default=0,
        metadata={
            "help": "When there is not room for all, streams of a higher priority are sent first. "
            "The control stream has 0."
        },
    )


@attrs.frozen(kw_only=True)
class WillOptions:
    """What the broker publishes when this client vanishes."""

    topic: str = attrs.field(validator=_topic, metadata={"help": "Topic the will is published to."})
    payload: str = attrs.field(default="", metadata={"help": "Payload of the will, as text."})
    qos: Literal[0, 1, 2] = attrs.field(default=1, metadata={"help": "QoS of the will."})
    retain: bool = attrs.field(default=False, metadata={"help": "Whether the will is retained."})
    delay: Duration = attrs.field(
        default=Duration(0.0),
        metadata={"help": "How long the broker waits before it publishes the will (MQTT 5)."},
    )


@attrs.frozen(kw_only=True)
class ClientOptions:
    """How a client speaks MQTT: the keys of a connection's table that are not about transport."""

    client_id: str = attrs.field(
        default="",
        validator=_client_id,
        metadata={
            "help": "Name of the session at the broker. Without one, a random one is used and nothing is "
            "kept for this client while it does not run."
        },
    )
    protocol: Literal["auto", "5", "3.1.1"] = attrs.field(
        default="auto", metadata={"help": "MQTT version; auto is 5, or 3.1.1 when the broker refuses 5."}
    )
    keepalive: Duration = attrs.field(
        default=Duration(60.0), validator=_seconds, metadata={"help": "Time between PINGREQs; 0s is never."}
    )
    connect_timeout: Duration = attrs.field(
        default=Duration(10.0),
        metadata={"help": "How long each endpoint has to accept, and then to send CONNACK."},
    )
    clean_session: bool = attrs.field(
        default=False,
        metadata={
            "help": "Start without what the broker kept from an earlier run. Within a run the session is "
            "kept across reconnects where the protocol allows it (MQTT 5)."
        },
    )
    session_expiry: Duration = attrs.field(
        default=Duration(7 * 86400.0),
        metadata={"help": "How long the broker keeps the session while this client is away (MQTT 5)."},
    )
    receive_maximum: int = attrs.field(
        default=65535,
        validator=[attrs.validators.ge(1), attrs.validators.le(65535)],
        metadata={
            "help": "QoS 1 and 2 messages the broker may send before it waits for acknowledgement (MQTT 5)."
        },
    )
    maximum_packet_size: Size = attrs.field(
        default=Size(16 * 1024 * 1024), metadata={"help": "Largest packet to accept from the broker."}
    )
    topic_aliases: int = attrs.field(
        default=0,
        validator=[attrs.validators.ge(0), attrs.validators.le(65535)],
        metadata={"help": "Topic aliases the broker may use towards this client (MQTT 5)."},
    )
    will: WillOptions | None = attrs.field(
        default=None, metadata={"help": "What the broker publishes when this client vanishes."}
    )
    early_publish: bool = attrs.field(
        default=False,
        metadata={
            "help": "Send QoS 1 messages that wait already right behind CONNECT, at most 16 of 8 KiB "
            "together, instead of after CONNACK. Over QUIC with 0-RTT they go out with the first packet. An "
            "attacker who replays that packet, or a lost answer, can make the broker get them twice."
        },
    )
    streams: Literal["single", "per-topic", "per-qos"] | tuple[StreamRule, ...] = attrs.field(
        default="single",
        validator=_rules,
        metadata={
            "help": "How messages are spread over streams, where the transport has several (QUIC; elsewhere "
            "all go on one): a lost packet then holds up only its own stream. `single` is one stream; "
            "`per-topic` spreads topics over `max_streams` streams; `per-qos` gives QoS 0 and QoS 1 one "
            "each; a list of rules gives topics their own, and subscriptions too, unless the session is to "
            "be kept (`client_id` without `clean_session`). Order holds for each topic, not between topics. "
            "QoS 2 is always on the control stream. A subscription on a stream of its own misses what "
            "comes while it is disconnected, also at QoS 1."
        },
    )
    max_streams: int = attrs.field(
        default=8,
        validator=[attrs.validators.ge(1), attrs.validators.le(16)],
        metadata={
            "help": "Streams that `streams` may open besides the control stream. Brokers commonly allow 9; "
            "what a broker refuses goes on the control stream."
        },
    )
    reconnect: Backoff = attrs.field(
        factory=Backoff, metadata={"help": "Delays between attempts to connect, which never end."}
    )


ClientState = Literal["idle", "connecting", "connected", "waiting", "closed"]


@attrs.frozen
class ClientStatus:
    """A snapshot of a client: which way it is connected and since when, what was tried, what it did.

    `since` is when the state began, in seconds since the epoch.
    """

    name: str
    state: ClientState
    since: float
    client_id: str
    endpoint: str = ""
    """Address of the other end: "host:port"."""
    url: str = ""
    """That endpoint as configured; empty where the dialer does not tell."""
    transport: str = ""
    version: str = ""
    session_present: bool = False
    connects: int = 0
    """Connections that were accepted so far."""
    moves: int = 0
    """Those of them that took the place of a connection by a way that is less preferred."""
    better_after: float | None = None
    """When an attempt at a preferred endpoint is due, in seconds since the epoch; None while not connected,
    and where there is no such endpoint or no move to it."""
    attempts: tuple[Attempt, ...] = ()
    """The endpoints that were tried for the present connection or, while there is none, in the latest
    attempt; and those that cannot take part, each with the reason."""
    received: int = 0
    published: int = 0
    streams: int = 0
    """Data streams that are open now, besides the control stream."""
    unrouted: int = 0
    """Messages that no subscription of this client wanted (left over in an old session)."""
    last_error: str = ""
    connection: ConnectionStatus | None = None
    """What the transport says of the present connection."""
