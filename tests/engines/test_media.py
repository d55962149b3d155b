"""Tests requests with images. Equal tokens stand for different images, so the tags of the keys tell them apart."""

from __future__ import annotations

from typing import Any

import pytest
from harness.client import HttpError, post_json
from harness.model import IMAGE_TOKENS, KV_BYTES_PER_TOKEN
from harness.pair import Pair, check_tokens
from harness.prompts import chat, image
from harness.reference import Reference

# The decode engine's blocks have 64 tokens.
BLOCK = 64


def ids(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


def move(pair: Pair, reference: Reference, request: dict[str, Any], *, cached: int = 0) -> list[list[int]]:
    """Sends a chat through the proxy, and returns its tokens. Checks that they are right and that the KV was moved."""
    plain = reference.post("/v1/chat/completions", request)
    tokens = plain["usage"]["prompt_tokens"]
    before = pair.decode.prompt_tokens()
    with pair.proxy.recorded() as records:
        ours = post_json(f"{pair.proxy.url}/v1/chat/completions", request)
    assert ids(ours) == ids(plain)
    (routed,) = records
    assert routed["alone"] is None, routed
    check_tokens(pair.prompt_tokens_since(before, tokens), tokens, cached=cached)
    for sidecar in (pair.sender, pair.receiver):
        record = sidecar.record(routed["id"])
        assert (record["reason"], record["bytes"]) == (None, (tokens - cached) * KV_BYTES_PER_TOKEN), record
    return ids(ours)


TEXT = "Describe what you see. " * 20


def test_images_are_moved_and_shared_with_no_other_image(pair: Pair, reference: Reference) -> None:
    requests = [chat(image(seed), TEXT) for seed in (1, 2)]
    first, second = (move(pair, reference, request) for request in requests)
    assert first != second, "the text does not depend on the image, and proves nothing"
    for request, expect in zip(requests, (first, second), strict=True):
        tokens = reference.post("/v1/chat/completions", request)["usage"]["prompt_tokens"]
        assert tokens > IMAGE_TOKENS
        assert move(pair, reference, request, cached=(tokens - 1) // BLOCK * BLOCK) == expect


def test_several_images_at_any_place(pair: Pair, reference: Reference) -> None:
    one, two, three = (image(seed) for seed in (3, 4, 5))
    # No request begins with the same image as another, so no prompt is in the decode engine's cache.
    requests = [chat(TEXT, one, "and", two), chat(three, TEXT, two, "and", one, TEXT), chat(two, one)]
    answers = {str(move(pair, reference, request)) for request in requests}
    assert len(answers) == len(requests)


def test_images_of_an_adapter(pair: Pair, reference: Reference) -> None:
    request = chat(image(5), TEXT)
    base = move(pair, reference, request)
    for seed in range(200):
        # The digest of the adapter's files is computed after its first request.
        with pair.proxy.recorded() as records:
            pair.complete([seed + 10] * 100, model="lora", max_tokens=1)
        if records[0]["alone"] is None:
            break
    assert move(pair, reference, {**request, "model": "lora"}) != base


def test_kv_of_another_image_is_refused(pair: Pair, reference: Reference) -> None:
    """The two legs have different images of one size: the receiver refuses the keys, and the decode engine computes
    the prompt.
    """
    pushed, loaded = chat(image(6), TEXT), chat(image(7), TEXT)
    plain = reference.post("/v1/chat/completions", loaded)
    before = pair.decode.prompt_tokens()
    answer = pair.legs("other-image", pushed, loaded, path="/v1/chat/completions")
    assert ids(answer) == ids(plain)
    tokens = plain["usage"]["prompt_tokens"]
    assert pair.prompt_tokens_since(before, tokens).computed == tokens
    assert pair.receiver.record("other-image")["reason"] == "key_mismatch"


def test_an_image_that_the_client_only_names_is_computed_alone(pair: Pair, reference: Reference) -> None:
    named = {**image(8), "uuid": "mine"}
    request = chat(named, TEXT)
    with pair.proxy.recorded() as records:
        ours = post_json(f"{pair.proxy.url}/v1/chat/completions", request)
    assert ids(ours) == ids(reference.post("/v1/chat/completions", request))
    assert records[0]["alone"] == "multimodal"


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "nothing"])
def test_bad_images_keep_their_status(pair: Pair, reference: Reference, url: str) -> None:
    request = chat({"type": "image_url", "image_url": {"url": url}}, TEXT)
    with pytest.raises(HttpError) as plain:
        reference.post("/v1/chat/completions", request)
    with pytest.raises(HttpError) as ours:
        post_json(f"{pair.proxy.url}/v1/chat/completions", request)
    assert (ours.value.status, ours.value.body) == (plain.value.status, plain.value.body)
