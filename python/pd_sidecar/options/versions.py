"""The parts of vLLM that not every version has."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.platforms import current_platform
from vllm.v1.core.sched import output

TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)
"""The class of the worker's report. vLLM 0.24 does not have it: the worker then reports a failed load by its blocks."""

CacheHitSource: Any = None
"""The class with the sources of cached tokens; `None` if vLLM does not tell them apart."""
with contextlib.suppress(ImportError):
    from vllm.v1.metrics import cache_hit_source

    CacheHitSource = cache_hit_source.CacheHitSource

GPU_GROUPS_VARIABLE = "PD_SIDECAR_GPU_GROUPS"
"""On GPUs the kernels for several groups are tested, but not with an engine, so the user must ask for them."""

SupportsGroups: Any = object
"""The base class that declares support of several groups. Without the declaration vLLM makes one group of windows and
full attention.
"""
# A failed load must be reported by its request, and the tables must be known in each step.
has_reports = TransferResults is not None and hasattr(output, "KVConnectorBlockState")
if has_reports and (current_platform.is_cpu() or os.environ.get(GPU_GROUPS_VARIABLE) == "1"):
    SupportsGroups = base.SupportsHMA
