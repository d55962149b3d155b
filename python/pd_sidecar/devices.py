"""Where an engine's KV lives, and how moves are ordered against its computing.

Host memory needs no order: the engine computes and copies in one thread. A GPU computes behind the
thread that launches: there a move runs on a stream of its own, after a *mark* that was set behind
the work it depends on, and its *fence* says when it is over. Nothing waits for the whole device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from .kernels import HostCopier

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .connection import Connection
    from .kernels import Fence, Piece
    from .layout import Geometry

Mark = Any
"""A point in the engine's computing."""


class Division(Protocol):
    """A gather by ranges of layers, by the thread that computes, between what it computes."""

    def gather(self, below: int, signal: int) -> None:
        """The layers from the last range on; `signal` is the event of these."""
        ...

    @property
    def fence(self) -> Fence:
        """Of all that was gathered."""
        ...


class Copier(Protocol):
    """Gathers and scatters for one worker's tensors and one buffer."""

    def gather(
        self,
        pieces: Sequence[Piece],
        after: Iterable[Mark],
        signal: int | None = None,
        *,
        last: bool = False,
    ) -> Fence:
        """Pages to slots. `signal` is the event that the sidecar is told to wait for; `last` says
        that the engine has launched nothing after the marks."""
        ...

    def division(self, pieces: Sequence[Piece]) -> Division | None:
        """Pages to slots by ranges of layers; `None` where that is of no use."""
        ...

    def scatter(self, pieces: Sequence[Piece], after: Iterable[Mark]) -> Fence:
        """Slots to pages. Writes the tokens that the pieces name and no others."""
        ...


class Device(Protocol):
    """The device of a worker's KV."""

    name: str | None
    """Its UUID, of a GPU."""
    events: list[bytes]
    """Handles of the events that tell the sidecar of gathers under way."""
    is_asynchronous: bool
    """Moves go on after the call that started them."""

    def enter(self) -> None:
        """Makes the calling thread one that may move."""
        ...

    def mark(self) -> Mark:
        """A mark behind all that the calling thread has computed so far."""
        ...

    def hold(self, fence: Fence) -> None:
        """What the calling thread computes from now on waits for this move."""
        ...

    def copier(self, pages: Geometry, connection: Connection) -> Copier:
        """For the buffer of a connection. Raises `OSError` if it cannot be opened."""
        ...


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
    from .gpu import Gpu

    return Gpu(pages, SIGNALS if signals else 0, chunk_tokens)


SIGNALS = 64
"""Gathers whose end the sidecar waits for by itself; one more is announced when it is over."""
