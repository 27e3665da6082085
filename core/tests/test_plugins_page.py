"""The plugin in docs/reference/plugins.md works as it stands there."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from installed import EntryPoint

from tesaiot_connect import load, plugins, run

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "plugins.md"


@pytest.fixture
def blocks() -> dict[str, str]:
    part = PAGE.read_text(encoding="utf-8").split("## A whole plugin")[1]
    return dict(re.findall(r"```(python|toml)\n(.*?)```", part, re.DOTALL))


@pytest.fixture
def module(blocks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("plugin_of_the_page")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(blocks["python"], str(PAGE), "exec"), made.__dict__)
    return made


def test_its_pipeline_runs(
    blocks: dict[str, str], module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [EntryPoint(module, "page")])
    assert not plugins.load().failures()
    file = tmp_path / "pipeline.toml"
    file.write_text(blocks["toml"])
    asyncio.run(run(load(file).pipelines))
    assert (tmp_path / "ticks.csv").read_text().splitlines() == ["ticks,1.0", "ticks,2.0", "ticks,3.0"]


def test_its_auth(module: Any) -> None:
    from tesaiot_connect import Secret

    login = asyncio.run(module.UserPassword(username="u", password=Secret("p")).begin())
    assert (login.credentials.username, login.credentials.password) == ("u", b"p")
