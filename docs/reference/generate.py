"""Writes what is generated in docs/: the JSON Schemas and the tables of the reference.

    python docs/reference/generate.py

A test asserts that the files are what this script writes. Of plugins, those of this workspace
are documented, whatever else is installed.
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
import click

from tesaiot_connect import hookspecs, plugins
from tesaiot_connect.access import Access
from tesaiot_connect.cli import VERBS, command
from tesaiot_connect.client import ClientOptions, MqttConnection
from tesaiot_connect.config.compose import PipelineTable
from tesaiot_connect.config.schema import describe, pipeline_schema, plain, render, serve_schema
from tesaiot_connect.config.security import SecurityOptions
from tesaiot_connect.config.serving import Address
from tesaiot_connect.config.structure import LISTS, TABLES, UNIONS, base_of, key_of
from tesaiot_connect.negotiation import NegotiationOptions
from tesaiot_connect.plugins import Catalog, Kind
from tesaiot_connect.protocols import Duration, Secret, Size, Url
from tesaiot_connect.server import BrokerOptions

WHO = "Who may come in: `type` and its keys; of several, the first that knows such credentials decides."
ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    str: "string",
    bytes: "string",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Secret: "secret",
    Url: "URL",
    Path: "path",
    Duration: "duration",
    Size: "size",
    MqttConnection: "name of a connection",
    Any: "anything",
}


def workspace_catalog() -> Catalog:
    """The built-ins and the plugins of this workspace. Raises LookupError if one is not installed."""
    wanted = set()
    for file in ROOT.glob("plugins/*/pyproject.toml"):
        wanted.add(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"])
    points = [p for p in metadata.entry_points(group=hookspecs.GROUP) if p.dist and p.dist.name in wanted]
    missing = wanted - {point.dist.name for point in points if point.dist}
    if missing:
        raise LookupError(f"not installed: {', '.join(sorted(missing))}")
    return plugins.load(points)


def outputs(catalog: Catalog) -> dict[Path, str]:
    """Every generated file with its text."""
    made = {
        ROOT / "docs" / "pipeline.schema.json": render(pipeline_schema(catalog)),
        ROOT / "docs" / "broker.schema.json": render(serve_schema(catalog)),
    }
    sections = {"pipeline": lambda: pipeline_keys(catalog), "broker": lambda: broker_keys(catalog),
                "commands": commands, "hooks": hooks}  # fmt: skip
    for name in ("configuration.md", "commands.md", "plugins.md"):
        file = ROOT / "docs" / "reference" / name
        text = file.read_text(encoding="utf-8")
        made[file] = MARK.sub(lambda found: f"{found[1]}\n{sections[found[2]]().strip()}\n\n{found[3]}", text)
    return made


# --- configuration ------------------------------------------------------------------------


def pipeline_keys(catalog: Catalog) -> str:
    nested: dict[type[Any], str] = {}
    parts = [
        "### `[connections.<name>]`\n",
        rows(
            ClientOptions,
            nested,
            first=[
                ("endpoints", "array of URLs or tables", "required", "Where the broker is, best first."),
                (
                    "bundle",
                    "path",
                    "",
                    "Folder of the platform's bundle: gives what is not set here, `endpoints` included.",
                ),
                ("auth", "table", "", "How to log in: `type` and the keys of that auth."),
                ("tls", "table", "", "Whom to trust; for every endpoint whose transport has a `tls` table."),
            ],
        ),
        "Where there is more than one endpoint, in the same table:\n",
        rows(NegotiationOptions, nested),
        *implementations(
            catalog,
            "transport",
            "Endpoint: transport",
            nested,
            [
                ("via", "string", "", "Name of the transport, where several serve the scheme."),
            ],
        ),
        *implementations(catalog, "auth", "Auth", nested, [("type", "string", "required", "")]),
        *implementations(
            catalog,
            "source",
            "Source",
            nested,
            [
                ("serializer", "name or table", '`"json"`', "How payloads are decoded."),
                ("topic_fields", "string", "", "Names fields in the topic: `device/{device_id}/#`."),
            ],
        ),
        *implementations(
            catalog,
            "sink",
            "Sink",
            nested,
            [
                ("serializer", "name or table", "", "Encodes payloads anew, for sinks that write messages."),
            ],
        ),
        *implementations(catalog, "serializer", "Serializer", nested, []),
        "### `[pipelines.<name>]`\n",
        rows(PipelineTable, nested),
        "### `[security]`\n",
        rows(SecurityOptions, nested),
    ]
    return "\n".join([*parts, *tables(nested)])


def broker_keys(catalog: Catalog) -> str:
    nested: dict[type[Any], str] = {}
    parts = [
        "### `[broker]`\n",
        rows(BrokerOptions, nested),
        "### `[listeners.<name>]`\n",
        rows(Address, nested, last=[("auth", "table or array of tables", "everybody", WHO)]),
        *implementations(catalog, "authenticator", "Authenticator", nested, []),
        "### `[access]`\n",
        rows(Access, nested),
        "### `[security]`\n",
        rows(SecurityOptions, nested),
        "All other keys are those of the transport that the scheme chooses; see its endpoint above.\n",
    ]
    return "\n".join([*parts, *tables(nested)])


Row = tuple[str, str, str, str]


def implementations(
    catalog: Catalog, kind: Kind, title: str, nested: dict[type[Any], str], first: list[Row]
) -> Iterator[str]:
    for name in catalog.names(kind):
        found = catalog.get(kind, name)
        origin = "" if found.plugin.name == "builtin" else f" (package `{found.plugin.dist}`)"
        yield f"### {title} `{name}`{origin}\n"
        yield inspect.cleandoc(found.recipe.__doc__ or "").split("\n\n")[0] + "\n"
        if first or attrs.fields(found.recipe):
            yield rows(found.recipe, nested, first=first)


def tables(nested: dict[type[Any], str]) -> Iterator[str]:
    """The tables inside tables, and those inside them."""
    done: set[type[Any]] = set()
    while todo := [kind for kind in nested if kind not in done]:
        for kind in todo:
            done.add(kind)
            yield f"### Table `{nested[kind]}`\n"
            yield inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0] + "\n"
            yield rows(kind, nested)


def rows(
    recipe: type[Any],
    nested: dict[type[Any], str],
    *,
    first: list[Row] | None = None,
    last: list[Row] | None = None,
) -> str:
    attrs.resolve_types(recipe)
    said = describe(recipe)
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    own = []
    for field in attrs.fields(recipe):
        if field.init:
            note_tables(field.type, key_of(field), nested)
            own.append((key_of(field), type_name(field.type), default(field), said.get(field.name, "")))
    for key, kind, initial, meaning in [*(first or []), *own, *(last or [])]:
        cells = [f"`{key}`", kind, initial, meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def default(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    written = plain(field.default, field.type)
    if written is None or written in ("", []):
        return ""
    return f"`{str(written).lower() if isinstance(written, bool) else quoted(written)}`"


def quoted(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def type_name(kind: Any) -> str:
    base, inner = base_of(kind), get_args(kind)
    if kind in NAMES:
        return NAMES[kind]
    if base is Literal:
        return ", ".join(f"`{quoted(choice)}`" for choice in inner)
    if base in UNIONS:
        return " or ".join(type_name(member) for member in inner if member is not type(None))
    if base in LISTS or base is tuple:
        return f"array of {type_name(inner[0])}s" if inner else "array"
    return "table" if base in TABLES or attrs.has(base) else getattr(base, "__name__", "")


def note_tables(kind: Any, key: str, nested: dict[type[Any], str]) -> None:
    if isinstance(kind, type) and attrs.has(kind) and kind not in NAMES:
        nested.setdefault(kind, key)
    for inner in get_args(kind):
        note_tables(inner, key, nested)


# --- commands and hooks -------------------------------------------------------------------


def commands() -> str:
    parts = []
    for verb in VERBS:
        context = click.Context(command, info_name="tesaiot-connect", **command.context_settings)
        found = command.get_command(context, verb)
        assert found is not None
        parts += _help(found, verb, context)
    return "\n".join(parts)


def _help(found: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    """Of a verb, and of the verbs inside it."""
    inner = click.Context(found, info_name=name, parent=parent, terminal_width=96)
    title = inner.command_path.removeprefix("tesaiot-connect ")
    yield f"### `{title}`\n"
    yield f"```text\n{found.get_help(inner)}\n```\n"
    if isinstance(found, click.Group):
        for one in found.list_commands(inner):
            under = found.get_command(inner, one)
            assert under is not None
            yield from _help(under, one, inner)


def hooks() -> str:
    parts = []
    for kind in plugins.KINDS:
        hook = getattr(hookspecs, f"tesaiot_{kind}s")
        returned = inspect.signature(hook).return_annotation
        parts += [f"### `{hook.__name__}() -> {returned}`\n", f"{inspect.cleandoc(hook.__doc__ or '')}\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    for path, text in outputs(workspace_catalog()).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
