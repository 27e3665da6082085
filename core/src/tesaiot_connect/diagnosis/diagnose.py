"""All endpoints of all connections, and what comes of it.

Owns: what is done side by side and what one after the other. Rule: endpoints of one connection never meet, so
that none hides behind another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..client import MqttConnection
from ..errors import Unsupported
from ..negotiation import Negotiator
from . import causes, verdict
from .endpoint import Plan, examine
from .findings import Diagnosis

__all__ = ["Plan", "diagnose"]

Progress = Callable[[str, str, str], None]
"""Connection, endpoint, and what is being done there."""


async def diagnose(
    connections: Mapping[str, MqttConnection], plan: Plan, progress: Progress = lambda *_: None
) -> list[Diagnosis]:
    """In the order given. Raises Unsupported for a connection that is not dialed by a `Negotiator`."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_one(name, one, plan, progress)) for name, one in connections.items()]
    return [task.result() for task in tasks]


async def _one(name: str, connection: MqttConnection, plan: Plan, progress: Progress) -> Diagnosis:
    dialer = connection.dialer
    if not isinstance(dialer, Negotiator):
        raise Unsupported(f"{name} has a dialer of its own: its endpoints are not known")
    findings = []
    for place, recipe in enumerate(dialer.endpoints):
        url = str(getattr(recipe, "url", ""))
        finding = await examine(connection, recipe, place, plan, lambda what: progress(name, url, what))  # noqa: B023
        findings.append(finding)
    outlook = dialer.outlook()
    explained = causes.explain(findings, causes.Surroundings.here(Path(__file__)))
    return Diagnosis(
        name,
        tuple(explained),
        tuple(sorted(outlook, key=lambda one: one.place)),
        dialer.left_out,
        verdict.judge(explained, outlook, time.time()),
    )
