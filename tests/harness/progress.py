"""Prints the progress of long steps for people."""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints one line per event. Each line begins with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", file=sys.stderr, flush=True)
