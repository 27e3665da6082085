"""The example transport of the guide is complete and keeps the contract."""

from __future__ import annotations

import importlib
import socket
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loops import LOOPS

from tesaiot_connect.protocols import Url
from tesaiot_connect.testing import TransportCheck, transport_checks

EXAMPLE = Path(__file__).parents[1] / "docs/examples/unix-transport"

if not hasattr(socket, "AF_UNIX"):
    pytest.skip("this system has no Unix domain sockets", allow_module_level=True)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    return importlib.import_module("tesaiot_connect_unix")


@pytest.fixture
def url() -> Iterator[Url]:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path may be too long for a socket's name
        yield Url.parse(f"unix://{folder}/mqtt.sock")


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_it_keeps_the_contract(check: TransportCheck, loop_factory: Any, example: Any, url: Url) -> None:
    check(
        listen=example.Unix(url),
        connect=lambda text: example.Unix(Url.parse(text)),
        loop_factory=loop_factory,
    )


def test_its_entry_point_leads_to_its_hook(example: Any) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["tesaiot_connect"] == {"unix": "tesaiot_connect_unix"}
    assert example.tesaiot_transports() == {"unix": example.Unix}


def test_it_is_as_small_as_the_guide_says() -> None:
    text = (EXAMPLE / "src/tesaiot_connect_unix/__init__.py").read_text()
    code = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 75


def test_the_guide_states_every_rule() -> None:
    guide = (EXAMPLE.parents[1] / "guide/transport-plugins.md").read_text(encoding="utf-8")
    for check in transport_checks:
        assert f"| `{check.name}` | {check.rule} |" in guide
