"""Tests the connector class with the calls that vLLM makes, without an engine."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from fake_sidecar import FakeSidecar
from test_scheduler import load_params, output, push_params, request
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.v1.core.kv_cache_utils import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_interface import CrossAttentionSpec, FullAttentionSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from pd_sidecar import connector as module
from pd_sidecar.connector import PdSidecarConnector
from pd_sidecar.options import own_sidecar
from pd_sidecar.options.config import ConfigError
from pd_sidecar.sidecar import wire

BLOCKS, BLOCK, HEADS, SIZE = 8, 16, 2, 32
NAMES = ["layers.0.attn", "layers.1.attn"]


@pytest.fixture(autouse=True)
def named_sidecar(tmp_path, monkeypatch):
    """Names a sidecar, which does not run. Otherwise an engine with both roles would start one."""
    monkeypatch.setenv("PD_SIDECAR_SOCKET", str(tmp_path / "none.sock"))


def config(extra=None, *, role="kv_both", policy="recompute", layers=None, **parallel):
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            is_kv_producer=role != "kv_consumer",
            is_kv_consumer=role != "kv_producer",
            kv_connector_extra_config={"chunk_size": 32, **(extra or {})},
            kv_load_failure_policy=policy,
            engine_id="engine",
        ),
        model_config=SimpleNamespace(model="m"),
        cache_config=SimpleNamespace(block_size=BLOCK, enable_prefix_caching=True),
        compilation_config=SimpleNamespace(static_forward_context=layers or {}),
        parallel_config=SimpleNamespace(
            **{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "world_size": 1, **parallel}
        ),
    )


def cache(kind=FullAttentionSpec):
    spec = kind(block_size=BLOCK, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32)
    return KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(NAMES, spec)])


def tensors():
    return {name: torch.randn(BLOCKS, HEADS, BLOCK, 2 * SIZE) for name in NAMES}


def worker_of(vllm_config, kv_caches, monkeypatch, kv_cache_config=None):
    monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
    kv_cache_config = kv_cache_config or cache()
    worker = PdSidecarConnector(vllm_config, KVConnectorRole.WORKER, kv_cache_config)
    worker.register_kv_caches(kv_caches)
    return worker


def test_a_push_through_both_halves(tmp_path, monkeypatch):
    path = tmp_path / "sender.sock"
    sidecar = FakeSidecar(path)
    vllm_config = config({"sender_socket": str(path)}, role="kv_producer")
    kv = tensors()
    scheduler = PdSidecarConnector(vllm_config, KVConnectorRole.SCHEDULER, cache())
    worker = worker_of(vllm_config, kv, monkeypatch)
    worker._worker._links[0].client._reconnector.connected.wait(60)

    req = request("a", push_params())
    req.status = RequestStatus.RUNNING
    assert scheduler.get_num_new_matched_tokens(req, 0) == (0, False)
    step(scheduler, worker, output(new=[(req, [5, 2, 7], 0, 40)]))
    assert len(sidecar.next(wire.Reserve).keys) == 2
    req.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert scheduler.request_finished(req, [5, 2, 7])[0]
    sidecar.say(wire.Granted("r", 0, [0, 1], [3, 4]))
    sent, deadline = set(), time.monotonic() + 60
    while not sent:
        assert time.monotonic() < deadline
        assert scheduler.has_pending_push_work()
        sent = step(scheduler, worker, output())
    assert sent == {"a"}
    assert not scheduler.has_pending_push_work()
    assert sorted(sidecar.next(wire.Staged).chunks) == [0, 1]
    chunk = torch.frombuffer(bytearray(sidecar.read(3, sidecar.slot_bytes)), dtype=torch.float32)
    key = chunk.view(2, 2, 32, HEADS, SIZE)[0, 1, 17]
    assert torch.equal(key, kv[NAMES[1]][2, :, 1, :SIZE])
    assert worker.get_kv_connector_stats().data["saves"] == 1
    worker.shutdown()


@pytest.mark.parametrize("of_bytes", [True, False])
def test_a_sidecar_is_told_what_bytes_stand_for(tmp_path, monkeypatch, of_bytes):
    path = tmp_path / "sender.sock"
    sidecar = FakeSidecar(path)
    scales = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.5))
    vllm_config = config({"sender_socket": str(path)}, role="kv_producer", layers=dict.fromkeys(NAMES, scales))
    vllm_config.cache_config.cache_dtype = "fp8"
    dtype = torch.uint8 if of_bytes else torch.bfloat16
    kv = {name: torch.zeros(BLOCKS, HEADS, BLOCK, 2 * SIZE, dtype=dtype) for name in NAMES}
    worker = worker_of(vllm_config, kv, monkeypatch)
    worker._worker._links[0].client._reconnector.connected.wait(60)
    layout = sidecar.hellos[0].layout
    assert (layout.dtype, layout.quantization) == (("uint8", "fp8_e4m3, scales 0.5") if of_bytes else ("bfloat16", ""))
    worker.shutdown()


@pytest.mark.parametrize("way", ["measured", "forgotten"])
def test_scales_that_may_be_others_later_are_not_moved(monkeypatch, way):
    scales = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.5))
    vllm_config = config(layers=dict.fromkeys(NAMES, scales))
    vllm_config.cache_config.cache_dtype = "fp8"
    vllm_config.cache_config.calculate_kv_scales = way == "measured"
    vllm_config.model_config.enable_sleep_mode = way == "forgotten"
    kv = {name: torch.zeros(BLOCKS, HEADS, BLOCK, 2 * SIZE, dtype=torch.uint8) for name in NAMES}
    assert isinstance(worker_of(vllm_config, kv, monkeypatch)._worker, module.DisabledWorker)


def test_an_engine_that_moves_nothing_promises_nothing(tmp_path, monkeypatch):
    """The scheduler learns before the first request that no KV is moved. A proxy that still asks for a push gets the
    reason.
    """
    path = tmp_path / "both.sock"
    sidecar = FakeSidecar(path)
    extra = {"sender_socket": str(path), "receiver_socket": str(path)}
    vllm_config = config(extra)
    kv = {name: torch.zeros(BLOCKS, 3, BLOCK, 2 * SIZE) for name in NAMES}
    scheduler = PdSidecarConnector(vllm_config, KVConnectorRole.SCHEDULER, cache())
    worker = worker_of(vllm_config, kv, monkeypatch)
    monkeypatch.setattr(module, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(module, "get_kv_transfer_group", lambda: worker)
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})

    req = request("a", push_params())
    req.status = RequestStatus.RUNNING
    assert scheduler.get_num_new_matched_tokens(req, 0) == (0, False)
    step(scheduler, worker, output(new=[(req, [5, 2, 7], 0, 40)]))
    req.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert scheduler.request_finished(req, [5, 2, 7]) == (
        False,
        {"pushed": False, "reason": "layout"},
    )
    assert scheduler.get_num_new_matched_tokens(request("b", load_params()), 0) == (0, False)
    deadline = time.monotonic() + 60
    while len(sidecar.hellos) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert all("does not fit KV" in hello.unmoved for hello in sidecar.hellos)
    worker.shutdown()


def test_beside_other_connectors_the_first_step_says_that_nothing_is_moved(monkeypatch):
    """MultiConnector passes handshake data to all its children, and vLLM's connectors refuse this connector's data."""
    vllm_config = config()
    kv = {name: torch.zeros(BLOCKS, 3, BLOCK, 2 * SIZE) for name in NAMES}
    scheduler = PdSidecarConnector(vllm_config, KVConnectorRole.SCHEDULER, cache())
    worker = worker_of(vllm_config, kv, monkeypatch)
    monkeypatch.setattr(module, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(module, "get_kv_transfer_group", object)
    assert worker.get_handshake_metadata() is None
    req = request("a", push_params())
    req.status = RequestStatus.RUNNING
    assert scheduler.get_num_new_matched_tokens(req, 0) == (0, False)
    worker.bind_connector_metadata(scheduler.build_connector_meta(output(new=[(req, [5, 2, 7], 0, 40)])))
    said = KVConnectorOutput(kv_connector_worker_meta=worker.build_connector_worker_meta())
    scheduler.update_connector_output(said)
    req.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert scheduler.request_finished(req, [5, 2, 7]) == (
        False,
        {"pushed": False, "reason": "layout"},
    )
    worker.shutdown()


def test_the_module_path_wins_over_vllms_class_of_the_same_name():
    named = SimpleNamespace(kv_connector="NixlConnector", kv_connector_module_path=module.__name__)
    assert KVConnectorFactory.get_connector_class(named) is PdSidecarConnector
    # MultiConnector looks for the class of a child's statistics by the name of the child's class.
    assert KVConnectorFactory.get_connector_class_by_name(module.NixlConnector.__name__) is PdSidecarConnector


def test_sleep_mode_is_refused():
    """vLLM 0.33 calls this method with the transfer's configuration. The method of the base class would return true."""
    assert PdSidecarConnector.supports_sleep_mode(config().kv_transfer_config) is False


@pytest.mark.skipif(not hasattr(FullAttentionSpec, "num_head_slots"), reason="this version of vLLM has no such pages")
def test_pages_that_look_like_others_are_not_moved(monkeypatch):
    """Pages with two places, one for K and one for V, have the same shape as pages of two heads."""
    spec = FullAttentionSpec(
        block_size=BLOCK,
        num_kv_heads=HEADS,
        head_size=SIZE,
        dtype=torch.float32,
        num_head_slots=2,
        state_content_bytes=HEADS * SIZE * 4,
    )
    packed = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(NAMES, spec)])
    assert isinstance(worker_of(config(), tensors(), monkeypatch, packed)._worker, module.DisabledWorker)


def results_of(worker):
    """Asks the worker for results as this version of vLLM does."""
    if module.TransferResults is not None:
        return worker.get_transfer_results(set())
    sent, received = worker.get_finished(set())
    blocks = worker.get_block_ids_with_load_errors()
    sets = {"finished_sending": sent or set(), "finished_recving": received or set()}
    return SimpleNamespace(**sets, failed_recving=(received or set()) if blocks else set())


def step(scheduler, worker, scheduled):
    worker.handle_preemptions(None)
    worker.bind_connector_metadata(scheduler.build_connector_meta(scheduled))
    worker.start_load_kv(None, anything=1)
    worker.wait_for_save()
    results = results_of(worker)
    worker.clear_connector_metadata()
    scheduler.update_connector_output(results)
    return results.finished_sending


def park(scheduler, name="a"):
    req = request(name, load_params())
    count, _ = scheduler.get_num_new_matched_tokens(req, 16)
    scheduler.update_state_after_alloc(req, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3],)), count)
    return scheduler.build_connector_meta(output())


@pytest.mark.parametrize(("world_size", "told"), [(1, {"a"}), (2, None)])
def test_a_scheduler_beside_its_only_worker_knows_before_the_next_step(tmp_path, monkeypatch, world_size, told):
    path = tmp_path / "receiver.sock"
    sidecar = FakeSidecar(path)
    vllm_config = config({"receiver_socket": str(path)}, role="kv_consumer", world_size=world_size)
    scheduler = PdSidecarConnector(vllm_config, KVConnectorRole.SCHEDULER, cache())
    worker = worker_of(vllm_config, tensors(), monkeypatch)
    monkeypatch.setattr(module, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(module, "get_kv_transfer_group", lambda: worker)
    worker._worker._links[0].client._reconnector.connected.wait(60)

    worker.bind_connector_metadata(park(scheduler))
    assert results_of(worker).finished_recving == set()
    worker.clear_connector_metadata()
    sidecar.next(wire.Await)
    sidecar.say(wire.Ready("r", 0, [0, 1], [0, 1]))
    deadline = time.monotonic() + 60
    before = KVConnectorOutput(kv_connector_worker_meta=worker.build_connector_worker_meta())
    assert not before.is_empty()  # vLLM does not pass an empty output to the scheduler's half
    while not before.finished_recving and told and time.monotonic() < deadline:
        scheduler.update_connector_output(before)
    scheduler.update_connector_output(before)
    assert before.finished_recving == told
    results = results_of(worker)
    assert results.finished_recving == (set() if told else {"a"})
    worker.shutdown()


def test_a_failed_load_is_said_by_request_and_on_older_versions_by_block(tmp_path, monkeypatch):
    vllm_config = config({"receiver_socket": str(tmp_path / "none.sock")}, role="kv_consumer")
    scheduler = PdSidecarConnector(vllm_config, KVConnectorRole.SCHEDULER, cache())
    worker = worker_of(vllm_config, tensors(), monkeypatch)
    worker.bind_connector_metadata(park(scheduler))
    results = results_of(worker)
    assert (results.finished_recving, results.failed_recving) == ({"a"}, {"a"})
    assert worker.get_block_ids_with_load_errors() == set()

    scheduler = PdSidecarConnector(vllm_config, KVConnectorRole.SCHEDULER, cache())
    worker.bind_connector_metadata(park(scheduler, "b"))
    assert worker.get_finished(set()) == (None, {"b"})
    assert worker.get_block_ids_with_load_errors() == {2, 3}
    assert worker.get_block_ids_with_load_errors() == set()
    worker.shutdown()


@pytest.mark.parametrize(
    ("kv_caches", "kind"),
    [({name: torch.zeros(BLOCKS, 3, 5) for name in NAMES}, FullAttentionSpec), (tensors(), CrossAttentionSpec)],
    ids=["shape", "kind"],
)
def test_kv_that_cannot_be_moved_is_computed(kv_caches, kind, monkeypatch, caplog):
    worker = worker_of(config(), kv_caches, monkeypatch, cache(kind))
    scheduler = PdSidecarConnector(config(), KVConnectorRole.SCHEDULER, cache())
    worker.bind_connector_metadata(park(scheduler))
    assert results_of(worker).failed_recving == {"a"}


def test_the_engines_kernel_is_asked(monkeypatch):
    def update(layer, key, value, kv_cache, slots):
        assert layer.name in NAMES
        for k, v, slot in zip(key, value, slots.tolist(), strict=True):
            kv_cache[slot // BLOCK, :, slot % BLOCK] = torch.cat([v, k], 1)  # V first

    layers = {name: SimpleNamespace(name=name, impl=SimpleNamespace(do_kv_cache_update=update)) for name in NAMES}
    worker = worker_of(config(layers=layers), tensors(), monkeypatch)
    inside = worker._worker._parts.only.first.inside
    assert (int(inside[0, 0, 0]), int(inside[1, 0, 0])) == (SIZE, 0)
    worker.shutdown()


def test_a_spawned_sidecar_is_told_the_ranks(monkeypatch):
    told = []
    monkeypatch.setattr(module, "find_binary", lambda: "sidecar")
    monkeypatch.setattr(module, "Child", lambda command, logger, variables: told.append(variables()))
    given = config({"sidecar": "spawn", "lmcache.pd_role": "sender"}, tensor_parallel_size=2)
    PdSidecarConnector(given, KVConnectorRole.SCHEDULER, cache())
    assert told == [{"LMCACHE_PD_ROLE": "sender", "PD_SIDECAR_RANKS": "2", "PD_SIDECAR_SPAWNED": "1"}]


def test_an_engine_of_both_roles_starts_its_sidecar_without_further_options(monkeypatch):
    monkeypatch.delenv("PD_SIDECAR_SOCKET")
    monkeypatch.setenv("LMCACHE_PD_BUFFER_SIZE", "1MiB")
    told = []
    monkeypatch.setattr(module, "find_binary", lambda: "sidecar")
    monkeypatch.setattr(module, "Child", lambda command, logger, variables: told.append((command, variables())))
    for engine in ("one", "two"):
        given = config(tensor_parallel_size=2)
        given.kv_transfer_config.engine_id = engine
        halves = [PdSidecarConnector(given, role, cache()) for role in KVConnectorRole]
        # The worker's half connects to the sidecar that the scheduler's half has started.
        assert {half._options.sender_socket for half in halves} == {told[-1][0][4]}
        assert {half._options.receiver_socket for half in halves} == {told[-1][0][4]}
    (first, variables), (second, _) = told
    assert first[:3] == ["sidecar", "--role", "both"]
    assert first[4] != second[4]
    ports = [int(p) for side in ("INIT", "ALLOC") for p in variables[f"LMCACHE_PD_PEER_{side}_PORT"].split(",")]
    assert len(set(ports)) == 4 and 0 not in ports
    assert (variables["LMCACHE_PD_PEER_HOST"], variables["PD_SIDECAR_RANKS"]) == ("127.0.0.1", "2")
    # The user's variable reaches the sidecar by the environment.
    assert "LMCACHE_PD_BUFFER_SIZE" not in variables


def test_an_own_sidecar_sees_the_gpus_of_both_sides():
    def uuids(rank):
        return f"GPU-{rank}"

    environ = {"CUDA_VISIBLE_DEVICES": "1"}
    found = own_sidecar.variables(2, "cuda", uuids, environ)
    assert (found["LMCACHE_PD_BUFFER_DEVICE"], found["CUDA_VISIBLE_DEVICES"]) == ("cuda:GPU-0,cuda:GPU-1", None)
    # Numbers of GPUs depend on the visible GPUs, so with numbers the sidecar sees what the engine sees.
    found = own_sidecar.variables(1, "cuda", uuids, {**environ, "LMCACHE_PD_BUFFER_DEVICE": "cuda:0"})
    assert not {"LMCACHE_PD_BUFFER_DEVICE", "CUDA_VISIBLE_DEVICES"} & found.keys()

    def none(rank):
        raise RuntimeError("no NVML")

    found = own_sidecar.variables(1, "cuda", none, environ)
    assert found["LMCACHE_PD_BUFFER_DEVICE"] == "cuda" and "CUDA_VISIBLE_DEVICES" not in found
    assert "CUDA_VISIBLE_DEVICES" not in own_sidecar.variables(1, "cpu", uuids, environ)


@pytest.mark.parametrize(("role", "after"), [("kv_both", "recompute"), ("kv_producer", "fail")])
def test_an_engine_that_loads_recomputes_after_a_failed_load(role, after, caplog):
    given = config(role=role, policy="fail")
    PdSidecarConnector(given, KVConnectorRole.WORKER, cache())
    assert given.kv_transfer_config.kv_load_failure_policy == "fail"
    PdSidecarConnector(given, KVConnectorRole.SCHEDULER, cache())
    assert given.kv_transfer_config.kv_load_failure_policy == after


def test_the_user_may_keep_the_policy_fail():
    given = config({"allow_load_failure_policy_fail": True}, policy="fail")
    PdSidecarConnector(given, KVConnectorRole.SCHEDULER, cache())
    assert given.kv_transfer_config.kv_load_failure_policy == "fail"


@pytest.mark.parametrize(
    ("outer", "inner", "starts"),
    [("recompute", "recompute", True), ("fail", "recompute", False), ("recompute", "fail", False)],
)
def test_a_child_of_multi_connector_needs_the_policy_in_both_places(outer, inner, starts):
    class Parent(MultiConnector):
        def __init__(self):
            self._vllm_config = config(policy=outer)
            PdSidecarConnector(config(policy=inner), KVConnectorRole.SCHEDULER, cache())

    if starts:
        Parent()
    else:
        with pytest.raises(ConfigError, match="MultiConnector"):
            Parent()


@pytest.mark.parametrize(
    "wrong",
    [
        {"extra": {"hash": "x"}},
        {"pipeline_parallel_size": 2},
        {"decode_context_parallel_size": 2},
    ],
)
@pytest.mark.parametrize("role", list(KVConnectorRole))
def test_what_cannot_work_does_not_start(wrong, role):
    with pytest.raises(ConfigError):
        PdSidecarConnector(config(**wrong), role, cache())
