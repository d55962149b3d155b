"""vLLM's CPU offloading where the engine's own memory is host memory, too: for engines of the CPU build.

Everything but the copy itself is vLLM's: its OffloadingConnector, scheduler and manager. Its own worker copies by CUDA
streams and refuses to start without a GPU.

    "spec_name": "HostOffloadingSpec", "spec_module_path": "harness.host_offload"
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostOffloadingSpec(CPUOffloadingSpec):  # type: ignore[misc]
    """Keeps blocks in another piece of host memory."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self.blocks_per_chunk != 1:
            raise ValueError(f"a chunk of {self.blocks_per_chunk} blocks; this worker copies single ones")
        return HostWorker(kv_caches, self.num_chunks)


class HostWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies at once."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._pages = [cache.tensor.view(torch.int8) for cache in kv_caches.tensors]
        self._kept = [torch.zeros((chunks, pages.shape[1]), dtype=torch.int8) for pages in self._pages]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._pages, src_spec.block_ids, self._kept, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._kept, src_spec.block_ids, self._pages, dst_spec.block_ids)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def _copy(self, job_id: int, sources: list[Any], take: Any, sinks: list[Any], put: Any) -> bool:
        began = time.perf_counter()
        index = torch.from_numpy(take).long(), torch.from_numpy(put).long()
        for source, sink in zip(sources, sinks, strict=True):
            sink[index[1]] = source[index[0]]
        size = sum(len(take) * pages.shape[1] for pages in sources)
        self._done.append(TransferResult(job_id, True, size, time.perf_counter() - began))
        return True
