"""Writes a folder once, although several tests, workers and runs need it."""

from __future__ import annotations

import fcntl
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec

P = ParamSpec("P")


def written_once(write: Callable[Concatenate[Path, P], None]) -> Callable[Concatenate[Path, P], Path]:
    """Changes a function that fills a folder: it makes the folder, fills it only if no one has, and returns it.

    Two workers of a run may need the same folder at the same time. The second one waits, so that it does not read half
    of a file.
    """

    @functools.wraps(write)
    def once(folder: Path, /, *args: P.args, **kwargs: P.kwargs) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "done"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                write(folder, *args, **kwargs)
                done.touch()
        return folder

    return once
