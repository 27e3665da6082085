"""What the end of a QUIC connection means, in words.

Owns: the words for close codes (RFC 9000 section 20, RFC 9001 section 4.8) and for silence. Rule: each
has a cause and, where something can be done, a fix, in the words of the options that a person can set.
What the other side wrote is shown as its words, shortened and without control characters.
"""

from __future__ import annotations

import re

from tesaiot_connect import Disconnected, PathLost

IDLE_TIMEOUT = "Idle timeout"
NO_COMMON_VERSION = "Could not find a common protocol version"
"""Reasons of closes that no frame announces; the last two are aioquic's words."""

_SHOWN = 200  # characters of another side's words
_UDP_HEADERS = 28  # bytes of IPv4 and UDP

_Told = tuple[str, str]

_MISSING = (
    "check the address and port, that the broker speaks QUIC there, and that no firewall on the way "
    "blocks UDP; where UDP cannot pass, use mqtts://"
)
_GOES_ON = "the session goes on over the next endpoint, if there is one"
_SILENT = (
    "check the network path; if it works otherwise, UDP is blocked on it now, or the broker stands still"
)
_IMPLEMENTATION = "a fault of one of the two implementations: keep its log and a qlog, and report it"
_CLIENT_CERTIFICATE = (
    "the broker wants a client certificate, and connections over QUIC show none",
    "use mqtts:// with a client certificate, or an authentication that needs none",
)
_OTHER_NAMES = re.compile(r"hostname .* doesn't match .*", re.DOTALL)  # aioquic's words
_NAMES = re.compile(r"pattern=(?:b|IPv[46]Address\()'([^']*)'")

# --- transport (RFC 9000 section 20.1)

_TRANSPORT: dict[int, _Told] = {
    0x00: ("the connection was closed without an error", ""),
    0x01: ("an internal error", "see the log of the side that closed"),
    0x02: (
        "the connection was refused",
        "the server is at its limit of connections or shutting down: try later, or raise its limits",
    ),
    0x03: ("more data was sent than flow control allows (FLOW_CONTROL_ERROR)", _IMPLEMENTATION),
    0x04: (
        "more streams were opened than allowed (STREAM_LIMIT_ERROR)",
        "use fewer streams, or raise the server's limit",
    ),
    0x05: ("a frame came for a stream in the wrong state (STREAM_STATE_ERROR)", _IMPLEMENTATION),
    0x06: ("the final size of a stream changed (FINAL_SIZE_ERROR)", _IMPLEMENTATION),
    0x07: ("a frame was malformed (FRAME_ENCODING_ERROR)", _IMPLEMENTATION),
    0x08: ("the transport parameters were rejected (TRANSPORT_PARAMETER_ERROR)", _IMPLEMENTATION),
    0x09: ("too many connection ids (CONNECTION_ID_LIMIT_ERROR)", _IMPLEMENTATION),
    0x0A: ("QUIC's rules were broken (PROTOCOL_VIOLATION)", _IMPLEMENTATION),
    0x0B: (
        "the token that proves the client's address was rejected (INVALID_TOKEN)",
        "connect again; if it stays, a NAT on the way changes the client's address between two packets",
    ),
    0x0C: (
        "the application ended the connection before the handshake was complete",
        "see the log of the side that closed: it says why",
    ),
    0x0D: (
        "the TLS handshake was too large to buffer (CRYPTO_BUFFER_EXCEEDED)",
        "send a shorter certificate chain",
    ),
    0x0E: ("a key update went wrong (KEY_UPDATE_ERROR)", _IMPLEMENTATION),
    0x0F: ("the keys have protected as many packets as they may (AEAD_LIMIT_REACHED)", "connect again"),
    0x10: (
        "no network path works any more (NO_VIABLE_PATH)",
        "check the network: the address changed, and packets from the new one did not get through",
    ),
    0x11: (
        "the QUIC version was changed on the way (VERSION_NEGOTIATION_ERROR)",
        "a device between the two sides interferes with QUIC: use another network, or mqtts://",
    ),
}

# --- TLS: (when the peer sent the alert, when we did)

_BROKEN_TLS = "the TLS handshake was damaged or is not understood ({})"
_TAMPERED = "a device on the way may have changed it, or one of the two implementations is at fault"
_NO_COMMON = ("the two sides share no cipher, key exchange or signature method", "allow a common one on both")
_NO_ALPN = (
    "the two sides share no application protocol (ALPN)",
    'check that the port is the one for MQTT over QUIC; if so, set `alpn` to its name (usually "mqtt")',
)
_NOT_TLS_1_3 = ("the two sides share no TLS version", "QUIC needs TLS 1.3 on both")

_BY_PEER: dict[int, _Told] = {
    40: (
        "the peer broke off the TLS handshake",
        "it may require a client certificate (use mqtts:// then), or share no cipher with us",
    ),
    42: (
        "the peer rejects our certificate or misses one",
        "use one of an authority that the client trusts; for a broker that wants one of a client, use mqtts://",
    ),
    43: (
        "the peer cannot use our kind of certificate",
        "use an RSA or P-256 certificate on the listener",
    ),
    44: ("the peer says that our certificate is revoked", "renew it"),
    45: ("the peer says that our certificate has expired", "renew it, or check the clocks of both machines"),
    46: ("the peer does not accept our certificate", "the peer must trust the authority that issued it"),
    48: (
        "the peer does not trust our certificate",
        "the peer's CA file must hold the authority that issued it",
    ),
    49: ("the peer denies access", "check which clients it admits"),
    112: (
        "the server does not know the name it was asked for",
        "check the endpoint's host, or `server_name` in the tls table",
    ),
    116: _CLIENT_CERTIFICATE,
}
_BY_US: dict[int, _Told] = {
    40: _NO_COMMON,
    42: ("the server's certificate was rejected", "check the certificate chain that the server sends"),
    43: (
        "the server's certificate has a key of a kind that is not supported",
        "the server needs an RSA, P-256, P-384 or Ed25519 key",
    ),
    45: (
        "the server's certificate has expired",
        "renew it on the server; if it is valid, this machine's clock is wrong",
    ),
    112: (
        "a client asked for a name that is not served here",
        "check the client's host or `server_name`",
    ),
}
_EITHER: dict[int, _Told] = {
    0: ("TLS was closed", ""),
    10: (_BROKEN_TLS.format("unexpected message"), _TAMPERED),
    20: (_BROKEN_TLS.format("bad record"), _TAMPERED),
    22: (_BROKEN_TLS.format("record too long"), _TAMPERED),
    47: (_BROKEN_TLS.format("illegal parameter"), _TAMPERED),
    50: (_BROKEN_TLS.format("undecodable message"), _TAMPERED),
    51: (
        "the TLS signatures or secrets do not fit together",
        "check that the server's key belongs to its certificate; " + _TAMPERED,
    ),
    70: _NOT_TLS_1_3,
    71: ("the TLS settings are too weak for the stricter side", "use stronger keys and ciphers"),
    80: ("an internal error in TLS", "see the log of the side that closed"),
    86: _NOT_TLS_1_3,
    90: ("the TLS handshake was canceled", "see the log of the side that closed"),
    109: (
        _BROKEN_TLS.format("missing extension"),
        "the other side may not be meant for QUIC: check the port",
    ),
    110: (_BROKEN_TLS.format("unsupported extension"), _TAMPERED),
    113: ("the certificate's revocation status (OCSP) was rejected", "check the server's OCSP stapling"),
    115: ("the session to be resumed is not known", "connect again: it is a full handshake then"),
    120: _NO_ALPN,
}

_VERIFICATION: tuple[tuple[str, str, str], ...] = (
    (
        "not valid yet",
        "the server's certificate is not valid yet",
        "this machine's clock is probably wrong: set it",
    ),
    (
        "subjectaltname",
        "the server's certificate has no names (no subjectAltName)",
        "issue one that names the host; a common name alone does not count",
    ),
    (
        "extensions could not be parsed",
        "the server's name cannot be verified: it is no host name, or the certificate is broken",
        "check the endpoint's host and `server_name` in the tls table",
    ),
    (
        "expired",
        "a certificate in the server's chain has expired",
        "renew it on the server; if it is valid, this machine's clock is wrong",
    ),
)
_UNTRUSTED = (
    "unable to get local issuer certificate",
    "unable to get issuer certificate",
    "unable to verify the first certificate",
    "self-signed certificate",
    "self signed certificate",
)

# --- MQTT over QUIC closes with the reason codes of MQTT 5 (section 2.4)

_REASONS = (
    "unspecified error",
    "malformed packet",
    "protocol error",
    "implementation specific error",
    "unsupported protocol version",
    "client identifier not valid",
    "bad user name or password",
    "not authorized",
    "server unavailable",
    "server busy",
    "banned",
    "server shutting down",
    "bad authentication method",
    "keep alive timeout",
    "session taken over",
    "topic filter invalid",
    "topic name invalid",
    "packet identifier in use",
    "packet identifier not found",
    "receive maximum exceeded",
    "topic alias invalid",
    "packet too large",
    "message rate too high",
    "quota exceeded",
    "administrative action",
    "payload format invalid",
    "retain not supported",
    "qos not supported",
    "use another server",
    "server moved",
    "shared subscriptions not supported",
    "connection rate exceeded",
    "maximum connect time",
    "subscription identifiers not supported",
    "wildcard subscriptions not supported",
)
_FIRST_REASON = 0x80


def explain_close(
    code: int, *, frame_type: int | None, reason: str, by_peer: bool, handshake_done: bool
) -> tuple[str, str]:
    """What happened and what to do, of aioquic's ConnectionTerminated; the endpoint's name goes before.

    `frame_type` is None for a close of the application (frame 0x1d), else the close is QUIC's own
    (0x1c). `by_peer`: it came from the other side. A close that no frame announced has one of the
    reasons named above.
    """
    if frame_type is None:
        return _application(code, _clean(reason), by_peer)
    if reason == IDLE_TIMEOUT and not by_peer:
        if handshake_done:
            return (
                "nothing came from the peer for as long as the idle timeout",
                f"{_GOES_ON}; check the network path; if a NAT forgets idle connections, lower `keepalive`",
            )
        return "the handshake got no answer", _MISSING
    if reason == NO_COMMON_VERSION and not by_peer:
        return (
            "the two sides share no QUIC version",
            "the server must speak QUIC version 1 (RFC 9000) or 2; an old draft is not enough: update it",
        )
    if 0x100 <= code <= 0x1FF:
        return _tls(code - 0x100, reason, by_peer)
    what, fix = _TRANSPORT.get(code, (f"QUIC closed with the unknown code 0x{code:x}", ""))
    if code == 0 and not handshake_done:
        what, fix = "the connection was closed before its handshake was complete", _log(by_peer)
    return _attributed(what, _clean(reason), by_peer), fix


def forgotten() -> Disconnected:
    """A stateless reset came (RFC 9000 section 10.3), or what may be one whose key was lost."""
    return Disconnected(
        "the broker does not know this connection any more (stateless reset): it was restarted, or another "
        "machine answers at its address now",
        fix="connect again",
    )


def explain_refused(place: str) -> Disconnected:
    """ICMP refusals end an established connection. Not the path's fault: its far end says so."""
    return Disconnected(
        f"nothing listens any more at {place} (ICMP port unreachable)",
        fix="the broker was stopped, or restarted on another port, or a firewall rejects UDP now; "
        "the session goes on over the next endpoint that answers",
    )


def explain_lost_path(seconds: float, narrow: _Told | None, obstacle: str) -> PathLost:
    """Nothing was answered for so many seconds. `narrow` is what `explain_narrow` says of it, `obstacle` what
    the system says of the path, "" for nothing."""
    cause, fix = narrow or (f"the system says: {obstacle}" if obstacle else "", _SILENT)
    told = f"the broker has not answered for {seconds:.0f} s"
    return PathLost(f"{told}: {cause}" if cause else told, fix=f"{_GOES_ON}; {fix}")


def explain_silence(
    *,
    sent: int,
    received: int,
    path_mtu: int | None,
    too_big: int,
    refused: bool,
    timeout: float,
    datagram_size: int,
) -> tuple[str, str]:
    """Why no handshake came about within `timeout` seconds, from what the socket saw.

    `sent` and `received` count datagrams, `too_big` those the system would not send for their size;
    `path_mtu` is what the system knows of the path, in bytes; `refused`: an ICMP "port unreachable"
    came back; `datagram_size` is our largest datagram, without headers.
    """
    if refused:
        return (
            "nothing listens on that UDP port (ICMP port unreachable)",
            "check the port (TCP ports do not count), and that the broker's QUIC listener is on",
        )
    narrow = explain_narrow(path_mtu=path_mtu, too_big=too_big, datagram_size=datagram_size)
    if narrow is not None:
        return narrow
    if not sent:
        return (
            "no datagram could be sent",
            "check this machine's network, routes and firewall (outgoing UDP)",
        )
    if not received:
        return (
            f"nothing came back to {_count(sent)} within {timeout:g} s",
            _MISSING,
        )
    return (
        f"something came back ({_count(received)}), but the handshake did not finish within {timeout:g} s",
        "the path loses packets or only large ones, or the server is overloaded: see its log, try again",
    )


def explain_narrow(*, path_mtu: int | None, too_big: int, datagram_size: int) -> tuple[str, str] | None:
    """The same where the path is too narrow for QUIC, at any time; None where it is not."""
    needed = datagram_size + _UDP_HEADERS
    if not too_big and (path_mtu is None or path_mtu >= needed):
        return None
    known = "less" if path_mtu is None or path_mtu >= needed else f"{path_mtu}"
    return (
        f"QUIC needs a path for packets of {needed} bytes, and this one takes {known}",
        "raise the MTU of the link or tunnel on the way (1280 suits QUIC's least), or use mqtts://",
    )


def _application(code: int, reason: str, by_peer: bool) -> _Told:
    if code == 0:
        return _attributed("the connection was closed in good order", reason, by_peer), ""
    if _FIRST_REASON <= code < _FIRST_REASON + len(_REASONS):
        words = f"{_REASONS[code - _FIRST_REASON]} (0x{code:02X})"
    else:
        words = f"application code 0x{code:X}"
    what = f"the {'peer' if by_peer else 'application'} closed the connection: {words}"
    if reason.lower() in what.lower():
        reason = ""
    return _attributed(what, reason, by_peer), _log(by_peer)


def _tls(alert: int, reason: str, by_peer: bool) -> _Told:
    if alert in (42, 45) and not by_peer:
        told = _verification(reason)
        if told is not None:
            return told
    table = _BY_PEER if by_peer else _BY_US
    what, fix = table.get(alert) or _EITHER.get(alert) or (f"TLS failed with alert {alert}", _log(by_peer))
    reason = _OTHER_NAMES.sub("the certificate is for other names", _clean(reason))
    if alert == 120:  # its text says the same
        reason = ""
    return _attributed(what, reason, by_peer), fix


def _verification(reason: str) -> _Told | None:
    """Our own verification of a server: the texts are aioquic's and OpenSSL's."""
    lowered = reason.lower()
    if "doesn't match" in lowered:
        names = [_clean(name) for name in _NAMES.findall(reason)]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return (
            "the server's certificate is for another name" + (f" ({shown})" if shown else ""),
            "use a name it has as the endpoint's host, or set `server_name` in the tls table",
        )
    if any(text in lowered for text in _UNTRUSTED):
        return (
            f"the server's certificate is not from a trusted authority ({_clean(reason)})",
            "put the CA that issued it into `ca_file` of the tls table",
        )
    for text, what, fix in _VERIFICATION:
        if text in lowered:
            return what, fix
    return None


def _attributed(what: str, reason: str, by_peer: bool) -> str:
    if not reason:
        return what
    return f'{what}; the peer says: "{reason}"' if by_peer else f"{what}: {reason}"


def _log(by_peer: bool) -> str:
    return "see the log of the other side" if by_peer else "see the log above"


def _count(datagrams: int) -> str:
    return "one datagram" if datagrams == 1 else f"{datagrams} datagrams"


def _clean(text: str) -> str:
    """Fit for a log and a terminal, whoever wrote it."""
    shown = "".join(c if c.isprintable() else " " for c in text[: _SHOWN + 1]).strip().replace('"', "'")
    return shown if len(text) <= _SHOWN else shown[:_SHOWN] + "…"
