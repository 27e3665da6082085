"""Which network this machine is on."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tesaiot_connect.negotiation import network
from tesaiot_connect.negotiation.network import fingerprint

ROUTES = "Iface\tDestination\tGateway \tFlags\n{0}\t0000A8C0\t00000000\t0001\n{0}\t00000000\t{1}\t0003\n"


class Machine:
    """What the system says; None: there is no such route."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.addresses: dict[int, str | None] = {
            socket.AF_INET: "192.168.0.7",
            socket.AF_INET6: "2001:db8:1:2:aaaa::1",
        }
        self.routes = folder / "route"
        self.sent: list[str] = []
        self.route("wlan0", "0100A8C0")
        monkeypatch.setattr(network, "_ROUTES", self.routes)
        monkeypatch.setattr(socket, "socket", self._socket)

    def route(self, interface: str, gateway: str) -> None:
        self.routes.write_text(ROUTES.format(interface, gateway))

    def _socket(self, family: int, kind: int) -> Any:
        machine = self
        assert kind == socket.SOCK_DGRAM

        class Socket:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def connect(self, address: tuple[str, int]) -> None:
                if machine.addresses[family] is None:
                    raise OSError(101, "Network is unreachable")

            def getsockname(self) -> tuple[str | None, int]:
                return machine.addresses[family], 50000

        return Socket()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_it_stays_while_the_machine_does(machine: Machine) -> None:
    before = fingerprint(b"salt")
    assert len(before) == 32
    assert set(before) <= set("0123456789abcdef")
    assert fingerprint(b"salt") == before
    machine.addresses[socket.AF_INET6] = "2001:db8:1:2:bbbb::9%wlan0"  # privacy extensions
    assert fingerprint(b"salt") == before


def test_the_salt_is_in_it(machine: Machine) -> None:
    assert fingerprint(b"salt") != fingerprint(b"pepper")


@pytest.mark.parametrize("what", ["address", "prefix", "gateway", "interface", "no address", "no route"])
def test_it_changes_when_the_machine_moves(machine: Machine, what: str) -> None:
    before = fingerprint(b"salt")
    if what == "address":
        machine.addresses[socket.AF_INET] = "10.0.0.7"
    elif what == "prefix":
        machine.addresses[socket.AF_INET6] = "2001:db8:1:3:aaaa::1"
    elif what == "gateway":
        machine.route("wlan0", "FE00A8C0")
    elif what == "interface":
        machine.route("wwan0", "0100A8C0")
    elif what == "no address":
        machine.addresses[socket.AF_INET6] = None
    else:
        machine.routes.write_text("Iface\tDestination\n")
    assert fingerprint(b"salt") != before


@pytest.mark.parametrize("data", [None, b"", b"\xff\xff", b"\n\n", b"header\nwlan0\n"])
def test_a_system_that_tells_nothing_of_routes(machine: Machine, data: bytes | None) -> None:
    machine.routes.unlink()
    if data is not None:
        machine.routes.write_bytes(data)
    assert fingerprint(b"salt") == fingerprint(b"salt")


def test_a_machine_without_a_network_has_a_fingerprint_too(machine: Machine) -> None:
    machine.addresses = {socket.AF_INET: None, socket.AF_INET6: None}
    assert len(fingerprint(b"salt")) == 32


def test_this_machine_says_the_same_twice() -> None:
    assert fingerprint(b"salt") == fingerprint(b"salt")
