"""A connection whose other half is a worker process: one stream, and the reason of its end.

Owns: the way from a recipe to a `Connection`, and the view from above. Rule: whatever ended the worker ended
the connection, in its words; what it had said before that is read first.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from tesaiot_connect import (
    AsyncioStream,
    ClientCertificate,
    CloseReason,
    ConnectFailed,
    ConnectionStatus,
    Disconnected,
    PathLost,
    Peer,
    State,
    Unsupported,
)

from . import trust
from .control import Ended, Job
from .supervisor import Crashed, Worker
from .transport import QuicNng

log = logging.getLogger(__name__)

NAME = "quic_nng"
_TRIES = 3
_LAST_WORD = 2.0
"""Seconds between the end of the data and the worker's word about it."""
_LONGEST_PACKET = 268_435_460
"""Bytes: MQTT 3.1.1 section 2.2.3."""
_HEADWAY = 0.9
"""Of the time that is left, what the worker may use: then there is time for its words."""


async def connect(recipe: QuicNng, *, identity: ClientCertificate | None) -> NngConnection:
    """Raises ConnectFailed and Unsupported; whatever it raises, no process and no socket is left.

    NanoSDK now and then crashes at a handshake that is quick, which says nothing of the endpoint: another
    process tries again.
    """
    refused = recipe.refusal()
    if refused is not None:
        raise Unsupported(f"{recipe.place}: {refused.what}", fix=refused.fix)
    pair = trust.pair(recipe, identity)
    deadline = asyncio.get_running_loop().time() + recipe.connect_timeout
    for _ in range(_TRIES - 1):
        try:
            return await _connect(recipe, pair, deadline)
        except Crashed:
            continue
    return await _connect(recipe, pair, deadline)


async def _connect(recipe: QuicNng, pair: trust.Pair | None, deadline: float) -> NngConnection:
    loop = asyncio.get_running_loop()
    worker = Worker(recipe.place, patience=recipe.ack_timeout)
    try:
        async with asyncio.timeout_at(deadline):
            address = await _resolve(recipe)
            left = deadline - loop.time()
            secured = await worker.secure(_job(recipe, pair, left * _HEADWAY))
        stream = AsyncioStream()
        await loop.create_unix_connection(lambda: stream, sock=worker.data)
    except BaseException as error:
        worker.kill()
        worker.data.close()
        if isinstance(error, TimeoutError):
            raise _too_late(recipe, worker) from error
        raise
    peer = Peer(
        secured.address or address,
        NAME,
        secure=recipe.tls.verify == "full",
        alpn="mqtt",
        tls_version="TLSv1.3",
    )
    return NngConnection(worker, stream, peer, place=recipe.place, patience=recipe.ack_timeout)


async def _resolve(recipe: QuicNng) -> str:
    """The library does it again, and would not tell why it cannot."""
    loop, host = asyncio.get_running_loop(), recipe.url.host
    try:
        found = await loop.getaddrinfo(host, recipe.port, family=socket.AF_INET, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:  # the latter for labels that are empty or too long
        text = getattr(error, "strerror", None) or "it is not a host name"
        raise ConnectFailed(
            f"{recipe.place}: the name {host} cannot be resolved to an IPv4 address: {text}",
            fix="check its spelling, the network and this machine's name server; for IPv6 use "
            'via = "quic_aioquic"',
            stage="name",
        ) from error
    return f"{found[0][4][0]}:{recipe.port}"


def _job(recipe: QuicNng, pair: trust.Pair | None, time: float) -> Job:
    verify = recipe.tls.verify == "full"
    ca_file = recipe.tls.ca_file
    return Job(
        backend=recipe.backend,
        library=str(recipe.library.absolute()) if recipe.library is not None else "",
        msquic=str(recipe.msquic.absolute()) if recipe.msquic is not None else "",
        url=f"mqtt-quic://{recipe.url.host.encode('idna').decode()}:{recipe.port}",
        verify=verify,
        ca_file=str(ca_file.absolute()) if ca_file is not None else "",
        certificate=pair.certificate if pair is not None else "",
        key=pair.key if pair is not None else "",
        connect_timeout=time,
        ack_timeout=recipe.ack_timeout,
        idle_timeout=recipe.idle_timeout,
        keepalive=recipe.keepalive,
        watchdog=recipe.watchdog,
        window=recipe.window,
        accept_early_acks=recipe.accept_early_acks,
        max_packet_size=_LONGEST_PACKET,
        memory=recipe.memory,
    )


def _too_late(recipe: QuicNng, worker: Worker) -> ConnectFailed:
    where = f"{recipe.place} gave no connection within {recipe.connect_timeout:g} s"
    if worker.loaded is None:
        return ConnectFailed(
            f"{where}: the process of quic_nng has not loaded the library yet",
            fix="raise connect_timeout beside the endpoint's url; see what the process prints with "
            "--log-level debug",
        )
    return ConnectFailed(
        f"{where}: no QUIC handshake was completed",
        fix="check that a broker speaks MQTT over QUIC there (UDP, ALPN mqtt), that no firewall drops UDP, "
        "and that its certificate is of an authority in ca_file: the library does not tell which it is",
        stage="reach",
    )


class NngConnection:
    """`stream` ends in the worker, which is the transport. `patience`: seconds it has to send what it was
    given, once the client has closed."""

    multistream = False
    early_sent = False

    def __init__(
        self, worker: Worker, stream: AsyncioStream, peer: Peer, *, place: str, patience: float
    ) -> None:
        self._place = place
        self._patience = patience
        self._worker = worker
        self._bytes = stream
        self._peer = peer
        self._stream = NngStream(self, stream)
        self._taken = False
        self._closed = False
        self._over = False
        """It had ended by itself before it was closed."""

    @property
    def peer(self) -> Peer:
        return self._peer

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._worker.pid

    async def open_stream(self, *, priority: int = 0) -> NngStream:
        if self._taken:
            raise Unsupported(f"{NAME} has one stream, which is open already")
        self._taken = True
        return self._stream

    async def accept_stream(self) -> NngStream:
        """Waits for the end of the connection: a server opens no stream."""
        reason = await self.wait_closed()
        raise Disconnected(f"no more streams: {reason.text}")

    def status(self) -> ConnectionStatus:
        """Bytes are those of MQTT, to and from the worker."""
        stream = self._bytes
        return ConnectionStatus(
            state=self._state,
            last_received=stream.last_received,
            bytes_received=stream.bytes_received,
            bytes_sent=stream.bytes_sent,
            close_reason=self._close_reason,
        )

    def set_keepalive(self, seconds: float) -> None:
        """Nothing to do: QUIC has the `keepalive` of the recipe, and MQTT its own."""

    async def probe(self) -> None:
        raise Unsupported(f"{NAME} cannot probe its path", fix="send a PINGREQ")

    async def migrate(self) -> None:
        raise Unsupported(f"{NAME} cannot move to another address", fix="reconnect")

    async def wait_closed(self) -> CloseReason:
        """Returns when the worker is gone."""
        await asyncio.shield(self._worker.gone)
        reason = self._close_reason
        assert reason is not None
        return reason

    async def aclose(self, code: int = 0, reason: str = "") -> None:
        """The worker sends what it was given, as long as the `ack_timeout` suffices, and is gone then."""
        self._closing()
        try:
            await self._bytes.aclose()
        except BaseException:
            self._worker.kill()
            raise
        await self._worker.finish(self._patience)
        ended = self._worker.last_word.result()
        if not (ended.orderly or self._over):
            log.warning("%s: %s", self._place, ended.what)

    def abort(self, code: int = 0) -> None:
        self._closing()
        self._bytes.abort()
        self._worker.kill()

    # --- for the stream

    @property
    def closed_here(self) -> bool:
        return self._closed

    async def ended(self) -> Ended:
        """What the worker says about the end of its data."""
        self._worker.look()
        if not self._worker.last_word.done():
            await asyncio.wait((self._worker.last_word,), timeout=_LAST_WORD)
        if not self._worker.last_word.done():
            self._worker.kill(Ended(what="the process of quic_nng ended the data without a word"))
        return await asyncio.shield(self._worker.last_word)

    # --- inside

    def _closing(self) -> None:
        if not self._closed:
            self._closed, self._over = True, self._worker.last_word.done()

    @property
    def _state(self) -> State:
        if self._worker.gone.done():
            return State.CLOSED
        return State.CLOSING if self._closed or self._worker.last_word.done() else State.OPEN

    @property
    def _close_reason(self) -> CloseReason | None:
        if not self._worker.gone.done():
            return None
        ended = self._worker.last_word.result()
        if ended.orderly or (self._closed and not self._over):
            return CloseReason(0, "closed on this side")
        return CloseReason(1, ended.what, by_peer=ended.by_peer)


class NngStream:
    """The `ByteStream` of a connection: bytes to and from the worker, and its word where they end."""

    def __init__(self, connection: NngConnection, stream: AsyncioStream) -> None:
        self._connection = connection
        self._bytes = stream
        self._ended = False

    async def receive(self, max_bytes: int = 65536, /) -> bytes:
        """Raises Disconnected with what the worker says, and PathLost where the path or the worker went
        silent."""
        if not self._ended:
            try:
                if data := await self._bytes.receive(max_bytes):
                    return data
            except Disconnected:
                if self._connection.closed_here:
                    await self._connection.wait_closed()  # whoever reads may end whoever closes
                    raise
            self._ended = True
        return await self._end()

    async def send(self, data: bytes, /) -> None:
        if self._ended:
            await self._end()
        try:
            await self._bytes.send(data)
        except Disconnected:
            if self._connection.closed_here:
                raise
            await self._end()
            raise

    async def send_eof(self) -> None:
        raise Unsupported("quic_nng cannot end one direction alone", fix="use aclose")

    def pause(self) -> None:
        self._bytes.pause()

    async def aclose(self) -> None:
        await self._connection.aclose()

    def abort(self, code: int = 0) -> None:
        self._connection.abort(code)

    async def _end(self) -> bytes:
        ended = await self._connection.ended()
        if self._connection.closed_here:
            raise Disconnected("the connection was closed on this side")
        if ended.orderly:
            return b""
        raise (PathLost if ended.silent else Disconnected)(ended.what, fix=ended.fix)
