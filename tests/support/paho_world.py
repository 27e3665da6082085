"""Our broker in a thread, on every transport that is installed, and paho's programs as processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tesaiot_connect import Broker, ListenerSpec, PluginError, Url
from tesaiot_connect.plugins import load
from tesaiot_connect.portal import Portal
from tesaiot_connect.testing import Certificates
from tesaiot_connect.tls import ServerTls

PROGRAMS = Path(__file__).parents[1] / "paho_programs"
SCHEMES = ("mqtt", "mqtts", "quic", "wss")
DROP_IN = "tesaiot_connect.paho"
REAL = "paho.mqtt.client"


def installed() -> list[str]:
    """Those of SCHEMES that a plugin serves."""
    found = []
    for scheme in SCHEMES:
        with contextlib.suppress(PluginError):
            load().transports(scheme)
            found.append(scheme)
    return found


@contextlib.contextmanager
def our_broker(
    certificates: Certificates,
    schemes: Sequence[str],
    *,
    ports: Mapping[str, int] | None = None,
    server_tls: ServerTls | None = None,
) -> Iterator[dict[str, Url]]:
    """Scheme to the URL it is bound to, for clients on this machine."""
    specs = []
    for scheme in schemes:
        recipe = load().transports(scheme)[0].recipe
        tls: dict[str, Any] = {}
        if scheme != "mqtt":
            tls["server_tls"] = server_tls or certificates.server()
        url = Url(scheme, "127.0.0.1", (ports or {}).get(scheme, 0))
        specs.append(ListenerSpec(scheme, recipe(url=url, **tls)))
    bound: Future[list[str]] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        try:
            async with Broker(None).serving(specs) as addresses:
                bound.set_result(addresses)
                await stop.wait()
        except BaseException as error:
            if bound.done():
                raise
            bound.set_exception(error)

    async def end() -> None:
        stop.set()

    with Portal(name="broker") as portal:
        served = portal.start(serve())
        addresses = bound.result(30)
        try:
            yield {scheme: Url.parse(one) for scheme, one in zip(schemes, addresses, strict=True)}
        finally:
            portal.call(end)
            served.result(30)


class Program:
    """One of `paho_programs`, running."""

    def __init__(
        self,
        name: str,
        module: str,
        host: str | Url,
        *,
        port: int | None = None,
        ca: Path | None = None,
        topic: str = "",
        count: int | None = None,
        paho: Path | None = None,
    ) -> None:
        """`paho` is a folder with another paho than the installed one."""
        warnings = ["-W", "error"]
        if paho is not None:  # its own, in tls_set
            warnings += ["-W", "ignore:ssl.PROTOCOL_TLS is deprecated:DeprecationWarning"]
        command = [sys.executable, *warnings, str(PROGRAMS / f"{name}.py"), str(host), "--module", module]
        command += ["--topic", topic or f"paho/{name}"]
        for option, value in (("--port", port), ("--ca", ca), ("--count", count)):
            command += [] if value is None else [option, str(value)]
        environment = {**os.environ, "PYTHONPATH": str(paho)} if paho else None
        self.name = name
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._errors = ""
        self._readers = [threading.Thread(target=one) for one in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def until(self, line: str, times: int = 1) -> None:
        """Returns once it printed this line so many times; fails when it ends before."""
        with self._news:
            self._news.wait_for(lambda: self.lines.count(line) >= times or self._ended, 60)
            assert self.lines.count(line) >= times, (self.name, line, self.lines, self._errors)

    def interrupt(self, signal: int) -> None:
        self._process.send_signal(signal)

    def end(self, code: int = 0) -> list[str]:
        """Wait for it; what it printed. It must not have complained."""
        with self:
            self._process.wait(90)
        for reader in self._readers:
            reader.join()
        assert (self._process.returncode, self._errors) == (code, ""), (self.name, self.lines, self._errors)
        return self.lines

    _ended = False

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as errors:
            self._errors = errors.read()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None and sys.exc_info()[0] is not None:
            self._process.kill()
        self._process.wait()
