"""Whatever goes wrong between a client and a broker, the message says what it was and what to do about it.

The brokers here say one thing each, over real sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from issuing import Authority
from real_brokers import free_port

from tesaiot_connect import (
    Backoff,
    Client,
    ClientOptions,
    Credentials,
    Disconnected,
    Duration,
    Negotiator,
    Refused,
    Url,
    WillOptions,
)
from tesaiot_connect.mqtt import codec
from tesaiot_connect.mqtt.reasons import FROM_CONNACK_V3
from tesaiot_connect.testing import Certificates
from tesaiot_connect_tcp_tls import TcpTls

TOOL = Path(sys.executable).with_name("tesaiot-connect")
ORIGIN = "`token` of this connection's `auth`"
CHECK_LOGIN = f"check {ORIGIN}"

CONNACK: dict[int, tuple[str, str]] = {
    0x80: ("does not say why", "broker's log at this time for 'dev-1'"),
    0x81: ("cannot read our CONNECT", 'protocol = "3.1.1"'),
    0x82: ("for a violation", 'protocol = "3.1.1"'),
    0x83: ("does not do it", "broker's log"),
    0x84: ("does not speak this version of MQTT", "set `protocol`"),
    0x85: ("does not accept the client_id 'dev-1'", "set another `client_id`"),
    0x86: ("does not know this user name with this password", CHECK_LOGIN),
    0x87: ("this client may not connect", CHECK_LOGIN),
    0x88: ("takes no clients at present", "wait"),
    0x89: ("more to do than it can", "wait"),
    0x8A: ("keeps this client out", "ban on 'dev-1'"),
    0x8C: ("does not offer the authentication method", CHECK_LOGIN),
    0x90: ("the topic of our will", "`will.topic`"),
    0x95: ("our CONNECT is larger", "`will.payload`"),
    0x97: ("a limit of this account or client is reached", "quota"),
    0x99: ("the payload of our will", "`will.payload`"),
    0x9A: ("keeps no retained messages", "`will.retain = false`"),
    0x9B: ("the QoS of our will", "`will.qos`"),
    0x9C: ("another server is to be used for now", "mqtts://b.example:8883"),
    0x9D: ("moved for good", "mqtts://b.example:8883"),
    0x9F: ("connections come faster", "`reconnect.min`"),
}
DISCONNECT: dict[int, tuple[str, str]] = {
    0x00: ("closes without an error", "connect again"),
    0x80: ("does not say why", "broker's log"),
    0x81: ("could not read what we sent", "report it"),
    0x82: ("for a violation", "report it"),
    0x83: ("does not do it", "broker's log"),
    0x87: ("may not stay", f"{CHECK_LOGIN}; check too which topics"),
    0x89: ("more to do than it can", "wait"),
    0x8B: ("stops or restarts", "wait"),
    0x8D: ("one and a half times `keepalive`", "lower `keepalive`"),
    0x8E: ("another connection came with the client_id 'dev-1'", "give each its own"),
    0x8F: ("does not accept a topic filter", "`subscribe`"),
    0x90: ("does not accept the topic of a message", "publish to topics"),
    0x93: ("more messages were in flight", "report it"),
    0x94: ("a topic alias", "report it"),
    0x95: ("a message was larger", "smaller messages"),
    0x96: ("messages come faster", "fewer, larger messages"),
    0x97: ("a limit of this account or client is reached", "quota"),
    0x98: ("an operator ended it", "ask the broker's operator"),
    0x99: ("a payload is not of the form", "UTF-8"),
    0x9A: ("keeps no retained messages", "without `retain`"),
    0x9B: ("does not offer the QoS of a message", "lower QoS"),
    0x9C: ("another server is to be used for now", "mqtts://b.example:8883"),
    0x9D: ("moved for good", "mqtts://b.example:8883"),
    0x9E: ("no shared subscriptions", "without $share"),
    0x9F: ("connections come faster", "`reconnect.min`"),
    0xA0: ("may not last longer", "connect again"),
    0xA1: ("no subscription identifiers", "a connection of its own"),
    0xA2: ("no wildcards", "without + and #"),
}
RETURN_CODES: dict[int, tuple[str, str]] = {
    1: ("unsupported protocol version", "set `protocol`"),
    2: ("does not accept the client_id 'dev-1'", "set another `client_id`"),
    3: ("takes no clients at present", "wait"),
    4: ("does not know this user name with this password", CHECK_LOGIN),
    5: ("this client may not connect", CHECK_LOGIN),
}


class Token:
    """An auth that says where its credentials are set."""

    credentials = Credentials("token", b"token", origin=ORIGIN)

    async def begin(self) -> Token:
        return self

    async def identity(self) -> None:
        return None

    async def respond(self, data: bytes, /) -> bytes:
        raise AssertionError

    async def finish(self, data: bytes, /) -> None:
        pass


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """A broker that answers every CONNECT with these bytes, and hangs up; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read(65536)
            writer.write(answer)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def failure(answer: bytes, **options: Any) -> Disconnected:
    """What a client makes of the answer."""
    auth = options.pop("auth", Token())

    async def main() -> Disconnected:
        async with asyncio.timeout(20), answering(answer) as port:
            dialer = Negotiator([TcpTls(url=Url.parse(f"mqtt://127.0.0.1:{port}"))])
            slow = Backoff(min=Duration(600), max=Duration(600))
            settings = ClientOptions(**{"client_id": "dev-1", "reconnect": slow, **options})
            async with Client(dialer, settings, auth=auth) as client:
                with contextlib.suppress(Disconnected):
                    await client.connected(once=True)
                while client.status.state != "waiting":
                    await asyncio.sleep(0)
                with pytest.raises(Disconnected) as caught:
                    await client.connected(once=True)
                return caught.value

    return asyncio.run(main())


def prop(identifier: int, text: str) -> bytes:
    data = text.encode()
    return bytes([identifier]) + len(data).to_bytes(2) + data


def packet(kind: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes([kind, len(body)]) + body


def connack(code: int, properties: bytes = b"") -> bytes:
    return packet(0x20, bytes([0, code, len(properties)]) + properties)


def disconnect(code: int, properties: bytes = b"") -> bytes:
    return connack(0) + packet(0xE0, bytes([code, len(properties)]) + properties)


def server_of(code: int) -> bytes:
    return prop(0x1C, "mqtts://b.example:8883") if code in (0x9C, 0x9D) else b""


def test_the_tables_have_every_code() -> None:
    assert set(CONNACK) == codec._CONNACK_CODES - {0}
    assert set(DISCONNECT) == codec._DISCONNECT_CODES - {4}, "4 is for clients"
    assert set(RETURN_CODES) == set(FROM_CONNACK_V3) - {0}


@pytest.mark.parametrize("code", CONNACK, ids=hex)
def test_a_refusal(code: int) -> None:
    cause, fix = CONNACK[code]
    told = failure(connack(code, server_of(code)), protocol="5")
    assert isinstance(told, Refused) and told.reason_code == code
    assert re.search(rf"the broker at 127\.0\.0\.1:\d+ refused the connection: .*\(0x{code:02X}\)", told.what)
    assert cause in told.what
    assert fix in told.fix


@pytest.mark.parametrize("code", DISCONNECT, ids=hex)
def test_a_disconnection(code: int) -> None:
    cause, fix = DISCONNECT[code]
    told = failure(disconnect(code, server_of(code)), protocol="5")
    assert isinstance(told, Refused) and told.reason_code == code and not told.permanent
    assert re.search(rf"the broker at 127\.0\.0\.1:\d+ ended the connection: .*\(0x{code:02X}\)", told.what)
    assert cause in told.what
    assert fix in told.fix


@pytest.mark.parametrize("code", RETURN_CODES)
@pytest.mark.parametrize("protocol", ["3.1.1", "auto"])
def test_a_refusal_of_mqtt_3(code: int, protocol: str) -> None:
    cause, fix = RETURN_CODES[code]
    told = failure(packet(0x20, bytes([0, code])), protocol=protocol)
    assert isinstance(told, Refused) and told.reason_code == FROM_CONNACK_V3[code]
    assert cause in told.what
    assert fix in told.fix
    if protocol == "3.1.1":
        assert f"(MQTT 3.1.1 return code {code})" in told.what


def test_the_broker_s_own_words_are_shown_and_kept_harmless() -> None:
    text = "quota of tenant\n\x1b[31m7"
    told = failure(connack(0x97, prop(0x1F, text)), protocol="5")
    assert "quota exceeded (0x97), quota of tenant  [31m7: a limit of" in told.what


def test_no_credentials_are_set() -> None:
    for code in (0x86, 0x87):
        assert failure(connack(code), protocol="5", auth=None).fix == "set `auth` for this connection"
    assert "ask its operator" in failure(connack(0x9D), protocol="5").fix


def test_a_client_id_with_braces_is_only_text() -> None:
    assert (
        "client_id '{server}' is" in failure(connack(0x85), protocol="5", client_id="{server}").what + " is"
    )


def test_a_packet_larger_than_we_take() -> None:
    publish = b"\x30\xff\xff\x7f" + b"x" * 100
    told = failure(connack(0) + publish, protocol="5", maximum_packet_size=1000)
    assert "maximum_packet_size" in told.fix


def test_the_will_is_what_the_words_name() -> None:
    """The keys that the fixes name exist."""
    named = {
        key
        for table in (CONNACK, DISCONNECT)
        for _, fix in table.values()
        for key in re.findall(r"`([a-z_.]+)", fix)
    }
    known = {f"will.{key}" for key in WillOptions.__slots__} | {
        f"reconnect.{key}" for key in Backoff.__slots__
    }
    known |= {*ClientOptions.__slots__, "subscribe", "retain", "token", "auth"}
    assert named <= known


# --- through the command ------------------------------------------------------------------


async def check(config: Path) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        TOOL,
        "check",
        config,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=config.parent,
    )
    out, _ = await process.communicate()
    text = out.decode()
    assert "Traceback" not in text
    return process.returncode, text


@asynccontextmanager
async def tls_broker(tls: Any) -> AsyncIterator[int]:
    transport = TcpTls(url=Url.parse("mqtts://127.0.0.1:0"), server_tls=tls)

    async def handler(connection: Any) -> None:
        await connection.wait_closed()

    async with transport.listen(handler) as url:
        yield Url.parse(url).port


@asynccontextmanager
async def deaf() -> AsyncIterator[int]:
    """Takes connections, and says nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def test_what_check_says(folder: Path, certificates: Certificates) -> None:
    strangers = Certificates(folder / "strangers")
    Authority().issue(ends=-1).write(folder / "expired")
    ours = f'tls = {{ ca_file = "{certificates.ca_file}" }}'
    mtls = 'auth = { type = "mtls", certificate = "expired/client.pem", key = "expired/client.key" }'

    async def main() -> tuple[dict[str, tuple[str, str, str]], int | None, str]:
        async with contextlib.AsyncExitStack() as stack:
            enter = stack.enter_async_context
            silent, plain = await enter(deaf()), await enter(answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
            bad_login = await enter(answering(packet(0x20, b"\0\4")))
            forbidden = await enter(answering(packet(0x20, b"\0\5")))
            good = await enter(tls_broker(certificates.server()))
            foreign = await enter(tls_broker(strangers.server()))
            expired = await enter(tls_broker(certificates.server(expired=True)))
            misnamed = await enter(tls_broker(certificates.server("other.example")))
            closed = free_port()
            table = {  # name: (endpoint and more keys, cause, fix)
                "no_connack": (
                    f'endpoints = ["mqtt://127.0.0.1:{silent}"]\nconnect_timeout = "2s"',
                    "sent no CONNACK", "speaks MQTT",
                ),
                "no_tls": (
                    f'endpoints = [{{ url = "mqtts://127.0.0.1:{silent}", connect_timeout = "2s" }}]',
                    "does not answer the TLS handshake", "8883",
                ),
                "refused": (
                    f'endpoints = ["mqtts://127.0.0.1:{closed}"]', "refused", "nothing listens there",
                ),
                "no_name": ('endpoints = ["mqtts://broker.invalid"]', "cannot be resolved", "spelling"),
                "not_tls": (f'endpoints = ["mqtts://127.0.0.1:{plain}"]\n{ours}', "not with TLS", "8883"),
                "wrong_ca": (
                    f'endpoints = ["mqtts://localhost:{foreign}"]\n{ours}',
                    "not from a trusted authority", "`ca_file`",
                ),
                "expired": (
                    f'endpoints = ["mqtts://localhost:{expired}"]\n{ours}',
                    "certificate has expired", "renew it",
                ),
                "misnamed": (
                    f'endpoints = ["mqtts://localhost:{misnamed}"]\n{ours}',
                    "for another name", "`server_name`",
                ),
                "rc_4": (
                    f'endpoints = ["mqtt://127.0.0.1:{bad_login}"]\nprotocol = "3.1.1"',
                    "bad user name or password (MQTT 3.1.1 return code 4)", "`auth`",
                ),
                "rc_5": (
                    f'endpoints = ["mqtt://127.0.0.1:{forbidden}"]\nprotocol = "3.1.1"',
                    "not authorized (MQTT 3.1.1 return code 5)", "`auth`",
                ),
                "own_certificate": (
                    f'endpoints = ["mqtts://localhost:{good}"]\n{ours}\n{mtls}', "expired on 20", "renew it",
                ),
            }  # fmt: skip
            config = folder / "connections.toml"
            config.write_text(
                "\n".join(f"[connections.{name}]\n{keys}" for name, (keys, *_) in table.items())
            )
            return table, *(await check(config))

    table, code, text = asyncio.run(main())
    assert code == 69, text
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()[0] in table}
    assert lines.keys() == table.keys(), text
    for name, (_, cause, fix) in table.items():
        assert cause in lines[name]
        assert fix in lines[name].split(cause)[-1], lines[name]


@pytest.mark.parametrize(
    ("keys", "file"),
    [
        ('tls = { ca_file = "ca-chain.pem" }', "ca-chain.pem"),
        ('auth = { type = "mtls", certificate = "client.pem", key = "client.key" }', "client.pem"),
        ('auth = { type = "mtls", pkcs12 = "client.p12" }', "client.p12"),
    ],
)
def test_a_file_that_is_not_there(keys: str, file: str, folder: Path) -> None:
    config = folder / "connections.toml"
    config.write_text(f'[connections.one]\nendpoints = ["mqtts://localhost"]\n{keys}\n')
    code, text = asyncio.run(check(config))
    assert code == 78
    assert re.search(rf"connections\.toml:3: .*{re.escape(file)} does not exist", text)
    assert "Relative paths start at" in text
