"""Packets, valid and malformed, through both decoders.

Two sources: a corpus of our own (tests/corpus/packets.json: each entry cites the section of the MQTT 5
standard that decides it, or of 3.1.1 where it says so), and, where TESAIOT_CORPUS names a folder, the
packet collections of other projects. Whatever the bytes: packets or a ProtocolError come out, never another
exception, never an endless loop, and never more than the packet-size limit is kept.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tesaiot_connect.errors import ProtocolError
from tesaiot_connect.mqtt.client import ClientEngine
from tesaiot_connect.mqtt.decoder import Decoder
from tesaiot_connect.mqtt.events import Close, Closed, Connected, ConnectRequest
from tesaiot_connect.mqtt.packets import Connect
from tesaiot_connect.mqtt.server import ServerEngine, ServerLimits
from tesaiot_connect.mqtt.session import Session

OWN = Path(__file__).parent / "corpus" / "packets.json"
FOREIGN = Path(os.environ["TESAIOT_CORPUS"]) if os.environ.get("TESAIOT_CORPUS") else None
LIMIT = 65536
ALIASES = 200


def decode(data: bytes, *, from_client: bool, version: int, piece: int = 0) -> tuple[list[Any], int]:
    """What comes out, and how many bytes of an unfinished packet are left."""
    decoder = Decoder(
        from_client=from_client, version=version, maximum_packet_size=LIMIT, topic_alias_maximum=ALIASES
    )
    items: list[Any] = []
    step = piece or len(data) or 1
    for start in range(0, len(data), step):
        items += decoder.feed(data[start : start + step])
        assert decoder.buffered <= LIMIT
    return items, decoder.buffered


def error_of(items: list[Any]) -> ProtocolError | None:
    return items[-1] if items and isinstance(items[-1], ProtocolError) else None


def parses(data: bytes, *, versions: tuple[int, ...] = (4, 5)) -> bool:
    """Whether either side takes all of it as whole packets, in one of the versions."""
    for version in versions:
        for from_client in (True, False):
            items, left = decode(data, from_client=from_client, version=version)
            if items and not error_of(items) and not left:
                return True
    return False


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


# --- our own ------------------------------------------------------------------------------

PACKETS = json.loads(OWN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("packet", PACKETS, ids=[packet["name"] for packet in PACKETS])
@pytest.mark.parametrize("piece", [0, 1, 3])
def test_own_corpus(packet: dict[str, Any], piece: int) -> None:
    data = bytes.fromhex(packet["hex"])
    items, left = decode(data, from_client=packet["from"] == "client", version=packet["version"], piece=piece)
    error = error_of(items)
    if packet["valid"]:
        assert error is None, packet["why"]
        assert items
        assert not left
    else:
        assert error is not None, packet["why"]
        if "reason_code" in packet:
            assert error.reason_code == packet["reason_code"], str(error)


def test_own_corpus_is_large_and_explained() -> None:
    assert len(PACKETS) >= 60
    assert len({packet["name"] for packet in PACKETS}) == len(PACKETS)
    assert all(packet["section"] for packet in PACKETS)
    assert all(packet["why"] for packet in PACKETS if not packet["valid"])


def test_what_came_before_a_malformed_packet_still_counts() -> None:
    good = bytes.fromhex("30 06 00 03 61 2f 62 78")
    items, _ = decode(good + b"\x36\x00", from_client=True, version=4)
    assert items[0].messages[0].payload == b"x"
    assert error_of(items) is not None


def test_nothing_is_decoded_after_an_error() -> None:
    decoder = Decoder(from_client=True, version=4)
    assert error_of(decoder.feed(b"\xc1\x00"))
    assert decoder.feed(b"\xc0\x00") == []
    assert decoder.buffered == 0


def test_an_announced_giant_costs_nothing() -> None:
    """A length of 256 MiB is refused on its header; one just under the limit is kept, not reserved."""
    tracemalloc.start()
    try:
        decoder = Decoder(from_client=True, version=4, maximum_packet_size=1 << 20)
        header = b"\x30" + varint((1 << 20) - 8)
        assert decoder.feed(header) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
        for _ in range(15):
            assert decoder.feed(bytes(1 << 16)) == []
        assert decoder.buffered <= 1 << 20
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- collections of other projects --------------------------------------------------------


class Entry(NamedTuple):
    name: str
    data: bytes
    verdict: str
    """"valid", "invalid" or "any": what the collection says of it."""
    versions: tuple[int, ...]


# Where a collection says something else than the standard, the standard decides; each with its reason.
OVERRULED = {
    # mochi: these break off where MQTT 5 allows the packet to end
    "TDisconnectMalReasonCode": "valid",  # 3.14.2.1: no reason code is 0x00
    "TPubrecMalReasonCode": "valid",  # 3.5.2.1: the reason code may be left out
    "TAuthMalReasonCode": "valid",  # 3.15.2.1: so may all of AUTH's body
    "TConnectSpecInvalidUTF8NoSkip": "valid",  # 1.5.4: U+FEFF is kept, not refused
    # mochi: refusals of MQTT 5 in a CONNACK that says that a session is present (3.2.2.1.1)
    "TConnackBadProtocolVersion": "invalid",
    "TConnackBadClientID": "invalid",
    "TConnackServerUnavailable": "invalid",
    "TConnackBadUsernamePassword": "invalid",
    "TConnackNotAuthorised": "invalid",
    "TPublishDup": "invalid",  # 3.3.1.1, MQTT-3.3.1-2: no DUP at QoS 0
    "TPublishBasicTopicAliasOnly": "any",  # its alias is set by another packet
    # mqtt-packet
    "connect MQTT bridge 132 (9)": "invalid",  # 3.1.2.1: MQIsdp is the name of level 3, not of level 4
    "Version 5 CONNACK test 1 (27)": "invalid",  # 3.2.2: success has a property length
    "Version 5 CONNACK test 2 (28)": "invalid",
    "connack MQTT 5 with properties (62)": "invalid",  # 3.2.2.3.4: Maximum QoS is 0 or 1
    "connack MQTT 5 with properties and doubled user properties (63)": "invalid",
}


def mochi(folder: Path) -> Iterator[Entry]:
    for case in json.loads((folder / "mochi_tpackets.json").read_text(encoding="utf-8")):
        raw = bytes.fromhex(case.get("RawBytes") or "")
        if not raw:
            continue
        versions = (5,) if case.get("ver") == 5 else (4,) if case.get("ver") else (4, 5)
        group = case.get("group")
        verdict = "any"
        if case.get("FailFirst") and group in ("decode", "nodecode"):
            verdict = "invalid"
            if group == "decode" and raw[1] < 0x80:
                # its decoders get the body alone, so the lengths of these are wrong: put it right
                raw = raw[:1] + varint(len(raw) - 2) + raw[2:]
        elif group is None and not case.get("RawBytes_truncated"):
            verdict = "valid"
        yield Entry(case["case"], raw, OVERRULED.get(case["case"], verdict), versions)


def mqtt_packet(folder: Path) -> Iterator[Entry]:
    for number, case in enumerate(json.loads((folder / "mqtt_packet.json").read_text(encoding="utf-8"))):
        if not case.get("hex"):
            continue
        name = f"{case['name'] or case['kind']} ({number})"
        verdict = "invalid" if case["kind"] == "testParseError" else "valid"
        versions = (5,) if case.get("ver") == 5 else (4,) if "for this version" in name else (4, 5)
        yield Entry(name, bytes.fromhex(case["hex"]), OVERRULED.get(name, verdict), versions)


def fuzzers(folder: Path) -> Iterator[Entry]:
    for file in sorted((folder / "fume").iterdir()):
        for number, line in enumerate(file.read_text().split()):
            yield Entry(f"fume {file.name} {number}", bytes.fromhex(line), "any", (4, 5))
    for file in sorted((folder / "mqtt_fuzz").iterdir()):
        yield Entry(file.name, file.read_bytes(), "any", (4, 5))


ENTRIES = [*mochi(FOREIGN), *mqtt_packet(FOREIGN), *fuzzers(FOREIGN)] if FOREIGN else []
needs_corpus = pytest.mark.skipif(FOREIGN is None, reason="TESAIOT_CORPUS names no folder")
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])


@needs_corpus
@every_entry
def test_verdict(entry: Entry) -> None:
    if entry.verdict == "valid":
        assert parses(entry.data, versions=entry.versions), entry.data.hex()
    elif entry.verdict == "invalid":
        assert not parses(entry.data, versions=entry.versions), entry.data.hex()


@needs_corpus
@every_entry
def test_pieces_give_the_same_as_the_whole(entry: Entry) -> None:
    for version in (4, 5):
        for from_client in (True, False):
            whole, left = decode(entry.data, from_client=from_client, version=version)
            pieces, left_of_pieces = decode(entry.data, from_client=from_client, version=version, piece=1)
            assert flat(pieces) == flat(whole)
            assert left_of_pieces == left


def flat(items: list[Any]) -> list[str]:
    """Runs of PUBLISH and of acknowledgements may be cut differently: compare what is in them."""
    out = []
    for item in items:
        if hasattr(item, "messages"):
            out += [repr(pair) for pair in zip(item.messages, item.ids, strict=True)]
        elif hasattr(item, "packet_type"):
            out += [f"{item.packet_type} {one} {item.reasons.get(one)}" for one in item.ids]
        else:
            out.append(f"{item!r}")
    return out


def damaged(packets: Iterable[bytes], times: int) -> Iterator[tuple[bytes, int, bool]]:
    """Flip, cut, insert and repeat bytes of every packet, reproducibly; with a version and a side."""
    source = random.Random(5)
    for packet in packets:
        for _ in range(times):
            data = bytearray(packet)
            for _ in range(source.randint(1, 4)):
                at = source.randrange(len(data) + 1)
                match source.randrange(4):
                    case 0 if at < len(data):
                        data[at] = source.randrange(256)
                    case 1:
                        del data[at:]
                    case 2:
                        data[at:at] = source.randbytes(source.randint(1, 3))
                    case _:
                        data += packet
            yield bytes(data), source.choice((4, 5)), source.random() < 0.5


ALL = [*(bytes.fromhex(packet["hex"]) for packet in PACKETS), *(entry.data for entry in ENTRIES)]


def test_damaged_packets_never_raise_anything_else() -> None:
    for data, version, from_client in damaged(ALL, 60):
        items, _ = decode(data, from_client=from_client, version=version)
        assert not any(isinstance(item, ProtocolError) for item in items[:-1])


def server_after_connect(version: int) -> ServerEngine:
    engine = ServerEngine(ServerLimits(), now=0.0)
    connect = "10 0d 00 04 4d 51 54 54 04 02 00 3c 00 01 63"
    if version == 5:
        connect = "10 0e 00 04 4d 51 54 54 05 02 00 3c 00 00 01 63"
    (request,) = engine.receive_data(bytes.fromhex(connect), now=0.0)
    assert isinstance(request, ConnectRequest)
    engine.accept(Session(), now=0.0, session_present=False)
    return engine


def client_after_connack(version: int) -> ClientEngine:
    engine = ClientEngine(Connect(client_id="c", version=version), Session(), now=0.0)
    connack = "20 03 00 00 00" if version == 5 else "20 02 00 00"
    (connected,) = engine.receive_data(bytes.fromhex(connack), now=0.0)
    assert isinstance(connected, Connected)
    return engine


def test_damaged_packets_end_engines_in_order() -> None:
    """An engine that is given nonsense answers or closes; it raises nothing, and says nothing after that."""
    for data, version, from_client in damaged(ALL, 15):
        engine = server_after_connect(version) if from_client else client_after_connack(version)
        engine.outputs()
        events = engine.receive_data(data, now=1.0)
        closed = [event for event in events if isinstance(event, Closed)]
        assert len(closed) <= 1
        if closed:
            assert events[-1] is closed[0]
            sent = engine.outputs()
            assert any(isinstance(output, Close) for output in sent)
            assert engine.receive_data(data, now=2.0) == []
            assert engine.outputs() == []
