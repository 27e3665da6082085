"""The shape of the house, held: who imports whom, how large modules are, what is public, what is pinned."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tesaiot_connect
from tesaiot_connect import mqtt

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = Path(__file__).with_name("public_names.txt")
MOST_LINES = 550
"""Modules are to have at most about 500 lines."""


def packages() -> list[Path]:
    return [ROOT / "core", *sorted(file.parent for file in ROOT.glob("plugins/*/pyproject.toml"))]


def modules() -> list[Path]:
    return [file for package in packages() for file in sorted(package.glob("src/**/*.py"))]


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


every_module = pytest.mark.parametrize("module", modules(), ids=name)
every_package = pytest.mark.parametrize("package", packages(), ids=name)


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            yield node.module


# --- directions ---------------------------------------------------------------------------


def test_rooms_import_only_to_their_left() -> None:
    """The contracts are in pyproject.toml."""
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contracts_know_every_plugin() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    wanted = [f"tesaiot_connect_{package.name}" for package in packages()[1:]]
    assert settings["root_packages"] == ["tesaiot_connect", *wanted]
    (core,) = [one for one in settings["contracts"] if one["name"] == "Core imports no plugin"]
    assert core["forbidden_modules"] == wanted


@pytest.mark.parametrize("package", packages()[1:], ids=name)
def test_plugins_import_the_root_alone(package: Path) -> None:
    """And the rooms that are public as a whole; their tests `tesaiot_connect.testing` too."""
    own = f"tesaiot_connect_{package.name}"
    public = {"tesaiot_connect", *(f"tesaiot_connect.{room}" for room in tesaiot_connect._ROOMS)}
    for file in package.glob("**/*.py"):
        allowed = {*public, "tesaiot_connect.testing"} if "tests" in file.parts else public
        for found in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if found.startswith("tesaiot_connect") and found.split(".")[0] != own:
                assert found in allowed, f"{name(file)} imports {found}"


# --- modules ------------------------------------------------------------------------------


@every_module
def test_module(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert not text.strip() or ast.get_docstring(tree), "say what the module owns and which rule it keeps"
    assert text.count("\n") <= MOST_LINES, "split it"
    assert module.stem not in ("utils", "util", "helpers", "common", "misc", "manager", "base")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert not re.match(r"Base[A-Z]|Abstract[A-Z]|.*(Manager|Factory|Helper)$", node.name), node.name
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            bare = re.search(r"(asyncio|loop\)?)\.(create_task|ensure_future)$", called)
            assert not bare, f"line {node.lineno}: nobody holds this task; keep it and await or cancel it"


@every_package
def test_package(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (source,) = (folder for folder in (package / "src").iterdir() if (folder / "__init__.py").is_file())
    assert (source / "py.typed").is_file()
    assert (
        project["version"] == tomllib.loads((ROOT / "core/pyproject.toml").read_text())["project"]["version"]
    )
    assert project["license"] == "Apache-2.0"
    assert (package / project["readme"]).read_text(encoding="utf-8").strip()
    assert list((package / "tests").glob("test_*.py")), "a package has tests"


def test_test_files_have_names_of_their_own() -> None:
    files = [file.name for folder in (*packages(), ROOT) for file in folder.glob("tests/**/test_*.py")]
    assert len(files) == len(set(files))


# --- what is public -----------------------------------------------------------------------


def test_public_names() -> None:
    """A change here is a change for users: edit the list, and say so in CHANGELOG.md."""
    assert sorted(tesaiot_connect.__all__) == PUBLIC.read_text(encoding="utf-8").split()
    assert all(getattr(tesaiot_connect, public) is not None for public in tesaiot_connect.__all__)


def test_importing_the_root_is_light() -> None:
    """A plugin that needs a contract does not load the whole house."""
    code = "import sys, tesaiot_connect; print(*sorted(m for m in sys.modules if 'tesaiot' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tesaiot_connect"]


def test_importing_the_engines_room_is_light() -> None:
    code = (
        "import sys; from tesaiot_connect import mqtt; print(*sorted(m for m in sys.modules if 'tesai' in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tesaiot_connect", "tesaiot_connect.mqtt"]


def test_the_engines_room_has_what_it_names() -> None:
    """For the interpreter and for a type checker."""
    tree = ast.parse(Path(mqtt.__file__ or "").read_text(encoding="utf-8"))
    typed = {
        alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(mqtt.__all__) == typed - {None}
    assert all(getattr(mqtt, public) is not None for public in mqtt.__all__)
    assert set(mqtt.__all__) <= set(dir(mqtt))
    with pytest.raises(AttributeError, match="ServerEngin"):
        getattr(mqtt, "ServerEngin")  # noqa: B009 - a type checker would see it


# --- what is pinned -----------------------------------------------------------------------


def test_constraints_hold_names_and_versions_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", pin) for pin in pins)
    assert not any("://" in line for line in lines)


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((ROOT / "tests/js/package-lock.json").read_text(encoding="utf-8"))
    assert lock["packages"]["node_modules/mqtt"]["version"]
    assert not [one for one in lock["packages"].values() if "resolved" in one]
