"""Times at which conversations begin."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pd_sidecar.bench.workload import Conversation

KINDS = ("poisson", "fixed", "trace")


@dataclass(frozen=True)
class Arrivals:
    """An open loop: conversations begin at their times, even if the server is late.

    `poisson` and `fixed` begin `rate` conversations for each second. `trace` takes the times of the trace, divided by
    `speed`.
    """

    kind: str
    rate: float = 1.0
    speed: float = 1.0

    def times(self, conversations: Iterable[Conversation], seed: int) -> Iterator[tuple[float, Conversation]]:
        """Yields each conversation with its time in seconds since the begin."""
        chance, at, first = random.Random(f"arrivals-{seed}"), 0.0, None
        for conversation in conversations:
            if self.kind == "trace":
                recorded = conversation.at_s or 0.0
                first = recorded if first is None else first
                # A trace whose times are not in order is sent in the order of the file.
                at = max(at, (recorded - first) / self.speed)
                yield at, conversation
            else:
                yield at, conversation
                at += chance.expovariate(self.rate) if self.kind == "poisson" else 1 / self.rate
