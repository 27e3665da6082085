"""What our code needs of aioquic that aioquic does not promise: one test for each piece.

A failure here means that the installed aioquic differs from the one that quic.py was written for. The name
says where to look in `quic.py`; read what became of it in aioquic, adapt, then raise the version bounds.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from aioquic import tls
from aioquic.quic import connection as module
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection as AioquicConnection
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet_builder import QuicPacketBuilder

from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_aioquic import quic as ours
from tesaiot_connect_quic_aioquic.certificates import ServerIdentity
from tesaiot_connect_quic_aioquic.pacer import Pacer

_ANY = object()

# owner, name: what quic.py assumes of it. A tuple is the parameters of a method; a type, the type of a value.
PRIVATE: dict[tuple[str, str], Any] = {
    ("connection", "_close_at"): (float, type(None)),
    ("connection", "_close_event"): _ANY,
    ("connection", "_configuration"): QuicConfiguration,
    ("connection", "_crypto_buffers"): dict,
    ("connection", "_cryptos"): dict,
    ("connection", "_events"): _ANY,
    ("connection", "_get_or_create_stream_for_send"): ("stream_id",),
    ("connection", "_handshake_complete"): bool,
    ("connection", "_handshake_confirmed"): bool,
    ("connection", "_host_cids"): list,
    ("connection", "_idle_timeout"): (),
    ("connection", "_initialize"): ("peer_cid",),
    ("connection", "_is_client"): bool,
    ("connection", "_local_max_data"): module.Limit,
    ("connection", "_local_max_stream_data_bidi_local"): int,
    ("connection", "_local_max_stream_data_bidi_remote"): int,
    ("connection", "_local_max_stream_data_uni"): int,
    ("connection", "_local_max_streams_bidi"): module.Limit,
    ("connection", "_local_max_streams_uni"): module.Limit,
    ("connection", "_loss"): _ANY,
    ("connection", "_max_datagram_size"): int,
    ("connection", "_network_paths"): list,
    ("connection", "_on_connection_limit_delivery"): ("delivery", "limit"),
    ("connection", "_on_max_stream_data_delivery"): ("delivery", "stream"),
    ("connection", "_packet_number"): int,
    ("connection", "_parse_transport_parameters"): ("data", "from_session_ticket"),
    ("connection", "_payload_received"): ("context", "plain", "crypto_frame_required"),
    ("connection", "_peer_cid"): module.QuicConnectionId,
    ("connection", "_peer_cid_available"): list,
    ("connection", "_quic_logger"): type(None),
    ("connection", "_remote_ack_delay_exponent"): int,
    ("connection", "_remote_max_data"): int,
    ("connection", "_remote_max_data_used"): int,
    ("connection", "_remote_max_idle_timeout"): float,
    ("connection", "_remote_max_stream_data_bidi_remote"): int,
    ("connection", "_remote_max_streams_bidi"): int,
    ("connection", "_replenish_connection_ids"): (),
    ("connection", "_send_probe"): (),
    ("connection", "_set_state"): ("state",),
    ("connection", "_spaces"): dict,
    ("connection", "_state"): module.QuicConnectionState,
    ("connection", "_streams"): dict,
    ("connection", "_streams_queue"): list,
    ("connection", "_update_traffic_key"): ("direction", "epoch", "cipher_suite", "secret"),
    ("connection", "_version"): int,
    ("connection", "_write_connection_close_frame"): (
        "builder",
        "epoch",
        "error_code",
        "frame_type",
        "reason_phrase",
    ),
    ("connection", "_write_connection_limits"): ("builder", "space"),
    ("connection", "_write_stream_limits"): ("builder", "space", "stream"),
    ("loss", "_on_packets_lost"): ("congestion_event", "now", "packets", "persistent_congestion", "space"),
    ("loss", "_pacer"): _ANY,
    ("loss", "_pto_count"): int,
    ("loss", "_rtt_initialized"): bool,
    ("loss", "_rtt_latest"): float,
    ("loss", "_rtt_min"): float,
    ("loss", "_rtt_smoothed"): float,
    ("receiver", "_buffer"): bytearray,
    ("receiver", "_buffer_start"): int,
    ("sender", "_buffer"): bytearray,
    ("sender", "_buffer_fin"): (int, type(None)),
    ("sender", "_buffer_start"): int,
    ("sender", "_buffer_stop"): int,
    ("sender", "_pending"): _ANY,
    ("tls", "_max_early_data"): (int, type(None)),
    ("tls", "_peer_certificate"): _ANY,
}

# not private by name, and as little promised
UNDOCUMENTED: dict[str, tuple[str, ...]] = {
    "connection": ("tls", "host_cid"),
    "loss": ("spaces", "bytes_in_flight", "congestion_window", "get_probe_timeout"),
    "space": ("ack_eliciting_in_flight", "largest_acked_packet", "sent_packets"),
    "stream": (
        "is_blocked",
        "is_finished",
        "max_stream_data_local",
        "max_stream_data_local_sent",
        "max_stream_data_remote",
        "receiver",
        "sender",
        "stream_id",
    ),
    "sender": ("buffer_is_empty", "is_finished", "next_offset", "reset"),
    "receiver": ("highest_offset", "is_finished", "stop"),
    "limit": ("frame_type", "sent", "used", "value"),
    "tls": ("alpn_negotiated", "early_data_accepted", "session_resumed"),
    "path": ("addr",),
    "id": ("cid", "stateless_reset_token"),
    "keys": ("send", "recv"),
}


def say(owner: str, name: str, what: str) -> str:
    import aioquic

    return (
        f"aioquic {aioquic.__version__}: {owner}.{name} {what}. quic.py uses it: look for it there, and for "
        "what became of it in aioquic"
    )


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A stock aioquic client in mid-connection, and its parts."""
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    server_configuration = QuicConfiguration(is_client=False, alpn_protocols=["mqtt"])
    ServerIdentity(certificates.server()).apply(server_configuration)
    client = AioquicConnection(
        configuration=QuicConfiguration(
            is_client=True,
            alpn_protocols=["mqtt"],
            server_name="localhost",
            cafile=str(certificates.ca_file),
        )
    )
    server = AioquicConnection(
        configuration=server_configuration,
        original_destination_connection_id=client.original_destination_connection_id,
    )
    client.connect(("server", 1), 0.0)
    for turn in range(6):
        for data, _ in client.datagrams_to_send(turn * 0.1):
            server.receive_datagram(data, ("client", 2), turn * 0.1 + 0.02)
        for data, _ in server.datagrams_to_send(turn * 0.1 + 0.03):
            client.receive_datagram(data, ("server", 1), turn * 0.1 + 0.05)
        if turn == 2:
            client.send_stream_data(0, b"hello")
    assert client._handshake_complete
    stream = client._streams[0]
    return {
        "connection": client,
        "loss": client._loss,
        "space": client._loss.spaces[2],
        "stream": stream,
        "sender": stream.sender,
        "receiver": stream.receiver,
        "limit": client._local_max_data,
        "tls": client.tls,
        "path": client._network_paths[0],
        "id": client._host_cids[0],
        "keys": client._cryptos[tls.Epoch.ONE_RTT],
    }


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids="-".join)
def test_private(owner: str, name: str, owners: dict[str, Any]) -> None:
    assert hasattr(owners[owner], name), say(owner, name, "is gone")
    value, expected = getattr(owners[owner], name), PRIVATE[owner, name]
    if expected is _ANY:
        return
    names = isinstance(expected, tuple) and all(isinstance(one, str) for one in expected)
    if names:
        found = tuple(inspect.signature(value).parameters)
        assert found == expected, say(owner, name, f"takes {found} now, and not {expected}")
    else:
        assert isinstance(value, expected), say(owner, name, f"is {type(value)} now, and not {expected}")


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in UNDOCUMENTED.items() for name in names], ids=str
)
def test_undocumented(owner: str, name: str, owners: dict[str, Any]) -> None:
    assert hasattr(owners[owner], name), say(owner, name, "is gone")


def test_overrides_override() -> None:
    """A method of ours that aioquic no longer calls would be dead without a word."""
    mine = {name for name, value in vars(ours.Quic).items() if callable(value) and name.startswith("_")}
    source = inspect.getsource(module)
    for name in mine & set(vars(AioquicConnection)) - {"__init__", "_initialize"}:
        if name.startswith("__"):
            continue
        assert re.search(rf"self\.{name}\b", source), say("connection", name, "is not called")


def test_the_callers_that_overrides_rely_on() -> None:
    write = inspect.getsource(AioquicConnection._write_application)
    for call in ("_write_connection_limits", "_write_stream_limits"):
        assert call in write, say("connection", "_write_application", f"does not call {call}")
    # limits are enforced with these values, not with what was sent
    assert "_local_max_data.value" in inspect.getsource(AioquicConnection._handle_stream_frame)
    assert "max_streams.value" in inspect.getsource(AioquicConnection._get_or_create_stream)
    # and a stream that ended makes room by raising one
    assert ".value += 1" in write
    # early data is accepted before the client is told
    hello = inspect.getsource(tls.Context._server_handle_hello)
    accepted, told = (
        hello.index("early_data_accepted = True"),
        hello.index("early_data=self.early_data_accepted"),
    )
    assert accepted < hello.index("update_traffic_key_cb") < told


def test_the_pacer(owners: dict[str, Any]) -> None:
    """Ours takes the place of aioquic's: it must have all that aioquic calls."""
    source = inspect.getsource(module) + inspect.getsource(inspect.getmodule(type(owners["loss"])))  # type: ignore[arg-type]
    called = {name for name in dir(owners["loss"]._pacer) if f"_pacer.{name}(" in source}
    assert called <= set(dir(Pacer)), say("loss", "_pacer", f"is asked for {sorted(called)}")
    assert called >= {"next_send_time", "update_after_send", "update_rate"}
    for name in called:
        ours_takes = list(inspect.signature(getattr(Pacer, name)).parameters)[1:]
        assert ours_takes == list(inspect.signature(getattr(owners["loss"]._pacer, name)).parameters)


def test_refusals_are_made_by_hand() -> None:
    """listener.py writes one packet itself."""
    assert {"host_cid", "peer_cid", "version", "is_client", "max_datagram_size"} <= set(
        inspect.signature(QuicPacketBuilder).parameters
    )
    assert [*inspect.signature(CryptoPair.setup_initial).parameters][1:] == ["cid", "is_client", "version"]


def test_no_reach_is_untested() -> None:
    """Each `._name` in quic.py that is not of our own class is in the tables above."""
    tree = ast.parse(Path(ours.__file__).read_text("utf-8"))
    own = set(vars(ours.Quic)) - set(vars(AioquicConnection))
    stock = {name for owner, name in PRIVATE if owner == "connection"}
    assigned: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            (assigned if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    known = {name for _, name in PRIVATE}
    of_aioquic = {name for name in (used | assigned) if name in known or hasattr(AioquicConnection, name)}
    mine = own | {name for name in assigned if name not in known}
    missing = (used | of_aioquic) - known - mine
    assert not missing, f"quic.py reaches for {sorted(missing)}: add a line for each to PRIVATE"
    assert stock <= used | assigned | set(vars(ours.Quic)), "PRIVATE lists what quic.py does not use any more"


def test_only_quic_reaches() -> None:
    """The rule of the plugin: private parts of aioquic are touched in one module."""
    names = {name for _, name in PRIVATE}
    folder = Path(ours.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "quic.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in names:
                mine = isinstance(node.value, ast.Name) and node.value.id == "self"
                trace = (path.name, ast.unparse(node)) == (
                    "qlog.py",
                    "trace._events",
                )  # test_qlog_of_both_sides
                assert mine or trace, f"{path.name}:{node.lineno} reaches for {node.attr}: do it in quic.py"
