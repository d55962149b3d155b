"""Assigns TCP ports and networks. Two programs never get the same port, even if they belong to two runs on one machine.

A run can have several interpreters at the same time (pytest-xdist's workers). A program binds its port only a moment
after the port was assigned. So a check that a port is free is not enough. Each interpreter locks blocks of ports and
assigns only ports of its own blocks. The system removes the locks when the interpreter ends, even after a crash. The
Rust tests use the same locks (`common/tests/all/ports.rs`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# These ports are below Linux's range for outgoing connections (from 32768). If a port were in this range, an outgoing
# connection could take the port between the check and the server's bind.
FIRST, LAST = 20_000, 30_000

BLOCK = 250

# One file per block. The files stay when the run ends; only the locks matter.
_LOCKS = Path(tempfile.gettempdir()) / f"pd-test-ports-{os.getuid()}"

_held: list[IO[bytes]] = []
# The ports of the last block that are not assigned yet, in falling order.
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
    span = max(offsets) + 1
    while True:
        # Take the next ports of the block in use: a block for each call would soon use up all blocks.
        if len(_left) < span:
            _left[:] = reversed(_lock_block())
        first = _left[-1]
        if all(is_free(first + offset) for offset in offsets):
            del _left[-span:]
            return first
        _left.pop()


def network() -> str:
    """Returns the first three numbers of a network with 254 addresses, which no other interpreter and no interface of
    this machine has. Two interfaces with one network would take each other's packets.
    """
    # The interfaces of a run that was killed may still be there. The kernel's table has their addresses.
    routes = Path("/proc/net/fib_trie")
    known = routes.read_text() if routes.exists() else ""
    for number in _locked("network-", range(1, 255)):
        if f" 10.213.{number}." not in known:
            return f"10.213.{number}"
    raise RuntimeError(f"all networks 10.213.1.0/24 to 10.213.254.0/24 are taken (locks in {_LOCKS})")


@contextmanager
def fixed(name: str) -> Iterator[None]:
    """Keeps other interpreters out of a block with the same name, because the block uses fixed ports."""
    _LOCKS.mkdir(exist_ok=True)
    with (_LOCKS / f"fixed-{name}").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    for first in _locked("", range(FIRST, LAST, BLOCK)):
        return range(first, first + BLOCK)
    raise RuntimeError(
        f"all {(LAST - FIRST) // BLOCK} blocks of TCP ports from {FIRST} to {LAST} are taken (locks in {_LOCKS}): "
        "end the other test runs of this machine"
    )


def _locked(name: str, numbers: range) -> Iterator[int]:
    """Locks the files with this name and these numbers one after the other, and yields each number whose file no other
    interpreter has locked.
    """
    _LOCKS.mkdir(exist_ok=True)
    for number in numbers:
        # `open` sets O_CLOEXEC, so a child that outlives this interpreter does not keep the lock.
        file = (_LOCKS / f"{name}{number}").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _held.append(file)
        yield number
