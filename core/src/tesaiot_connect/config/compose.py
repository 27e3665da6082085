"""A document -> connections, pipelines, listeners.

Owns: which tables there are, which keys are common to all implementations of a kind, and how
tables refer to each other. Rule: everything that is wrong is reported, in one go; a name that
failed elsewhere is not reported again where it is used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import attrs

from ..backoff import Backoff
from ..client import ClientOptions, MqttConnection
from ..dialing import Attempt
from ..errors import ConfigError, PluginError, Problem
from ..negotiation import NegotiationOptions, Negotiator
from ..pipeline import OnError, PipelineSpec, SinkSpec, SourceSpec, TopicFields
from ..plugins import Catalog, Kind, load as load_catalog
from ..protocols import Auth, Process, Serializer, Url
from . import checks, security
from .bundle import SECURED, lay_under
from .document import Document, Text, nearest, read_env_file, show
from .endpoints import ALIASES, choose
from .lines import Path
from .process import load_process
from .structure import Reported, Wrong, converter, keys, structure

log = logging.getLogger(__name__)

SECTIONS = ("security", "connections", "sources", "sinks", "pipelines")
"""The tables of a pipeline file."""


@attrs.frozen(kw_only=True)
class Config:
    """A pipeline file, ready to run."""

    file: str
    connections: Mapping[str, MqttConnection]
    pipelines: tuple[PipelineSpec, ...]
    warnings: tuple[Problem, ...] = ()
    """What is not wrong, but should be known: shown by `lint`, logged by `run`."""
    findings: tuple[security.Finding, ...] = ()
    """What keeps the connections from security levels that no policy asks for: for `lint`."""


@attrs.frozen(kw_only=True)
class PipelineTable:
    """`[pipelines.<name>]`: from a source, through an optional step, to sinks."""

    from_: str
    """Name of the source."""
    to: tuple[str, ...]
    """Names of the sinks; each gets everything."""
    process: str | None = None
    """A step in Python, "module:function": takes a list of records, returns those to go on with.
    The module may stand beside the file."""
    on_error: OnError = "retry"
    """What happens to messages that a sink or the step cannot take: try for ever and hold the
    source back, drop them, or write them to `dead_letter`."""
    dead_letter: str | None = None
    """Name of the sink for what failed, with `on_error = "dead_letter"`."""
    retry: Backoff = attrs.field(factory=Backoff)
    """How long to wait before each further attempt."""
    max_attempts: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    """Attempts before "drop" and "dead_letter" give up; "retry" never does."""


class Composer:
    """Builds the objects of one document from one catalog; problems go to the document."""

    def __init__(self, doc: Document, catalog: Catalog) -> None:
        self.doc = doc
        self.catalog = catalog
        self.connections: dict[str, MqttConnection | None] = {}
        """None stands for one that has problems of its own; so below."""
        self.sources: dict[str, SourceSpec | None] = {}
        self.sinks: dict[str, SinkSpec | None] = {}
        self.warnings: list[Problem] = []
        """What is not wrong, but should be known."""
        self.findings: list[security.Finding] = []
        """What falls short of security levels that no policy asks for."""
        self.security = security.SecurityOptions()
        self._converter = converter({MqttConnection: self._find_connection})

    def structure(self, path: Path, value: Any, kind: type[Any], **how: Any) -> Any:
        return structure(self.doc, self._converter, path, value, kind, **how)

    def top(self, known: Sequence[str], elsewhere: Mapping[str, str]) -> None:
        """Report unknown tables; `elsewhere` says what else they may be for."""
        for name in self.doc.data.keys() - set(known):
            fix = elsewhere.get(name) or nearest(name, known, "tables")
            self.doc.problem((name,), "unknown table", fix)

    def policy(self) -> None:
        """`[security]`: before anything is composed that must keep it."""
        table = self.doc.data.get("security", {})
        self.security = self.structure(("security",), table, security.SecurityOptions) or self.security

    def judged(
        self, recipe: Any, table: Mapping[str, Any], place: Callable[[Path], Path], *, listener: bool = False
    ) -> tuple[Any, list[Problem]]:
        """A transport's recipe as the policy has it, and everything in it that the policy forbids.

        `place` says where a key of its table stands in the document.
        """
        options = self.security
        forbidden: list[Problem] = []
        findings: list[security.Finding] = []
        recipe = security.raised(recipe, table, options.level)
        for one in security.judge(recipe, listener=listener):
            found = self.doc.note(place(one.key), one.message, one.fix)
            if found.file != self.doc.file:
                found = attrs.evolve(found, fix=SECURED.get(found.key, one.fix))
            if one.level > options.level:
                findings.append(security.Finding(one.level, found))
                continue
            words = f'{one.message}, which the policy "{options.policy}" forbids'
            forbidden.append(attrs.evolve(found, message=words))
        if not forbidden:
            self.findings += findings
        return recipe, forbidden

    def tables(self, section: str) -> Iterator[tuple[str, Path, dict[str, Any]]]:
        """Name, path and keys of every `[section.<name>]`."""
        value = self.doc.data.get(section, {})
        if not isinstance(value, dict):
            self.doc.problem((section,), f"expected tables, got {show(value)}", f"Write [{section}.<name>]")
            return
        for name, table in value.items():
            if isinstance(table, dict):
                yield name, (section, name), table
            else:
                fix = f"Write [{section}.<name>], then the keys"
                self.doc.problem((section, name), f"expected a table, got {show(table)}", fix)

    def component(
        self,
        kind: Kind,
        path: Path,
        table: Any,
        also: Iterable[str] = (),
        shared: Mapping[str, Any] = {},
    ) -> Any:
        """An object of the implementation that `type` names, None if something is wrong.

        `also` names keys of the table that the caller reads; `shared` are objects for fields that the
        table leaves out, where the implementation has such fields.
        """
        if not isinstance(table, dict):
            self.doc.problem(path, f"expected a table, got {show(table)}", 'Write { type = "..." }')
            return None
        name = table.get("type")
        if not isinstance(name, str):
            known = ", ".join(self.catalog.names(kind)) or "none is installed"
            what = "the key `type` is missing" if name is None else f"expected a string, got {show(name)}"
            self.doc.problem((*path, "type") if name is not None else path, what, f"Types: {known}")
            return None
        if isinstance(name, Text) and name.lost:
            return None
        try:
            found = self.catalog.get(kind, str(name))
        except PluginError as error:
            self.doc.problem((*path, "type"), error.what, error.fix)
            return None
        rest = {key: value for key, value in table.items() if key != "type" and key not in also}
        fields = keys(found.recipe)
        rest = {**{key: value for key, value in shared.items() if key in fields}, **rest}
        return self.structure(path, rest, found.recipe, also=("type", *also))

    # --- connections ----------------------------------------------------------------------

    def connection(self, name: str, path: Path, table: dict[str, Any]) -> MqttConnection | None:
        """`[connections.<name>]`: endpoints, auth, tls, the keys of ClientOptions and NegotiationOptions."""
        own = ("bundle", "endpoints", "auth", "tls")
        written = table.keys() & {"tls"}
        left_out = self._unpack(path, table) if "bundle" in table else ()
        choosing = keys(NegotiationOptions)
        rest = {key: value for key, value in table.items() if key not in (*own, *choosing)}
        options: ClientOptions | None = self.structure(path, rest, ClientOptions, also=(*own, *choosing))
        rest = {key: value for key, value in table.items() if key in choosing}
        negotiation: NegotiationOptions | None = self.structure(path, rest, NegotiationOptions)
        if left_out is None:
            return None
        auth: Auth | None = None
        if "auth" in table:
            auth = self.component("auth", (*path, "auth"), table["auth"])
        chosen = choose(self, (*path, "endpoints"), table.get("endpoints"), table.get("tls"))
        dialed = chosen.transports
        if written and dialed and not any("tls" in keys(type(one)) for one in dialed):
            self.doc.problem((*path, "tls"), "no endpoint of this connection has TLS options", "Remove it")
        if options is None or negotiation is None or ("auth" in table and auth is None) or not chosen.whole:
            return None
        left_out = (*chosen.left_out, *left_out)
        dialer = Negotiator(dialed, negotiation, timeout=options.connect_timeout, left_out=left_out)
        return MqttConnection(name, dialer, options, auth)

    def _unpack(self, path: Path, table: dict[str, Any]) -> tuple[Attempt, ...] | None:
        """Fill the table with what only its bundle has. Gives the endpoints that the bundle leaves out;
        None when something is wrong with it."""
        folder: FilePath | None = self.structure((*path, "bundle"), table["bundle"], FilePath)
        if folder is None:
            return None
        try:
            bundle = lay_under(self.doc, path, table, folder)
        except ConfigError as error:
            self.doc.problems += [one for one in error.problems if one not in self.doc.problems]
            return None
        self.warnings += bundle.warnings
        return bundle.left_out

    def transport(
        self, path: Path, url: Url, via: str, via_path: Path, *, listening: bool = False
    ) -> tuple[Url, Any]:
        """The URL with its scheme's usual name, and the transport's class; None if there is none.
        For `listening` those with a server half come first."""
        url = attrs.evolve(url, scheme=ALIASES.get(url.scheme, url.scheme))
        try:
            found = [one.recipe for one in self.catalog.transports(url.scheme, via)]
            return url, max(found, key=lambda one: listening and hasattr(one, "listen"))
        except PluginError as error:
            served = url.scheme in self.catalog.schemes()
            self.doc.problem(via_path if served else path, error.what, error.fix)
            return url, None

    def _find_connection(self, name: str) -> MqttConnection:
        if name not in self.connections:
            raise Wrong(f"there is no connection {name!r}", nearest(name, self.connections, "connections"))
        found = self.connections[name]
        if found is None:
            raise Reported
        return found

    # --- sources, sinks, pipelines --------------------------------------------------------

    def source(self, name: str, path: Path, table: dict[str, Any]) -> SourceSpec | None:
        """`[sources.<name>]`: the recipe's keys, `serializer` and `topic_fields`."""
        recipe = self.component("source", path, table, ("serializer", "topic_fields"))
        serializer = self._serializer(path, table, "json")
        fields: str | None = None
        if "topic_fields" in table:
            place = (*path, "topic_fields")
            fields = self.structure(place, table["topic_fields"], str)
            if fields is None or self._make(place, TopicFields.parse, fields) is None:
                return None
        if recipe is None or serializer is None:
            return None
        return SourceSpec(name=name, recipe=recipe, serializer=serializer, topic_fields=fields)

    def sink(self, name: str, path: Path, table: dict[str, Any]) -> SinkSpec | None:
        """`[sinks.<name>]`: the recipe's keys and `serializer`."""
        recipe = self.component("sink", path, table, ("serializer",))
        serializer = self._serializer(path, table, None)
        if recipe is None or (serializer is None and "serializer" in table):
            return None
        return SinkSpec(name=name, recipe=recipe, serializer=serializer)

    def _serializer(self, path: Path, table: dict[str, Any], default: str | None) -> Serializer | None:
        value = table.get("serializer", default)
        if value is None:
            return None
        place = (*path, "serializer")
        if not isinstance(value, dict):
            value = {"type": value}
        made: Serializer | None = self.component("serializer", place, value)
        return made

    def _make(self, path: Path, kind: Callable[..., Any], *args: Any, **values: Any) -> Any:
        """Build something whose own checks may refuse the values."""
        try:
            return kind(*args, **values)
        except ValueError as error:
            self.doc.problem(path, str(error))
            return None

    def pipeline(self, name: str, path: Path, value: dict[str, Any]) -> PipelineSpec | None:
        table: PipelineTable | None = self.structure(path, value, PipelineTable)
        if table is None:
            self._check_names(path, value)
            return None
        problems = len(self.doc.problems)
        source = self._look_up((*path, "from"), "source", self.sources, table.from_)
        sinks = [
            self._look_up((*path, "to", index), "sink", self.sinks, sink)
            for index, sink in enumerate(table.to)
        ]
        dead_letter = process = None
        if not sinks:
            self.doc.problem((*path, "to"), "no sink is named", "Name at least one sink")
        for index, sink in enumerate(table.to):
            if sink in table.to[:index]:
                self.doc.problem((*path, "to", index), f"{sink!r} is named twice", "Name each sink once")
        if table.dead_letter is not None:
            place = (*path, "dead_letter")
            dead_letter = self._look_up(place, "sink", self.sinks, table.dead_letter)
            if table.dead_letter in table.to:
                fix = "Use a sink of its own: the same one would fail again"
                self.doc.problem(place, f"{table.dead_letter!r} is a sink of this pipeline too", fix)
            elif table.on_error != "dead_letter":
                fix = 'Set on_error = "dead_letter", or leave dead_letter out'
                self.doc.problem(place, f'is not used with on_error = "{table.on_error}"', fix)
        elif table.on_error == "dead_letter":
            fix = 'Add dead_letter = "<name of a sink>"'
            self.doc.problem((*path, "on_error"), "the key `dead_letter` is missing", fix)
        if table.process is not None:
            process = self._process((*path, "process"), table.process)
        if len(self.doc.problems) > problems or source is None or None in sinks:
            return None
        if table.dead_letter and dead_letter is None:
            return None
        return PipelineSpec(
            name=name,
            source=source,
            sinks=tuple(sinks),
            process=process,
            on_error=table.on_error,
            dead_letter=dead_letter,
            retry=table.retry,
            max_attempts=table.max_attempts,
        )

    def _check_names(self, path: Path, value: dict[str, Any]) -> None:
        """Report unknown names in a table that has other problems too."""
        to = value.get("to")
        sinks = [((*path, "to", i), one) for i, one in enumerate(to)] if isinstance(to, list) else []
        for place, name in [*sinks, ((*path, "dead_letter"), value.get("dead_letter"))]:
            if isinstance(name, str):
                self._look_up(place, "sink", self.sinks, name)
        if isinstance(value.get("from"), str):
            self._look_up((*path, "from"), "source", self.sources, value["from"])
        if isinstance(value.get("process"), str):
            self._process((*path, "process"), value["process"])

    def _process(self, path: Path, text: str) -> Process | None:
        try:
            return load_process(text, self.doc.folder)
        except Wrong as error:
            self.doc.problem(path, error.message, error.fix)
            return None

    def _look_up(self, path: Path, what: str, table: Mapping[str, Any], name: str) -> Any:
        if name not in table:
            self.doc.problem(path, f"there is no {what} {name!r}", nearest(name, table, f"{what}s"))
        return table.get(name)


def load(
    path: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    env_file: str | os.PathLike[str] | None = None,
    catalog: Catalog | None = None,
    need_pipelines: bool = True,
) -> Config:
    """Read a pipeline file. Raises ConfigError with every problem there is.

    `overrides` are "table.key=value" texts that win over the file. Variables come from
    `environ`, then from `env_file`. Nothing is opened; process steps are imported. Without
    `need_pipelines` a file of connections alone will do.
    """
    doc = read(path, overrides, environ, env_file)
    composer = Composer(doc, catalog or load_catalog())
    composer.top(
        SECTIONS, dict.fromkeys(("broker", "listeners", "access"), "That belongs to a file for `serve`")
    )
    composer.policy()
    for name, place, table in composer.tables("connections"):
        composer.connections[name] = composer.connection(name, place, table)
    for name, place, table in composer.tables("sources"):
        composer.sources[name] = composer.source(name, place, table)
    for name, place, table in composer.tables("sinks"):
        composer.sinks[name] = composer.sink(name, place, table)
    pipelines = [composer.pipeline(*found) for found in composer.tables("pipelines")]
    if need_pipelines and not doc.data.get("pipelines"):
        doc.problem((), "there is no pipeline", 'Add [pipelines.<name>] with from = "..." and to = ["..."]')
    made = [pipeline for pipeline in pipelines if pipeline is not None]
    checks.find_loops(doc, made)
    doc.check()
    connections = {name: one for name, one in composer.connections.items() if one is not None}
    return Config(
        file=doc.file,
        connections=connections,
        pipelines=tuple(made),
        warnings=(*composer.warnings, *checks.find_warnings(doc, made)),
        findings=tuple(composer.findings),
    )


def bundle_connection(
    folder: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    catalog: Catalog | None = None,
) -> MqttConnection:
    """A connection as the bundle in a folder says; `overrides` are "key=value" texts for the keys of
    its table, which count before the bundle's.

    Raises ConfigError with every problem there is.
    """
    return _alone({}, FilePath(folder), overrides, environ, catalog)


def connection(
    *urls: str,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    catalog: Catalog | None = None,
) -> MqttConnection:
    """A connection to URLs, best first; `overrides` are "key=value" texts for the keys of its table.

    Raises ConfigError.
    """
    return _alone({"endpoints": list(urls)}, None, overrides, environ, catalog)


def _alone(
    table: dict[str, Any],
    bundle: FilePath | None,
    overrides: Iterable[str],
    environ: Mapping[str, str],
    catalog: Catalog | None,
) -> MqttConnection:
    """A connection whose table stands in no file."""
    doc = Document("command line", "", FilePath.cwd())
    doc.data = table
    doc.override(overrides)
    doc.expand(environ)
    if bundle is not None:
        text = os.fspath(bundle)
        doc.data.setdefault("bundle", Text.make(text, written=text, folder=doc.folder))
    composer = Composer(doc, catalog or load_catalog())
    name = "cli" if bundle is None else bundle.resolve().name
    made = composer.connection(name, (), doc.data)
    doc.check()
    for warning in composer.warnings:
        log.warning("%s", warning)
    assert made is not None
    return made


def read(
    path: str | os.PathLike[str],
    overrides: Iterable[str],
    environ: Mapping[str, str],
    env_file: str | os.PathLike[str] | None,
) -> Document:
    """A document with its overrides applied and its variables expanded."""
    known = dict(environ)
    if env_file is not None:
        known = {**read_env_file(env_file), **known}
    doc = Document.read(path)
    doc.override(overrides)
    doc.expand(known)
    return doc
