"""The ranks that KV is cut into between two engines, and which of them a worker serves.

A rank has keys, a buffer and a pair of ports of its own, in both sidecars. Usually there are as
many as tensor-parallel workers. Where the two sides differ in those, both cut KV into as many ranks
as the larger side has workers (`ranks` in the options), and a worker of the smaller side serves
several, each with its own part of the worker's heads:

    prefill, 1 worker   heads 0 1 2 3        rank 0: heads 0 1 ──▶ worker 0   decode, 2 workers
                                             rank 1: heads 2 3 ──▶ worker 1

So what goes over the wire is what two sides of equal size would exchange.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True)
class Part:
    """A rank that a worker serves."""

    rank: int
    heads: range | None = None
    """Of the worker's own heads; None for all of them."""


@dataclass(frozen=True)
class Rank:
    """A rank that a worker serves, and the bounds it keeps to."""

    index: int
    world_size: int
    model: str
    dtype: str
    chunk_tokens: int
    block_tokens: int
    token_bytes: int
    load_deadline_ms: int
    save_deadline_s: float
    layers: int
    by_layers: bool
    """Requests are gathered so whatever the sidecar says, if gathers go on after their launch."""

    @property
    def load_limit_s(self) -> float:
        """When a sidecar that should have said `Ended` is not waited for any longer."""
        return self.load_deadline_ms / 1e3 + GRACE_S


@dataclass(frozen=True)
class Share:
    """What one worker has of the ranks."""

    ranks: int
    parts: tuple[Part, ...]
    """Empty for a worker whose heads another one sends."""


@dataclass(frozen=True)
class TpPartition:
    """How the KV of one engine is cut. Made by `cut`, which checks it."""

    ranks: int
    workers: int
    heads: int
    """KV heads of the model; 1 where all workers hold the same (MLA)."""

    def share(self, worker: int) -> Share:
        """What a worker serves."""
        if self.ranks == self.workers:
            return Share(self.ranks, (Part(worker),))
        own = self._heads_of(worker, self.workers)
        if self.ranks < self.workers:
            # Several workers hold the heads of one rank: the first of them sends.
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
        """Each has its share; where there are more of them than heads, several have the same."""
        first = index * self.heads // of
        return range(first, max(first + 1, (index + 1) * self.heads // of))


class RankCounter:
    """Requests that every rank of a worker has to name before they count."""

    def __init__(self) -> None:
        self._named: Counter[str] = Counter()

    def of_all(self, engine_ids: Collection[str], ranks: int) -> set[str]:
        """One rank names these; those that so many have named by now."""
        self._named.update(engine_ids)
        out = {engine_id for engine_id in engine_ids if self._named[engine_id] == ranks}
        for engine_id in out:
            del self._named[engine_id]
        return out


def partition(*, ranks: int, workers: int, heads: int, consumer: bool) -> TpPartition:
    """Checks that it can be cut so. Raises `ValueError`, whose text says what would be right."""
    if ranks == workers:
        return TpPartition(ranks, workers, heads)
    what = f"ranks={ranks} with tensor-parallel size {workers} and {heads} KV heads: "
    if ranks <= 0 or max(ranks, workers) % min(ranks, workers) != 0:
        raise ValueError(f"{what}one must be a multiple of the other")
    if heads % ranks != 0 and ranks % heads != 0:
        raise ValueError(f"{what}heads cannot be split evenly; it must divide, or be divided by, them")
    if ranks < workers and ranks < heads:
        raise ValueError(f"{what}no worker has all heads of a rank; at least the tensor-parallel size is needed")
    if ranks < workers and consumer:
        raise ValueError(f"{what}every worker has to be sent its KV: give one rank for each")
    return TpPartition(ranks, workers, heads)


GRACE_S = 2.0
"""A deadline is the sidecar's to keep; this much later it is taken for dead."""
