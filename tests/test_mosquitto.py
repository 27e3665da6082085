"""Our client against the real mosquitto: QoS, TLS, client certificates, sessions, both versions."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Literal
from uuid import uuid4

import pytest
from real_brokers import Mosquitto, program

from tesaiot_connect.backoff import Backoff
from tesaiot_connect.client import Client, ClientOptions
from tesaiot_connect.errors import ConnectorError, Refused
from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt.packets import Subscription
from tesaiot_connect.negotiation import Negotiator
from tesaiot_connect.protocols import Auth, ClientCertificate, Credentials, Duration, Reader, Url
from tesaiot_connect.testing import Certificates
from tesaiot_connect.tls import TlsOptions
from tesaiot_connect_tcp_tls import TcpTls

Version = Literal["5", "3.1.1"]
both_versions = pytest.mark.parametrize("version", ["5", "3.1.1"])
every_qos = pytest.mark.parametrize("qos", [0, 1, 2])
SOON = Backoff(min=Duration(0.05), max=Duration(0.2))


class _Login:
    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials

    async def respond(self, data: bytes, /) -> bytes:
        raise AssertionError("nobody challenges here")

    async def finish(self, data: bytes, /) -> None:
        raise AssertionError("nobody challenges here")


class Identity:
    """The smallest auth: a certificate, a name and password, or both."""

    def __init__(
        self, certificate: ClientCertificate | None = None, user: str = "", password: str = ""
    ) -> None:
        self._certificate = certificate
        self._credentials = Credentials(user or None, password.encode() or None)

    async def begin(self) -> _Login:
        return _Login(self._credentials)

    async def identity(self) -> ClientCertificate | None:
        return self._certificate


def client(
    url: str,
    *,
    version: Version = "5",
    client_id: str = "",
    tls: TlsOptions | None = None,
    auth: Auth | None = None,
    **options: object,
) -> Client:
    transport = TcpTls(url=Url.parse(url), tls=tls or TlsOptions())
    settings = ClientOptions(client_id=client_id, protocol=version, reconnect=SOON, **options)  # type: ignore[arg-type]
    return Client(Negotiator([transport]), settings, auth=auth)


async def read(reader: Reader, count: int) -> list[Message]:
    """The next `count` messages, acknowledged."""
    messages: list[Message] = []
    while len(messages) < count:
        delivery = await reader.read()
        messages += delivery.batch.messages
        await delivery.ack()
    return messages


def run(main: object) -> None:
    async def within() -> None:
        async with asyncio.timeout(60):
            await main  # type: ignore[misc]

    asyncio.run(within())


@both_versions
@every_qos
def test_publish_and_receive(mosquitto: Mosquitto, version: Version, qos: int) -> None:
    """5,000 messages each way at every QoS: all of them, once, in order."""
    topic = f"device/{uuid4()}/telemetry/temperature"

    async def main() -> None:
        async with (
            client(mosquitto.url, version=version) as subscriber,
            subscriber.subscribe([Subscription(topic, qos=qos)]) as reader,
            client(mosquitto.url, version=version) as publisher,
        ):
            await ready(subscriber, publisher, reader, topic)
            payloads = [b"%d" % number for number in range(5000)]
            sending = asyncio.create_task(
                publisher.publish([Message(topic, payload, qos=qos) for payload in payloads])
            )
            messages = await read(reader, len(payloads))
            await sending
            assert [message.payload for message in messages] == payloads
            assert {message.qos for message in messages} == {qos}
            assert {message.topic for message in messages} == {topic}

    run(main())


async def ready(subscriber: Client, publisher: Client, reader: Reader, topic: str) -> None:
    """Returns when the subscription is in force: a first message came through. Reading dials."""
    first = asyncio.create_task(read(reader, 1))
    await subscriber.connected()
    while not first.done():
        await publisher.publish([Message(topic, b"ready?", qos=1)])
        await asyncio.wait([first], timeout=0.05)
    surplus = Message(topic, b"ready!", qos=1)
    await publisher.publish([surplus])
    while (await read(reader, 1))[-1].payload != surplus.payload:
        pass


@every_qos
def test_mosquitto_pub_to_us(mosquitto: Mosquitto, qos: int) -> None:
    topic = f"from/mosquitto_pub/{uuid4()}"
    tool = program("mosquitto_pub", "mosquitto-clients")

    async def main() -> None:
        async with (
            client(mosquitto.url) as subscriber,
            subscriber.subscribe([Subscription(topic, qos=2)]) as reader,
            client(mosquitto.url) as publisher,
        ):
            await ready(subscriber, publisher, reader, topic)
            command = [tool, "-p", str(mosquitto.port), "-t", topic, "-q", str(qos), "-m", "a value"]
            await asyncio.to_thread(subprocess.run, command, check=True)
            (message,) = await read(reader, 1)
            assert (message.payload, message.qos) == (b"a value", qos)

    run(main())


@every_qos
def test_us_to_mosquitto_sub(mosquitto: Mosquitto, qos: int) -> None:
    topic = f"to/mosquitto_sub/{uuid4()}"
    tool = program("mosquitto_sub", "mosquitto-clients")

    async def main() -> None:
        async with client(mosquitto.url) as publisher:
            await publisher.publish([Message(topic, b"a value", qos=qos, retain=True)])
            command = [
                tool,
                "-p",
                str(mosquitto.port),
                "-t",
                topic,
                "-q",
                "2",
                "-C",
                "1",
                "-W",
                "20",
                "-F",
                "%q %p",
            ]
            found = await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.PIPE)
            assert found.stdout.split(None, 1) == [b"%d" % qos, b"a value\n"]

    run(main())


def test_properties_pass_end_to_end(mosquitto: Mosquitto) -> None:
    topic = f"properties/{uuid4()}"
    properties = Properties(
        payload_format=1,
        content_type="application/json",
        response_topic="answers/here",
        correlation_data=b"\x00\x01",
        user=(("site", "bangkok"), ("site", "chiang mai")),
    )

    async def main() -> None:
        async with (
            client(mosquitto.url) as subscriber,
            subscriber.subscribe([Subscription(topic)]) as reader,
            client(mosquitto.url) as publisher,
        ):
            await ready(subscriber, publisher, reader, topic)
            await publisher.publish([Message(topic, b"{}", qos=1, properties=properties)])
            (message,) = await read(reader, 1)
            sent = message.properties
            assert (sent.payload_format, sent.content_type, sent.user) == (
                1,
                "application/json",
                properties.user,
            )
            assert (sent.response_topic, sent.correlation_data) == ("answers/here", b"\x00\x01")

    run(main())


@both_versions
def test_a_session_keeps_what_was_missed(mosquitto: Mosquitto, version: Version) -> None:
    """While we are away messages queue; unacknowledged ones come again; nothing is lost."""
    topic, name = f"session/{uuid4()}", f"resume-{uuid4()}"

    async def main() -> None:
        async with client(mosquitto.url, version=version) as publisher:
            async with (
                client(mosquitto.url, version=version, client_id=name) as subscriber,
                subscriber.subscribe([Subscription(topic)]) as reader,
            ):
                await ready(subscriber, publisher, reader, topic)
                await publisher.publish([Message(topic, b"unacknowledged", qos=1)])
                delivery = await reader.read()
                assert delivery.batch.messages[0].payload == b"unacknowledged"
            await publisher.publish([Message(topic, b"%d" % number, qos=1) for number in range(100)])
            async with (
                client(mosquitto.url, version=version, client_id=name) as subscriber,
                subscriber.subscribe([Subscription(topic)]) as reader,
            ):
                messages = await read(reader, 101)
                assert (await subscriber.connected()).session_present
                payloads = [message.payload for message in messages]
                assert payloads == [b"unacknowledged", *(b"%d" % number for number in range(100))]

    run(main())


@both_versions
def test_a_restarted_broker_is_found_again(folder: Path, version: Version) -> None:
    """The broker goes and comes back with its sessions: the same reader and publisher go on."""
    topic = "restart/t"

    async def main(broker: Mosquitto) -> None:
        async with (
            client(broker.url, version=version, client_id="reader") as subscriber,
            subscriber.subscribe([Subscription(topic)]) as reader,
            client(broker.url, version=version, client_id="writer") as publisher,
        ):
            await ready(subscriber, publisher, reader, topic)
            await asyncio.to_thread(broker.stop)
            sending = asyncio.create_task(
                publisher.publish([Message(topic, b"%d" % number, qos=1) for number in range(200)])
            )
            reading = asyncio.create_task(read(reader, 200))
            await asyncio.to_thread(broker.start)
            await sending
            assert {message.payload for message in await reading} == {b"%d" % number for number in range(200)}
            assert subscriber.status.connects == 2

    with Mosquitto(folder, persistence=True) as broker:
        run(main(broker))


def test_subscribes_again_when_the_session_was_lost(folder: Path) -> None:
    """Without persistence the restarted broker has forgotten us: the subscription is made again."""
    topic = "forgotten/t"

    async def main(broker: Mosquitto) -> None:
        async with (
            client(broker.url, client_id="reader") as subscriber,
            subscriber.subscribe([Subscription(topic)]) as reader,
            client(broker.url) as publisher,
        ):
            await ready(subscriber, publisher, reader, topic)
            await asyncio.to_thread(broker.stop)
            await asyncio.to_thread(broker.start)
            await ready(subscriber, publisher, reader, topic)
            assert not subscriber.status.session_present

    with Mosquitto(folder) as broker:
        run(main(broker))


@pytest.mark.parametrize("minimum", ["1.2", "1.3"])
def test_tls(folder: Path, certificates: Certificates, minimum: Literal["1.2", "1.3"]) -> None:
    server = certificates.server()
    lines = (f"certfile {server.certificate}", f"keyfile {server.key}", f"tls_version tlsv{minimum}")

    async def main(broker: Mosquitto) -> None:
        tls = TlsOptions(ca_file=certificates.ca_file, minimum_version=minimum)
        url = f"mqtts://localhost:{broker.port}"
        async with client(url, tls=tls) as publisher, client(url, tls=tls) as subscriber:
            async with subscriber.subscribe([Subscription("t")]) as reader:
                await ready(subscriber, publisher, reader, "t")
                await publisher.publish([Message("t", b"x" * 1_000_000, qos=1)])
                assert len((await read(reader, 1))[0].payload) == 1_000_000

    with Mosquitto(folder, *lines) as broker:
        run(main(broker))


def test_tls_refuses_a_server_of_an_unknown_authority(folder: Path, certificates: Certificates) -> None:
    stranger = Certificates(folder / "stranger", name="somebody else")
    server = certificates.server()

    async def main(broker: Mosquitto) -> None:
        url = Url.parse(f"mqtts://localhost:{broker.port}")
        with pytest.raises(ConnectorError, match="ca_file"):
            await TcpTls(url=url, tls=TlsOptions(ca_file=stranger.ca_file)).connect()

    with Mosquitto(folder, f"certfile {server.certificate}", f"keyfile {server.key}") as broker:
        run(main(broker))


def test_client_certificate(folder: Path, certificates: Certificates) -> None:
    """mosquitto takes the name of the user from the certificate, and refuses one who shows none."""
    server = certificates.server()
    lines = (
        f"certfile {server.certificate}",
        f"keyfile {server.key}",
        f"cafile {certificates.ca_file}",
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
    )

    async def main(broker: Mosquitto) -> None:
        url, tls = f"mqtts://localhost:{broker.port}", TlsOptions(ca_file=certificates.ca_file)
        identity = Identity(certificates.client("device-7"))
        async with client(url, tls=tls, auth=identity) as one:
            assert (await one.connected()).reason_code == 0
            await one.publish([Message("t", b"x", qos=1)])
        async with client(url, tls=tls) as stranger:
            waiting = asyncio.create_task(stranger.connected())
            while not stranger.status.last_error:
                await asyncio.wait([waiting], timeout=0.02)
            assert stranger.status.connects == 0
            assert "certificate" in stranger.status.last_error
            waiting.cancel()
        assert "device-7" in broker.log.read_text()

    with Mosquitto(folder, *lines) as broker:
        run(main(broker))


def test_wrong_password_is_refused_for_good(folder: Path) -> None:
    program("mosquitto", "mosquitto")
    passwords = folder / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(
        [program("mosquitto_passwd", "mosquitto"), "-b", str(passwords), "device", "right"],
        check=True,
        capture_output=True,
    )

    async def main(broker: Mosquitto) -> None:
        async with client(broker.url, auth=Identity(user="device", password="right")) as one:
            await one.publish([Message("t", b"x", qos=1)])
        for version in ("5", "3.1.1"):
            async with client(
                broker.url, version=version, auth=Identity(user="device", password="no")
            ) as one:
                with pytest.raises(Refused) as refused:
                    await one.connected()
                assert refused.value.permanent

    with Mosquitto(folder, "allow_anonymous false", f"password_file {passwords}") as broker:
        run(main(broker))


def test_retained(mosquitto: Mosquitto) -> None:
    topic = f"retained/{uuid4()}"

    async def main() -> None:
        async with client(mosquitto.url) as publisher:
            await publisher.publish([Message(topic, b"kept", qos=1, retain=True)])
        async with client(mosquitto.url) as subscriber, subscriber.subscribe([Subscription(topic)]) as reader:
            (message,) = await read(reader, 1)
            assert (message.payload, message.retain) == (b"kept", True)

    run(main())
