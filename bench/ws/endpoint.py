"""One side of the WebSocket benchmark: MQTT bytes in binary frames over loopback.

    endpoint.py feed SIZE FRAMES FOLDER             prints "port N"; sends frames, in writes of 64 KiB
    endpoint.py read WHO LOOP SIZE FRAMES FOLDER PORT   prints "cpu NANOSECONDS_PER_FRAME"
    endpoint.py echo WHO LOOP SIZE FRAMES FOLDER    prints "port N", then "cpu NANOSECONDS_PER_FRAME"
    endpoint.py send SIZE FRAMES FOLDER PORT        sends masked frames, reads what comes back

WHO is ours, websockets (its asyncio API), sansio (its Protocol on an asyncio.Protocol) or picows. FOLDER
holds ca.pem, cert.pem and key.pem; "-" is without TLS. CPU is of the measured process, from the first
frame on.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

WRITE = 64 * 1024
PATH = "/mqtt"


def client_context(folder: str) -> ssl.SSLContext | None:
    return None if folder == "-" else ssl.create_default_context(cafile=f"{folder}/ca.pem")


def server_context(folder: str) -> ssl.SSLContext | None:
    if folder == "-":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
    return context


def block(size: int, *, mask: bool) -> tuple[bytes, int]:
    """Bytes of some frames, at least one, about `WRITE`; and how many they are."""
    one = Frame(Opcode.BINARY, bytes(size)).serialize(mask=mask)
    count = max(1, WRITE // len(one))
    return one * count, count


# --- the sides that are not measured: blocking sockets ------------------------------------


def feed(size: int, frames: int, folder: str) -> None:
    context = server_context(folder)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print("port", listening.getsockname()[1], flush=True)
        sock, _ = listening.accept()
    if context is not None:
        sock = context.wrap_socket(sock, server_side=True)
    protocol = ServerProtocol(subprotocols=["mqtt"])  # type: ignore[list-item]
    request = None
    while request is None:
        protocol.receive_data(sock.recv(65536))
        request = next(iter(protocol.events_received()), None)
    assert isinstance(request, Request)
    protocol.send_response(protocol.accept(request))
    sock.sendall(b"".join(protocol.data_to_send()))
    data, count = block(size, mask=False)
    with contextlib.suppress(ConnectionError):  # who has it all hangs up
        for _ in range(frames // count):
            sock.sendall(data)
        while sock.recv(65536):
            pass


def send(size: int, frames: int, folder: str, port: int) -> None:
    import threading

    sock: socket.socket = socket.create_connection(("127.0.0.1", port))
    context = client_context(folder)
    if context is not None:
        sock = context.wrap_socket(sock, server_hostname="127.0.0.1")
    protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}{PATH}"), subprotocols=["mqtt"])  # type: ignore[list-item]
    protocol.send_request(protocol.connect())
    sock.sendall(b"".join(protocol.data_to_send()))
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(65536)
    data, count = block(size, mask=True)

    def drain() -> None:
        while sock.recv(1 << 20):
            pass

    reading = threading.Thread(target=drain, daemon=True)
    reading.start()
    for _ in range(frames // count):
        sock.sendall(data)
    reading.join(60)


# --- clients that read --------------------------------------------------------------------


class Clock:
    """CPU from the first byte until `total` bytes of payload were taken."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.left = total
        self.began = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def took(self, size: int) -> None:
        if self.left == self.total:
            self.began = time.process_time()
        self.left -= size
        if self.left <= 0 and not self.done.done():
            self.done.set_result(time.process_time() - self.began)


async def read_ours(clock: Clock, folder: str, port: int) -> None:
    from tesaiot_connect import TlsOptions, Url
    from tesaiot_connect_wss import Wss

    scheme = "ws" if folder == "-" else "wss"
    tls = TlsOptions() if folder == "-" else TlsOptions(ca_file=Path(folder) / "ca.pem")
    connection = await Wss(Url(scheme, "127.0.0.1", port, PATH), tls=tls).connect()
    stream = await connection.open_stream()
    while not clock.done.done():
        clock.took(len(await stream.receive()))
    connection.abort()


async def read_websockets(clock: Clock, folder: str, port: int) -> None:
    from websockets.asyncio.client import connect

    url = f"{'ws' if folder == '-' else 'wss'}://127.0.0.1:{port}{PATH}"
    async with connect(
        url,
        subprotocols=["mqtt"],
        compression=None,
        proxy=None,
        ssl=client_context(folder),
        close_timeout=0.1,  # type: ignore[list-item]
    ) as socket:
        while not clock.done.done():
            clock.took(len(await socket.recv(decode=False)))


class SansIo(asyncio.Protocol):
    """The library's Protocol without any queue: what a thin layer on top of it costs at least."""

    def __init__(self, clock: Clock | None, port: int = 0) -> None:
        self.clock = clock
        uri = parse_uri(f"ws://127.0.0.1:{port}{PATH}")
        self.protocol: Any = (
            ClientProtocol(uri, subprotocols=["mqtt"]) if port else ServerProtocol(subprotocols=["mqtt"])
        )  # type: ignore[list-item]

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if isinstance(self.protocol, ClientProtocol):
            self.protocol.send_request(self.protocol.connect())
            self.flush()

    def flush(self) -> None:
        self.transport.write(b"".join(self.protocol.data_to_send()))

    def data_received(self, data: bytes) -> None:
        self.protocol.receive_data(data)
        parts = []
        for event in self.protocol.events_received():
            if isinstance(event, Frame):
                parts.append(event.data)
            elif isinstance(event, Request):
                self.protocol.send_response(self.protocol.accept(event))
                self.flush()
        payload = b"".join(parts)
        if not payload or self.clock is None:
            return
        self.clock.took(len(payload))
        if not isinstance(self.protocol, ClientProtocol):
            self.protocol.send_binary(payload)
            self.flush()


async def read_sansio(clock: Clock, folder: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    context = client_context(folder)
    name = "127.0.0.1" if context else None
    transport, _ = await loop.create_connection(
        lambda: SansIo(clock, port), "127.0.0.1", port, ssl=context, server_hostname=name
    )
    await clock.done
    transport.abort()


async def read_picows(clock: Clock, folder: str, port: int) -> None:
    from picows import WSListener, ws_connect

    class Listener(WSListener):  # type: ignore[misc]
        def on_ws_connected(self, transport: Any) -> None:
            self.parts: list[bytes] = []

        def on_ws_frame(self, transport: Any, frame: Any) -> None:
            self.parts.append(frame.get_payload_as_bytes())
            if frame.last_in_buffer:  # the bytes are handed over once for what came at once, as ours are
                clock.took(len(b"".join(self.parts)))
                self.parts.clear()

    url = f"{'ws' if folder == '-' else 'wss'}://127.0.0.1:{port}{PATH}"
    transport, _ = await ws_connect(
        Listener, url, ssl_context=client_context(folder), extra_headers={"Sec-WebSocket-Protocol": "mqtt"}
    )
    await clock.done
    transport.disconnect(graceful=False)


# --- servers that echo --------------------------------------------------------------------


async def echo_ours(clock: Clock, folder: str) -> None:
    from tesaiot_connect import Connection, ServerTls, Url
    from tesaiot_connect_wss import Wss

    async def handler(connection: Connection) -> None:
        stream = await connection.accept_stream()
        while not clock.done.done():
            data = await stream.receive(WRITE)
            await stream.send(data)
            clock.took(len(data))

    tls = (
        None
        if folder == "-"
        else ServerTls(certificate=Path(folder, "cert.pem"), key=Path(folder, "key.pem"))
    )
    url = Url("ws" if tls is None else "wss", "127.0.0.1", 0, PATH)
    async with Wss(url, server_tls=tls).listen(handler) as bound:
        print("port", Url.parse(bound).port, flush=True)
        await clock.done


async def echo_websockets(clock: Clock, folder: str) -> None:
    from websockets.asyncio.server import serve

    async def handler(socket: Any) -> None:
        while not clock.done.done():
            data = await socket.recv(decode=False)
            await socket.send(data)
            clock.took(len(data))

    async with serve(
        handler,
        "127.0.0.1",
        0,
        subprotocols=["mqtt"],
        compression=None,
        ssl=server_context(folder),
        close_timeout=0.1,  # type: ignore[list-item]
    ) as server:
        print("port", server.sockets[0].getsockname()[1], flush=True)
        await clock.done


async def echo_sansio(clock: Clock, folder: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SansIo(clock), "127.0.0.1", 0, ssl=server_context(folder))
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await clock.done


async def echo_picows(clock: Clock, folder: str) -> None:
    from picows import WSListener, WSMsgType, WSUpgradeRequest, ws_create_server

    class Listener(WSListener):  # type: ignore[misc]
        def on_ws_connected(self, transport: Any) -> None:
            self.parts: list[bytes] = []

        def on_ws_frame(self, transport: Any, frame: Any) -> None:
            self.parts.append(frame.get_payload_as_bytes())
            if frame.last_in_buffer:
                payload = b"".join(self.parts)
                self.parts.clear()
                transport.send(WSMsgType.BINARY, payload)
                clock.took(len(payload))

        def pause_writing(self) -> None:
            """The others of this benchmark stop reading here, or buffer; this one buffers."""

        def resume_writing(self) -> None:
            pass

    def accept(_request: WSUpgradeRequest) -> WSListener:
        return Listener()

    server = await ws_create_server(accept, "127.0.0.1", 0, ssl=server_context(folder))
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await clock.done


def main() -> None:
    side, *words = sys.argv[1:]
    if side in ("feed", "send"):
        size, frames, folder, *port = words
        (feed if side == "feed" else send)(int(size), int(frames), folder, *map(int, port))  # type: ignore[operator]
        return
    who, loop, size, frames, folder, *port = words
    _, count = block(int(size), mask=side == "echo")
    sent = int(frames) // count * count

    async def run() -> None:
        clock = Clock(sent * int(size))
        await globals()[f"{side}_{who}"](clock, folder, *map(int, port))
        print("cpu", await clock.done / sent * 1e9, flush=True)

    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
