"""Where each key of a JSON text stands.

Owns: key path -> line. Rule: it reads only text that `json` has accepted.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left

from .lines import Path

_BLANK = re.compile(r"[ \t\r\n]*")
_decoder = json.JSONDecoder()


def find_json_lines(text: str) -> dict[Path, int]:
    """The line, counted from 1, of every key and array element of a valid JSON document."""
    ends = [match.start() for match in re.finditer("\n", text)]
    lines: dict[Path, int] = {}

    def value(at: int, path: Path) -> int:
        """Goes over one value; returns where it ends."""
        if text[at] not in "{[":
            return _decoder.raw_decode(text, at)[1]
        index, closing = 0, "}" if text[at] == "{" else "]"
        at = _skip(text, at + 1)
        while text[at] != closing:
            part: str | int = index
            line = bisect_left(ends, at) + 1
            if closing == "}":
                part, at = _decoder.raw_decode(text, at)
                at = _skip(text, _skip(text, at) + 1)  # the colon
            lines[*path, part] = line
            at = _skip(text, value(at, (*path, part)))
            if text[at] == ",":
                at = _skip(text, at + 1)
            index += 1
        return at + 1

    value(_skip(text, 0), ())
    return lines


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match
    return match.end()
