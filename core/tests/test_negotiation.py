"""Endpoints are tried in order, and every reason is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import pytest

from tesaiot_connect.errors import ConnectFailed, Refused
from tesaiot_connect.negotiation import InOrder
from tesaiot_connect.protocols import ClientCertificate, Connection, Dialer, Url
from tesaiot_connect.testing import connected_pair


@attrs.frozen
class Scripted:
    """A transport that does what it is told: raise, hang, or connect."""

    schemes: ClassVar[Mapping[str, int]] = {"test": 1}
    rank: ClassVar[int] = 0
    races: ClassVar[bool] = True

    url: Url
    outcome: Any = None
    asked: list[Any] = attrs.field(factory=list)

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.asked.append((identity, early))
        if self.outcome == "hang":
            await asyncio.Event().wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return connected_pair()[0]


def endpoint(host: str, outcome: Any = None) -> Scripted:
    return Scripted(Url("test", host, 1), outcome)


def test_the_first_that_connects_wins() -> None:
    endpoints = [
        endpoint("a", ConnectFailed("it is off", fix="switch it on")),
        endpoint("b"),
        endpoint("c"),
    ]
    dialer = InOrder(endpoints)
    identity = ClientCertificate("cert", "key")
    connection = asyncio.run(dialer.connect(identity=identity, early=b"hello"))
    assert connection.peer.transport == "pair"
    assert [len(one.asked) for one in endpoints] == [1, 1, 0]
    assert endpoints[1].asked == [(identity, b"hello")]
    first, second = dialer.attempts
    assert first.endpoint == "test://a:1"
    assert "it is off" in str(first.error)
    assert second.error is None


def test_all_reasons_are_told() -> None:
    dialer = InOrder(
        [
            endpoint("a", ConnectFailed("it is off", fix="switch it on")),
            endpoint("b", ConnectFailed("no route", fix="check the cable")),
        ]
    )
    with pytest.raises(ConnectFailed) as failed:
        asyncio.run(dialer.connect())
    for part in ("test://a:1: it is off", "test://b:1: no route", "switch it on", "check the cable"):
        assert part in str(failed.value)
    assert len(dialer.attempts) == 2


def test_an_endpoint_is_named_once() -> None:
    dialer = InOrder(
        [endpoint("a", ConnectFailed("test://a:1 is off")), endpoint("b", ConnectFailed("no route"))]
    )
    with pytest.raises(ConnectFailed) as failed:
        asyncio.run(dialer.connect())
    assert failed.value.what.endswith(": (1) test://a:1 is off; (2) test://b:1: no route")


def test_one_endpoint_speaks_for_itself() -> None:
    refused = Refused("bad credentials", permanent=True)
    with pytest.raises(Refused) as failed:
        asyncio.run(InOrder([endpoint("a", refused)]).connect())
    assert failed.value is refused


def test_refused_for_good_everywhere_is_for_good() -> None:
    dialer = InOrder([endpoint(host, Refused("banned", permanent=True)) for host in "ab"])
    with pytest.raises(Refused) as failed:
        asyncio.run(dialer.connect())
    assert failed.value.permanent


def test_an_endpoint_that_hangs_is_left_behind() -> None:
    dialer = InOrder([endpoint("a", "hang"), endpoint("b")], timeout=0.01)
    asyncio.run(dialer.connect())
    assert "within 0.01 s" in str(dialer.attempts[0].error)


def test_a_broken_transport_does_not_hide_the_next(caplog: pytest.LogCaptureFixture) -> None:
    dialer = InOrder([endpoint("a", KeyError("oops")), endpoint("b")])
    asyncio.run(dialer.connect())
    assert "test://a:1 failed in an unexpected way" in caplog.text


def test_attempts_are_those_of_the_latest_connect() -> None:
    dialer = InOrder([endpoint("a")])
    asyncio.run(dialer.connect())
    asyncio.run(dialer.connect())
    assert len(dialer.attempts) == 1


def test_no_endpoints_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        InOrder([])


def test_it_is_a_dialer() -> None:
    dialer: Dialer = InOrder([endpoint("a")])
    assert dialer
