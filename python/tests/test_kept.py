"""Tests kept KV: the parameters that the scheduler's half reads and answers for routers that name no receiver, and the
messages of the workers to the sidecar.
"""

from __future__ import annotations

import json
import pickle
import time

import pytest
import test_connector
import test_worker
import torch
from fake_sidecar import FakeSidecar
from test_scheduler import BLOCK, Rig, output, request
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.outputs import KVConnectorOutput

from pd_sidecar import connector
from pd_sidecar.scheduler.eligibility import Skip, transfer
from pd_sidecar.scheduler.kept import FetchPort, Keeping, KeepPolicy, KeptSource, source_of
from pd_sidecar.scheduler.metadata import IdleReport, LoadStart, PushStart, PushStep
from pd_sidecar.scheduler.states import Role
from pd_sidecar.scheduler.tables import TableRule
from pd_sidecar.sidecar import wire

TOKEN = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
EPOCH = (1 << 64) - 1
PORT = FetchPort("10.0.0.1", 7600, EPOCH)
SOURCE = KeptSource(TOKEN, (PORT,), 30_000)
# The parameters that vllm-router 0.1.17 and vLLM's own example send.
P_LEG = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def keeper(blocks=8):
    policy = KeepPolicy("engine-p", 30_000, blocks)
    rig = Rig(Role(producer=True, consumer=True, ranks=1, tables=(TableRule(BLOCK),), keep=policy))
    rig.scheduler.keeping.learn({0: PORT})
    return rig


def prefill(rig, name="p-1"):
    """Runs a prefill leg that names no receiver to its end. Returns its start, the delay and the answer."""
    req = request(name, P_LEG, output_token_ids=[7])
    assert rig.scheduler.matched_tokens(req, 0) == (0, False)
    metadata = rig.step(new=[(req, [1, 2, 3], 0, 40)])
    delay, response = rig.scheduler.finished(req, ([1, 2, 3],), completed=True)
    return metadata, delay, response


def test_the_answer_of_a_prefill_leg_leads_the_decode_leg_to_its_kv():
    rig = keeper()
    metadata, delay, response = prefill(rig)
    (start,) = metadata.push_starts
    assert (start.req, start.host, start.keep_ms) == ("p-1", "", 30_000)
    assert delay
    assert response["remote_request_id"] == start.token
    assert response["do_remote_prefill"] is True
    assert response["remote_block_ids"]
    # A router puts the answer's parameters into the decode leg.
    wish = transfer(json.loads(json.dumps(response)))
    assert wish.kept == KeptSource(start.token, (PORT,), 30_000)
    assert not wish.is_push


def test_a_router_that_turns_numbers_into_floats_changes_nothing():
    _, _, response = prefill(keeper())
    floats = json.loads(json.dumps(response), parse_int=float)
    # For Python 1 and 1.0 are equal. The epoch is text, because a float would lose some of its digits.
    assert source_of(floats).ports == (PORT,)


def test_an_engine_that_keeps_kv_does_not_step_for_it():
    rig = keeper()
    prefill(rig)
    assert rig.step().finished == ["p-1"]
    assert not rig.scheduler.has_work
    rig.scheduler.reported(["p-1"], [])
    assert rig.is_empty()


@pytest.mark.parametrize("is_alone", [True, False])
def test_kept_blocks_are_held_although_vllm_forgets_the_request(is_alone):
    pool = BlockPool(8, enable_caching=True, hash_block_size=BLOCK)
    blocks = pool.get_new_blocks(3)
    rig = keeper()
    rig.scheduler.keeping.pool = pool
    rig.scheduler.keeping.learn({}, is_alone=is_alone)
    _, delay, response = prefill(rig)
    # If vLLM has to free a request's blocks later, it runs steps without a pause until then.
    assert delay is not is_alone
    assert response["do_remote_prefill"] is True
    if not is_alone:
        # Another child of a MultiConnector may report the same request, so vLLM keeps the blocks.
        rig.step()
        assert rig.scheduler.reported(["p-1"], []) == set()
        assert [block.ref_cnt for block in blocks] == [1, 1, 1]
        return
    pool.free_blocks(blocks)
    assert [block.ref_cnt for block in blocks] == [1, 1, 1]
    assert rig.step().finished == ["p-1"]
    assert not rig.scheduler.has_work
    # vLLM does not know the request any more, so the request's end must not be reported to vLLM.
    assert rig.scheduler.reported(["p-1", "p-2"], []) == {"p-1"}
    assert [block.ref_cnt for block in blocks] == [0, 0, 0]
    assert pool.get_num_free_blocks() == 7
    assert rig.is_empty()


def test_tokens_differ():
    rig = keeper(blocks=100)
    tokens = {prefill(rig, f"p-{i}")[0].push_starts[0].token for i in range(20)}
    assert len(tokens) == 20


def test_kept_kv_takes_its_share_of_the_blocks_only():
    rig = keeper(blocks=7)
    assert prefill(rig, "p-1")[1]
    assert prefill(rig, "p-2")[1]
    _, delay, response = prefill(rig, "p-3")
    assert not delay
    assert response["pd"] == {"v": 1, "reason": "keep_full"}
    assert rig.step().cancelled == ["p-3"]
    assert rig.skipped() == {"keep_full": 1}
    # With this answer's parameters the decode side computes the request itself.
    assert transfer(response) is Skip.NOT_KEPT
    rig.step()
    rig.scheduler.reported(["p-1"], [])
    assert prefill(rig, "p-4")[1]


def test_without_a_fetch_port_nothing_is_kept():
    rig = keeper()
    rig.scheduler.keeping.learn({0: None})
    metadata, delay, response = prefill(rig)
    assert not metadata.push_starts
    assert not delay
    assert response["do_remote_prefill"] is False
    assert response["pd"]["reason"] == "no_fetch_port"
    assert rig.skipped() == {"no_fetch_port": 1}
    assert rig.is_empty()


def test_a_sidecar_that_is_lost_while_a_prompt_is_computed_keeps_nothing():
    rig = keeper()
    req = request("p-1", P_LEG, output_token_ids=[7])
    rig.scheduler.matched_tokens(req, 0)
    rig.step(new=[(req, [1, 2, 3], 0, 40)])
    rig.scheduler.keeping.learn({0: None})
    delay, response = rig.scheduler.finished(req, ([1, 2, 3],), completed=True)
    assert not delay
    assert response["pd"]["reason"] == "no_fetch_port"
    assert rig.step().cancelled == ["p-1"]
    assert rig.is_empty()


def decode(source=SOURCE, name="d-1"):
    keeping = Keeping(KeepPolicy("engine-p", source.keep_ms, 8), dict(enumerate(source.ports)))
    return request(name, keeping.answer(source.token, 40))


def test_a_decode_request_is_expected_when_it_arrives_and_awaited_with_its_own_id():
    rig = keeper()
    req = decode()
    rig.scheduler.arrived(req)
    assert rig.scheduler.has_work
    assert rig.step().expected == [("d-1", SOURCE)]
    count, is_async = rig.scheduler.matched_tokens(req, 0)
    assert (count, is_async) == (40, True)
    rig.scheduler.allocated(req, ([4, 5, 6],), count)
    metadata = rig.step()
    (start,) = metadata.load_starts
    assert (start.req, start.source) == ("d-1", SOURCE)
    assert not metadata.expected


@pytest.mark.parametrize("ending", ["full_hit", "aborted_in_queue", "rejected", "skipped"])
def test_a_decode_request_that_needs_no_kv_drops_it(ending):
    rig = keeper()
    req = decode()
    if ending == "skipped":
        req.prompt_embeds = object()
    if ending != "rejected":
        rig.scheduler.arrived(req)
    if ending == "full_hit":
        assert rig.scheduler.matched_tokens(req, 40) == (0, False)
        rig.scheduler.allocated(req, ([4, 5, 6],), 0)
    elif ending != "skipped":
        assert rig.scheduler.finished(req, ([],), completed=False) == (False, None)
    metadata = rig.step()
    # The sidecar learns of the KV, and then learns that no request wants the KV. So it can tell the prefill side.
    assert metadata.expected == [("d-1", SOURCE)]
    assert metadata.dismissed == ["d-1"]


def test_sequences_of_one_client_request_fetch_once():
    rig = keeper()
    first, second = decode(name="0_cmpl-a-0-11111111"), decode(name="1_cmpl-a-0-22222222")
    for req in (first, second):
        rig.scheduler.arrived(req)
    assert rig.step().expected == [("0_cmpl-a-0-11111111", SOURCE)]
    rig.scheduler.finished(second, ([],), completed=False)
    assert not rig.step().dismissed


def test_another_number_of_ranks_is_computed_and_dropped():
    rig = keeper()
    two = KeptSource(TOKEN, (PORT, PORT), 30_000)
    rig.scheduler.arrived(decode(two))
    assert rig.skipped() == {"tp_mismatch": 1}
    assert rig.step().dismissed == ["d-1"]


@pytest.mark.parametrize(
    "change",
    [
        {"remote_request_id": "cmpl-1"},
        {"remote_request_id": TOKEN.upper()},
        {"remote_request_id": None},
        {"pd": None},
        {"pd": {"v": 2}},
        {"pd.host": "a\nb"},
        {"pd.host": ""},
        {"pd.fetch_ports": []},
        {"pd.fetch_ports": [0]},
        {"pd.fetch_ports": [1.5]},
        {"pd.fetch_ports": [True]},
        {"pd.fetch_ports": [7600, 7601]},
        {"pd.epochs": [1]},
        {"pd.epochs": ["12"]},
        {"pd.keep_ms": 0},
        {"pd.keep_ms": "1"},
    ],
)
def test_parameters_from_the_network_are_checked(change):
    params = decode().kv_transfer_params
    for key, value in change.items():
        target = params["pd"] if key.startswith("pd.") else params
        target[key.removeprefix("pd.")] = value
    assert transfer(params) is Skip.BAD_PARAMS


def test_a_router_that_sends_both_legs_at_once_is_computed_and_counted_and_its_kv_is_limited():
    """vLLM's NixlPushConnector needs no answer of the prefill leg, so the decode leg names no kept KV."""
    named = {"remote_engine_id": "engine-p", "remote_host": "10.0.0.1", "remote_port": 5600, "tp_size": 1}
    leg = {**P_LEG, **named, "do_remote_decode": False, "do_remote_prefill": True, "remote_request_id": "cmpl-1"}
    rig = keeper(blocks=4)
    for number in range(3):
        assert rig.scheduler.matched_tokens(request(f"d-{number}", leg), 0) == (0, False)
        prefill(rig, f"p-{number}")
    skipped = rig.stats.data["skipped"]
    # The prefill legs keep KV within their share of the blocks. The sidecar limits the time.
    assert skipped == {"not_ours": 3, "keep_full": 2}


def test_reports_of_several_workers_are_merged():
    one, two = IdleReport(False, fetch_ports={0: PORT}), IdleReport(True, unmoved=True, fetch_ports={1: None})
    assert one.aggregate(two) == IdleReport(False, unmoved=True, fetch_ports={0: PORT, 1: None})


# A connector that is made as vLLM makes it.


def test_one_process_keeps_and_the_other_fetches_from_the_first_request_on(tmp_path, monkeypatch):
    path = tmp_path / "both.sock"
    sidecar = FakeSidecar(path, fetch=wire.Keeper("10.0.0.1", 7600), epoch=EPOCH)
    vllm_config = test_connector.config({"sender_socket": str(path), "receiver_socket": str(path)})
    cache, role = test_connector.cache(), test_connector.KVConnectorRole
    scheduler = connector.PdSidecarConnector(vllm_config, role.SCHEDULER, cache)
    worker = test_connector.worker_of(vllm_config, test_connector.tensors(), monkeypatch)
    monkeypatch.setattr(connector, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(connector, "get_kv_transfer_group", lambda: worker)
    notices = {(0, 0): worker.get_handshake_metadata()}
    scheduler.set_xfer_handshake_metadata_pp_aware(pickle.loads(pickle.dumps(notices)))

    req = request("p-1", P_LEG, output_token_ids=[7])
    scheduler.on_new_request(req)
    assert scheduler.get_num_new_matched_tokens(req, 0) == (0, False)
    test_connector.step(scheduler, worker, output(new=[(req, [5, 2, 7], 0, 40)]))
    kept = sidecar.next(wire.Keep)
    req.status = test_connector.RequestStatus.FINISHED_LENGTH_CAPPED
    delay, response = scheduler.request_finished(req, [5, 2, 7])
    assert delay
    assert response["remote_request_id"] == kept.token
    assert response["remote_engine_id"] == "engine"

    load = request("d-1", json.loads(json.dumps(response)))
    scheduler.on_new_request(load)
    test_connector.step(scheduler, worker, output())
    messages = [sidecar.next(), sidecar.next()]
    (expect,) = [message for message in messages if isinstance(message, wire.Expect)]
    assert (expect.req, expect.token) == ("d-1", kept.token)
    assert (expect.from_, expect.epoch) == (wire.Keeper("10.0.0.1", 7600), EPOCH)
    load.status = test_connector.RequestStatus.FINISHED_ABORTED
    assert scheduler.request_finished(load, []) == (False, None)
    test_connector.step(scheduler, worker, output())
    assert sidecar.next(wire.Abort).req == "d-1"
    worker.shutdown()


def test_after_a_restart_of_the_sidecar_the_first_answer_names_the_new_port(tmp_path, monkeypatch):
    """vLLM ends a request of one step before it gives the scheduler's half the workers' report of this step, and sends
    the answer afterwards.
    """
    path = tmp_path / "both.sock"
    sidecar = FakeSidecar(path, fetch=wire.Keeper("10.0.0.1", 7600), epoch=1)
    vllm_config = test_connector.config({"sender_socket": str(path)}, role="kv_producer")
    cache, role = test_connector.cache(), test_connector.KVConnectorRole
    scheduler = connector.PdSidecarConnector(vllm_config, role.SCHEDULER, cache)
    worker = test_connector.worker_of(vllm_config, test_connector.tensors(), monkeypatch)
    monkeypatch.setattr(connector, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(connector, "get_kv_transfer_group", lambda: worker)
    # The worker runs in another process.
    monkeypatch.setattr(scheduler, "_neighbour", lambda: None)
    client = worker._worker._links[0].client
    assert client._reconnector.connected.wait(60)
    scheduler.set_xfer_handshake_metadata({0: worker.get_handshake_metadata()})
    sidecar.stop()
    other = FakeSidecar(path, fetch=wire.Keeper("10.0.0.1", 7601), epoch=2)

    def compute(step):
        worker.bind_connector_metadata(scheduler.build_connector_meta(step))
        sent = test_connector.results_of(worker).finished_sending
        meta = worker.build_connector_worker_meta()
        return KVConnectorOutput(finished_sending=sent, kv_connector_worker_meta=meta)

    def answer(name):
        req = request(name, P_LEG, output_token_ids=[7])
        scheduler.on_new_request(req)
        assert scheduler.get_num_new_matched_tokens(req, 0) == (0, False)
        output_of_step = compute(output(new=[(req, [5, 2, 7], 0, 40)]))
        req.status = test_connector.RequestStatus.FINISHED_LENGTH_CAPPED
        told = scheduler.request_finished(req, [5, 2, 7])[1]
        scheduler.update_connector_output(output_of_step)
        return told

    # While the sidecar is away, the answer says that nothing is kept.
    count, deadline = 0, time.monotonic() + 60
    while not (told := answer(f"p-{count}"))["do_remote_prefill"]:
        assert time.monotonic() < deadline, told["pd"]
        assert told["pd"]["reason"] in ("no_fetch_port", "keep_full")
        # The worker reports that it holds no blocks for the earlier sidecar.
        scheduler.update_connector_output(compute(output()))
        count += 1
    assert (told["pd"]["fetch_ports"], told["pd"]["epochs"], told["remote_port"]) == ([7601], [f"{2:016x}"], 7601)
    worker.shutdown()
    other.stop()


# The workers, with a real socket.


@pytest.fixture
def workers(tmp_path, monkeypatch):
    made = FakeSidecar

    def fake(path):
        fetch = wire.Keeper("10.0.0.1", 7600) if "sender" in str(path) else None
        return made(path, fetch=fetch, epoch=EPOCH)

    monkeypatch.setattr(test_worker, "FakeSidecar", fake)
    # As in vLLM: the tensors are made in this mode, and only threads in this mode may write to them.
    with torch.inference_mode():
        rig = test_worker.Rig(tmp_path)
        yield rig
        rig.worker.close()


def test_a_worker_reports_the_fetch_port_of_each_sidecar_once(workers):
    reports = []

    def told(ports):
        if (report := workers.worker.idle_report) is not None:
            reports.append(report.fetch_ports)
        return ports in reports

    workers.sender.stop()
    workers.until(lambda: told({0: None}))
    other = FakeSidecar(workers.paths["sender"], fetch=wire.Keeper("10.0.0.1", 7601), epoch=3)
    workers.until(lambda: told({0: FetchPort("10.0.0.1", 7601, 3)}))
    workers.step()
    assert workers.worker.idle_report is None
    other.stop()


def keep(workers):
    """Runs the one step of a prefill leg, and the step after its answer."""
    start = PushStart("a", "a", "", (), (), test_worker.HASHES, test_worker.TOKENS, False, token=TOKEN, keep_ms=500)
    workers.step(push_starts=[start], push_steps=[PushStep("a", (test_worker.TABLE,), True, test_worker.TOKENS)])
    sent, _ = workers.step(forward=False, finished=["a"])
    assert not sent


def test_a_worker_gathers_kept_kv_although_the_engine_does_not_step(workers):
    keep(workers)
    message = workers.sender.next(wire.Keep)
    assert (message.req, message.token, message.keep_ms, message.keys) == ("a", TOKEN, 500, test_worker.KEYS)
    assert message.upto == message.tokens == test_worker.TOKENS
    # The answer is sent at the end of the request, and the time begins at this moment.
    assert workers.sender.next(wire.Computing).upto == test_worker.TOKENS
    workers.sender.say(wire.Granted("a", 32, [], []), wire.Granted("a", 32, [1, 2], [0, 1]))
    assert workers.sender.next(wire.Staged).chunks == [1, 2]
    for slot, (first, end) in enumerate([(32, 64), (64, 80)]):
        expected = workers.kv(test_worker.TABLE, first, end)
        assert workers.chunk(slot, end - first).equal(expected)
    # As with every push, the blocks are free once all wanted chunks are in slots. vLLM learns this in its next step.
    sent, _, _ = workers.until(lambda: not workers.worker._senders[0].is_waiting)
    assert sent == ["a"]


def test_a_worker_that_ends_waits_until_its_kept_kv_has_left_the_sidecar(workers):
    keep(workers)
    workers.sender.next(wire.Keep)
    workers.sender.next(wire.Computing)
    assert workers.worker.wait_fetched(0.05) == 1
    workers.sender.say(wire.Granted("a", 32, [], []), wire.Granted("a", 32, [1, 2], [0, 1]))
    # The sidecar still reads the slots.
    assert workers.worker.wait_fetched(0.2) == 1
    workers.sender.next(wire.Staged)
    workers.sender.say(wire.Ended("a", None, 5))
    assert workers.worker.wait_fetched(20) == 0


def test_a_worker_frees_kept_blocks_that_nobody_fetched(workers):
    keep(workers)
    workers.sender.say(wire.Ended("a", "unclaimed", 0))
    sent, _, _ = workers.until(lambda: not workers.worker._senders[0].is_waiting)
    assert sent == ["a"]
    assert workers.stats.data["save_failures"] == {"unclaimed": 1}


def test_a_worker_expects_and_awaits(workers):
    workers.step(forward=False, expected=[("d-1", SOURCE)])
    expect = workers.receiver.next(wire.Expect)
    assert (expect.req, expect.token, expect.epoch, expect.keep_ms) == ("d-1", TOKEN, EPOCH, 30_000)
    assert expect.from_ == wire.Keeper("10.0.0.1", 7600)
    tokens = test_worker.TOKENS
    start = LoadStart("d-1", "d-1", test_worker.HASHES, tokens, 0, tokens, ([3, 9, 27, 1, 5],), [], source=SOURCE)
    workers.step(forward=False, load_starts=[start])
    workers.receiver.next(wire.Expect)
    assert workers.receiver.next(wire.Await).req == "d-1"


def test_a_worker_dismisses_what_it_expected(workers):
    workers.step(forward=False, expected=[("d-1", SOURCE)], dismissed=["d-1"])
    workers.receiver.next(wire.Expect)
    assert workers.receiver.next(wire.Abort).req == "d-1"
