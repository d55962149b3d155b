"""The tier with which vLLM's OffloadingConnector (0.32 and later) keeps KV in a store.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 17179869184, "block_size": 256, "secondary_tiers": [
            {"type": "StoreTier", "module_path": "pd_sidecar.store.tier", "url": "lm://10.1.0.7:65432"}]}}'

vLLM copies KV between the device and its own host memory, asks the tier which chunks the store has, and moves chunks
between host memory and the store. A chunk's key has vLLM's hash of the chunk and of all tokens before it, which covers
adapters, salts and images. Before the hash stands a digest of everything that decides what the bytes mean.

All methods run in the scheduler's process. They never wait for the store: threads of the tier do.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    RequestOffloadingContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

from pd_sidecar.store.client import Bounds, StoreError
from pd_sidecar.store.shards import Stores
from pd_sidecar.store.worth import Worth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vllm.v1.kv_offload.base import OffloadKey, ReqContext
    from vllm.v1.kv_offload.tiering.base import TransferJob

DECLINED = "vllm:pd_sidecar_store_requests_computed"
LOAD_S = "vllm:pd_sidecar_store_chunk_load_seconds"
COMPUTE_S = "vllm:pd_sidecar_store_chunk_compute_seconds"

# A change of the form of keys or values needs another number.
_FORM = "pd1"


@dataclass
class _Job:
    """A job in the tier's threads. A thread writes `done` before the pool reports the job as finished."""

    keys: list[OffloadKey]
    is_load: bool
    done: list[OffloadKey]
    begun: float


class StoreTier(SecondaryTierManager):
    """Chunks of KV in a store that all engines of a fleet share."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        url: str | list[str],
        namespace: str = "",
        timeout_s: float = 2.0,
        readers: int = 4,
        writers: int = 2,
        pending_bytes: int = 1 << 30,
        load: str = "auto",
        locality: str | None = "REMOTE",
        backpressure_detector: Any = None,
    ) -> None:
        """`url` names the store, or a list of stores between which the chunks are divided.

        Engines with another `namespace` do not find each other's KV; set it to the revision of the weights if the
        model's name stays equal. A store that does not answer for `timeout_s` seconds counts as away. `readers` and
        `writers` are numbers of threads. KV above `pending_bytes` that waits to be put is not put.
        With `load: always` KV is loaded even if it would be computed faster (`worth.py`).
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality) if locality else None
        self._stores = Stores([url] if isinstance(url, str) else url, Bounds(timeout_s=timeout_s))
        self._bytes = primary_kv_view.cast("B")
        self._prefix = prefix_of(offloading_spec, self.block_size_bytes, namespace)
        self._pending_bytes = pending_bytes
        if load not in ("auto", "always"):
            raise ValueError(f"load: {load!r} is neither auto nor always")
        self._worth = Worth() if load == "auto" else None
        self._pending = 0
        self._jobs: dict[int, _Job] = {}
        self._refused: list[JobResult] = []
        self._pool = DualQueueThreadPool(readers, writers, thread_name_prefix="pd_store")
        self._lookups = _Lookups(self._stores, self._key, tier_type)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)
        if self._worth is not None:
            self._worth.ended(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        self._lookups.flush()
        if self._worth is not None:
            for request in context.new_req_ids:
                self._worth.begins(request)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if self._worth is not None and not self._worth.loads(req_context.req_id):
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        if self._worth is not None:
            self._worth.computed(job_metadata.req_context.req_id, len(job_metadata.keys))
        size = len(job_metadata.keys) * self.block_size_bytes
        # A slow store must not hold vLLM's host memory: a chunk that waits to be put cannot be replaced.
        if self._pending + size > self._pending_bytes:
            self._refused.append(JobResult(job_metadata.job_id, success=False))
            return
        self._pending += size
        job, values = self._begin(job_metadata, is_load=False)
        self._pool.enqueue_store(job_metadata.job_id, 1, [partial(self._store, job, values)])

    def submit_load(self, job_metadata: TransferJob) -> None:
        job, values = self._begin(job_metadata, is_load=True)
        self._pool.enqueue_load(job_metadata.job_id, 1, [partial(self._load, job, values)])

    def get_finished_jobs(self) -> Iterable[JobResult]:
        refused, self._refused = self._refused, []
        yield from refused
        for job_id, success, seconds in self._pool.get_finished():
            job = self._jobs.pop(job_id)
            if job.is_load and self._worth is not None:
                self._worth.loaded(len(job.keys), time.monotonic() - job.begun)
            if not job.is_load:
                self._pending -= len(job.keys) * self.block_size_bytes
            elif not success:
                # Otherwise vLLM would ask for the missing chunks again and again.
                done = set(job.done)
                self._lookups.mark_miss([key for key in job.keys if key not in done])
            loaded = tuple(job.done) if job.is_load and not success else None
            moved = len(job.done) * self.block_size_bytes
            yield JobResult(job_id, success, loaded, transfer_time=seconds, transfer_bytes=moved)

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return {
            DECLINED: OffloadingCounterMetadata(
                documentation="Requests that did not ask the store, because their KV is computed faster than loaded."
            ),
            LOAD_S: OffloadingGaugeMetadata(documentation="Seconds to load a chunk: median of the last loads."),
            COMPUTE_S: OffloadingGaugeMetadata(documentation="Seconds to compute a chunk: median of the last prompts."),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        if self._worth is None:
            return None
        stats = OffloadingConnectorStats()
        for name, value in ((LOAD_S, self._worth.load_s), (COMPUTE_S, self._worth.compute_s)):
            if value is not None:
                stats.set_gauge(name, value)
        if declined := self._worth.take_declined():
            stats.increase_counter(DECLINED, declined)
        return stats

    def drain_jobs(self) -> None:
        self._pool.wait_idle()

    def shutdown(self) -> None:
        # First the connections, so that no thread waits for a store that is away.
        self._stores.close()
        self._lookups.shutdown()
        self._pool.shutdown(wait=True)

    def _begin(self, job: TransferJob, is_load: bool) -> tuple[_Job, list[tuple[bytes, memoryview]]]:
        """Notes a job, and returns it with the store's key and the memory of each chunk."""
        noted = self._jobs[job.job_id] = _Job(list(job.keys), is_load, [], time.monotonic())
        size = self.block_size_bytes
        places = [int(chunk) * size for chunk in job.chunk_ids]
        return noted, [
            (self._key(key), self._bytes[place : place + size]) for key, place in zip(noted.keys, places, strict=True)
        ]

    def _store(self, job: _Job, values: Sequence[tuple[bytes, memoryview]]) -> None:
        """Puts the chunks that the store does not have. Runs in a thread."""
        there = self._stores.exists([name for name, _ in values])
        missing = [at for at, found in enumerate(there) if not found]
        put = self._stores.put([values[at] for at in missing])
        job.done = [job.keys[at] for at, done in zip(missing, put, strict=True) if done]
        if not all(put):
            raise StoreError(f"{put.count(False)} of {len(put)} chunks were not put")

    def _load(self, job: _Job, values: Sequence[tuple[bytes, memoryview]]) -> None:
        """Gets the chunks. Runs in a thread."""
        found = self._stores.get(values)
        job.done = [key for key, there in zip(job.keys, found, strict=True) if there]
        if not all(found):
            raise StoreError(f"{found.count(False)} of {len(found)} chunks are no longer in the store")

    def _key(self, key: OffloadKey) -> bytes:
        """Returns the name of a chunk in the store: at most 150 bytes."""
        return f"{self._prefix}@{get_offload_group_idx(key)}@{get_offload_block_hash(key).hex()}".encode()


class _Lookups(AsyncLookupManager):
    """Asks the store which chunks it has: the chunks of a request in one message, in a thread."""

    def __init__(self, stores: Stores, key: Callable[[OffloadKey], bytes], tier_type: str) -> None:
        super().__init__(tier_type=tier_type)
        self._stores = stores
        self._key = key

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._stores.exists([self._key(key) for key in keys])


def prefix_of(spec: Any, chunk_bytes: int, namespace: str) -> str:
    """Returns the beginning of all keys: a digest of what decides the meaning of a chunk's bytes.

    These are the model's name, its groups of layers, the number format, the order of a page, the kind of device, and
    vLLM's version, because another version may lay out a page in another way.
    """
    mapper = FileMapper.from_offloading_spec(
        root_dir="", offloading_spec=spec, blocks_per_file=spec.blocks_per_chunk, parallel_agnostic=True
    )
    parts = {
        **mapper.fields,
        "rank": mapper.rank,
        "chunk_bytes": chunk_bytes,
        "page": spec.config.kv_cache_layout,
        "device": current_platform.device_type,
        "vllm": vllm_version.split("+")[0].rsplit(".", 1)[0],
        "namespace": namespace,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return f"{_FORM}@{digest}"
