"""The MQTT engine: 3.1.1 and 5.0, client and server, sans-IO.

Bytes in, events out; messages in, bytes out. Rules of the room: no asyncio, socket, ssl, time
or pluggy; time is an argument (`now`, seconds of any monotonic clock); no input from the peer
raises anything but `ProtocolError`, loops, or allocates beyond the packet-size limit.

Public is what is in `__all__`: both engines with what they take and tell, for a plugin or program
that puts them in front of or behind another MQTT stack. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import ClientEngine as ClientEngine
    from .events import (
        Acknowledged as Acknowledged,
        AuthChallenge as AuthChallenge,
        Close as Close,
        Closed as Closed,
        Connected as Connected,
        ConnectRequest as ConnectRequest,
        Event as Event,
        Output as Output,
        Received as Received,
        Reset as Reset,
        Send as Send,
        StreamLost as StreamLost,
        Suback as Suback,
        SubscribeRequest as SubscribeRequest,
        UnsubscribeRequest as UnsubscribeRequest,
    )
    from .packets import (
        V3 as V3,
        V5 as V5,
        Connack as Connack,
        Connect as Connect,
        Subscribe as Subscribe,
        Subscription as Subscription,
        Unsubscribe as Unsubscribe,
        Will as Will,
    )
    from .properties import P as P, PropertyMap as PropertyMap
    from .reasons import R as R, words as words
    from .server import ServerEngine as ServerEngine, ServerLimits as ServerLimits
    from .session import InFlight as InFlight, Session as Session

_HOMES = {
    "client": ("ClientEngine",),
    "events": (
        "Acknowledged",
        "AuthChallenge",
        "Close",
        "Closed",
        "ConnectRequest",
        "Connected",
        "Event",
        "Output",
        "Received",
        "Reset",
        "Send",
        "StreamLost",
        "Suback",
        "SubscribeRequest",
        "UnsubscribeRequest",
    ),
    "packets": (
        "Connack",
        "Connect",
        "Subscribe",
        "Subscription",
        "Unsubscribe",
        "V3",
        "V5",
        "Will",
    ),
    "properties": ("P", "PropertyMap"),
    "reasons": ("R", "words"),
    "server": ("ServerEngine", "ServerLimits"),
    "session": ("InFlight", "Session"),
}
_EXPORTS = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604 - the table above is the one list of names
    *sorted(_EXPORTS),
]

if not TYPE_CHECKING:  # a type checker finds names that are not there, then

    def __getattr__(name):
        home = _EXPORTS.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{home}", __name__), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_EXPORTS})
