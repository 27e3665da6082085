"""What an operator decides about a broker, and the listeners it serves.

Owns: the `[broker]` table and its bounds. Rule: every limit has a default that a hostile peer
cannot exceed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import attrs

from ..access import Anonymous
from ..errors import ConnectorError, ProtocolError
from ..mqtt.server import ServerLimits
from ..mqtt.topics import check_filter, matches, split_shared
from ..protocols import Authenticator, Duration, Listener, Size

_at_least_one: Any = attrs.validators.ge(1)
_not_negative: Any = attrs.validators.ge(0)
_u16: Any = attrs.validators.le(65535)


def _filters(_options: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    for topic_filter in value:
        try:
            check_filter(topic_filter)
        except ProtocolError as error:
            raise ValueError(f"{attribute.name}: {error}") from error


@attrs.frozen(kw_only=True)
class BrokerOptions:
    """The `[broker]` table. The defaults serve trusted clients on one machine of any size."""

    state_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """SQLite file that keeps sessions, queues and retained messages over a restart. Without: memory only."""
    synchronous: Literal["full", "normal"] = "full"
    """"full": what was acknowledged survives a power cut. "normal": it survives a kill of the process."""

    max_connections: int = attrs.field(default=10_000, validator=_at_least_one)
    """Transport connections at once, those that have not said CONNECT yet included."""
    max_sessions: int = attrs.field(default=100_000, validator=_at_least_one)
    """Sessions, connected or not; a new client beyond is refused with quota exceeded (0x97)."""
    max_session_expiry: Duration = attrs.field(default=Duration(7 * 86400), validator=_not_negative)
    """The longest a session is kept without its client; what 3.1.1 clients get that do not ask for a
    clean session."""
    max_subscriptions: int = attrs.field(default=1000, validator=_at_least_one)
    """Per client; each one beyond is refused with quota exceeded (0x97), and so is one that brings
    the levels of the client's filters together beyond ten times this number."""
    max_total_subscriptions: int = attrs.field(default=1_000_000, validator=_at_least_one)
    """Of all clients together, likewise."""
    max_keepalive: Duration = attrs.field(default=Duration(0), validator=_not_negative)
    """MQTT 5 clients that ask for more, or for none, are told to use this. 0: they get what they ask for."""
    connect_timeout: Duration = attrs.field(default=Duration(10), validator=attrs.validators.gt(Duration(0)))
    """From the transport's connection to the end of authentication."""

    max_packet_size: Size = attrs.field(default=Size(1024 * 1024), validator=attrs.validators.ge(Size(1024)))
    """Larger packets end the connection (0x95); MQTT 5 clients are told the bound."""
    receive_maximum: int = attrs.field(default=1024, validator=[_at_least_one, _u16])
    """QoS 1 and 2 messages a client may have unacknowledged with us; a client beyond is not read (3.1.1)
    or disconnected (MQTT 5, 0x93)."""
    max_inflight: int = attrs.field(default=1024, validator=[_at_least_one, _u16])
    """QoS 1 and 2 messages we have unacknowledged with a client; its own Receive Maximum holds too."""
    send_buffer: Size = attrs.field(default=Size(1024 * 1024), validator=_at_least_one)
    """Unsent bytes per stream; beyond, QoS 0 messages are dropped and the others queued."""
    max_streams: int = attrs.field(default=10, validator=_at_least_one)
    """Streams of a connection at once, the control stream included, over a transport that has several;
    each one beyond is reset with quota exceeded (0x97)."""
    topic_alias_maximum: int = attrs.field(default=32, validator=[_not_negative, _u16])
    """Topic aliases per stream, each way."""
    maximum_qos: Literal[0, 1, 2] = 2
    """Higher ones are not accepted; MQTT 5 clients are told."""
    retain_available: bool = True
    """Whether messages may be retained."""

    max_queue_messages: int = attrs.field(default=100_000, validator=_at_least_one)
    """Per client: queued and in flight."""
    max_queue_bytes: Size = attrs.field(default=Size(64 * 1024 * 1024), validator=_at_least_one)
    """Per client, likewise; an estimate of the memory held."""
    max_total_queue_bytes: Size = attrs.field(default=Size(1024 * 1024 * 1024), validator=_at_least_one)
    """Of all clients together."""
    queue_full: Literal["drop_oldest", "drop_newest"] = "drop_oldest"
    """Which message goes when a queue is at a bound; each one is counted in the statistics."""
    queue_qos0: bool = False
    """Whether QoS 0 messages too are queued (in memory) for a client that is away."""
    max_retained: int = attrs.field(default=100_000, validator=_not_negative)
    """Retained messages of all topics together."""
    max_retained_bytes: Size = attrs.field(default=Size(256 * 1024 * 1024), validator=_not_negative)
    """Likewise in bytes; an estimate of the memory held."""

    deny_subscribe: tuple[str, ...] = attrs.field(default=(), validator=_filters)
    """A subscription that one of these filters covers entirely is refused (0x80). It hides
    nothing: a wider filter still gets the messages."""
    deny_publish: tuple[str, ...] = attrs.field(default=(), validator=_filters)
    """Messages to topics that match are refused (MQTT 5: not authorized, 0x87) and dropped."""
    recheck: Duration = attrs.field(default=Duration(2), validator=attrs.validators.gt(Duration(0)))
    """How often connected clients are asked whether they may stay, and so the longest that an account
    that was removed stays connected, or an old decision about what may be published holds."""
    response_prefix: str = ""
    """Clients that ask for response information get this, their client id and a slash as a
    topic prefix of their own. Empty: none is given."""
    drain_timeout: Duration = attrs.field(default=Duration(3), validator=_not_negative)
    """How long a stopping broker waits for its goodbyes to reach the clients."""

    def limits(self) -> ServerLimits:
        """The part that the protocol engine enforces."""
        return ServerLimits(
            maximum_packet_size=self.max_packet_size,
            receive_maximum=self.receive_maximum,
            topic_alias_maximum=self.topic_alias_maximum,
            outbound_alias_maximum=self.topic_alias_maximum,
            outbound_window=self.max_inflight,
            send_buffer=self.send_buffer,
            connect_timeout=self.connect_timeout,
            maximum_streams=self.max_streams,
            maximum_qos=self.maximum_qos,
            retain_available=self.retain_available,
        )


@attrs.frozen
class ListenerSpec:
    """One way in: a transport's recipe with a server half, and who may come by it."""

    name: str
    transport: Listener
    authenticator: Authenticator = attrs.field(factory=Anonymous)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.transport, Listener):
            raise ConnectorError(
                f"listener {self.name!r}: {type(self.transport).__name__} cannot listen",
                fix="choose a transport that has a server half",
            )


def allows(options: BrokerOptions, topic: str) -> bool:
    """Whether the options let a topic be published to."""
    return not any(matches(denied, topic) for denied in options.deny_publish)


def covers(wide: str, narrow: str) -> bool:
    """Whether every topic that the filter `narrow` matches is matched by the filter `wide`."""
    levels = split_shared(wide)[1].split("/")
    parts = split_shared(narrow)[1].split("/")
    if levels[0] in ("+", "#") and parts[0].startswith("$"):
        return False
    for index, level in enumerate(levels):
        if level == "#":
            return True
        if index >= len(parts) or parts[index] == "#" or level not in ("+", parts[index]):
            return False
    return len(levels) == len(parts)
