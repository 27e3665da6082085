"""The stand-in for NanoSDK behaves as the library was seen to: with ctypes alone, nothing of the plugin."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import nng_ctypes
import nng_stub
import pytest
from nng_ctypes import (
    CONNACK,
    CONNECT,
    EBUSY,
    ECANCELED,
    ECLOSED,
    ECONNSHUT,
    EPROTO,
    PATIENCE,
    PINGREQ,
    PINGRESP,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    SUBACK,
    SUBSCRIBE,
    UNSUBACK,
    UNSUBSCRIBE,
    Nng,
    Peer,
    Server,
    until,
)

from tesaiot_connect.testing import Certificates

Opened = Callable[..., tuple[Nng, Peer]]


def told(monkeypatch: pytest.MonkeyPatch, **faults: object) -> None:
    """Sockets that are opened from here on have these faults."""
    for name, value in nng_stub.environment(**faults).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def closed_server() -> Iterator[Server]:
    """Nobody gets in before its `listen`."""
    server = Server(closed=True)
    yield server
    server.close()


@pytest.fixture
def opened(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """`opened(**faults)`: a client whose handshake is complete, and the other end."""
    with ExitStack() as stack:

        def opened(**faults: object) -> tuple[Nng, Peer]:
            told(monkeypatch, **{"retry": 50_000, **faults})
            nng = Nng()
            assert nng.open(server.port) == 0
            stack.callback(nng.close)
            stack.callback(server.refuse)  # first: a close may wait for a new connection to end
            peer = server.accept()
            until(lambda: nng.probe() == EPROTO, "the handshake")
            return nng, peer

        yield opened


def connected(opened: Opened, **faults: object) -> tuple[Nng, Peer]:
    """Its keepalive is 60 s. With CONNACK taken out of the receive queue."""
    nng, peer = opened(**faults)
    nng.connect()
    peer.accept_mqtt()
    first = nng.waited(nng.receive())
    assert nng.c.nng_mqtt_msg_get_packet_type(first) == CONNACK
    nng.c.nng_msg_free(first)
    return nng, peer


def sends(log: Path) -> list[list[str]]:
    """The word, type and id of each; attempts to connect are written down between them."""
    return [line.split() for line in nng_stub.events(log) if line.startswith("send")]


# --- which library it is ------------------------------------------------------------------


def test_it_loads_only_after_msquic() -> None:
    library, msquic = nng_stub.libraries()
    code = (
        "import ctypes, sys\n"
        "try: ctypes.CDLL(sys.argv[1])\n"
        "except OSError as error: print(error)\n"
        "ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "print('loaded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library), str(msquic)], capture_output=True, text=True, check=True
    )
    missing, loaded = done.stdout.splitlines()
    assert "undefined symbol: MsQuic" in missing
    assert loaded == "loaded"


def test_plain_nng_knows_no_quic() -> None:
    library = ctypes.CDLL(str(nng_stub.plain()))
    assert library.nng_stream_dialer_alloc(ctypes.byref(ctypes.c_void_p()), b"mqtt-quic://127.0.0.1:1") == 9
    assert not hasattr(library, "nng_mqtt_quic_client_open_conf")


def test_a_library_without_one_function_has_the_others() -> None:
    ctypes.CDLL(str(nng_stub.libraries()[1]), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(nng_stub.without("nng_recv_aio")))
    assert not hasattr(library, "nng_recv_aio")
    assert hasattr(library, "nng_send_aio")


def test_an_installation_has_both_files(tmp_path: Path) -> None:
    assert nng_stub.installed(tmp_path).parent == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libmsquic.so", "libnng.so"]


def test_version_and_words() -> None:
    nng = Nng()
    assert nng.c.nng_version().startswith(b"1.8.0")
    assert nng.c.nng_strerror(EPROTO) == b"Protocol error"
    assert nng.c.nng_strerror(77).startswith(b"Unknown error")


# --- the handshake ------------------------------------------------------------------------


def test_it_tries_each_second_for_ever_and_says_nothing(
    closed_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, server = tmp_path / "log", closed_server
    told(monkeypatch, log=log)
    nng = Nng()
    assert nng.open(server.port) == 0
    assert nng.probe() == EBUSY
    until(lambda: nng_stub.counters(log)["failed"] >= 2, "two attempts")
    assert nng.probe() == EBUSY
    server.listen()
    try:
        server.accept()
        until(lambda: nng.probe() == EPROTO, "the handshake")
        assert nng_stub.events(log)[0] == "open"
        assert nng_stub.counters(log)["connected"] == 1
    finally:
        server.close()
        assert nng.close() == 0


def test_readiness_sends_nothing(opened: Opened) -> None:
    nng, peer = opened()
    nng.connect(connect_client_id=b"first on the wire")
    assert b"first on the wire" in peer.accept_mqtt()


def test_connect_waits_for_the_handshake(server: Server) -> None:
    nng = Nng()
    assert nng.open(server.port) == 0
    nng.connect()
    assert server.accept().packet()[0] == CONNECT << 4
    server.close()
    assert nng.close() == 0


@pytest.mark.parametrize("bad", ["no key file", "an encrypted key", "no certificate file"])
def test_a_bad_identity_is_all_that_opening_refuses(server: Server, tmp_path: Path, bad: str) -> None:
    made = Certificates(tmp_path)
    nng = identified(made)
    if bad == "an encrypted key":
        encrypted = tmp_path / "encrypted.pem"
        encrypted.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
        nng.conf.keyfile = str(encrypted).encode()
    elif bad == "no key file":
        nng.conf.keyfile = b"/nowhere/key.pem"
    else:
        nng.conf.certfile = None
    assert nng.open(server.port) == -1


def test_a_bad_ca_is_a_handshake_that_never_completes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    told(monkeypatch, log=log, retry=50_000)
    nng = identified(Certificates(tmp_path))
    nng.conf.cafile = b"/nowhere/ca.pem"
    nng.conf.qconnect_timeout = 0
    assert nng.open(server.port) == 0
    until(lambda: nng_stub.counters(log)["failed"], "an attempt")
    assert nng.probe() == EBUSY
    assert nng.close() == 0


def test_with_an_identity_and_a_ca_it_connects(server: Server, tmp_path: Path) -> None:
    nng = identified(Certificates(tmp_path))
    assert nng.open(server.port) == 0
    until(lambda: nng.probe() == EPROTO, "the handshake")
    server.accept()
    server.close()
    assert nng.close() == 0


def identified(made: Certificates) -> Nng:
    pair = made.server()
    nng = Nng()
    nng.conf.enable = True
    nng.conf.cafile = str(made.ca_file).encode()
    nng.conf.certfile, nng.conf.keyfile = str(pair.certificate).encode(), str(pair.key).encode()
    return nng


# --- CONNECT ------------------------------------------------------------------------------


def test_connect_carries_what_was_set(opened: Opened) -> None:
    nng, peer = opened()
    nng.connect(
        connect_proto_version=4,
        connect_client_id=b"me",
        connect_keep_alive=300,
        connect_clean_session=False,
        connect_user_name=b"user",
        connect_password=b"word",
        connect_will_topic=b"gone",
        connect_will_msg=[b"a\0b", 3],
        connect_will_qos=1,
        connect_will_retain=True,
    )
    first, body = peer.packet()
    assert first == CONNECT << 4
    assert body == b"\0\4MQTT\4\xec\1\x2c\0\2me\0\4gone\0\3a\0b\0\4user\0\4word"


def test_connect_is_not_always_what_was_set(opened: Opened) -> None:
    nng, peer = opened()
    nng.connect(connect_client_id=b"", connect_keep_alive=0, connect_user_name=b"user", connect_password=b"")
    _, body = peer.packet()
    assert body.startswith(b"\0\4MQTT\4\x82\0\x3c\0\x0fnanomq-")
    assert body.endswith(b"\0\4user")


def test_a_will_without_payload_breaks_connect(opened: Opened) -> None:
    nng, peer = opened()
    nng.connect(connect_will_topic=b"gone", connect_user_name=b"user")
    assert peer._exactly(2)[1] == 12 + 1 + 6 + 6
    nng.send(nng.publish(b"next"))
    assert peer._exactly(19 + 2) == b"\0\4MQTT\4\x86\0\x3c\0\1c\0\4gone" + b"\x30\x07"


def test_connack_reaches_the_ack_callback_and_the_queue(opened: Opened) -> None:
    nng, peer = opened()
    seen: list[tuple[int, int, int]] = []

    def ack(aio: int) -> None:
        message = nng.c.nng_aio_get_msg(aio)
        kind = nng.c.nng_mqtt_msg_get_packet_type(message)
        code = nng.c.nng_mqtt_msg_get_connack_return_code(message)
        seen.append((kind, code, nng.c.nng_mqtt_msg_get_connack_flags(message)))
        nng.c.nng_msg_free(message)

    nng.on_ack(ack)
    nng.connect()
    peer.accept_mqtt(flags=1, code=0)
    message = nng.waited(nng.receive())
    until(lambda: seen, "the ack callback")
    assert seen == [(CONNACK, 0, 1)]
    assert nng.c.nng_mqtt_msg_get_packet_type(message) == CONNACK
    nng.c.nng_msg_free(message)


# --- sending ------------------------------------------------------------------------------


def test_ids_are_counted_in_the_order_of_calls(opened: Opened) -> None:
    nng, peer = connected(opened)
    for message in (nng.publish(b"", 1), nng.publish(b"", 0), nng.publish(b"", 2)):
        assert nng.send(message) == 0
    asked = [nng.aio(), nng.aio()]
    nng.send_aio(asked[0], nng.subscribe((b"a/#", 1), (b"b", 0)))
    nng.send_aio(asked[1], nng.unsubscribe(b"a/#", b"b"))
    nng.send(nng.publish(b"x", 1))
    assert peer.packet() == (PUBLISH << 4 | 2, b"\0\1t\0\1")
    assert peer.packet() == (PUBLISH << 4, b"\0\1t")
    assert peer.packet() == (PUBLISH << 4 | 4, b"\0\1t\0\2")
    assert peer.packet() == (SUBSCRIBE << 4 | 2, b"\0\3\0\3a/#\1\0\1b\0")
    assert peer.packet() == (UNSUBSCRIBE << 4 | 2, b"\0\4\0\3a/#\0\1b")
    assert peer.packet() == (PUBLISH << 4 | 2, b"\0\1t\0\5x")
    assert [nng.c.nng_aio_busy(aio) for aio in asked] == [True, True]
    peer.say(SUBACK << 4, b"\0\3\1\x80")
    peer.say(UNSUBACK << 4, b"\0\4")
    message, count = nng.waited(asked[0]), ctypes.c_uint32()
    codes = nng.c.nng_mqtt_msg_get_suback_return_codes(message, ctypes.byref(count))
    assert ctypes.string_at(codes, count.value) == b"\1\x80"
    nng.c.nng_msg_free(message)
    nng.c.nng_msg_free(nng.waited(asked[1]))


def test_ids_go_from_65535_to_1_also_where_calls_fail(
    closed_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    told(monkeypatch, log=log, retry=50_000)
    nng = Nng()
    assert nng.open(closed_server.port) == 0
    assert {nng.send(nng.message(UNSUBSCRIBE)) for _ in range(65_533)} == {EBUSY}
    assert {nng.send(nng.publish(b"", 1)) for _ in range(3)} == {0}
    assert [packet_id for _, _, packet_id in sends(log)[-4:]] == ["65533", "65534", "65535", "1"]
    assert nng.close() == 0


def test_publishes_without_a_connection_are_sent_later_and_the_rest_is_refused(
    closed_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, server = tmp_path / "log", closed_server
    nng = Nng()
    told(monkeypatch, log=log, retry=50_000)
    assert nng.open(server.port) == 0
    offline = [nng.send(nng.publish(b"%d" % count, 1)) for count in range(258)]
    assert offline == [0] * 256 + [EBUSY] * 2
    assert nng.send(nng.subscribe((b"a", 0))) == EBUSY
    assert sends(log)[-1] == ["send", f"{SUBSCRIBE}", "259"]
    server.listen()
    try:
        peer = server.accept()
        nng.connect()
        peer.accept_mqtt()
        got = [peer.packet() for _ in range(256)]
        assert got == [
            (PUBLISH << 4 | 2, b"\0\1t" + (count + 1).to_bytes(2, "big") + b"%d" % count)
            for count in range(256)
        ]
    finally:
        server.close()
        assert nng.close() == 0


def test_the_oldest_of_a_full_queue_is_lost_and_nothing_says_so(opened: Opened, tmp_path: Path) -> None:
    log = tmp_path / "log"
    nng, peer = connected(opened, log=log)
    large = nng.publish(bytes(32_000_000))
    assert nng.send(large) == 0  # keeps the wire busy until it is read
    assert [nng.send(nng.publish(b"%d" % count)) for count in range(300)] == [0] * 300
    assert len(peer.packet()[1]) > 32_000_000
    assert [peer.packet()[1][3:] for _ in range(256)] == [b"%d" % count for count in range(44, 300)]
    assert nng_stub.counters(log)["dropped"] == 44
    until(lambda: nng.sent == 1 + 1 + 256, "the send callback")  # CONNECT too


def test_a_slow_wire_fills_the_queue(opened: Opened, tmp_path: Path) -> None:
    log = tmp_path / "log"
    nng, _ = connected(opened, log=log, send_delay=50_000)
    assert {nng.send(nng.publish(b"")) for _ in range(2_000)} == {0}
    assert nng_stub.counters(log)["dropped"] > 1_000


def keepalive(nng: Nng) -> None:
    """A minute goes by, which is the keepalive; nothing of ours is on its way."""
    for _ in range(12):
        nng.c.stub_timer(nng.socket)


def test_own_acks_count_as_sends_and_pings_do_not(opened: Opened) -> None:
    nng, peer = connected(opened)
    until(lambda: nng.sent == 1, "the send callback of CONNECT")
    keepalive(nng)
    assert peer.packet() == (PINGREQ << 4, b"")
    peer.say(PUBLISH << 4 | 2, b"\0\1t\0\7x")
    assert peer.packet() == (PUBACK << 4, b"\0\7")
    assert until(lambda: nng.sent >= 2, "the send callback")
    assert nng.sent == 2  # CONNECT, PUBACK


def test_two_unanswered_pings_end_the_connection(opened: Opened) -> None:
    nng, peer = connected(opened)
    until(lambda: nng.sent == 1, "the send callback of CONNECT")
    for _ in range(2):
        keepalive(nng)
        assert peer.packet() == (PINGREQ << 4, b"")
    keepalive(nng)
    with pytest.raises(EOFError):
        peer.packet()


def test_an_answered_ping_keeps_the_connection(opened: Opened) -> None:
    nng, peer = connected(opened)
    until(lambda: nng.sent == 1, "the send callback of CONNECT")
    message = nng.receive()
    for number in range(3):
        keepalive(nng)
        assert peer.packet() == (PINGREQ << 4, b"")
        peer.say(PINGRESP << 4)
        peer.say(PUBLISH << 4, b"\0\1t%d" % number)  # read after it
        nng.c.nng_msg_free(nng.waited(message))
        nng.c.nng_recv_aio(nng.socket, message)


# --- acknowledgements ---------------------------------------------------------------------


class Acks:
    """What the ack callback was told; it returns, or asks for the next, when it may."""

    def __init__(self, nng: Nng, *, ask: bool) -> None:
        self.seen: list[tuple[int, int, int]] = []
        """Result, packet type, packet id; (20, 0, 0) for none."""
        self.go = threading.Event()
        self._nng, self._ask, self._aio = nng, ask, 0
        nng.on_ack(self._called)

    def idle(self) -> None:
        """Waits until the callback has been called and is not running: the next ack calls it."""
        until(lambda: self._aio and not self._nng.c.nng_aio_busy(self._aio), "the ack callback")

    def _called(self, aio: int) -> None:
        self._aio = aio
        c = self._nng.c
        result = c.nng_aio_result(aio)
        if result:
            self.seen.append((result, 0, 0))
            return
        message = c.nng_aio_get_msg(aio)
        kind = c.nng_mqtt_msg_get_packet_type(message)
        self.seen.append((0, kind, c.nng_mqtt_msg_get_puback_packet_id(message) if kind != CONNACK else 0))
        c.nng_msg_free(message)
        c.nng_aio_set_msg(aio, None)
        if kind != CONNACK:
            self.go.wait(PATIENCE)
        if self._ask:
            c.nng_recv_aio(self._nng.socket, aio)


def acked_in_callback(opened: Opened, count: int, *, ask: bool) -> tuple[Acks, Nng, Peer]:
    """The callback was told of the first of `count` acks and does not return; the others have come in."""
    nng, peer = opened()
    acks = Acks(nng, ask=ask)
    nng.connect()
    peer.accept_mqtt()
    nng.c.nng_msg_free(nng.waited(nng.receive()))
    acks.idle()
    assert len(acks.seen) == 1 + ask
    for _ in range(count):
        assert nng.send(nng.publish(b"", 1)) == 0
        assert peer.packet()[0] == PUBLISH << 4 | 2
    peer.ack(1)
    until(lambda: (0, PUBACK, 1) in acks.seen, "the first ack")
    peer.ack(*range(2, count + 1))
    peer.say(PUBLISH << 4, b"\0\1t")  # after them: when this is here, so are they
    nng.c.nng_msg_free(nng.waited(nng.receive()))
    acks.seen.clear()
    return acks, nng, peer


def test_acks_that_come_while_the_callback_runs_must_be_asked_for(opened: Opened) -> None:
    acks, _, _ = acked_in_callback(opened, 4, ask=True)
    acks.go.set()
    until(lambda: len(acks.seen) == 4, "the callback")
    assert acks.seen == [(0, PUBACK, 2), (0, PUBACK, 3), (0, PUBACK, 4), (ECANCELED, 0, 0)]


def test_acks_that_are_not_asked_for_stay_behind(opened: Opened) -> None:
    acks, nng, peer = acked_in_callback(opened, 3, ask=False)
    acks.go.set()
    acks.idle()
    assert acks.seen == []
    nng.send(nng.publish(b"", 1))
    assert peer.packet()[0] == PUBLISH << 4 | 2
    peer.ack(4)
    until(lambda: acks.seen, "the next ack")
    assert acks.seen == [(0, PUBACK, 4)]


def test_no_more_than_256_acks_stay_behind(opened: Opened) -> None:
    acks, _, _ = acked_in_callback(opened, 300, ask=True)
    acks.go.set()
    until(lambda: (ECANCELED, 0, 0) in acks.seen, "the end of the queue")
    assert [packet_id for _, _, packet_id in acks.seen[:-1]] == list(range(2, 258))


def test_qos_2_is_acknowledged_by_pubcomp(opened: Opened) -> None:
    nng, peer = opened()
    acks = Acks(nng, ask=True)
    acks.go.set()
    nng.connect()
    peer.accept_mqtt()
    acks.idle()
    assert nng.send(nng.publish(b"x", 2)) == 0
    assert peer.packet()[0] == PUBLISH << 4 | 4
    peer.ack(1, kind=PUBREC)
    assert peer.packet() == (PUBREL << 4 | 2, b"\0\1")
    peer.ack(1, kind=PUBCOMP)
    until(lambda: (0, PUBCOMP, 1) in acks.seen, "PUBCOMP")
    until(lambda: nng.sent == 3, "the send callback")  # CONNECT, PUBLISH, PUBREL


# --- receiving ----------------------------------------------------------------------------


def test_what_comes_in_completes_aios_in_order_and_is_acked_by_the_library(opened: Opened) -> None:
    nng, peer = opened()
    aios = [nng.receive() for _ in range(5)]
    nng.connect()
    peer.accept_mqtt()
    peer.say(PUBLISH << 4 | 4, b"\0\2t2\0\x09two")  # delivered at PUBREL, after those behind it
    peer.say(PUBLISH << 4 | 1, b"\0\2t0zero")
    peer.say(PUBLISH << 4 | 0xA, b"\0\2t1\0\x08one")
    assert [peer.packet() for _ in range(2)] == [(PUBREC << 4, b"\0\x09"), (PUBACK << 4, b"\0\x08")]
    peer.ack(9, kind=PUBREL)
    assert peer.packet() == (PUBCOMP << 4, b"\0\x09")
    connack, *publishes = (nng.waited(aio) for aio in aios[:4])
    assert nng.c.nng_mqtt_msg_get_packet_type(connack) == CONNACK
    assert [nng.text(message) for message in publishes] == [
        (b"t0", b"zero"),
        (b"t1", b"one"),
        (b"t2", b"two"),
    ]
    assert [nng.c.nng_mqtt_msg_get_publish_qos(message) for message in publishes] == [0, 1, 2]
    assert [nng.c.nng_mqtt_msg_get_publish_dup(message) & 1 for message in publishes] == [0, 1, 0]
    assert nng.c.nng_aio_busy(aios[4])


def test_what_nobody_waits_for_is_dropped_oldest_first(
    opened: Opened, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    nng, peer = connected(opened, log=log)
    for count in range(300):
        peer.say(PUBLISH << 4, b"\0\1t%d" % count)
    until(lambda: nng_stub.counters(log)["received_dropped"] == 44, "the queue to overflow")
    assert nng.text(nng.waited(nng.receive())) == (b"t", b"44")
    assert capfd.readouterr().err.count("Warning! msg lost due to busy socket") == 44


# --- the end of a connection --------------------------------------------------------------


def test_the_end_of_a_connection(opened: Opened, server: Server) -> None:
    nng, peer = connected(opened)
    events: list[str] = []
    nng.on_disconnect(lambda: events.append("disconnected"))
    receiving = [nng.receive() for _ in range(3)]
    twice = nng.aio(lambda _: events.append("publish"))
    nng.send_aio(twice, nng.publish(b"kept by nobody", 1))
    assert nng.error(twice) == 0
    asked = nng.aio()
    nng.send_aio(asked, nng.subscribe((b"a", 0)))
    peer.packet(), peer.packet()
    peer.close()
    assert nng.error(receiving[0]) == ECONNSHUT
    assert [nng.error(aio) for aio in receiving[1:]] == [ECLOSED] * 2
    assert nng.error(asked) == ECLOSED
    until(lambda: len(events) == 3, "the callbacks")
    assert sorted(events) == ["disconnected", "publish", "publish"]
    assert nng.error(twice) == ECLOSED
    again = server.accept()  # CONNECT comes again by itself; what was not acknowledged does not
    again.accept_mqtt()
    nng.send(nng.publish(b"next", 1))
    assert again.packet() == (PUBLISH << 4 | 2, b"\0\1t\0\3next")


def test_a_cancelled_receive_still_takes_a_message(opened: Opened) -> None:
    nng, peer = connected(opened)
    aio = nng.receive()
    nng.c.nng_aio_cancel(aio)
    assert nng.error(aio) == 0
    assert nng.c.nng_aio_get_msg(aio) is None
    peer.say(PUBLISH << 4, b"\0\1tx")
    assert until(lambda: nng.c.nng_aio_get_msg(aio), "the message")


def test_after_close_there_is_no_socket(server: Server) -> None:
    nng = Nng()
    assert nng.open(server.port) == 0
    server.accept()
    until(lambda: nng.probe() == EPROTO, "the handshake")
    waiting = nng.receive()
    assert nng.close() == 0
    assert nng.error(waiting) == ECLOSED
    assert nng.error(nng.receive()) == ECLOSED
    assert nng.close() == ECLOSED


# --- faults -------------------------------------------------------------------------------


def test_lost_acks(opened: Opened, tmp_path: Path) -> None:
    log = tmp_path / "log"
    nng, peer = opened(lose_ack=3, log=log)
    acks = Acks(nng, ask=True)
    acks.go.set()
    nng.connect()
    peer.accept_mqtt()

    def told_or_lost() -> int:
        return nng_stub.counters(log)["ack_lost"] + sum(kind == PUBACK for _, kind, _ in acks.seen)

    for packet_id in range(1, 8):
        nng.send(nng.publish(b"", 1))
        peer.packet()
        acks.idle()
        peer.ack(packet_id)
        until(lambda: told_or_lost() == packet_id, "the ack")  # noqa: B023
    assert [packet_id for result, _, packet_id in acks.seen if not result] == [0, 1, 2, 4, 5, 7]
    assert [line for line in nng_stub.events(log) if "lost" in line] == ["ack_lost 3", "ack_lost 6"]


def test_all_acks_lost_from_one_on(opened: Opened, tmp_path: Path) -> None:
    log = tmp_path / "log"
    nng, peer = opened(lose_all_acks_after=0, log=log)
    acks = Acks(nng, ask=True)
    nng.connect()
    peer.accept_mqtt()
    acks.idle()
    peer.ack(1, 2)
    until(lambda: nng_stub.counters(log)["ack_lost"] == 2, "the acks")
    assert [kind for _, kind, _ in acks.seen if kind] == [CONNACK]


@pytest.mark.parametrize(("fault", "code"), [("no_connack", 0), ("lose_refusal", 5)])
def test_a_lost_connack(opened: Opened, fault: str, code: int) -> None:
    nng, peer = opened(**{fault: True})
    nng.connect()
    peer.accept_mqtt(code=code)
    peer.say(PUBLISH << 4, b"\0\1tx")
    assert nng.text(nng.waited(nng.receive())) == (b"t", b"x")


def test_a_connection_that_drops(opened: Opened, server: Server) -> None:
    nng, peer = connected(opened, drop_after=2)
    first = nng.receive()
    for _ in range(3):
        nng.send(nng.publish(b"", 1))
    assert [peer.packet()[0] for _ in range(2)] == [PUBLISH << 4 | 2] * 2
    with pytest.raises((EOFError, ConnectionError)):
        while True:
            peer.packet()
    assert nng.error(first) == ECONNSHUT
    server.accept()
    until(lambda: nng.probe() == EPROTO, "the next handshake")


def test_faults_of_the_first_socket_only(opened: Opened, tmp_path: Path) -> None:
    nng, peer = opened(no_connack=True, once=tmp_path / "once", log=tmp_path / "first")
    nng.connect()
    peer.accept_mqtt()
    second, other = connected(opened, no_connack=True, once=tmp_path / "once")
    assert second.send(second.publish(b"", 0)) == 0
    assert other.packet()[0] == PUBLISH << 4
    nothing = nng.receive()
    assert nng.c.nng_aio_busy(nothing)


def test_a_handshake_that_never_completes(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    told(monkeypatch, no_handshake=True, log=log, retry=50_000)
    nng = Nng()
    nng.conf.qconnect_timeout = 0
    assert nng.open(server.port) == 0
    until(lambda: nng_stub.counters(log)["failed"], "an attempt")
    assert nng.probe() == EBUSY
    assert nng.close() == 0


_PRELUDE = """
import sys, threading
from nng_ctypes import *
nng = Nng()
print("opening", flush=True)
assert nng.open(int(sys.argv[1])) == 0
until(lambda: nng.probe() == EPROTO)
nng.connect()
until(lambda: nng.sent)
"""


def dying(server: Server, code: str, **faults: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(code), str(server.port)],
        env={
            **os.environ,
            **nng_stub.environment(**faults),
            "PYTHONPATH": str(Path(nng_ctypes.__file__).parent),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


PUBLISH_FOR_EVER = "while True: assert nng.send(nng.publish(b'', 1)) == 0"


@pytest.mark.parametrize(
    ("faults", "code", "closes", "words"),
    [
        ({"abort_after": 3}, PUBLISH_FOR_EVER, False, "pthread_mutex_lock: Invalid argument"),
        ({"abort_on_close": True}, "nng.close()", False, "pthread_mutex_lock: Invalid argument"),
        (
            {"abort_on_loss": True},
            "nng.send(nng.publish(b'', 1))\nthreading.Event().wait()",
            True,
            "pthread_mutex_lock: Invalid argument",
        ),
        (
            {},
            "nng.on_disconnect(lambda: nng.probe())\nnng.send(nng.publish(b'', 0))\nthreading.Event().wait()",
            True,
            "pthread_mutex_lock: Resource deadlock avoided",
        ),
        ({}, "nng.c.nng_aio_free(nng.receive())", False, "still holds this aio"),
    ],
    ids=[
        "after publishes",
        "in close",
        "at a loss",
        "called from its own callback",
        "an aio freed too early",
    ],
)
def test_it_aborts(server: Server, faults: dict[str, object], code: str, closes: bool, words: str) -> None:
    with dying(server, code, **faults) as process:
        peer = server.accept()
        assert peer.packet()[0] == CONNECT << 4
        if closes:
            peer.packet()
            peer.close()
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGABRT
    assert words in said
    assert said.splitlines()[-1].startswith("Report this at")


def test_sending_hangs(server: Server) -> None:
    code = """
    for count in range(3):
        print(count, flush=True)
        nng.send(nng.publish(b"", 1))
    print("never")
    """
    with dying(server, code, hang_after=2) as process:
        peer = server.accept()
        assert [peer.packet()[0] >> 4 for _ in range(3)] == [CONNECT, PUBLISH, PUBLISH]
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(4)] == ["opening\n", "0\n", "1\n", "2\n"]
        assert hangs(process) == ""


def test_closing_hangs(server: Server) -> None:
    with dying(
        server, "print('closing', flush=True); nng.close(); print('never')", hang_on_close=True
    ) as process:
        server.accept()
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["opening\n", "closing\n"]
        assert hangs(process) == ""


def test_opening_hangs(server: Server) -> None:
    with dying(server, "", hang_on_open=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opening\n"
        assert hangs(process) == ""
    with socket.create_connection(("127.0.0.1", server.port)) as mine:
        assert server.accept().socket.getpeername() == mine.getsockname()  # nobody came before


def hangs(process: subprocess.Popen[str]) -> str:
    """What a process that does not end printed last; it is killed."""
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.3)
    process.kill()
    return process.communicate(timeout=PATIENCE)[0]
