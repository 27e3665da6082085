"""quic_nng's worker with a clock that a test puts forward, to be started instead of the worker itself.

So what must not run out is long, and what must run out does so at once. Where TESAIOT_PATIENT is set, it also
waits for the last bytes as long as a busy machine may take.
"""

from __future__ import annotations

import os
import signal
import sys
import time

COMMAND = ("-P", __file__)
"""Behind the interpreter; the numbers of the data and the control socket follow."""
HOURS = 3600.0
"""Seconds that go by at once."""
LONG = 600.0
"""Seconds; what is allowed so many ends at `forward`, and at nothing else."""


def forward(pid: int) -> None:
    """It looks at its clock when something wakes it, an order for instance. It has said `Loaded` before."""
    os.kill(pid, signal.SIGUSR1)


def _main() -> None:
    real, ahead = time.monotonic, [0.0]

    def put_forward(*_: object) -> None:
        ahead[0] += HOURS

    time.monotonic = lambda: real() + ahead[0]
    signal.signal(signal.SIGUSR1, put_forward)
    from tesaiot_connect_quic_nng import worker

    if "TESAIOT_PATIENT" in os.environ:
        worker._FLUSH = 60.0
    worker.main(sys.argv[1:])


if __name__ == "__main__":
    _main()
