"""Every error of the framework, in one tree.

Owns: what went wrong, to what, and what to do next. Rule: an error that can reach a person
says all three. Errors of other libraries are translated at the edge, always `raise ... from`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import attrs

Stage = Literal["", "name", "reach", "secure", "upgrade"]


class ConnectorError(Exception):
    """Root of all errors.

    `what` says what happened and to what, in one sentence without a full stop at its end;
    `fix` says what to do next, likewise, and may be empty.
    """

    attempts: tuple[Any, ...] = ()
    """From a dial that failed: what was tried, each a `dialing.Attempt`."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}. {self.fix}" if self.fix else self.what


@attrs.frozen
class Problem:
    """One thing that is wrong in a configuration. `line` counts from 1, 0 is unknown."""

    file: str
    line: int
    key: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        key = f"{self.key}: " if self.key else ""
        return f"{place}: {key}{self.message}" + (f". {self.fix}" if self.fix else "")


class ConfigError(ConnectorError):
    """A configuration that cannot be used, with every problem that was found in it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class PluginError(ConnectorError):
    """A plugin that was asked for is missing or broken."""


class Unsupported(ConnectorError):
    """The implementation cannot do what was asked, and says so instead of pretending."""


class EndOfInput(ConnectorError):
    """A source has no more to read (the end of a file, a generator that has sent its count)."""

    def __init__(self, what: str = "end of input", *, fix: str = "") -> None:
        super().__init__(what, fix=fix)


class EndOfOutput(ConnectorError):
    """A sink can take no more, for good (the reader of standard output has gone): the run ends."""


class Disconnected(ConnectorError):
    """A connection is gone. Retryable: open the same recipe again."""


class PathLost(Disconnected):
    """The way to the other side went silent, though the other side may be well: another way may work."""


class ConnectFailed(Disconnected):
    """No connection could be made; the message holds the reason of every endpoint tried.

    `stage` is what failed: "name", its resolution; "reach", no answer, a refusal, no route; "secure", the TLS
    or QUIC handshake with its certificates and ALPN; "upgrade", WebSocket or a proxy. It is "" where it was
    none of these, such as a file that cannot be read, or several endpoints.
    """

    STAGES: Final[tuple[Stage, ...]] = ("", "name", "reach", "secure", "upgrade")
    """In the order in which a connection passes them."""

    def __init__(self, what: str, *, fix: str = "", stage: Stage = "") -> None:
        super().__init__(what, fix=fix)
        self.stage = stage


class Refused(Disconnected):
    """The other side answered and said no: CONNACK or DISCONNECT with a reason code.

    `reason_code` is the MQTT 5 code (3.1.1 codes are translated). `permanent` is true where
    trying again with the same settings cannot help (bad credentials, banned, bad client id).
    """

    def __init__(self, what: str, *, fix: str = "", reason_code: int = 0x80, permanent: bool = False) -> None:
        super().__init__(what, fix=fix)
        self.reason_code = reason_code
        self.permanent = permanent


class NotApplicable(Refused):
    """An authenticator does not know credentials of this sort: the next one may."""

    def __init__(self, what: str, *, fix: str = "", reason_code: int = 0x86) -> None:
        super().__init__(what, fix=fix, reason_code=reason_code, permanent=True)


class ProtocolError(ConnectorError):
    """The other side broke the MQTT standard; `reason_code` is what to tell it (MQTT 5 section 2.4)."""

    def __init__(self, what: str, *, reason_code: int = 0x81, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.reason_code = reason_code


class PublishRefused(ConnectorError):
    """The broker (or its announced limits) refused one message; it will not accept it later either."""

    def __init__(self, what: str, *, reason_code: int = 0x80, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.reason_code = reason_code


class PayloadError(ConnectorError):
    """A payload or value that a serializer could not decode or encode."""


class PartialDelivery(ConnectorError):
    """A writer delivered a batch except for some elements.

    `failures` maps the index in the batch to its error; all other elements are delivered.
    """

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        first = next(iter(failures.values()), None)
        super().__init__(f"{len(failures)} of the batch could not be delivered, first: {first}")
        self.failures = dict(failures)
