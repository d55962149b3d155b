"""Chooses the device of an engine's KV, and orders moves relative to the engine's computing.

Host memory needs no order: a copy is over when its call returns, and the worker's lock keeps it out of the steps that
use its blocks. A GPU runs its work later than the thread that launches the work. So a move on a GPU waits for *marks*:
a mark is a point after the work on which the move depends. The move's *fence* tells when the move is over. No thread
waits for the whole device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_sidecar.kv.host_copy import HostCopier
from pd_sidecar.kv.parts_copy import PartsCopier

if TYPE_CHECKING:
    from pd_sidecar.kv.copier import Copier, Device, Fence, Mark
    from pd_sidecar.kv.parts import Parts
    from pd_sidecar.sidecar.connection import Connection


class Host:
    """The device of KV in host memory."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.events: list[bytes] = []
        self.is_asynchronous = False

    def enter(self) -> None:
        """Does nothing: every thread may start a move."""

    def mark(self) -> Mark:
        """Returns `None`: each call returns only when its work is done."""
        return None

    def hold(self, fence: Fence) -> None:
        """Does nothing: a move is over when its call returns."""

    def copier(self, parts: Parts, connection: Connection) -> Copier:
        """Returns the copier for the mapped buffer of a connection."""
        if connection.memory is None:
            raise OSError("the sidecar's buffer is not host memory")
        if parts.is_one:
            return HostCopier(parts.only, connection.memory, connection.welcome.slot_bytes)
        return PartsCopier(parts, connection.memory, connection.welcome.slot_bytes)


def device_of(parts: Parts, chunk_tokens: int, *, signals: bool) -> Device:
    """Returns the device of these tensors. If `signals` is true, the device has events, so that the sidecar can wait
    for the end of a gather.
    """
    if parts.device.type == "cpu":
        return Host()
    # Triton is installed only on hosts with a GPU.
    from pd_sidecar.kv.gpu import Gpu

    return Gpu(parts, SIGNALS if signals else 0, chunk_tokens)


SIGNALS = 64
"""The number of gathers whose end the sidecar can wait for at the same time. If more gathers run, the worker announces
each of the others only after it has ended.
"""
