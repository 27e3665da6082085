"""Publish by the best of two endpoints, and tell of it: python endpoints.py QUIC_URL MQTTS_URL CA_FILE"""

import asyncio
import sys

from tesaiot_connect import (
    Client,
    ClientOptions,
    ConnectorError,
    Duration,
    Message,
    NegotiationOptions,
    Negotiator,
    TlsOptions,
    Url,
)
from tesaiot_connect_quic_aioquic import QuicAioquic
from tesaiot_connect_tcp_tls import TcpTls


async def main(quic: str, mqtts: str, ca_file: str) -> None:
    trust = TlsOptions(ca_file=ca_file)
    endpoints = [QuicAioquic(Url.parse(quic), tls=trust), TcpTls(Url.parse(mqtts), tls=trust)]  # best first
    options = NegotiationOptions(race_delay=Duration(0.1), penalty=Duration(60))
    dialer = Negotiator(endpoints, options, timeout=5.0)

    def tell(state: str, error: ConnectorError | None) -> None:
        print(state, client.status.url if state == "connected" else error or "", flush=True)

    client = Client(dialer, ClientOptions(client_id="gauge-1"), on_state=tell)
    async with client:
        await client.publish([Message("device/gauge-1/telemetry", b'{"value": 25.5}', qos=1)])
        for attempt in client.status.attempts:
            print(attempt.outcome, attempt.endpoint, attempt.reason, sep="; ", flush=True)


asyncio.run(main(*sys.argv[1:]))
