"""aioquic's connection, with what an endpoint of our own needs of it.

Owns: every reach into aioquic's private parts, and nothing else does it; a test fails when one
of them changes. Rules: limits grow as the application consumes, never on receipt (stock aioquic
doubles them, so an unread peer is never held back); time is an argument.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import (
    CONNECTION_LIMIT_FRAME_CAPACITY,
    END_STATES,
    MAX_STREAM_DATA_FRAME_CAPACITY,
    QuicConnection as AioquicConnection,
    QuicConnectionState,
)
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, pull_quic_transport_parameters
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate

from tesaiot_connect import QuicState

from .endpoint import Windows
from .pacer import Pacer
from .resets import is_reset, reset_token

log = logging.getLogger(__name__)

_SLOWEST_PROBE = 1.0
"""Seconds between two probes at most. RFC 9002 section 6.2.1 doubles that time without a bound; so long a
silence after the path has healed would not serve anybody."""
_BLACK_HOLE = 2
"""Probes in a row without an answer from which datagrams are small: the path may have a smaller MTU now."""
_REASON = 100
"""Characters of a close reason that the peer is told."""


class Quic(AioquicConnection):
    """One QUIC connection, client or server, without I/O.

    `reset_key` makes the stateless reset tokens of a server. `early_data` says whether a server
    takes 0-RTT. `key_update` is the number of packets after which the keys are renewed.
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        windows: Windows,
        *,
        clock: Callable[[], float],
        reset_key: bytes = b"",
        early_data: bool = True,
        key_update: int = 0,
        **server: Any,
    ) -> None:
        self.states: list[tuple[QuicState, float]] = []
        self.packets_received = 0
        self.packets_lost = 0
        self.probe_timeouts = 0
        self.streams_total = 0
        self.idle: float | None = None
        """Seconds of silence after which the connection ends; None is what was announced."""
        self._clock = clock
        self._windows = windows
        self._reset_key = reset_key
        self._early_data = early_data
        self._key_update = key_update
        self._key_phase_from = 0
        self._priorities: dict[int, int] = {}
        self._consumed = 0
        self._lost = False
        self.stationary = False
        """Whether the server said that clients must not move (RFC 9000 section 18.2)."""
        self._streams_accepted = 0
        self._streams_withheld = 0
        """Streams that ended, and that the peer may not replace by new ones yet."""
        self._stream_consumed: dict[int, int] = {}
        self._queue: list[QuicStream] = []
        super().__init__(configuration=configuration, **server)
        self._local_max_data.value = self._local_max_data.sent = windows.connection
        self._local_max_stream_data_bidi_local = windows.stream
        self._local_max_stream_data_bidi_remote = windows.stream
        self._local_max_stream_data_uni = windows.stream
        self._local_max_streams_bidi.value = self._local_max_streams_bidi.sent = windows.streams
        self._local_max_streams_uni.value = self._local_max_streams_uni.sent = 0
        self._pacer = Pacer(self._max_datagram_size)
        self._loss._pacer = self._pacer  # type: ignore[assignment]
        self._count_losses()
        self._name_resets()
        self._enter(QuicState.INITIAL)

    # --- time and states --------------------------------------------------------------------

    def _enter(self, state: QuicState) -> None:
        if not self.states or self.states[-1][0] is not state:
            self.states.append((state, self._clock()))

    @property
    def state(self) -> QuicState:
        return self.states[-1][0]

    def _set_state(self, state: QuicConnectionState) -> None:
        super()._set_state(state)
        if state is QuicConnectionState.CONNECTED:
            self._enter(QuicState.HANDSHAKE)
        elif state is QuicConnectionState.TERMINATED:
            self._enter(QuicState.CLOSED)
        elif state in END_STATES:
            self._enter(QuicState.DRAINING)

    def handshake_completed(self) -> None:
        """For the owner, at aioquic's event of that name."""
        self._enter(QuicState.ONE_RTT)
        # TLS has nothing more to say: a fifth of an idle connection's memory
        self._crypto_buffers = {epoch: Buffer(capacity=0) for epoch in self._crypto_buffers}
        accepted, limit = self.early_data_accepted, self._remote_max_stream_data_bidi_remote
        if self._is_client:
            self._send_again([] if accepted else [self._spaces[tls.Epoch.ONE_RTT]])
            # what was remembered counts no more (RFC 9000 section 7.4.1)
            for stream in self._streams.values():
                stream.max_stream_data_remote = max(limit, accepted and stream.max_stream_data_remote)

    def released(self) -> None:
        """The owner is done with it: nothing will be sent or received any more."""
        if self._quic_logger is not None:
            self._configuration.quic_logger.end_trace(self._quic_logger)  # type: ignore[union-attr]
            self._quic_logger = None
        self._enter(QuicState.CLOSED)

    @property
    def ending(self) -> ConnectionTerminated | None:
        """Why it ends, as soon as that is known; aioquic's event comes three PTOs later."""
        return self._close_event if self._state in END_STATES else None

    @property
    def closed_by_peer(self) -> bool:
        return self._state is QuicConnectionState.DRAINING and not self._lost

    def _idle_timeout(self) -> float:
        ours = self._configuration.idle_timeout if self.idle is None else self.idle
        theirs = self._remote_max_idle_timeout or ours  # 0 is none (RFC 9000 section 18.2)
        return max(min(ours, theirs), 3 * self._loss.get_probe_timeout())

    def set_idle(self, seconds: float | None, now: float) -> None:
        """Another idle timeout from now on (RFC 9000 section 10.1)."""
        self.idle = seconds
        if self._close_at is not None and self._state not in END_STATES:
            self._close_at = now + self._idle_timeout()

    @property
    def idle_timeout(self) -> float:
        """Seconds of silence that end the connection, as both sides have it."""
        return self._idle_timeout()

    # --- flow control -------------------------------------------------------------------------

    def consumed(self, stream_id: int, count: int) -> bool:
        """The application took so many bytes of a stream. Whether that makes news for the peer."""
        self._consumed += count
        total = self._stream_consumed[stream_id] = self._stream_consumed.get(stream_id, 0) + count
        stream = self._streams.get(stream_id)
        windows = self._windows
        return self._consumed + windows.connection - self._local_max_data.sent >= windows.connection // 2 or (
            stream is not None
            and not stream.receiver.is_finished
            and total + windows.stream - stream.max_stream_data_local_sent >= windows.stream // 2
        )

    def discarded(self, count: int) -> None:
        """Bytes of a stream that nobody will read: they count for the connection's window alone."""
        self._consumed += count

    def stream_accepted(self) -> bool:
        """The application took a stream of the peer's. Whether that makes news for the peer."""
        self._streams_accepted += 1
        return self._streams_withheld > 0

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        window = self._windows.connection
        data, streams = self._local_max_data, self._local_max_streams_bidi
        target = self._consumed + window
        if target - data.sent >= (window + 1) // 2:
            data.value = max(data.value, target)
            self._write_limit(builder, data)
        # those that nobody accepted count as open, however soon the peer ended them
        total = streams.value + self._streams_withheld
        streams.value = min(total, self._windows.streams + self._streams_accepted)
        self._streams_withheld = total - streams.value
        if streams.value != streams.sent and streams.sent - streams.used < streams.value - streams.sent:
            self._write_limit(builder, streams)

    def _write_limit(self, builder: QuicPacketBuilder, limit: Any) -> None:
        buf = builder.start_frame(
            limit.frame_type,
            capacity=CONNECTION_LIMIT_FRAME_CAPACITY,
            handler=self._on_connection_limit_delivery,
            handler_args=(limit,),
        )
        buf.push_uint_var(limit.value)
        limit.sent = limit.value
        if self._quic_logger is not None:
            frame = self._quic_logger.encode_connection_limit_frame(limit.frame_type, limit.value)
            builder.quic_logger_frames.append(frame)  # type: ignore[union-attr]

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        stream_id: int = stream.stream_id  # type: ignore[assignment]
        window = self._windows.stream
        target = self._stream_consumed.get(stream_id, 0) + window
        if target - stream.max_stream_data_local_sent < (window + 1) // 2 or stream.receiver.is_finished:
            return
        stream.max_stream_data_local = max(stream.max_stream_data_local, target)
        buf = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        buf.push_uint_var(stream_id)
        buf.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local
        if self._quic_logger is not None:
            frame = self._quic_logger.encode_max_stream_data_frame(stream.max_stream_data_local, stream_id)
            builder.quic_logger_frames.append(frame)  # type: ignore[union-attr]

    # --- streams ------------------------------------------------------------------------------

    # aioquic serves its queue from the front and puts what was served at the end. Sorting by
    # priority whenever it is asked for keeps these turns within a priority, and not across.
    @property
    def _streams_queue(self) -> list[QuicStream]:
        if self._priorities:
            priorities = self._priorities
            self._queue.sort(key=lambda stream: -priorities.get(stream.stream_id, 0))  # type: ignore[arg-type]
        return self._queue

    @_streams_queue.setter
    def _streams_queue(self, queue: list[QuicStream]) -> None:
        self._queue = queue

    def set_priority(self, stream_id: int, priority: int) -> None:
        """Higher ones are sent first."""
        if priority:
            self._priorities[stream_id] = priority

    @property
    def may_open_stream(self) -> bool:
        """Whether the peer allows one more."""
        return self.get_next_available_stream_id() // 4 < self._remote_max_streams_bidi

    def next_stream_id(self) -> int:
        """A new bidirectional stream of this side."""
        stream_id = self.get_next_available_stream_id()
        self._get_or_create_stream_for_send(stream_id)
        self.streams_total += 1
        return stream_id

    def forget(self, stream_id: int) -> None:
        """The owner is done with a stream."""
        self._stream_consumed.pop(stream_id, None)
        self._priorities.pop(stream_id, None)

    def buffered(self, stream_id: int) -> int:
        """Bytes written and not acknowledged."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.sender._buffer_stop - stream.sender._buffer_start

    def sent_all(self, stream_id: int) -> bool:
        """Whether the peer has acknowledged all that was written, the end included where there is one."""
        sender = self._streams[stream_id].sender if stream_id in self._streams else None
        if sender is None or sender.is_finished:
            return True
        return sender._buffer_stop == sender._buffer_start and sender._buffer_fin is None

    def receives(self, stream_id: int) -> bool:
        """Whether the peer may still send on the stream."""
        stream = self._streams.get(stream_id)
        return stream is not None and not stream.receiver.is_finished

    def drop(self, stream_id: int, code: int) -> None:
        """End both directions of a stream at once (RFC 9000 section 3.5)."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.sender.reset(code)
            self.was_stopped(stream_id)
            if not stream.receiver.is_finished:
                stream.receiver.stop(code)

    def was_stopped(self, stream_id: int) -> None:
        """What was written will not be sent, and aioquic keeps it until the other direction ends too."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.sender._buffer.clear()
            stream.sender._buffer_start = stream.sender._buffer_stop

    def was_reset(self, stream_id: int) -> None:
        """What did not come counts for the connection's window all the same (RFC 9000 section 4.5)."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self.discarded(stream.receiver.highest_offset - stream.receiver._buffer_start)
            stream.receiver._buffer.clear()

    @property
    def held(self) -> int:
        """Bytes that wait to be read, those behind a gap included, or to be acknowledged."""
        return self._local_max_data.used - self._consumed + sum(map(self.buffered, self._streams))

    @property
    def blocked(self) -> bool:
        """Whether something waits for the peer's flow control."""
        if self._remote_max_data_used >= self._remote_max_data:
            return any(not stream.sender.buffer_is_empty for stream in self._streams.values())
        return any(
            stream.is_blocked or stream.sender.next_offset >= stream.max_stream_data_remote
            for stream in self._streams.values()
            if not stream.sender.buffer_is_empty and len(stream.sender._pending)
        )

    # --- loss recovery and figures ------------------------------------------------------------

    def _count_losses(self) -> None:
        lost = self._loss._on_packets_lost

        def counted(*, packets: Iterable[Any], congestion_event: bool = True, **rest: Any) -> None:
            found: Collection[Any] = list(packets)
            if congestion_event:  # otherwise they are only sent again early
                self.packets_lost += len(found)
            lost(packets=found, congestion_event=congestion_event, **rest)

        self._loss._on_packets_lost = counted  # type: ignore[method-assign]

    def _send_probe(self) -> None:
        super()._send_probe()
        self.probe_timeouts += 1
        loss = self._loss
        if loss._pto_count >= _BLACK_HOLE:
            self._max_datagram_size = SMALLEST_MAX_DATAGRAM_SIZE
        if not self._handshake_confirmed:
            return
        slowest = max(_SLOWEST_PROBE, loss.get_probe_timeout())
        while loss._pto_count and loss.get_probe_timeout() * 2**loss._pto_count > slowest:
            loss._pto_count -= 1

    def _payload_received(self, *arguments: Any, **named: Any) -> tuple[bool, bool]:
        self.packets_received += 1
        return super()._payload_received(*arguments, **named)

    @property
    def packets_sent(self) -> int:
        return self._packet_number

    @property
    def rtt(self) -> tuple[float, float, float] | None:
        """Smoothed, least and latest, in seconds; None before the first sample."""
        loss = self._loss
        return (loss._rtt_smoothed, loss._rtt_min, loss._rtt_latest) if loss._rtt_initialized else None

    @property
    def probe_timeout(self) -> float:
        """Seconds without an answer after which something is sent again (RFC 9002 section 6.2)."""
        return self._loss.get_probe_timeout()

    @property
    def congestion_window(self) -> int:
        return self._loss.congestion_window

    @property
    def bytes_in_flight(self) -> int:
        return self._loss.bytes_in_flight

    @property
    def waiting(self) -> bool:
        """Whether something was sent that the peer must acknowledge and has not."""
        return any(space.ack_eliciting_in_flight for space in self._loss.spaces)

    @property
    def acknowledged(self) -> int:
        """The largest packet number that the peer has acknowledged after the handshake."""
        return self._spaces[tls.Epoch.ONE_RTT].largest_acked_packet

    @property
    def streams_open(self) -> int:
        return len(self._streams)

    @property
    def datagram_size(self) -> int:
        return self._max_datagram_size

    @property
    def quic_version(self) -> int | None:
        return {0x00000001: 1, 0x6B3343CF: 2}.get(self._version or 0)

    # --- TLS ----------------------------------------------------------------------------------

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        if not from_session_ticket:
            found = pull_quic_transport_parameters(Buffer(data=data))
            self.stationary = bool(found.disable_active_migration)
            if found.ack_delay_exponent is not None:  # aioquic forgets it
                self._remote_ack_delay_exponent = found.ack_delay_exponent

    def _initialize(self, peer_cid: bytes) -> None:
        if self._is_client:  # a second time after Retry or Version Negotiation
            self._send_again(self._loss.spaces)
        super()._initialize(peer_cid)
        if not self._is_client and not self._early_data:
            self.tls._max_early_data = None

    def _update_traffic_key(
        self, direction: tls.Direction, epoch: tls.Epoch, cipher_suite: tls.CipherSuite, secret: bytes
    ) -> None:
        if epoch is tls.Epoch.ZERO_RTT and not self._is_client and not self._early_data:
            self.tls.early_data_accepted = False  # TLS has not told the client yet that it would be
            return
        super()._update_traffic_key(direction, epoch, cipher_suite, secret)

    def _send_again(self, spaces: Iterable[QuicPacketSpace]) -> None:
        """What is under way there will never be acknowledged, and is no loss either: early data that the
        server did not take (RFC 9001 section 4.6.2), what a Retry made void (RFC 9000 section 17.2.5)."""
        for space in spaces:
            packets, now = tuple(space.sent_packets.values()), self._clock()
            self._loss._on_packets_lost(packets=packets, space=space, now=now, congestion_event=False)

    @property
    def handshake_complete(self) -> bool:
        return self._handshake_complete

    @property
    def early_data_accepted(self) -> bool:
        return bool(self.tls.early_data_accepted)

    @property
    def resumed(self) -> bool:
        return bool(self.tls.session_resumed)

    @property
    def sends_early_data(self) -> bool:
        """Client: whether what is written now goes out in 0-RTT."""
        return bool(self._cryptos[tls.Epoch.ZERO_RTT].send.is_valid())

    @property
    def alpn(self) -> str | None:
        return self.tls.alpn_negotiated

    @property
    def peer_certificate(self) -> bytes | None:
        """DER, where the handshake brought one: a resumed session has none."""
        certificate = self.server_certificate
        return None if certificate is None else certificate.public_bytes(Encoding.DER)

    @property
    def server_certificate(self) -> Certificate | None:
        """None in a resumed session."""
        return self.tls._peer_certificate

    def renew_keys(self) -> None:
        """Asks for a key update after enough packets, one of them acknowledged (RFC 9001 section 6)."""
        sent = self._packet_number
        if not self._key_update or sent - self._key_phase_from < self._key_update:
            return
        if self._handshake_confirmed and self.acknowledged >= self._key_phase_from:
            self._key_phase_from = sent
            self.request_key_update()

    def _write_connection_close_frame(self, *arguments: Any, **named: Any) -> None:
        # aioquic cannot make a packet of a long one, such as the list of a certificate's names
        named["reason_phrase"] = named["reason_phrase"][:_REASON]
        super()._write_connection_close_frame(*arguments, **named)

    # --- stateless reset, and what an endpoint needs -------------------------------------------

    def _name_resets(self) -> None:
        if self._reset_key:
            for one in self._host_cids:
                one.stateless_reset_token = reset_token(self._reset_key, one.cid)

    def _replenish_connection_ids(self) -> None:
        super()._replenish_connection_ids()
        self._name_resets()

    def is_stateless_reset(self, data: bytes) -> bool:
        """Whether a datagram says that the peer knows nothing of this connection any more."""
        return is_reset(data, [self._peer_cid.stateless_reset_token])  # an unused id's does not count

    def lost(self, code: int, reason: str) -> None:
        """It is over without another word (stateless reset, a dead path)."""
        if self._state in END_STATES:
            return
        self._lost = True
        self._close_event = ConnectionTerminated(code, QuicFrameType.PADDING, reason)
        self._set_state(QuicConnectionState.DRAINING)

    def make_datagrams(self, now: float) -> tuple[list[tuple[bytes, Any]], bool]:
        """Datagrams and their addresses, and whether there are more to be made at once."""
        self._pacer.begin()
        found = self.datagrams_to_send(now)
        self._pacer.sent(sum(len(one[0]) for one in found))
        return found, self._pacer.exhausted

    @property
    def address(self) -> Any:
        """Where the peer is now: a migration changes it."""
        return self._network_paths[0].addr if self._network_paths else None

    @property
    def connection_ids(self) -> list[bytes]:
        return [one.cid for one in self._host_cids]

    @property
    def confirmed(self) -> bool:
        """Whether the handshake is, on both sides: then a client may move (RFC 9000 section 9)."""
        return self._handshake_confirmed

    def can_migrate(self) -> bool:
        """Whether it can move without being recognised by its connection id."""
        return self._handshake_confirmed and bool(self._peer_cid_available)

    def take_datagram(self, data: bytes, address: Any, now: float) -> None:
        """`receive_datagram` that nothing in the datagram can make raise."""
        try:
            self.receive_datagram(data, address, now)
        except Exception as error:  # noqa: BLE001 - a stranger's bytes must not end more than their connection
            log.warning("a datagram could not be dealt with (%r): the connection is closed", error)
            self.close(QuicErrorCode.INTERNAL_ERROR, QuicFrameType.PADDING, "internal error")
        if self._quic_logger is not None:
            self._configuration.quic_logger.settle(self._quic_logger)  # type: ignore[union-attr]

    def take_events(self) -> list[QuicEvent]:
        found = list(self._events)
        self._events.clear()
        return found

    def due(self) -> float:
        """When `handle_timer` wants to be called; infinity where never."""
        at = self.get_timer()
        return math.inf if at is None else at
