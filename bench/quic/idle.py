"""Memory of idle connections: a listener that tells its size, and the clients that it holds.

    idle.py serve WHO FOLDER CLIENTS     WHO is ours or aioquic; prints "port N", then its size in
                                         bytes for each line on stdin
    idle.py hold PORT CA CLIENTS         connects, uses a stream of each, prints "held", waits for stdin

FOLDER holds cert.pem and key.pem.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

_TOGETHER = 20


def resident() -> int:
    """Bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def lines() -> None:
    """Answers each line on stdin with the size of this process, until the end."""
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(resident(), flush=True)


async def serve_ours(folder: Path, clients: int) -> None:
    from tesaiot_connect import Connection, ServerTls, Url
    from tesaiot_connect_quic_aioquic import QuicAioquic

    async def echo(connection: Connection) -> None:
        stream = await connection.accept_stream()
        while data := await stream.receive():
            await stream.send(data)

    tls = ServerTls(certificate=folder / "cert.pem", key=folder / "key.pem")
    recipe = QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=tls, max_connections=2 * clients)
    async with recipe.listen(echo) as url:
        print("port", Url.parse(url).port, flush=True)
        await lines()


async def serve_aioquic(folder: Path, clients: int) -> None:
    from aioquic.asyncio import serve
    from aioquic.quic.configuration import QuicConfiguration

    tasks = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(echo(reader, writer)))

    configuration = QuicConfiguration(is_client=False, alpn_protocols=["mqtt"], idle_timeout=600)
    configuration.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server = await serve("127.0.0.1", 0, configuration=configuration, stream_handler=handler)
    transport: Any = server._transport
    print("port", transport.get_extra_info("sockname")[1], flush=True)
    await lines()


async def hold(port: int, ca: Path, clients: int) -> None:
    from tesaiot_connect import TlsOptions, Url
    from tesaiot_connect_quic_aioquic import QuicAioquic

    held: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = QuicAioquic(
            Url("quic", "127.0.0.1", port),
            tls=TlsOptions(ca_file=ca),
            ticket_folder=Path(folder),
            socket_buffer=32_768,
            connect_timeout=60,
        )

        async def one() -> None:
            connection = await recipe.connect()
            stream = await connection.open_stream()
            await stream.send(b"hello")
            await stream.receive()
            held.append((connection, stream))

        for number in range(0, clients, _TOGETHER):
            await asyncio.gather(*(one() for _ in range(min(_TOGETHER, clients - number))))
        print("held", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        for connection, _ in held:
            connection.abort()


def main() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    what, *words = sys.argv[1:]
    if what == "hold":
        port, ca, clients = words
        asyncio.run(hold(int(port), Path(ca), int(clients)))
    else:
        who, folder, clients = words
        asyncio.run((serve_ours if who == "ours" else serve_aioquic)(Path(folder), int(clients)))


if __name__ == "__main__":
    main()
