"""Waits for what a test asserts, with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable

from harness.process import Process

# A busy machine may need most of this time.
BOUND_S = 60.0


def until(
    what: str | Callable[[], str],
    is_true: Callable[[], object],
    *,
    process: Process | None = None,
    bound_s: float = BOUND_S,
    every_s: float = 0.05,
) -> None:
    """Returns when `is_true()` is true. Fails after `bound_s`, or when `process` has ended.

    Calls `is_true` every `every_s` seconds.
    `what` is the text of the failure, such as "no request was refused", or returns this text when it fails.
    """
    deadline = time.monotonic() + bound_s
    while not is_true():
        if process is not None and not process.alive:
            raise process.failure(f"ended with exit code {process.exit_code}")
        if time.monotonic() > deadline:
            text = f"{what if isinstance(what, str) else what()} after {bound_s:g} s"
            raise AssertionError(text) if process is None else process.failure(text)
        time.sleep(every_s)
