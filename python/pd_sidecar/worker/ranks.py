"""Splits KV into ranks, and assigns the ranks to the workers.

Each rank has its own keys, buffer and pair of ports, in both sidecars. Usually there are as many ranks as
tensor-parallel workers. If the two sides have different numbers of workers, both split KV into as many ranks as the
larger side has workers (`ranks` in the options). A worker of the smaller side then serves several ranks, each with a
part of the worker's heads:

    prefill, 1 worker   heads 0 1 2 3        rank 0: heads 0 1 ──▶ worker 0   decode, 2 workers
                                             rank 1: heads 2 3 ──▶ worker 1

So two sides of different size exchange the same messages as two sides of the larger size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pd_sidecar.kv import keys
from pd_sidecar.kv.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pd_sidecar.kv.copier import Piece
    from pd_sidecar.sidecar.wire import Group


@dataclass(frozen=True)
class Part:
    """A rank that a worker serves."""

    rank: int
    heads: range | None = None
    """The rank's part of the worker's own heads; `None` for all of them."""


@dataclass(frozen=True)
class Rank:
    """A rank that a worker serves, with its sizes and time limits."""

    index: int
    world_size: int
    model: str
    dtype: str
    chunk_tokens: int
    groups: tuple[Group, ...]
    """The groups of the layout; one full group if the layout names none."""
    tables: tuple[int, ...]
    """For each group, the index of the vLLM group that has its block table."""
    block_tokens: tuple[int, ...]
    """For each group, the number of tokens of a block of its table; 0 for states."""
    load_deadline_ms: int
    save_deadline_s: float
    layers: int
    by_layers: bool
    """If true, an asynchronous device gathers by layers even if the sidecar does not ask for it."""

    def plan(self, tokens: int, have: int) -> Plan:
        """Returns the chunks of a request. The decode side computes token `tokens` next and has `have` tokens."""
        return Plan(self.groups, self.chunk_tokens, tokens=tokens, have=have)

    def keys(self, hashes: Sequence[str], tags: Sequence[str], tokens: int) -> list[str]:
        """Returns the keys of a request's chunks, including the chunks of the state."""
        own = keys.keys(self.model, self.world_size, self.index, hashes, self.dtype, tags)
        return own + keys.state_keys(own, self.plan(tokens, 0).state_chunks)

    def has_blocks(self, piece: Piece) -> bool:
        """As `Piece.has_blocks`. Returns true for KV of full attention alone, of which vLLM frees no block early."""
        return not self.is_partial or piece.has_blocks(self.block_tokens[piece.part])

    @property
    def is_partial(self) -> bool:
        """True if a load must end exactly at the position for which the prefill side computed it."""
        return any(group.kind != "full" for group in self.groups)

    @property
    def load_limit_s(self) -> float:
        """Seconds after which the worker no longer waits for the sidecar's `Ended`."""
        return self.load_deadline_ms / 1e3 + GRACE_S


@dataclass(frozen=True)
class Share:
    """The ranks that one worker serves."""

    ranks: int
    parts: tuple[Part, ...]
    """Empty for a worker whose heads another worker sends."""


@dataclass(frozen=True)
class TpPartition:
    """The partition of one engine's KV into ranks. The function `partition` makes and checks a partition."""

    ranks: int
    workers: int
    heads: int
    """KV heads of the model; 1 if all workers hold the same KV (MLA)."""

    def share(self, worker: int) -> Share:
        """Returns the ranks that a worker serves."""
        if self.ranks == self.workers:
            return Share(self.ranks, (Part(worker),))
        own = self._heads_of(worker, self.workers)
        if self.ranks < self.workers:
            # Several workers hold the heads of one rank: only the first of them sends.
            copies = self.workers // self.ranks
            is_first = worker % copies == 0
            return Share(self.ranks, (Part(worker // copies),) if is_first else ())
        each = self.ranks // self.workers
        parts = tuple(
            Part(rank, range(heads.start - own.start, heads.stop - own.start))
            for rank in range(worker * each, (worker + 1) * each)
            for heads in [self._heads_of(rank, self.ranks)]
        )
        return Share(self.ranks, parts)

    def _heads_of(self, index: int, of: int) -> range:
        """Divides the heads into `of` parts, and returns the heads of part `index`. If there are fewer heads than
        parts, several parts hold the same head.
        """
        first = index * self.heads // of
        return range(first, max(first + 1, (index + 1) * self.heads // of))


class RankCounter:
    """Counts how many ranks have finished each request."""

    def __init__(self) -> None:
        self._named: Counter[str] = Counter()

    def of_all(self, engine_ids: Collection[str], ranks: int) -> set[str]:
        """Counts one more rank that has finished these requests. Returns the requests that all ranks have finished."""
        self._named.update(engine_ids)
        out = {engine_id for engine_id in engine_ids if self._named[engine_id] == ranks}
        for engine_id in out:
            del self._named[engine_id]
        return out


def partition(*, ranks: int, workers: int, heads: int, consumer: bool) -> TpPartition:
    """Makes a partition. Raises `ValueError` if KV cannot be split in this way; the error names values that work."""
    if ranks == workers:
        return TpPartition(ranks, workers, heads)
    values = f"ranks={ranks} with tensor-parallel size {workers} and {heads} KV heads: "
    if ranks <= 0 or max(ranks, workers) % min(ranks, workers) != 0:
        raise ValueError(f"{values}of ranks and tensor-parallel size, one must be a multiple of the other")
    if heads % ranks != 0 and ranks % heads != 0:
        raise ValueError(f"{values}ranks must divide the number of heads, or be a multiple of it")
    if ranks < workers and ranks < heads:
        raise ValueError(f"{values}no worker has all heads of a rank: ranks must be at least the tensor-parallel size")
    if ranks < workers and consumer:
        raise ValueError(
            f"{values}every worker of a decode engine needs its own KV: ranks must be at least the number of workers"
        )
    return TpPartition(ranks, workers, heads)


GRACE_S = 2.0
"""Seconds that the worker waits after a deadline before it treats the sidecar as dead. The sidecar itself enforces the
deadline.
"""
