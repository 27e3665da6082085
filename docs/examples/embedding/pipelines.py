"""Run the pipelines of a file beside other work: python pipelines.py pipeline.toml"""

import asyncio
import sys

from tesaiot_connect import load, run


async def main(file: str) -> None:
    stop = asyncio.Event()  # set it, and what was read is written and acknowledged before `run` returns
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run(load(file).pipelines, stop=stop))
        await asyncio.sleep(2)  # your program
        stop.set()
    print(running.result())


asyncio.run(main(sys.argv[1]))
