"""Replaces `os.sched_yield` by a short sleep, in the processes of tensor-parallel engines.

vLLM's processes wait for each other in a loop that yields the CPU. If there are more such processes than cores, Linux
6.6 and newer can keep other threads, such as a sidecar's, waiting for ten seconds and more.
"""

from __future__ import annotations

import os
import time


def _sleep() -> None:
    time.sleep(50e-6)


os.sched_yield = _sleep
