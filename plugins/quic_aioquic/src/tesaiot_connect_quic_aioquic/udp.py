"""One UDP socket on the running event loop, in bursts.

Owns: the socket, its options, its reader and writer, and the datagrams that wait for room. Knows
nothing of QUIC. Rule: a datagram that gets lost is counted and told, never raised; after `close`
nothing is left behind.

On Linux one system call carries many datagrams: segmentation offload (GSO, `UDP_SEGMENT`) out,
receive offload (GRO, `UDP_GRO`) in. Everywhere else, and where a device refuses it, plain calls do
the same. Loops without `add_reader` (Windows' Proactor) wait in `sock_recvfrom` instead.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NewType

Address = tuple[Any, ...]
"""As the socket module gives it: `(host, port)` or `(host, port, flow, scope)`; the host numeric."""

Local = NewType("Local", bytes)
"""Which of our addresses a datagram came to. Opaque: compare it, and give it back to `send`."""


class Datagram(NamedTuple):
    data: bytes
    address: Address  # where it came from
    local: Local | None  # None: not known, or there is only one


_LINUX = sys.platform == "linux"
_LARGEST = 65535  # bytes; also what GRO joins at most
_BURST_READS = 64  # system calls in one wakeup, so that others get their turn
_BURST_BYTES = 128 * 1024
_SEGMENTS = 64  # datagrams in one GSO call (UDP_MAX_SEGMENTS)
_SEGMENTS_BYTES = 65_000
_QUEUE_DATAGRAMS = 2048  # what may wait for room
_QUEUE_BYTES = 2 * 1024 * 1024
_RETRY = 0.002  # seconds until the next try where the loop cannot say that there is room

# numbers of Linux' headers that the socket module does not name (linux/udp.h, linux/in.h, linux/in6.h)
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50
_ANCILLARY = 128  # bytes: room for a GRO size and an in6_pktinfo with their headers

_IP, _IPV6 = socket.IPPROTO_IP, socket.IPPROTO_IPV6
_DONT_FRAGMENT = {
    "linux": {_IP: (10, 2), _IPV6: (23, 2)},  # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER = DO
    "darwin": {_IP: (28, 1), _IPV6: (62, 1)},  # IP_DONTFRAG, IPV6_DONTFRAG
    "win32": {_IP: (14, 1), _IPV6: (14, 1)},  # IP_DONTFRAGMENT, IPV6_DONTFRAG
}
_MTU = {"linux": {_IP: 14, _IPV6: 24}, "win32": {_IP: 73, _IPV6: 72}}  # IP_MTU, IPV6_MTU

_NO_ROOM = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS})
_GSO_REFUSED = frozenset({errno.EIO, errno.EINVAL})  # a device, or a tunnel, that cannot do it

_new = tuple.__new__  # a Datagram without the detour over its own __new__: 15 % of a read


class UdpSocket:
    """Sends and receives on one bound socket, which it owns from here on.

    Make it where the loop runs. `connected` is the remote of a connect()ed socket: all datagrams
    go there and come from there. `offload=False` keeps to one system call a datagram.

    Counters: `too_big` counts what was longer than the path takes, `dropped` what else got lost here.
    """

    def __init__(
        self, sock: socket.socket, *, connected: Address | None = None, offload: bool = True
    ) -> None:
        sock.setblocking(False)
        self.family = sock.family
        self.local_address: Address = sock.getsockname()
        self.blocked = False
        self.datagrams_received = self.datagrams_sent = 0
        self.bytes_received = self.bytes_sent = 0
        self.dropped = self.too_big = 0
        self.reads = self.writes = 0  # system calls
        self._sock = sock
        self._fd = sock.fileno()
        self._connected = connected
        self._loop = asyncio.get_running_loop()
        self._selects = True  # until the loop says that it has no add_reader
        self._reading = self._closed = False
        self._offload = offload and _LINUX
        self._gso = self._offload and _option(sock, _SOL_UDP, _UDP_SEGMENT, 0)
        self._pktinfo = _pktinfo_of(sock) if connected is None else None
        self._receive = self._receive_plain
        self._waiting: asyncio.Task[tuple[bytes, Address]] | None = None
        self._held: list[Datagram] = []  # came while reading was paused, on a loop without add_reader
        self._queue: deque[tuple[Sequence[bytes], Address, Local | None]] = deque()
        self._queued = self._queued_bytes = 0
        self._no_room = 0  # the errno of the last write that found no room
        self._retry: asyncio.TimerHandle | None = None
        self._told: dict[int | None, OSError] = {}
        self._on_datagrams: Callable[[list[Datagram]], None] = lambda datagrams: None
        self._on_error: Callable[[OSError], None] = lambda error: None
        self._on_writable: Callable[[], None] = lambda: None

    def start(
        self,
        on_datagrams: Callable[[list[Datagram]], None],
        on_error: Callable[[OSError], None],
        on_writable: Callable[[], None],
    ) -> None:
        """Begin to read. The callbacks run on the loop, never inside `send`.

        `on_datagrams` has all that one wakeup read, in order, and is never called with an empty
        list. `on_error` has what the network said of earlier datagrams (refused, unreachable,
        too big), each kind once per loop turn; the socket stays usable. `on_writable` ends `blocked`.
        """
        self._on_datagrams, self._on_error, self._on_writable = on_datagrams, on_error, on_writable
        self.resume()
        if not self._selects:
            return  # sock_recvfrom brings no ancillary data
        gro = self._offload and _option(self._sock, _SOL_UDP, _UDP_GRO, 1)
        if gro or self._pktinfo is not None:
            self._receive = self._receive_messages

    @property
    def path_mtu(self) -> int | None:
        """What the system knows of the path of a connected socket, in bytes with the IP header."""
        level = _IPV6 if self.family == socket.AF_INET6 else _IP
        option = _MTU.get(sys.platform, {}).get(level)
        if self._connected is None or option is None or self._closed:
            return None
        try:
            return self._sock.getsockopt(level, option)
        except OSError:
            return None

    # --- reading

    def pause(self) -> None:
        """Read no more; what comes waits in the system's buffer, and is lost beyond it."""
        if self._reading:
            self._reading = False
            self._watch()

    def resume(self) -> None:
        if not self._reading and not self._closed:
            self._reading = True
            self._watch()

    def _readable(self) -> None:
        got, self._held = self._held, []
        try:
            self._receive(got)
        except BlockingIOError:
            pass
        except OSError as error:
            self.too_big += error.errno == errno.EMSGSIZE
            self._tell(error)
        if got:
            self.datagrams_received += len(got)
            self._on_datagrams(got)

    def _receive_plain(self, got: list[Datagram]) -> None:
        """One burst, one call a datagram. Raises OSError where it ends; `got` has what came before."""
        address = self._connected
        end = self.bytes_received + _BURST_BYTES
        for _ in range(_BURST_READS):
            self.reads += 1
            if address is not None:
                data, source = self._sock.recv(_LARGEST), address
            else:
                data, source = self._sock.recvfrom(_LARGEST)
            got.append(_new(Datagram, (data, source, None)))
            self.bytes_received += len(data)
            if self.bytes_received >= end:
                return

    def _receive_messages(self, got: list[Datagram]) -> None:
        """One burst with ancillary data: joined datagrams are taken apart, and know where they came to."""
        # recvmsg beats recvmsg_into: a lone datagram needs no copy, and bytes slice faster than views
        receive, connected, pktinfo = self._sock.recvmsg, self._connected, self._pktinfo
        end = self.bytes_received + _BURST_BYTES
        for _ in range(_BURST_READS):
            self.reads += 1
            data, ancillary, _, address = receive(_LARGEST, _ANCILLARY)
            if connected is not None:
                address = connected
            size = segment = len(data)
            local = None
            for level, kind, value in ancillary:
                if level == _SOL_UDP and kind == _UDP_GRO:
                    segment = int.from_bytes(value[:4], sys.byteorder)
                elif (level, kind) == pktinfo:
                    local = _local(level, value)
            if segment >= size:
                got.append(_new(Datagram, (data, address, local)))
            else:
                got += [
                    _new(Datagram, (data[i : i + segment], address, local)) for i in range(0, size, segment)
                ]
            self.bytes_received += size
            if self.bytes_received >= end:
                return

    # --- sending

    def send(self, datagrams: Sequence[bytes], address: Address, local: Local | None = None) -> bool:
        """Send them all, in order. False: there is no room, some wait here until `on_writable`.

        `local` is that of a received datagram: the answer leaves from the address that was asked.
        What does not fit in the queue is dropped, and so is what comes after `close`.
        """
        if self._closed:
            self.dropped += len(datagrams)
            return True
        if not self.blocked:
            done = self._write(datagrams, address, local)
            if done == len(datagrams):
                return True
            datagrams = datagrams[done:]
            self.blocked = True
            self._wait_for_room()
        self._hold(datagrams, address, local)
        return False

    def _write(self, datagrams: Sequence[bytes], address: Address, local: Local | None) -> int:
        """Returns how many are done with, sent or lost; when not all, `_no_room` says why."""
        to = None if self._connected is not None else address
        ancillary = [] if local is None or self._pktinfo is None else [(*self._pktinfo, local)]
        sock, gso = self._sock, self._gso
        done, count = 0, len(datagrams)
        plain = 0  # up to here one by one, because sending them together failed
        refused = False  # ... in a way that may mean that there is no GSO here
        again = -1  # this one had an error that may have been an earlier one's
        while done < count:
            data = datagrams[done]
            size, end = len(data), done + 1
            if gso and done >= plain and size:
                last = min(count, done + _SEGMENTS, done + max(1, _SEGMENTS_BYTES // size))
                while end < last and len(datagrams[end]) == size:
                    end += 1
                if end < last and 0 < len(datagrams[end]) < size:
                    end += 1
            self.writes += 1
            try:
                if end > done + 1:
                    data = b"".join(datagrams[done:end])
                    segment = (_SOL_UDP, _UDP_SEGMENT, size.to_bytes(2, sys.byteorder))
                    sock.sendmsg((data,), (*ancillary, segment), 0, to)
                elif ancillary:
                    sock.sendmsg((data,), ancillary, 0, to)
                elif to is None:
                    sock.send(data)
                else:
                    sock.sendto(data, to)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._no_room = error.errno or 0
                    return done
                if end > done + 1:
                    plain, refused = end, error.errno in _GSO_REFUSED
                    if not refused:
                        self._tell(error)
                    continue
                self._tell(error)
                # a connected socket also reports here what became of an earlier datagram
                if to is None and again != done:
                    again = done
                    continue
                if error.errno == errno.EMSGSIZE:
                    self.too_big += 1
                else:
                    self.dropped += 1
                refused = False
            else:
                self.datagrams_sent += end - done
                self.bytes_sent += len(data)
                if refused:  # alone it went: GSO is what is missing
                    self._gso = gso = refused = False
            done = end
        return done

    def _hold(self, datagrams: Sequence[bytes], address: Address, local: Local | None) -> None:
        kept: list[bytes] = []
        for data in datagrams:
            if self._queued >= _QUEUE_DATAGRAMS or self._queued_bytes + len(data) > _QUEUE_BYTES:
                break
            kept.append(data)
            self._queued += 1
            self._queued_bytes += len(data)
        self.dropped += len(datagrams) - len(kept)
        if kept:
            self._queue.append((kept, address, local))

    def _wait_for_room(self) -> None:
        # ENOBUFS comes from the device's queue, not from the socket, which would look writable
        self._watch()
        if self._retry is None and (not self._selects or self._no_room == errno.ENOBUFS):
            self._retry = self._loop.call_later(_RETRY, self._flush)

    def _flush(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        before, self._no_room = self._no_room, 0
        while self._queue:
            datagrams, address, local = self._queue.popleft()
            done = self._write(datagrams, address, local)
            self._queued -= done
            self._queued_bytes -= sum(map(len, datagrams[:done]))
            if done < len(datagrams):
                self._queue.appendleft((datagrams[done:], address, local))
                if self._no_room != before or before == errno.ENOBUFS or not self._selects:
                    self._wait_for_room()
                return
        self.blocked = False
        self._watch()
        self._on_writable()

    # --- the loop

    def _watch(self) -> None:
        """Ask the loop for what we wait for now, and for nothing else.

        Always from scratch: uvloop drops reader and writer of a socket that had an error pending,
        and refuses to add one to what it dropped.
        """
        loop, fd = self._loop, self._fd
        if self._selects:
            try:
                loop.remove_reader(fd)
                loop.remove_writer(fd)
                if self._reading:
                    loop.add_reader(fd, self._readable)
                if self.blocked and self._no_room != errno.ENOBUFS:
                    loop.add_writer(fd, self._flush)
            except NotImplementedError:
                self._selects = False
        if not self._selects and self._reading and self._waiting is None:
            if self._held:
                loop.call_soon(self._drain)
            else:
                self._wait()

    def _wait(self) -> None:
        self._waiting = self._loop.create_task(self._loop.sock_recvfrom(self._sock, _LARGEST))
        self._waiting.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[tuple[bytes, Address]]) -> None:
        self._waiting = None
        if task.cancelled():
            return
        error = task.exception()
        if self._closed:
            return
        self.reads += 1
        if error is None:
            data, address = task.result()
            self.bytes_received += len(data)
            self._held.append(Datagram(data, self._connected or address, None))
        elif isinstance(error, OSError):
            self._tell(error)
        else:
            raise error
        self._drain()

    def _drain(self) -> None:
        """On a loop without add_reader: the burst behind the datagram that was waited for."""
        if self._reading:
            try:
                self._readable()
            finally:
                self._watch()

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._loop.call_soon(self._report)
        self._told.setdefault(error.errno, error)

    def _report(self) -> None:
        told, self._told = self._told, {}
        if self._connected is not None and not self._closed:
            self._watch()
        for error in told.values():
            if not self._closed:
                self._on_error(error)

    def close(self) -> None:
        """Close the socket at once; what waits for room is dropped. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reading = self.blocked = False
        self._watch()
        if self._retry is not None:
            self._retry.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        self.dropped += self._queued
        self._queue.clear()
        self._held.clear()
        self._sock.close()


def open_socket(
    family: int,
    *,
    local: Address | None = None,
    remote: Address | None = None,
    receive_buffer: int = 0,
    send_buffer: int = 0,
    reuse_port: bool = False,
    v6only: bool | None = None,
) -> socket.socket:
    """A UDP socket that is bound, connected to `remote` when given, and never fragments.

    `local` None takes a free port on every address. Buffers are in bytes, best effort; 0 leaves the
    system's. `reuse_port` lets several processes share one port (Linux, macOS). `v6only` None
    leaves the system's choice. Bound to every address and not connected, a socket learns which of
    its addresses a datagram came to (Linux). Raises OSError, and then leaves no socket.
    """
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6 and v6only is not None:
            sock.setsockopt(_IPV6, socket.IPV6_V6ONLY, v6only)
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)  # Windows: else anyone may share the port
        if exclusive is not None:
            _option(sock, socket.SOL_SOCKET, exclusive, 1)
        if reuse_port:
            if not hasattr(socket, "SO_REUSEPORT"):
                raise OSError(errno.ENOPROTOOPT, "this system has no SO_REUSEPORT")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for option, size in ((socket.SO_RCVBUF, receive_buffer), (socket.SO_SNDBUF, send_buffer)):
            while size > 0 and not _option(sock, socket.SOL_SOCKET, option, size):
                size //= 2  # macOS refuses what is too much, Linux takes its limit
        for level, (option, value) in _DONT_FRAGMENT.get(sys.platform, {}).items():
            # a dual-stack IPv6 socket needs both
            if level == _IPV6 and family != socket.AF_INET6:
                continue
            _option(sock, level, option, value)
        if local is not None or remote is None:
            sock.bind(local or ("::" if family == socket.AF_INET6 else "0.0.0.0", 0))  # noqa: S104
        if remote is not None:
            sock.connect(remote)
        elif _LINUX and sock.getsockname()[0] in ("0.0.0.0", "::"):  # noqa: S104
            level, option = (_IPV6, _IPV6_RECVPKTINFO) if family == socket.AF_INET6 else (_IP, _IP_PKTINFO)
            _option(sock, level, option, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _option(sock: socket.socket, level: int, option: int, value: int) -> bool:
    """Set it; False where the system does not have it."""
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def _pktinfo_of(sock: socket.socket) -> tuple[int, int] | None:
    """Level and type of the ancillary data that carries our address; None when it is off."""
    if not _LINUX:
        return None
    level, option, kind = (
        (_IPV6, _IPV6_RECVPKTINFO, _IPV6_PKTINFO)
        if sock.family == socket.AF_INET6
        else (_IP, _IP_PKTINFO, _IP_PKTINFO)
    )
    return (level, kind) if sock.getsockopt(level, option) else None


def _local(level: int, pktinfo: bytes) -> Local:
    """A received in_pktinfo or in6_pktinfo as one to send with.

    The interface is left to the routing table: an answer need not leave where the question came in.
    Link-local addresses alone mean nothing without theirs.
    """
    if level == _IP:  # ifindex, our address, the header's destination
        return Local(b"\0\0\0\0" + pktinfo[4:8] + b"\0\0\0\0")
    if pktinfo[0] == 0xFE and pktinfo[1] & 0xC0 == 0x80:
        return Local(pktinfo[:20])
    return Local(pktinfo[:16] + b"\0\0\0\0")
