"""Requests of all kinds: clients that leave, several choices, chats, and those that must not be transferred."""

from __future__ import annotations

import time
from typing import Any

import pytest
from harness.client import HttpError, Stream, post_json
from harness.engine import Engine
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference


def skipped(engine: Engine) -> dict[str, float]:
    """Requests that its connector left alone, by reason."""
    return engine.metrics().by("vllm:pd_sidecar_skipped", "reason")


def body(tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt": tokens, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}


def token_ids(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


# A prompt of 1500 tokens takes 300 to 400 ms of prefill here, hand-over and first token about 50 ms more, and the
# answer seconds: these fall into every phase.
@pytest.mark.parametrize("after_ms", [0, 5, 20, 50, 100, 200, 300, 350, 400, 450, 500, 700])
def test_client_leaves_after(pair: Pair, after_ms: int) -> None:
    tokens = prompt(1500, seed=500 + after_ms)
    try:
        with Stream(
            f"{pair.proxy.url}/v1/completions",
            body(tokens, stream=True, max_tokens=500),
            timeout_s=max(after_ms / 1000, 0.001),
        ):
            time.sleep(after_ms / 1000)
    except TimeoutError:
        pass  # no head of an answer yet: the connection is closed all the same
    pair.wait_empty(10.0)


def test_client_leaves_within_the_answer(pair: Pair, reference: Reference) -> None:
    tokens = prompt(600, seed=51)
    with Stream(f"{pair.proxy.url}/v1/completions", body(tokens, stream=True, max_tokens=1000)) as stream:
        for count, _ in enumerate(stream):
            if count == 5:
                break
    left = time.monotonic()
    pair.wait_empty(10.0)
    # A thousand tokens take longer: the engine was told.
    assert time.monotonic() - left < 3.0
    assert pair.proxy.records()[-1]["outcome"] == "client_left"
    again = prompt(600, seed=52)
    pair.move(again).check(reference.token_ids(again), len(again))


def test_two_choices(pair: Pair, reference: Reference) -> None:
    request = body(prompt(400, seed=53), n=2, temperature=0)
    ours = post_json(f"{pair.proxy.url}/v1/completions", request)
    assert token_ids(ours) == token_ids(reference.post("/v1/completions", request))


def test_list_of_prompts(pair: Pair, reference: Reference) -> None:
    prompts = [prompt(length, seed=54) for length in (30, 400, 900)]
    request = {**body([]), "prompt": prompts}
    ours = post_json(f"{pair.proxy.url}/v1/completions", request)
    assert token_ids(ours) == [reference.token_ids(tokens, max_tokens=16) for tokens in prompts]


def test_prompt_logprobs(pair: Pair, reference: Reference) -> None:
    before = skipped(pair.decode)
    request = body(prompt(400, seed=55), prompt_logprobs=1)
    ours = post_json(f"{pair.proxy.url}/v1/completions", request)["choices"][0]
    plain = reference.post("/v1/completions", request)["choices"][0]
    assert ours["token_ids"] == plain["token_ids"]
    assert len(ours["prompt_logprobs"]) == len(plain["prompt_logprobs"]) == 400
    for mine, theirs in zip(ours["prompt_logprobs"][1:], plain["prompt_logprobs"][1:], strict=True):
        assert mine.keys() == theirs.keys()
        for token in mine:
            assert mine[token]["logprob"] == pytest.approx(theirs[token]["logprob"], abs=1e-3)
    assert skipped(pair.decode).get("prompt_logprobs", 0) == before.get("prompt_logprobs", 0) + 1


@pytest.mark.parametrize(("reason", "more"), [("lora", {"model": "lora"}), ("cache_salt", {"cache_salt": "mine"})])
def test_equal_tokens_other_kv(pair: Pair, reference: Reference, reason: str, more: dict[str, Any]) -> None:
    """KV of the same tokens exists on both sides, but it is not the KV of this request."""
    tokens = prompt(600, seed=56)
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))
    before = skipped(pair.decode)
    request = body(tokens, **more)
    ours = post_json(f"{pair.proxy.url}/v1/completions", request)
    assert token_ids(ours) == token_ids(reference.post("/v1/completions", request))
    assert skipped(pair.decode).get(reason, 0) == before.get(reason, 0) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_chat(pair: Pair, reference: Reference, stream: bool) -> None:
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": "Say something about prefill and decode. " * 20}],
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
    }
    before = pair.decode.prompt_tokens()
    plain = reference.post("/v1/chat/completions", request)
    if stream:
        with Stream(f"{pair.proxy.url}/v1/chat/completions", {**request, "stream": True}) as events:
            text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    else:
        text = post_json(f"{pair.proxy.url}/v1/chat/completions", request)["choices"][0]["message"]["content"]
    assert text == plain["choices"][0]["message"]["content"]
    prompt_tokens = plain["usage"]["prompt_tokens"]
    tokens = pair.prompt_tokens_since(before, prompt_tokens)
    assert tokens.external >= prompt_tokens - 1
    assert tokens.computed <= 1


def test_bad_requests_keep_their_status(pair: Pair) -> None:
    """What the engine refuses is refused with its status and its words."""
    for wrong in ({"max_tokens": -1}, {"model": "nobody"}, {"prompt": prompt(3000, seed=57)}):
        with pytest.raises(HttpError) as refused:
            post_json(f"{pair.proxy.url}/v1/completions", {**body(prompt(10, seed=58)), **wrong})
        assert 400 <= refused.value.status < 500
        assert "error" in refused.value.body
