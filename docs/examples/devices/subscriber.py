"""An application: prints what an organisation's devices send. `python subscriber.py BUNDLE`"""

import logging
import sys
from typing import Any

from tesaiot_connect import ConnectorError, TESAIoTMQTTClient


class Printer(TESAIoTMQTTClient):
    def process_telemetry(self, device_id: str, sensor_type: str, data: Any) -> None:
        print(device_id, sensor_type, data, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        # the name makes the platform keep what comes while this does not run
        Printer(sys.argv[1], client_id="printer", clean_session=False).run_forever()
    except ConnectorError as error:
        sys.exit(f"error: {error}")
