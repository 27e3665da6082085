"""The stand-ins for libnng and libmsquic that tests of `quic_nng` load, built from C in this repository.

`plugins/quic_nng/tests/stub/nanosdk.c` says at its top what it imitates and which faults it can have.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from compiled import ROOT, compiled, unavailable

_SOURCES = ROOT / "plugins" / "quic_nng" / "tests" / "stub"
_FLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC")


def built(source: str, *flags: str, name: str = "") -> Path:
    """`stub/<source>.c` as a shared library; `name` where `flags` make it another one. Skips without gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        unavailable("no C compiler (packages gcc, libc6-dev)")
    return compiled(
        f"stub_{name or source}",
        [_SOURCES / f"{source}.c"],
        lambda output: [compiler, *_FLAGS, *flags, "-o", str(output), f"{source}.c"],
    )


def libraries() -> tuple[Path, Path]:
    """NanoSDK's libnng, and the libmsquic that must be loaded (RTLD_GLOBAL) before it."""
    return built("nanosdk"), built("msquic")


def plain() -> Path:
    """A libnng that is NNG alone: neither MQTT nor QUIC."""
    return built("plain")


def without(symbol: str) -> Path:
    """NanoSDK's libnng, but `symbol` is missing from it."""
    return built("nanosdk", f"-D{symbol}=not_{symbol}", name=f"nanosdk_without_{symbol}")


def installed(folder: Path, *, msquic: bool = True) -> Path:
    """`libnng.so` in `folder`, as an installation has it, and `libmsquic.so` beside it where `msquic`."""
    library, quic = libraries()
    shutil.copy(library, folder / "libnng.so")
    if msquic:
        shutil.copy(quic, folder / "libmsquic.so")
    return folder / "libnng.so"


def environment(**faults: object) -> dict[str, str]:
    """`environment(lose_ack=7)` is {"TESAIOT_STUB_LOSE_ACK": "7"}. True is "1"; False, None are left out."""
    return {
        f"TESAIOT_STUB_{name.upper()}": "1" if value is True else str(value)
        for name, value in faults.items()
        if value is not None and value is not False
    }


def events(log: Path) -> Sequence[str]:
    """What the library wrote to TESAIOT_STUB_LOG, a line an event; whole lines only."""
    if not log.exists():
        return ()
    text = log.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def counters(log: Path) -> Counter[str]:
    """How often each kind of event (its first word) is in the log: `counters(log)["publish"]`."""
    return Counter(line.split(" ", 1)[0] for line in events(log))
