"""Read telemetry inside a program of your own: python reader.py mqtt://127.0.0.1:1883"""

import asyncio
import sys

from tesaiot_connect import Client, Negotiator, Url
from tesaiot_connect_tcp_tls import TcpTls


async def main(url: str) -> None:
    async with Client(Negotiator([TcpTls(url=Url.parse(url))])) as client:
        async with client.subscribe(["device/+/telemetry/#"]) as reader:
            while True:
                delivery = await reader.read()  # a batch; the broker waits for its acknowledgement
                for message in delivery.batch.messages:
                    print(message.topic, message.payload.decode(), flush=True)
                await delivery.ack()


asyncio.run(main(sys.argv[1]))
