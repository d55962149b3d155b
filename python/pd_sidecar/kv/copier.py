"""The interface of moves between an engine's pages and the slots of a sidecar's buffer.

`host_copy` implements the interface for host memory, `gpu` for a GPU; `device` chooses between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from pd_sidecar.kv.parts import Parts
    from pd_sidecar.kv.plan import Part
    from pd_sidecar.sidecar.connection import Connection

Mark = Any
"""A point in the engine's sequence of GPU work."""


@dataclass(frozen=True)
class Piece:
    """A part of a chunk, with its slot and its blocks."""

    slot: int
    table: torch.Tensor
    """The request's block ids, int64."""
    packed: tuple[int, int]
    """The tokens `[from, to)` that the slot holds."""
    tokens: tuple[int, int]
    """The tokens `[from, to)` to move, a part of `packed`."""
    part: int = 0
    """The index of the group in the layout."""
    offset: int = 0
    """The first byte of the part in the slot."""
    start: int = 0
    """For state: the first byte of the part in the group's state."""
    bytes: int = 0
    """For state: the bytes of the part."""

    def has_blocks(self, block_tokens: int) -> bool:
        """Returns false if the block table has no block for a token or for the state. vLLM replaces a block by the null
        block, which has the number 0, when the block's tokens have left the window. Another request's KV is then in the
        block. `block_tokens` is the number of tokens of a block; 0 for a state, which lies in the table's last block.
        """
        if not block_tokens:
            return self.table.numel() > 0 and int(self.table[-1]) > 0
        first, last = self.tokens[0] // block_tokens, -(-self.tokens[1] // block_tokens)
        blocks = self.table[first:last]
        return blocks.numel() == last - first and bool((blocks > 0).all())


def piece_of(part: Part, slot: int, table: torch.Tensor, tokens: tuple[int, int] | None = None) -> Piece:
    """Returns the piece of a part of a plan; of the part's tokens only `tokens`, if there is such a range."""
    return Piece(slot, table, part.tokens, tokens or part.tokens, part.group, part.offset, part.start, part.bytes)


class Fence(Protocol):
    """The end of a move. Slots and blocks may be reused only after the move."""

    def done(self) -> bool:
        """Returns true if the move is over. Does not wait."""
        ...

    @property
    def seconds(self) -> float:
        """The seconds that the move took. Valid when the move is over."""
        ...


class LayeredCopy(Protocol):
    """A gather by ranges of layers, launched by the engine's thread between the layers that it computes."""

    def gather(self, below: int, signal: int) -> None:
        """Gathers the layers from the previous range's end to layer `below` (exclusive), then records the event
        `signal`.
        """
        ...

    @property
    def fence(self) -> Fence:
        """A fence that is done when the gathers of all ranges are over."""
        ...


class Copier(Protocol):
    """Gathers and scatters between one worker's tensors and one buffer."""

    def gather(
        self,
        pieces: Sequence[Piece],
        after: Iterable[Mark],
        signal: int | None = None,
        *,
        last: bool = False,
    ) -> Fence:
        """Copies pages to slots. Then records the event `signal`, if there is one, so that the sidecar learns that the
        copy has ended. `last` is true if the engine has launched no work after the marks in `after`.
        """
        ...

    def layered_copy(self, pieces: Sequence[Piece]) -> LayeredCopy | None:
        """Starts a copy of pages to slots by ranges of layers. Returns `None` on a device where a copy by ranges saves
        no time.
        """
        ...

    def scatter(self, pieces: Sequence[Piece], after: Iterable[Mark]) -> Fence:
        """Copies slots to pages. Writes only the tokens that the pieces name."""
        ...


class Device(Protocol):
    """The device of a worker's KV."""

    name: str | None
    """The UUID of a GPU; `None` for host memory."""
    events: list[bytes]
    """The IPC handles of the events. The sidecar learns from these events that a gather has ended."""
    is_asynchronous: bool
    """True if a move may still run after the call that started it has returned."""

    def enter(self) -> None:
        """Prepares the calling thread for moves."""
        ...

    def mark(self) -> Mark:
        """Returns a mark: a point after all work that the calling thread has launched."""
        ...

    def hold(self, fence: Fence) -> None:
        """Makes all work that the calling thread launches from now on wait for this move."""
        ...

    def copier(self, parts: Parts, connection: Connection) -> Copier:
        """Returns the copier for a connection's buffer. Raises `OSError` if the buffer cannot be opened."""
        ...
