"""One side of the endpoint benchmark: 100-byte frames, 20 a write, over one QUIC stream on loopback.

    endpoint.py serve ours|aioquic FRAMES DATAGRAM FOLDER    prints "port N", then "rate FRAMES_PER_SECOND"
    endpoint.py send  ours|aioquic FRAMES DATAGRAM FOLDER PORT

FOLDER holds ca.pem, cert.pem and key.pem. The rate counts from the first byte read to the last.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

FRAME = bytes(100)
WRITE = FRAME * 20


async def serve_ours(frames: int, datagram: int, folder: Path) -> None:
    from tesaiot_connect import Connection, ServerTls, Url
    from tesaiot_connect_quic_aioquic import QuicAioquic

    done = asyncio.Event()

    async def handler(connection: Connection) -> None:
        stream = await connection.accept_stream()
        got = len(await stream.receive())
        began = time.perf_counter()
        while got < frames * len(FRAME):
            got += len(await stream.receive())
        print("rate", frames / (time.perf_counter() - began), flush=True)
        await stream.send(b"done")
        await stream.receive()
        done.set()

    tls = ServerTls(certificate=folder / "cert.pem", key=folder / "key.pem")
    recipe = QuicAioquic(Url.parse("quic://127.0.0.1:0"), server_tls=tls, max_datagram_size=datagram)
    async with recipe.listen(handler) as url:
        print("port", Url.parse(url).port, flush=True)
        await done.wait()


async def send_ours(frames: int, datagram: int, folder: Path, port: int) -> None:
    from tesaiot_connect import TlsOptions, Url
    from tesaiot_connect_quic_aioquic import QuicAioquic

    recipe = QuicAioquic(
        Url("quic", "127.0.0.1", port),
        tls=TlsOptions(ca_file=folder / "ca.pem"),
        max_datagram_size=datagram,
        zero_rtt=False,
        ticket_folder=folder / "tickets",
    )
    connection = await recipe.connect()
    stream = await connection.open_stream()
    for _ in range(frames // 20):
        await stream.send(WRITE)
    await stream.receive()
    await connection.aclose()


async def serve_aioquic(frames: int, datagram: int, folder: Path) -> None:
    from aioquic.asyncio import serve
    from aioquic.quic.configuration import QuicConfiguration

    done = asyncio.Event()
    tasks = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = len(await reader.read(65536))
        began = time.perf_counter()
        while got < frames * len(FRAME):
            got += len(await reader.read(65536))
        print("rate", frames / (time.perf_counter() - began), flush=True)
        writer.write(b"done")
        await reader.read()
        done.set()

    def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(handle(reader, writer)))

    configuration = QuicConfiguration(
        is_client=False,
        alpn_protocols=["mqtt"],
        max_datagram_size=datagram,
        congestion_control_algorithm="cubic",
    )
    configuration.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server = await serve("127.0.0.1", 0, configuration=configuration, stream_handler=handler)
    transport: Any = server._transport
    print("port", transport.get_extra_info("sockname")[1], flush=True)
    await done.wait()
    server.close()


async def send_aioquic(frames: int, datagram: int, folder: Path, port: int) -> None:
    from aioquic.asyncio import connect
    from aioquic.quic.configuration import QuicConfiguration

    configuration = QuicConfiguration(
        alpn_protocols=["mqtt"], max_datagram_size=datagram, congestion_control_algorithm="cubic"
    )
    configuration.load_verify_locations(str(folder / "ca.pem"))
    async with connect("127.0.0.1", port, configuration=configuration) as client:
        reader, writer = await client.create_stream()
        stream_id = writer.get_extra_info("stream_id")
        for count in range(frames // 20):
            writer.write(WRITE)
            if count % 8 == 7:  # it has no backpressure; less unacknowledged than this is slower, more too
                await asyncio.sleep(0)
                sender = client._quic._streams[stream_id].sender
                while sender._buffer_stop - sender._buffer_start > 256 * 1024:
                    await asyncio.sleep(0)
        await reader.read(4)
        writer.write_eof()


def main() -> None:
    side, who, frames, datagram, folder, *port = sys.argv[1:]
    work = {
        ("serve", "ours"): serve_ours,
        ("serve", "aioquic"): serve_aioquic,
        ("send", "ours"): send_ours,
        ("send", "aioquic"): send_aioquic,
    }[side, who]
    asyncio.run(work(int(frames), int(datagram), Path(folder), *map(int, port)))  # type: ignore[operator]


if __name__ == "__main__":
    main()
