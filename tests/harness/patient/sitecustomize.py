"""Replaces `os.sched_yield` by a short sleep. Used in the processes of tensor-parallel engines.

vLLM's processes wait for each other in a loop that yields the CPU. If there are more of these processes than cores,
Linux 6.6 and newer can delay other threads, such as a sidecar's, for ten seconds and more.
"""

from __future__ import annotations

import os
import time


def _sleep() -> None:
    time.sleep(50e-6)


os.sched_yield = _sleep
