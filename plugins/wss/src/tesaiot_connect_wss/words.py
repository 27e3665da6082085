"""What the other side's answers mean, and what to do about them.

Owns: the words for HTTP refusals of the upgrade, for close codes, and for proxies. Rule: each names the
cause as far as it can be known, and a next step.
"""

from __future__ import annotations

from tesaiot_connect import ConnectFailed, Disconnected

ORDERLY = {1000, 1005}
"""Close codes of an orderly end; 1005 stands for a close frame without a code (RFC 6455 section 7.1.5)."""

_CODES = {
    1001: ("it is going away", "try again: it was stopped or restarted"),
    1002: ("it says that the WebSocket protocol was broken", "see its log; a device in between may do this"),
    1003: ("it does not accept this kind of data", "check that the port and path are those of MQTT"),
    1007: ("it says that the data was inconsistent", "see its log"),
    1008: ("it refuses by its policy", "check credentials and rights, and see its log"),
    1009: ("a message was too big for it", "publish smaller payloads, or raise its limit on messages"),
    1010: ("it wanted an extension", "this client offers none: allow plain frames on the server"),
    1011: ("it failed", "see its log"),
    1012: ("it restarts", "try again"),
    1013: ("it is overloaded", "try again later"),
    1014: ("a gateway got no valid answer from behind it", "check the server behind the proxy"),
}


def closed(code: int, reason: str) -> Disconnected:
    """The peer closed with a code that is no orderly end."""
    said, fix = _CODES.get(code, ("", "see the log of the peer"))
    what = f"the peer closed the WebSocket connection with code {code}"
    what += f": {said}" if said else ""
    return Disconnected(what + (f" ({reason!r})" if reason else ""), fix=fix)


CUT = "the connection ended without a WebSocket close frame (1006)"
LOST_FIX = "the session goes on over the next endpoint, if there is one; check the network path to the peer"
CUT_FIX = "the peer, a proxy or the network broke off: see their logs; proxies cut idle connections"

_REFUSALS = {
    400: ("the server finds the request bad", "check path and subprotocol: it must speak MQTT there"),
    401: ("the server wants to know who asks", "set the header it wants (Authorization) in `headers`"),
    403: ("the server refuses", "check `headers` (token, Origin) and what this address may do"),
    404: ("there is nothing at this path", "check the path: most brokers use /mqtt, some / or /ws"),
    405: ("there is no WebSocket at this path", "check the path: most brokers use /mqtt, some / or /ws"),
    407: ("a proxy wants to know who asks", 'set proxy = "http://user:password@host:port"'),
    426: ("the server wants another protocol", "see that nothing in between drops the Upgrade header"),
    429: ("the server was asked too often", "wait; connect less often"),
    500: ("the server failed", "see its log"),
    502: ("a proxy reached no broker behind it", "check that the broker runs and the proxy's address of it"),
    503: ("the server is not available", "try again later, or see its log"),
    504: ("a proxy got no answer from the broker behind it", "check that the broker runs"),
}  # fmt: skip


def refused(place: str, status: int, phrase: str, location: str, body: bytes) -> ConnectFailed:
    """The server answered the upgrade with something else than 101."""
    if status == 200:
        what = "it answers like a web page (200)"
        said, fix = f"{what}: this is not a WebSocket endpoint", "check port and path: most brokers use /mqtt"
    elif 300 <= status < 400:
        where = f" to {location.partition('?')[0]}" if location else ""
        said = f"it redirects{where} ({status}), which is not followed"
        fix = (
            "use that URL as the endpoint, with ws:// or wss://"
            if location
            else "ask its operator for the URL"
        )
    else:
        said, fix = _REFUSALS.get(status, ("it refuses the upgrade", "see the log of the server"))
        said = f"{said} ({status}{f' {phrase}' if phrase else ''})"
    line = " ".join(bytes(body[:300]).decode(errors="replace").split())[:120].rstrip(".")
    if line and "<" not in line:
        said += f"; it says: {line}"
    return ConnectFailed(f"{place}: {said}", fix=fix, stage="upgrade")


def proxy_refused(place: str, proxy: str, status: int, phrase: str) -> ConnectFailed:
    """An HTTP proxy answered CONNECT with something else than 2xx."""
    said, fix = {
        407: ("it wants a user name and password", 'set proxy = "http://user:password@host:port"'),
        403: ("it forbids this host or port", "ask its operator, or use a port it allows (443)"),
        405: ("it does not know CONNECT", "it is no proxy for TLS: check its address and port"),
        502: (
            "it does not reach the host",
            "check host and port; the proxy must be able to resolve the name",
        ),
        503: (
            "it does not reach the host",
            "check host and port; the proxy must be able to resolve the name",
        ),
        504: ("the host does not answer it", "check host and port, and the firewall behind the proxy"),
    }.get(status, ("it refuses", "check its address and port, and its log"))
    answer = f"{status} {phrase}".strip()
    return ConnectFailed(
        f"{place}: the proxy {proxy} does not connect: {said} ({answer})", fix=fix, stage="upgrade"
    )
