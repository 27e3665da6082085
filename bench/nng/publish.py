"""A client that publishes: prints the seconds it took and the CPU seconds of it and its children.

    publish.py quic_nng|quic_aioquic PORT CA QOS COUNT

Messages of 100 bytes over one connection in MQTT 3.1.1, from CONNACK until the last one is acknowledged; at
QoS 0 a last one at QoS 1 tells.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from pathlib import Path

from tesaiot_connect import Client, ClientOptions, Message, Negotiator, TlsOptions, Transport, Url

BATCH = 500


def endpoint(via: str, port: int, ca: Path) -> Transport:
    url, tls = Url("quic", "127.0.0.1", port), TlsOptions(ca_file=ca)
    if via == "quic_nng":
        from tesaiot_connect_quic_nng import QuicNng

        return QuicNng(url, tls=tls, verify_hostname=False)
    from tesaiot_connect_quic_aioquic import QuicAioquic

    return QuicAioquic(url, tls=tls, zero_rtt=False)


async def main(via: str, port: int, ca: Path, qos: int, count: int) -> float:
    options = ClientOptions(client_id=f"bench-{via}-{os.getpid()}", protocol="3.1.1", clean_session=True)
    message = Message("device/bench/telemetry/load", bytes(100), qos=qos)
    async with Client(Negotiator([endpoint(via, port, ca)]), options) as client:
        await client.connected()
        began = time.perf_counter()
        for first in range(0, count, BATCH):
            await client.publish([message] * min(BATCH, count - first))
        await client.publish([Message("device/bench/telemetry/last", b"", qos=1)])
        seconds = time.perf_counter() - began
        if client.status.connects != 1:
            sys.exit("the connection was lost on the way")
    return seconds


if __name__ == "__main__":
    words = sys.argv
    took = asyncio.run(main(words[1], int(words[2]), Path(words[3]), int(words[4]), int(words[5])))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(took, sum(one.ru_utime + one.ru_stime for one in used))
