"""What a person sees while things start."""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints one line per event, with the seconds since the start in front."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", file=sys.stderr, flush=True)
