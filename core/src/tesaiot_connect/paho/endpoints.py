"""What paho was told about the connection, as transports of ours.

Owns: URLs, and which of paho's settings go to which field of a transport. Rule: a setting that the
chosen transport has no field for is an error, not a wish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import attrs

from ..config.endpoints import ALIASES
from ..errors import PluginError
from ..plugins import Catalog, load
from ..protocols import Secret, Transport, Url
from ..tls import TlsOptions

DEFAULT_PORT = 1883
"""paho's default, which cannot be told from a port that was left out."""
DEFAULT_PATH = "/mqtt"
"""Likewise, for WebSocket."""
_PROXIES = {1: ("socks4", "socks4a"), 2: ("socks5", "socks5h"), 3: ("http", "http")}
"""PySocks' proxy types; for each: names are resolved here, by the proxy."""


@attrs.frozen(kw_only=True)
class Settings:
    """paho's settings that a transport may want."""

    port: int
    timeout: float
    """Seconds for each endpoint."""
    tls: TlsOptions | None
    """None where paho was told nothing of TLS."""
    path: str
    headers: Mapping[str, str] | Callable[[dict[str, str]], Mapping[str, str]] | None
    proxy: Mapping[str, Any]
    bind_address: str
    bind_port: int


def is_url(host: object) -> bool:
    """Several are URLs in any case. paho takes bytes for a host, and says so of nothing at all."""
    if isinstance(host, bytes | bytearray) or not host:
        return False
    return "://" in host if isinstance(host, str) else True


def endpoints(urls: Sequence[str], settings: Settings) -> list[Transport]:
    """Raises ValueError: what is wrong, and what to do."""
    if settings.bind_port:
        raise ValueError("with a URL the local port cannot be chosen: leave `bind_port` out")
    catalog = load()
    return [_endpoint(url, settings, catalog) for url in urls]


def _endpoint(text: str, settings: Settings, catalog: Catalog) -> Transport:
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise ValueError("a URL must not hold credentials: use username_pw_set")
    url = Url.parse(text)
    url = attrs.evolve(url, scheme=ALIASES.get(url.scheme, url.scheme))
    if not url.port and settings.port != DEFAULT_PORT:
        url = attrs.evolve(url, port=settings.port)
    websocket = url.scheme in ("ws", "wss")
    if websocket and not url.path.strip("/") and settings.path != DEFAULT_PATH:
        url = attrs.evolve(url, path=settings.path)
    try:
        recipe = catalog.transports(url.scheme)[0].recipe
    except PluginError as error:
        raise ValueError(str(error)) from error
    known = attrs.fields_dict(recipe)
    wanted: dict[str, Any] = {}
    if settings.tls is not None:
        wanted["tls"] = settings.tls
    if websocket and settings.headers is not None:
        wanted["headers"] = _headers(url, settings.headers)
    if settings.proxy:
        wanted["proxy"] = _proxy(settings.proxy)
    if settings.bind_address:
        wanted["local_address"] = settings.bind_address
    for name in wanted.keys() - known:
        raise ValueError(f"{_SET_BY[name]} was called, and {url.scheme}:// cannot do that")
    if "connect_timeout" in known:
        wanted["connect_timeout"] = settings.timeout
    made: Transport = recipe(url=url, **wanted)
    if settings.tls is not None and not getattr(made, "secure", True):
        raise ValueError(f"tls_set was called, and {url.scheme}:// is not encrypted: {_ENCRYPTED}")
    return made


_ENCRYPTED = "use mqtts://, wss:// or quic://"
_SET_BY = {
    "tls": "tls_set",
    "headers": "ws_set_options",
    "proxy": "proxy_set",
    "local_address": "bind_address",
}


def _headers(
    url: Url, given: Mapping[str, str] | Callable[[dict[str, str]], Mapping[str, str]]
) -> dict[str, Secret]:
    """A function gets the headers that paho would send, and what it changes or adds counts."""
    if not callable(given):
        return {name: Secret(value) for name, value in given.items()}
    host = f"{url.host}:{url.port}" if url.port else url.host
    sent = {
        "Host": host,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Origin": f"https://{host}",
        "Sec-Websocket-Version": "13",
        "Sec-Websocket-Protocol": "mqtt",
    }
    return {name: Secret(value) for name, value in given(dict(sent)).items() if sent.get(name) != value}


def _proxy(given: Mapping[str, Any]) -> Secret:
    scheme = _PROXIES[given["proxy_type"]][given.get("proxy_rdns", True) is not False]
    user, password = given.get("proxy_username"), given.get("proxy_password")
    login = quote(user, safe="") if user else ""
    login += f":{quote(password, safe='')}" if user and password else ""
    port = given.get("proxy_port") or (8080 if scheme == "http" else 1080)
    return Secret(f"{scheme}://{login}{'@' if login else ''}{given['proxy_addr']}:{port}")
