"""Moves the KV of prompts of many lengths over each transport: one by one, together, and with a part in the decode
side's cache.

The prefill engine has blocks of 32 tokens and computes 256 tokens per step; the decode engine has blocks of 64 tokens.
So the boundaries differ on the two sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.model import KV_BYTES_PER_TOKEN
from harness.pair import Pair, check_tokens
from harness.prompts import LENGTHS, prompt
from harness.reference import Reference

TRANSPORTS = ("nixl", "tcp")


@pytest.fixture(scope="module", params=TRANSPORTS)
def forced(request: pytest.FixtureRequest, engines: tuple[Pair, Reference]) -> Iterator[Pair]:
    """Yields the pair with one transport forced. Only the sidecars are restarted for this."""
    pair, _ = engines
    pair.restart_sidecars(transport=request.param)
    yield pair
    wires = {record["transport"].split(":")[0] for record in pair.sender.records() if record["bytes"]}
    assert wires == {request.param}


@pytest.fixture
def wired(forced: Pair) -> Iterator[Pair]:
    """Yields the same pair with empty caches. Checks afterwards that no part holds KV."""
    forced.reset_prefix_caches()
    yield forced
    forced.wait_empty()


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(wired: Pair, reference: Reference, length: int) -> None:
    tokens = prompt(length, seed=1)
    wired.move(tokens).check(reference.token_ids(tokens), length)


def test_eight_at_once(wired: Pair, reference: Reference) -> None:
    prompts = [prompt(length, seed=2) for length in LENGTHS]
    expect = [reference.token_ids(tokens) for tokens in prompts]
    total = sum(LENGTHS)
    before = wired.decode.prompt_tokens()
    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = list(pool.map(wired.complete, prompts))
    assert [answer.token_ids for answer in answers] == expect
    check_tokens(wired.prompt_tokens_since(before, total), total, requests=len(prompts))
    records = [wired.sender.record(answer.headers["x-request-id"]) for answer in answers]
    assert sum(record["bytes"] for record in records) == total * KV_BYTES_PER_TOKEN


# The decode side holds whole blocks of 64 tokens. Except for 256, no length here is a multiple of a chunk.
@pytest.mark.parametrize(("shared", "held"), [(70, 64), (300, 256), (700, 640), (1000, 960)])
def test_prefix_on_the_decode_side(wired: Pair, reference: Reference, shared: int, held: int) -> None:
    first = prompt(shared, seed=3)
    wired.move(first).check(reference.token_ids(first), shared)
    second = first + prompt(1100 - shared, seed=4)
    wired.move(second).check(reference.token_ids(second), len(second), cached=held)


def test_prefix_on_the_prefill_side(wired: Pair, reference: Reference) -> None:
    """Checks that KV from the prefill engine's prefix cache is pushed like computed KV."""
    first = prompt(500, seed=5)
    wired.move(first).check(reference.token_ids(first), len(first))
    wired.decode.reset_prefix_cache()
    second = first + prompt(300, seed=6)
    before = wired.prefill.prompt_tokens()
    wired.move(second).check(reference.token_ids(second), len(second))
    counted = wired.prompt_tokens_since(before, len(second), engine=wired.prefill)
    assert counted.cached == 480  # 500 tokens contain 480 in whole blocks of 32


def test_long_answer_is_cached_with_its_prompt(wired: Pair, reference: Reference) -> None:
    """Sends a second prompt: the first prompt, its answer and new tokens. Only the KV of the new tokens is pushed."""
    tokens = prompt(200, seed=7)
    answer = wired.move(tokens, max_tokens=100)
    answer.check(reference.token_ids(tokens, max_tokens=100), len(tokens))
    follow_up = tokens + answer.answer.token_ids + prompt(50, seed=8)
    wired.move(follow_up).check(reference.token_ids(follow_up), len(follow_up), cached=256)
