"""Text as a file, for a library that only reads files.

Owns: where it is. Rule: nobody else can read it, and it goes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def secret_file(text: str) -> Iterator[str]:
    """A path under which this process reads `text` for a while, and no other user's; "" for "".

    Linux keeps it in memory; elsewhere it is in a private file while the handshake lasts, and stays there
    where this process is killed meanwhile.
    """
    if not text:
        yield ""
    elif hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("pem"), "wb", buffering=0) as file:
            file.write(text.encode())
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(buffering=0) as named:
            named.write(text.encode())
            yield named.name
