"""Deadlines that pass when a test says so: what must run out does, what must not has all its time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tesaiot_connect import Duration, tcp

LONG = Duration(600.0)
"""For the option whose time a test lets pass."""


class Deadlines:
    """Those `asyncio.timeout`s that are made for `LONG` from now on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.running: list[asyncio.Timeout] = []
        """Each that was made, in their order, over or not."""
        make = asyncio.timeout

        def timeout(delay: float | None) -> asyncio.Timeout:
            made = make(delay)
            if delay == LONG:
                self.running.append(made)
            return made

        patch.setattr(asyncio, "timeout", timeout)

    def pass_by(self, number: int = -1) -> None:
        """The time of this one is over."""
        self.running[number].reschedule(asyncio.get_running_loop().time())


def over_at(patch: pytest.MonkeyPatch, stage: str) -> None:
    """A connect over TCP whose `connect_timeout` is `LONG` has no time left once it gets to that stage."""
    deadlines = Deadlines(patch)

    class Watched(tcp.Progress):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if value.stage == stage:
                asyncio.get_running_loop().call_soon(deadlines.pass_by)

    patch.setattr(tcp, "Progress", Watched)
