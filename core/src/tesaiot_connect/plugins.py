"""Installed plugins -> Catalog.

Owns: finding, loading and judging plugins. Rule: one bad plugin never stops a command. Each
plugin is loaded, checked and called on its own (pluggy's own loader, a raising hook and
`check_pending` would each stop everything); what failed is kept with its reason and matters
only to a configuration that asks for it.
"""

from __future__ import annotations

import difflib
import inspect
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any, Literal, get_args

import attrs
import pluggy

from . import builtin, hookspecs
from .errors import ConnectorError, PluginError
from .protocols import CheckedTransport, ProbedTransport, Transport

Kind = Literal["transport", "auth", "authenticator", "serializer", "source", "sink"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SCHEMES = {
    "mqtt": "tesaiot-connect-tcp-tls",
    "mqtts": "tesaiot-connect-tcp-tls",
    "ws": "tesaiot-connect-wss",
    "wss": "tesaiot-connect-wss",
    "quic": "tesaiot-connect-quic-aioquic",
}
"""Which package to install for a scheme that no transport serves."""

PACKAGES: Mapping[tuple[Kind, str], str] = {
    ("transport", "tcp_tls"): "tesaiot-connect-tcp-tls",
    ("transport", "wss"): "tesaiot-connect-wss",
    ("transport", "quic_aioquic"): "tesaiot-connect-quic-aioquic",
    ("transport", "quic_nng"): "tesaiot-connect-quic-nng",
    ("auth", "password"): "tesaiot-connect-auth-password",
    ("auth", "token"): "tesaiot-connect-auth-token",
    ("auth", "mtls"): "tesaiot-connect-auth-mtls",
    ("authenticator", "password"): "tesaiot-connect-auth-password",
    ("authenticator", "token"): "tesaiot-connect-auth-token",
    ("authenticator", "mtls"): "tesaiot-connect-auth-mtls",
}
"""Which package brings an implementation that is not installed."""

RESERVED: Mapping[str, frozenset[str]] = {
    "transport": frozenset({"via"}),
    "auth": frozenset({"type"}),
    "authenticator": frozenset({"type"}),
    "serializer": frozenset({"type"}),
    "source": frozenset({"type", "serializer", "topic_fields"}),
    "sink": frozenset({"type", "serializer"}),
}
"""Keys that the configuration keeps for itself in the table of each kind."""

_MEMBERS: Mapping[str, tuple[str, ...]] = {
    "transport": ("connect", "schemes", "rank", "races"),
    "auth": ("begin", "identity"),
    "authenticator": ("begin",),
    "serializer": ("encode", "decode"),
    "source": ("open",),
    "sink": ("open", "reads"),
}
_PATIENCE = 5.0
"""Seconds a plugin has for its answer."""
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


@attrs.frozen
class Plugin:
    """An installed plugin, with whatever is wrong with it."""

    name: str
    """Of its entry point."""
    dist: str
    """The package that brings it, "" when unknown."""
    version: str
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.dist or self.name} {self.version}".strip()


@attrs.frozen
class Implementation:
    """One recipe class, under the name a configuration calls it by."""

    kind: Kind
    name: str
    recipe: type[Any]
    plugin: Plugin

    @property
    def cannot(self) -> tuple[str, ...]:
        """What this transport cannot do, in phrases that go behind "cannot"."""
        return tuple(getattr(self.recipe, "cannot", ())) if self.kind == "transport" else ()

    def missing(self) -> ConnectorError | None:
        """What this transport needs besides its package and does not find. Takes 5 s at most.

        Raises PluginError where the plugin does not keep the contract of `ProbedTransport`."""
        if self.kind != "transport" or not issubclass(self.recipe, ProbedTransport):
            return None
        answers: list[object] = []
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(self.recipe.missing())
            except BaseException as error:  # noqa: BLE001 - raised below, where somebody waits
                failures.append(error)

        asked = threading.Thread(target=ask, name=f"missing() of {self.name}", daemon=True)
        asked.start()
        asked.join(_PATIENCE)
        told = f"{self.kind} {self.name!r}: missing()"
        for failure in failures:
            if isinstance(failure, KeyboardInterrupt):
                raise failure
            raise PluginError(f"{told} failed: {_reason(failure)}") from failure
        for found in answers:
            return _reply(told, found)
        raise PluginError(f"{told} gave no answer in {_PATIENCE:g} s")


@attrs.frozen
class Catalog:
    """Everything a configuration may ask for."""

    implementations: tuple[Implementation, ...]
    plugins: tuple[Plugin, ...]

    def names(self, kind: Kind) -> list[str]:
        """Names of all implementations of a kind, sorted."""
        return sorted(one.name for one in self.implementations if one.kind == kind)

    def schemes(self) -> list[str]:
        """Every URL scheme that some transport serves, sorted."""
        transports = [one.recipe for one in self.implementations if one.kind == "transport"]
        return sorted({scheme for recipe in transports for scheme in recipe.schemes})

    def failures(self) -> list[tuple[Plugin, str]]:
        return [(plugin, reason) for plugin in self.plugins for reason in plugin.failures]

    def get(self, kind: Kind, name: str) -> Implementation:
        """Raises PluginError: the nearest name, what to install, or which plugin is broken."""
        for one in self.implementations:
            if one.kind == kind and one.name == name:
                return one
        raise PluginError(
            f"there is no {kind} {name!r}",
            fix=self._advice(kind, name, PACKAGES.get((kind, name)), self.names(kind)),
        )

    def transports(self, scheme: str, via: str = "") -> list[Implementation]:
        """All transports of a scheme, best rank first, or the one named by `via`.

        Raises PluginError when there is none.
        """
        found = [o for o in self.implementations if o.kind == "transport" and scheme in o.recipe.schemes]
        installed = via in self.names("transport")
        package = None if installed else PACKAGES.get(("transport", via))
        if not found:
            raise PluginError(
                f"no installed transport serves {scheme}://",
                fix=self._advice(
                    "transport", scheme, package or SCHEMES.get(scheme), self.schemes(), "schemes"
                ),
            )
        if via:
            chosen = [one for one in found if one.name == via]
            if not chosen:
                names = [one.name for one in found]
                what = "is not installed" if package else f"does not serve {scheme}://"
                raise PluginError(
                    f"transport {via!r} {what}",
                    fix=self._advice("transport", via, package, names, f"of {scheme}://"),
                )
            return chosen
        return sorted(found, key=lambda one: (-one.recipe.rank, one.name))

    def listeners(self, scheme: str, via: str = "") -> list[Implementation]:
        """As `transports`, of those with a server half."""
        served = self.transports(scheme, via)
        found = [one for one in served if hasattr(one.recipe, "listen")]
        if not found:
            package = SCHEMES.get(scheme)
            absent = package not in {plugin.dist for plugin in self.plugins}
            raise PluginError(
                f"{served[0].recipe.__name__} has no server half",
                fix=f"Install one that has: pip install {package}"
                if package and absent
                else "Choose another scheme or `via`",
            )
        return found

    def _advice(
        self, kind: Kind, name: str, package: str | None, known: list[str], what: str = "names"
    ) -> str:
        """`package` is what brings it, if that is known."""
        named = [f"{plugin}: {reason}" for plugin, reason in self.failures() if f"{kind} {name!r}" in reason]
        if not named and package:
            named = [f"{plugin}: {reason}" for plugin, reason in self.failures() if plugin.dist == package]
        if named:
            return "The plugin that brings it is broken: " + "; ".join(named)
        if package:
            return f"Install it: pip install {package}"
        near = difflib.get_close_matches(name, known, 1, 0.6)
        if near:
            return f"Did you mean {near[0]!r}?"
        listed = f"Known {what}: {', '.join(known)}" if known else "No installed plugin brings any"
        broken = ", ".join(str(plugin) for plugin in self.plugins if plugin.failures)
        return f"{listed}. Broken plugins (see `tesaiot-connect plugins`): {broken}" if broken else listed


def load(entry_points: Iterable[metadata.EntryPoint] | None = None) -> Catalog:
    """The built-ins and every installed plugin. Raises nothing that a plugin did."""
    if entry_points is None:
        entry_points = metadata.entry_points(group=hookspecs.GROUP)
    implementations: dict[tuple[Kind, str], Implementation] = {}
    plugins: list[Plugin] = []

    def add(plugin: Plugin, module: Any, failures: list[str]) -> None:
        found = list(_implementations(module, failures)) if module is not None else []
        taken = []
        for kind, name, recipe in found:
            first = implementations.get((kind, name))
            if first is not None:
                failures.append(f"{kind} {name!r} is not used: {first.plugin} brings one of that name")
            else:
                taken.append((kind, name, recipe))
        plugin = attrs.evolve(plugin, failures=tuple(failures))
        plugins.append(plugin)
        for kind, name, recipe in taken:
            implementations.setdefault((kind, name), Implementation(kind, name, recipe, plugin))

    add(Plugin("builtin", "tesaiot-connect", _version("tesaiot-connect")), builtin, [])
    seen = set()
    for point in sorted(entry_points, key=lambda p: (p.dist.name if p.dist else "", p.name, p.value)):
        dist = point.dist
        key = (dist.name if dist else "", point.name, point.value)
        if key in seen:  # the same package twice on the path
            continue
        seen.add(key)
        failures: list[str] = []
        module = None
        try:
            module = point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - kept as the plugin's failure
            failures.append(f"cannot be imported: {_reason(error)}")
        add(Plugin(point.name, key[0], dist.version if dist else ""), module, failures)
    return Catalog(tuple(implementations.values()), tuple(plugins))


def _implementations(module: Any, failures: list[str]) -> Iterator[tuple[Kind, str, type[Any]]]:
    """What one plugin offers; what is wrong with it goes to `failures`.

    A manager for each plugin alone: a mistake is then that plugin's and nobody else's.
    """
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - kept as the plugin's failure
        failures.append(f"has a wrong hook: {_reason(error)}")
        return
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(f"tesaiot_{kind}s" for kind in KINDS)
        failures.append(f"has an unknown hook: {_reason(error)}; the hooks are {known}")
    offered = False
    for kind in KINDS:
        hook = f"tesaiot_{kind}s"
        try:
            offers = getattr(manager.hook, hook)()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - kept as the plugin's failure
            failures.append(f"{hook} failed: {_reason(error)}")
            offered = True
            continue
        for offer in offers:
            offered = True
            if not isinstance(offer, Mapping):
                failures.append(f"{hook} returned {type(offer).__name__}: return {{name: recipe class}}")
                continue
            for name, recipe in offer.items():
                wrong = _wrong(kind, name, recipe)
                if wrong:
                    failures.append(f"{kind} {name!r} {wrong}")
                else:
                    yield kind, name, recipe
    if not offered and not failures:
        failures.append("implements no hook: mark its functions with tesaiot_connect.hookimpl")


def _wrong(kind: Kind, name: Any, recipe: Any) -> str:
    """What is wrong with one implementation, "" if nothing is."""
    if not isinstance(name, str) or not _NAME.match(name):
        return "has no usable name: write lower case letters, digits and _"
    if not isinstance(recipe, type) or not attrs.has(recipe):
        return "is not an attrs class"
    missing = [member for member in _MEMBERS[kind] if not hasattr(recipe, member)]
    if missing:
        return f"does not keep its contract: {recipe.__name__} lacks {', '.join(missing)}"
    opening = getattr(recipe, "open", None)
    if kind in ("source", "sink") and (
        inspect.iscoroutinefunction(opening) or inspect.isasyncgenfunction(opening)
    ):
        return (
            f"does not keep its contract: {recipe.__name__}.open must return an async context manager: "
            "write @asynccontextmanager above it, and yield in it"
        )
    try:
        attrs.resolve_types(recipe)
    except Exception as error:  # noqa: BLE001 - kept as the plugin's failure
        return f"has a field whose type cannot be resolved: {_reason(error)}"
    keys = {field.alias for field in attrs.fields(recipe) if field.init}
    if keys & RESERVED[kind]:
        return f"has a field with a reserved name: {', '.join(sorted(keys & RESERVED[kind]))}"
    return _wrong_transport(recipe, keys) if kind == "transport" else ""


def _wrong_transport(recipe: type[Any], keys: set[str]) -> str:
    if "url" not in keys:
        return "has no field `url`"
    try:
        cannot: Any = getattr(recipe, "cannot", ())
        phrases = [] if isinstance(cannot, str) else [one for one in cannot if isinstance(one, str) and one]
        if len(phrases) < len(cannot):
            return f"does not keep its contract: {recipe.__name__}.cannot must be a tuple of phrases"
        if not callable(getattr(recipe, "missing", len)):
            return f"does not keep its contract: {recipe.__name__}.missing must be a class method"
    except Exception as error:  # noqa: BLE001 - kept as the plugin's failure
        return f"does not keep its contract: {_reason(error)}"
    return ""


def refusal(recipe: Transport) -> ConnectorError | None:
    """What of a recipe's fields its transport cannot do. Raises PluginError where it breaks the contract of
    `CheckedTransport`."""
    if not isinstance(recipe, CheckedTransport):
        return None
    told = f"{type(recipe).__name__}.refusal()"
    try:
        found: object = recipe.refusal()
    except Exception as error:
        raise PluginError(f"{told} failed: {_reason(error)}", fix="update the plugin") from error
    return _reply(told, found)


def _reply(told: str, found: object) -> ConnectorError | None:
    """What a plugin returned that was to return a ConnectorError or None."""
    if found is None:
        return None
    if not isinstance(found, ConnectorError):
        raise PluginError(f"{told} returned {type(found).__name__}, not a ConnectorError or None")
    if not (isinstance(found.what, str) and isinstance(found.fix, str)):
        raise PluginError(f"{told} returned a ConnectorError whose `what` or `fix` is no text")
    return found


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _version(dist: str) -> str:
    try:
        return metadata.version(dist)
    except metadata.PackageNotFoundError:
        return ""
