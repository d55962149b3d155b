"""The vLLM connector: `kv_connector: PdSidecarConnector`, with this module as `kv_connector_module_path`.

This module only implements vLLM's interface, which differs between versions (tested with 0.24 and 0.32). The work is
done in `scheduler` and `worker`.

The connector declares that it supports several KV groups, because vLLM asks the class before it reads any option. An
engine whose model has several groups does not start where the user must ask for them (`groups_choice`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.request import RequestStatus

from pd_sidecar.kv.keys import ChunkHasher
from pd_sidecar.kv.layout import Geometry, Hint, LayoutError, Writer
from pd_sidecar.kv.parts import parts_of, without_draft
from pd_sidecar.kv.quantization import Quantization
from pd_sidecar.options import config, lmcache, load_failure, own_sidecar
from pd_sidecar.options.groups_choice import check_groups, has_several
from pd_sidecar.options.versions import HAS_REPORTS, CacheHitSource, SupportsGroups, TransferResults
from pd_sidecar.scheduler.kept import KeepPolicy
from pd_sidecar.scheduler.metadata import DisabledNotice, FetchNotice, IdleReport, StepMetadata
from pd_sidecar.scheduler.older_vllm import EngineScheduler, calling_scheduler
from pd_sidecar.scheduler.scheduler import Scheduler
from pd_sidecar.scheduler.states import Role
from pd_sidecar.scheduler.stats import PromMetrics, Stats
from pd_sidecar.scheduler.tables import table_rules
from pd_sidecar.sidecar.launcher import Child, find_binary
from pd_sidecar.worker.disabled import DisabledWorker
from pd_sidecar.worker.load import Results
from pd_sidecar.worker.ranks import TpPartition, partition
from pd_sidecar.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.pd_sidecar.connector")


class PdSidecarConnector(KVConnectorBase_V1, SupportsGroups):
    """Moves KV between vLLM's blocks and a sidecar, in both directions."""

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._producer: bool = transfer.is_kv_producer
        self._consumer: bool = transfer.is_kv_consumer
        self._both = self._producer and self._consumer
        self._options = config.parse(
            transfer.kv_connector_extra_config,
            producer=self._producer,
            consumer=self._consumer,
            load_failure_policy=load_failure.policy(transfer) if role == KVConnectorRole.SCHEDULER else "recompute",
            model=vllm_config.model_config.model,
            engine_id=transfer.engine_id or "",
        )
        if role == KVConnectorRole.SCHEDULER and self._consumer and not self._options.allow_load_failure_policy_fail:
            load_failure.set_recompute(transfer)
        _refuse_parallelism(vllm_config)
        self._partition = _partition(vllm_config, self._options.ranks, consumer=self._consumer)
        self._config = vllm_config
        self._groups = kv_cache_config.kv_cache_groups
        check_groups(self._groups, vllm_config, is_allowed=self._options.allow_several_groups)
        self._num_blocks: int = kv_cache_config.num_blocks
        self._stats = Stats()
        self._scheduler: Scheduler | None = None
        self._worker: Worker | DisabledWorker | None = None
        self._invalid_blocks: set[int] = set()
        self._engine: EngineScheduler | None = None
        """vLLM's scheduler, only for several groups and a vLLM without reports about them."""
        self._failed_loads: set[str] = set()
        """Loads of several groups that have failed. The worker's half has not reported them yet; for the scheduler's
        half, vLLM has not heard yet that these loads are over.
        """
        self._idle = False
        self._child: Child | None = None
        if role == KVConnectorRole.SCHEDULER:
            for key in sorted(transfer.kv_connector_extra_config.keys() & lmcache.HARMLESS.keys()):
                logger.info("%s has no effect: %s", key, lmcache.HARMLESS[key])
            logger.info(
                "keys: chunks of %d tokens, hashed by %s",
                self._options.chunk_size,
                self._options.hash_algorithm,
            )
            if has_several(self._groups) and not HAS_REPORTS:
                self._engine = calling_scheduler()
                if self._engine is None:
                    raise config.ConfigError(["this connector needs vLLM's own scheduler for several KV groups"])
            self._scheduler = self._make_scheduler()
            self._scheduler.engine = self._engine
            # One sidecar serves all workers. The scheduler starts the sidecar, because there is only one scheduler.
            self._child = self._spawn() if self._options.sidecar else None

    # vLLM calls the class methods in several processes, among them the API server.

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any = None) -> bool:
        """Returns false, because `/sleep` unmaps KV memory that a gather or scatter in flight may still use.

        vLLM from 0.33 on calls this method, and then refuses `--enable-sleep-mode` together with this connector.
        """
        return False

    # The scheduler's half.

    def on_new_request(self, request: Request) -> None:
        self._of_scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._of_scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._of_scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        self._of_scheduler.keeping.pool = kv_cache_manager.block_pool
        self._of_scheduler.bind(kv_cache_manager)

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Older versions of vLLM call this method instead of `bind_kv_cache_manager`."""
        if self._engine is not None:
            self._engine.check()
            self._of_scheduler.bind(self._engine.kv_cache_manager)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        metadata = self._of_scheduler.step(scheduler_output)
        self._idle = metadata.idle
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Handles the requests that the workers report as done in this output, and the requests that were done after
        the workers made this report.
        """
        idle_report = getattr(connector_output, "kv_connector_worker_meta", None)
        if isinstance(idle_report, IdleReport):
            self._of_scheduler.unmoved |= idle_report.unmoved
            self._of_scheduler.keeping.learn(idle_report.fetch_ports, is_alone=idle_report.is_alone)
            self._of_scheduler.correct_answers()
            self._failed_loads |= idle_report.failed
        if (worker := self._neighbour()) is not None:
            # Do not wait if this output or a later step has tokens, because a client waits for these tokens.
            rests = self._idle and isinstance(idle_report, IdleReport) and idle_report.rests
            sent, received = worker.news(rest=rests)
            connector_output.finished_sending = (connector_output.finished_sending or set()) | sent
            connector_output.finished_recving = (connector_output.finished_recving or set()) | received
        sent, received = connector_output.finished_sending or set(), connector_output.finished_recving or set()
        if self._engine is not None:
            for engine_id in self._failed_loads & received:
                self._engine.load_failed(engine_id)
        self._failed_loads -= received
        if forgotten := self._of_scheduler.reported(sent, received):
            connector_output.finished_sending = sent - forgotten

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        completed = request.status in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
        )
        return self._of_scheduler.finished(request, block_ids, completed=completed)

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, Any]) -> None:
        """Learns, before the first request, whether the workers can move KV, and where it can be fetched."""
        self._of_scheduler.unmoved = any(isinstance(m, DisabledNotice) for m in metadata.values())
        for notice in metadata.values():
            if isinstance(notice, FetchNotice):
                self._of_scheduler.keeping.learn(notice.ports, is_alone=True)

    def has_pending_push_work(self) -> bool:
        return self._of_scheduler.has_work

    # The methods of the worker's half, in the order in which a step calls them. Before the forward,
    # `bind_connector_metadata` is the only method that all versions and model runners of vLLM call. Some versions call
    # `start_load_kv` only after the forward.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker = self._make_worker(kv_caches)

    def get_handshake_metadata(self) -> DisabledNotice | FetchNotice | None:
        """Returns a notice for the scheduler's half if this worker cannot move its KV, or the notice that names the
        port where decode sides can fetch its KV; otherwise `None`.
        """
        # MultiConnector passes a notice to all its children, and the other connectors refuse a notice of this type. So
        # under a MultiConnector this method returns `None`, and the scheduler's half learns only from the first step's
        # output that no KV is moved.
        if not self._is_alone():
            return None
        if isinstance(self._worker, Worker):
            # A sidecar that this engine starts needs a moment. A sidecar that the user has started usually runs
            # already. If it does not run yet, a later step reports its port.
            ports = self._worker.first_fetch_ports(SPAWN_S if self._options.sidecar else 0.0)
            return FetchNotice(ports) if ports else None
        return DisabledNotice() if isinstance(self._worker, DisabledWorker) else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepMetadata):
            self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Does nothing: `bind_connector_metadata` has already asked the sidecar for the requests' KV."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: vLLM schedules a request only after the request's KV has been loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Records that the forward has launched this layer. Full CUDA graphs do not call this method; all layers are
        then gathered together.
        """
        if self._worker is not None:
            self._worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.computed()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        sent, results = self._finish()
        return TransferResults(
            finished_sending=sent,
            finished_recving=results.received,
            failed_recving=set(results.failed),
        )

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """Returns no group, so that vLLM zeroes the blocks of a load before it passes the step to the workers. A load
        writes no tokens after its last one or before a window. These places may hold another group's bytes, which can
        be NaN in this group's dtype, and attention multiplies them by 0.
        """
        return ()

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """True if vLLM may count tokens as cached without their states. A load brings a state, but no cached window."""
        return self._consumer and not self._of_scheduler.local_cache.has_windows

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent, results = self._finish()
        if has_several(self._groups) and not HAS_REPORTS:
            # vLLM would look the blocks up in a single table. Tell the scheduler's half instead, with this output.
            self._failed_loads |= results.failed.keys()
        else:
            self._invalid_blocks |= results.invalid_blocks
        return sent or None, results.received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        blocks, self._invalid_blocks = self._invalid_blocks, set()
        return blocks

    def get_kv_connector_stats(self) -> Stats | None:
        return self._stats.take()

    def build_connector_worker_meta(self) -> IdleReport | None:
        report = self._worker.idle_report if self._worker is not None else None
        if self._failed_loads:
            failed, self._failed_loads = frozenset(self._failed_loads), set()
            report = replace(report or IdleReport(rests=False), failed=failed)
        return replace(report, is_alone=self._is_alone()) if report is not None else None

    def shutdown(self) -> None:
        # The engine runs no more steps. vLLM kills this process when `shutdown_timeout` is over.
        wait_s = getattr(self._config, "shutdown_timeout", 0) - TEARDOWN_S
        if wait_s > 0 and isinstance(self._worker, Worker) and (kept := self._worker.wait_fetched(wait_s)):
            logger.warning("the engine stops with KV of %d requests that no decode side has fetched", kept)
        if self._worker is not None:
            self._worker.close()
        if self._child is not None:
            self._child.stop()
            self._child = None

    # Helpers.

    @property
    def _of_scheduler(self) -> Scheduler:
        if self._scheduler is None:
            raise RuntimeError("this connector object belongs to a worker, not to the scheduler")
        return self._scheduler

    def _is_alone(self) -> bool:
        """Returns true if this worker's connector is no child of a MultiConnector."""
        return has_kv_transfer_group() and get_kv_transfer_group() is self

    def _neighbour(self) -> Worker | None:
        """Returns the worker's half, if it is the only worker and runs in the scheduler's process."""
        if self._config.parallel_config.world_size != 1 or not has_kv_transfer_group():
            return None
        beside = get_kv_transfer_group()
        worker = beside._worker if isinstance(beside, PdSidecarConnector) else None
        return worker if isinstance(worker, Worker) else None

    def _finish(self) -> tuple[set[str], Results]:
        return self._worker.finish() if self._worker is not None else (set(), Results())

    def _make_scheduler(self) -> Scheduler:
        role = Role(
            producer=self._producer,
            consumer=self._consumer,
            ranks=self._partition.ranks,
            tables=table_rules(self._groups, self._config.cache_config.block_size),
            keep=KeepPolicy(
                self._config.kv_transfer_config.engine_id or "",
                self._options.keep_ms,
                int(self._num_blocks * self._options.keep_share),
            ),
            has_prefix_cache=bool(self._config.cache_config.enable_prefix_caching),
        )
        hasher = ChunkHasher(self._options.hash_algorithm, self._options.chunk_size)
        return Scheduler(role, hasher, self._stats)

    def _spawn(self) -> Child:
        options = self._options
        if self._both:
            role, socket = "both", options.sender_socket
        elif self._producer:
            role, socket = "sender", options.sender_socket
        else:
            role, socket = "receiver", options.receiver_socket
        more = shlex.split(options.sidecar_arguments)
        extra = self._config.kv_transfer_config.kv_connector_extra_config
        command = [find_binary(), "--role", role, "--socket", socket, *more]
        # The sidecar compares the number of ranks with its configured ports, and reports a difference together with a
        # cure.
        ranks = self._partition.ranks
        ours = {**lmcache.variables(extra), "PD_SIDECAR_RANKS": str(ranks), "PD_SIDECAR_SPAWNED": "1"}
        if not self._both or not own_sidecar.is_wanted(extra):
            return Child(command, logger, lambda: ours)
        platform, environ = current_platform, {**os.environ, **ours}
        own = {**ours, "PD_SIDECAR_SPAWNED": own_sidecar.SPAWNED}

        def variables() -> dict[str, str | None]:
            found = own_sidecar.variables(ranks, platform.device_type, platform.get_device_uuid, environ)
            return {**found, **own}

        return Child(command, logger, variables)

    def _make_worker(self, kv_caches: dict[str, torch.Tensor]) -> Worker | DisabledWorker:
        work: dict[str, Any] = {
            "engine": self._config.kv_transfer_config.engine_id or "",
            "share": self._partition.share(get_tensor_model_parallel_rank()),
            "producer": self._producer,
            "consumer": self._consumer,
        }
        if not self._options.move_draft:
            kv_caches = without_draft(kv_caches, self._config.model_config.get_total_num_hidden_layers())
        try:
            parts = parts_of(
                kv_caches,
                self._groups,
                self._num_blocks,
                self._config.cache_config.block_size,
                self._writers,
            )
            parts = parts.quantized(self._quantization)
            if not parts.is_one and self._partition.ranks != self._partition.workers:
                raise LayoutError(
                    f"KV with {len(parts.parts)} groups of layers cannot be divided into {self._partition.ranks} ranks "
                    f"by {self._partition.workers} workers: use the same tensor-parallel size on both sides"
                )
        except LayoutError as error:
            logger.error("KV of this model is not moved, requests are computed here: %s", error)
            return DisabledWorker(str(error), self._options, self._stats, **work)
        return Worker(parts, self._options, self._stats, **work)

    def _writers(self, kv_caches: Mapping[str, torch.Tensor], hint: Hint) -> dict[str, Writer]:
        """Returns the functions of the engine that store K and V, for the layers that have such a function.

        GPU kernels follow the strides of their tensors, so they need no probe.
        """
        if hint.mla or any(tensor.device.type != "cpu" for tensor in kv_caches.values()):
            return {}
        layers = self._config.compilation_config.static_forward_context
        writers: dict[str, Writer] = {}
        for name in kv_caches:
            layer = layers.get(name)
            update = getattr(getattr(layer, "impl", None), "do_kv_cache_update", None)
            if update is not None:
                writers[name] = functools.partial(update, layer)
        return writers

    def _quantization(self, pages: Geometry) -> Quantization | None:
        """Returns the number format if the tensors hold bytes; otherwise `None`. Raises `LayoutError`."""
        if pages.first.tensor.element_size() > 1:
            return None
        cache = self._config.cache_config
        if getattr(cache, "calculate_kv_scales", False):
            raise LayoutError(
                "with --calculate-kv-scales each engine computes its own scales, and KV of one engine is wrong in "
                "another; remove the flag: scales then come from the checkpoint, or are 1"
            )
        layers = self._config.compilation_config.static_forward_context
        found = Quantization.of([layers.get(name) for name in pages.names], cache.cache_dtype)
        if found.is_scaled and getattr(self._config.model_config, "enable_sleep_mode", False):
            raise LayoutError(
                "with --enable-sleep-mode vLLM 0.24 forgets the checkpoint's KV scales when it "
                "wakes up, and KV of one engine is wrong in another; remove the flag"
            )
        return found


# Some routers accept only this name. vLLM prefers the class of `kv_connector_module_path` to its own class of a name.
NixlConnector = PdSidecarConnector


def _partition(vllm_config: VllmConfig, ranks: int, *, consumer: bool) -> TpPartition:
    """Returns the partition of this engine's KV into ranks. Raises `ConfigError`."""
    workers = vllm_config.parallel_config.tensor_parallel_size
    if ranks in (0, workers):
        # The number of heads does not matter: each worker sends or receives all the KV that it has.
        return partition(ranks=workers, workers=workers, heads=1, consumer=consumer)
    model = vllm_config.model_config
    heads = 1 if model.use_mla else model.get_total_num_kv_heads()
    try:
        return partition(ranks=ranks, workers=workers, heads=heads, consumer=consumer)
    except ValueError as error:
        raise config.ConfigError([str(error)]) from None


def _refuse_parallelism(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            text = f"{name}={getattr(parallel, name)} must be 1: a chunk holds all layers and tokens"
            raise config.ConfigError([text])


# Register this class, because vLLM's MultiConnector finds the class of a child's statistics by the child's registered
# name. If this module is imported twice, the second registration would raise an error.
with contextlib.suppress(ValueError):
    KVConnectorFactory.register_connector("PdSidecarConnector", __name__, "PdSidecarConnector")


SPAWN_S = 10.0
"""The longest time for which a starting engine waits for the sidecar that it has started."""
TEARDOWN_S = 2.0
"""The part of `shutdown_timeout` that the engine needs after its KV is fetched."""
