"""The parts of vLLM that not every version has."""

from __future__ import annotations

import contextlib
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1.core.sched import output

TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)
"""The class of the worker's report. vLLM 0.24 does not have it: the worker then reports a failed load by its blocks."""

CacheHitSource: Any = None
"""The class with the sources of cached tokens; `None` if vLLM does not tell them apart."""
with contextlib.suppress(ImportError):
    from vllm.v1.metrics import cache_hit_source

    CacheHitSource = cache_hit_source.CacheHitSource

SupportsGroups: Any = getattr(base, "SupportsHMA", object)
"""The base class that declares support of several groups. Without the declaration vLLM makes one group of windows and
full attention, and does not start models with states.
"""

HAS_REPORTS = TransferResults is not None and hasattr(output, "KVConnectorBlockState")
"""False if vLLM neither passes all block tables to a connector in each step, nor accepts a failed load of several
groups.
"""
