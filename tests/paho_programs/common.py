"""What the programs share: the command line, and a client of either generation of paho."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any


def start(description: str | None) -> tuple[Any, argparse.Namespace]:
    """The module that was asked for, and the other arguments."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("host", help="of the broker, as the module takes it")
    parser.add_argument("--module", default="paho.mqtt.client")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--ca", help="PEM file of the authority to trust")
    parser.add_argument("--topic", default="paho/program", help="the program's own; nobody else uses it")
    parser.add_argument("--count", type=int, default=20)
    arguments = parser.parse_args()
    return importlib.import_module(arguments.module), arguments


def client(mqtt: Any, arguments: argparse.Namespace, client_id: str = "", **options: Any) -> Any:
    """paho 2 with callbacks of version 2; paho 1, whose callbacks have the same arguments in MQTT 5."""
    try:
        made = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id, **options)
    except AttributeError:
        made = mqtt.Client(client_id, **options)
    if arguments.ca:
        made.tls_set(arguments.ca)
    return made


def say(*words: object) -> None:
    print(*words, flush=True)


def number(reason: Any) -> int:
    """Of a reason code, which was an int once."""
    return int(getattr(reason, "value", reason))


def fail(message: str) -> None:
    sys.exit(message)
