"""Every contract a plugin may implement, and the small types those contracts speak.

Owns: the seams. Rule: a component is a frozen attrs class whose fields are its TOML table (a
*recipe*); opening the recipe gives the live object; to reconnect, open the same recipe again.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Literal, NewType, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

import attrs

from .errors import ConnectorError
from .message import Delivery, Record

Duration = NewType("Duration", float)
"""Seconds. In TOML a string with a unit: "200ms", "10s", "5m", "2h", "7d"."""
Size = NewType("Size", int)
"""Bytes. In TOML a string with a unit: "64KiB", "10MB"."""


class Secret(str):
    """A string that does not print itself. `str.__str__(secret)` and `reveal()` give the text."""

    def reveal(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"


@attrs.frozen
class Url:
    """Where an endpoint is. `port` 0 in a recipe means the scheme's default port.

    In TOML: a string, for example "mqtts://broker.example:8883" or "unix:///run/mqtt.sock".
    """

    scheme: str
    host: str
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Url:
        """Raises ValueError, saying what is wrong with the text."""
        try:
            parts = urlsplit(text)
            port = parts.port or 0
        except ValueError as error:
            raise ValueError(f"{text!r} is not a URL: {error}") from error
        if not parts.scheme or "://" not in text:
            raise ValueError(f"{text!r} has no scheme, such as mqtts://")
        if parts.username or parts.password:
            raise ValueError("a URL must not hold credentials: use the connection's `auth` table")
        if not parts.hostname and not parts.path:
            raise ValueError(f"{text!r} names no host")
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme.lower(), unquote(parts.hostname or ""), port, path)

    def reveal(self) -> str:
        """All of it; `parse` reads it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port else "") + self.path

    def __str__(self) -> str:
        """For people: what its query says is hidden, since tokens are written there."""
        path, _, query = self.path.partition("?")
        return attrs.evolve(self, path=f"{path}?***" if query else path).reveal()


@attrs.frozen
class ClientCertificate:
    """A client identity as an auth hands it to a transport: paths of PEM files, or `pem`."""

    certificate: str
    key: str
    passphrase: Secret | None = None
    """Of the key, where it is encrypted."""
    pem: bytes | None = attrs.field(default=None, repr=False)
    """The certificate, its chain and the encrypted key, where they are in no PEM file; the paths
    then only say where they came from."""


# --- transports ---------------------------------------------------------------------------


@attrs.frozen
class Peer:
    """Who is at the other end of a connection."""

    address: str
    """"host:port", or a path."""
    transport: str
    """Implementation name, for example "tcp_tls"."""
    secure: bool = False
    alpn: str | None = None
    certificate: bytes | None = None
    """The peer's verified certificate, DER, where there is one."""
    tls_version: str | None = None
    """As "TLSv1.3"; None where there is no TLS, or the transport does not tell."""


@attrs.frozen
class CloseReason:
    """Why a connection ended. Code 0 with an empty text is an orderly end."""

    code: int = 0
    text: str = ""
    by_peer: bool = False


class State(enum.Enum):
    """States of a transport connection."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class QuicState(enum.Enum):
    """Where a QUIC connection is in its life (RFC 9000 sections 4 and 10)."""

    INITIAL = "initial"
    """Nothing came from the peer yet."""
    HANDSHAKE = "handshake"
    ONE_RTT = "1-rtt"
    """The handshake is complete."""
    DRAINING = "draining"
    """It was closed, by either side or by silence; only its last packets are still dealt with."""
    CLOSED = "closed"


@attrs.frozen
class QuicStatus:
    """What QUIC knows of a connection. Times in seconds; None is "this stack does not tell"."""

    state: QuicState
    states: tuple[tuple[QuicState, float], ...] = ()
    """Every state so far, with the event loop's time when it began."""
    version: int | None = None
    """QUIC version: 1 or 2."""
    handshake_time: float | None = None
    resumed: bool = False
    early_data_accepted: bool = False
    rtt_smoothed: float | None = None
    rtt_min: float | None = None
    rtt_latest: float | None = None
    congestion_window: int | None = None
    """Bytes."""
    bytes_in_flight: int | None = None
    packets_sent: int | None = None
    packets_received: int | None = None
    packets_lost: int | None = None
    probe_timeouts: int | None = None
    """PTOs so far (RFC 9002 section 6.2)."""
    streams_open: int = 0
    streams_total: int = 0
    stream_resets: Mapping[int, int] = attrs.field(factory=dict)
    """Error code to the number of streams that either side reset with it."""
    blocked_time: float | None = None
    """Seconds a sender waited because the peer's flow control left no room."""
    migrations: int = 0
    path_mtu: int | None = None
    """Largest UDP payload that is sent, in bytes."""
    close_code: int | None = None
    close_frame: Literal["transport", "application"] | None = None


@attrs.frozen
class ConnectionStatus:
    """A snapshot. Times are the event loop's clock in seconds; None is "this transport does not know"."""

    state: State
    last_received: float
    bytes_received: int = 0
    bytes_sent: int = 0
    rtt: float | None = None
    lost: int | None = None
    migrations: int = 0
    close_reason: CloseReason | None = None
    quic: QuicStatus | None = None


@attrs.frozen
class ListenerStatus:
    """A snapshot of a listener; everything but `connections` is counted since it began."""

    connections: int = 0
    """Open now, handshakes included."""
    handshakes: int = 0
    """Under way now."""
    accepted: int = 0
    """Handshakes completed."""
    resumed: int = 0
    early_data_accepted: int = 0
    refused: Mapping[str, int] = attrs.field(factory=dict)
    """Why connections were not taken, in a word ("max_connections", "handshake_failed"), to how many."""
    retries: int = 0
    """Addresses that had to be validated first (RFC 9000 section 8.1)."""
    stateless_resets: int = 0
    datagrams_received: int = 0
    datagrams_sent: int = 0
    datagrams_dropped: int = 0
    """Received and not of any connection."""
    bytes_received: int = 0
    bytes_sent: int = 0
    migrations: int = 0


class BoundUrl(str):
    """The URL a listener is bound to, from a listener that can tell how it is doing."""

    __slots__ = ("status",)

    status: Callable[[], ListenerStatus]

    def __new__(cls, url: str, status: Callable[[], ListenerStatus]) -> BoundUrl:
        self = super().__new__(cls, url)
        self.status = status
        return self


@runtime_checkable
class ByteStream(Protocol):
    """A reliable, ordered pair of byte flows. One task may receive while another sends."""

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        """At least one byte, at most `max_bytes`; b"" is the end of the stream, for good.

        Cancel-safe: a cancelled call loses no bytes. While nobody receives, the peer is held
        back by the transport's own flow control. Raises Disconnected when the stream broke.
        """

    async def send(self, data: bytes, /) -> None:
        """Takes all of `data`; returns when there is room for more (not when it arrived).

        After a cancelled call the stream is only good for `abort`. Raises Disconnected.
        """

    async def send_eof(self) -> None:
        """No more will be sent; receiving goes on. Raises Unsupported (TLS over TCP cannot)."""

    async def aclose(self) -> None:
        """Flush, end both directions, release. Idempotent, never raises Disconnected."""

    def abort(self, code: int = 0) -> None:
        """End at once, without flushing. Idempotent."""


@runtime_checkable
class Pausable(Protocol):
    """A stream that can be told that it will not be read for a moment. Optional."""

    def pause(self) -> None:
        """Let bytes gather in the transport until the next `receive`, so that it brings more."""


@runtime_checkable
class Connection(Protocol):
    """A secured transport connection with one stream, or many when `multistream`."""

    @property
    def peer(self) -> Peer: ...
    @property
    def multistream(self) -> bool: ...
    @property
    def early_sent(self) -> bool:
        """Whether the `early` bytes given to `connect` went out (they are then not sent again)."""

    async def open_stream(self, *, priority: int = 0) -> ByteStream:
        """The first call gives the control stream; waits while the peer allows no more streams.
        Raises Unsupported for a second stream where `multistream` is false, Disconnected."""

    async def accept_stream(self) -> ByteStream:
        """The next stream the peer opened. Raises Disconnected when there will be none."""

    def status(self) -> ConnectionStatus: ...
    def set_keepalive(self, seconds: float) -> None:
        """The application's keepalive, for transports with an idle timer of their own; 0 is none."""

    async def probe(self) -> None:
        """Returns when the path proved alive. Raises Disconnected, Unsupported."""

    async def migrate(self) -> None:
        """Move to another local address. Raises Unsupported."""

    async def wait_closed(self) -> CloseReason: ...
    async def aclose(self, code: int = 0, reason: str = "") -> None:
        """Flush what was sent, close, release. Idempotent."""

    def abort(self, code: int = 0) -> None:
        """Close at once. Idempotent."""


@runtime_checkable
class Transport(Protocol):
    """A recipe; its first field is `url: Url`. A `tls` field receives the connection's TLS table."""

    schemes: ClassVar[Mapping[str, int]]
    """Scheme to default port: {"quic": 14567}."""
    rank: ClassVar[int]
    """Among implementations of one scheme, the higher is tried first."""
    races: ClassVar[bool]
    """False: cannot prove a handshake before CONNECT, so it is tried alone."""

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """Returns a connection that is secured. Raises ConnectFailed, saying what to do next.

        `early` holds replay-safe bytes for the first stream, sent in 0-RTT where possible.
        """


@runtime_checkable
class LazyTransport(Protocol):
    """A transport whose `connect` needs what takes a while to import. Optional."""

    def load(self) -> None:
        """Imports it now, so that its time does not count as the network's. Cheap from then on."""


@runtime_checkable
class LimitedTransport(Protocol):
    """A transport that cannot do all that others can. Optional."""

    cannot: ClassVar[Sequence[str]]
    """What, in phrases that go behind "cannot": "check the server's host name"."""


@runtime_checkable
class ProbedTransport(Protocol):
    """A transport that needs more than its package. Optional."""

    @classmethod
    def missing(cls) -> ConnectorError | None:
        """What must be installed besides and is not there, with how to get it in `fix`; None: all is there.
        May take a second, raises nothing. `connect` tells the same as Unsupported."""


@runtime_checkable
class CheckedTransport(Protocol):
    """A transport that knows before `connect` what of its recipe it cannot do. Optional."""

    def refusal(self) -> ConnectorError | None:
        """What was asked for and cannot be had, as `connect` will say too; None: nothing. No I/O, raises
        nothing. A configuration leaves such an endpoint out, or is wrong where no other one remains."""


Handler = Callable[[Connection], Awaitable[None]]
"""Serves one connection; the listener closes it when the handler returns or raises."""


@runtime_checkable
class Listener(Protocol):
    """Optional server half of a transport's class."""

    def listen(self, handler: Handler, /) -> AbstractAsyncContextManager[str]:
        """While open, calls `handler` for each connection. Gives the bound URL (port 0 resolved),
        as a `BoundUrl` where the listener keeps figures.

        Leaving it stops accepting, then cancels the handlers that are still running.
        """


# --- auth ---------------------------------------------------------------------------------


@attrs.frozen
class Credentials:
    """What CONNECT carries. `origin` says where they were set, for error messages only."""

    username: str | None = None
    password: bytes | None = attrs.field(default=None, repr=lambda value: "***")
    method: str | None = None
    """MQTT 5 enhanced authentication method."""
    data: bytes | None = attrs.field(default=None, repr=lambda value: "***")
    origin: str = ""


class Login(Protocol):
    """One attempt to log in."""

    @property
    def credentials(self) -> Credentials: ...
    async def respond(self, data: bytes, /) -> bytes:
        """Answer an AUTH challenge (MQTT 5 section 4.12). Raises ConnectorError to give up."""

    async def finish(self, data: bytes, /) -> None:
        """The server's last word, with CONNACK. Raises ConnectorError to reject the server."""


@runtime_checkable
class Auth(Protocol):
    """A recipe for logging in; asked again at every (re)connect, so that secrets may rotate."""

    async def begin(self) -> Login: ...
    async def identity(self) -> ClientCertificate | None:
        """The certificate for the transport's handshake, for mTLS."""


@runtime_checkable
class RotatingAuth(Protocol):
    """An auth that notices when its credentials were changed. Optional."""

    async def changed(self) -> None:
        """Returns when `begin` may give other credentials than it did. Awaited while the client
        waits to connect again, so that it need not wait any longer; cancelled when it does not."""


class Principal(Protocol):
    """Who a client turned out to be, and what it may do. What it says of a topic is remembered for
    a while (`[broker] recheck`)."""

    @property
    def name(self) -> str: ...
    @property
    def organisation(self) -> str | None: ...
    @property
    def valid_until(self) -> float | None:
        """Seconds since the epoch; the server disconnects the client then. None is for ever."""

    def may_publish(self, topic: str, /) -> bool: ...
    def may_subscribe(self, topic_filter: str, /) -> bool: ...


@runtime_checkable
class ScopedPrincipal(Protocol):
    """A principal whose subscriptions bring only part of what they match. Optional.

    Asked for each message. An attribute `scoped` that is False says that this is not needed while
    the client is connected; it is asked about what waited for the client then, no more.
    """

    def may_receive(self, topic: str, /) -> bool:
        """Whether a message to this topic may be given to the client, whatever it subscribed to."""


@runtime_checkable
class RevocablePrincipal(Protocol):
    """A principal whose right to stay connected may end before `valid_until`. Optional."""

    def refusal(self) -> str:
        """Why the client may not stay, "" while it may. Asked every few seconds: quick, no I/O
        beyond looking whether a file has changed."""


class Challenge(Protocol):
    """An enhanced authentication in progress."""

    data: bytes

    async def respond(self, data: bytes, /) -> Challenge | Principal: ...


@runtime_checkable
class Authenticator(Protocol):
    """Server side of an auth. A field `access` receives the file's `[access]` table."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Challenge | Principal:
        """Raises Refused; NotApplicable where the credentials are of a sort it does not know, so
        that the next authenticator of the listener is asked."""


# --- data ---------------------------------------------------------------------------------


@runtime_checkable
class Serializer(Protocol):
    """Sync, pure, whole batches. An element that fails becomes `Undecodable` in its place."""

    def decode(self, payloads: Sequence[bytes], /) -> list[Any]: ...
    def encode(self, values: Sequence[Any], /) -> list[bytes]:
        """Raises PayloadError, naming the value."""


@runtime_checkable
class RawSerializer(Serializer, Protocol):
    """A serializer that can check a payload without building its value."""

    def decode_raw(self, payloads: Sequence[bytes], /) -> list[Any]:
        """As `decode`, but a good element is a `msgspec.Raw` with one JSON document."""


class Reader(Protocol):
    async def read(self) -> Delivery:
        """The next batch, as soon as there is anything. Cancel-safe.

        Raises EndOfInput when there will be no more, Disconnected to be opened again.
        """


@runtime_checkable
class Source(Protocol):
    """A recipe for reading messages."""

    def open(self) -> AbstractAsyncContextManager[Reader]: ...


class Writer(Protocol):
    async def write(self, batch: Any, /) -> None:
        """Returning means delivered: it survives a kill of this process.

        Takes a `Batch` where the sink reads messages, else a `Sequence[Record]`. Raises
        PartialDelivery for elements that failed; any other error means that none is sure.
        After any error but PartialDelivery the writer is closed and the sink is opened again.
        """


@runtime_checkable
class Sink(Protocol):
    """A recipe for writing."""

    reads: ClassVar[Literal["messages", "records", "raw_records"]]
    """"messages": bytes as they came (a bridge, a raw log). "records": decoded values (a
    database). "raw_records": decoded values, which may be `msgspec.Raw` when nobody else needs
    them decoded (a sink that only copies JSON)."""

    def open(self) -> AbstractAsyncContextManager[Writer]: ...


Process = Callable[[list[Record]], Any]
"""A process step: takes a batch of records and returns the records to go on with (an iterable,
or an awaitable of one; None is "none"). It may drop, change and multiply."""
