"""Plain data -> recipes, strictly.

Owns: how each Python type is written in TOML, and what is said when it is not. Rule: nothing
is guessed. A number is not a string, a string is not a list, a bool is not a number; only
text that came from a variable or the command line (`Text.loose`) is read as its field wants it.

cattrs builds the classes and gathers their errors; every leaf and container has a strict hook.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
import tomllib
import types
from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, StructureHandlerNotFoundError
from cattrs.gen import make_dict_structure_fn, override

from ..errors import ConnectorError
from ..protocols import Duration, Secret, Size, Url
from ..secret import SecretFrom
from .document import Document, Text, nearest, show
from .lines import Path

T = TypeVar("T")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1}
_BYTES |= {f"{u}B": 1000**n for n, u in enumerate("kMGT", 1)} | {"KB": 1000}
_BYTES |= {f"{u}iB": 1024**n for n, u in enumerate("KMGT", 1)}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")
SECRET = 'Write "...", { file = "..." }, { env = "NAME" } or { command = ["program", "argument"] }'  # noqa: S105
LISTS = {list: list, abc.Sequence: tuple, abc.Iterable: tuple, abc.Collection: tuple,
          set: set, frozenset: frozenset, abc.Set: frozenset}  # fmt: skip
UNIONS = (Union, types.UnionType)
TABLES = (dict, abc.Mapping, abc.MutableMapping)


def base_of(kind: Any) -> Any:
    """`list` of `list[str]`."""
    return get_origin(kind) or kind


def _apply(make: Callable[[Any], Any], value: Any, _kind: Any) -> Any:
    if isinstance(value, Text) and value.lost:
        raise Reported
    return make(value)


def _refer(find: Callable[[str], Any], value: Any) -> Any:
    return find(_string(value))


class Wrong(Exception):
    """A value that its field cannot take. `fix` says what to write instead."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message, self.fix = message, fix


class Several(Exception):
    """What is wrong inside an array or table: (index or key, error)."""

    def __init__(self, errors: list[tuple[str | int, Exception]]) -> None:
        super().__init__(errors)
        self.errors = errors


class Reported(Exception):
    """Wrong because of something else, which has been reported already."""


def converter(references: Mapping[type[Any], Callable[[str], Any]]) -> cattrs.Converter:
    """A strict converter; a field of a type in `references` takes the name of such a thing."""
    conv = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)

    def hook(test: Callable[[Any], bool], make: Callable[[Any, Any], Any]) -> None:
        conv.register_structure_hook_func(test, make)

    def factory(test: Callable[[Any], bool], make: Callable[[Any, cattrs.Converter], Any]) -> None:
        conv.register_structure_hook_factory(test, lambda kind: make(kind, conv))

    factory(attrs.has, _class)
    factory(lambda t: base_of(t) in UNIONS, _union)
    factory(lambda t: base_of(t) in LISTS, _list)
    factory(lambda t: base_of(t) is tuple, _tuple)
    factory(lambda t: base_of(t) in TABLES, _table)
    hook(
        lambda t: isinstance(t, type) and issubclass(t, enum.Enum),
        lambda value, t: _apply(lambda v: t(_choice(v, [member.value for member in t])), value, t),
    )
    hook(
        lambda t: base_of(t) is Literal,
        lambda value, t: _apply(lambda v: _choice(v, get_args(t)), value, t),
    )
    hook(lambda t: t is Any or t is object, partial(_apply, _plain))
    # exact types last: they replace the lenient hooks that cattrs brings
    for kind, make in _LEAVES.items():
        conv.register_structure_hook(kind, partial(_apply, make))
    for kind, find in references.items():
        conv.register_structure_hook(kind, partial(_apply, partial(_refer, find)))
    return conv


def structure(
    doc: Document,
    conv: cattrs.Converter,
    path: Path,
    value: Any,
    kind: type[T],
    *,
    also: Iterable[str] = (),
    moved: Callable[[Path], Path] = lambda path: path,
) -> T | None:
    """An object of `kind`; None when something is wrong, with all problems in the document.

    `also` names keys of the table that are read elsewhere; `moved` says where a value stands
    that was put into the table from another place.
    """
    try:
        return conv.structure(value, kind)
    except Exception as error:  # noqa: BLE001 - a recipe's own checks may raise anything
        for place, message, fix in _explain(path, error, tuple(also)):
            doc.problem(moved(place), message, fix)
        return None


def _explain(path: Path, error: Exception, also: tuple[str, ...] = ()) -> Iterator[tuple[Path, str, str]]:
    match error:
        case Reported():
            return
        case Wrong():
            yield path, error.message, error.fix
        case Several():
            for key, inner in error.errors:
                yield from _explain((*path, key), inner)
        case ClassValidationError():
            with_notes, others = error.group_exceptions()
            names = {field.name: key_of(field) for field in attrs.fields(error.cl)}
            for inner, note in with_notes:
                key = names.get(note.name, note.name)
                if isinstance(inner, KeyError):
                    yield path, f"the key `{key}` is missing", f"Add {key} = {example(note.type)}"
                else:
                    yield from _explain((*path, key), inner)
            for inner in others:
                yield from _explain(path, inner, also)
        case ForbiddenExtraKeysError():
            known = {*keys(error.cl), *also}
            for key in sorted(error.extra_fields):
                yield (*path, key), "unknown key", nearest(key, known, "keys")
        case StructureHandlerNotFoundError():
            yield path, "this cannot be set in TOML", "Leave it out, and tell the plugin's author"
        case _:
            yield path, *_words(error)


def keys(recipe: type[Any]) -> list[str]:
    """The keys of a recipe's table, in order."""
    return [key_of(field) for field in attrs.fields(recipe) if field.init]


def key_of(field: attrs.Attribute[Any]) -> str:
    """The TOML key of a field: its name; an underscore that keeps it from being a keyword is dropped."""
    return (field.alias or field.name).rstrip("_")


def example(kind: Any) -> str:
    """How a value of this type is written."""
    if kind is Duration:
        return '"10s"'
    if kind is Size:
        return '"64KiB"'
    if kind is Url:
        return '"mqtts://host:8883"'
    base = base_of(kind)
    if base is Literal:
        return " or ".join(show(choice) for choice in get_args(kind))
    if base in UNIONS:
        return example(next(member for member in get_args(kind) if member is not type(None)))
    if base in LISTS or base is tuple:
        inner = [a for a in get_args(kind) if a is not ...]
        return f"[{example(inner[0]) if inner else '...'}]"
    if base in TABLES or attrs.has(base):
        return "{ ... }"
    return {int: "1", float: "1.0", bool: "true"}.get(base, '"..."')


# --- leaves -------------------------------------------------------------------------------


def _string(value: Any) -> str:
    if not isinstance(value, str):
        plain = type(value) in (int, float) or isinstance(value, dt.date | dt.time)
        quoted = f'Write it in quotes: "{value}"' if plain else 'Write "..."'
        raise Wrong(f"expected a string, got {show(value)}", quoted)
    return str(value)


def _secret(value: Any) -> Secret:
    if not isinstance(value, str):
        fix = 'Write it in quotes, or as "${NAME}" to take it from the environment'
        raise Wrong("expected a string", fix)
    return Secret(str(value))


def _number(value: Any) -> Any:
    """Text that may stand for something else, as TOML would read it."""
    if isinstance(value, Text) and value.loose and re.fullmatch(r"[^\s#]+", value):
        try:
            parsed = tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            return value
        return parsed["value"] if parsed.keys() == {"value"} else value
    return value


def _int(value: Any) -> int:
    number = _number(value)
    if type(number) is not int:
        raise Wrong(f"expected a whole number, got {show(value)}", _unquoted(value, r"[+-]?\d+"))
    return number


def _float(value: Any) -> float:
    number = _number(value)
    if type(number) not in (int, float) or number != number:
        raise Wrong(f"expected a number, got {show(value)}", _unquoted(value, r"[+-]?\d+(\.\d+)?"))
    return float(number)


def _bool(value: Any) -> bool:
    flag = _number(value)
    if type(flag) is not bool:
        raise Wrong(f"expected true or false, got {show(value)}", _unquoted(value, "true|false"))
    return flag


def _unquoted(value: Any, pattern: str) -> str:
    loose = isinstance(value, Text) and value.loose
    if isinstance(value, str) and not loose and re.fullmatch(pattern, value):
        return f"Write it without quotes: {value}"
    return ""


def _path(value: Any) -> FilePath:
    text = _string(value)
    if not text:
        raise Wrong("expected a path, got an empty string")
    folder = value.folder if isinstance(value, Text) else FilePath()
    return FilePath(text) if text == "-" else folder / FilePath(text).expanduser()


def _url(value: Any) -> Url:
    if isinstance(value, Url):  # read before, to choose the transport
        return value
    try:
        return Url.parse(_string(value))
    except ValueError as error:
        fix = 'Write "scheme://host:port", for example "mqtts://broker.example:8883"'
        raise Wrong(str(error).replace(repr(str(value)), show(value)), fix) from error


def _quantity(value: Any, units: Mapping[str, float], what: str, unit: str) -> float:
    listed = ", ".join(units)
    if not isinstance(value, str):
        bare = type(value) in (int, float)
        fix = f'Write "{value}{unit}" (units: {listed})' if bare else f'Write for example "10{unit}"'
        raise Wrong(f"expected {what} with a unit, got {show(value)}", fix)
    match = _QUANTITY.match(value)
    if match is None:
        raise Wrong(f"expected {what}, got {show(value)}", f'Write for example "10{unit}" (units: {listed})')
    number, given = match.groups()
    if given not in units:
        if not given:
            raise Wrong(f"{what} needs a unit: {show(value)}", f'Write "{number}{unit}" (units: {listed})')
        folded = {name.lower(): name for name in units}
        meant = folded.get(given.lower(), given[0])
        fix = f'Write "{number}{meant}"' if meant in units else f"Units: {listed}"
        raise Wrong(f"{what} has no unit {given!r}: {show(value)}", fix)
    return float(number) * units[given]


def _choice(value: Any, choices: Iterable[Any]) -> Any:
    known = list(choices)
    for candidate in (value, _number(value)):
        for choice in known:
            same = isinstance(candidate, str) if isinstance(choice, str) else type(candidate) is type(choice)
            if same and choice == candidate:
                return choice
    listed = ", ".join(show(choice) for choice in known)
    fix = f"Write one of: {listed}"
    if isinstance(value, str):
        near = nearest(value, [choice for choice in known if isinstance(choice, str)], "values")
        fix = near if near.startswith("Did") else fix
        if any(value == str(choice).lower() for choice in known if not isinstance(choice, str)):
            fix = f"Write it without quotes: {value}"
    raise Wrong(f"expected one of {listed}; got {show(value)}", fix)


def _plain(value: Any) -> Any:
    """For fields that take anything."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = _number(value)
    return str(value) if isinstance(value, str) else value


_LEAVES: dict[Any, Callable[[Any], Any]] = {
    str: _string,
    Secret: _secret,
    bytes: lambda value: _string(value).encode(),
    int: _int,
    float: _float,
    bool: _bool,
    Url: _url,
    FilePath: _path,
    Duration: lambda value: _quantity(value, _SECONDS, "a duration", "s"),
    Size: lambda value: int(_quantity(value, _BYTES, "a size", "KiB")),
}


# --- containers ---------------------------------------------------------------------------


def _array(value: Any) -> list[Any]:
    if not isinstance(value, list):
        fix = f"Write [{show(value)}]" if not isinstance(value, dict) else "Write [...]"
        raise Wrong(f"expected an array, got {show(value)}", fix)
    return value


def _each(pairs: Iterable[tuple[str | int, Any, Any]], conv: cattrs.Converter) -> list[Any]:
    """Structures (key, value, type) triples; raises all that fails together."""
    done, errors = [], []
    for key, value, kind in pairs:
        try:
            done.append(conv.structure(value, kind))
        except Exception as error:  # noqa: BLE001 - gathered, raised together
            errors.append((key, error))
    if errors:
        raise Several(errors)
    return done


def _list(kind: Any, conv: cattrs.Converter) -> Callable[[Any, Any], Any]:
    make = LISTS[base_of(kind)]
    (item,) = get_args(kind) or (Any,)

    def structure_list(value: Any, _: Any) -> Any:
        return make(_each(((index, one, item) for index, one in enumerate(_array(value))), conv))

    return structure_list


def _tuple(kind: Any, conv: cattrs.Converter) -> Callable[[Any, Any], Any]:
    items = get_args(kind) or (Any, ...)
    endless = len(items) == 2 and items[1] is ...

    def structure_tuple(value: Any, _: Any) -> Any:
        values = _array(value)
        if not endless and len(values) != len(items):
            raise Wrong(f"expected {len(items)} elements, got {len(values)}")
        kinds = (items[0],) * len(values) if endless else items
        return tuple(_each(((i, one, t) for i, (one, t) in enumerate(zip(values, kinds, strict=True))), conv))

    return structure_tuple


def _table(kind: Any, conv: cattrs.Converter) -> Callable[[Any, Any], Any]:
    name, item = get_args(kind) or (str, Any)

    def structure_table(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Wrong(f"expected a table, got {show(value)}", "Write { key = value }")
        names = _each(((key, key, name) for key in value), conv)
        return dict(zip(names, _each(((key, one, item) for key, one in value.items()), conv), strict=True))

    return structure_table


def _class(kind: Any, conv: cattrs.Converter) -> Callable[[Any, Any], Any]:
    attrs.resolve_types(kind)
    names: Any = {
        field.name: override(rename=key_of(field), struct_hook=_field(field, conv))
        for field in attrs.fields(kind)
        if field.init
    }
    build = make_dict_structure_fn(
        kind, conv, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True, **names
    )

    def structure_class(value: Any, _: Any) -> Any:
        if isinstance(value, kind):  # made before, of another table
            return value
        if not isinstance(value, dict):
            fix = f"Write {{ {' = ..., '.join(keys(kind))} = ... }}"
            raise Wrong(f"expected a table, got {show(value)}", fix)
        return build(value, kind)

    return structure_class


def _field(field: attrs.Attribute[Any], conv: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Structures one field and asks its validator, so that what it says is said of the key."""

    def structure_field(value: Any, kind: Any) -> Any:
        try:
            made = conv.structure(value, kind) if kind is not None else _plain(value)
        except (Wrong, Several):
            if (write := field.metadata.get("write")) is None:
                raise
            raise Wrong("is not of the right form", f"Write {write}") from None  # the value may be secret
        if field.metadata.get("exists") and isinstance(made, FilePath) and not made.exists():
            fix = "Relative paths start at the folder of this file; those of --set where the command runs"
            raise Wrong(f"the file {made} does not exist", fix)
        if field.validator is not None and field.converter is None:
            try:
                field.validator(None, field, made)
            except (ValueError, ConnectorError) as error:
                raise Wrong(*_words(error)) from error
            except Exception:  # noqa: BLE001, S110 - it looks at other fields: the class will ask it again
                pass
        return made

    return structure_field


def _words(error: Exception) -> tuple[str, str]:
    """Message and fix of an error that a recipe raised."""
    if isinstance(error, ConnectorError):
        return error.what, error.fix
    return str(error.args[0]) if error.args else type(error).__name__, ""


def _union(kind: Any, conv: cattrs.Converter) -> Callable[[Any, Any], Any]:
    members = [member for member in get_args(kind) if member is not type(None)]
    # A number that is written as text should become the number; text itself comes last.
    members.sort(key=lambda member: member in (str, Any, object))

    def structure_union(value: Any, _: Any) -> Any:
        errors = []
        for member in members:
            try:
                return conv.structure(value, member)
            except Exception as error:  # noqa: BLE001 - judged below
                errors.append((_fits(value, member), error))
        if len(errors) == 1:
            raise errors[0][1]
        fitting = [error for fits, error in errors if fits]
        if len(fitting) == 1:
            raise fitting[0]
        if SecretFrom in members:  # what stands there may be the secret
            what = "an array" if isinstance(value, list) else "something else"
            raise Wrong(f"expected a string or a table, got {what}", SECRET)
        raise Wrong(f"got {show(value)}", f"Write {' or '.join(dict.fromkeys(map(example, members)))}")

    return structure_union


def _fits(value: Any, member: Any) -> bool:
    """Whether a value has the shape of a type: its error is then the one to tell."""
    base = base_of(member)
    table, array = base in TABLES or attrs.has(base), base in LISTS or base is tuple
    if isinstance(value, dict):
        return table
    if isinstance(value, list):
        return array
    return isinstance(value, str) and not table and not array
