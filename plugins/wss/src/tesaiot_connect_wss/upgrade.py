"""The opening handshake (RFC 6455 section 4), both sides, without I/O.

Owns: the upgrade request, what a listener demands of one, and what is said where it fails. Rule: bounded:
a head of more than 16 KiB and an answer of more than 64 KiB are refused; no redirect is followed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol as Contract
from urllib.parse import quote

import attrs
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage, InvalidStatus, NegotiationError
from websockets.headers import parse_subprotocol
from websockets.http11 import Request, Response
from websockets.protocol import OPEN, Protocol
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import DELIMS, WebSocketURI

from tesaiot_connect import ConnectFailed, ConnectorError, Url

from .words import refused

log = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.library")
_quiet.setLevel(logging.WARNING)  # its debug output shows headers, and so secrets

_HEAD = 16 * 1024
_ANSWER = 64 * 1024
_END = b"\r\n\r\n"
SUBPROTOCOLS = ("mqtt", "mqttv3.1")


class Opening(Contract):
    """One side's handshake."""

    @property
    def library(self) -> Protocol: ...
    def hello(self) -> bytes:
        """What to send first."""
        ...

    def feed(self, data: bytes) -> bytes | None:
        """None while more is needed; then what came behind the handshake. Raises ConnectorError."""
        ...

    def eof(self) -> None:
        """The peer sends no more. May raise the ConnectorError that says why."""
        ...

    def reply(self) -> bytes:
        """What to write now."""
        ...


class ClientOpening:
    """`place` is the endpoint, for messages; `url` has its port."""

    def __init__(self, place: str, url: Url, headers: Mapping[str, str], limit: int) -> None:
        path, _, query = url.path.partition("?")
        safe = DELIMS + "%"
        host = url.host if url.host.isascii() else url.host.encode("idna").decode()
        uri = WebSocketURI(url.scheme == "wss", host, url.port, quote(path, safe), quote(query, safe))
        offered = [Subprotocol("mqtt")]
        self.library = ClientProtocol(uri, subprotocols=offered, max_size=limit, logger=_quiet)
        self._place = place
        self._headers = headers
        self._head: bytes | None = b""
        self._size = 0

    def hello(self) -> bytes:
        request = self.library.connect()
        for name, value in self._headers.items():
            request.headers[name] = value
        self.library.send_request(request)
        return self.reply()

    def feed(self, data: bytes) -> bytes | None:
        if self._head is None:  # the body of a refusal
            self._size += len(data)
            if self._size > _ANSWER:
                raise ConnectFailed(
                    f"{self._place}: the answer to the upgrade has no end",
                    fix=_NOT_WEBSOCKET,
                    stage="upgrade",
                )
            self.library.receive_data(data)
            self._judge()
            return None
        self._head += data
        begin = self._head[:5]
        if begin != b"HTTP/"[: len(begin)]:
            raise ConnectFailed(
                f"{self._place}: the port answers, but not with HTTP", fix=_NOT_WEBSOCKET, stage="upgrade"
            )
        head, end, rest = self._head.partition(_END)
        if not end:
            if len(self._head) > _HEAD:
                raise ConnectFailed(
                    f"{self._place}: the answer's HTTP head is too large", fix=_NOT_WEBSOCKET, stage="upgrade"
                )
            return None
        self._head = None
        if head.startswith(b"HTTP/1.0 ") and not head.startswith(b"HTTP/1.0 101"):
            head = b"HTTP/1.1" + head[8:]  # a refusal is worth reading in an old version too
        self.library.receive_data(head + end)
        if self.library.state is OPEN:
            self._judge()
            return rest
        if rest:
            self.library.receive_data(rest)
        self._judge()
        return None

    def eof(self) -> None:
        if self._head is None:  # the body ends with the connection
            self.library.receive_eof()
            self._judge()

    def _judge(self) -> None:
        """Raises ConnectFailed where the library has given up."""
        self.library.events_received()
        error = self.library.handshake_exc
        if error is None:
            if self.library.state is OPEN and self.library.subprotocol is None:
                log.warning("%s did not choose the subprotocol mqtt, as MQTT demands; going on", self._place)
            return
        if isinstance(error, InvalidStatus):
            told = error.response
            location = told.headers.get("Location", "")
            raise refused(
                self._place, told.status_code, told.reason_phrase, location, bytes(told.body)
            ) from error
        if isinstance(error, NegotiationError):
            what, fix = f"the server speaks another subprotocol than mqtt: {error}", _NOT_WEBSOCKET
        elif isinstance(error, InvalidMessage):
            what, fix = f"the answer is no valid HTTP: {error.__cause__ or error}", _NOT_WEBSOCKET
        else:
            what = f"the upgrade to WebSocket failed: {error}"
            fix = "a proxy in between may not pass the Upgrade header on, or answer from a cache"
        raise ConnectFailed(f"{self._place}: {what}", fix=fix, stage="upgrade") from error

    def reply(self) -> bytes:
        return b"".join(self.library.data_to_send())


_NOT_WEBSOCKET = "check port and path: the endpoint must be the broker's WebSocket listener"


@attrs.frozen
class Rules:
    """What a listener demands of an upgrade."""

    path: str
    origins: Sequence[str]
    limit: int


class ServerOpening:
    """Answers one client, and remembers its request."""

    def __init__(self, rules: Rules) -> None:
        self.library = ServerProtocol(
            subprotocols=[Subprotocol(one) for one in SUBPROTOCOLS], max_size=rules.limit, logger=_quiet
        )
        self._rules = rules
        self._head = b""
        self._refusal = b""
        self.headers: Headers = Headers()

    def hello(self) -> bytes:
        return b""

    def feed(self, data: bytes) -> bytes | None:
        self._head += data
        first, _, _ = self._head[:32].partition(b" ")
        if not first.isalpha() or not first.isupper():
            self._reject(400, "This port speaks HTTP with WebSocket: connect with a ws:// or wss:// URL.")
        head, end, rest = self._head.partition(_END)
        if len(head) > _HEAD:
            self._reject(431, "The request's head is larger than 16 KiB.")
        if not end:
            return None
        if first != b"GET":
            self._reject(405, "Only GET is served here, to upgrade to WebSocket.", Allow="GET")
        self.library.receive_data(head + end)
        if (error := self.library.handshake_exc) is not None:
            self._reject(400, f"The request is no valid HTTP: {error.__cause__ or error}.")
        (request,) = self.library.events_received()
        assert isinstance(request, Request)
        self._check(request)
        self.headers = request.headers
        return rest

    def _check(self, request: Request) -> None:
        rules = self._rules
        if request.path.partition("?")[0] != rules.path:
            self._reject(404, f"There is nothing here: MQTT over WebSocket is served at {rules.path}.")
        upgrades = request.headers.get_all("Upgrade")
        if not any("websocket" in value.lower() for value in upgrades):
            self._reject(
                426,
                "MQTT over WebSocket is served here: connect with an MQTT client, not with a browser. "
                "If you did, a proxy in between does not pass on the headers Upgrade and Connection.",
                Upgrade="websocket",
            )
        origin = next(iter(request.headers.get_all("Origin")), None)
        if rules.origins and origin is not None and origin not in rules.origins:
            self._reject(403, "Web pages of this origin are not admitted; see `origins` of the listener.")
        response = self.library.accept(request)
        if response.status_code == 101:
            self.library.send_response(response)
            return
        if isinstance(self.library.handshake_exc, NegotiationError):
            offered = request.headers.get_all("Sec-WebSocket-Protocol")
            said = f"not {_listed(offered)}" if offered else "and the client offers none"
            self._reject(400, f"The subprotocol here is mqtt, {said}.")
        self.library.send_response(response)
        raise ConnectorError(f"the upgrade was refused: {self.library.handshake_exc}")

    def _reject(self, status: int, text: str, **headers: str) -> None:
        """Answers, and raises ConnectorError."""
        response: Response = self.library.reject(status, f"{text}\n")
        for name, value in headers.items():
            response.headers[name] = value
        self._refusal = response.serialize()
        raise ConnectorError(f"the upgrade was refused with {status}: {text}")

    def eof(self) -> None:
        """There is nothing to say to it."""

    def reply(self) -> bytes:
        return self._refusal or b"".join(self.library.data_to_send())


def _listed(values: Sequence[str]) -> str:
    try:
        return ", ".join(one for value in values for one in parse_subprotocol(value))
    except Exception:  # noqa: BLE001 - whatever a stranger sends
        return "what was sent"
