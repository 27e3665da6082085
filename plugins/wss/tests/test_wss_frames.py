"""Frames without I/O: every split gives the same bytes, and what RFC 6455 forbids has its close code."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st
from websocket_peers import BINARY, CLOSE, CONT, PING, PONG, TEXT, frame
from websockets.client import ClientProtocol
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from tesaiot_connect_wss.frames import LARGEST, Frames

LIMIT = 100_000


def frames(server: bool, limit: int = LIMIT) -> Frames:
    """Those of a listener, whose client masks, or of a client."""
    if server:
        return Frames(ServerProtocol(state=OPEN, max_size=limit), limit)
    uri = parse_uri("ws://localhost/mqtt")
    return Frames(ClientProtocol(uri, state=OPEN, max_size=limit), limit)


both = pytest.mark.parametrize("server", [False, True], ids=["client", "server"])


def everything(mask: bool) -> tuple[bytes, bytes]:
    """Every kind of frame that carries data, control frames in between; and the payload."""
    parts = [bytes([at % 251]) * size for at, size in enumerate((0, 1, 2, 125, 126, 300, 65535, 65536, 3))]
    whole = b"".join(frame(BINARY, part, mask=mask) for part in parts)
    broken = [b"first ", b"", b"second ", b"x" * 200, b"last"]
    pieces = [
        frame(CONT if at else BINARY, part, fin=at == len(broken) - 1, mask=mask)
        + frame(PING, b"?", mask=mask)
        for at, part in enumerate(broken)
    ]
    after = frame(BINARY, b"and on", mask=mask) + frame(PONG, b"!", mask=mask)
    return whole + b"".join(pieces) + after, b"".join((*parts, *broken, b"and on"))


def read(made: Frames, data: bytes, size: int) -> bytes:
    return b"".join(piece for at in range(0, len(data), size) for piece in made.feed(data[at : at + size]))


@both
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 4096, 65539, 10_000_000])
def test_every_split_gives_the_same_bytes(server: bool, size: int) -> None:
    data, payload = everything(mask=server)
    made = frames(server)
    assert read(made, data, size) == payload
    assert made.open
    assert not made.over()
    assert made.pongs == [b"!"]
    answers = frames(not server)
    read(answers, made.taken(), 10_000)
    assert answers.pongs == [b"?"] * 5


@both
def test_a_cut_at_every_byte(server: bool) -> None:
    """MQTT packets do not align with frames, and neither align with what the network brings."""
    packets = b"\x30\x05\x00\x01tab" * 3
    data = b"".join(frame(BINARY, packets[at : at + 4], mask=server) for at in range(0, len(packets), 4))
    data += frame(PING, b"now", mask=server) + frame(BINARY, packets, mask=server)
    for cut in range(len(data) + 1):
        made = frames(server)
        assert b"".join(made.feed(data[:cut]) + made.feed(data[cut:])) == packets * 2


@given(
    server=st.booleans(),
    payloads=st.lists(st.binary(max_size=400), max_size=12),
    cuts=st.lists(st.integers(0, 6000), max_size=12),
    fragment=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_any_frames_in_any_pieces(
    server: bool, payloads: list[bytes], cuts: list[int], fragment: list[bool]
) -> None:
    data = b""
    for payload, split in zip(payloads, fragment, strict=False):
        middle = len(payload) // 2
        if split:
            data += frame(BINARY, payload[:middle], fin=False, mask=server) + frame(PING, mask=server)
            data += frame(CONT, payload[middle:], mask=server)
        else:
            data += frame(BINARY, payload, mask=server)
    made = frames(server)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    got = b"".join(piece for a, b in itertools.pairwise(edges) for piece in made.feed(data[a:b]))
    assert got == b"".join(payloads)


@both
@pytest.mark.parametrize(
    ("wrong", "code", "word"),
    [
        (lambda mask: frame(BINARY, b"x", mask=not mask), 1002, "mask"),
        (lambda mask: frame(BINARY, b"x" * 200, mask=not mask), 1002, "mask"),
        (lambda mask: frame(TEXT, b"hello", mask=mask), 1003, "binary"),
        (lambda mask: frame(TEXT, b"hello", mask=mask, fin=False), 1003, "binary"),
        (lambda mask: frame(BINARY, b"x", mask=mask, rsv=4), 1002, "reserved"),
        (lambda mask: frame(3, b"x", mask=mask), 1002, "opcode"),
        (lambda mask: frame(CONT, b"x", mask=mask), 1002, "continuation"),
        (
            lambda mask: frame(BINARY, b"x", fin=False, mask=mask) + frame(BINARY, b"y", mask=mask),
            1002,
            "cont",
        ),
        (lambda mask: frame(PING, b"x" * 126, mask=mask), 1002, "control frame"),
        (lambda mask: frame(PING, b"x", fin=False, mask=mask), 1002, "control frame"),
        (lambda mask: frame(CLOSE, b"\x03", mask=mask), 1002, "close"),
        (lambda mask: frame(CLOSE, (1005).to_bytes(2, "big"), mask=mask), 1002, "status"),
        (lambda mask: frame(BINARY, bytes(LIMIT + 1), mask=mask), 1009, "max_message_size"),
        (lambda mask: frame(BINARY, bytes(LIMIT + 1), mask=mask)[:14], 1009, "max_message_size"),
        (
            lambda mask: (
                frame(BINARY, bytes(60_000), fin=False, mask=mask)
                + frame(CONT, bytes(60_000), mask=mask)[:14]
            ),
            1009,
            "max_message_size",
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_violations(server: bool, wrong: object, code: int, word: str, size: int) -> None:
    made = frames(server)
    good = frame(BINARY, b"before", mask=server)
    got = read(made, good + wrong(server), size)  # type: ignore[operator]
    assert got.startswith(b"before")
    assert made.over()
    assert word in made.violation
    assert made.close_sent is not None
    assert made.close_sent.code == code
    assert made.feed(frame(BINARY, b"after", mask=server)) == [], "it went on reading"
    assert made.taken()


@both
def test_a_small_limit_holds_for_small_frames_too(server: bool) -> None:
    made = frames(server, 200)
    assert made.feed(frame(BINARY, bytes(200), mask=server)) == [bytes(200)]
    assert made.feed(frame(BINARY, bytes(201), mask=server)) == []
    assert "200 bytes" in made.violation


@both
def test_what_goes_out_comes_in(server: bool) -> None:
    near, far = frames(server), frames(not server, 10_000_000)
    data = bytes(range(256)) * 1500
    assert len(data) > 5 * LARGEST
    near.binary(data)
    near.ping(b"there?")
    out = near.taken()
    assert (out[1] >= 0x80) != server, "a client masks, a server does not"
    assert read(far, out, 1000) == data
    read(near, far.taken(), 3)
    assert near.pongs == [b"there?"]


@both
def test_closing(server: bool) -> None:
    near, far = frames(server), frames(not server)
    near.binary(b"last words")
    near.close(4001, "x" * 200)
    assert not near.open
    assert read(far, near.taken(), 5) == b"last words"
    assert far.over()
    assert far.close_received is not None
    assert (far.close_received.code, far.close_received.reason) == (4001, "x" * 123)
    near.feed(far.taken())
    assert near.over()
    assert not near.violation
    near.close(1000, "again is nothing")
    assert near.taken() == b""


def test_the_library_has_its_extension() -> None:
    """Masking byte by byte in Python costs ten times everything else."""
    from tesaiot_connect_wss.frames import apply_mask

    assert apply_mask.__module__ == "websockets.speedups" or "builtin" in type(apply_mask).__name__
