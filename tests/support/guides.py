"""The blocks of a guide page, and what makes a file of one that has connections alone."""

from __future__ import annotations

import re

REST = """
[sources.telemetry]
type = "mqtt"
connection = "platform"
subscribe = ["device/+/telemetry/#"]
[sinks.log]
type = "stdout"
[pipelines.archive]
from = "telemetry"
to = ["log"]
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
