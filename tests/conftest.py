"""Fixtures for tests across packages: real brokers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_brokers import Mosquitto


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """One open broker for tests that use topics and client ids of their own."""
    with Mosquitto(tmp_path_factory.mktemp("mosquitto"), "max_queued_messages 0") as broker:
        yield broker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
