"""`endpoints` of a connection -> transports, and which of them cannot take part.

Owns: the table of an endpoint, and what leaves one out. Rule: an endpoint whose plugin is missing or broken,
or that the policy forbids, or that asks its transport for what that cannot do, is left out with a warning
where another one remains; where none does, each is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ..dialing import Attempt
from ..errors import PluginError, Problem
from ..plugins import PACKAGES, SCHEMES, Catalog, refusal
from ..protocols import Transport, Url
from .document import show
from .lines import Path
from .structure import keys

if TYPE_CHECKING:
    from .compose import Composer

ALIASES = {"mqtt-quic": "quic", "mqtt+quic": "quic"}
"""Other spellings of URL schemes."""


@attrs.frozen
class Chosen:
    """The endpoints of one connection."""

    transports: tuple[Transport, ...] = ()
    left_out: tuple[Attempt, ...] = ()
    whole: bool = False
    """Whether nothing is wrong with them."""


@attrs.frozen
class _Made:
    """One endpoint. Without a `transport` and `reasons` it has problems that were reported."""

    place: Path
    url: str
    transport: Transport | None = None
    reasons: tuple[Problem, ...] = ()
    """Why it cannot take part."""


def choose(composer: Composer, path: Path, endpoints: Any, tls: Any) -> Chosen:
    """What stands at `path` of the document; `tls` is the connection's table for those that have none."""
    doc = composer.doc
    if not isinstance(endpoints, list) or not endpoints:
        what = "the key `endpoints` is missing" if endpoints is None else "expected an array of URLs"
        where = path[:-1] if endpoints is None else path
        example = f'"{endpoints}"' if isinstance(endpoints, str) else '"mqtts://broker.example:8883"'
        doc.problem(where, what, f"Write endpoints = [{example}], best first")
        return Chosen()
    made = [_endpoint(composer, (*path, index), one, tls) for index, one in enumerate(endpoints)]
    transports = tuple(one.transport for one in made if one.transport is not None)
    barred = [one for one in made if one.reasons]
    if len(barred) == len(made):
        reasons = dict.fromkeys(reason for one in barred for reason in one.reasons)
        doc.problems += [one for one in reasons if one not in doc.problems]
        return Chosen()
    for one in barred:
        composer.warnings += [
            attrs.evolve(reason, message=f"{one.url} is left out: {reason.message}") for reason in one.reasons
        ]
    left_out = tuple(
        Attempt(one.url, "left out", reason=one.reasons[0].message, fix=one.reasons[0].fix) for one in barred
    )
    return Chosen(transports, left_out, whole=len(transports) + len(barred) == len(made))


def _endpoint(composer: Composer, path: Path, value: Any, tls: Any) -> _Made:
    doc = composer.doc
    if isinstance(value, str):
        value = {"url": value}
    if not isinstance(value, dict):
        doc.problem(path, f"expected a URL, got {show(value)}", 'Write "mqtts://host:8883"')
        return _Made(path, "")
    rest = {key: item for key, item in value.items() if key not in ("url", "via")}
    if "url" not in value:
        doc.problem(path, "the key `url` is missing", 'Add url = "mqtts://host:8883"')
        return _Made(path, "")
    url: Url | None = composer.structure((*path, "url"), value["url"], Url)
    via: str | None = composer.structure((*path, "via"), value.get("via", ""), str)
    if url is None or via is None:
        return _Made(path, "")
    url = attrs.evolve(url, scheme=ALIASES.get(url.scheme, url.scheme))
    error = _absent(composer.catalog, url.scheme, via)
    if error is not None:
        where = (*path, "via" if via and url.scheme in composer.catalog.schemes() else "url")
        return _Made(path, str(url), reasons=(doc.note(where, error.what, error.fix),))
    url, kind = composer.transport((*path, "url"), url, via, (*path, "via"))
    if kind is None:
        return _Made(path, "")
    inherits = tls is not None and "tls" not in rest and "tls" in keys(kind)
    if inherits:
        rest["tls"] = tls

    def moved(place: Path) -> Path:
        inherited = inherits and place[len(path) : len(path) + 1] == ("tls",)
        return (*path[:-2], *place[len(path) :]) if inherited else place

    made: Transport | None = composer.structure(path, {"url": url, **rest}, kind, also=("via",), moved=moved)
    if made is None:
        return _Made(path, "")
    try:
        refused = refusal(made)
    except PluginError as error:
        refused = error
    if refused is not None:
        return _Made(path, str(url), reasons=(doc.note(path, refused.what, refused.fix),))

    def place(key: Path) -> Path:
        written = rest.get("tls")
        return moved((*path, *key)) if key and isinstance(written, dict) and key[-1] in written else path

    secured, forbidden = composer.judged(made, rest, place)
    return _Made(path, str(url), reasons=tuple(forbidden)) if forbidden else _Made(path, str(url), secured)


def _absent(catalog: Catalog, scheme: str, via: str) -> PluginError | None:
    """Why no plugin serves an endpoint, where that is for want of one: missing, or broken. A name that
    nobody knows is a mistake instead."""
    try:
        catalog.transports(scheme, via)
    except PluginError as error:
        missing = scheme in SCHEMES and scheme not in catalog.schemes()
        unknown = ("transport", via) in PACKAGES and via not in catalog.names("transport")
        return error if missing or unknown or _broken(catalog, via or scheme) else None
    return None


def _broken(catalog: Catalog, name: str) -> bool:
    """Whether a plugin that is called so, or that offers a transport of that name, is broken."""
    return any(
        plugin.name == name or f"transport {name!r}" in reason for plugin, reason in catalog.failures()
    )
