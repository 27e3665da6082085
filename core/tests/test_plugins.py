"""Broken plugins are shown and break nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from installed import EntryPoint

from tesaiot_connect import Connection, PluginError, Url, hookimpl, plugins
from tesaiot_connect.config.serving import load_server

GOOD = """
import attrs
from typing import ClassVar
from tesaiot_connect.hookspecs import hookimpl

@attrs.frozen
class Influx:
    reads: ClassVar[str] = "records"
    url: str
    def open(self): ...

@hookimpl
def tesaiot_sinks():
    return {"influx": Influx}
"""

TRANSPORT = """
import attrs
from typing import ClassVar
from tesaiot_connect import ConnectorError, Url, hookimpl

@attrs.frozen
class Ferry:
    schemes: ClassVar[dict[str, int]] = {"ferry": 1}
    rank: ClassVar[int] = 7
    races: ClassVar[bool] = False
    CANNOT
    url: Url
    async def connect(self, *, identity=None, early=b""): ...
    MISSING

@hookimpl
def tesaiot_transports():
    return {"NAME": Ferry}
"""


def transport(name: str, cannot: str = "", missing: str = "") -> str:
    method = f"@classmethod\n    def missing(cls):\n        {missing}" if missing else ""
    return TRANSPORT.replace("NAME", name).replace("CANNOT", cannot).replace("MISSING", method)


BROKEN = {
    "no_import": ("import no_such_library\n", "cannot be imported: ModuleNotFoundError"),
    "exits": ("import sys\nsys.exit(3)\n", "cannot be imported: SystemExit: 3"),
    "raises": (
        GOOD.replace('return {"influx": Influx}', 'raise RuntimeError("no licence")'),
        "tesaiot_sinks failed: RuntimeError: no licence",
    ),
    "signature": (GOOD.replace("def tesaiot_sinks():", "def tesaiot_sinks(config):"), "has a wrong hook: "),
    "unknown_hook": (GOOD.replace("tesaiot_sinks", "tesaiot_sinkz"), "has an unknown hook: "),
    "not_a_mapping": (GOOD.replace('{"influx": Influx}', "[Influx]"), "tesaiot_sinks returned list"),
    "not_a_recipe": (GOOD.replace("@attrs.frozen", ""), "sink 'influx' is not an attrs class"),
    "async_open": (
        GOOD.replace("def open(self): ...", "async def open(self): ..."),
        "does not keep its contract: Influx.open must return an async context manager",
    ),
    "half": (GOOD.replace("def open(self): ...", ""), "does not keep its contract: Influx lacks open"),
    "bad_name": (GOOD.replace('"influx"', '"In Flux"'), "sink 'In Flux' has no usable name"),
    "bad_type": (GOOD.replace("url: str", 'url: "NoSuchType"'), "cannot be resolved: NameError"),
    "reserved": (GOOD.replace("url: str", "serializer: str"), "reserved name: serializer"),
    "no_hooks": ("x = 1\n", "implements no hook"),
    "limits_text": (
        transport("limits_text", 'cannot: ClassVar[str] = "fly"'),
        "transport 'limits_text' does not keep its contract: Ferry.cannot must be a tuple of phrases",
    ),
    "limits_numbers": (transport("limits_numbers", "cannot: ClassVar = (1,)"), "must be a tuple of phrases"),
    "limits_none": (
        transport("limits_none", "cannot: ClassVar = None"),
        "does not keep its contract: TypeErr",
    ),
    "probe_no_method": (
        transport("probe_no_method", "missing: ClassVar = None"),
        "Ferry.missing must be a class method",
    ),
    "probe_raises": (
        transport("probe_raises", missing='raise RuntimeError("no idea")'),
        "transport 'probe_raises': missing() failed: RuntimeError: no idea",
    ),
    "probe_exits": (
        transport("probe_exits", missing="raise SystemExit(3)"),
        "missing() failed: SystemExit: 3",
    ),
    "probe_needs_self": (
        transport("probe_needs_self", missing="...").replace("@classmethod\n", "\n"),
        "missing() failed: TypeError",
    ),
    "probe_type": (
        transport("probe_type", missing='return "libferry"'),
        "missing() returned str, not a ConnectorError or None",
    ),
    "probe_cancels": (
        transport("probe_cancels", missing="import asyncio; raise asyncio.CancelledError"),
        "missing() failed: CancelledError",
    ),
    "probe_generator": (
        transport("probe_generator", missing="raise GeneratorExit"),
        "missing() failed: GeneratorExit",
    ),
    "probe_words": (
        transport("probe_words", missing='return ConnectorError(RuntimeError("x"))'),
        "missing() returned a ConnectorError whose `what` or `fix` is no text",
    ),
    "probe_fix": (
        transport("probe_fix", missing='return ConnectorError("x", fix=None)'),
        "missing() returned a ConnectorError whose `what` or `fix` is no text",
    ),
}


PIPELINE = """
[sources.a]
type = "generator"
[sinks.b]
type = "SINK"
[pipelines.c]
from = "a"
to = ["b"]
"""


def install(folder: Path, name: str, source: str) -> None:
    """A package as pip would have left it."""
    (folder / f"plug_{name}.py").write_text(source)
    info = folder / f"plug_{name}-1.2.dist-info"
    info.mkdir()
    dist = f"plug-{name.replace('_', '-')}"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[tesaiot_connect]\n{name} = plug_{name}\n")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); from tesaiot_connect.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every broken plugin at once, with a good one and one that takes a name which is there."""
    folder = tmp_path_factory.mktemp("site")
    for name, (source, _) in BROKEN.items():
        install(folder, name, source)
    install(folder, "good", GOOD)
    install(folder, "second", GOOD)
    install(folder, "takes_builtin", GOOD.replace('"influx"', '"sqlite"'))
    done = command(folder, "plugins", "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_plugin_is_shown_with_its_reason(name: str, listed: tuple[Path, dict[str, Any]]) -> None:
    found = [row for row in listed[1]["broken"] if row["plugin"] == name]
    assert len(found) == 1
    assert BROKEN[name][1] in found[0]["problem"]
    assert (found[0]["package"], found[0]["version"]) == (f"plug-{name.replace('_', '-')}", "1.2")


def test_the_good_one_works(listed: tuple[Path, dict[str, Any]]) -> None:
    rows = [row for row in listed[1]["implementations"] if row["package"].startswith("plug-")]
    assert [(row["kind"], row["name"], row["package"]) for row in rows if row["kind"] == "sink"] == [
        ("sink", "influx", "plug-good")
    ]
    # what only the probe found out is usable as far as anybody knows
    probed = {row["name"] for row in rows if row["kind"] == "transport"}
    assert probed == {name for name in BROKEN if name.startswith("probe_")} - {"probe_no_method"}


def test_duplicates_are_shown_and_the_first_stays(listed: tuple[Path, dict[str, Any]]) -> None:
    problems = {row["plugin"]: row["problem"] for row in listed[1]["broken"]}
    assert problems["second"] == "sink 'influx' is not used: plug-good 1.2 brings one of that name"
    assert problems["takes_builtin"].startswith("sink 'sqlite' is not used: tesaiot-connect ")


def test_broken_plugins_stop_no_other_command(listed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(PIPELINE.replace("SINK", "null"))
    assert command(listed[0], "lint", str(file)).returncode == 0
    table = command(listed[0], "plugins", "--all").stdout
    assert "influx" in table
    assert "broken" in table
    assert "sqlite" in table


def test_a_file_that_asks_for_a_broken_plugin_is_told_why(tmp_path: Path) -> None:
    install(tmp_path, "half", BROKEN["half"][0])
    install(tmp_path, "no_import", BROKEN["no_import"][0])
    file = tmp_path / "pipeline.toml"
    file.write_text(PIPELINE.replace("SINK", "influx"))
    done = command(tmp_path, "lint", str(file))
    assert done.returncode == 78
    assert "sinks.b.type: there is no sink 'influx'. The plugin that brings it is broken" in done.stderr
    assert "plug-half 1.2: sink 'influx' does not keep its contract" in done.stderr
    file.write_text(PIPELINE.replace("SINK", "clickhouse"))
    done = command(tmp_path, "lint", str(file))
    assert done.returncode == 78
    assert "`tesaiot-connect plugins`): plug-half 1.2, plug-no-import 1.2" in done.stderr


def test_a_transport_says_what_it_cannot_do_and_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot = 'cannot: ClassVar = ("check the name of a server that is at the other side of the sea", "fly")'
    lacks = 'return ConnectorError("there is no libferry", fix="install it from the package of the harbour")'
    install(tmp_path, "ferry", transport("ferry", cannot, lacks))
    install(tmp_path, "boat", transport("boat", missing="return None").replace("= 7", "= 8"))
    rows = {
        row["name"]: row
        for row in json.loads(command(tmp_path, "plugins", "--json").stdout)["implementations"]
    }
    assert list(rows["ferry"]) == [
        *("kind", "name", "schemes", "rank", "races", "cannot", "missing", "package", "version", "built_in")
    ]
    assert (rows["ferry"]["rank"], rows["ferry"]["races"]) == (7, False)
    assert rows["ferry"]["cannot"][1] == "fly"
    assert rows["ferry"]["missing"] == {
        "what": "there is no libferry",
        "fix": "install it from the package of the harbour",
    }
    assert (rows["boat"]["cannot"], rows["boat"]["missing"]) == ([], None)

    monkeypatch.setenv("COLUMNS", "80")
    told = command(tmp_path, "plugins").stdout
    assert (
        """\
transport      boat             plug-boat 1.2  (ferry)
               rank 8, tried alone
transport      ferry            plug-ferry 1.2  (ferry)
               rank 7, tried alone
               cannot: check the name of a server that is at the other side of
                 the sea; fly
               not usable here: there is no libferry. install it from the
                 package of the harbour
"""
        in told
    )
    monkeypatch.delenv("COLUMNS")
    assert "at the other side of the sea; fly\n" in command(tmp_path, "plugins").stdout, "whole"


def test_nothing_that_missing_does_spoils_the_answer(tmp_path: Path) -> None:
    prints = (
        'import os; print("from python"); os.write(1, b"from a library"); return ConnectorError("a \\udc80")'
    )
    install(tmp_path, "ferry", transport("ferry", missing=prints))
    install(tmp_path, "boat", transport("boat", missing="import threading; threading.Event().wait()"))
    done = command(tmp_path, "plugins", "--json")
    told = json.loads(done.stdout)
    assert "from python" in done.stderr
    assert "from a library" in done.stderr
    assert "a \\udc80" in [row["missing"]["what"] for row in told["implementations"] if row["missing"]]
    assert [one["problem"] for one in told["broken"] if "boat" in one["problem"]] == [
        "transport 'boat': missing() gave no answer in 5 s"
    ]


def test_a_probe_may_be_interrupted(tmp_path: Path) -> None:
    install(tmp_path, "ferry", transport("ferry", missing="raise KeyboardInterrupt"))
    assert command(tmp_path, "plugins").returncode == 130


@attrs.frozen
class Caller:
    """Only for clients, and preferred."""

    schemes: ClassVar[Mapping[str, int]] = {"ferry": 1, "canoe": 2}
    rank: ClassVar[int] = 9
    races: ClassVar[bool] = True

    url: Url

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError


@attrs.frozen
class Host:
    schemes: ClassVar[Mapping[str, int]] = {"ferry": 1}
    rank: ClassVar[int] = 1
    races: ClassVar[bool] = True

    url: Url

    async def connect(self, **_: Any) -> Connection:
        raise NotImplementedError

    def listen(self, handler: Any, /) -> Any:
        raise NotImplementedError


class Both:
    @staticmethod
    @hookimpl
    def tesaiot_transports() -> dict[str, Any]:
        return {"caller": Caller, "host": Host}


def test_a_listener_takes_a_transport_that_can_listen(tmp_path: Path) -> None:
    catalog = plugins.load([EntryPoint(Both)])  # type: ignore[list-item]
    assert [one.name for one in catalog.transports("ferry")] == ["caller", "host"]
    assert [one.name for one in catalog.listeners("ferry")] == ["host"]
    with pytest.raises(PluginError, match="Caller has no server half"):
        catalog.listeners("canoe")
    file = tmp_path / "broker.toml"
    file.write_text('[listeners.a]\nscheme = "ferry"\nport = 1\n')
    (listener,) = load_server(file, environ={}, catalog=catalog).listeners
    assert isinstance(listener.transport, Host)
