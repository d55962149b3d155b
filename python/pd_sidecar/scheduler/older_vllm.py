"""Does in an older vLLM's scheduler what newer versions offer to connectors, for models with several KV groups.

vLLM 0.24 lacks two things. It does not tell a connector the whole block tables. And it accepts a failed load only by
its blocks, which it then looks up in the request's only table: with several tables the look-up raises an error, and the
engine ends with all its requests. But vLLM's scheduler has the set of requests that must begin again after a failed
load. For a request of this set without computed tokens, vLLM frees all blocks and computes the prompt from its first
token, whatever the number of groups. So this module adds the request to the set.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from pd_sidecar.scheduler.tables import Tables


class EngineScheduler:
    """vLLM's scheduler, as far as this connector uses it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def kv_cache_manager(self) -> KVCacheManager:
        """The manager of the blocks. vLLM makes it after its connector."""
        return self._scheduler.kv_cache_manager

    def check(self) -> None:
        """Raises `RuntimeError` if this version's scheduler has other fields, so that a failed load could not be
        reported. Call this when the scheduler is complete.
        """
        if not isinstance(getattr(self._scheduler, FAILED, None), set):
            raise RuntimeError(
                f"vLLM's scheduler has no set {FAILED}, so this connector cannot report failed loads of several KV "
                "groups: start the engine with --disable-hybrid-kv-cache-manager"
            )

    def tables(self, engine_id: str) -> Tables:
        """Returns the whole block tables of a request that has blocks, one for each group."""
        return self.kv_cache_manager.get_block_ids(engine_id)

    def load_failed(self, engine_id: str) -> None:
        """Lets vLLM compute the prompt of a parked request from its first token. Call this before vLLM hears that the
        load is over. Does nothing for a request that has been aborted meanwhile.
        """
        request = self._scheduler.requests.get(engine_id)
        if request is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            request.num_computed_tokens = 0
            getattr(self._scheduler, FAILED).add(engine_id)


def calling_scheduler() -> EngineScheduler | None:
    """Returns vLLM's scheduler that makes this connector; `None` if no scheduler makes it.

    vLLM does not pass its scheduler to a connector, so this function looks for it among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), Scheduler):
            return EngineScheduler(caller)
        frame = frame.f_back
    return None


FAILED = "failed_recving_kv_req_ids"
"""The scheduler's set of requests whose load has failed."""
