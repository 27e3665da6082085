"""Where plugins meet the core: the hooks a plugin may implement.

Owns: the names, signatures and meaning of all hooks. Rule: every hook takes nothing, returns
`{implementation name: recipe class}`, and is called once, when a configuration is composed;
the running pipeline never sees pluggy.

A plugin is an installed package with one entry point in the group `tesaiot_connect`, which
names a module (or an object) whose functions are marked with `hookimpl`:

    from tesaiot_connect import hookimpl

    @hookimpl
    def tesaiot_sinks():
        return {"influx": InfluxSink}

A recipe class is a frozen attrs class. Its fields are the keys of its TOML table, with their
types checked strictly: `str`, `int`, `float`, `bool`, `bytes` (UTF-8 text), `Literal`, enums,
`X | None`, unions, `list`, `tuple`, `frozenset`, `dict`, `Duration`, `Size`, `Secret`, `Url`,
`pathlib.Path` (made absolute: relative to the file that says it) and attrs classes, which are
tables of their own. A field of type `MqttConnection` takes the name of a connection.
The metadata `{"help": "..."}` of a field describes the key in the reference and in editors.
"""

from __future__ import annotations

from collections.abc import Mapping

import pluggy

from .protocols import Auth, Authenticator, Serializer, Sink, Source, Transport

GROUP = "tesaiot_connect"
"""Name of the entry-point group, and of the pluggy project."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def tesaiot_transports() -> Mapping[str, type[Transport]]:  # type: ignore[empty-body]
    """Ways to a broker, chosen by the scheme of a URL in `endpoints`.

    The class says its `schemes`, `rank` and `races`; its first field is `url: Url`, a field
    `tls` receives the connection's TLS table. With a method `listen` it also serves.
    What it `cannot` do, and what is `missing` on this machine, it may say too: `LimitedTransport`,
    `ProbedTransport`. Reserved key: `via`.
    """


@hookspec
def tesaiot_auths() -> Mapping[str, type[Auth]]:  # type: ignore[empty-body]
    """Ways to log in, chosen by `type` in a connection's `auth` table. Reserved key: `type`."""


@hookspec
def tesaiot_authenticators() -> Mapping[str, type[Authenticator]]:  # type: ignore[empty-body]
    """Ways for a server to know its clients, chosen by `type` in a listener's `auth` table.

    Reserved key: `type`.
    """


@hookspec
def tesaiot_serializers() -> Mapping[str, type[Serializer]]:  # type: ignore[empty-body]
    """Payload formats, chosen by `serializer` of a source or sink. Reserved key: `type`."""


@hookspec
def tesaiot_sources() -> Mapping[str, type[Source]]:  # type: ignore[empty-body]
    """Where messages come from, chosen by `type` in `[sources.<name>]`.

    Reserved keys: `type`, `serializer`, `topic_fields`.
    """


@hookspec
def tesaiot_sinks() -> Mapping[str, type[Sink]]:  # type: ignore[empty-body]
    """Where messages go, chosen by `type` in `[sinks.<name>]`. Reserved keys: `type`, `serializer`."""
