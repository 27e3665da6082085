"""A TOML file, read: overrides applied, variables expanded, and where everything stands.

Owns: text -> plain data, and the list of problems. Rule: TOML is parsed first and `${...}` is
expanded inside string values only, so that no variable can add a key; a value that came from
the environment is never shown, only the text that was written.
"""

from __future__ import annotations

import ast
import difflib
import io
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

from ..errors import ConfigError, Problem
from .lines import Path, find_lines

_VARIABLE = re.compile(r"\$\$|\$\{([^}]*)\}?")
_REFERENCE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::([-?])(.*))?\Z", re.DOTALL)


class Text(str):
    """A string value of the document.

    `written` is what stands in the file; `loose` says that it may stand for a number or a
    boolean too, because it came from a variable or the command line, which know only text;
    `folder` is where a relative path in it starts; `lost` says that a variable had no value,
    which has been reported.
    """

    __slots__ = ("folder", "loose", "lost", "written")

    written: str
    folder: FilePath
    loose: bool
    lost: bool

    @classmethod
    def make(
        cls, text: str, *, written: str, folder: FilePath, loose: bool = False, lost: bool = False
    ) -> Text:
        value = cls(text)
        value.written, value.folder, value.loose, value.lost = written, folder, loose, lost
        return value


class Document:
    """Plain data (dict, list, `Text`, numbers) with the problems found so far."""

    def __init__(self, file: str, text: str, folder: FilePath) -> None:
        """Raises ConfigError when the text is not TOML."""
        self.file = file
        self.folder = folder
        self.problems: list[Problem] = []
        self.environ: Mapping[str, str] = {}
        """The environment that variables were taken from."""
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([_syntax(file, text, error)]) from None
        self._lines = find_lines(text)
        self._overridden: set[Path] = set()
        self._elsewhere: dict[Path, tuple[str, int, str]] = {}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Document:
        """Raises ConfigError when there is no such file, or it is not TOML."""
        file = os.fspath(path)
        try:
            text = FilePath(file).read_bytes().decode("utf-8-sig")  # some editors begin with a mark
        except UnicodeDecodeError as error:
            raise ConfigError([Problem(file, 0, "", "is not a text in UTF-8", str(error))]) from error
        except OSError as error:
            fix = "Give the path of a TOML file"
            raise ConfigError([Problem(file, 0, "", f"cannot be read: {error.strerror}", fix)]) from error
        return cls(file, text.replace("\r\n", "\n"), FilePath(file).resolve().parent)

    def problem(self, path: Path, message: str, fix: str = "") -> None:
        """Remember a problem of a key that is there, or of the nearest table around it."""
        found = self.note(path, message, fix)
        if found not in self.problems:
            self.problems.append(found)

    def note(self, path: Path, message: str, fix: str = "") -> Problem:
        """As `problem`, but only made, not remembered: a warning."""
        path = self._existing(path)
        if path not in self._lines and path not in self._elsewhere:  # a table that only others filled
            inside = [one for one in self._elsewhere if one[: len(path)] == path]
            path = inside[-1] if path and inside else path
        parts = [path[:end] for end in range(len(path), 0, -1)]
        for part in parts:
            if part in self._elsewhere:
                file, line, key = self._elsewhere[part]
                return Problem(file, line, key, message, fix)
            if part in self._overridden or part in self._lines:
                break
        line = next((self._lines[part] for part in parts if part in self._lines), 0)
        # a key of the command line, or a table that only such a key has made
        made = not line and any(one[: len(path)] == path for one in self._overridden if path)
        if made or any(part in self._overridden for part in parts):
            return Problem("--set", 0, dotted(path), message, fix)
        return Problem(self.file, line, dotted(path), message, fix)

    def came_from(self, path: Path, file: str, line: int, key: str) -> None:
        """A value that another file brought: what is wrong with it is said of that one."""
        self._elsewhere[path] = (file, line, key)

    def _existing(self, path: Path) -> Path:
        at: Any = self.data
        for depth, part in enumerate(path):
            inside = part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int)
            if not inside:
                return path[:depth]
            at = at[part]
        return path

    def check(self) -> None:
        """Raises ConfigError if there is any problem: all of them, in the order of the file."""
        if self.problems:
            others = {one.file for one in self.problems} - {self.file, "--set"}
            files = [self.file, *sorted(others), "--set"]
            raise ConfigError(sorted(self.problems, key=lambda one: (files.index(one.file), one.line)))

    def override(self, assignments: Iterable[str]) -> None:
        """Apply `a.b=value`s: a TOML value, or else the text itself as a string."""
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            path = _parse_key(key)
            if not equals or path is None:
                self._wrong_override(assignment, "is not an assignment", "Write --set table.key=value")
                continue
            *parents, last = path
            at: Any = self.data
            reached: Path = ()
            for part in (*parents, last):
                if isinstance(at, list):
                    index = int(part) if part.isdecimal() else -1
                    if not 0 <= index < len(at):
                        fix = f"Give an index from 0 to {len(at) - 1}"
                        self._wrong_override(assignment, f"{dotted(reached)} has no element {part!r}", fix)
                        break
                    step: str | int = index
                elif isinstance(at, dict):
                    step = part
                else:
                    self._wrong_override(assignment, f"{dotted(reached)} is not a table", "")
                    break
                reached += (step,)
                if len(reached) == len(path):
                    at[step] = self._override_value(value)
                    self._overridden.add(reached)
                elif isinstance(at, dict):
                    at = at.setdefault(step, {})
                else:
                    at = at[step]

    def _override_value(self, value: str) -> Any:
        try:
            parsed = tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            parsed = {}
        if parsed.keys() == {"value"} and isinstance(parsed["value"], dict | list | str):
            return self._marked(parsed["value"])
        return self._marked(value)

    def _marked(self, value: Any) -> Any:
        """Strings of the command line: relative paths in them start where the user stands."""
        if isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        if isinstance(value, str):
            return Text.make(value, written=value, loose=True, folder=FilePath.cwd())
        return value

    def _wrong_override(self, assignment: str, message: str, fix: str) -> None:
        self.problems.append(Problem("--set", 0, assignment.partition("=")[0], message, fix))

    def expand(self, environ: Mapping[str, str]) -> None:
        """Replace `${V}`, `${V:-default}`, `${V:?message}` and `$$` in all string values."""
        self.environ = environ
        self.data = self._expand_value((), self.data, environ)

    def _expand_value(self, path: Path, value: Any, environ: Mapping[str, str]) -> Any:
        if isinstance(value, dict):
            return {k: self._expand_value((*path, k), item, environ) for k, item in value.items()}
        if isinstance(value, list):
            return [self._expand_value((*path, i), item, environ) for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value

        def replace(match: re.Match[str]) -> str:
            return "$" if match[0] == "$$" else self._variable(path, match, environ)

        mark = value if isinstance(value, Text) else None
        problems = len(self.problems)
        text = _VARIABLE.sub(replace, value)
        return Text.make(
            text,
            written=str(value),
            folder=mark.folder if mark else self.folder,
            loose="${" in value or (mark is not None and mark.loose),
            lost=len(self.problems) > problems,
        )

    def _variable(self, path: Path, match: re.Match[str], environ: Mapping[str, str]) -> str:
        reference = _REFERENCE.match(match[1] or "")
        if not match[0].endswith("}") or reference is None:
            fix = "Write ${NAME}, ${NAME:-default} or ${NAME:?message}; write $$ for a dollar sign"
            self.problem(path, f"{match[0]!r} is not a variable", fix)
            return ""
        name, how, text = reference.groups()
        value = environ.get(name)
        if value is None or (how and not value):
            if how == "-":
                return str(text)
            state = "not set" if value is None else "empty"
            reason = f": {text}" if text else ""
            fix = "Set it in the environment or with --env-file"
            if how is None:
                fix += f", or give a default: ${{{name}:-value}}"
            self.problem(path, f"the environment variable {name} is {state}{reason}", fix)
            return ""
        return value


def dotted(path: Path) -> str:
    """A key path as people write it: connections.platform.endpoints[0].url."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            quoted = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"'
            text += f".{quoted}" if text else quoted
    return text


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """The fix for an unknown name: the nearest one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known {what}: {', '.join(names)}" if names else f"There are no {what}"


def show(value: Any) -> str:
    """A value for a message; of an expanded string, the text that was written."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, bool):
        return str(value).lower()
    text = value.written if isinstance(value, Text) else value
    shown = f'"{text}"' if isinstance(text, str) else str(text)
    return shown if len(shown) <= 80 else shown[:76] + '..."'


def read_env_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """The variables of a .env file, in python-dotenv's syntax. Raises ConfigError."""
    return {name: value for name, (value, _line) in read_env_lines(path, fix="Check --env-file").items()}


def read_env_lines(path: str | os.PathLike[str], *, fix: str) -> dict[str, tuple[str, int]]:
    """The same, with the line of each. `fix` says what to do about a file that cannot be read."""
    from dotenv.parser import parse_stream

    file = os.fspath(path)
    try:
        text = FilePath(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError([Problem(file, 0, "", f"cannot be read: {reason}", fix)]) from error
    found: dict[str, tuple[str, int]] = {}
    wrong: list[Problem] = []
    for binding in parse_stream(io.StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            wrong.append(Problem(file, binding.original.line, "", "is not a NAME=value line"))
        elif binding.key is not None and binding.value is not None:
            text = binding.original.string
            blank = text[: len(text) - len(text.lstrip())].count("\n")  # lines before it count as its own
            found[binding.key] = (binding.value, binding.original.line + blank)
    if wrong:
        raise ConfigError(wrong)
    return found


def _parse_key(key: str) -> tuple[str, ...] | None:
    try:
        data: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return None
    path: tuple[str, ...] = ()
    while isinstance(data, dict):
        if len(data) != 1:
            return None
        name, data = next(iter(data.items()))
        path += (name,)
    return path


def _syntax(file: str, text: str, error: tomllib.TOMLDecodeError) -> Problem:
    message = str(error)
    match = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)", message)
    line = 0
    if match:
        line = int(match[1]) if match[1] else text.count("\n") + 1
        message = message.replace(match[0], "")
    if match := re.fullmatch(r"Cannot declare (\(.*\)) twice", message):
        message = f"Cannot declare [{dotted(ast.literal_eval(match[1]))}] twice"
    twice = "twice" in message or "overwrite" in message or "redefine" in message
    fix = "Rename one, or join them" if twice else "Strings take quotes; each key = value has its own line"
    return Problem(file, line, "", f"not valid TOML: {message}", fix)
