"""The line of every key, for any TOML that tomllib accepts."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tesaiot_connect.config.lines import Path, find_lines

DOCUMENT = '''\
# a comment with = and [brackets]
title = "x"

[a.b]          # not a.b = 3
"quoted key" = 'lit # eral'
text = """
[not.a.table]
key = 1 ""\\" and "" two
"""
after = 1
raw = \'\'\'
c = "
'' \'\'\'
dotted . 'k' = [ 1, # one
  2,
  { x = 1, y = [ "]" , "," ] },
]
last = 2024-01-01 10:00:00

[[a.list]]
v = 1
[a.list.sub]
w = { }
[[a.list]]
v = [[], [ [ ] ]]
'''


def test_every_key_of_a_document() -> None:
    lines = find_lines(DOCUMENT)
    assert set(lines) == set(paths(tomllib.loads(DOCUMENT)))
    expected: dict[Path, int] = {
        ("title",): 2,
        ("a", "b"): 4,
        ("a", "b", "quoted key"): 5,
        ("a", "b", "text"): 6,
        ("a", "b", "after"): 10,
        ("a", "b", "raw"): 11,
        ("a", "b", "dotted", "k"): 14,
        ("a", "b", "dotted", "k", 0): 14,
        ("a", "b", "dotted", "k", 1): 15,
        ("a", "b", "dotted", "k", 2, "y", 1): 16,
        ("a", "b", "last"): 18,
        ("a", "list", 0, "v"): 21,
        ("a", "list", 0, "sub", "w"): 23,
        ("a", "list", 1): 24,
        ("a", "list", 1, "v", 1, 0): 25,
    }
    assert {path: lines[path] for path in expected} == expected


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "a=1", "a=1 # no newline", "[t]\n[t.u]"])
def test_small_documents(text: str) -> None:
    assert set(find_lines(text)) == set(paths(tomllib.loads(text)))


def paths(value: Any, path: Path = ()) -> list[Path]:
    """Every path of a parsed document, without its root."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    own = [path] if path else []
    return own + [found for key, item in items for found in paths(item, (*path, key))]


# --- any document: values are rendered in every way TOML knows -----------------------------

TRICKY = st.text(alphabet="ab \"'\\#[]{}=,.\n\t_-é", max_size=8)
SCALARS = st.one_of(
    st.integers(-1000, 1000),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    TRICKY,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=8,
)


def basic(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


@st.composite
def rendered_string(draw: st.DrawFn, text: str) -> str:
    ways = [basic(text)]
    if "\n" not in text and "'" not in text:
        ways.append(f"'{text}'")
    if "'''" not in text and not text.startswith("\n"):
        ways.append(f"'''{text}'''" if not text.endswith("'") else basic(text))
    ways.append('"""\n' + text.replace("\\", "\\\\").replace('"', '\\"') + '"""')
    return draw(st.sampled_from(ways))


@st.composite
def rendered_key(draw: st.DrawFn, key: str) -> str:
    bare = key.isascii() and key.replace("_", "a").replace("-", "a").isalnum()
    ways = [basic(key), *([key] if bare else [])]
    if "'" not in key and "\n" not in key:
        ways.append(f"'{key}'")
    return draw(st.sampled_from(ways))


@st.composite
def rendered(draw: st.DrawFn, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return draw(rendered_string(value))
    if isinstance(value, list):
        gap = draw(st.sampled_from(["", " ", "\n", " # ]\n"]))
        inner = "".join(f"{gap}{draw(rendered(item))}{gap}," for item in value)
        return f"[{inner}{gap}]"
    if isinstance(value, dict):
        pairs = [f"{draw(rendered_key(key))} = {draw(rendered(item))}" for key, item in value.items()]
        return "{ " + ", ".join(pairs) + " }"
    return repr(value)


@st.composite
def documents(draw: st.DrawFn) -> str:
    lines = []
    for key, value in draw(st.dictionaries(TRICKY, VALUES, max_size=3)).items():
        lines.append(f"{draw(rendered_key('k' + key))} = {draw(rendered(value))}")
    for index, table in enumerate(draw(st.lists(st.dictionaries(TRICKY, VALUES, max_size=3), max_size=3))):
        name = draw(rendered_key(f"t{index}"))
        lines.append(draw(st.sampled_from(["", "# [x]", f"[{name}]", f"[[{name}]]", f"[ {name} . inner ]"])))
        if not lines[-1].startswith("["):
            lines.append(f"[{name}]")
        lines += [f"{draw(rendered_key(k))} = {draw(rendered(v))} # {index}" for k, v in table.items()]
    return draw(st.sampled_from(["\n", "\n\n"])).join(lines)


@settings(max_examples=300, deadline=None)
@given(documents())
def test_any_document(text: str) -> None:
    lines = find_lines(text)
    assert set(lines) == set(paths(tomllib.loads(text)))
    rows = text.split("\n")
    for path, line in lines.items():
        assert 1 <= line <= len(rows)
        key = path[-1]
        if isinstance(key, str) and key.isalnum() and key.isascii():
            assert key in rows[line - 1]
