"""Broken plugins are shown and break nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    assert [(row["kind"], row["name"], row["package"]) for row in rows] == [("sink", "influx", "plug-good")]


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
