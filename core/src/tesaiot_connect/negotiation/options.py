"""How endpoints are chosen: the keys of a connection's table that are about that.

Owns: those, their help and their limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from ..protocols import Duration
from .memory import LONGEST


def _not_negative(_instance: Any, field: attrs.Attribute[Any], value: float) -> None:
    if value < 0:
        raise ValueError(f"{field.name} must not be negative, not {value}")


def _penalty(_instance: Any, field: attrs.Attribute[Any], value: float) -> None:
    if not 0 < value <= LONGEST:
        raise ValueError(
            f"{field.name} must be more than 0 and at most {LONGEST / 3600:g} h, not {value:g} s"
        )


@attrs.frozen(kw_only=True)
class NegotiationOptions:
    """Which endpoint of several a connection uses, and when it changes."""

    race_delay: Duration = attrs.field(
        default=Duration(0.2),
        validator=_not_negative,
        metadata={
            "help": "Head start of each endpoint over the next one. Where the handshake with an endpoint is "
            "remembered, its head start is twice that, from half to five times this value; 0s starts all at "
            "once, and sends no early data (0-RTT) therefore. An endpoint that fails is followed by the next "
            "at once."
        },
    )
    upgrade: bool = attrs.field(
        default=True,
        metadata={
            "help": "While connected by a fallback, try what stands before it in `endpoints` again, in the "
            "background, and move there when it works. The session is kept; without one that can be kept "
            "there is no move."
        },
    )
    penalty: Duration = attrs.field(
        default=Duration(300.0),
        validator=_penalty,
        metadata={
            "help": "How long an endpoint that failed while another one worked is neither tried first nor "
            "in the background. Doubles while it fails again, up to 6 hours; ends when it works."
        },
    )
    memory: bool = attrs.field(
        default=True,
        metadata={
            "help": "Remember for the next run how endpoints did on this network, in the user's state folder."
        },
    )
    memory_folder: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(Path),
        metadata={"help": "Another folder to remember it in."},
    )
