"""The binding alone: what it calls is declared, and it counts packet identifiers as the library does."""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
import sys

import nng_stub

from tesaiot_connect_quic_nng import abi, nanosdk


def used(of: str) -> set[str]:
    return set(re.findall(rf"\b_?{of}\.(nng_\w+)", inspect.getsource(nanosdk)))


def test_every_function_that_is_called_is_declared_and_looked_for() -> None:
    assert used("blocking") == set(abi.BLOCKING)
    assert used("short") == set(abi.SHORT)
    assert set(nanosdk.SYMBOLS) == {"nng_version", *abi.BLOCKING, *abi.SHORT}
    assert len(set(nanosdk.SYMBOLS)) == len(nanosdk.SYMBOLS)


def test_structures_have_the_size_of_their_declarations() -> None:
    """As C lays them out where a pointer has 8 bytes."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    assert ctypes.sizeof(abi.Tls) == 8 + 8 * 8 + 8
    assert ctypes.sizeof(abi.Quic) == 80 + 8 + 2 * 8 + 2 * 4 + 8
    assert (ctypes.sizeof(abi.Topic), ctypes.sizeof(abi.TopicQos)) == (16, 24)


def test_what_takes_a_lock_releases_the_gil() -> None:
    """Whoever holds that lock may wait for Python."""
    assert {"nng_send_aio", "nng_recv_aio", "nng_sendmsg", "nng_aio_wait", "nng_close"} <= set(abi.BLOCKING)


PROGRAM = """
import sys
from tesaiot_connect import Message
from tesaiot_connect.mqtt import Subscription
from tesaiot_connect_quic_nng import library, nanosdk

loaded = library.load("nanosdk", *sys.argv[1:], nanosdk.SYMBOLS)
sdk = nanosdk.NanoSdk(loaded)
assert sdk.publish([Message("t", b""), Message("t", b"", 1), Message("t", b"", 2)]) == [0, 1, 2]
sdk.subscribe(7, [Subscription("t")])
sdk.unsubscribe(8, ["t"])
assert sdk.publish([Message("t", b"", 1)]) == [5]
ids = sdk.publish([Message("t", b"", 1)] * 65_540)
assert ids[65_529:65_532] == [65_535, 1, 2], ids[65_529:65_532]
assert 0 not in ids
print("as the library counts")
"""


def test_packet_identifiers() -> None:
    library, msquic = nng_stub.libraries()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), str(msquic)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "as the library counts\n", done.stderr
