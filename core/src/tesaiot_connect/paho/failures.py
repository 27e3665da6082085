"""Our errors as the OSErrors that users of paho catch.

Owns: the choice of the class. Rule: the text is ours, what happened and what to do, in paho's names.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator

from ..errors import ConnectorError, Refused

_PAHO_SAYS = {
    "`ca_file` of the tls table": "`ca_certs` of tls_set",
    ", or set `server_name` in the tls table": "",
    ", or `server_name` in the tls table": "",
    " and `server_name` in the tls table": "",
}


def as_os_error(error: ConnectorError) -> OSError:
    """ConnectionRefusedError, TimeoutError, ssl.SSLCertVerificationError and so on, where the cause
    tells; else ConnectionError."""
    text = str(error)
    for ours, theirs in _PAHO_SAYS.items():
        text = text.replace(ours, theirs)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            told = ssl.SSLCertVerificationError(cause.errno, text)
            told.verify_code, told.verify_message = cause.verify_code, cause.verify_message
            return told
        if isinstance(cause, ssl.SSLError):
            return ssl.SSLError(cause.errno, text)
        if isinstance(cause, socket.gaierror):
            return socket.gaierror(cause.errno, text)
        if isinstance(cause, TimeoutError):
            return TimeoutError(errno.ETIMEDOUT, text)
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, text)
    if isinstance(error, Refused):
        return ConnectionRefusedError(errno.ECONNREFUSED, text)
    return ConnectionError(text)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, nearest first. They may form a ring: an error that was raised
    from the group of all attempts is often one of them."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting.extend(one.exceptions)
        if one.__cause__ is not None:
            waiting.append(one.__cause__)
