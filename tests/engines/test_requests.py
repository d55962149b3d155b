"""Tests the kinds of requests: clients that leave, several choices, chats, and requests without a transfer."""

from __future__ import annotations

import time
from typing import Any

import pytest
from harness.client import HttpError, Stream, post_json
from harness.model import KV_BYTES_PER_TOKEN, write_lora
from harness.pair import Pair, check_tokens
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import ROOT


def body(tokens: list[int] | list[list[int]], **more: Any) -> dict[str, Any]:
    return {"prompt": tokens, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}


def token_ids(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


# Prefill of a prompt of 1500 tokens takes 300 to 400 ms on this machine, and the transfer and the first token take
# about 50 ms more. The answer takes seconds. So some of the times in `after_ms` are in each phase of a request.
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
        pass  # the answer's headers have not come yet; closing the connection ends the request in this case, too
    pair.wait_empty()


def test_client_leaves_within_the_answer(pair: Pair, reference: Reference) -> None:
    tokens = prompt(600, seed=51)
    generated = pair.decode.generated_tokens()
    with Stream(f"{pair.proxy.url}/v1/completions", body(tokens, stream=True, max_tokens=1000)) as stream:
        for count, _ in enumerate(stream):
            if count == 5:
                break
    pair.wait_empty()
    # The engine was told to stop before it had the complete answer of a thousand tokens.
    assert pair.decode.generated_tokens() - generated < 900
    assert pair.proxy.record(stream.headers["x-request-id"])["outcome"] == "client_left"
    again = prompt(600, seed=52)
    pair.move(again).check(reference.token_ids(again), len(again))


@pytest.mark.parametrize(
    ("reason", "more"),
    [("prompt_logprobs", {"prompt_logprobs": 1})],
)
def test_computed_by_the_decode_engine(pair: Pair, reference: Reference, reason: str, more: dict[str, Any]) -> None:
    """Sends requests for which the proxy sends no prefill leg. The proxy counts them by reason."""
    request = body(prompt(400, seed=53), **more)
    before = pair.proxy.metrics().by("pd_proxy_alone", "reason")
    received = pair.receiver.metrics().sum("pd_sidecar_requests")
    ours = post_json(f"{pair.proxy.url}/v1/completions", request)
    plain = reference.post("/v1/completions", request)
    assert token_ids(ours) == token_ids(plain)
    assert len(ours["choices"]) == len(plain["choices"])
    for mine, theirs in zip(ours["choices"], plain["choices"], strict=True):
        assert_same_logprobs(mine.get("prompt_logprobs"), theirs.get("prompt_logprobs"))
    after = pair.proxy.metrics().by("pd_proxy_alone", "reason")
    assert after.get(reason, 0) == before.get(reason, 0) + 1
    assert pair.receiver.metrics().sum("pd_sidecar_requests") == received


def assert_same_logprobs(mine: list[Any] | None, theirs: list[Any] | None) -> None:
    assert (mine is None) == (theirs is None)
    for ours, plain in zip(mine or [], theirs or [], strict=True):
        assert (ours or {}).keys() == (plain or {}).keys()
        for token in ours or {}:
            assert ours[token]["logprob"] == pytest.approx(plain[token]["logprob"], abs=1e-3)


@pytest.mark.parametrize(
    ("reason", "more"),
    [("prompt_logprobs", {"prompt_logprobs": 1})],
)
def test_not_loaded_by_the_connector(pair: Pair, reference: Reference, reason: str, more: dict[str, Any]) -> None:
    """Sends requests that a proxy may send by mistake: their KV differs from the KV of equal tokens, or must not be
    shared.
    """
    tokens = prompt(600, seed=56)
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))
    before = pair.decode.skipped()
    params = {"do_remote_prefill": True, "disagg_spec": {"req_id": f"nobody-{reason}"}}
    request = body(tokens, **more)
    ours = post_json(f"{pair.decode.url}/v1/completions", {**request, "kv_transfer_params": params})
    assert token_ids(ours) == token_ids(reference.post("/v1/completions", request))
    assert pair.decode.skipped().get(reason, 0) == before.get(reason, 0) + 1


def until_moved(pair: Pair, model: str, seed: int) -> None:
    """Sends requests until one is moved: the digest of an adapter's files is computed after its first request."""
    deadline = time.monotonic() + 60
    alone = "?"
    while alone is not None:
        assert time.monotonic() < deadline, f"still not moved: {alone}"
        answer = pair.complete(prompt(300, seed=seed), model=model, max_tokens=1)
        alone = pair.proxy.record(answer.headers["x-request-id"])["alone"]
        seed += 1


def test_lora_through_the_proxy(pair: Pair, reference: Reference) -> None:
    tokens = prompt(600, seed=59)
    base, adapted = reference.token_ids(tokens), reference.token_ids(tokens, model="lora")
    assert base != adapted, "the adapter changes nothing, and proves nothing"
    until_moved(pair, "lora", seed=5900)
    # The KV of the adapter and of the base model must not be mixed, in slots or in the decode engine's cache.
    models: list[tuple[dict[str, Any], list[int]]] = [({}, base), ({"model": "lora"}, adapted)]
    for more, expect in models:
        pair.move(tokens, **more).check(expect, len(tokens))
    for more, expect in models:
        pair.move(tokens, **more).check(expect, len(tokens), cached=len(tokens) // 64 * 64)


def test_an_adapter_with_other_weights_on_the_other_side_is_refused(pair: Pair, reference: Reference) -> None:
    """Uses one name for two sets of weights. The receiver then refuses the keys, and the decode engine computes the
    prompt itself.
    """
    decoders = (pair.decode, reference.engine)
    folders = [write_lora(ROOT / "target" / f"lora-llava-{seed}", seed) for seed in (2, 3)]
    pair.prefill.load_adapter("twin", folders[0])
    for engine in decoders:
        engine.load_adapter("twin", folders[1])
    try:
        refused = 0
        for number in range(200):
            tokens = prompt(600, seed=6300 + number)
            before = pair.decode.prompt_tokens()
            answer = pair.complete(tokens, model="twin")
            assert answer.token_ids == reference.token_ids(tokens, model="twin")
            assert pair.prompt_tokens_since(before, len(tokens)).computed == len(tokens)
            request_id = answer.headers["x-request-id"]
            record = pair.proxy.record(request_id)
            if record["alone"] == "refused_before":
                break
            if record["alone"] is None:
                assert pair.receiver.record(request_id)["reason"] == "key_mismatch"
                refused += 1
        # The first requests wait for the digests. After three refusals in a row the proxy sends no prefill leg.
        assert refused == 3, refused
        assert record["alone"] == "refused_before"
        tokens = prompt(600, seed=60)
        pair.move(tokens).check(reference.token_ids(tokens), len(tokens))
        tokens = prompt(600, seed=64)
        pair.move(tokens, model="lora").check(reference.token_ids(tokens, model="lora"), len(tokens))
    finally:
        for engine in (pair.prefill, *decoders):
            engine.unload_adapter("twin")


SEQUENCES = 3


def test_sequences_of_one_prompt_share_one_copy(pair: Pair, reference: Reference) -> None:
    tokens = prompt(600, seed=65)
    # The decode engine's blocks have 64 tokens. The sequences share the whole blocks, and copy the last part.
    shared = len(tokens) // 64 * 64
    copied = pair.decode.metrics().sum("vllm:pd_sidecar_copied_tokens")
    check_sequences(pair, reference, tokens, cached=(SEQUENCES - 1) * shared)
    copied = pair.decode.metrics().sum("vllm:pd_sidecar_copied_tokens") - copied
    assert copied == (SEQUENCES - 1) * (len(tokens) - shared)


def check_sequences(pair: Pair, reference: Reference, tokens: list[int], *, cached: int) -> None:
    """Asks for several sequences, and checks that the KV was moved once and that no sequence computed the prompt."""
    request = body(tokens, n=SEQUENCES, temperature=1.0, seed=5)
    before = pair.decode.prompt_tokens()
    with pair.proxy.recorded() as records:
        ours = post_json(f"{pair.proxy.url}/v1/completions", request)
    expect = token_ids(reference.post("/v1/completions", request))
    assert len({tuple(ids) for ids in expect}) == SEQUENCES, "equal sequences prove nothing"
    assert token_ids(ours) == expect
    (routed,) = records
    assert routed["alone"] is None, routed
    total = SEQUENCES * len(tokens)
    check_tokens(pair.prompt_tokens_since(before, total), total, cached=cached, requests=SEQUENCES)
    for sidecar in (pair.sender, pair.receiver):
        record = sidecar.record(routed["id"])
        assert (record["reason"], record["bytes"]) == (None, len(tokens) * KV_BYTES_PER_TOKEN), record


# Below and above a block, and several chunks. The longest prompt takes several steps of the prefill engine.
LIST_LENGTHS = (30, 900, 1, 257, 65)


@pytest.mark.parametrize("sequences", [1, 2])
def test_each_prompt_of_a_list_is_moved(pair: Pair, reference: Reference, sequences: int) -> None:
    prompts = [prompt(length, seed=540 + sequences) for length in LIST_LENGTHS]
    before = pair.decode.prompt_tokens()
    request = body(prompts, n=sequences, temperature=0 if sequences == 1 else 1.0, seed=5)
    with pair.proxy.recorded() as records:
        ours = post_json(f"{pair.proxy.url}/v1/completions", request)
    # One prompt at a time, because requests in one batch can change each other's rounding errors.
    expect = [
        ids for tokens in prompts for ids in token_ids(reference.post("/v1/completions", request | {"prompt": tokens}))
    ]
    assert token_ids(ours) == expect
    assert len({tuple(ids) for ids in expect}) == len(expect), "equal answers prove nothing"
    assert ours["usage"]["prompt_tokens"] == sum(LIST_LENGTHS)
    (routed,) = records
    assert routed["alone"] is None, routed
    # With several sequences, the later ones find the whole blocks of the first in the decode engine's cache.
    cached = (sequences - 1) * sum(length // 64 * 64 for length in LIST_LENGTHS)
    total = sequences * sum(LIST_LENGTHS)
    check_tokens(pair.prompt_tokens_since(before, total), total, cached=cached, requests=len(expect))
    for number, length in enumerate(LIST_LENGTHS):
        req = f"{routed['id']}/{number}" if number else routed["id"]
        for sidecar in (pair.sender, pair.receiver):
            record = sidecar.record(req)
            assert (record["reason"], record["bytes"]) == (None, length * KV_BYTES_PER_TOKEN), record


def test_a_streamed_list_of_texts(pair: Pair, reference: Reference) -> None:
    texts = ["Once upon a time. " * 30, "import os\n" * 7, "x"]
    request = {"model": "m", "prompt": texts, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    plain = [reference.post("/v1/completions", {**request, "prompt": text}) for text in texts]
    before = pair.decode.prompt_tokens()
    ours = [""] * len(texts)
    with Stream(f"{pair.proxy.url}/v1/completions", {**request, "stream": True}) as events:
        for event in events:
            for choice in event["choices"]:
                ours[choice["index"]] += choice["text"]
    assert ours == [answer["choices"][0]["text"] for answer in plain]
    total = sum(answer["usage"]["prompt_tokens"] for answer in plain)
    check_tokens(pair.prompt_tokens_since(before, total), total, requests=len(texts))


@pytest.mark.parametrize("wrong", [[], prompt(3000, seed=57)])
def test_a_list_with_one_wrong_prompt_is_refused(pair: Pair, reference: Reference, wrong: list[int]) -> None:
    request = body([prompt(100, seed=58), wrong, prompt(300, seed=59)])
    with pytest.raises(HttpError) as plain:
        reference.post("/v1/completions", request)
    with pytest.raises(HttpError) as ours:
        post_json(f"{pair.proxy.url}/v1/completions", request)
    assert (ours.value.status, ours.value.body) == (plain.value.status, plain.value.body)


def leave(pair: Pair, request: dict[str, Any], events: int) -> None:
    """Sends a streamed request, and ends the connection after this number of events. Returns when nothing is held."""
    with Stream(f"{pair.proxy.url}/v1/completions", request) as stream:
        for count, _ in enumerate(stream, 1):
            if count >= events:
                break
    pair.wait_empty()


@pytest.mark.parametrize("events", [0, 1, 20])
def test_client_of_a_list_leaves(pair: Pair, reference: Reference, events: int) -> None:
    prompts = [prompt(length, seed=680 + events) for length in (900, 300, 600)]
    leave(pair, body(prompts, stream=True, max_tokens=200), events)
    tokens = prompt(600, seed=690 + events)
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))


@pytest.mark.parametrize("events", [0, 1, 20])
def test_client_of_several_sequences_leaves(pair: Pair, reference: Reference, events: int) -> None:
    request = body(prompt(900, seed=660 + events), n=SEQUENCES, stream=True, max_tokens=200, temperature=1.0)
    leave(pair, request, events)
    tokens = prompt(600, seed=67 + events)
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))


def test_salted_requests_are_moved_and_share_nothing(pair: Pair, reference: Reference) -> None:
    """Sends the same prompt three times: without a salt, and with each of two salts. The KV of each request is moved in
    full, and is reused only under the same salt.
    """
    tokens = prompt(600, seed=61)
    expect = reference.token_ids(tokens)
    salts: list[dict[str, Any]] = [{}, {"cache_salt": "mine"}, {"cache_salt": "yours"}]
    for salt in salts:
        pair.move(tokens, **salt).check(expect, len(tokens))
    # The decode engine's blocks have 64 tokens. A later request can use a block only if a token follows the block.
    for salt in salts:
        pair.move(tokens, **salt).check(expect, len(tokens), cached=len(tokens) // 64 * 64)


def test_kv_of_another_salt_is_refused(pair: Pair, reference: Reference) -> None:
    """The two legs have different salts, as if one side had forgotten the salt: the receiver refuses the keys, and the
    decode engine computes the prompt.
    """
    tokens = prompt(600, seed=62)
    for number, (pushed, loaded) in enumerate([({"cache_salt": "mine"}, {}), ({}, {"cache_salt": "mine"})]):
        req = f"salt-{number}"
        before = pair.decode.prompt_tokens()
        legs = pair.legs(req, body(tokens, **pushed), body(tokens, **loaded))
        assert token_ids(legs) == [reference.token_ids(tokens, max_tokens=16)]
        assert pair.prompt_tokens_since(before, len(tokens)).computed == len(tokens)
        assert pair.receiver.record(req)["reason"] == "key_mismatch"


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
    """If the engine refuses a request, the client gets the engine's status and message."""
    for wrong in ({"max_tokens": -1}, {"model": "nobody"}, {"prompt": prompt(3000, seed=57)}):
        with pytest.raises(HttpError) as refused:
            post_json(f"{pair.proxy.url}/v1/completions", {**body(prompt(10, seed=58)), **wrong})
        assert 400 <= refused.value.status < 500
        assert "error" in refused.value.body
