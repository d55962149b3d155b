"""A connector for vLLM 0.32 that uses only what vLLM 0.24 offers for several KV groups.

So the way in which the connector reports failed loads to vLLM 0.24 is tested without a GPU: the scheduler of vLLM 0.32
has the same set of requests that must begin again. This module is the `kv_connector_module_path` of both engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pd_sidecar.options import versions

versions.HAS_REPORTS = False

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1  # noqa: E402

import pd_sidecar.connector  # noqa: E402
import pd_sidecar.scheduler.scheduler  # noqa: E402
from harness import spoiled  # noqa: E402, F401 - the tests need this module's change of the loads, too

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

pd_sidecar.scheduler.scheduler.tables_now = lambda *_: None  # type: ignore[attr-defined]


class PdSidecarConnector(pd_sidecar.connector.PdSidecarConnector):
    """Hides the methods that only newer versions of vLLM call."""

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        self.bind_gpu_block_pool(kv_cache_manager.block_pool)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        return KVConnectorBase_V1.get_transfer_results(self, finished_req_ids)
