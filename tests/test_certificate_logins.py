"""Client certificates end to end: our client, our broker, real certificates, real TLS."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from issuing import KINDS, Authority, Issued
from real_brokers import Mosquitto

from tesaiot_connect import (
    Access,
    AccessRule,
    Anonymous,
    Authenticator,
    Backoff,
    Client,
    ClientOptions,
    ConnectFailed,
    Disconnected,
    Duration,
    FirstOf,
    ListenerSpec,
    Message,
    Negotiator,
    PartialDelivery,
    Refused,
    Secret,
    ServerTls,
    TlsOptions,
    Unsupported,
    Url,
)
from tesaiot_connect.config import load
from tesaiot_connect.config.serving import load_server
from tesaiot_connect.server import Broker, BrokerOptions
from tesaiot_connect.testing import Certificates
from tesaiot_connect_auth_mtls import AuthMtls, CertificateAuth
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls

PATIENCE = 20.0
ACCESS = Access(
    rules=(
        AccessRule(publish=("devices/{username}/#",), subscribe=("devices/{username}/#",)),
        AccessRule(organisations=("acme",), subscribe=("acme/#",)),
    )
)


class Lab:
    """A root, an intermediate authority that issues, and a broker's TLS settings that trust the root."""

    def __init__(self, folder: Path, server: Certificates) -> None:
        self.folder = folder
        self.server = server
        self.root = Authority("lab root")
        self.authority = Authority("lab devices", under=self.root)
        self.roots = self.root.write(folder / "devices-ca.pem")
        self.trust = TlsOptions(ca_file=server.ca_file)

    def tls(self, client_certificate: str = "required") -> ServerTls:
        own = self.server.server()
        return ServerTls(
            certificate=own.certificate,
            key=own.key,
            ca_file=self.roots,
            client_certificate=client_certificate,  # type: ignore[arg-type]
        )

    @asynccontextmanager
    async def broker(
        self,
        authenticator: Authenticator | None = None,
        *,
        options: BrokerOptions | None = None,
        client_certificate: str = "required",
    ) -> AsyncIterator[str]:
        """Its URL, by the name its certificate has."""
        transport = TcpTls(url=Url.parse("mqtts://127.0.0.1:0"), server_tls=self.tls(client_certificate))
        spec = ListenerSpec("tls", transport, authenticator or CertificateAuth(access=ACCESS))
        async with Broker(options).serving([spec]) as (url,):
            yield f"mqtts://localhost:{Url.parse(url).port}"

    def client(self, url: str, auth: AuthMtls | None, name: str = "one") -> Client:
        dialer = Negotiator([TcpTls(url=Url.parse(url), tls=self.trust)])
        again = Backoff(min=Duration(0.01), max=Duration(0.05))
        return Client(dialer, ClientOptions(client_id=name, reconnect=again), auth=auth, name=name)

    def pair(self, issued: Issued, name: str = "one") -> AuthMtls:
        certificate, key = issued.write(self.folder / name)
        return AuthMtls(certificate=certificate, key=key)


@pytest.fixture
def lab(tmp_path: Path, certificates: Certificates) -> Lab:
    return Lab(tmp_path, certificates)


def running(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * PATIENCE):
            await test()

    asyncio.run(bounded())


async def failure(client: Client) -> Disconnected:
    """Why it does not get in."""
    async with client:
        with pytest.raises(Disconnected) as caught:
            await client.connected(once=True)
        return caught.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["pem", "encrypted", "pkcs12"])
def test_a_device_is_its_certificate(lab: Lab, kind: str, form: str) -> None:
    issued = lab.authority.issue("device-1", o=["acme"], kind=kind)
    if form == "pkcs12":
        (lab.folder / "device.p12").write_bytes(issued.pkcs12("opensesame"))
        auth = AuthMtls(pkcs12=lab.folder / "device.p12", passphrase=Secret("opensesame"))
    else:
        passphrase = "opensesame" if form == "encrypted" else ""
        certificate, key = issued.write(lab.folder, passphrase)
        auth = AuthMtls(
            certificate=certificate, key=key, passphrase=Secret(passphrase) if passphrase else None
        )

    async def main() -> None:
        async with lab.broker() as url, lab.client(url, auth) as client:
            await client.connected()
            async with client.subscribe(["devices/device-1/#", "acme/news"]) as mine:
                await client.publish([Message("devices/device-1/telemetry", b"25.5", 1)])
                assert (await mine.read()).batch.messages[0].payload == b"25.5"
            with pytest.raises(PartialDelivery, match="not authorized"):
                await client.publish([Message("devices/device-2/telemetry", b"25.5", 1)])

    running(main)


def test_a_certificate_renewed_between_two_connects(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    auth = lab.pair(lab.authority.issue("device-1", ends=7))
    seen: list[bytes] = []

    class Remember:
        async def begin(self, peer: Any, credentials: Any, /) -> Any:
            seen.append(peer.certificate)
            return await CertificateAuth(access=ACCESS).begin(peer, credentials)

    async def main() -> None:
        async with lab.broker(Remember()) as url:
            async with lab.client(url, auth) as client:
                await client.connected()
            renewed = lab.authority.issue("device-1", ends=90)
            renewed.write(lab.folder / "one")
            async with lab.client(url, auth) as client:
                await client.connected()
            assert len(seen) == 2 and seen[0] != seen[1] == renewed.der

    with caplog.at_level(logging.WARNING):
        running(main)
    assert len([one for one in caplog.messages if "expires on" in one]) == 1


def test_a_running_client_reconnects_with_the_renewed_certificate(lab: Lab) -> None:
    """The old one is revoked, which ends its connection."""
    old, new = (lab.authority.issue("device-1") for _ in range(2))
    auth, revoked = lab.pair(old), lab.folder / "revoked"
    revoked.write_text("")

    async def main() -> None:
        server = CertificateAuth(access=ACCESS, revoked_file=revoked)
        options = BrokerOptions(recheck=Duration(0.05))
        async with lab.broker(server, options=options) as url, lab.client(url, auth) as client:
            await client.connected()
            new.write(lab.folder / "one")
            revoked.write_text(f"{old.certificate.serial_number:x}\n")
            while client.status.connects < 2:
                await asyncio.sleep(0)
            await client.publish([Message("devices/device-1/telemetry", b"x", 1)])

    running(main)


def test_revoked_while_connected(lab: Lab) -> None:
    device, other = lab.authority.issue("device-1"), lab.authority.issue("device-2")
    revoked = lab.folder / "revoked"
    revoked.write_text("")

    async def main() -> None:
        server = CertificateAuth(access=ACCESS, revoked_file=revoked)
        options = BrokerOptions(recheck=Duration(0.05))
        async with (
            lab.broker(server, options=options) as url,
            lab.client(url, lab.pair(device), "one") as one,
            lab.client(url, lab.pair(other, "two"), "two") as two,
        ):
            await one.connected()
            await two.connected()
            revoked.write_text(f"{device.certificate.serial_number:x}\n")
            while "was revoked" not in one.status.last_error:
                await asyncio.sleep(0)
            with pytest.raises(Refused, match=r"not authorized.*was revoked.*one/client.pem"):
                await one.connected()
            await two.publish([Message("devices/device-2/telemetry", b"x", 1)])
            assert two.status.connects == 1

    running(main)


@pytest.mark.parametrize("what", ["stranger", "no intermediate"])
def test_a_broker_that_does_not_accept_it(lab: Lab, what: str) -> None:
    """mosquitto tells why, in a TLS alert; a broker on asyncio, like ours, hangs up."""
    issued = lab.authority.issue("device-1")
    auths = {
        "stranger": lab.pair(Authority("strangers").issue("device-1"), "stranger"),
        "no intermediate": lab.pair(Issued(issued.certificate, issued.key), "short"),
    }

    async def main() -> None:
        own = lab.server.server()
        tls = (f"certfile {own.certificate}", f"keyfile {own.key}", f"cafile {lab.roots}")
        with Mosquitto(lab.folder / "mosquitto", *tls, "require_certificate true") as mosquitto:
            told = await failure(lab.client(f"mqtts://localhost:{mosquitto.port}", auths[what]))
            assert "does not trust our certificate" in told.what
            assert "intermediate certificates" in told.fix
            async with lab.client(f"mqtts://localhost:{mosquitto.port}", lab.pair(issued, "whole")) as client:
                await client.connected()
        async with lab.broker() as url:
            told = await failure(lab.client(url, auths[what]))
            assert "not accept the one it was shown" in told.what
            assert "log of the server" in told.fix

    running(main)


def test_expired_is_said_before_any_traffic(lab: Lab) -> None:
    auth = lab.pair(lab.authority.issue("device-1", ends=-1))

    async def main() -> None:
        reached = asyncio.Event()

        async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.set()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            told = await failure(lab.client(f"mqtts://127.0.0.1:{port}", auth))
            assert isinstance(told, ConnectFailed) and "has expired on" in told.what
            assert not reached.is_set()

    running(main)


def test_no_certificate_where_one_is_required(lab: Lab) -> None:
    async def main() -> None:
        async with lab.broker() as url:
            told = await failure(lab.client(url, None))
            assert "client certificate" in told.what
            assert 'type = "mtls"' in told.fix

    running(main)


def test_no_certificate_where_one_is_optional_is_for_the_next_authenticator(lab: Lab) -> None:
    async def main() -> None:
        only = CertificateAuth(access=ACCESS)
        async with lab.broker(only, client_certificate="optional") as url:
            told = await failure(lab.client(url, None))
            assert isinstance(told, Refused) and told.reason_code == 0x87
            assert "showed no certificate" in told.what
        both = FirstOf((only, Anonymous()))
        async with lab.broker(both, client_certificate="optional") as url:
            async with lab.client(url, None) as client:
                await client.connected()
                await client.publish([Message("anything", b"x", 1)])
            async with lab.client(url, lab.pair(lab.authority.issue("device-1")), "two") as client:
                await client.connected()
                with pytest.raises(PartialDelivery, match="not authorized"):
                    await client.publish([Message("anything", b"x", 1)])

    running(main)


def test_a_name_that_topics_cannot_have(lab: Lab) -> None:
    auth = lab.pair(lab.authority.issue("device/#"))

    async def main() -> None:
        async with lab.broker() as url:
            told = await failure(lab.client(url, auth))
            assert isinstance(told, Refused) and told.permanent
            assert "'device/#' cannot stand in a topic" in told.what
            assert "one/client.pem" in told.fix

    running(main)


def test_quic_says_where_client_certificates_work(lab: Lab) -> None:
    auth = lab.pair(lab.authority.issue("device-1"))
    endpoint = QuicAioquic(url=Url.parse("quic://localhost:1"), tls=lab.trust)

    async def main() -> None:
        with pytest.raises(Unsupported, match=r"client certificates are not available over QUIC.*mqtts://"):
            await endpoint.connect(identity=await auth.identity())
        async with lab.broker() as url:
            dialer = Negotiator([endpoint, TcpTls(url=Url.parse(url), tls=lab.trust)])
            async with Client(dialer, ClientOptions(), auth=auth) as client:
                await client.connected()
                assert client.status.transport == "tcp_tls"

    running(main)


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "guide" / "certificates.md").read_text(
    encoding="utf-8"
)
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_configurations_of_the_page_are_right(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P12_PASSPHRASE", "x")
    text, config = BLOCKS[block], tmp_path / "config.toml"
    for file in re.findall(r'"([\w.-]+\.(?:pem|key|p12)|users|revoked)"', text):
        (tmp_path / file).touch()
    config.write_text(text)
    if "[listeners" in text:
        assert load_server(config).listeners
    else:
        assert load(config, need_pipelines=False).connections["platform"].auth


def test_every_message_of_the_page_is_one_that_is_said() -> None:
    """The first column of the table is what a person looks for in it."""
    rows = re.findall(r"^\| ([^|]+) \|", PAGE.split("## When something goes wrong")[1], re.MULTILINE)[1:]
    root = Path(__file__).resolve().parents[1]
    sources = [*root.glob("plugins/*/src/**/*.py"), *root.glob("core/src/**/*.py")]
    code = " ".join(path.read_text(encoding="utf-8") for path in sources)
    said = re.sub(r'"\s*\n\s*f?"', "", code)
    assert [part for row in rows for part in row.split("; ") if part not in said] == []


def test_a_command_that_uses_no_certificates_does_not_load_their_library() -> None:
    code = "import sys, tesaiot_connect_auth_mtls; sys.exit('cryptography' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
