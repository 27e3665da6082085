"""The client: paho's, with its socket replaced where the host is a URL.

Owns: the places where paho makes, opens and closes its socket, and what was said to `tls_set`.
Rule: it inherits, because code that exists asks for paho's very class; it overrides what both
paho 1.6 and 2.x have, and decides nothing that paho decides.
"""

from __future__ import annotations

import inspect
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import paho.mqtt.client as paho

from ..errors import ConnectorError
from ..negotiation import Negotiator
from .bridge import Bridge
from .endpoints import Settings, endpoints, is_url
from .failures import as_os_error
from .trust import Trust


class Client(paho.Client):
    """`paho.mqtt.client.Client`, whose host may be a URL, or several to be tried in order.

    The URL's scheme chooses the transport, and with it TLS: `tls_set` says whom to trust and who we
    are, and is not needed where the authorities of the operating system will do. The port is the
    URL's; without one the `port` argument if it is not 1883; else the scheme's. `connect_timeout`
    bounds each URL. A connection that cannot be made raises OSError (of a fitting sort) from
    `connect`, and is tried again by the loops, as paho does; the reason goes to paho's log too.
    """

    _bridge: Bridge | None = None
    _dialer: Negotiator | None = None
    """Of the latest connection: it knows the paths that were lost."""
    _told: Trust | None = None
    _hidden: tuple[bool, Any] | None = None
    """What paho was told of TLS and WebSocket, while it is not to do them itself."""

    def connect(self, host: str | Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """As paho's. Raises ValueError for a URL or settings that cannot be used, OSError."""
        return super().connect(host, *args, **kwargs)  # type: ignore[arg-type]

    def connect_async(
        self,
        host: str | Sequence[str],
        port: int = 1883,
        keepalive: int = 60,
        bind_address: str = "",
        bind_port: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As paho's. Raises ValueError for a URL or settings that cannot be used."""
        if is_url(host):
            host = host if isinstance(host, str) else tuple(host)
            self._endpoints(host, port, bind_address, bind_port)
        super().connect_async(host, port, keepalive, bind_address, bind_port, *args, **kwargs)  # type: ignore[arg-type]

    def reconnect(self) -> Any:
        """As paho's. Raises ValueError, OSError."""
        if not is_url(self._host):
            return super().reconnect()
        try:
            return super().reconnect()
        finally:
            hidden, self._hidden = self._hidden, None
            if hidden is not None:
                self._ssl, self._transport = hidden

    def tls_set(self, *args: Any, **kwargs: Any) -> None:
        """As paho's."""
        super().tls_set(*args, **kwargs)
        given = inspect.signature(paho.Client.tls_set).bind(self, *args, **kwargs).arguments
        assert self._ssl_context is not None
        self._told = Trust(self._ssl_context, given)

    def tls_set_context(self, context: ssl.SSLContext | None = None) -> None:
        """As paho's. With a URL the authorities in the context are trusted, and its verification and
        minimum version are kept; a client certificate in it cannot be seen: name it with `tls_set`."""
        super().tls_set_context(context)
        assert self._ssl_context is not None
        self._told = Trust(self._ssl_context, None)

    def _create_socket_connection(self) -> socket.socket:
        if not is_url(self._host):
            made: socket.socket = super()._create_socket_connection()
            return made
        transports = self._endpoints(self._host, self._port, self._bind_address, self._bind_port)
        # a transport says more about what took too long than the dialer can, so it comes first
        timeout = self._connect_timeout + 1.0
        known = self._dialer
        if known is None or (known.endpoints, known.timeout) != (tuple(transports), timeout):
            self._dialer = known = Negotiator(transports, timeout=timeout)
        trust = self._trust()
        bridge = Bridge(known, trust.identity() if trust else None, self._keepalive)
        try:
            sock = bridge.open()
        except ConnectorError as error:
            self._easy_log(paho.MQTT_LOG_ERR, "%s", error)
            raise as_os_error(error) from error
        self._bridge = bridge
        self._hidden = self._ssl, self._transport
        self._ssl, self._transport = False, "tcp"  # they are our transport's work
        return sock

    def _sock_close(self) -> None:
        super()._sock_close()
        bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.leave()

    def _endpoints(
        self, host: str | Sequence[str], port: int, bind_address: str, bind_port: int
    ) -> Sequence[Any]:
        trust = self._trust()
        settings = Settings(
            port=port,
            timeout=self._connect_timeout,
            tls=trust.options() if trust else None,
            path=self._websocket_path,
            headers=self._websocket_extra_headers,
            proxy=self._proxy,
            bind_address=bind_address,
            bind_port=bind_port,
        )
        return endpoints([host] if isinstance(host, str) else host, settings)

    def _trust(self) -> Trust | None:
        """None where no TLS was set, or `reinitialise` forgot it."""
        told = self._told
        return told if told is not None and told.context is self._ssl_context else None
