"""A device: publishes readings until it is interrupted. `python device.py BUNDLE [SECONDS_BETWEEN]`"""

import itertools
import logging
import random
import sys
import time

from tesaiot_connect import ConnectorError, MQTTQUICClient


def main(bundle: str, interval: float) -> None:
    with MQTTQUICClient(bundle) as device:
        for number in itertools.count(1):
            data = {"temperature": round(random.uniform(20, 30), 2), "reading": number}
            device.publish_telemetry(data)  # returns when the platform has it
            print("published", data, flush=True)
            time.sleep(interval)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
    except ConnectorError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass
