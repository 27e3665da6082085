"""The figures of one connection.

Owns: what is counted beside the protocol machine, and the snapshot of all of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import attrs

from tesaiot_connect import CloseReason, ConnectionStatus, QuicState, QuicStatus, State

from .quic import Quic

_CODES = 64
"""Different codes of stream resets that are counted."""


class Figures:
    """Counts as it goes. Times are the event loop's clock, in seconds."""

    def __init__(self, now: float) -> None:
        self.born = now
        self.last_received = now
        self.bytes_received = 0
        self.bytes_sent = 0
        self.migrations = 0
        self.handshake_time: float | None = None
        self.resets: Counter[int] = Counter()
        """Streams that either side reset, by code."""
        self._blocked_since: float | None = None
        self._blocked_time = 0.0
        self._final: QuicStatus | None = None

    def reset(self, code: int) -> None:
        if code in self.resets or len(self.resets) < _CODES:  # the peer chooses them
            self.resets[code] += 1

    def blocked(self, blocked: bool, now: float) -> None:
        """Whether somebody waits for the peer's flow control from now on."""
        if blocked and self._blocked_since is None:
            self._blocked_since = now
        elif not blocked and self._blocked_since is not None:
            self._blocked_time += now - self._blocked_since
            self._blocked_since = None

    def finish(self, quic: Quic, now: float) -> None:
        """Nothing more will happen: keeps a last snapshot, since `quic` is let go of."""
        self.blocked(False, now)
        final = self.snapshot(quic, now)
        quic.released()
        self._final = attrs.evolve(final, state=QuicState.CLOSED, states=tuple(quic.states))

    def status(self, quic: Quic, now: float, end: CloseReason | None) -> ConnectionStatus:
        """`end` is how it ended, if it has."""
        found = self.snapshot(quic, now)
        state = State.OPEN
        if end is not None:
            state = State.CLOSED if found.state is QuicState.CLOSED else State.CLOSING
        return ConnectionStatus(
            state=state,
            last_received=self.last_received,
            bytes_received=self.bytes_received,
            bytes_sent=self.bytes_sent,
            rtt=found.rtt_smoothed,
            lost=found.packets_lost,
            migrations=self.migrations,
            close_reason=end,
            quic=found,
        )

    def snapshot(self, quic: Quic, now: float) -> QuicStatus:
        if self._final is not None:
            return self._final
        smoothed, least, latest = quic.rtt or (None, None, None)
        waiting = 0.0 if self._blocked_since is None else now - self._blocked_since
        ending = quic.ending
        done = quic.handshake_complete
        return QuicStatus(
            state=quic.state,
            states=tuple(quic.states),
            version=quic.quic_version,
            handshake_time=self.handshake_time,
            resumed=done and quic.resumed,
            early_data_accepted=done and quic.early_data_accepted,
            rtt_smoothed=smoothed,
            rtt_min=least,
            rtt_latest=latest,
            congestion_window=quic.congestion_window,
            bytes_in_flight=quic.bytes_in_flight,
            packets_sent=quic.packets_sent,
            packets_received=quic.packets_received,
            packets_lost=quic.packets_lost,
            probe_timeouts=quic.probe_timeouts,
            streams_open=quic.streams_open,
            streams_total=quic.streams_total,
            stream_resets=dict(self.resets),
            blocked_time=self._blocked_time + waiting,
            migrations=self.migrations,
            path_mtu=quic.datagram_size,
            close_code=None if ending is None else ending.error_code,
            close_frame=None if ending is None else _FRAMES[ending.frame_type is None],
        )


_FRAMES: dict[bool, Literal["transport", "application"]] = {True: "application", False: "transport"}
