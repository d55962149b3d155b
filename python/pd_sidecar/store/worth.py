"""The decision whether loading KV from a store is worth its time. Pure: no IO, and the clock is a parameter."""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# The medians are those of this many measurements.
_KEPT = 16


class Worth:
    """Compares the time to load a chunk with the time to compute one, both as this engine has measured them lately.

    Until both are known, loading is tried. A store that was too slow is tried again with one request from time to time,
    because only a load shows that the store has become faster.
    """

    def __init__(self, retry_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`retry_s`: seconds after the last try until a store that was too slow is tried again."""
        self._retry_s = retry_s
        self._clock = clock
        self._tried = clock()
        self._begun: dict[str, float] = {}
        self._decisions: dict[str, bool] = {}
        self._declined = 0
        self._loads: deque[float] = deque(maxlen=_KEPT)
        self._computations: deque[float] = deque(maxlen=_KEPT)

    def loads(self, request: str) -> bool:
        """Decides whether a request loads. The answer for a request stays the same until `ended`."""
        if request not in self._decisions:
            now = self._clock()
            load_s, compute_s = self.load_s, self.compute_s
            dearer = load_s is not None and compute_s is not None and load_s > compute_s
            self._decisions[request] = not dearer or now >= self._tried + self._retry_s
            if self._decisions[request]:
                self._tried = now
            else:
                self._declined += 1
        return self._decisions[request]

    def loaded(self, chunks: int, seconds: float) -> None:
        """Notes a load that has ended, from its submission on: the wait for other loads is part of its price."""
        self._loads.append(seconds / chunks)

    def begins(self, request: str) -> None:
        """Notes that the engine begins to compute a request."""
        self._begun[request] = self._clock()

    def computed(self, request: str, chunks: int) -> None:
        """Notes that the engine has computed chunks.

        Only the first ones of a request count: the last ones may be chunks of the answer, which take longer.
        """
        begun = self._begun.pop(request, None)
        if begun is not None and chunks:
            self._computations.append((self._clock() - begun) / chunks)

    def ended(self, request: str) -> None:
        """Forgets a request."""
        self._begun.pop(request, None)
        self._decisions.pop(request, None)

    def take_declined(self) -> int:
        """Returns the number of requests that were to be computed, since the last call."""
        declined, self._declined = self._declined, 0
        return declined

    @property
    def load_s(self) -> float | None:
        """Seconds to load a chunk; None if nothing was measured."""
        return median(self._loads) if self._loads else None

    @property
    def compute_s(self) -> float | None:
        """Seconds to compute a chunk; None if nothing was measured."""
        return median(self._computations) if self._computations else None
