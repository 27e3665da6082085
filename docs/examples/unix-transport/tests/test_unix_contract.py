"""The unix transport keeps the contract."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tesaiot_connect_unix import Unix

from tesaiot_connect import Url
from tesaiot_connect.testing import TransportCheck, transport_checks

if not hasattr(socket, "AF_UNIX"):
    pytest.skip("this system has no Unix domain sockets", allow_module_level=True)


@pytest.fixture
def url() -> Iterator[Url]:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path may be longer than a socket's name may be
        yield Url.parse(f"unix://{Path(folder) / 'mqtt.sock'}")


@pytest.mark.parametrize("check", transport_checks, ids=str)
def test_contract(check: TransportCheck, url: Url) -> None:
    check(listen=Unix(url), connect=lambda text: Unix(Url.parse(text)))
