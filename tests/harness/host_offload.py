"""Makes vLLM's CPU offloading work on vLLM's CPU build, where the engine's KV is also in host memory.

This module replaces only the worker, because vLLM's own worker copies with CUDA streams and does not start without a
GPU. The OffloadingConnector, the scheduler, the manager and the tiers are vLLM's. To use the module, set in the
connector's configuration:

    "spec_name": "HostTieringSpec", "spec_module_path": "harness.host_offload"
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """Keeps offloaded blocks in a second region of host memory, which the scheduler's process maps for the tiers."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self.blocks_per_chunk != 1:
            raise ValueError(f"a chunk has {self.blocks_per_chunk} blocks; this worker supports 1 block per chunk")
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return HostWorker(kv_caches, region)


class HostWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks inside the call that submits them."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._pages = [cache.tensor.view(torch.int8) for cache in kv_caches.tensors]
        self._kept = [region.create_next_worker_view(pages.shape[1]) for pages in self._pages]
        self._region = region
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._pages, src_spec.block_ids, self._kept, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._kept, src_spec.block_ids, self._pages, dst_spec.block_ids)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Returns at once, because each copy ends before the call that submits it returns."""

    def _copy(self, job_id: int, sources: list[Any], take: Any, sinks: list[Any], put: Any) -> bool:
        began = time.perf_counter()
        index = torch.from_numpy(take).long(), torch.from_numpy(put).long()
        for source, sink in zip(sources, sinks, strict=True):
            sink[index[1]] = source[index[0]]
        size = sum(len(take) * pages.shape[1] for pages in sources)
        self._done.append(TransferResult(job_id, True, size, time.perf_counter() - began))
        return True
