"""What the prefill worker knows of a request that leaves it, and of its gathers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from pd_sidecar.kv.copier import Fence, LayeredCopy, Piece
    from pd_sidecar.scheduler.metadata import PushStart


@dataclass
class Outgoing:
    """One request whose KV leaves this worker."""

    start: PushStart
    began: float
    table: list[int] = field(default_factory=list)
    table_tensor: torch.Tensor | None = None
    computed: int = 0
    """Tokens whose KV stands in the blocks of the table."""
    upto: int = 0
    """Tokens whose KV will stand there when the step is over."""
    announced: int = 0
    have_tokens: int | None = None
    by_layers: bool = False
    """It would arrive sooner if it was gathered layer by layer."""
    slots: dict[int, int] = field(default_factory=dict)
    """Granted and not gathered yet: slot by chunk."""
    staged: set[int] = field(default_factory=set)
    gathering: int = 0
    gather_seconds: float = 0.0
    over: bool = False
    """Nothing more is wanted of it."""
    owes_cancel: bool = False
    dropped: bool = False
    """The engine knows it no more."""
    held_since: float | None = None
    """The engine is done with it and waits for a word on its blocks."""


@dataclass(frozen=True)
class Entry:
    """A chunk that can be gathered."""

    outgoing: Outgoing
    chunk: int
    piece: Piece


@dataclass(frozen=True)
class LayeredGather:
    """Chunks that are being gathered layer by layer, while they are computed."""

    entries: list[Entry]
    layered_copy: LayeredCopy
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """The layer below which each ends, and its event."""

    @property
    def outgoings(self) -> list[Outgoing]:
        """The requests, each once."""
        return list({id(entry.outgoing): entry.outgoing for entry in self.entries}.values())


@dataclass(frozen=True)
class Gather:
    """Chunks on their way into slots."""

    fence: Fence
    outgoing: Outgoing
    chunks: list[int]
    signalled: bool
    """The sidecar knows of them already, and waits for them itself."""


def tokens_of(entries: Iterable[Entry]) -> int:
    """Of all of them."""
    return sum(entry.piece.tokens[1] - entry.piece.tokens[0] for entry in entries)


def take_slots(entries: Iterable[Entry]) -> None:
    """They are being gathered."""
    for entry in entries:
        del entry.outgoing.slots[entry.chunk]
