"""On the path of tensor-parallel engines: vLLM's processes wait for each other by yielding in a loop.

Where there are more of them than cores, Linux from 6.6 on lets threads that do not yield, a sidecar's, wait for ten
seconds and more for their turn. Here a yield is a short sleep.
"""

from __future__ import annotations

import os
import time


def _sleep() -> None:
    time.sleep(50e-6)


os.sched_yield = _sleep
