"""What a token looks like.

Owns: the form `tesa_mqtt_<organisation>_<32 characters>`, and what is said of a text that does not
have it. Rule: of a token, only what comes before the secret part is ever shown.
"""

from __future__ import annotations

import re
from typing import Any

START = "tesa_mqtt_"
LENGTH = 32
"""Characters of the secret part."""
PATTERN = START + "[A-Za-z0-9_-]+_[A-Za-z0-9]{32}"
_SHOWN = re.compile(START + "(?:[A-Za-z0-9-]{1,24}_)?")


def check_pattern(_instance: Any, _field: Any, value: str) -> None:
    """A validator for `pattern`."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"`pattern` is not a regular expression: {error}") from error


def is_token(text: str, pattern: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def shown(token: str) -> str:
    """What may be shown of it, in quotes; "" for a text that does not begin like a token."""
    match = _SHOWN.match(token)
    return f"{match[0]}…" if match else ""


def what_is_wrong(text: str, pattern: str) -> str:
    """With a text that is no token; it follows "the token ..."."""
    if text.strip() != text:
        return "has spaces or line ends around it"
    if pattern != PATTERN:
        return "does not match `pattern`"
    if not text.startswith(START):
        return f"does not begin with {START}"
    _, _, last = text.removeprefix(START).rpartition("_")
    if len(last) != LENGTH:
        return f"({shown(text)}) has {len(last)} characters behind its last _, not {LENGTH}"
    return f"({shown(text)}) has characters that no token has, or no organisation"
