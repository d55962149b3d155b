"""Tests the scheduler's half for models with windows beside full attention."""

from __future__ import annotations

import pytest
from test_scheduler import BLOCK, Rig, load_params, push_params, request

from pd_sidecar.scheduler.states import Role
from pd_sidecar.scheduler.tables import TableRule

# Without a prefix cache the scheduler needs none of vLLM's managers.
WINDOWS = Role(
    producer=True,
    consumer=True,
    ranks=1,
    tables=(TableRule(BLOCK), TableRule(BLOCK, is_partial=True)),
    has_prefix_cache=False,
)


def test_a_window_is_prefilled_up_to_the_token_that_the_decode_side_computes():
    rig = Rig(WINDOWS)
    req = request("a", push_params(), _all_token_ids=list(range(40)), max_tokens=9)
    rig.scheduler.arrived(req)
    assert (req.num_prompt_tokens, req.prompt_token_ids, req.max_tokens) == (39, list(range(39)), 1)
    assert req._all_token_ids == req.prompt_token_ids
    # A second look, for example after a preemption, cuts nothing.
    rig.scheduler.arrived(req)
    assert req.num_prompt_tokens == 39


def test_with_the_first_token_from_prefill_nothing_is_cut():
    rig = Rig(WINDOWS)
    req = request("a", push_params() | {"ret_first_tok": True}, _all_token_ids=list(range(40)), max_tokens=1)
    rig.scheduler.arrived(req)
    assert req.num_prompt_tokens == 40


@pytest.mark.parametrize(("tokens", "spec", "resumed"), [(40, {}, 39), (41, {"tokens": 40}, 40)])
def test_a_window_is_loaded_up_to_the_token_that_is_computed_next(tokens, spec, resumed):
    rig = Rig(WINDOWS)
    req = request("a", load_params(**spec), tokens=tokens)
    assert rig.scheduler.matched_tokens(req, 16) == (resumed - 16, True)
    rig.scheduler.allocated(req, ([4, 5, 6], [0, 8, 9]), resumed - 16)
    (start,) = rig.step().load_starts
    assert (start.tokens, start.load_tokens, start.tables) == (resumed, resumed, ([4, 5, 6], [0, 8, 9]))


def test_one_token_leaves_nothing_to_hand_over():
    rig = Rig(WINDOWS)
    rig.scheduler.arrived(request("a", push_params(), tokens=1))
    assert rig.skipped() == {"nothing_to_load": 1}
