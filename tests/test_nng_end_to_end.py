"""MQTT through `quic_nng`, from our client or command to our broker: what arrives, and what is said where it
cannot.

Each test runs with the stand-in for NanoSDK and, where TESAIOT_NNG_LIBRARY names one, with the real library.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import nng_clock
import nng_ends
import nng_stub
import pytest
from loops import Run
from nng_ends import (
    CLOSED_PORT,
    HOST,
    PATIENCE,
    Ends,
    client,
    gone,
    read,
    serving,
    speaking,
    subscriber,
    until,
)
from udp_gate import Gate

from tesaiot_connect import (
    BrokerOptions,
    Client,
    ConnectFailed,
    Credentials,
    Disconnected,
    Duration,
    Message,
    NegotiationOptions,
    Negotiator,
    PathLost,
    Peer,
    Refused,
    State,
    Subscription,
    TlsOptions,
    Unsupported,
    Url,
    WillOptions,
)
from tesaiot_connect.access import Anybody
from tesaiot_connect.mqtt import Acknowledged, Connected, R, Suback
from tesaiot_connect.testing import Certificates
from tesaiot_connect_quic_nng import connection as nng_connection, supervisor
from tesaiot_connect_tcp_tls import TcpTls

TOOL = Path(sys.executable).with_name("tesaiot-connect")
COUNT = 2000
WILL = WillOptions(topic="t/will", payload="gone")
SOON = Duration(1.0)
NEVER = Duration(nng_clock.LONG)
"""Unless the clock is put forward."""
pytestmark = pytest.mark.skipif(os.name != "posix", reason="quic_nng is for POSIX systems")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nng")


@pytest.fixture(params=nng_ends.NAMES)
def ends(request: pytest.FixtureRequest, certificates: Certificates, installation: Path) -> Ends:
    return nng_ends.ends(request.param, certificates, installation)


@pytest.fixture
def stub(certificates: Certificates, installation: Path) -> Ends:
    """For faults that only the stand-in has to order."""
    return nng_ends.ends("stub", certificates, installation)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[supervisor.Worker]:
    """Of all connections, from when they are started. They have clocks that can be put forward, and look at
    them often."""
    workers: list[supervisor.Worker] = []

    def worker(place: str, *, patience: float) -> supervisor.Worker:
        workers.append(supervisor.Worker(place, patience=patience))
        return workers[-1]

    monkeypatch.setattr(nng_connection, "Worker", worker)
    monkeypatch.setattr(supervisor, "COMMAND", nng_clock.COMMAND)
    monkeypatch.setattr(supervisor, "_PING", 0.05)
    return workers


@asynccontextmanager
async def hours_going_by(workers: list[supervisor.Worker]) -> AsyncIterator[None]:
    """Again and again: what a worker hears of late may begin its time anew."""

    async def go() -> None:
        while True:
            for one in workers:
                if one.loaded is not None and not one.gone.done():
                    nng_clock.forward(one.pid)
            await asyncio.sleep(0.1)

    going = asyncio.create_task(go())
    try:
        yield
    finally:
        going.cancel()
        await asyncio.wait([going])


@pytest.fixture
def run() -> Run:
    def run(main: Any) -> Any:
        async def bounded() -> None:
            async with asyncio.timeout(2 * PATIENCE):
                await main
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left behind: {left}"

        asyncio.run(bounded())

    return run


class Doorman:
    """Lets in who knows the password."""

    async def begin(self, peer: Peer, credentials: Credentials, /) -> Anybody:
        if credentials.password != b"right":
            raise Refused("no", reason_code=R.BAD_USER_NAME_OR_PASSWORD, permanent=True)
        return Anybody()


class Password:
    """Auth of a client."""

    def __init__(self, password: bytes) -> None:
        self._credentials = Credentials(username="device", password=password)

    async def begin(self) -> Any:
        return self

    async def identity(self) -> None:
        return None

    @property
    def credentials(self) -> Credentials:
        return self._credentials

    async def respond(self, data: bytes, /) -> bytes:
        raise AssertionError

    async def finish(self, data: bytes, /) -> None:
        raise AssertionError


def numbered(count: int, qos: int, topic: str = "t/numbers") -> list[Message]:
    return [Message(topic, b"%d" % number, qos) for number in range(count)]


# --- out


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_all_arrives_once_and_in_order(ends: Ends, run: Run, qos: int) -> None:
    async def main() -> None:
        async with serving(ends) as served, subscriber(served.tcp, "t/#") as got:
            async with client(ends.recipe(served.url)) as publisher:
                messages, at = numbered(COUNT, qos), 0
                for size in (1, 2, 700, COUNT):
                    await publisher.publish(messages[at : at + size])
                    at += size
                assert publisher.status.published == COUNT
                await publisher.publish([Message("t/end", b"", 1)])
                await got.until(lambda: got.messages and got.messages[-1].topic == "t/end")
                assert publisher.status.connects == 1
        assert got.payloads == [one.payload for one in messages] + [b""]
        assert {one.qos for one in got.messages[:-1]} == {qos}

    run(main())


def test_payloads_and_topics_of_all_sorts(ends: Ends, run: Run) -> None:
    big = os.urandom(300 * 1024)
    sent = [
        Message(topic, payload, qos)
        for topic in ("t/a", "t/ü/温度/🌡", "t//", "t/" + "x" * 2000)
        for payload in (b"", bytes(range(100)), b"\0", big)
        for qos in (0, 1, 2)
    ]

    async def main() -> None:
        async with serving(ends) as served, subscriber(served.tcp, "t/#") as got:
            async with client(ends.recipe(served.url)) as publisher:
                await publisher.publish(sent)
                await publisher.publish(sent[::-1])
                await got.count(2 * len(sent))
                assert publisher.status.connects == 1
        assert got.messages == sent + sent[::-1]

    run(main())


def test_retained_messages(ends: Ends, run: Run) -> None:
    kept = [Message(f"t/kept/{qos}", b"%d" % qos, qos, True) for qos in (0, 1, 2)]

    async def main() -> None:
        async with serving(ends) as served:
            async with client(ends.recipe(served.url)) as publisher:
                await publisher.publish(kept)
                async with subscriber(served.tcp, "t/#") as got:
                    assert sorted(await got.count(3), key=lambda one: one.topic) == kept
                async with publisher.subscribe(["t/kept/+"]) as reader:
                    found = await read(reader, 3)
                assert {(one.topic, one.retain) for one in found} == {(one.topic, True) for one in kept}
                await publisher.publish([Message("t/kept/1", b"", 1, True)])
            assert served.broker.stats.retained == 2

    run(main())


def test_a_burst_is_not_lost_where_the_queue_is_small(
    ends: Ends, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "stub.log"
    for name, value in nng_stub.environment(send_delay=20, log=log).items():
        monkeypatch.setenv(name, value)
    count = 10_000

    async def main() -> None:
        async with serving(ends) as served, subscriber(served.tcp, "t/#") as got:
            async with client(ends.recipe(served.url)) as publisher:
                await publisher.publish(numbered(count, 0))
                await publisher.publish([Message("t/end", b"", 1)])
                await got.count(count + 1)
        assert got.payloads == [b"%d" % number for number in range(count)] + [b""]
        assert not nng_stub.counters(log)["dropped"]

    run(main())


@pytest.mark.parametrize("window", [1, 16])
def test_the_window_bounds_what_is_unacknowledged(
    stub: Ends, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, window: int
) -> None:
    log = tmp_path / "stub.log"
    faults = nng_stub.environment(lose_all_acks_after=0, once=tmp_path / "once", log=log)
    for name, value in faults.items():
        monkeypatch.setenv(name, value)

    async def main() -> None:
        async with serving(stub) as served, subscriber(served.tcp, "t/#") as got:
            dialer = nng_ends.Watched(stub.recipe(served.url, window=window))
            async with client(dialer) as publisher:
                sending = asyncio.create_task(publisher.publish(numbered(200, 1)))
                await until(lambda: nng_stub.counters(log)["ack_lost"] >= window)
                await asyncio.sleep(0.3)  # for more, if there were any
                assert nng_stub.counters(log)["publish"] == window
                os.kill(dialer.connections[0].pid, signal.SIGKILL)
                await sending
                await got.until(lambda: len(set(got.payloads)) == 200)

    run(main())


def test_a_will_is_published_when_the_client_closes_and_when_the_worker_dies(ends: Ends, run: Run) -> None:
    async def main() -> None:
        async with serving(ends) as served, subscriber(served.tcp, "t/#") as got:
            async with client(ends.recipe(served.url), will=WILL) as first:
                await first.publish([Message("t/a", b"last words", 1)])
            assert [(one.topic, one.payload) for one in await got.count(2)] == [
                ("t/a", b"last words"),
                ("t/will", b"gone"),
            ]
            # over QUIC the end of a killed peer is silence
            dialer = nng_ends.Watched(ends.recipe(served.url, idle_timeout=SOON, keepalive=Duration(0.0)))
            async with client(dialer, will=WILL) as second:
                await second.connected()
                os.kill(dialer.connections[0].pid, signal.SIGKILL)
                await got.count(3)
                await until(lambda: second.status.connects == 2)
            assert {one.topic for one in got.messages[2:]} == {"t/will"}

    run(main())


# --- in


@pytest.mark.parametrize("early", [False, True])
def test_what_comes_in(ends: Ends, run: Run, early: bool) -> None:
    async def main() -> None:
        async with serving(ends, options=BrokerOptions(max_inflight=100)) as served:
            recipe = ends.recipe(served.url, accept_early_acks=early)
            async with client(recipe) as listening, listening.subscribe([Subscription("t/#", 2)]) as reader:
                assert await reader.grant() == (1 if early else 0,)
                sent = numbered(5000, 1)
                await served.broker.publish(sent)
                found = await read(reader, len(sent))
                assert [one.payload for one in found] == [one.payload for one in sent]
                assert {one.qos for one in found} == {1 if early else 0}
                await served.broker.publish(
                    [Message("t/ü", os.urandom(300 * 1024), qos) for qos in (0, 1, 2)]
                )
                assert {len(one.payload) for one in await read(reader, 3)} == {300 * 1024}
                assert listening.status.connects == 1

    run(main())


def test_subscribing_and_unsubscribing(ends: Ends, run: Run) -> None:
    async def main() -> None:
        async with serving(ends) as served, speaking(ends.recipe(served.url)) as speaker:
            await speaker.until(Connected)
            engine = speaker.engine
            engine.subscribe([Subscription("t/+", 2), Subscription("ü/#", 0)])
            assert list((await speaker.until(Suback)).codes) == [0, 0]
            assert served.broker.stats.subscriptions == 2
            engine.unsubscribe(["t/+"])
            await speaker.until(Suback)
            assert served.broker.stats.subscriptions == 1
            engine.unsubscribe(["ü/#", "never/there"])
            await speaker.until(Suback)
            assert served.broker.stats.subscriptions == 0

    run(main())


def test_a_session_is_kept(ends: Ends, run: Run) -> None:
    async def main() -> None:
        async with serving(ends) as served, subscriber(served.tcp, "t/#") as got:
            recipe = ends.recipe(served.url, accept_early_acks=True)  # the broker keeps no QoS 0
            async with client(recipe, client_id="kept") as first:
                assert not (await first.connected()).session_present
                async with first.subscribe(["in/#"]) as reader:
                    await reader.grant()
                await first.publish([Message("t/a", b"1", 2)])
            await until(lambda: served.broker.stats.clients == 1)
            await served.broker.publish([Message("in/a", b"meanwhile", 1)])
            async with client(recipe, client_id="kept") as second, second.subscribe(["in/#"]) as reader:
                assert (await second.connected()).session_present
                assert [one.payload for one in await read(reader, 1)] == [b"meanwhile"]
                await second.publish([Message("t/a", b"2", 2)])
            # packet identifiers begin anew: the broker would take a QoS 2 message for one it has
            assert [(one.payload, one.qos) for one in await got.count(2)] == [(b"1", 2), (b"2", 1)]

    run(main())


# --- what fails


def test_a_wrong_password_is_refused(ends: Ends, run: Run) -> None:
    async def main() -> None:
        async with serving(ends, authenticator=Doorman()) as served:
            dialer, options = nng_ends.Watched(ends.recipe(served.url)), nng_ends.PATIENT
            async with Client(dialer, options, auth=Password(b"wrong")) as wrong:
                with pytest.raises(Disconnected) as failed:
                    await wrong.connected(once=True)
                if ends.name == "stub":
                    assert isinstance(failed.value, Refused)
                    assert failed.value.permanent
                    assert failed.value.reason_code == R.BAD_USER_NAME_OR_PASSWORD
                else:  # NanoSDK drops what comes together with the end of the stream
                    assert "before CONNACK" in str(failed.value)
            async with Client(dialer, options, auth=Password(b"right")) as right:
                await right.connected(once=True)
            await until(lambda: all(gone(one.pid) for one in dialer.connections))

    run(main())


def test_a_foreign_authority_is_refused(
    ends: Ends, run: Run, tmp_path: Path, workers: list[supervisor.Worker]
) -> None:
    if ends.name == "stub":
        pytest.skip("the stand-in has no TLS")
    foreign = TlsOptions(ca_file=Certificates(tmp_path / "foreign", name="somebody else").ca_file)

    async def main() -> None:
        async with serving(ends) as served:
            async with hours_going_by(workers):
                with pytest.raises(ConnectFailed, match="ca_file"):
                    await ends.recipe(served.url, tls=foreign).connect()
            connection = await ends.recipe(served.url, tls=TlsOptions(verify="none", insecure=True)).connect()
            assert not connection.peer.secure
            await connection.aclose()

    run(main())


def test_a_dead_port_leaves_the_turn_to_the_next_endpoint(
    ends: Ends, run: Run, tmp_path: Path, workers: list[supervisor.Worker]
) -> None:
    async def main() -> None:
        dead = ends.recipe(f"quic://{HOST}:{CLOSED_PORT}")
        async with hours_going_by(workers):
            with pytest.raises(ConnectFailed, match="no QUIC handshake") as failed:
                await dead.connect()
        assert failed.value.stage == "reach"
        dead = ends.recipe(f"quic://{HOST}:{CLOSED_PORT}", connect_timeout=SOON)
        async with serving(ends) as served:
            dialer = Negotiator(
                [dead, TcpTls(Url.parse(served.tcp))], NegotiationOptions(memory_folder=tmp_path / "memory")
            )
            async with Client(dialer) as negotiated:
                await negotiated.publish([Message("t/a", b"1", 1)])
                status = negotiated.status
        assert (status.transport, status.version) == ("tcp_tls", "5")
        assert [one.outcome for one in status.attempts] == ["failed", "won"]

    run(main())


def test_mqtt_5_is_refused_here_and_3_1_1_taken(ends: Ends, run: Run) -> None:
    async def main() -> None:
        connects: list[str] = []

        class Counting(Doorman):
            async def begin(self, peer: Peer, credentials: Credentials, /) -> Anybody:
                connects.append(peer.transport)
                return Anybody()

        async with serving(ends, authenticator=Counting()) as served:
            async with client(ends.recipe(served.url), protocol="auto") as automatic:
                await automatic.connected(once=True)
                assert automatic.status.version == "3.1.1"
                assert len(connects) == 1
            async with client(ends.recipe(served.url), protocol="5") as strict:
                with pytest.raises(Refused, match="version of MQTT") as refused:
                    await strict.connected(once=True)
                assert refused.value.reason_code == R.UNSUPPORTED_PROTOCOL_VERSION
            assert len(connects) == 1

    run(main())


def test_host_names_are_not_checked_without_a_word(ends: Ends, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(Unsupported, match="verify_hostname"):
            await ends.recipe(f"quic://{HOST}:{CLOSED_PORT}", verify_hostname=True).connect()

    run(main())


def test_the_client_is_back_after_a_restart_of_the_broker(ends: Ends, run: Run) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            async with serving(ends) as served, subscriber(served.tcp, "t/#") as got:
                port = Url.parse(served.url).port or 0
                publisher = await stack.enter_async_context(client(ends.recipe(served.url)))
                await publisher.publish(numbered(50, 1))
                await got.count(50)
            await until(lambda: publisher.status.state != "connected")
            sending = asyncio.create_task(publisher.publish([Message("t/a", b"kept back", 1)]))
            async with serving(ends, port=port) as served:
                await sending
                await publisher.publish(numbered(50, 2))
                assert publisher.status.connects == 2

    run(main())


def test_what_a_connection_says_of_itself(ends: Ends, run: Run) -> None:
    async def main() -> None:
        async with serving(ends) as served:
            dialer = nng_ends.Watched(ends.recipe(served.url))
            async with client(dialer) as talking:
                await talking.publish(numbered(10, 1))
                (connection,) = dialer.connections
                assert connection.peer == Peer(
                    served.url.removeprefix("quic://"),
                    "quic_nng",
                    secure=True,
                    alpn="mqtt",
                    tls_version="TLSv1.3",
                )
                assert (connection.multistream, connection.early_sent) == (False, False)
                status = connection.status()
                assert status.state is State.OPEN
                assert status.bytes_sent > 0
                assert status.bytes_received > 0
                assert status.close_reason is None
                assert talking.status.endpoint == connection.peer.address
            reason = await connection.wait_closed()
            assert (reason.code, reason.by_peer) == (0, False)
            assert connection.status().state is State.CLOSED
            await until(lambda: gone(connection.pid))

    run(main())


@asynccontextmanager
async def falling_silent(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a URL, and what makes the server silent: with the real library UDP is dropped; with the other
    acknowledgements are."""
    async with serving(ends) as served:
        if ends.name == "stub":
            monkeypatch.setenv("TESAIOT_STUB_LOSE_ALL_ACKS_AFTER", "1")
            yield served.url, lambda: None
            return
        async with Gate(Url.parse(served.url).port or 0) as gate:
            gate.open = True
            yield f"quic://{HOST}:{gate.port}", lambda: setattr(gate, "open", False)


def test_a_server_that_falls_silent(
    ends: Ends, run: Run, monkeypatch: pytest.MonkeyPatch, workers: list[supervisor.Worker]
) -> None:
    async def main() -> None:
        async with falling_silent(ends, monkeypatch) as (url, silence), AsyncExitStack() as stack:
            recipe = ends.recipe(url, ack_timeout=NEVER)
            async with client(recipe, keepalive=Duration(0.0)) as publisher:
                await publisher.publish(numbered(1, 1))
                assert not publisher.status.last_error
                silence()
                sending = asyncio.create_task(publisher.publish(numbered(5, 1)))
                await stack.enter_async_context(hours_going_by(workers))  # till all is closed
                await until(lambda: publisher.status.last_error)
                assert "not acknowledged" in publisher.status.last_error
                sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending

    run(main())


def test_silence_is_a_lost_path(
    ends: Ends, run: Run, monkeypatch: pytest.MonkeyPatch, workers: list[supervisor.Worker]
) -> None:
    async def main() -> None:
        async with falling_silent(ends, monkeypatch) as (url, silence):
            async with speaking(ends.recipe(url, ack_timeout=NEVER)) as speaker:
                await speaker.until(Connected)
                speaker.engine.publish(numbered(1, 1), [0])
                await speaker.until(Acknowledged)
                silence()
                speaker.engine.publish(numbered(1, 1), [1])
                async with hours_going_by(workers):
                    with pytest.raises(PathLost, match="not acknowledged"):
                        await speaker.until(Acknowledged)
                reason = await speaker.connection.wait_closed()
                assert "not acknowledged" in reason.text

    run(main())


# --- the commands


async def command(*words: object, stdin: bytes = b"") -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *map(str, (TOOL, *words)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def test_the_commands(ends: Ends, run: Run, tmp_path: Path) -> None:
    lines = [json.dumps({"topic": f"in/{at % 3}", "value": {"n": at}}) for at in range(300)]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines) + "\n")

    async def main() -> None:
        async with serving(ends) as served, subscriber(served.tcp, "#") as got:
            config = tmp_path / "pipeline.toml"
            config.write_text(
                f"[connections.nng]\nendpoints = [{ends.endpoint(served.url)}]\n"
                f'[sources.file]\ntype = "jsonl"\npath = "{file}"\n'
                '[sinks.broker]\ntype = "mqtt"\nconnection = "nng"\n'
                '[pipelines.up]\nfrom = "file"\nto = ["broker"]\n'
            )
            code, said, errors = await command("check", config)
            assert code == 0, said + errors
            assert "by quic_nng, MQTT 3.1.1" in said

            listening = asyncio.create_task(command("sub", "-c", config, "nng", "in/#", "-C", 2))
            await until(lambda: served.broker.stats.subscriptions == 2, "sub does not subscribe")
            for words, stdin in (("-q", 2, "in/a", "hällo"), b""), (("-q", 1, "-l", "in/a"), b"one\n"):
                code, _, errors = await command("pub", "-c", config, "nng", *words, stdin=stdin)
                assert code == 0, errors
            code, said, errors = await listening
            assert (code, said) == (0, "in/a hällo\nin/a one\n"), errors
            await got.count(2)
            got.messages.clear()

            code, _, errors = await command("run", config, "--once")
            assert code == 0, errors
            wanted = [json.loads(line) for line in lines]
            found = [(one.topic, json.loads(one.payload)) for one in await got.count(len(lines))]
            assert found == [(one["topic"], one["value"]) for one in wanted]

    run(main())
