"""Where packets end, and the watchdog's question between two: that is added, its answer taken, no more."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from tesaiot_connect_quic_nng.packets import Boundaries, Watchdog

CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00"
CONNACK = b"\x20\x02\x00\x00"
PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"
DISCONNECT = b"\xe0\x00"
PUBLISH = b"\x30\x05\x00\x01t\xd0\x00"
"""Its payload looks like a PINGRESP."""
LONG = b"\x32\xac\x02" + bytes(300)
EVERY = 10.0


def watched(now: float = 0.0) -> Watchdog:
    watchdog = Watchdog(EVERY)
    assert watchdog.from_client(CONNECT, now=now) == CONNECT
    assert watchdog.from_server(CONNACK, now=now) == CONNACK
    return watchdog


def asked() -> Watchdog:
    watchdog = watched()
    assert watchdog.ask(now=EVERY) == PINGREQ
    return watchdog


PACKETS = st.lists(st.sampled_from([CONNACK, PINGREQ, PUBLISH, LONG, b"\x30\xff\xff\x03" + bytes(65535)]))


@given(PACKETS, st.lists(st.integers(0, 70_000)))
def test_packets_end_where_they_end_however_they_are_split(packets: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(packets)
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    boundaries, ends, expected = Boundaries(), [], []
    for begin, end in itertools.pairwise(places):
        ends += [(kind, size, begin + at) for kind, size, at in boundaries.feed(stream[begin:end])]
    for count, packet in enumerate(packets):
        expected.append((packet[0] >> 4, len(packet), sum(map(len, packets[: count + 1]))))
    assert ends == expected
    assert boundaries.between


def test_half_a_packet_is_not_between() -> None:
    boundaries = Boundaries()
    for byte in LONG[:-1]:
        assert boundaries.feed(bytes([byte])) == []
        assert not boundaries.between
    assert boundaries.feed(LONG[-1:]) == [(3, len(LONG), 1)]
    assert boundaries.between


def test_nothing_is_asked_before_connack() -> None:
    watchdog = Watchdog(EVERY)
    watchdog.from_client(CONNECT, now=0)
    assert watchdog.next_timeout() is None
    assert watchdog.ask(now=1000) == b""
    assert not watchdog.silent(1000)


def test_it_asks_when_an_interval_has_passed() -> None:
    watchdog = watched()
    assert watchdog.next_timeout() == EVERY
    assert watchdog.ask(now=EVERY - 0.1) == b""
    assert watchdog.ask(now=EVERY) == PINGREQ
    assert watchdog.ask(now=EVERY) == b""
    assert watchdog.next_timeout() == 2 * EVERY


@pytest.mark.parametrize("cut", range(len(PUBLISH + PINGRESP + PUBLISH) + 1))
def test_the_answer_is_taken_out_wherever_it_is_split(cut: int) -> None:
    watchdog, stream = asked(), PUBLISH + PINGRESP + PUBLISH
    given = watchdog.from_server(stream[:cut], now=12) + watchdog.from_server(stream[cut:], now=13)
    assert given == PUBLISH + PUBLISH
    assert not watchdog.asking
    assert watchdog.next_timeout() == (12 if cut >= len(PUBLISH + PINGRESP) else 13) + EVERY


def test_a_packet_is_not_kept_back_for_being_incomplete() -> None:
    watchdog = asked()
    assert watchdog.from_server(LONG[:100], now=11) == LONG[:100]


def test_the_client_gets_the_answers_to_its_own() -> None:
    watchdog = watched()
    assert watchdog.from_client(PINGREQ, now=1) == PINGREQ
    assert watchdog.ask(now=EVERY) == PINGREQ
    assert watchdog.from_client(PINGREQ, now=11) == PINGREQ
    assert watchdog.from_server(PINGRESP, now=12) == PINGRESP
    assert watchdog.asking
    assert watchdog.from_server(PINGRESP, now=12) == b""
    assert not watchdog.asking
    assert watchdog.from_server(PINGRESP[:1], now=12) + watchdog.from_server(PINGRESP[1:], now=12) == PINGRESP


def test_in_the_middle_of_a_packet_it_waits_for_its_end() -> None:
    watchdog = watched()
    assert watchdog.from_client(LONG[:50], now=1) == LONG[:50]
    assert watchdog.ask(now=EVERY) == b""
    assert watchdog.next_timeout() is None
    rest = LONG[50:] + PUBLISH + LONG[:20]
    assert watchdog.from_client(rest, now=11) == LONG[50:] + PINGREQ + PUBLISH + LONG[:20]
    assert watchdog.asking


def test_the_order_of_questions_is_theirs_on_the_wire() -> None:
    """Ours goes between two of the client's."""
    watchdog = watched()
    assert watchdog.from_client(PINGREQ + PINGREQ, now=EVERY) == PINGREQ + PINGREQ + PINGREQ
    answers = [watchdog.from_server(PINGRESP, now=EVERY) for _ in range(3)]
    assert answers == [PINGRESP, b"", PINGRESP]


def test_silence_after_a_question() -> None:
    watchdog = asked()
    assert watchdog.asking
    assert not watchdog.silent(2 * EVERY - 0.1)
    assert watchdog.silent(2 * EVERY)


def test_whatever_comes_puts_silence_off() -> None:
    watchdog = asked()
    watchdog.from_server(LONG[:7], now=19)
    assert not watchdog.silent(28)
    assert watchdog.silent(29)


def test_nothing_is_asked_after_disconnect() -> None:
    watchdog = watched()
    assert watchdog.from_client(DISCONNECT, now=11) == DISCONNECT
    assert watchdog.ask(now=12) == b""
    assert watchdog.next_timeout() is None


@pytest.mark.parametrize("first", [b"!", b"\x00", PINGREQ, PUBLISH])
def test_what_is_not_mqtt_passes(first: bytes) -> None:
    watchdog = Watchdog(EVERY)
    assert watchdog.from_client(first, now=0) == first
    for data in (CONNACK, PINGRESP, b"\xff" * 20):
        assert watchdog.from_server(data, now=0) == data
        assert watchdog.from_client(data, now=0) == data
    assert watchdog.next_timeout() is None
    assert watchdog.ask(now=100) == b""
    assert not watchdog.between


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_length_that_is_none_ends_the_watch_and_passes(side: str) -> None:
    watchdog, broken = asked(), b"\x30\xff\xff\xff\xff\x01" + PINGRESP
    take = watchdog.from_client if side == "client" else watchdog.from_server
    assert take(broken, now=11) == broken
    assert watchdog.from_server(PINGRESP, now=11) == PINGRESP
    assert watchdog.next_timeout() is None
    assert not watchdog.silent(1000)


@given(PACKETS, st.lists(st.integers(1, 400), min_size=1))
def test_the_client_gets_all_but_the_answer(packets: list[bytes], steps: list[int]) -> None:
    watchdog = asked()
    stream, expected = PINGRESP.join([b"".join(packets), b"".join(packets)]), b"".join(packets * 2)
    got, at, turn = b"", 0, 0
    while at < len(stream):
        step = steps[turn % len(steps)] if len(stream) < 5000 else 5000
        got += watchdog.from_server(stream[at : at + step], now=11)
        at, turn = at + step, turn + 1
    assert got == expected
