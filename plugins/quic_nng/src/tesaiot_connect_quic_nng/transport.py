"""The recipe: an endpoint's options.

Owns: those, their help and their limits. Rule: importing it starts and loads nothing, since every command
reads the recipes of all plugins; `connection` does the work.
"""

from __future__ import annotations

# ruff: noqa: RUF009 - `_option` is attrs.field
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs

from tesaiot_connect import (
    ClientCertificate,
    Connection,
    ConnectorError,
    Duration,
    Size,
    TlsOptions,
    Unsupported,
    Url,
)

_ELSEWHERE = 'use via = "quic_aioquic" (pip install tesaiot-connect-quic-aioquic), which can'

_path = attrs.converters.optional(Path)


def _option(default: Any, text: str, **more: Any) -> Any:
    return attrs.field(default=default, kw_only=True, metadata={"help": text}, **more)


def _some(_instance: Any, field: Any, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{field.name} must be more than nothing")


def _not_negative(_instance: Any, field: Any, value: float) -> None:
    if value < 0:
        raise ValueError(f"{field.name} must not be negative")


def _window(_instance: Any, _field: Any, value: int) -> None:
    if not 1 <= value <= 32:
        raise ValueError(
            f"window must be from 1 to 32, not {value}: NanoSDK loses messages when more are under way"
        )


_OF_BOTH = (
    "check the server's host name",
    "send data with the handshake (0-RTT)",
    "open more than one stream, move to another address, or use IPv6",
    "listen",
)
_OF_NANOSDK = (
    "send DISCONNECT, so the will is published whenever a connection ends",
    "use enhanced authentication, or MQTT 5 at all",
    "hold back acknowledgements until a message was processed, so subscriptions are granted QoS 0",
    "tell whether the broker refused the login",
)


class _Cannot:
    def __get__(self, recipe: QuicNng | None, _kind: type[QuicNng]) -> tuple[str, ...]:
        nanonng = recipe is not None and recipe.backend == "nanonng"
        return _OF_BOTH if nanonng else (*_OF_NANOSDK, *_OF_BOTH)


@attrs.frozen
class QuicNng:
    """`quic://host:14567` through an installed NanoSDK or NanoNNG, which runs in a process of its own."""

    schemes: ClassVar[Mapping[str, int]] = {"quic": 14567}
    rank: ClassVar[int] = 50
    races: ClassVar[bool] = False
    cannot: ClassVar[Sequence[str]] = _Cannot()  # type: ignore[assignment]
    """As phrases behind "cannot": of the class for NanoSDK, of a recipe for its backend."""

    url: Url
    tls: TlsOptions = attrs.field(factory=TlsOptions, kw_only=True)
    library: Path | None = _option(
        None,
        "Path of libnng with MQTT over QUIC. Default: TESAIOT_NNG_LIBRARY, then where the system looks for "
        "libraries.",
        converter=_path,
    )
    msquic: Path | None = _option(
        None,
        "Path of libmsquic, which libnng needs. Default: TESAIOT_MSQUIC_LIBRARY, then beside libnng, then "
        "where the system looks for libraries.",
        converter=_path,
    )
    backend: Literal["nanosdk", "nanonng"] = _option(
        "nanosdk",
        "What the library is: NanoSDK, an MQTT client, or NanoNNG, whose QUIC streams are used directly. "
        "Stock NanoNNG stops receiving now and then, see `watchdog`.",
        validator=attrs.validators.in_(("nanosdk", "nanonng")),
    )
    verify_hostname: bool = _option(
        True,
        "Whether the server's certificate must have the endpoint's host name. The libraries cannot check "
        "that, so true leaves this endpoint out. false trusts every certificate of the authorities in "
        "`tls.ca_file`, which must then be set.",
    )
    accept_early_acks: bool = _option(
        False,
        "What NanoSDK receives it acknowledges at once, before it was processed. So subscriptions are asked "
        "and granted at QoS 0. true makes that QoS 1, though messages on their way are lost when this "
        "program dies; the broker must not have 200 or more in flight to a client.",
    )
    window: int = _option(
        16,
        "Messages of QoS 1 and 2 that may be unacknowledged, from 1 to 32.",
        validator=_window,
    )
    connect_timeout: Duration = _option(
        Duration(5.0), "For starting the process, loading the library and the handshake.", validator=_some
    )
    ack_timeout: Duration = _option(
        Duration(10.0),
        "How long an acknowledgement, or a sign of life of the process, may take. Then the connection is "
        "given up, and what was not acknowledged is sent again.",
        validator=_some,
    )
    idle_timeout: Duration = _option(
        Duration(30.0), "Silence of the server after which QUIC gives the connection up.", validator=_some
    )
    keepalive: Duration = _option(
        Duration(10.0),
        "Silence after which QUIC asks whether the path is alive, which keeps NATs open too; 0s never.",
        validator=_not_negative,
    )
    watchdog: Duration = _option(
        Duration(10.0),
        "NanoNNG: how often a PINGREQ asks whether bytes still come in, and how long the answer may take.",
        validator=_some,
    )
    memory: Size = _option(
        Size(64 * 1024 * 1024),
        "Bytes from the server that may wait to be read. Nothing can hold it back, so more end the "
        "connection.",
        validator=_some,
    )

    def __attrs_post_init__(self) -> None:
        if self.keepalive >= self.idle_timeout:
            raise ValueError(
                "idle_timeout must be longer than keepalive, or a silent connection ends before it is asked"
            )
        if not self.verify_hostname and self.tls.verify == "full" and self.tls.ca_file is None:
            raise ValueError(
                "verify_hostname = false needs `ca_file` in the tls table: with the system's authorities "
                "anybody who has a certificate for any name would be taken for the server"
            )

    @property
    def secure(self) -> bool:
        return True

    @property
    def port(self) -> int:
        return self.url.port or self.schemes[self.url.scheme]

    @property
    def place(self) -> str:
        return str(attrs.evolve(self.url, port=self.port))

    @classmethod
    def missing(cls) -> ConnectorError | None:
        """Why no connection can be made on this machine: no library, or one that lacks what is needed.
        None where all is there. Loads the library in a process of its own, which may take seconds."""
        from . import supervisor

        return supervisor.missing()

    def refusal(self) -> ConnectorError | None:
        """What neither library can keep, whatever is installed."""
        tls, host = self.tls, self.url.host
        if tls.verify == "full" and self.verify_hostname:
            return Unsupported(
                "quic_nng cannot do what verify_hostname = true asks for: NanoSDK and NanoNNG do not check "
                "that the server's certificate has the name of its host",
                fix=f"{_ELSEWHERE}; or set verify_hostname = false beside the endpoint's url, with a ca_file "
                "in the tls table that holds an authority of your own: each of its certificates is then "
                "taken for the server's",
            )
        if tls.server_name is not None:
            return Unsupported(
                "quic_nng cannot ask for the server by another name: server_name "
                f"{tls.server_name!r} is set in the tls table",
                fix=f"{_ELSEWHERE}, or remove server_name and use that name as the endpoint's host",
            )
        if ":" in host:
            return Unsupported(
                "quic_nng speaks IPv4 alone",
                fix=f"{_ELSEWHERE}, or use a host name or an IPv4 address of the server",
            )
        return None

    def load(self) -> None:
        from . import connection  # noqa: F401

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """`early` is not sent. Raises ConnectFailed, and Unsupported for what the library cannot do or
        where it is not installed."""
        from . import connection

        return await connection.connect(self, identity=identity)
