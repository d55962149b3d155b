"""Where an engine's KV lives, and how moves are ordered against its computing.

Host memory needs no order: the engine computes and copies in one thread. A GPU computes behind the
thread that launches: there a move runs on a stream of its own, after a *mark* that was set behind
the work it depends on, and its *fence* says when it is over. Nothing waits for the whole device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_sidecar.kv.host_copy import HostCopier

if TYPE_CHECKING:
    from pd_sidecar.kv.copier import Copier, Device, Fence, Mark
    from pd_sidecar.kv.layout import Geometry
    from pd_sidecar.sidecar.connection import Connection


class Host:
    """Host memory."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.events: list[bytes] = []
        self.is_asynchronous = False

    def enter(self) -> None:
        """Nothing to prepare."""

    def mark(self) -> Mark:
        """Everything is over when its call returns."""
        return None

    def hold(self, fence: Fence) -> None:
        """Nothing is under way."""

    def copier(self, pages: Geometry, connection: Connection) -> Copier:
        """For the mapped buffer."""
        if connection.memory is None:
            raise OSError("the sidecar's buffer is not host memory")
        return HostCopier(pages, connection.memory, connection.welcome.slot_bytes)


def device_of(pages: Geometry, chunk_tokens: int, *, signals: bool) -> Device:
    """The device that these tensors are on; with events for gathers, if asked for."""
    where = pages.first.tensor.device
    if where.type == "cpu":
        return Host()
    # Triton is there only where it is of use.
    from pd_sidecar.kv.gpu import Gpu

    return Gpu(pages, SIGNALS if signals else 0, chunk_tokens)


SIGNALS = 64
"""Gathers whose end the sidecar waits for by itself; one more is announced when it is over."""
