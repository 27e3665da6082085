"""One endpoint, tried alone: from its name to a message there and back.

Owns: the order of the steps, and the client that takes them. Rules: transports are known by their contract
alone; whatever happens, the connection is closed and the session at the broker ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import attrs

from ..client import Client, ClientOptions, MqttConnection
from ..errors import ConnectFailed, ConnectorError, Refused, Unsupported
from ..mqtt.packets import Connack
from ..mqtt.properties import P
from ..negotiation import Negotiator
from ..protocols import (
    ClientCertificate,
    Connection,
    Duration,
    LimitedTransport,
    Peer,
    QuicStatus,
    Transport,
    Url,
)
from . import certificate, sample
from .findings import NONE, NOT_REACHED, OK, STEPS, WAY, Accepted, Finding, Problem, Step, StepName

log = logging.getLogger(__name__)

_LIMITS = (
    P.RECEIVE_MAXIMUM,
    P.MAXIMUM_QOS,
    P.RETAIN_AVAILABLE,
    P.MAXIMUM_PACKET_SIZE,
    P.TOPIC_ALIAS_MAXIMUM,
    P.SERVER_KEEP_ALIVE,
    P.SESSION_EXPIRY,
    P.WILDCARD_AVAILABLE,
    P.SUBSCRIPTION_IDS_AVAILABLE,
    P.SHARED_AVAILABLE,
)
_FLAGS = (P.RETAIN_AVAILABLE, P.WILDCARD_AVAILABLE, P.SUBSCRIPTION_IDS_AVAILABLE, P.SHARED_AVAILABLE)

_REPORT = "report it to whoever made the transport, with what --log-level warning says"
_GRACE = 1.0
_FAREWELL = 3.0

Tell = Callable[[str], None]
"""Is told what is being done, in a word or two."""


@attrs.frozen(kw_only=True)
class Plan:
    """How to look."""

    timeout: float | None = None
    """Seconds for each step; None: what the connection and its endpoints have."""
    topic: str = attrs.field(factory=lambda: f"tesaiot-connect/doctor/{secrets.token_hex(8)}")
    """Where the echo goes through: by default a name that nobody else uses."""
    throughput: bool = False


class Watched:
    """A `Dialer` over one endpoint that keeps what it saw. Nothing is remembered."""

    def __init__(self, recipe: Transport, timeout: float) -> None:
        """`timeout` in seconds; a transport that has the same one says more of what it waited for."""
        self._dialer = Negotiator([recipe], timeout=timeout + _GRACE)
        self._made: list[Connection] = []
        self.seconds: float | None = None
        """How long the first connect took until it succeeded or failed; None: there was none."""
        self.error: ConnectorError | None = None
        self.connection: Connection | None = None
        self._at = 0.0

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        self.error, began = None, time.monotonic()
        try:
            self.connection = await self._dialer.connect(identity=identity, early=early)
        except ConnectorError as error:
            self.error = error
            raise
        finally:
            self._at = time.monotonic()
            self.seconds = self._at - began if self.seconds is None else self.seconds
        self._made.append(self.connection)
        return self.connection

    async def gone(self) -> None:
        """Returns when every connection has ended, and given back what it had."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                for one in self._made:
                    await one.wait_closed()

    def abort(self) -> None:
        """Whatever is open still, after something unexpected, is closed."""
        for one in self._made:
            with contextlib.suppress(Exception):
                one.abort()

    @property
    def since(self) -> float:
        """Seconds since the latest connection was there."""
        return time.monotonic() - self._at

    @property
    def peer(self) -> Peer | None:
        return None if self.connection is None else self.connection.peer

    @property
    def quic(self) -> QuicStatus | None:
        return None if self.connection is None else self.connection.status().quic

    @property
    def handshake(self) -> float | None:
        """Seconds of the first one that succeeded, by QUIC's own clock where there is one: loading a stack
        takes longer than its handshake."""
        own = None if self.quic is None else self.quic.handshake_time
        return self.seconds if own is None or self.seconds is None else min(own, self.seconds)


async def examine(
    connection: MqttConnection, recipe: Transport, place: int, plan: Plan, tell: Tell
) -> Finding:
    """Raises nothing for what is wrong with the endpoint."""
    with contextlib.ExitStack() as stack:
        try:
            folder = tempfile.TemporaryDirectory(prefix="tesaiot-doctor-", ignore_cleanup_errors=True)
            tickets = Path(stack.enter_context(folder))
        except OSError:  # then nothing is resumed
            tickets = Path(os.devnull)
        return await _Probe(connection, recipe, tickets, place, plan, tell).run()


class _Probe:
    def __init__(
        self,
        connection: MqttConnection,
        recipe: Transport,
        tickets: Path,
        place: int,
        plan: Plan,
        tell: Tell,
    ) -> None:
        self._auth, self._name = connection.auth, connection.name
        self._options = quiet(connection.options, plan.timeout)
        self._timeout = float(self._options.connect_timeout)
        self._recipe = recipe
        self._tickets = tickets
        self._plan = plan
        self._tell = tell
        self._dialers: list[Watched] = []
        self._steps: dict[StepName, Step] = dict.fromkeys(STEPS, NOT_REACHED)
        url: Url | None = getattr(recipe, "url", None)
        self._secure = bool(getattr(recipe, "secure", False))
        there: dict[StepName, bool] = {
            "name": url is not None and bool(url.host),
            "secure": self._secure,
            "upgrade": url is not None and url.scheme in ("ws", "wss"),
            "throughput": plan.throughput,
        }
        self._steps |= {name: NONE for name, needed in there.items() if not needed}
        self._found = Finding(
            url=type(recipe).__name__ if url is None else str(url),
            scheme="" if url is None else url.scheme,
            host="" if url is None else url.host,
            server_name=getattr(getattr(recipe, "tls", None), "server_name", None)
            or (url.host if url else ""),
            place=place,
            steps=self._steps,
        )

    async def run(self) -> Finding:
        try:
            self._note(cannot=_limits(self._recipe))
            self._recipe = _own(self._recipe, self._tickets, self._plan.timeout)
            self._tell("name")
            await self._resolve()
            self._tell("connecting")
            await self._first()
            if self._found.secured:
                self._tell("connecting again")
                await self._again()
        except Exception as error:  # noqa: BLE001 - a plugin's, or ours: the other endpoints still count
            self._unexpected(error)
        finally:
            for dialer in self._dialers:
                dialer.abort()
        return self._found

    def _note(self, **found: Any) -> None:
        self._found = attrs.evolve(self._found, **found)

    def _fail(self, step: StepName, error: ConnectorError) -> None:
        code = error.reason_code if isinstance(error, Refused) else None
        self._steps[step] = Step("failed", what=error.what, fix=error.fix)
        self._note(problem=Problem(step, error.what, fix=error.fix, reason_code=code))

    def _unexpected(self, error: Exception) -> None:
        """At the first step that has no outcome."""
        log.error("%s failed in an unexpected way", self._found.url, exc_info=error)
        told = ConnectorError(f"{self._found.url} failed in an unexpected way: {error!r}", fix=_REPORT)
        open_steps = [name for name in (*WAY, *STEPS) if self._steps[name].outcome == "not reached"]
        step: StepName = open_steps[0] if open_steps else "again"
        if step in WAY:
            self._fail(step, told)
        else:
            self._steps[step] = Step("failed", what=told.what, fix=told.fix)

    # --- the steps ----------------------------------------------------------------------------

    async def _resolve(self) -> None:
        """What this machine says of the name; a transport may have it resolved by a proxy."""
        host = self._found.host
        if not host:
            return
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                loop = asyncio.get_running_loop()
                found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            late = "the name server does not answer" if isinstance(error, TimeoutError) else "it is no name"
            words = getattr(error, "strerror", None) or late
            self._steps["name"] = Step("failed", what=f"the name {host} cannot be resolved: {words}")
            return
        self._steps["name"] = Step("ok", time.monotonic() - began)
        self._note(addresses=tuple(dict.fromkeys(str(address[0]) for *_, address in found)))

    async def _first(self) -> None:
        """The first connection, with a message there and back."""
        dialer, fate = self._dialer(), sample.Fate()
        async with self._client(dialer, fate) as client:
            try:
                connack = await client.connected(once=True)
            except ConnectorError as error:
                await self._refused(dialer, error)
                return
            self._steps["mqtt"] = Step("ok", dialer.since)
            version: Literal["5", "3.1.1"] = "5" if client.status.version == "5" else "3.1.1"
            self._note(accepted=_accepted(connack, client.status.client_id, version))
            self._connected(dialer)
            self._tell("echo")
            self._steps["echo"] = await sample.echo(client, fate, self._plan.topic, self._timeout)

    async def _refused(self, dialer: Watched, error: ConnectorError) -> None:
        """No CONNACK, or one that says no."""
        if dialer.seconds is None:  # the login failed before: the transport may work nevertheless
            try:
                connection = await dialer.connect()
            except ConnectorError:
                pass
            else:
                await _leave(connection)
        if dialer.connection is None and dialer.error is not None:
            self._note(seconds=dialer.seconds or 0.0)
            self._transport_failed(dialer.error)
        else:  # where there is an error too, it is that of the try in MQTT 3.1.1
            self._connected(dialer)
            self._fail("mqtt", error)

    def _connected(self, dialer: Watched) -> None:
        """The transport works."""
        peer, secure = dialer.peer, self._secure
        assert peer is not None
        self._named_elsewhere()
        seconds = dialer.handshake
        self._steps["reach"] = OK if secure else Step("ok", seconds)
        if secure:
            self._steps["secure"] = Step("ok", seconds)
        if self._steps["upgrade"] is not NONE:
            self._steps["upgrade"] = OK
        self._note(
            transport=peer.transport,
            address=peer.address,
            verified=peer.secure
            and peer.certificate is not None
            and getattr(self._recipe, "verify_hostname", True) is not False,
            alpn=peer.alpn,
            tls_version=peer.tls_version,
            certificate=None
            if peer.certificate is None
            else certificate.read(peer.certificate, _authorities(self._recipe)),
            quic=dialer.quic,
            seconds=seconds or 0.0,
        )

    def _named_elsewhere(self) -> None:
        """The transport came past the name, by a proxy or with more patience than ours."""
        if self._steps["name"].outcome == "failed":
            self._steps["name"] = attrs.evolve(self._steps["name"], outcome="none")

    def _transport_failed(self, error: ConnectorError) -> None:
        """Steps before the one that failed went well."""
        if isinstance(error, Unsupported):
            self._note(problem=Problem("secure", error.what, fix=error.fix, left_out=True))
            return
        told = error.stage if isinstance(error, ConnectFailed) else ""
        stage: StepName = told or ("secure" if self._secure else "reach")
        if told and stage != "name":
            self._named_elsewhere()
        for name in WAY[: WAY.index(stage)]:
            if told and self._steps[name].outcome == "not reached":
                self._steps[name] = OK
        self._fail(stage, error)

    async def _again(self) -> None:
        """The second connection, which may resume the first; with a login only where that is accepted."""
        dialer, fate = self._dialer(), sample.Fate()
        if not self._found.usable:
            try:
                connection = await dialer.connect()
                self._resumed(dialer)
                await _leave(connection)
                await dialer.gone()
            except ConnectorError as error:
                self._steps["again"] = Step("failed", what=error.what, fix=error.fix)
            return
        async with self._client(dialer, fate) as client:
            try:
                await client.connected(once=True)
            except ConnectorError as error:
                self._steps["again"] = Step("failed", what=error.what, fix=error.fix)
                return
            self._resumed(dialer)
            if self._plan.throughput:
                self._tell("throughput")
                self._steps["throughput"] = await sample.throughput(client, fate, self._plan.topic)

    def _resumed(self, dialer: Watched) -> None:
        self._steps["again"] = Step("ok", dialer.handshake)
        if (quic := dialer.quic) is not None:
            self._note(resumed=quic.resumed, early_accepted=quic.early_data_accepted)

    def _dialer(self) -> Watched:
        self._dialers.append(Watched(self._recipe, self._timeout))
        return self._dialers[-1]

    @contextlib.asynccontextmanager
    async def _client(self, dialer: Watched, fate: sample.Fate) -> AsyncIterator[Client]:
        options, auth = self._options, self._auth
        async with Client(dialer, options, auth=auth, name=self._name, on_state=fate.told) as client:
            yield client
        await dialer.gone()


def quiet(options: ClientOptions, timeout: float | None) -> ClientOptions:
    """Those of a client that takes nobody's session and leaves nothing behind."""
    own = f"{options.client_id}-doctor-{secrets.token_hex(3)}" if options.client_id else ""
    return attrs.evolve(
        options,
        client_id=own,
        clean_session=True,
        session_expiry=Duration(0.0),
        will=None,
        streams="single",
        early_publish=False,
        connect_timeout=options.connect_timeout if timeout is None else Duration(timeout),
    )


def _authorities(recipe: Transport) -> bytes:
    """The PEM file of those whom it trusts, where it names one."""
    file = getattr(getattr(recipe, "tls", None), "ca_file", None)
    try:
        return Path(file).read_bytes() if file is not None else b""
    except OSError:
        return b""


def _limits(recipe: Transport) -> tuple[str, ...] | None:
    if not isinstance(recipe, LimitedTransport) or isinstance(recipe.cannot, str):
        return None
    return tuple(str(one) for one in recipe.cannot)


async def _leave(connection: Connection) -> None:
    try:
        async with asyncio.timeout(_FAREWELL):
            await connection.aclose()
    except TimeoutError:
        connection.abort()


def _own(recipe: Transport, tickets: Path, timeout: float | None) -> Transport:
    """The recipe with a folder of its own for session tickets, which serve once, and with our patience."""
    if not attrs.has(type(recipe)):
        return recipe
    fields = {field.name for field in attrs.fields(type(recipe))}  # type: ignore[arg-type] # it has
    more: dict[str, Any] = {}
    if "ticket_folder" in fields:
        more["ticket_folder"] = tickets
    if "connect_timeout" in fields and timeout is not None:
        more["connect_timeout"] = Duration(timeout)
    made: Transport = attrs.evolve(recipe, **more)  # type: ignore[misc]
    return made


def _accepted(connack: Connack, client_id: str, version: Literal["5", "3.1.1"]) -> Accepted:
    limits: dict[str, int | bool | str] = {
        one.name.lower(): bool(connack.properties[one]) if one in _FLAGS else connack.properties[one]
        for one in _LIMITS
        if one in connack.properties
    }
    assigned = str(connack.properties.get(P.ASSIGNED_CLIENT_ID, client_id))
    return Accepted(version, assigned, connack.session_present, limits)
