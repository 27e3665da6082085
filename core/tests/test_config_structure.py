"""How every type is written in TOML, and that nothing else is taken for it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NewType

import attrs
import pytest

from tesaiot_connect.config.document import Document
from tesaiot_connect.config.structure import converter, structure
from tesaiot_connect.protocols import Duration, Secret, Size, Url

Celsius = NewType("Celsius", float)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen
class Inner:
    number: int
    from_: str = ""


def read(
    text: str, kind: Any, *, environ: Mapping[str, str] | None = None, overrides: Sequence[str] = ()
) -> Any:
    """The value of the key `x` in a field of this type, or the messages."""
    recipe = attrs.make_class("Recipe", {"x": attrs.field(type=kind)})
    doc = Document("file.toml", text, Path("/folder"))
    doc.override(overrides)
    doc.expand(environ or {})
    made = structure(doc, converter({}), (), doc.data, recipe)
    if doc.problems:
        assert made is None
        return [f"{problem.key}: {problem.message}" for problem in doc.problems]
    assert made is not None
    return made.x


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (str, '"a"', "a"),
        (int, "3", 3),
        (int, "-0x10", None),
        (float, "3", 3.0),
        (float, "2.5", 2.5),
        (bool, "true", True),
        (bytes, '"é"', "é".encode()),
        (Duration, '"200ms"', 0.2),
        (Duration, '"10s"', 10.0),
        (Duration, '"5m"', 300.0),
        (Duration, '"2h"', 7200.0),
        (Duration, '"7d"', 604800.0),
        (Duration, '"1.5 h"', 5400.0),
        (Size, '"64KiB"', 65536),
        (Size, '"10MB"', 10_000_000),
        (Size, '"7B"', 7),
        (Celsius, "36.6", 36.6),
        (Url, '"mqtts://h:8883"', Url("mqtts", "h", 8883)),
        (Path, '"a/b"', Path("/folder/a/b")),
        (Path, '"/a"', Path("/a")),
        (Path, '"-"', Path("-")),
        (Literal["a", 1], "1", 1),
        (Literal["a", 1], '"a"', "a"),
        (Colour, '"blue"', Colour.BLUE),
        (int | None, "3", 3),
        (int | str, "3", 3),
        (int | str, '"3"', "3"),
        (str | tuple[str, ...], '["a"]', ("a",)),
        (Inner | None, "{ number = 1, from = 'x' }", Inner(1, "x")),
        (str | Inner, "{ number = 1 }", Inner(1)),
        (list[int], "[1, 2]", [1, 2]),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (tuple[int, str], '[1, "a"]', (1, "a")),
        (Sequence[int], "[]", ()),
        (frozenset[str], '["a", "a"]', frozenset("a")),
        (dict[str, int], "{ a = 1 }", {"a": 1}),
        (Mapping[str, Inner], "{ a = { number = 1 } }", {"a": Inner(1)}),
        (Any, "{ a = [1, 'x'] }", {"a": [1, "x"]}),
    ],
)
def test_right(kind: Any, text: str, expected: Any) -> None:
    if text.startswith("-0x"):
        text, expected = "0x10", 16
    value = read(f"x = {text}", kind)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (str, "3"),
        (str, "true"),
        (str, '["a"]'),
        (str, "2024-01-01"),
        (int, '"3"'),
        (int, "3.0"),
        (int, "true"),
        (float, '"3"'),
        (float, "true"),
        (float, "nan"),
        (bool, "1"),
        (bool, '"true"'),
        (bytes, "3"),
        (bytes, "[1, 2]"),
        (Secret, "3"),
        (Duration, "10"),
        (Duration, '"10"'),
        (Duration, '"-1s"'),
        (Duration, '"s"'),
        (Duration, "true"),
        (Size, "10"),
        (Size, '"10 KiBs"'),
        (Size, '"10kb"'),
        (Url, '"h:8883"'),
        (Path, '""'),
        (Path, "3"),
        (Literal["a", 1], "true"),
        (Literal["a", 1], '"1"'),
        (Literal[1], "1.5"),
        (Colour, '"green"'),
        (int | None, '"3"'),
        (int | Inner, '"3"'),
        (Inner, '"3"'),
        (list[str], '"abc"'),
        (tuple[str, ...], '"abc"'),
        (Sequence[str], '"abc"'),
        (frozenset[str], '"abc"'),
        (list[str], "{ a = 1 }"),
        (tuple[int, str], "[1]"),
        (dict[str, int], "[1]"),
        (dict[str, int], '"a"'),
    ],
)
def test_wrong(kind: Any, text: str) -> None:
    (message,) = read(f"x = {text}", kind)
    assert message.startswith("x")
    assert ": " in message


def test_places_inside_containers() -> None:
    assert read("x = { a = 1, b = 'c' }", dict[str, int]) == ['x.b: expected a whole number, got "c"']
    assert read("x = [[1], ['a']]", list[list[int]]) == ['x[1][0]: expected a whole number, got "a"']
    assert read("x = [{ number = 1.5, form = '' }, {}]", list[Inner]) == [
        "x[0].number: expected a whole number, got 1.5",
        "x[0].form: unknown key",
        "x[1]: the key `number` is missing",
    ]
    # of a union, the member that has the shape of what was written is the one to talk about
    assert read("x = { number = 'a' }", int | Inner) == ['x.number: expected a whole number, got "a"']


def test_a_number_is_not_a_float_for_a_literal() -> None:
    assert read("x = 1.0", Literal[1])[0].startswith("x: expected one of 1")


@pytest.mark.parametrize(
    ("kind", "expected"), [(int, 5), (float, 5.0), (str, "5"), (int | str, 5), (Literal[5], 5), (Any, 5)]
)
def test_text_from_a_variable_is_read_as_the_field_wants(kind: Any, expected: Any) -> None:
    for value in (
        read('x = "${V}"', kind, environ={"V": "5"}),
        read('x = "${V:-5}"', kind),
        read("x = 0", kind, overrides=["x=5"]),
    ):
        assert value == expected
        assert type(value) is type(expected)


def test_text_from_a_variable_is_not_taken_for_more() -> None:
    assert read('x = "${V}"', int, environ={"V": "5 # y"}) == ['x: expected a whole number, got "${V}"']
    assert read('x = "${V}"', list[str], environ={"V": '["a"]'}) == ['x: expected an array, got "${V}"']
    assert read('x = "${V}"', int, environ={"V": "5\ny = 6"}) == ['x: expected a whole number, got "${V}"']
    assert read('x = "${V}"', str, environ={"V": "${W} $$"}) == "${W} $$"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$$", "$"),
        ("$${V}", "${V}"),
        ("$share/g/#", "$share/g/#"),
        ("$SYS/#", "$SYS/#"),
        ("a${V}b${E:-x}${E}", "avbx"),
        ("${N:-}", ""),
        ("${N:-a:-b}", "a:-b"),
        ("${V:?why}", "v"),
    ],
)
def test_expansion(text: str, expected: str) -> None:
    assert read(f"x = '{text}'", str, environ={"V": "v", "E": ""}) == expected


@pytest.mark.parametrize("text", ["${N}", "${N:?}", "${E:?}", "${N", "${}", "${1}", "${N-x}"])
def test_expansion_that_fails_is_reported_once(text: str) -> None:
    (message,) = read(f"x = '{text}'", int, environ={"E": ""})
    assert message.startswith("x: ")


def test_overrides() -> None:
    folder = str(Path.cwd())
    assert read('x = "a"', Path, overrides=["x=b"]) == Path(folder) / "b"
    assert read("x = [1, 2]", list[int], overrides=["x.1=5"]) == [1, 5]
    assert read("x = [1, 2]", list[int], overrides=["x=[3]"]) == [3]
    assert read("", dict[str, str], overrides=['x."a.b"=c=d']) == {"a.b": "c=d"}
    assert read("", str, overrides=['x="quoted"']) == "quoted"
    assert read("", str, overrides=["x=two words # and more"]) == "two words # and more"
    assert read("x = 1", str, overrides=["x=1", "x=2"]) == "2"
    assert read("", str, overrides=["x=${V}"], environ={"V": "v"}) == "v"


def test_a_secret_is_kept_from_every_message() -> None:
    secret = read('x = "hunter2"', Secret)
    assert isinstance(secret, Secret)
    assert secret.reveal() == "hunter2"
    assert "hunter2" not in f"{secret} {secret!r}"
    for kind in (int, Duration, Url, Literal["a"], list[str], Inner):
        assert "hunter2" not in str(read('x = "${V}"', kind, environ={"V": "hunter2"}))


def test_validators_speak_of_their_key() -> None:
    @attrs.frozen
    class Recipe:
        a: int = attrs.field(default=1, validator=attrs.validators.ge(1))
        b: int = attrs.field(default=1, validator=attrs.validators.in_((1, 2)))
        c: int = attrs.field(default=1)

        @c.validator
        def _less(self, _field: Any, value: int) -> None:
            if value > self.a:
                raise ValueError("c is more than a")

    doc = Document("f", "a = 0\nb = 3\n", Path())
    doc.expand({})
    assert structure(doc, converter({}), (), doc.data, Recipe) is None
    assert [(problem.line, problem.key) for problem in doc.problems] == [(1, "a"), (2, "b")]
    doc = Document("f", "c = 2\n", Path())
    doc.expand({})
    assert structure(doc, converter({}), (), doc.data, Recipe) is None
    assert [problem.message for problem in doc.problems] == ["c is more than a"]
