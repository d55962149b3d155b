"""Runs a demonstration, and turns its end into an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from harness.client import HttpError
from harness.process import ProcessFailed, ended_by_signals


def exit_code(show: Callable[[], bool], logs: Path) -> int:
    """Runs `show`, which stops all that it has started, and returns true if all is right.

    Returns 0 if all is right, 130 after Ctrl-C and 1 otherwise. Prints the reason of an early end; `logs` is the folder
    with the logs of all parts.
    """
    try:
        with ended_by_signals():
            return 0 if show() else 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: everything has been stopped\n")
        return 130
    except (ProcessFailed, HttpError, AssertionError, OSError) as error:
        sys.stderr.write(f"\nfailed: {error}\n(all logs are in {logs}; everything has been stopped)\n")
        return 1
