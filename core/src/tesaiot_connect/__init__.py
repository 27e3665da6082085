"""tesaiot-connect: moves IoT telemetry between MQTT brokers and everything else.

Everything public is here; what is not in `__all__` may change. Names are imported when they
are first used, so a plugin that needs a few contracts does not load the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backoff import Backoff as Backoff
    from .client import (
        Client as Client,
    )
    from .client import (
        ClientOptions as ClientOptions,
    )
    from .client import (
        ClientStatus as ClientStatus,
    )
    from .client import (
        MqttConnection as MqttConnection,
    )
    from .client import (
        WillOptions as WillOptions,
    )
    from .config import Config as Config
    from .config import load as load
    from .errors import (
        ConfigError as ConfigError,
    )
    from .errors import (
        ConnectFailed as ConnectFailed,
    )
    from .errors import (
        ConnectorError as ConnectorError,
    )
    from .errors import (
        Disconnected as Disconnected,
    )
    from .errors import (
        EndOfInput as EndOfInput,
    )
    from .errors import (
        PartialDelivery as PartialDelivery,
    )
    from .errors import (
        PayloadError as PayloadError,
    )
    from .errors import (
        PluginError as PluginError,
    )
    from .errors import (
        Problem as Problem,
    )
    from .errors import (
        ProtocolError as ProtocolError,
    )
    from .errors import (
        PublishRefused as PublishRefused,
    )
    from .errors import (
        Refused as Refused,
    )
    from .errors import (
        Unsupported as Unsupported,
    )
    from .hookspecs import hookimpl as hookimpl
    from .message import (
        NO_PROPERTIES as NO_PROPERTIES,
    )
    from .message import (
        Batch as Batch,
    )
    from .message import (
        Delivery as Delivery,
    )
    from .message import (
        Message as Message,
    )
    from .message import (
        Properties as Properties,
    )
    from .message import (
        Record as Record,
    )
    from .message import (
        Route as Route,
    )
    from .message import (
        Undecodable as Undecodable,
    )
    from .mqtt.packets import Connack as Connack
    from .mqtt.packets import Subscription as Subscription
    from .negotiation import InOrder as InOrder
    from .pipeline import (
        PipelineSpec as PipelineSpec,
    )
    from .pipeline import (
        PipelineStats as PipelineStats,
    )
    from .pipeline import (
        SinkSpec as SinkSpec,
    )
    from .pipeline import (
        SinkStats as SinkStats,
    )
    from .pipeline import (
        SourceSpec as SourceSpec,
    )
    from .protocols import (
        Auth as Auth,
    )
    from .protocols import (
        Authenticator as Authenticator,
    )
    from .protocols import (
        ByteStream as ByteStream,
    )
    from .protocols import (
        Challenge as Challenge,
    )
    from .protocols import (
        ClientCertificate as ClientCertificate,
    )
    from .protocols import (
        CloseReason as CloseReason,
    )
    from .protocols import (
        Connection as Connection,
    )
    from .protocols import (
        ConnectionStatus as ConnectionStatus,
    )
    from .protocols import (
        Credentials as Credentials,
    )
    from .protocols import (
        Dialer as Dialer,
    )
    from .protocols import (
        Duration as Duration,
    )
    from .protocols import (
        Handler as Handler,
    )
    from .protocols import (
        Listener as Listener,
    )
    from .protocols import (
        Login as Login,
    )
    from .protocols import (
        Peer as Peer,
    )
    from .protocols import (
        Principal as Principal,
    )
    from .protocols import (
        Process as Process,
    )
    from .protocols import (
        RawSerializer as RawSerializer,
    )
    from .protocols import (
        Reader as Reader,
    )
    from .protocols import (
        Secret as Secret,
    )
    from .protocols import (
        Serializer as Serializer,
    )
    from .protocols import (
        Sink as Sink,
    )
    from .protocols import (
        Size as Size,
    )
    from .protocols import (
        Source as Source,
    )
    from .protocols import (
        State as State,
    )
    from .protocols import (
        Transport as Transport,
    )
    from .protocols import (
        Url as Url,
    )
    from .protocols import (
        Writer as Writer,
    )
    from .runner import Summary as Summary
    from .runner import run as run
    from .server import (
        Broker as Broker,
    )
    from .server import (
        BrokerOptions as BrokerOptions,
    )
    from .server import (
        BrokerStats as BrokerStats,
    )
    from .server import (
        ListenerSpec as ListenerSpec,
    )
    from .streams import (
        AsyncioStream as AsyncioStream,
    )
    from .streams import (
        StreamConnection as StreamConnection,
    )
    from .streams import (
        accepting as accepting,
    )
    from .tls import (
        ServerTls as ServerTls,
    )
    from .tls import (
        TlsOptions as TlsOptions,
    )
    from .tls import (
        certificate_facts as certificate_facts,
    )
    from .tls import (
        explain_tls as explain_tls,
    )

_HOMES = {
    "errors": (
        "ConfigError",
        "ConnectFailed",
        "ConnectorError",
        "Disconnected",
        "EndOfInput",
        "PartialDelivery",
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
        "Route",
        "Undecodable",
    ),
    "protocols": (
        "Auth",
        "Authenticator",
        "ByteStream",
        "Challenge",
        "ClientCertificate",
        "CloseReason",
        "Connection",
        "ConnectionStatus",
        "Credentials",
        "Dialer",
        "Duration",
        "Handler",
        "Listener",
        "Login",
        "Pausable",
        "Peer",
        "Principal",
        "Process",
        "RawSerializer",
        "Reader",
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
        "accepting",
    ),
    "tls": (
        "ServerTls",
        "TlsOptions",
        "certificate_facts",
        "explain_tls",
    ),
    "backoff": ("Backoff",),
    "negotiation": ("InOrder",),
    "client": (
        "Client",
        "ClientOptions",
        "ClientStatus",
        "MqttConnection",
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
    "config": (
        "Config",
        "load",
    ),
    "runner": (
        "Summary",
        "run",
    ),
}
_EXPORTS = {name: room for room, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604 - the table above is the one list of names
    *sorted(_EXPORTS),
]


def __getattr__(name: str) -> Any:
    room = _EXPORTS.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{room}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
