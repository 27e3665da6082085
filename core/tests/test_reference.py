"""What is generated in docs/ is fresh, and every key, hook and verb is described."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tesaiot_connect import hookspecs, plugins
from tesaiot_connect.cli import VERBS, command
from tesaiot_connect.config.schema import pipeline_schema, serve_schema
from tesaiot_connect.plugins import Catalog

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "reference" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def catalog(generate: ModuleType) -> Catalog:
    try:
        found: Catalog = generate.workspace_catalog()
    except LookupError as error:
        pytest.skip(f"{error}: run make setup")
    return found


def test_generated_files_are_fresh(generate: ModuleType, catalog: Catalog) -> None:
    stale = [
        str(path.relative_to(ROOT))
        for path, text in generate.outputs(catalog).items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run python docs/reference/generate.py: {stale} are not what it writes"


def test_every_key_is_described(catalog: Catalog) -> None:
    silent: list[str] = []

    def walk(schema: Any, path: str) -> None:
        if isinstance(schema, dict):
            for key, inner in schema.get("properties", {}).items():
                where = f"{path}.{key}"
                described = isinstance(inner, dict) and ("description" in inner or "const" in inner)
                if not described and key != "url" and path:
                    silent.append(where)
                walk(inner, where)
            for name in ("anyOf", "additionalProperties", "items"):
                walk(schema.get(name), path)
        elif isinstance(schema, list):
            for inner in schema:
                walk(inner, path)

    walk(pipeline_schema(catalog)["properties"]["connections"], "connections")
    walk(pipeline_schema(catalog)["properties"]["sources"], "sources")
    walk(pipeline_schema(catalog)["properties"]["sinks"], "sinks")
    walk(pipeline_schema(catalog)["properties"]["pipelines"], "pipelines")
    walk(serve_schema(catalog)["properties"]["broker"], "broker")
    assert not silent, f"say what these keys mean: {sorted(set(silent))}"


def test_every_hook_and_verb_is_documented() -> None:
    for kind in plugins.KINDS:
        assert getattr(hookspecs, f"tesaiot_{kind}s").__doc__
    hooks = (ROOT / "docs" / "reference" / "plugins.md").read_text(encoding="utf-8")
    verbs = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert all(f"`tesaiot_{kind}s() -> " in hooks for kind in plugins.KINDS)
    assert all(f"### `{verb}`" in verbs for verb in VERBS)
    assert set(command.list_commands(None)) == set(VERBS)  # type: ignore[arg-type]


def test_the_example_in_the_reference_is_right(catalog: Catalog, tmp_path: Path) -> None:
    from tesaiot_connect.config import load

    text = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "pipeline.toml").write_text(example)
    (tmp_path / "ca-chain.pem").write_text("")
    config = load(tmp_path / "pipeline.toml", catalog=catalog)
    assert [pipeline.name for pipeline in config.pipelines] == ["archive"]


def test_the_schema_agrees_with_the_reader(catalog: Catalog) -> None:
    """The shape of the schema: what TOML of a right file must satisfy, by a small checker of our own."""
    schema = json.loads((ROOT / "docs" / "pipeline.schema.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    example = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    assert not wrong(schema, example)
    for table, key, value in (
        ("connections", "client_idd", "x"),
        ("connections", "keepalive", 60),
        ("sources", "qos", "1"),
        ("sinks", "type", "sqlit"),
        ("pipelines", "to", "archive"),
    ):
        bad = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
        next(iter(bad[table].values()))[key] = value
        assert wrong(schema, bad), (table, key)


def wrong(schema: Any, value: Any) -> bool:
    """Whether a value breaks a schema; the part of JSON Schema that ours uses."""
    import re

    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    if "type" in schema:
        kind = kinds[schema["type"]]
        if not isinstance(value, kind) or (isinstance(value, bool) and schema["type"] != "boolean"):
            return True
    if "enum" in schema and not any(one == value and type(one) is type(value) for one in schema["enum"]):
        return True
    if "const" in schema and schema["const"] != value:
        return True
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return True
    if "anyOf" in schema and all(wrong(one, value) for one in schema["anyOf"]):
        return True
    if isinstance(value, list) and "items" in schema:
        return any(wrong(schema["items"], one) for one in value)
    if isinstance(value, dict):
        if any(key not in value for key in schema.get("required", [])):
            return True
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for key, one in value.items():
            if key in properties:
                if wrong(properties[key], one):
                    return True
            elif others is False or wrong(others, one):
                return True
    return False
