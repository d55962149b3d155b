"""Tests several KV groups with a vLLM that accepts no report about a failed load of them."""

from __future__ import annotations

import pytest
import torch
from test_connector import BLOCK, BLOCKS, HEADS, NAMES, SIZE, config, worker_of
from test_scheduler import load_params, output, request
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from pd_sidecar import connector as module
from pd_sidecar.connector import PdSidecarConnector
from pd_sidecar.options import groups_choice
from pd_sidecar.options.config import ConfigError

PAGES = {"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float32}
FULL, WINDOW = FullAttentionSpec(**PAGES), SlidingWindowSpec(**PAGES, sliding_window=20)
STATE = MambaSpec(block_size=BLOCK, shapes=((2, 3), (4,)), dtypes=(torch.float32, torch.float32))
ALLOWED = {"allow_several_groups": True}


def cache(other=WINDOW):
    return KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(NAMES[:1], FULL), KVCacheGroupSpec(NAMES[1:], other)])


@pytest.fixture
def older(tmp_path, monkeypatch):
    monkeypatch.setenv("PD_SIDECAR_SOCKET", str(tmp_path / "none.sock"))
    for each in (module, groups_choice):
        monkeypatch.setattr(each, "HAS_REPORTS", False)


class Engine(Scheduler):
    """vLLM's scheduler with only the fields that take part in a failed load."""

    def __init__(self, extra):
        self.requests = {}
        self.failed_recving_kv_req_ids = set()
        self.kv_cache_manager = None
        self.connector = PdSidecarConnector(config(extra, role="kv_consumer"), KVConnectorRole.SCHEDULER, cache())
        self.connector.bind_gpu_block_pool(None)


def test_several_groups_must_be_asked_for(older):
    with pytest.raises(ConfigError, match="allow_several_groups"):
        Engine({})
    Engine(ALLOWED)


def test_one_group_needs_no_option(older):
    one = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(NAMES, FULL)])
    PdSidecarConnector(config(role="kv_consumer"), KVConnectorRole.SCHEDULER, one)


def test_states_beside_a_prefix_cache_are_refused(older):
    given = config(ALLOWED, role="kv_consumer")
    with pytest.raises(ConfigError, match="--no-enable-prefix-caching"):
        PdSidecarConnector(given, KVConnectorRole.WORKER, cache(STATE))
    given.cache_config.enable_prefix_caching = False
    PdSidecarConnector(given, KVConnectorRole.WORKER, cache(STATE))


def test_a_scheduler_that_cannot_begin_a_request_again_is_refused(older):
    class Other(Engine):
        failed_recving_kv_req_ids = property(lambda self: None, lambda self, value: None)

    with pytest.raises(RuntimeError, match="failed_recving_kv_req_ids"):
        Other(ALLOWED)


@pytest.mark.parametrize("aborted", [False, True])
def test_a_failed_load_begins_again_and_names_no_blocks(older, monkeypatch, aborted):
    """vLLM would look the blocks up in a single table, and its engine would end."""
    engine = Engine(ALLOWED)
    kv = {name: torch.zeros(BLOCKS, HEADS, BLOCK, 2 * SIZE) for name in NAMES}
    worker = worker_of(config(ALLOWED, role="kv_consumer"), kv, monkeypatch, cache())
    req = engine.requests["a"] = request("a", load_params())
    # Without this manager the connector loads no windows.
    engine.connector._scheduler.local_cache._is_on = False
    assert engine.connector.get_num_new_matched_tokens(req, 0) == (39, True)
    blocks = KVCacheBlocks(tuple([KVCacheBlock(block) for block in table] for table in ([1, 2, 3], [0, 4, 5])))
    engine.connector.update_state_after_alloc(req, blocks, 39)
    req.status, req.num_computed_tokens = RequestStatus.WAITING_FOR_REMOTE_KVS, 39
    # No sidecar runs, so the load fails.
    worker.bind_connector_metadata(engine.connector.build_connector_meta(output()))
    if aborted:
        req.status = RequestStatus.FINISHED_ABORTED
    _, received = worker.get_finished(set())
    assert received == {"a"}
    assert worker.get_block_ids_with_load_errors() == set()
    report = worker.build_connector_worker_meta()
    assert report.failed == {"a"}
    # The last worker may report the end of the load in a later step.
    engine.connector.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=report))
    assert req.num_computed_tokens == 39
    engine.connector.update_connector_output(KVConnectorOutput(finished_recving=received))
    expect = (39, set()) if aborted else (0, {"a"})
    assert (req.num_computed_tokens, engine.failed_recving_kv_req_ids) == expect
    assert not worker.build_connector_worker_meta().failed
    worker.shutdown()
