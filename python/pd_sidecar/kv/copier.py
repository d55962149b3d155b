"""The interface of moves between an engine's pages and the slots of a sidecar's buffer.

`kernels` implements it for host memory, `gpu` for a GPU; `devices` chooses between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from pd_sidecar.kv.layout import Geometry
    from pd_sidecar.sidecar.connection import Connection

Mark = Any
"""A point in the engine's computing."""


@dataclass(frozen=True)
class Piece:
    """A part of a chunk, and where it lies."""

    slot: int
    table: torch.Tensor
    """The request's block ids, int64."""
    packed: tuple[int, int]
    """The tokens `[from, to)` that stand in the slot."""
    tokens: tuple[int, int]
    """The tokens of them to be moved."""


class Fence(Protocol):
    """The end of a move. A slot or block is reused only after it."""

    def done(self) -> bool:
        """The move is over."""
        ...

    @property
    def seconds(self) -> float:
        """What it took, once it is over."""
        ...


class LayeredCopy(Protocol):
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

    def layered_copy(self, pieces: Sequence[Piece]) -> LayeredCopy | None:
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
