"""What plugin authors and tests need: the conformance kit, and stand-ins for the outside world.

Owns: nothing that runs in production; no room imports this one. Rule: a check that fails says
which sentence of the contract was broken and what was seen instead.
"""

from __future__ import annotations

from .certificates import Certificates
from .clock import ManualClock
from .faults import Faulty
from .kit import ContractBroken, TransportCheck
from .pair import Network, PairTransport, connected_bundle, connected_pair
from .transport import check_transport, transport_checks

__all__ = [
    "Certificates",
    "ContractBroken",
    "Faulty",
    "ManualClock",
    "Network",
    "PairTransport",
    "TransportCheck",
    "check_transport",
    "connected_bundle",
    "connected_pair",
    "transport_checks",
]
