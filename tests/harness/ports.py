"""Finds ports that are free now, and gives each port to only one part of this run."""

from __future__ import annotations

import random
import socket

# Below Linux's range for outgoing connections (from 32768). Otherwise an outgoing connection could take a port between
# the check and the bind of the server.
FIRST, LAST = 20_000, 32_000

_given: set[int] = set()


def free_port() -> int:
    """Returns a TCP port on which no process listens."""
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
