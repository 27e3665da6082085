"""Recipes -> JSON Schema, so that editors complete and check TOML.

Owns: how each Python type is described. Rule: it is generated from the same classes that the
configuration is read into, so the two cannot disagree. Descriptions come from a field's
metadata ("help") or the docstring below it, and from the docstrings of classes.
"""

from __future__ import annotations

import ast
import enum
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, Literal, get_args

import attrs

from ..client import ClientOptions, MqttConnection
from ..negotiation import NegotiationOptions
from ..plugins import Catalog, Kind
from ..protocols import Duration, Secret, Size, Url
from ..secret import SecretFrom
from .compose import PipelineTable
from .endpoints import ALIASES
from .security import SecurityOptions
from .structure import LISTS, TABLES, UNIONS, base_of, key_of

Schema = dict[str, Any]

VARIABLE = {"type": "string", "pattern": r"\$\{.*\}"}
"""What may stand for a number or boolean: the value of an environment variable."""
_LEAVES: Mapping[Any, Schema] = {
    str: {"type": "string"},
    bytes: {"type": "string"},
    Secret: {"type": "string"},
    FilePath: {"type": "string"},
    Url: {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9+.-]*://|\\$\\{"},
    MqttConnection: {"type": "string", "description": "Name of a connection."},
    Duration: {"type": "string", "pattern": r"^\s*[0-9.]+\s*(us|ms|s|m|h|d)\s*$|\$\{"},
    Size: {"type": "string", "pattern": r"^\s*[0-9.]+\s*(B|[kKMGT]B|[KMGT]iB)\s*$|\$\{"},
    Any: {},
    object: {},
    int: {"anyOf": [{"type": "integer"}, VARIABLE]},
    float: {"anyOf": [{"type": "number"}, VARIABLE]},
    bool: {"anyOf": [{"type": "boolean"}, VARIABLE]},
}


def pipeline_schema(catalog: Catalog) -> Schema:
    """Of a file for `run`."""
    connection = table(ClientOptions)
    connection["properties"] |= table(NegotiationOptions)["properties"]
    connection["properties"] |= {
        "endpoints": {
            "description": "Where the broker is, best first: URLs, or tables with a transport's options.",
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_url(catalog), *_endpoints(catalog)]},
        },
        "auth": _any_of(catalog, "auth", "How to log in."),
        "tls": _tls(catalog),
    }
    connection["properties"]["bundle"] = {
        "type": "string",
        "description": "Folder of a bundle that the platform gave out: what is not said here comes from it.",
    }
    connection["anyOf"] = [{"required": ["endpoints"]}, {"required": ["bundle"]}]
    connection["description"] = "A broker, and how to speak to it."
    serializer = {
        "description": "How payloads are written: a name, or a table with `type` and options.",
        "anyOf": [{"enum": catalog.names("serializer")}, _any_of(catalog, "serializer", "")],
    }
    fields = {"type": "string", "description": 'Fields in the topic: "device/{device_id}/telemetry/#".'}
    source = {"serializer": serializer, "topic_fields": fields}
    return _document(
        "A pipeline file of tesaiot-connect",
        {
            "connections": connection,
            "sources": _any_of(catalog, "source", "Where messages come from.", source),
            "sinks": _any_of(catalog, "sink", "Where messages go.", {"serializer": serializer}),
            "pipelines": table(PipelineTable),
        },
        {"security": table(SecurityOptions)},
    )


def serve_schema(catalog: Catalog) -> Schema:
    """Of a file for `serve`."""
    from ..access import Access
    from ..server import BrokerOptions
    from .serving import Address

    listeners = []
    for one in catalog.implementations:
        if one.kind == "transport" and hasattr(one.recipe, "listen"):
            listener = table(Address)
            own = table(one.recipe)["properties"]
            listener["properties"] |= {k: v for k, v in own.items() if k not in ("url", "tls")}
            who = _any_of(catalog, "authenticator", "Who may come in.")
            for one in who.get("anyOf", ()):  # it may leave that to [access]
                one["required"] = [key for key in one["required"] if key != "access"]
            several = {"type": "array", "minItems": 1, "items": who}
            listener["properties"]["auth"] = {"anyOf": [who, several]}
            listeners.append(listener)
    return _document(
        "A file for `tesaiot-connect serve`",
        {"listeners": {"anyOf": listeners}},
        {"broker": table(BrokerOptions), "access": table(Access), "security": table(SecurityOptions)},
    )


def render(schema: Schema) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _document(title: str, sections: Mapping[str, Schema], tables: Mapping[str, Schema]) -> Schema:
    named = {name: {"type": "object", "additionalProperties": one} for name, one in sections.items()}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": title,
        "type": "object",
        "additionalProperties": False,
        "properties": {**tables, **named},
    }


def _any_of(catalog: Catalog, kind: Kind, description: str, common: Schema | None = None) -> Schema:
    """A table whose `type` says what else is in it."""
    chosen = []
    for name in catalog.names(kind):
        one = table(catalog.get(kind, name).recipe)
        one["properties"] = {"type": {"const": name}, **one["properties"], **(common or {})}
        one["required"] = ["type", *one.get("required", [])]
        chosen.append(one)
    made: Schema = {"type": "object", "required": ["type"]}
    if description:
        made["description"] = description
    if chosen:
        made["anyOf"] = chosen
    return made


def _transports(catalog: Catalog) -> Iterable[Any]:
    return (one for one in catalog.implementations if one.kind == "transport")


def _url(catalog: Catalog) -> Schema:
    known = catalog.schemes()
    schemes = sorted([*known, *(alias for alias, scheme in ALIASES.items() if scheme in known)])
    pattern = "|".join(scheme.replace("+", r"\+") for scheme in schemes)
    return {"type": "string", "pattern": rf"^({pattern})://|\$\{{"}


def _endpoints(catalog: Catalog) -> list[Schema]:
    endpoints = []
    for one in _transports(catalog):
        endpoint = table(one.recipe)
        endpoint["properties"]["via"] = {"const": one.name, "description": "Name of the transport."}
        endpoints.append(endpoint)
    return endpoints


def _tls(catalog: Catalog) -> Schema:
    for one in _transports(catalog):
        found = table(one.recipe)["properties"].get("tls")
        if found is not None:
            return {**found, "description": "Whom to trust; for every endpoint that has TLS."}
    return {"type": "object"}


def table(recipe: type[Any]) -> Schema:
    """A recipe class as the schema of its table."""
    attrs.resolve_types(recipe)
    said = describe(recipe)
    properties, required = {}, []
    for field in attrs.fields(recipe):
        if not field.init:
            continue
        one = dict(value(field.type))
        if said.get(field.name):
            one["description"] = said[field.name]
        if field.default is attrs.NOTHING:
            required.append(key_of(field))
        elif isinstance(default := plain(field.default, field.type), str | int | float | bool | list):
            one["default"] = default
        properties[key_of(field)] = one
    made: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    if recipe.__doc__:
        made["description"] = " ".join(inspect.cleandoc(recipe.__doc__).split("\n\n")[0].split())
    if required:
        made["required"] = required
    return made


def value(kind: Any) -> Schema:
    """A type as a schema."""
    try:
        if kind in _LEAVES:
            return _LEAVES[kind]
    except TypeError:  # not hashable: no leaf
        pass
    base, inner = base_of(kind), get_args(kind)
    if base is Literal:
        return {"enum": list(inner)}
    if base in UNIONS:
        members = [value(member) for member in inner if member is not type(None)]
        return members[0] if len(members) == 1 else {"anyOf": members}
    if base is tuple and inner and inner[-1] is not ...:
        items = [value(one) for one in inner]
        return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
    if base in LISTS or base is tuple:
        return {"type": "array", "items": value(inner[0]) if inner else {}}
    if base in TABLES:
        return {"type": "object", "additionalProperties": value(inner[1]) if inner else {}}
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return {"enum": [member.value for member in base]}
    made = table(base) if attrs.has(base) else {}
    if base is SecretFrom:
        made["oneOf"] = [{"required": [key]} for key in ("file", "env", "command")]
    return made


def plain(default: Any, kind: Any) -> Any:
    """A default as it would be written; None for one that cannot be."""
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return None
    durations = kind is Duration or Duration in get_args(kind)
    sizes = kind is Size or Size in get_args(kind)
    if isinstance(default, bool) or default is None:
        return default
    if durations:
        return _quantity(float(default), (("d", 86400), ("h", 3600), ("m", 60), ("s", 1), ("ms", 0.001)), "s")
    if sizes:
        units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
        return _quantity(float(default), units, "B")
    if isinstance(default, Secret):
        return None
    if isinstance(default, FilePath | Url):
        return str(default)
    if isinstance(default, tuple | list | frozenset | set):
        return [plain(one, Any) for one in default]
    if isinstance(default, enum.Enum):
        return default.value
    return default


def _quantity(number: float, units: Iterable[tuple[str, float]], smallest: str) -> str:
    for unit, size in units:
        if number >= size and abs(number / size - round(number / size)) < 1e-9:
            return f"{round(number / size)}{unit}"
    return f"{number:g}{smallest}"


def describe(recipe: type[Any]) -> dict[str, str]:
    """What is said about each field: its metadata "help", or the docstring below it."""
    said = {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(recipe))).body[0]
    except (OSError, TypeError, SyntaxError):
        tree = ast.Pass()
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for statement, below in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            said[statement.target.id] = " ".join(below.value.value.split())
    for field in attrs.fields(recipe):
        if "help" in field.metadata:
            said[field.name] = " ".join(str(field.metadata["help"]).split())
    return said
