"""quic_nng with NanoSDK keeps the transport contract, as far as a session that is translated can.

NanoSDK carries MQTT alone, so the bytes of the checks travel as messages. What it cannot is left out by name,
and what is true in its place is checked here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal

import nng_clock
import nng_ends
import pytest
from nng_ends import NAMES, Ends, Name
from nng_translated import TranslatedDialer, TranslatedListener

from tesaiot_connect import Disconnected, Duration, Size
from tesaiot_connect.testing import Certificates, TransportCheck, transport_checks
from tesaiot_connect.testing.kit import (
    MIB,
    MOST_IN_FLIGHT,
    Flood,
    Link,
    count,
    expect,
    pattern,
    read_exactly,
    transfer,
    turns,
)
from tesaiot_connect_quic_nng import supervisor

pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")

Qos = Literal[0, 1]
PATIENT: Iterator[float] = repeat(30.0)
_ONE_STREAM = "it has one stream"
CANNOT = {
    "backpressure": "nothing holds the server back: the two directions are checked apart",
    "half_close": "it cannot end one direction alone",
    "many_streams": _ONE_STREAM,
    "stream_order": _ONE_STREAM,
    "unread_stream": _ONE_STREAM,
    "unread_streams": _ONE_STREAM,
    "abort_stream": _ONE_STREAM,
    "abort_wakes": _ONE_STREAM,
    "end_of_one": _ONE_STREAM,
    "cancelled_accept": _ONE_STREAM,
    "accept_ends": _ONE_STREAM,
    "open_after_end": _ONE_STREAM,
    "many_in_sequence": _ONE_STREAM,
    "probe": "it cannot probe its path",
    "migrate": "it cannot move to another address",
    "quic_status": "the library tells no figures",
}
CANNOT_REALLY = {
    "end_is_final": "the real library resets its stream, which is no end of a stream to the server",
    "close_flushes": "the same; that all arrives before is checked apart",
    "both_ways": "while it has a packet in part the real library keeps its QUIC thread busy, and with both "
    "directions full it stands still for seconds; fewer bytes are checked apart",
    "early": "the real library drops what comes together with the end of the connection",
}
AT_QOS_0 = {
    "cancelled_receive": "MQTT's window would hold the sender back, after 20 words of a few bytes",
    "cancelled_send": "at QoS 1 a sender waits for PUBACK, not for room",
    "abort_during_send": "the same",
    "close_is_bounded": "quicker",
}
EITHER = ("echo", "both_ways", "close_flushes")
BUSY = ("echo", "both_ways", "many_connections")
"""The real library may be silent for a while there; elsewhere silence has to be noticed soon."""


def cases() -> list[Any]:
    return [
        pytest.param(check, qos, id=f"{check}-qos{qos}")
        for check in transport_checks
        if check.name not in CANNOT
        for qos in ((0, 1) if check.name in EITHER else (0,) if check.name in AT_QOS_0 else (1,))
    ]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Workers wait for the last bytes as long as a busy machine may take, but where nobody reads them."""
    monkeypatch.setattr(supervisor, "COMMAND", nng_clock.COMMAND)
    if "close_is_bounded" not in request.node.name:
        monkeypatch.setenv("TESAIOT_PATIENT", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nanosdk")


def dialer(ends: Ends, qos: Qos, url: str, *, limits: Iterator[float] = PATIENT, **options: Any) -> Any:
    """`limits` are those of the connections, one after the other."""
    options["connect_timeout"] = Duration(next(limits))
    return TranslatedDialer(ends.recipe(url, **options), qos)


def run(check: TransportCheck, ends: Ends, qos: Qos, **options: Any) -> None:
    if check.name not in BUSY:
        options |= {"idle_timeout": Duration(3.0), "keepalive": Duration(1.0)}
    check(listen=TranslatedListener(ends.listener()), connect=partial(dialer, ends, qos, **options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("check", "qos"), cases())
def test_translated(
    check: TransportCheck, qos: Qos, name: Name, certificates: Certificates, folder: Path
) -> None:
    if name == "real" and check.name in CANNOT_REALLY:
        pytest.skip(f"NanoSDK cannot: {CANNOT_REALLY[check.name]}")
    ends = nng_ends.ends(name, certificates, folder)
    limits = PATIENT
    if check.name == "refused":  # the second, where the library does not say that nobody is there
        limits = chain(islice(PATIENT, 1), repeat(3.0))
    run(check, ends, qos, limits=limits)


def test_the_kit_has_what_is_left_out() -> None:
    names = {check.name for check in transport_checks}
    assert names >= {*CANNOT, *CANNOT_REALLY, *AT_QOS_0, *EITHER}


# --- in place of what is left out ---------------------------------------------------------


async def _unread_server(link: Link) -> None:
    async with link.open() as ready:
        chunk = pattern(65536)
        flood = Flood(ready.a, chunk, MOST_IN_FLIGHT)
        async with flood:
            await flood.stalled()
            expect(not flood.finished, f"the sender got rid of {flood.sent} bytes nobody read")
            flood.stop = True
            received = await count(ready.b, chunk, flood)
            expect(received == flood.sent, f"{flood.sent} bytes sent, {received} arrived")


async def _unread_client(link: Link) -> None:
    async with link.open() as ready:
        async with Flood(ready.b, pattern(65536), MOST_IN_FLIGHT):
            reason = await ready.near.wait_closed()
            expect("bytes from the server wait" in reason.text, f"it ended because: {reason.text}")
        try:
            while await ready.a.receive():
                pass
        except Disconnected as error:
            expect("`memory`" in error.fix, f"its fix is {error.fix!r}")
            return
    expect(False, "receive gave an end of the stream, as if that had been all")


async def _both_at_once(link: Link) -> None:
    async with link.open() as ready:
        receiving = asyncio.create_task(ready.b.receive())
        await turns(5)
        await ready.b.send(b"x")
        expect(await ready.a.receive() == b"x", "something else arrived")
        await ready.a.send(b"y")
        expect(await receiving == b"y", "something else arrived")
        data = pattern(100_000)
        got = await asyncio.gather(transfer(ready.a, ready.b, data), transfer(ready.b, ready.a, data))
        expect(got[0] == data and got[1] == data, "the bytes of the two directions got mixed up")


async def _all_arrives(link: Link) -> None:
    async with link.open() as ready:
        data = pattern(200_000)
        await ready.b.send(b"x" * 1000)

        async def send_and_close() -> None:
            await ready.a.send(data)
            await ready.near.aclose()

        closing = asyncio.create_task(send_and_close())
        expect(await read_exactly(ready.b, len(data)) == data, "something else arrived")
        try:
            more = await ready.b.receive()
            expect(not more, f"{more[:20]!r} came after the end")
        except Disconnected:
            pass
        await ready.far.aclose()
        await closing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("qos", [0, 1])
def test_a_server_that_does_not_read_holds_the_sender_back(
    qos: Qos, name: Name, certificates: Certificates, folder: Path
) -> None:
    rule = "a server that does not read holds the sender back, and gets everything once it reads."
    check = TransportCheck("unread_server", rule, _unread_server)
    run(check, nng_ends.ends(name, certificates, folder), qos)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_does_not_read_loses_the_connection(
    name: Name, certificates: Certificates, folder: Path
) -> None:
    rule = "what waits for a client that does not read is bounded by `memory`; more ends the connection."
    check = TransportCheck("unread_client", rule, _unread_client)
    run(check, nng_ends.ends(name, certificates, folder), 1, memory=Size(2 * MIB))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("qos", [0, 1])
def test_both_directions_at_once(qos: Qos, name: Name, certificates: Certificates, folder: Path) -> None:
    rule = "one task may receive while another sends: both directions flow at the same time."
    check = TransportCheck("both_at_once", rule, _both_at_once)
    run(check, nng_ends.ends(name, certificates, folder), qos)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("qos", [0, 1])
def test_all_arrives_before_the_end(qos: Qos, name: Name, certificates: Certificates, folder: Path) -> None:
    check = TransportCheck("all_arrives", "aclose flushes, however the connection then ends.", _all_arrives)
    run(check, nng_ends.ends(name, certificates, folder), qos)
