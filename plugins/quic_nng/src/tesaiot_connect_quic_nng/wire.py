"""A worker's sockets: to the process that started it, and to the client.

Owns: what is said and heard on the control socket, and what a selector waits for on the data socket. Rule:
every `Ping` is answered by whoever calls `hear`, which is the loop that serves the connection.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time

from . import control
from .control import Ping, Pong, Report
from .watches import Company

_PIECE = 65_536


def say(orders: socket.socket, report: Report) -> None:
    """Whether or not somebody hears it."""
    orders.setblocking(True)
    with contextlib.suppress(OSError):
        orders.sendall(control.line(report))
    orders.setblocking(False)


class Orders:
    """The control socket of a worker that has its job. `company` is told of each sign of life."""

    def __init__(self, orders: socket.socket, company: Company) -> None:
        orders.setblocking(False)
        self.socket = orders
        self._company = company
        self._heard = b""
        """Up to the end of a line."""

    def hear(self) -> bool:
        """Takes what was said and answers it. False: the other process has gone."""
        try:
            piece = self.socket.recv(_PIECE)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        *lines, self._heard = (self._heard + piece).split(b"\n")
        for line in lines:
            order = control.orders.decode(line)
            if isinstance(order, Ping):
                self._company.heard(time.monotonic())
                say(self.socket, Pong(order.number))
        return bool(piece)


class Interest:
    """What a selector waits for on the data socket; at first nothing."""

    def __init__(self, selector: selectors.BaseSelector, data: socket.socket) -> None:
        data.setblocking(False)
        self._selector = selector
        self._data = data
        self._events = 0

    def want(self, *, read: bool, write: bool) -> None:
        events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
        if events == self._events:
            return
        if not events:
            self._selector.unregister(self._data)
        elif not self._events:
            self._selector.register(self._data, events)
        else:
            self._selector.modify(self._data, events)
        self._events = events
