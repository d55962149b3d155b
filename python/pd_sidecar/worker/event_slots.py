"""Which events the sidecar may still be waiting for.

An event is recorded anew only when every `Staged` that named it was answered: a wait that the
sidecar has not begun yet would otherwise last until the later gather.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class EventSlots:
    """Numbers of events, each with the requests whose chunks it stands for."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._waiting: dict[int, set[str]] = {}

    @property
    def free(self) -> int:
        """How many nobody waits for."""
        return len(self._free)

    def take(self, reqs: set[str]) -> int | None:
        """An event that nobody waits for, from now on taken by these requests."""
        if not self._free:
            return None
        event = self._free.pop()
        self._waiting[event] = set(reqs)
        return event

    def put_back(self, events: Iterable[int]) -> None:
        """The sidecar was not told of these."""
        for event in events:
            if self._waiting.pop(event, None) is not None:
                self._free.append(event)

    def ended(self, req: str) -> None:
        """The sidecar has said its last word on a request."""
        for event, reqs in list(self._waiting.items()):
            reqs.discard(req)
            if not reqs:
                del self._waiting[event]
                self._free.append(event)

    def reset(self) -> None:
        """The sidecar is gone, and its waits with it."""
        self._free += self._waiting
        self._waiting.clear()
