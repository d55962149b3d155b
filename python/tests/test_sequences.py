"""Tests n > 1: vLLM makes one engine request per sequence, and all of them name the same transfer."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_scheduler import BLOCK, BOTH, Rig, load_params, output, request
from test_worker import BLOCKS, LAYERS, TABLE
from test_worker import Rig as Workers

from pd_sidecar.kv.keys import ChunkHasher
from pd_sidecar.kv.layout import Hint, geometry
from pd_sidecar.scheduler.metadata import CopyStart
from pd_sidecar.scheduler.scheduler import Scheduler
from pd_sidecar.scheduler.sequences import blocks_to_copy
from pd_sidecar.scheduler.stats import Stats
from pd_sidecar.scheduler.tables import TableRule

TOKENS = 40


@pytest.fixture
def rig():
    return Rig()


def children(count, **more):
    return [request(f"{i}_r-0-0123abcd", load_params(), tokens=TOKENS, **more) for i in range(count)]


def run(rig, req, blocks):
    """Schedules a request after its load. The engine computes only the last token."""
    req.num_computed_tokens = TOKENS - 1
    metadata = rig.step(new=[(req, blocks, TOKENS - 1, 1)])
    req.num_computed_tokens = TOKENS
    return metadata


def load(rig, req, blocks):
    assert rig.scheduler.matched_tokens(req, 0) == (TOKENS, True)
    rig.scheduler.allocated(req, (blocks,), TOKENS)
    rig.scheduler.reported((), [req.request_id])


def test_the_first_loads_and_the_others_copy_from_it(rig):
    first, second, third = children(3)
    assert rig.scheduler.matched_tokens(first, 0) == (TOKENS, True)
    rig.scheduler.allocated(first, ([1, 2, 3],), TOKENS)
    assert rig.scheduler.matched_tokens(second, 0) == (None, False), "its load is under way"
    assert len(rig.step().load_starts) == 1
    rig.scheduler.reported((), [first.request_id])
    assert rig.scheduler.matched_tokens(second, 0) == (None, False), "it does not run yet"
    assert not run(rig, first, [1, 2, 3]).copy_starts
    # Without a prefix cache the second request has nothing, and copies all blocks. The third request shares two blocks
    # with the first request, and copies one block.
    assert rig.scheduler.matched_tokens(second, 0) == (TOKENS, True)
    rig.scheduler.allocated(second, ([4, 5, 6],), TOKENS)
    assert rig.scheduler.matched_tokens(third, 32) == (TOKENS - 32, True)
    rig.scheduler.allocated(third, ([1, 2, 7],), TOKENS - 32)
    metadata = rig.step()
    assert metadata.copy_starts == [
        CopyStart(second.request_id, ([1, 2, 3],), ([4, 5, 6],)),
        CopyStart(third.request_id, ([3],), ([7],)),
    ]
    assert not metadata.load_starts
    rig.scheduler.reported((), [second.request_id, third.request_id])
    assert rig.scheduler.matched_tokens(second, 0) == (0, False)
    for req in (first, second, third):
        assert rig.scheduler.finished(req, ([],), completed=True) == (False, None)
    assert not rig.step().dismissed, "the load of the first is not given up for the others"
    assert rig.skipped() == {}
    assert rig.is_empty()


def test_blocks_that_are_no_longer_the_first_ones_are_not_copied(rig):
    first, second = children(2)
    load(rig, first, [1, 2, 3])
    run(rig, first, [1, 2, 3])
    first.status = SimpleNamespace(name="PREEMPTED")
    first.num_preemptions += 1
    rig.step()
    assert rig.scheduler.matched_tokens(second, 0) == (None, False)
    # vLLM has resumed the first request in this step. The connector learns the request's new blocks only at the step's
    # end.
    first.status = SimpleNamespace(name="RUNNING")
    assert rig.scheduler.matched_tokens(second, 0) == (None, False)
    run(rig, first, [7, 8, 9])
    assert rig.scheduler.matched_tokens(second, 0) == (TOKENS, True)
    rig.scheduler.allocated(second, ([4, 5, 6],), TOKENS)
    assert rig.step().copy_starts == [CopyStart(second.request_id, ([7, 8, 9],), ([4, 5, 6],))]


def test_a_prompt_that_the_first_still_computes_is_waited_for(rig):
    """The load of the first request has failed, so the engine computes its prompt."""
    first, second = children(2)
    load(rig, first, [1, 2, 3])
    rig.step(new=[(first, [4, 5], 0, 32)])
    first.num_computed_tokens = 32
    assert rig.scheduler.matched_tokens(second, 0) == (None, False)
    rig.step(cached=[(first.request_id, [6], 32, 8)])
    first.num_computed_tokens = TOKENS
    assert rig.scheduler.matched_tokens(second, 0) == (TOKENS, True)
    rig.scheduler.allocated(second, ([7, 8, 9],), TOKENS)
    assert rig.step().copy_starts == [CopyStart(second.request_id, ([4, 5, 6],), ([7, 8, 9],))]


def test_the_others_compute_once_the_first_is_gone(rig):
    first, second, third = children(3)
    load(rig, first, [1, 2, 3])
    assert rig.scheduler.matched_tokens(second, 0) == (None, False)
    rig.scheduler.finished(first, ([],), completed=False)
    assert rig.scheduler.matched_tokens(second, 0) == (0, False)
    assert rig.scheduler.matched_tokens(third, 0) == (0, False)
    assert rig.skipped() == {"duplicate": 1}


def test_an_abort_while_the_copy_is_under_way_waits_for_the_workers(rig):
    first, second = children(2)
    load(rig, first, [1, 2, 3])
    run(rig, first, [1, 2, 3])
    rig.scheduler.matched_tokens(second, 0)
    rig.scheduler.allocated(second, ([4, 5, 6],), TOKENS)
    assert rig.scheduler.finished(second, ([],), completed=False) == (False, None)
    metadata = rig.step()
    assert (len(metadata.copy_starts), metadata.aborted) == (1, []), "the worker reports each copy once"
    rig.scheduler.reported((), [second.request_id])
    rig.scheduler.finished(first, ([],), completed=True)
    assert rig.is_empty()


def test_other_prompts_are_not_copied(rig):
    first, _ = children(2)
    other = request("1_r-0-0123abcd", load_params(), tokens=TOKENS, prompt_token_ids=list(range(1, TOKENS + 1)))
    load(rig, first, [1, 2, 3])
    assert rig.scheduler.matched_tokens(other, 0) == (0, False)
    assert rig.skipped() == {"duplicate": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "shape",
    [(24, 2, 16, 16), (24, 2, 16, 2, 8), (2, 24, 16, 2, 8), (48, 2, 8, 16)],
    ids=["bhnc", "b2nhd", "2bnhd", "small"],
)
def test_whole_blocks_are_copied_in_every_layout(shape, dtype):
    tensors = {f"layers.{i}": torch.randint(0, 100, shape, dtype=torch.uint8).to(dtype) for i in range(2)}
    pages = geometry(tensors, Hint(num_blocks=24, block_tokens=16, kv_heads=2, head_size=8, mla=False))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    pages.copy_blocks([3, 20, 0], [7, 1, 23])
    for name, tensor in tensors.items():
        axis = 1 if shape[0] == 2 else 0
        now, old = (t.float().movedim(axis, 0).unflatten(0, (24, -1)) for t in (tensor, before[name]))
        assert torch.equal(now[[7, 1, 23]], old[[3, 20, 0]])
        rest = [block for block in range(24) if block not in (7, 1, 23)]
        assert torch.equal(now[rest], old[rest])


def test_a_worker_copies_before_the_step_computes_and_reports_once(tmp_path):
    rig = Workers(tmp_path)
    try:
        expect = rig.kv(TABLE, 0, 32)
        free = [block for block in range(BLOCKS) if block not in TABLE][: len(TABLE)]
        _, results = rig.step(copy_starts=[CopyStart("b", (TABLE,), (free,))])
        assert torch.equal(rig.kv(free, 0, 32), expect)
        assert expect.shape[1] == LAYERS
        assert (results.received, results.failed) == ({"b"}, {})
        assert rig.step()[1].received == set()
    finally:
        rig.worker.close()


RULES = (
    TableRule(16),
    TableRule(16, is_partial=True),
    TableRule(64, is_state=True, is_partial=True),
    TableRule(16, is_state=True, is_partial=True),
)


def test_each_group_is_copied_as_it_is_before_the_first_step():
    """The first sequence resumes at token 40. Its window begins in its second block, and its state with a prefix cache
    is in the block of token 39; the block of the next state follows.
    """
    sources = ([1, 2, 3], [0, 4, 5], [6], [0, 0, 7, 8])
    own = ([1, 12, 13], [0, 14, 15], [16], [0, 0, 17])
    assert blocks_to_copy(RULES, sources, own, 40) == (
        ([2, 3], [4, 5], [6], [7]),
        ([12, 13], [14, 15], [16], [17]),
    )


@pytest.mark.parametrize(
    "sources",
    [
        pytest.param(([1, 2, 3], [0, 0, 5], [6], [0, 0, 7]), id="a block has left the window"),
        pytest.param(([1, 2, 3], [0, 4, 5], [6], [0, 0, 0, 8]), id="the state is gone"),
        pytest.param(([1, 2], [0, 4, 5], [6], [0, 0, 7]), id="a block is missing"),
    ],
)
def test_what_the_first_sequence_lacks_is_not_copied(sources):
    assert blocks_to_copy(RULES, sources, ([11, 12, 13], [0, 14, 15], [16], [0, 0, 17]), 40) is None


def of_windows():
    tables = (TableRule(BLOCK), TableRule(BLOCK, is_partial=True))
    scheduler = Scheduler(replace(BOTH, tables=tables, has_prefix_cache=False), ChunkHasher("sha256_cbor", 32), Stats())
    scheduler.manager = SimpleNamespace(get_block_ids=lambda engine_id: ([1, 2, 3], [0, 4, 5]))
    return scheduler


def parked(scheduler):
    first, second = children(2)
    assert scheduler.matched_tokens(first, 0) == (TOKENS - 1, True)
    scheduler.allocated(first, ([1, 2, 3], [0, 4, 5]), TOKENS - 1)
    first.status, first.num_computed_tokens = SimpleNamespace(name="WAITING_FOR_REMOTE_KVS"), TOKENS - 1
    assert scheduler.matched_tokens(second, 0) == (None, False)
    scheduler.reported((), [first.request_id])
    assert scheduler.matched_tokens(second, 0) == (None, False)
    return first, second


def test_windows_are_copied_in_the_first_step_of_the_first_sequence():
    scheduler = of_windows()
    first, second = parked(scheduler)
    first.status = SimpleNamespace(name="RUNNING")
    assert scheduler.matched_tokens(second, 0) == (TOKENS - 1, True)
    scheduler.allocated(second, ([11, 12, 13], [0, 14, 15]), TOKENS - 1)
    copy = CopyStart(second.request_id, ([1, 2, 3], [4, 5]), ([11, 12, 13], [14, 15]))
    assert scheduler.step(output()).copy_starts == [copy]


def test_windows_are_not_copied_later():
    scheduler = of_windows()
    first, second = parked(scheduler)
    first.status, first.num_computed_tokens = SimpleNamespace(name="RUNNING"), TOKENS
    assert scheduler.matched_tokens(second, 0) == (0, False)


def test_windows_are_not_copied_from_a_request_whose_load_failed():
    scheduler = of_windows()
    first, second = parked(scheduler)
    first.status, first.num_computed_tokens = SimpleNamespace(name="WAITING"), 0
    assert scheduler.matched_tokens(second, 0) == (0, False)


def test_a_copy_without_a_block_fails():
    scheduler = of_windows()
    first, second = parked(scheduler)
    first.status = SimpleNamespace(name="RUNNING")
    assert scheduler.matched_tokens(second, 0) == (TOKENS - 1, True)
    scheduler.manager = SimpleNamespace(get_block_ids=lambda engine_id: ([1, 2, 3], [0, 0, 5]))
    scheduler.allocated(second, ([11, 12, 13], [0, 14, 15]), TOKENS - 1)
    assert [copy.is_possible for copy in scheduler.step(output()).copy_starts] == [False]
