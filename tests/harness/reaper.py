"""The guardian process: kills the process groups that its parent leaves behind.

Reads the lines `+GROUP` and `-GROUP` from stdin. When stdin ends, which also happens when the parent is killed, the
guardian sends SIGKILL to each group that was added and not removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        sign, group = line[0], int(line[1:])
        if sign == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
