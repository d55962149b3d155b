"""Tracks the events for which the sidecar may still wait.

A gather may record an event again only when the sidecar has ended all requests whose `Staged` named the event. If a
gather recorded the event earlier, a sidecar that has not begun to wait for the earlier gather would wait for the later
gather.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class EventSlots:
    """The numbers of the events, each with the requests that use it."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._waiting: dict[int, set[str]] = {}

    @property
    def free(self) -> int:
        """The number of events that no request uses."""
        return len(self._free)

    def take(self, reqs: set[str]) -> int | None:
        """Returns a free event and gives it to these requests. Returns `None` if no event is free."""
        if not self._free:
            return None
        event = self._free.pop()
        self._waiting[event] = set(reqs)
        return event

    def put_back(self, events: Iterable[int]) -> None:
        """Frees events that no message to the sidecar has named."""
        for event in events:
            if self._waiting.pop(event, None) is not None:
                self._free.append(event)

    def ended(self, req: str) -> None:
        """Frees the request's events after the sidecar's last message about it."""
        for event, reqs in list(self._waiting.items()):
            reqs.discard(req)
            if not reqs:
                del self._waiting[event]
                self._free.append(event)

    def reset(self) -> None:
        """Frees all events: the sidecar is gone, so it no longer waits for any event."""
        self._free += self._waiting
        self._waiting.clear()
