"""A file for `serve` -> broker options and listeners.

Owns: `[broker]`, `[access]` and `[listeners.<name>]`. Rule: as for pipelines: all problems at once,
and nothing is opened while a file is read, but the organisations file, to see that it is right.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from ..access import Access, FirstOf
from ..errors import ConnectorError, Problem
from ..plugins import Catalog, load as load_catalog
from ..protocols import Authenticator, Url
from ..server import BrokerOptions, ListenerSpec
from .compose import Composer, read
from .document import Document
from .lines import Path
from .security import Finding, is_loopback

PORT = attrs.validators.optional(attrs.validators.and_(attrs.validators.ge(0), attrs.validators.le(65535)))
SERVER_SECTIONS = ("security", "broker", "access", "listeners")
"""The tables of a file for `serve`."""


@attrs.frozen(kw_only=True)
class ServerConfig:
    """A file for `serve`, ready to run."""

    file: str
    options: BrokerOptions
    listeners: tuple[ListenerSpec, ...]
    warnings: tuple[Problem, ...] = ()
    """What is not wrong, but should be known: shown by `lint`, logged by `serve`."""
    findings: tuple[Finding, ...] = ()
    """What keeps the listeners from security levels that no policy asks for: for `lint`."""


@attrs.frozen(kw_only=True)
class Address:
    """`[listeners.<name>]`: where to listen; all other keys are the transport's own."""

    url: Url | None = None
    """Where to listen, in one: "mqtt://127.0.0.1:1883". Or give scheme, host and port."""
    scheme: str = "mqtt"
    """Chooses the transport."""
    host: str = "127.0.0.1"
    """Address to listen on: "0.0.0.0" is all of IPv4, "::" is all there are."""
    port: int | None = attrs.field(default=None, validator=PORT)
    """Default: the usual port of the scheme. 0 is any free one."""
    via: str = ""
    """Name of the transport, where several serve the scheme."""


def load_server(
    path: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    env_file: str | os.PathLike[str] | None = None,
    catalog: Catalog | None = None,
) -> ServerConfig:
    """Read a file for `serve`. Raises ConfigError with every problem there is."""
    doc = read(path, overrides, environ, env_file)
    composer = Composer(doc, catalog or load_catalog())
    pipelines = ("connections", "sources", "sinks", "pipelines")
    composer.top(SERVER_SECTIONS, dict.fromkeys(pipelines, "That belongs to a file for `run`"))
    composer.policy()
    table = doc.data.get("broker", {})
    options: BrokerOptions | None = composer.structure(("broker",), table, BrokerOptions)
    access = _access(composer)
    listeners = [_listener(composer, access, *found) for found in composer.tables("listeners")]
    if not doc.data.get("listeners"):
        doc.problem((), "there is no listener", "Add [listeners.tcp] with port = 1883")
    doc.check()
    assert options is not None
    made = tuple(listener for listener in listeners if listener is not None)
    return ServerConfig(
        file=doc.file,
        options=options,
        listeners=made,
        warnings=tuple(composer.warnings),
        findings=tuple(composer.findings),
    )


def _access(composer: Composer) -> Access:
    """`[access]`; one that allows nothing where there is none, or it is wrong."""
    access: Access | None = composer.structure(("access",), composer.doc.data.get("access", {}), Access)
    if access is not None:
        _check(composer.doc, ("access",), access)
    return access or Access()


def _check(doc: Document, path: Path, access: Access) -> None:
    try:
        access.check()
    except ConnectorError as error:
        doc.problem((*path, "organisations_file"), error.what, error.fix)


def _authenticator(composer: Composer, access: Access, path: Path, value: Any) -> Authenticator | None:
    """Of a listener's `auth`: a table, or several in an array, the first of which that applies decides."""
    doc = composer.doc
    several = isinstance(value, list)
    if several and not value:
        doc.problem(path, "there is no authenticator in it", 'Write auth = [{ type = "..." }]')
    places = [(*path, index) for index in range(len(value))] if several else [path]
    made: list[Authenticator] = []
    for place, table in zip(places, value if several else [value], strict=True):
        one = composer.component("authenticator", place, table, shared={"access": access})
        if one is None:
            continue
        made.append(one)
        used = getattr(one, "access", None)
        if isinstance(used, Access) and used is not access:
            _check(doc, (*place, "access"), used)
        if isinstance(used, Access) and not used.rules:
            what = "nobody who comes in this way may publish or subscribe: there are no access rules"
            composer.warnings.append(doc.note(place, what, "Add [[access.rules]] that say who may do what"))
    if len(made) < max(1, len(places)):
        return None
    return FirstOf(tuple(made)) if several else made[0]


def _listener(
    composer: Composer, access: Access, name: str, path: Path, table: dict[str, Any]
) -> ListenerSpec | None:
    doc = composer.doc
    fields = [field.name for field in attrs.fields(Address)]
    own = {key: value for key, value in table.items() if key in fields}
    rest = {key: value for key, value in table.items() if key not in fields and key not in ("auth", "tls")}
    address: Address | None = composer.structure(path, own, Address)
    authenticator: Authenticator | None = None
    if "auth" in table:
        authenticator = _authenticator(composer, access, (*path, "auth"), table["auth"])
    elif access.rules:
        what = "it has no `auth`: [access] does not hold for its clients, who may do everything"
        composer.warnings.append(doc.note(path, what, 'Add auth = { type = "..." }'))
    if "tls" in table:
        fix = "Write server_tls = { certificate = ..., key = ... }"
        doc.problem((*path, "tls"), "is what a client trusts; a listener has a certificate", fix)
    if address is None or not _one_address(doc, path, own):
        return None
    place = (*path, "url" if address.url else "scheme")
    url = address.url or Url(address.scheme, address.host)
    url, kind = composer.transport(place, url, address.via, (*path, "via"), listening=True)
    if kind is None:
        return None
    if not address.url and address.port != 0:
        url = attrs.evolve(url, port=address.port or kind.schemes[url.scheme])
    recipe = composer.structure(path, {"url": url, **rest}, kind, also=(*fields, "auth"))
    if not hasattr(kind, "listen"):
        doc.problem(place, f"{kind.__name__} has no server half", "Choose another scheme or `via`")
        return None
    if recipe is None or ("auth" in table and authenticator is None):
        return None
    if getattr(recipe, "secure", False) and getattr(recipe, "server_tls", recipe) is None:
        fix = "Add server_tls = { certificate = ..., key = ... }"
        doc.problem(path, f"a listener on {url.scheme}:// needs a certificate", fix)
        return None
    recipe, forbidden = composer.judged(
        recipe, rest, lambda key: (*path, *key) if key else place, listener=True
    )
    if forbidden:
        doc.problems += forbidden
        return None
    hosts = (url.host, *getattr(recipe, "hosts", ()))
    if authenticator is None and composer.security.policy and not all(map(is_loopback, hosts)):
        fix = 'Add auth = { type = "password", file = "users" }, or listen on 127.0.0.1'
        composer.warnings.append(doc.note(path, "lets everybody in who reaches it", fix))
    given = {} if authenticator is None else {"authenticator": authenticator}
    return ListenerSpec(name, recipe, **given)


def _one_address(doc: Document, path: Path, own: Mapping[str, Any]) -> bool:
    twice = [key for key in ("scheme", "host", "port") if key in own and "url" in own]
    for key in twice:
        doc.problem((*path, key), "stands in `url` already", "Remove one of the two")
    return not twice
