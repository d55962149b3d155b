"""Tests the scheduler's half with vLLM's calls, in vLLM's order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pd_sidecar.kv.keys import ChunkHasher
from pd_sidecar.scheduler.eligibility import Skip, transfer
from pd_sidecar.scheduler.metadata import PushStep
from pd_sidecar.scheduler.scheduler import Scheduler
from pd_sidecar.scheduler.states import Role
from pd_sidecar.scheduler.stats import Stats
from pd_sidecar.scheduler.tables import TableRule

BLOCK = 16
BOTH = Role(producer=True, consumer=True, ranks=1, tables=(TableRule(BLOCK),))


def request(name, params=None, tokens=40, **more):
    values = {
        "request_id": name,
        "kv_transfer_params": params,
        "prompt_token_ids": list(range(tokens)),
        "num_prompt_tokens": tokens,
        "prompt_embeds": None,
        "lora_request": None,
        "mm_features": [],
        "cache_salt": None,
        "pooling_params": None,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "skip_reading_prefix_cache": False,
        "resumable": False,
        "status": SimpleNamespace(name="WAITING"),
        "num_computed_tokens": 0,
        "num_preemptions": 0,
        **more,
    }
    return SimpleNamespace(**values)


def push_params(req="r", ports=1, **more):
    spec = {
        "req_id": req,
        "receiver_host": "h",
        "receiver_init_port": [7300 + i for i in range(ports)],
        "receiver_alloc_port": [7400 + i for i in range(ports)],
        **more,
    }
    return {"do_remote_decode": True, "disagg_spec": spec}


def load_params(req="r", **more):
    return {"do_remote_prefill": True, "disagg_spec": {"req_id": req, **more}}


def output(new=(), cached=(), resumed=()):
    """Returns a step's output. Each entry of `new` is (request, blocks, computed, scheduled). Each entry of `cached`
    has the request's id in place of the request.
    """
    scheduled = {r.request_id: n for r, _, _, n in new} | {name: n for name, _, _, n in cached}
    for r, _, _, _ in new:
        r.status = SimpleNamespace(name="RUNNING")
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r.request_id, block_ids=(blocks,), num_computed_tokens=computed)
            for r, blocks, computed, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, *_ in cached],
            new_block_ids=[None if blocks is None else (blocks,) for _, blocks, _, _ in cached],
            num_computed_tokens=[computed for _, _, computed, _ in cached],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
    )


def image(identifier, offset, length):
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


class Rig:
    def __init__(self, role=BOTH, adapters=None):
        self.stats = Stats()
        self.scheduler = Scheduler(role, ChunkHasher("sha256_cbor", 32, {}), self.stats, adapters)

    def step(self, **more):
        return self.scheduler.step(output(**more))

    def skipped(self):
        return self.stats.data.get("skipped", {})

    def is_empty(self):
        return not self.scheduler._states and not self.scheduler.has_work


@pytest.fixture
def rig():
    return Rig()


def park(rig, req, computed=0, blocks=(4, 5, 6)):
    count, is_async = rig.scheduler.matched_tokens(req, computed)
    assert (count, is_async) == (req.num_prompt_tokens - computed, True)
    rig.scheduler.allocated(req, (list(blocks),), count)
    return rig.step()


def test_a_prompt_in_parts_is_announced_once_and_followed(rig):
    req = request("a", push_params(overlap=True))
    assert rig.scheduler.matched_tokens(req, 0) == (0, False)
    rig.scheduler.allocated(req, ([1],), 0)
    first = rig.step(new=[(req, [1], 0, 16)])
    (start,) = first.push_starts
    assert (start.req, start.tokens, start.overlap, len(start.hashes)) == ("r", 40, True, 2)
    assert first.push_steps == [PushStep("a", ([1],), True, 16)]
    second = rig.step(cached=[("a", [2], 16, 16)])
    assert second.push_steps == [PushStep("a", ([2],), False, 32)]
    third = rig.step(cached=[("a", [3], 32, 8)])
    assert third.push_steps == [PushStep("a", ([3],), False, 40)]
    # The workers need no message about tokens that the engine generates.
    assert not rig.step(cached=[("a", None, 40, 1)]).has_news


def push(rig, name, params):
    """Runs a prefill leg to its end. Returns the message of its first step, and the response's parameters."""
    req = request(name, params, output_token_ids=[7])
    rig.scheduler.matched_tokens(req, 0)
    metadata = rig.step(new=[(req, [1, 2, 3], 0, 40)])
    delay, response = rig.scheduler.finished(req, ([1, 2, 3],), completed=True)
    if delay:
        rig.step()
        rig.scheduler.reported([name], [])
    return metadata, response


def test_an_id_that_comes_again_is_pushed_again(rig):
    params = push_params("1") | {"ret_first_tok": True}
    for name in ("cmpl-aa-0-11111111", "cmpl-bb-0-22222222"):
        metadata, response = push(rig, name, params)
        assert [start.req for start in metadata.push_starts] == ["1"], response
        assert response == {"pushed": True, "req_id": "1", "first_tok": 7}
    # The second prompt of a list is a transfer of its own.
    metadata, response = push(rig, "cmpl-bb-1-33333333", params)
    assert [start.req for start in metadata.push_starts] == ["1/1"]
    assert response == {"pushed": True, "req_id": "1/1", "first_tok": 7}
    assert rig.is_empty()


def test_the_first_token_and_the_word_come_though_nothing_is_pushed(rig):
    params = push_params("1", ports=2) | {"ret_first_tok": True}
    metadata, response = push(rig, "a", params)
    assert response == {"pushed": False, "reason": "tp_mismatch", "first_tok": 7}
    assert [(start.req, start.alloc_ports) for start in metadata.unpushed] == [("1", (7400, 7401))]
    assert rig.is_empty()


def test_a_local_prefix_hit_is_saved_too(rig):
    req = request("a", push_params())
    metadata = rig.step(new=[(req, [9, 8, 7], 32, 8)]) if rig.scheduler.matched_tokens(req, 32) else None
    assert metadata.push_steps == [PushStep("a", ([9, 8, 7],), True, 40)]


def test_blocks_of_a_finished_push_wait_for_the_workers(rig):
    req = request("a", push_params())
    rig.scheduler.matched_tokens(req, 0)
    rig.step(new=[(req, [1, 2, 3], 0, 40)])
    delay, params = rig.scheduler.finished(req, ([1, 2, 3],), completed=True)
    assert delay
    assert params == {"pushed": True, "req_id": "r"}
    assert rig.scheduler.has_work
    metadata = rig.step()
    assert metadata.finished == ["a"]
    assert metadata.idle
    assert rig.scheduler.has_work  # An engine without requests must continue to step.
    rig.scheduler.reported({"a"}, set())
    assert rig.is_empty()


@pytest.mark.parametrize("blocks", [[1, 2, 3], []])
def test_an_aborted_push_is_cancelled_and_not_waited_for(rig, blocks):
    req = request("a", push_params())
    rig.scheduler.matched_tokens(req, 0)
    rig.step(new=[(req, [1, 2], 0, 32)])
    assert rig.scheduler.finished(req, (blocks,), completed=False) == (False, None)
    assert rig.scheduler.has_work
    assert rig.step().cancelled == ["a"]
    assert rig.is_empty()


def test_a_push_that_finished_without_its_blocks_is_cancelled(rig):
    req = request("a", push_params())
    rig.scheduler.matched_tokens(req, 0)
    rig.step(new=[(req, [1, 2, 3], 0, 40)])
    assert rig.scheduler.finished(req, ([],), completed=True) == (False, None)
    assert rig.step().cancelled == ["a"]


def test_a_push_that_never_ran_leaves_nothing(rig):
    req = request("a", push_params())
    rig.scheduler.matched_tokens(req, 0)
    assert rig.scheduler.finished(req, ([],), completed=False) == (False, None)
    assert rig.is_empty()


@pytest.mark.parametrize(("held", "loaded"), [(0, 32), (16, 16), (32, 0)])
def test_the_first_token_is_not_loaded(rig, held, loaded):
    """Loads 32 of 33 tokens. The prefill side has sampled the last token, so the decode side computes its KV."""
    req = request("a", load_params(tokens=32), tokens=33)
    assert rig.scheduler.matched_tokens(req, held) == (loaded, loaded > 0)
    if loaded:
        rig.scheduler.allocated(req, ([1, 2, 3],), loaded)
        (start,) = rig.step().load_starts
        assert (start.tokens, start.have_tokens, start.load_tokens) == (32, held, 32)
        whole = request("b", push_params("s"), tokens=32)
        rig.scheduler.matched_tokens(whole, 0)
        (push,) = rig.step(new=[(whole, [1, 2], 0, 32)]).push_starts
        assert start.hashes == push.hashes


@pytest.mark.parametrize("newer_runner", [False, True])
def test_a_preempted_push_gets_a_new_table(rig, newer_runner):
    req = request("a", push_params())
    rig.scheduler.matched_tokens(req, 0)
    rig.step(new=[(req, [1, 2, 3], 0, 40)])
    req.status = SimpleNamespace(name="PREEMPTED")
    assert rig.step().preempted == ["a"]
    assert rig.step().preempted == []
    rig.scheduler.matched_tokens(req, 16)
    if newer_runner:
        metadata = rig.step(new=[(req, [7, 8, 9], 16, 24)])
    else:
        req.status = SimpleNamespace(name="RUNNING")
        metadata = rig.step(cached=[("a", [7, 8, 9], 16, 24)], resumed=["a"])
    assert metadata.push_steps == [PushStep("a", ([7, 8, 9],), True, 40)]
    assert metadata.push_starts == []


def test_a_table_that_vllm_appends_to_later_stays_as_it_was(rig):
    req, blocks = request("a", push_params()), [1, 2, 3]
    rig.scheduler.matched_tokens(req, 0)
    metadata = rig.step(new=[(req, blocks, 0, 40)])
    # vLLM's model runner, which may be in this process, appends to the lists of the scheduler's output.
    blocks.append(4)
    assert metadata.push_steps[0].tables == ([1, 2, 3],)


def test_preempted_and_resumed_in_one_step_gets_a_new_table(rig):
    req = request("a", push_params())
    rig.scheduler.matched_tokens(req, 0)
    rig.step(new=[(req, [1, 2, 3], 0, 40)])
    metadata = rig.step(cached=[("a", [7, 8, 9], 0, 40)], resumed=["a"])
    assert metadata.push_steps == [PushStep("a", ([7, 8, 9],), True, 40)]


def test_a_load_is_parked_with_its_blocks(rig):
    req = request("a", load_params())
    metadata = park(rig, req, computed=16)
    (start,) = metadata.load_starts
    assert (start.engine_id, start.req, start.tokens) == ("a", "r", 40)
    assert (start.have_tokens, start.load_tokens, start.tables) == (16, 40, ([4, 5, 6],))
    assert len(start.hashes) == 2


def test_asked_again_after_a_load_there_is_nothing_more(rig):
    req = request("a", load_params(), tokens=1)
    park(rig, req, blocks=[4])
    rig.scheduler.reported(set(), {"a"})
    # vLLM sets the computed count to 0 after the load of a 1-token prompt, and after a failed load.
    assert rig.scheduler.matched_tokens(req, 0) == (0, False)
    rig.scheduler.allocated(req, ([4],), 0)
    assert not rig.step().has_news
    assert rig.scheduler.finished(req, ([4],), completed=True) == (False, None)
    assert rig.is_empty()


def test_asking_has_no_effect(rig):
    req = request("a", load_params())
    for computed in (0, 16, 0):
        assert rig.scheduler.matched_tokens(req, computed) == (40 - computed, True)
    assert not rig.step().has_news
    assert park(rig, req, computed=32).load_starts[0].have_tokens == 32


def test_a_load_that_the_engine_declines_is_dismissed(rig):
    req = request("a", load_params())
    rig.scheduler.matched_tokens(req, 0)
    rig.scheduler.allocated(req, ([1],), 0)
    assert rig.step().dismissed == ["r"]
    assert rig.skipped() == {"nothing_to_load": 1}


def test_an_aborted_load_is_gone_when_the_workers_say_so(rig):
    req = request("a", load_params())
    park(rig, req)
    assert rig.scheduler.finished(req, ([4, 5, 6],), completed=False) == (False, None)
    assert rig.step().aborted == ["a"]
    rig.scheduler.reported(set(), {"a"})
    assert rig.is_empty()


def test_a_load_that_is_rejected_before_it_is_asked_about_is_dismissed(rig):
    req = request("a", load_params())
    assert rig.scheduler.finished(req, ([],), completed=False) == (False, None)
    assert rig.scheduler.has_work
    assert rig.step().dismissed == ["r"]
    assert rig.is_empty()
    assert rig.skipped() == {}


def test_a_notice_of_rejection_does_not_end_a_request_that_is_parked(rig):
    park(rig, request("a", load_params()))
    notice = request("b", load_params(), tokens=1, abort_immediately=True)
    rig.scheduler.finished(notice, ([],), completed=False)
    assert not rig.step().has_news
    assert rig.skipped() == {}


@pytest.mark.parametrize(
    ("engine_id", "req"),
    [
        # Ids of vLLM with and without its random digits, and with a client's id that looks like one of vLLM's.
        ("cmpl-x-0-0123abcd", "r"),
        ("cmpl-x-0", "r"),
        ("cmpl-x-1-12345678", "r/1"),
        ("cmpl-x-12-0123abcd", "r/12"),
        ("2_cmpl-x-12-0123abcd", "r/12"),
        ("cmpl-x-7-12345678-0-0123abcd", "r"),
        ("cmpl-x-7-12345678-3", "r/3"),
        ("cmpl-0b5f2b1e-7a43-4c5e-9d1e-123456789012-2-87654321", "r/2"),
        # The other endpoints have no lists. Their ids can end like those of a list.
        ("chatcmpl-x-12345678", "r"),
        ("chatcmpl-x-7-12345678", "r"),
        ("a", "r"),
    ],
)
def test_each_prompt_of_a_list_is_a_transfer_of_its_own(engine_id, req):
    for params in (push_params(), load_params()):
        assert transfer(params, engine_id).req == req
    long = load_params("r" * 256)
    assert isinstance(transfer(long, engine_id), Skip) == (req != "r"), "a sidecar accepts no longer id"


def test_prompts_of_a_list_load_at_the_same_time(rig):
    prompts = [request(f"cmpl-x-{i}-0123abcd", load_params(), tokens=40) for i in range(3)]
    starts = [start.req for req in prompts for start in park(rig, req).load_starts]
    assert starts == ["r", "r/1", "r/2"]
    assert rig.skipped() == {}


@pytest.mark.parametrize("params", [push_params(), load_params()])
def test_the_first_of_several_engine_requests_has_the_transfer(rig, params):
    first, second, late = (request(f"r-{i}", params, tokens=40 + i) for i in range(3))
    for req in (first, second):
        rig.scheduler.matched_tokens(req, 0)
    assert rig.skipped() == {"duplicate": 1}
    rig.scheduler.finished(first, ([],), completed=False)
    rig.scheduler.matched_tokens(late, 0)
    assert rig.skipped() == {"duplicate": 2}
    rig.step()
    delay, response = rig.scheduler.finished(late, ([],), completed=True)
    assert (delay, response) == (False, {"pushed": False, "reason": "duplicate"})
    assert "r" not in rig.step().dismissed


def keys_of(params, **more):
    """Returns the hashes and tags of the pushes and loads of one request."""
    rig = Rig()
    req = request("a", params, **more)
    rig.scheduler.matched_tokens(req, 0)
    if "do_remote_decode" in params:
        (start,) = rig.step(new=[(req, [1, 2, 3], 0, 40)]).push_starts
    else:
        rig.scheduler.allocated(req, ([1, 2, 3],), 39)
        (start,) = rig.step().load_starts
    assert rig.skipped() == {}
    return list(zip(start.hashes, start.tags or [""] * 2, strict=True))


def test_a_salt_is_in_each_key_and_both_sides_compute_the_same():
    plain, mine = keys_of(push_params()), keys_of(push_params(), cache_salt="mine")
    assert [tag for _, tag in plain] == ["", ""]
    assert [value for value, _ in mine] == [value for value, _ in plain]
    assert mine == keys_of(load_params(), cache_salt="mine")
    assert len({tag for _, tag in mine}) == 1
    assert not {*mine} & {*keys_of(load_params(), cache_salt="yours")}
    assert "mine" not in str(mine)


def test_images_are_in_the_keys_of_the_chunks_from_their_first_token_on():
    """A chunk has 32 tokens, the prompt 40."""
    plain = keys_of(push_params())
    one, both = [image("a", 4, 8)], [image("a", 4, 8), image("b", 33, 4)]
    pushed = keys_of(push_params(), mm_features=both)
    assert pushed == keys_of(load_params(), mm_features=both)
    assert pushed[0] == keys_of(load_params(), mm_features=one)[0] != plain[0]
    assert keys_of(load_params(), mm_features=both[1:])[0] == plain[0], "no image before the end of the chunk"
    others = [one, [image("b", 4, 8), both[1]], [image("a", 5, 8), both[1]], [image("a", 4, 7), both[1]]]
    assert len({keys_of(load_params(), mm_features=some)[1] for some in [both, *others]}) == 5
    salted = keys_of(load_params(), mm_features=one, cache_salt="mine")
    assert salted[0][1].startswith(keys_of(load_params(), cache_salt="mine")[0][1] + "@mm%")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"mm_features": [image("a", 0, 4)]}, "multimodal"),
        ({"lora_request": SimpleNamespace(lora_name="a")}, "lora"),
    ],
)
def test_kv_that_lmcache_wrote_is_not_loaded_for_a_tagged_request(more, reason):
    rig = Rig(adapters=SimpleNamespace(digest=lambda _: "00"))
    req = request("a", load_params(written=True), **more)
    assert rig.scheduler.matched_tokens(req, 0) == (0, False)
    assert rig.skipped() == {reason: 1}
    assert rig.step().dismissed == ["r"]
