"""The RDMA devices of the emulated machine: `rxe0` and `rxe1`, at the two ends of a cable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLASS = Path("/sys/class/infiniband")

# Reliable connections for the data. UCX makes its connections with unreliable datagrams.
RC = {"UCX_TLS": "rc_verbs,ud_verbs,self", "UCX_NET_DEVICES": "rxe0:1"}
UD = {"UCX_TLS": "ud_verbs,self", "UCX_NET_DEVICES": "rxe0:1"}

# An emulated core needs seconds for the first link over verbs. The defaults of both times are 5 s.
LINK_MS = 60_000
NO_SENDER_MS = 90_000

# SoftRoCE puts at most this many bytes of data into a packet, over Ethernet with an MTU of 1500.
PACKET_BYTES = 1024


def packets(device: str = "rxe0") -> int:
    """Returns the number of packets that the device has sent."""
    return int((CLASS / device / "ports" / "1" / "hw_counters" / "sent_pkts").read_text())


@dataclass
class Sent:
    """Packets that the devices have sent during a block."""

    rxe0: int = 0
    rxe1: int = 0

    def carries(self, size: int) -> bool:
        """Returns true if the packets can have carried `size` bytes."""
        return (self.rxe0 + self.rxe1) * PACKET_BYTES >= size


@contextmanager
def counted() -> Iterator[Sent]:
    """Counts the packets of the block. The numbers are there after the block."""
    before = [packets("rxe0"), packets("rxe1")]
    sent = Sent()
    yield sent
    sent.rxe0, sent.rxe1 = packets("rxe0") - before[0], packets("rxe1") - before[1]


SYSTEMS_LIBIBVERBS = "/usr/lib/x86_64-linux-gnu/libibverbs.so.1"


def with_systems_libibverbs(folder: Path) -> dict[str, str]:
    """Returns the environment in which a program loads the system's libibverbs in the place of the copy in NIXL's
    wheel, as docs/rdma.md tells users.
    """
    (wheel,) = Path(sys.prefix).glob("lib/python3*/site-packages/nixl_cu*.libs/libibverbs-*")
    (folder / wheel.name).symlink_to(SYSTEMS_LIBIBVERBS)
    return {"LD_LIBRARY_PATH": str(folder)}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def slow_cable(*netem: str, end: str = "cable0") -> Iterator[None]:
    """Gives one direction of the cable a queue, for example with `rate 2mbit` or `delay 500ms`."""
    subprocess.run(["tc", "qdisc", "replace", "dev", end, "root", "netem", *netem], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", end, "root"], check=True)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for the processes that start in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
