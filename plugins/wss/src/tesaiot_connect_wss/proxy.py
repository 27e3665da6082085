"""A way out through a proxy: which one, and the tunnel through it.

Owns: HTTP CONNECT, SOCKS through the library `python-socks`, and the environment's variables. Rule: what
comes out is a connected socket on which the server itself answers; a proxy's password is never shown.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import urllib.request
from urllib.parse import SplitResult, unquote, urlsplit

from tesaiot_connect import ConnectFailed, tcp

from .words import proxy_refused

_PORTS = {"http": 80, "socks4": 1080, "socks4a": 1080, "socks5": 1080, "socks5h": 1080}
_HEAD = 16 * 1024
_FIX = 'write proxy = "http://host:port", "socks5://host:port" or "none"'


def from_environment(scheme: str, host: str, port: int) -> str | None:
    """WSS_PROXY, HTTPS_PROXY and ALL_PROXY for wss://, WS_PROXY, HTTP_PROXY and ALL_PROXY for ws://, and the
    system's settings on macOS and Windows. None for loopback and for what NO_PROXY lists."""
    if _is_loopback(host) or urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    found = urllib.request.getproxies()
    for kind in (scheme, "https" if scheme == "wss" else "http", "socks", "all"):
        if proxy := found.get(kind):
            if kind == "socks" and proxy.startswith("http://"):  # as macOS tells it
                proxy = "socks5h://" + proxy.removeprefix("http://")
            return proxy if "://" in proxy else f"http://{proxy}"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.")


def parse(text: str) -> SplitResult:
    """Raises ConnectFailed, without the credentials in it."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ConnectFailed("the proxy is not a URL", fix=_FIX) from None
    if parts.scheme == "https":
        raise ConnectFailed(
            "a proxy that is itself reached over TLS (https://) is not supported", fix="use its http:// port"
        )
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConnectFailed(f"the proxy is no http:// or socks URL with a host: {parts.scheme}://", fix=_FIX)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    credentials, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{credentials}{at}{host}:{port or _PORTS[parts.scheme]}")


def shown(proxy: SplitResult) -> str:
    """Without credentials."""
    return f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}"


async def tunnel(recipe: tcp.TcpRecipe, progress: tcp.Progress, proxy: SplitResult) -> socket.socket:
    """A socket that reaches the recipe's host and port. Raises ConnectFailed."""
    place, name = tcp.place(recipe), shown(proxy)
    assert proxy.hostname is not None
    assert proxy.port is not None
    if proxy.scheme != "http":
        return await _socks(recipe, progress, proxy)
    sock = await tcp.dial(recipe, progress, proxy.hostname, proxy.port, f"the proxy {name} of {place}")
    progress.stage = tcp.Stage(
        f"the proxy {name} does not answer CONNECT",
        "check that its port is that of an HTTP proxy",
        "upgrade",
    )
    try:
        await _connect(sock, place, proxy, recipe.url.host, recipe.port)
    except OSError as error:
        sock.close()
        raise ConnectFailed(
            f"{place}: the proxy {name} broke off: {error.strerror or error}",
            fix="see the proxy's log",
            stage="upgrade",
        ) from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect(sock: socket.socket, place: str, proxy: SplitResult, host: str, port: int) -> None:
    """RFC 9110 section 9.3.6. The server speaks only after us, so nothing of it is read here."""
    loop, name = asyncio.get_running_loop(), shown(proxy)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if proxy.username:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
        request += f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}\r\n"
    await loop.sock_sendall(sock, f"{request}\r\n".encode("latin-1"))
    head = b""
    while b"\r\n\r\n" not in head:
        data = await loop.sock_recv(sock, 4096)
        head += data
        if not data or len(head) > _HEAD or not head.startswith(b"HTTP/"[: len(head)]):
            raise ConnectFailed(
                f"{place}: the proxy {name} gave no HTTP answer",
                fix="check that its port is that of a proxy",
                stage="upgrade",
            )
    line = head.partition(b"\r\n")[0].decode("latin-1").split(" ", 2)
    status = int(line[1]) if len(line) > 1 and line[1].isdigit() else 0
    if not 200 <= status < 300:
        raise proxy_refused(place, name, status, line[2] if len(line) > 2 else "")


async def _socks(recipe: tcp.TcpRecipe, progress: tcp.Progress, proxy: SplitResult) -> socket.socket:
    """socks5h and socks4a let the proxy resolve the name, socks5 and socks4 do it here, as with curl."""
    from python_socks import ProxyConnectionError, ProxyError, ProxyTimeoutError, ProxyType
    from python_socks.async_.asyncio import Proxy

    assert proxy.hostname is not None
    assert proxy.port is not None
    place, name = tcp.place(recipe), shown(proxy)
    progress.stage = tcp.Stage(
        f"the proxy {name} does not answer, or reaches no host",
        "check its address, and that it speaks SOCKS",
        "upgrade",
    )
    way = Proxy(
        ProxyType.SOCKS4 if proxy.scheme.startswith("socks4") else ProxyType.SOCKS5,
        proxy.hostname,
        proxy.port,
        unquote(proxy.username) if proxy.username else None,
        unquote(proxy.password or "") if proxy.username else None,
        rdns=proxy.scheme in ("socks5h", "socks4a"),
        loop=asyncio.get_running_loop(),
    )
    local = (recipe.local_address, 0) if recipe.local_address is not None else None
    try:
        sock = await way.connect(
            recipe.url.host, recipe.port, timeout=recipe.connect_timeout + 1, local_addr=local
        )
    except ProxyTimeoutError as error:
        raise TimeoutError from error
    except (ProxyConnectionError, OSError) as error:
        raise ConnectFailed(
            f"{place}: the proxy {name} cannot be reached: {error.strerror or error}",
            fix='check its address and port; without a proxy set proxy = "none"',
            stage="reach",
        ) from error
    except ProxyError as error:
        raise ConnectFailed(
            f"{place}: the proxy {name} does not connect: {error}",
            fix="check host, port and the credentials of the proxy, and its log",
            stage="upgrade",
        ) from error
    sock.setblocking(False)
    tcp.tune_socket(recipe, sock)
    return sock
