"""Requests and parameters that the scheduler's half refuses, each with its reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_scheduler import BOTH, Rig, image, load_params, push_params, request

from pd_sidecar.scheduler.states import Role


@pytest.fixture
def rig():
    return Rig()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"mm_features": [image("renderer0-mm-1-image-0", 0, 4)]}, "multimodal"),
        ({"mm_features": [image("f00d", 0, 4), image("adapter:renderer12-mm-7-video-3", 9, 4)]}, "multimodal"),
        ({"mm_features": [image("cmpl-x-0-0123abcd-image-0", 0, 4)]}, "multimodal"),
        ({"prompt_embeds": object()}, "prompt_embeds"),
        ({"prompt_token_ids": None}, "prompt_embeds"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=0)}, "prompt_logprobs"),
        ({"skip_reading_prefix_cache": True}, "prompt_logprobs"),
        ({"sampling_params": None}, "pooling"),
        ({"pooling_params": object()}, "pooling"),
        ({"resumable": True}, "streaming_input"),
    ],
)
@pytest.mark.parametrize("params", [push_params(), load_params()])
def test_requests_that_are_not_served(rig, more, reason, params):
    req = request("a", params, **more)
    assert rig.scheduler.matched_tokens(req, 0) == (0, False)
    assert rig.skipped() == {reason: 1}
    metadata = rig.step(new=[(req, [1, 2, 3], 0, 40)])
    assert not metadata.push_starts
    assert metadata.dismissed == (["r"] if "do_remote_prefill" in params else [])
    delay, response = rig.scheduler.finished(req, ([1, 2, 3],), completed=True)
    assert (delay, response) == (False, {"pushed": False, "reason": reason})
    assert rig.is_empty()


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (None, "no_params"),
        ({}, "no_params"),
        ({"foo": 1}, "no_params"),
        ([1], "no_params"),
        ({"do_remote_prefill": True}, "bad_params"),
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": 3}}, "bad_params"),
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": ""}}, "bad_params"),
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": "x" * 1000}}, "bad_params"),
        # A sidecar does not accept these texts: it would end the engine's connection.
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": "a\n"}}, "bad_params"),
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": "a\x85"}}, "bad_params"),
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": "a\ud800"}}, "bad_params"),
        (push_params(receiver_host="d\0"), "bad_params"),
        (push_params(receiver_host="d" * 5000), "bad_params"),
        ({**push_params(), "do_remote_prefill": True}, "bad_params"),
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": "r", "tokens": -1}}, "bad_params"),
        ({"do_remote_prefill": True, "disagg_spec": {"req_id": "r", "tokens": "3"}}, "bad_params"),
        (push_params(receiver_host=""), "bad_params"),
        (push_params(receiver_host=None), "bad_params"),
        (push_params(receiver_init_port=[]), "bad_params"),
        (push_params(receiver_init_port=["7300"]), "bad_params"),
        (push_params(receiver_init_port=[0]), "bad_params"),
        (push_params(receiver_init_port=[True]), "bad_params"),
        (push_params(receiver_alloc_port=[7400, 7401]), "bad_params"),
        (push_params(overlap="yes"), "bad_params"),
        (push_params(ports=2), "tp_mismatch"),
    ],
)
def test_parameters_that_make_no_sense(rig, params, reason):
    req = request("a", params)
    assert rig.scheduler.matched_tokens(req, 0) == (0, False)
    assert rig.skipped() == {reason: 1}


@pytest.mark.parametrize(
    ("role", "params", "reason"),
    [
        (Role(True, False, 1, BOTH.tables), load_params(), "wrong_role"),
        (Role(False, True, 1, BOTH.tables), push_params(), "wrong_role"),
    ],
)
def test_engines_that_do_not_serve(role, params, reason):
    rig = Rig(role)
    assert rig.scheduler.matched_tokens(request("a", params), 0) == (0, False)
    assert rig.skipped() == {reason: 1}
