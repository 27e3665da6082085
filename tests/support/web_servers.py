"""Servers that speak WebSocket, for tests: mosquitto, aedes on Node, and nginx in front of any of them.

Each is a context manager that gives its URL once it takes connections, and ends its own process when left.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_brokers import Mosquitto, free_port, program, stop, until_listening

from tesaiot_connect.tls import ServerTls

JS = Path(__file__).resolve().parents[1] / "js"


def javascript(script: str, *needs: str) -> list[str]:
    """The start of a command that runs a script of tests/js; skips, or fails where servers are required."""
    node = program("node", "nodejs")
    for package in needs:
        if not (JS / "node_modules" / package).is_dir():
            program(f"a copy of {package} in tests/js", "npm ci in tests/js")
    return [node, str(JS / script)]


@contextmanager
def websocket_mosquitto(folder: Path, *lines: str, tls: ServerTls | None = None) -> Iterator[str]:
    """mosquitto with a WebSocket listener; `lines` are more lines of mosquitto.conf for it.

    Its path is any. Debian's libwebsockets is in it, and starts only beside a plain listener.
    """
    port = free_port()
    secured = [] if tls is None else [f"certfile {tls.certificate}", f"keyfile {tls.key}"]
    listener = (f"listener {port} 127.0.0.1", "protocol websockets", *secured, *lines)
    with Mosquitto(folder, *listener) as broker:
        assert broker._process is not None
        until_listening(port, broker._process, broker.log)
        yield f"{_scheme(tls)}:{port}/mqtt"


@contextmanager
def websocket_aedes(folder: Path, *, tls: ServerTls | None = None) -> Iterator[str]:
    """aedes, an MQTT 3.1.1 broker, at the path /mqtt and with the subprotocol mqtt only."""
    command = javascript("aedes_ws.js", "aedes", "ws")
    if tls is not None:
        command += [str(tls.certificate), str(tls.key)]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "aedes.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, log.read_text(errors="replace")
            yield f"{_scheme(tls)}:{port}/mqtt"
        finally:
            process.kill()


@contextmanager
def nginx(
    folder: Path,
    backend: int,
    tls: ServerTls,
    *,
    path: str = "/mqtt",
    port: int | None = None,
    read_timeout: str = "1h",
) -> Iterator[str]:
    """nginx that ends TLS and hands `path` on to ws://127.0.0.1:`backend`, as its manual says to.

    It cuts a connection on which the backend says nothing for `read_timeout`.
    """
    tool = program("nginx", "nginx")
    port, log = port or free_port(), folder / "nginx.log"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    # as root its workers would not reach the test's folder otherwise
    user = "user root;" if hasattr(os, "geteuid") and os.geteuid() == 0 else ""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    config.write_text(
        f"""
daemon off; {user} worker_processes 1; pid {folder}/nginx.pid; error_log {log} info;
events {{ worker_connections 256; }}
http {{
  access_log off;
  {" ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)}
  map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
  server {{
    listen 127.0.0.1:{port} ssl;
    server_name localhost;
    ssl_certificate {tls.certificate};
    ssl_certificate_key {tls.key};
    location {path} {{
      proxy_pass http://127.0.0.1:{backend};
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_read_timeout {read_timeout};
    }}
  }}
}}
"""
    )
    command = [tool, "-p", str(folder), "-c", str(config), "-e", str(log)]
    with (folder / "nginx.out").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        until_listening(port, process, log)
        yield f"wss://localhost:{port}{path}"
    finally:
        stop(process)


def _scheme(tls: ServerTls | None) -> str:
    """Up to the host: a certificate of tests names localhost."""
    return "ws://127.0.0.1" if tls is None else "wss://localhost"
