"""Which endpoint a connection uses: a race, a memory and a way back up.

Owns: all of that, without knowing any transport by name. `race` and `memory` decide, without I/O; `track`,
`store` and `network` do; `Negotiator` puts them together.
"""

from .dialer import Negotiator
from .memory import Outlook
from .options import NegotiationOptions

__all__ = ["NegotiationOptions", "Negotiator", "Outlook"]
