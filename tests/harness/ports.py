"""Assigns TCP ports. Two programs never get the same port, even if they belong to two runs on one machine.

A run can have several interpreters at the same time (pytest-xdist's workers). A program binds its port only a moment
after the port was assigned. So a check that a port is free is not enough. Each interpreter locks blocks of ports and
assigns only ports of its own blocks. The system removes the locks when the interpreter ends, even after a crash.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

# These ports are below Linux's range for outgoing connections (from 32768). If a port were in this range, an outgoing
# connection could take the port between the check and the server's bind.
FIRST, LAST = 20_000, 30_000

BLOCK = 250

# One file per block. The files stay when the run ends; only the locks matter.
_LOCKS = Path(tempfile.gettempdir()) / f"pd-test-ports-{os.getuid()}"

_held: list[IO[bytes]] = []
_left: list[int] = []


def free_port() -> int:
    """Returns a TCP port on which no process listens."""
    while True:
        if not _left:
            _left.extend(reversed(_lock_block()))
        if is_free(port := _left.pop()):
            return port


def free_ports(offsets: tuple[int, ...]) -> int:
    """Returns a base port. For each of `offsets`, the port with the number base port + offset is free. The offsets are
    below `BLOCK`.
    """
    while True:
        first = _lock_block()[0]
        if all(is_free(first + offset) for offset in offsets):
            return first


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _lock_block() -> range:
    """Returns the ports of a block that no interpreter has locked."""
    _LOCKS.mkdir(exist_ok=True)
    for first in range(FIRST, LAST, BLOCK):
        # `open` sets O_CLOEXEC, so a child that outlives this interpreter does not keep the lock.
        file = (_LOCKS / str(first)).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _held.append(file)
        return range(first, first + BLOCK)
    raise RuntimeError(
        f"all {(LAST - FIRST) // BLOCK} blocks of TCP ports from {FIRST} to {LAST} are taken (locks in {_LOCKS}): "
        "end the other test runs of this machine"
    )
