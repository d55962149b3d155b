"""Returns the sockets on which a process listens, from the kernel's tables."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

# The value in the state column of /proc/net for a listening socket. For TCP this is the state TCP_LISTEN. For UDP this
# is the state of a socket without a peer.
_LISTENS = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}

# SO_ACCEPTCON in the flags column of /proc/net/unix.
_ACCEPTS = 0x10000


def listening(pid: int) -> set[str]:
    """Returns addresses: `tcp 127.0.0.1:7300`, `tcp [::1]:7300` or `unix /path`; an abstract name begins with `@`."""
    process = Path(f"/proc/{pid}")
    inodes = _inodes(process)
    found = set()
    for table, state in _LISTENS.items():
        for line in _lines(process / "net" / table):
            if line[9] in inodes and line[3] == state:
                found.add(f"{table.removesuffix('6')} {_address(line[1])}")
    for line in _lines(process / "net" / "unix"):
        if line[6] in inodes and int(line[3], 16) & _ACCEPTS:
            found.add(f"unix {line[7] if len(line) > 7 else ''}".strip())
    return found


def _inodes(process: Path) -> set[str]:
    inodes = set()
    for descriptor in (process / "fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # the process has closed the descriptor meanwhile
            continue
        if found := re.fullmatch(r"socket:\[(\d+)\]", target):
            inodes.add(found[1])
    return inodes


def _lines(table: Path) -> list[list[str]]:
    if not table.exists():  # this host has no IPv6
        return []
    return [line.split() for line in table.read_text().splitlines()[1:]]


def _address(text: str) -> str:
    """Parses an address. The kernel prints an address as words of 32 bits in the host's byte order."""
    address, port = text.split(":")
    words = [struct.pack("=I", int(address[at : at + 8], 16)) for at in range(0, len(address), 8)]
    raw = b"".join(words)
    if len(raw) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{int(port, 16)}"
