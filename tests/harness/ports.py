"""Ports that are free now and that no other part of this run gets."""

from __future__ import annotations

import random
import socket

# Below Linux's range for outgoing connections (32768 up), so that none of those takes a port between our look
# and the server's bind.
FIRST, LAST = 20_000, 32_000

_given: set[int] = set()


def free_port() -> int:
    """A TCP port on which nothing listens."""
    for _ in range(1000):
        port = random.randrange(FIRST, LAST)
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise RuntimeError(f"no free TCP port between {FIRST} and {LAST}")
