"""The QUIC bridge proved by itself: mosquitto's own clients reach mosquitto through two of them."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
import quic_bridge
from aioquic.asyncio import serve
from aioquic.quic.configuration import QuicConfiguration
from netlab import Lab, require_namespaces
from quic_bridge import Bridge
from real_brokers import Mosquitto, program

from tesaiot_connect.testing import Certificates


@contextmanager
def server(to: int, certificates: Certificates, *, early: bool = False, port: int = 0) -> Iterator[Bridge]:
    own = certificates.server()
    with quic_bridge.server(
        f"127.0.0.1:{to}", own.certificate, own.key, early=early, listen=f"127.0.0.1:{port}"
    ) as bridge:
        yield bridge


def publish(port: int, topic: str, *arguments: str, text: str = "") -> None:
    tool = program("mosquitto_pub", "mosquitto-clients")
    command = [tool, "-p", str(port), "-t", topic, *arguments]
    subprocess.run(command, check=True, input=text, text=True, capture_output=True, timeout=60)


@contextmanager
def subscribed(port: int, topic: str, count: int, qos: int) -> Iterator[IO[str]]:
    """The output of a mosquitto_sub whose subscription is in force; it ends after `count` messages."""
    # a retained message is the answer to a subscription
    publish(port, topic, "-r", "-m", "kept", "-q", "1")
    tool = program("mosquitto_sub", "mosquitto-clients")
    command = [tool, "-p", str(port), "-t", topic, "-q", str(qos), "-C", str(count + 1), "-W", "120"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "kept\n"
            yield process.stdout
        finally:
            process.kill()


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_mosquitto_clients_reach_mosquitto(
    mosquitto: Mosquitto, certificates: Certificates, qos: int
) -> None:
    lines = "".join(f"{number}\n" for number in range(500))
    with (
        server(mosquitto.port, certificates) as to,
        quic_bridge.client(to.address, certificates.ca_file) as via,
        subscribed(via.port, f"bridge/{qos}", 500, qos) as output,
    ):
        publish(via.port, f"bridge/{qos}", "-q", str(qos), "-l", text=lines)
        assert output.read() == lines
        for number in (1, 2, 3):
            assert via.wait("closed", number)["error"] == ""
        assert {event["stream"] for event in to.events if event["event"] == "stream"} == {0}
        assert to.wait("connected", id=1)["alpn"] == "mqtt"


def test_the_second_connection_resumes(mosquitto: Mosquitto, certificates: Certificates) -> None:
    with (
        server(mosquitto.port, certificates) as to,
        quic_bridge.client(to.address, certificates.ca_file, resume=True) as via,
    ):
        for number in (1, 2):
            publish(via.port, "bridge/resume", "-m", "x", "-q", "1")
            for bridge in (via, to):
                connected = bridge.wait("connected", number)
                assert (connected["resumed"], connected["used_0rtt"]) == (number == 2, False)


def test_early_data_is_accepted_and_survives_a_rejection(
    mosquitto: Mosquitto, certificates: Certificates
) -> None:
    with server(mosquitto.port, certificates, early=True) as to:
        with quic_bridge.client(to.address, certificates.ca_file, early=True) as via:
            for number in (1, 2):
                publish(via.port, "bridge/early", "-m", "x", "-q", "1")
                used = [bridge.wait("connected", number)["used_0rtt"] for bridge in (via, to)]
                assert used == [number == 2] * 2
                via.wait("closed", number)  # the ticket for the next one has come by then
            # a server that started anew knows no tickets: the bytes go again after the handshake
            to.stop()
            with server(mosquitto.port, certificates, early=True, port=to.port) as anew:
                publish(via.port, "bridge/early", "-m", "x", "-q", "1")
                third = via.wait("connected", 3)
                assert (third["early"], third["used_0rtt"], third["resumed"]) == (True, False, False)
                assert anew.wait("connected")["used_0rtt"] is False
                assert via.wait("closed", 3)["error"] == ""


def test_ended_connections_leave_nothing_open(mosquitto: Mosquitto, certificates: Certificates) -> None:
    with (
        server(mosquitto.port, certificates) as to,
        quic_bridge.client(to.address, certificates.ca_file) as via,
    ):
        folders = [Path(f"/proc/{bridge.process.pid}/fd") for bridge in (to, via)]
        publish(via.port, "bridge/open", "-m", "x", "-q", "1")
        via.wait("closed")
        to.wait("closed")
        before = [len(list(folder.iterdir())) for folder in folders]
        for _ in range(20):
            publish(via.port, "bridge/open", "-m", "x", "-q", "1")
        via.wait("closed", 21)
        to.wait("closed", 21)
        # the last ones may still be closing
        deadline = time.monotonic() + 20
        while any(
            len(list(folder.iterdir())) >= count + 10 for folder, count in zip(folders, before, strict=True)
        ):
            assert time.monotonic() < deadline, "sockets stay open"
            time.sleep(0.01)


def test_a_foreign_authority_is_refused(certificates: Certificates, tmp_path: Path) -> None:
    foreign = Certificates(tmp_path / "foreign", name="somebody else")
    with (
        server(1, certificates) as to,
        quic_bridge.client(to.address, foreign.ca_file) as via,
        socket.create_connection(("127.0.0.1", via.port)) as tcp,
    ):
        assert tcp.recv(1) == b""
        assert "authority" in via.wait("failed")["error"]
        assert to.events[1:] == []


def test_each_direction_ends_on_its_own(certificates: Certificates) -> None:
    size = 1 << 20
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        server(listener.getsockname()[1], certificates) as to,
        quic_bridge.client(to.address, certificates.ca_file) as via,
        socket.create_connection(("127.0.0.1", via.port)) as near,
    ):
        near.sendall(b"request")
        near.shutdown(socket.SHUT_WR)
        far, _ = listener.accept()
        with far, far.makefile("rb") as requests, near.makefile("rb") as answers:
            assert requests.read() == b"request"
            far.sendall(bytes(size))
            far.close()
            requests.close()
            assert len(answers.read()) == size
        assert via.wait("closed")["error"] == ""
        assert to.wait("stream_closed")["error"] == ""


def test_a_refused_dial_resets_the_stream(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with (
        server(port, certificates) as to,
        quic_bridge.client(to.address, certificates.ca_file) as via,
        socket.create_connection(("127.0.0.1", via.port)) as tcp,
    ):
        tcp.sendall(b"x")
        assert "refused" in to.wait("stream_closed")["error"]
        assert "stream 0" in via.wait("closed")["error"]


@contextmanager
def aioquic_server(host: str, to: int, certificates: Certificates) -> Iterator[int]:
    """The port of a QUIC server that follows its clients, which quic-go's does not; its streams go on to TCP.

    It runs in a thread, which belongs to the network namespace that the caller has entered.
    """
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["mqtt"])
    own = certificates.server(host)
    configuration.load_cert_chain(str(own.certificate), str(own.key))
    tasks: set[asyncio.Task[None]] = set()
    ready: list[tuple[int, Callable[[], object]]] = []
    listening = threading.Event()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.write_eof()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, on = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(copy(reader, on), copy(back, writer))
        on.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(carry(reader, writer))
        tasks.add(task)

    async def main() -> None:
        server = await serve(host, 0, configuration=configuration, stream_handler=accept)
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        port = server._transport.get_extra_info("sockname")[1]
        ready.append((port, lambda: loop.call_soon_threadsafe(stop.set)))
        listening.set()
        await stop.wait()
        server.close()
        await asyncio.gather(*tasks)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert listening.wait(20)
    port, stop = ready[0]
    try:
        yield port
    finally:
        stop()
        thread.join()


@pytest.mark.root
@pytest.mark.parametrize("change", ["rebind_nat", "move_client"])
def test_a_client_stays_connected_while_its_address_changes(
    certificates: Certificates, tmp_path: Path, change: str
) -> None:
    require_namespaces()
    rounds, size = 5, 200
    command = [program("mosquitto_pub", "mosquitto-clients"), "-t", "moving", "-q", "1", "-l"]
    with Lab() as lab, ExitStack() as stack:
        with lab.enter("sv"):
            broker = stack.enter_context(Mosquitto(tmp_path))
            port = stack.enter_context(aioquic_server(lab.server, broker.port, certificates))
            output = stack.enter_context(subscribed(broker.port, "moving", rounds * size, 1))
        with lab.enter("cl"):
            # Whoever has nothing to send learns nothing of it: an answer of the broker that is under way
            # while the NAT forgets is lost until the client sends something. Its PINGs do.
            via = stack.enter_context(
                quic_bridge.client(
                    f"{lab.server}:{port}", certificates.ca_file, arguments=["--keepalive", "1s"]
                )
            )
        publisher = lab.run("cl", [*command, "-p", str(via.port)], stdin=subprocess.PIPE, text=True)
        assert publisher.stdin is not None
        for number in range(rounds):
            lines = [f"{number} {line}\n" for line in range(size)]
            publisher.stdin.write("".join(lines))
            publisher.stdin.flush()
            if number:  # RFC 9000 section 9: not before the handshake is confirmed
                getattr(lab, change)()
            assert [output.readline() for _ in lines] == lines
        publisher.stdin.close()
        assert publisher.wait(60) == 0
        assert via.wait("closed")["error"] == ""
        assert [event["event"] for event in via.events] == ["listening", "connected", "closed"]
