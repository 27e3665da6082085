"""Which endpoint a connection uses.

Owns: the order of the attempts and the memory of why each failed. Rule: it knows transports
by their contract alone, so every transport plugin takes part on equal terms.

Endpoints are tried in the order they are written. `InOrder` is the one place that decides it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import attrs

from ..errors import ConnectFailed, ConnectorError, Refused
from ..protocols import ClientCertificate, Connection, Transport

__all__ = ["Attempt", "InOrder"]

log = logging.getLogger(__name__)


@attrs.frozen
class Attempt:
    """One try at one endpoint. `error` is None where it gave a connection."""

    endpoint: str
    """Its URL."""
    seconds: float
    """How long it took to succeed or to fail."""
    error: Exception | None


class InOrder:
    """A `Dialer`: the first endpoint that gives a secured connection wins.

    `timeout` bounds each endpoint, in seconds; None leaves it to the transports.
    """

    def __init__(self, endpoints: Sequence[Transport], *, timeout: float | None = 10.0) -> None:
        if not endpoints:
            raise ValueError("a connection needs at least one endpoint")
        self.endpoints = tuple(endpoints)
        self.timeout = timeout
        self.attempts: tuple[Attempt, ...] = ()
        """The attempts of the latest `connect`, in order; the last one may have succeeded."""

    async def connect(self, *, identity: ClientCertificate | None = None, early: bytes = b"") -> Connection:
        """Raises ConnectFailed with the reason of every endpoint tried, or Refused where each
        of them refused for good."""
        self.attempts = ()
        for number, endpoint in enumerate(self.endpoints, 1):
            name, began = _name(endpoint), time.monotonic()
            try:
                async with asyncio.timeout(self.timeout) as deadline:
                    connection = await endpoint.connect(identity=identity, early=early)
            except Exception as error:
                reason = error
                if isinstance(error, TimeoutError) and deadline.expired():
                    reason = ConnectFailed(
                        f"{name} gave no connection within {self.timeout:g} s",
                        fix="check that a broker listens there and that no firewall drops the packets",
                    )
                    reason.__cause__ = error
                elif not isinstance(error, ConnectorError):
                    log.exception("the transport of %s failed in an unexpected way", name)
                self._note(Attempt(name, time.monotonic() - began, reason))
                if number < len(self.endpoints):
                    log.info("%s; trying %s", reason, _name(self.endpoints[number]))
            else:
                self._note(Attempt(name, time.monotonic() - began, None))
                return connection
        raise self._failure()

    def _note(self, attempt: Attempt) -> None:
        self.attempts += (attempt,)

    def _failure(self) -> ConnectorError:
        errors = [attempt.error for attempt in self.attempts if attempt.error is not None]
        if len(errors) == 1 and isinstance(errors[0], ConnectorError):
            return errors[0]
        if all(isinstance(error, Refused) and error.permanent for error in errors):
            assert isinstance(errors[0], Refused)
            return errors[0]
        whats = [(attempt.endpoint, _what(attempt.error)) for attempt in self.attempts]
        reasons = "; ".join(  # most name their endpoint themselves
            f"({number}) {what if what.startswith(endpoint) else f'{endpoint}: {what}'}"
            for number, (endpoint, what) in enumerate(whats, 1)
        )
        fixes = dict.fromkeys(f for error in errors if (f := getattr(error, "fix", "")))
        failure = ConnectFailed(f"no endpoint gave a connection: {reasons}", fix="; ".join(fixes))
        failure.__cause__ = errors[-1]
        return failure


def _name(endpoint: Transport) -> str:
    url = getattr(endpoint, "url", None)
    return str(url) if url is not None else type(endpoint).__name__


def _what(error: Exception | None) -> str:
    return error.what if isinstance(error, ConnectorError) else f"{type(error).__name__}: {error}"
