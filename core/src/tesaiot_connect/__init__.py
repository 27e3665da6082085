"""tesaiot-connect: moves IoT telemetry between MQTT brokers and everything else.

Everything public is here; what is not in `__all__` may change. Names are imported when they
are first used, so a plugin that needs a few contracts does not load the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import mqtt as mqtt, state as state, tcp as tcp
    from .accept import accepting as accepting, serving as serving
    from .access import (
        Access as Access,
        AccessRule as AccessRule,
        Anonymous as Anonymous,
        FirstOf as FirstOf,
    )
    from .accounts import (
        AccountFile as AccountFile,
        check_account_name as check_account_name,
        format_date as format_date,
        parse_date as parse_date,
    )
    from .backoff import Backoff as Backoff
    from .client import (
        Client as Client,
        ClientOptions as ClientOptions,
        ClientStatus as ClientStatus,
        MqttConnection as MqttConnection,
        StreamRule as StreamRule,
        WillOptions as WillOptions,
    )
    from .config import Config as Config, load as load
    from .device import (
        MQTTQUICClient as MQTTQUICClient,
        TESAIoTMQTTClient as TESAIoTMQTTClient,
    )
    from .dialing import (
        Attempt as Attempt,
        Dialed as Dialed,
        Dialer as Dialer,
        NegotiatingDialer as NegotiatingDialer,
    )
    from .errors import (
        ConfigError as ConfigError,
        ConnectFailed as ConnectFailed,
        ConnectorError as ConnectorError,
        Disconnected as Disconnected,
        EndOfInput as EndOfInput,
        EndOfOutput as EndOfOutput,
        NotApplicable as NotApplicable,
        PartialDelivery as PartialDelivery,
        PathLost as PathLost,
        PayloadError as PayloadError,
        PluginError as PluginError,
        Problem as Problem,
        ProtocolError as ProtocolError,
        PublishRefused as PublishRefused,
        Refused as Refused,
        Unsupported as Unsupported,
    )
    from .hookspecs import hookimpl as hookimpl
    from .message import (
        NO_PROPERTIES as NO_PROPERTIES,
        Batch as Batch,
        Delivery as Delivery,
        Message as Message,
        Properties as Properties,
        Record as Record,
        Records as Records,
        Route as Route,
        Undecodable as Undecodable,
    )
    from .mqtt.packets import Connack as Connack, Subscription as Subscription
    from .negotiation import NegotiationOptions as NegotiationOptions, Negotiator as Negotiator
    from .pipeline import (
        PipelineSpec as PipelineSpec,
        PipelineStats as PipelineStats,
        SinkSpec as SinkSpec,
        SinkStats as SinkStats,
        SourceSpec as SourceSpec,
    )
    from .protocols import (
        Auth as Auth,
        Authenticator as Authenticator,
        BoundUrl as BoundUrl,
        ByteStream as ByteStream,
        Challenge as Challenge,
        CheckedTransport as CheckedTransport,
        ClientCertificate as ClientCertificate,
        CloseReason as CloseReason,
        Connection as Connection,
        ConnectionStatus as ConnectionStatus,
        Credentials as Credentials,
        Duration as Duration,
        Handler as Handler,
        LazyTransport as LazyTransport,
        LimitedTransport as LimitedTransport,
        Listener as Listener,
        ListenerStatus as ListenerStatus,
        Login as Login,
        Pausable as Pausable,
        Peer as Peer,
        Principal as Principal,
        ProbedTransport as ProbedTransport,
        Process as Process,
        QuicState as QuicState,
        QuicStatus as QuicStatus,
        RawSerializer as RawSerializer,
        Reader as Reader,
        RevocablePrincipal as RevocablePrincipal,
        RotatingAuth as RotatingAuth,
        ScopedPrincipal as ScopedPrincipal,
        Secret as Secret,
        Serializer as Serializer,
        Sink as Sink,
        Size as Size,
        Source as Source,
        State as State,
        Transport as Transport,
        Url as Url,
        Writer as Writer,
    )
    from .runner import Summary as Summary, run as run, run_blocking as run_blocking
    from .secret import (
        SecretFrom as SecretFrom,
        read_secret as read_secret,
        secret_changed as secret_changed,
        secret_origin as secret_origin,
        secret_stamp as secret_stamp,
    )
    from .server import (
        Broker as Broker,
        BrokerOptions as BrokerOptions,
        BrokerStats as BrokerStats,
        ListenerSpec as ListenerSpec,
    )
    from .streams import (
        AsyncioStream as AsyncioStream,
        StreamConnection as StreamConnection,
    )
    from .tls import (
        ServerTls as ServerTls,
        TlsOptions as TlsOptions,
        certificate_facts as certificate_facts,
        explain_tls as explain_tls,
    )

_HOMES = {
    "access": ("Access", "AccessRule", "Anonymous", "FirstOf"),
    "accounts": ("AccountFile", "check_account_name", "format_date", "parse_date"),
    "secret": ("SecretFrom", "read_secret", "secret_changed", "secret_origin", "secret_stamp"),
    "errors": (
        "ConfigError",
        "ConnectFailed",
        "ConnectorError",
        "Disconnected",
        "EndOfInput",
        "EndOfOutput",
        "NotApplicable",
        "PartialDelivery",
        "PathLost",
        "PayloadError",
        "PluginError",
        "Problem",
        "ProtocolError",
        "PublishRefused",
        "Refused",
        "Unsupported",
    ),
    "message": (
        "Batch",
        "Delivery",
        "Message",
        "NO_PROPERTIES",
        "Properties",
        "Record",
        "Records",
        "Route",
        "Undecodable",
    ),
    "protocols": (
        "Auth",
        "Authenticator",
        "BoundUrl",
        "ByteStream",
        "Challenge",
        "CheckedTransport",
        "ClientCertificate",
        "CloseReason",
        "Connection",
        "ConnectionStatus",
        "Credentials",
        "Duration",
        "Handler",
        "LazyTransport",
        "LimitedTransport",
        "Listener",
        "ListenerStatus",
        "Login",
        "Pausable",
        "Peer",
        "Principal",
        "ProbedTransport",
        "Process",
        "QuicState",
        "QuicStatus",
        "RawSerializer",
        "Reader",
        "RevocablePrincipal",
        "RotatingAuth",
        "ScopedPrincipal",
        "Secret",
        "Serializer",
        "Sink",
        "Size",
        "Source",
        "State",
        "Transport",
        "Url",
        "Writer",
    ),
    "mqtt.packets": (
        "Connack",
        "Subscription",
    ),
    "streams": (
        "AsyncioStream",
        "StreamConnection",
    ),
    "accept": ("accepting", "serving"),
    "tls": (
        "ServerTls",
        "TlsOptions",
        "certificate_facts",
        "explain_tls",
    ),
    "backoff": ("Backoff",),
    "negotiation": ("NegotiationOptions", "Negotiator"),
    "dialing": ("Attempt", "Dialed", "Dialer", "NegotiatingDialer"),
    "client": (
        "Client",
        "ClientOptions",
        "ClientStatus",
        "MqttConnection",
        "StreamRule",
        "WillOptions",
    ),
    "pipeline": (
        "PipelineSpec",
        "PipelineStats",
        "SinkSpec",
        "SinkStats",
        "SourceSpec",
    ),
    "server": (
        "Broker",
        "BrokerOptions",
        "BrokerStats",
        "ListenerSpec",
    ),
    "hookspecs": ("hookimpl",),
    "device": (
        "MQTTQUICClient",
        "TESAIoTMQTTClient",
    ),
    "config": (
        "Config",
        "load",
    ),
    "runner": (
        "Summary",
        "run",
        "run_blocking",
    ),
}
_EXPORTS = {name: room for room, names in _HOMES.items() for name in names}
_ROOMS = ("mqtt", "state", "tcp")
"""Rooms that are public as a whole: their functions read best with the room's name."""

__all__ = [  # noqa: PLE0604 - the table above is the one list of names
    *sorted((*_EXPORTS, *_ROOMS)),
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    room = _EXPORTS.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{room}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_ROOMS})
