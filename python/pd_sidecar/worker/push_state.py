"""The state of a request whose KV a prefill worker pushes, and of its gathers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pd_sidecar.kv.copier import piece_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pd_sidecar.kv.copier import Fence, LayeredCopy, Piece
    from pd_sidecar.kv.plan import Plan
    from pd_sidecar.scheduler.metadata import PushStart
    from pd_sidecar.scheduler.tables import Tables


@dataclass
class Outgoing:
    """One request whose KV leaves this worker."""

    start: PushStart
    began: float
    tables: Tables = ()
    """The block ids, by vLLM group."""
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    """The same tables as tensors, by vLLM group, as far as pieces have used them."""
    computed: int = 0
    """The number of tokens whose KV is in the blocks of the table."""
    upto: int = 0
    """The number of tokens whose KV will be in the blocks when the step is over."""
    announced: int = 0
    have_tokens: int | None = None
    plan: Plan | None = None
    """The plan that follows from `have_tokens`."""
    wanted: frozenset[int] = frozenset()
    """The chunks that the receiver wants, as the plan says."""
    by_layers: bool = False
    """True if the sidecar asked for a gather layer by layer, because the KV then arrives sooner."""
    slots: dict[int, int] = field(default_factory=dict)
    """The granted slots of chunks that are not gathered yet, by chunk."""
    staged: set[int] = field(default_factory=set)
    gathering: int = 0
    gather_seconds: float = 0.0
    over: bool = False
    """True once neither the sidecar nor the receiver needs more of this request."""
    owes_cancel: bool = False
    dropped: bool = False
    """True once the engine has forgotten the request."""
    held_since: float | None = None
    """The time at which the engine finished the request. The engine holds the blocks until this worker reports the
    request.
    """

    def pieces(self, plan: Plan, chunk: int, slot: int, tables: Sequence[int]) -> list[Piece]:
        """Returns the parts of a chunk. `tables` has for each group of the layout the index of its vLLM group."""
        pieces = []
        for part in plan.parts(chunk):
            group = tables[part.group]
            if group not in self.tensors:
                self.tensors[group] = torch.tensor(self.tables[group], dtype=torch.int64)
            pieces.append(piece_of(part, slot, self.tensors[group]))
        return pieces


@dataclass(frozen=True)
class Entry:
    """A chunk that can be gathered."""

    outgoing: Outgoing
    chunk: int
    slot: int
    pieces: list[Piece]
    """The parts of the chunk, one for each group that has tokens or state in it."""


@dataclass(frozen=True)
class LayeredGather:
    """Chunks that are gathered layer by layer while the engine computes them."""

    entries: list[Entry]
    layered_copy: LayeredCopy
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """The ranges of layers that were gathered so far. Each entry has the first layer after the range, and the range's
    event.
    """

    @property
    def outgoings(self) -> list[Outgoing]:
        """The requests of the chunks, each once."""
        return list({id(entry.outgoing): entry.outgoing for entry in self.entries}.values())


@dataclass(frozen=True)
class Gather:
    """A gather of chunks of one request, in flight."""

    fence: Fence
    outgoing: Outgoing
    chunks: list[int]
    signalled: bool
    """True if the sidecar knows of the gather and waits for its event."""


def tokens_of(entries: Iterable[Entry]) -> int:
    """Returns the number of tokens in all entries of a layout with one group."""
    return sum(entry.pieces[0].tokens[1] - entry.pieces[0].tokens[0] for entry in entries)


def take_slots(entries: Iterable[Entry]) -> None:
    """Removes the entries' slots from their requests, because their gather starts now."""
    for entry in entries:
        del entry.outgoing.slots[entry.chunk]
