"""Finding libnng and libmsquic, loading them, and telling which libnng it is.

Owns: the order of places, and the words for what is not there. Rule: it runs in a worker process only: a
library that is broken may end the process that loads it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from .control import Failed

NNG = "TESAIOT_NNG_LIBRARY"
MSQUIC = "TESAIOT_MSQUIC_LIBRARY"

Backend = Literal["nanosdk", "nanonng"]

_NAMES = {"nanosdk": "NanoSDK", "nanonng": "NanoNNG"}
_OTHERWISE = 'or take via = "quic_aioquic" (pip install tesaiot-connect-quic-aioquic)'
_SAY_WHERE = (
    "install the library, and name the file with `library` beside the endpoint's url, or in the environment "
    f"with {NNG} (libmsquic: {MSQUIC}); {_OTHERWISE}"
)


class Library(NamedTuple):
    """A loaded libnng. `blocking` releases the GIL in calls, `short` does not: that is only for functions
    that take no lock under which the library may wait for Python."""

    path: str
    version: str
    blocking: ctypes.CDLL
    short: ctypes.PyDLL


def load(backend: Backend, library: str, msquic: str, symbols: Iterable[str]) -> Library | Failed:
    """The libnng of `backend`, with all of `symbols`, or what was tried and what is missing.

    `library` and `msquic` are paths, "" where no option names one.
    """
    place, origin = _libnng(library)
    wanted = _NAMES[backend]
    if not place:
        what = f"no {wanted}: `library` and {NNG} are not set, and the system knows no libnng"
        return _absent(what, _SAY_WHERE)
    quic, tried = _libmsquic(msquic, place)
    if quic is None and tried:
        return _absent(f"no msquic: {tried}", f"correct `msquic` or {MSQUIC}")
    try:
        # Now, not at the first call: what is missing is to be said, not to kill.
        blocking = ctypes.CDLL(place, mode=os.RTLD_NOW)
    except OSError as error:
        what = f"{wanted} cannot be loaded from {place} ({origin}): {_reason(error, place)}"
        if "undefined symbol: MsQuic" in str(error):
            what += "; " + ("no libmsquic beside it or in the system" if quic is None else f"loaded {quic}")
            return _absent(what, f"name libmsquic with `msquic` or in the environment with {MSQUIC}")
        return _absent(what, f"correct `library` or {NNG}, or see to what it needs; {_OTHERWISE}")
    found = f"{place} ({origin})"
    kind = _kind(blocking)
    if kind != backend:
        other = {"": "no NNG", "nng": "plain NNG, without MQTT over QUIC"}.get(kind, _NAMES.get(kind, ""))
        if kind in _NAMES:
            return _absent(
                f"{found} is {other}, not {wanted}",
                f'set backend = "{kind}", or name {wanted} with `library` or {NNG}',
            )
        return _absent(f"{found} is {other}", _SAY_WHERE)
    missing = [symbol for symbol in symbols if not hasattr(blocking, symbol)]
    if missing:
        what = f"{found} lacks {', '.join(missing[:3])}" + (" and others" if len(missing) > 3 else "")
        return _absent(what, f"it is another version of {wanted}: install a newer one, or name it with {NNG}")
    version = blocking.nng_version
    version.argtypes, version.restype = (), ctypes.c_char_p
    said = version() or b""
    return Library(place, said.decode(errors="replace"), blocking, ctypes.PyDLL(place))


def _libnng(option: str) -> tuple[str, str]:
    """Path or name, and where that comes from. The first that is named counts, whether or not it is there."""
    if option:
        return option, "from `library`"
    if named := os.environ.get(NNG, ""):
        return named, f"from {NNG}"
    return ctypes.util.find_library("nng") or "", "the system's"


def _libmsquic(option: str, libnng: str) -> tuple[str | None, str]:
    """Loads libmsquic for all that is loaded after it: libnng is often not linked to it. What was loaded, and
    why nothing was though it was named."""
    named = option or os.environ.get(MSQUIC, "")
    places = [named] if named else [*_beside(libnng), ctypes.util.find_library("msquic") or ""]
    why = ""
    for place in filter(None, places):
        try:
            ctypes.CDLL(place, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
        except OSError as error:
            origin = "from `msquic`" if option else f"from {MSQUIC}"
            why = f"{place} ({origin}): {_reason(error, place)}" if named else ""
        else:
            return place, ""
    return None, why


def _beside(libnng: str) -> list[str]:
    if os.sep not in libnng:
        return []
    folder = Path(libnng).absolute().parent
    found = {*folder.glob("libmsquic.so*"), *folder.glob("libmsquic*.dylib")}
    return [str(path) for path in sorted(found, key=lambda path: (len(path.name), path.name))]


def _kind(library: ctypes.CDLL) -> str:
    """A backend, "nng" or "". NanoSDK alone opens QUIC clients with a configuration, and NanoNNG alone has
    QUIC streams."""
    if hasattr(library, "nng_mqtt_quic_client_open_conf"):
        return "nanosdk"
    if not (hasattr(library, "nng_stream_dialer_alloc") and hasattr(library, "nng_version")):
        return ""
    allocate = library.nng_stream_dialer_alloc
    allocate.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p)
    allocate.restype = ctypes.c_int
    dialer = ctypes.c_void_p()
    if allocate(ctypes.byref(dialer), b"mqtt-quic://127.0.0.1:1"):
        return "nng"
    free = library.nng_stream_dialer_free
    free.argtypes, free.restype = (ctypes.c_void_p,), None
    free(dialer)
    return "nanonng"


def _reason(error: OSError, place: str) -> str:
    """The linker's words, which often name the file first."""
    return str(error).removeprefix(f"{place}: ")


def _absent(what: str, fix: str) -> Failed:
    return Failed(what=what, fix=fix, unsupported=True)
