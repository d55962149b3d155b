"""The guardian: kills the process groups that its parent still had when the parent vanished.

Reads `+GROUP` and `-GROUP` lines from stdin; at its end, which a killed parent causes too, every group that was added
and not taken away gets SIGKILL.
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
