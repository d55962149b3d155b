"""Tests tensor-parallel engines: each rank has its own transfer, even if the two sides have different numbers of
workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.client import complete, post_json
from harness.model import KV_BYTES_PER_TOKEN, write_model
from harness.pair import Moved, Pair, PairOptions, check_tokens, pair_of
from harness.progress import Progress
from harness.prompts import prompt
from harness.routers import prefill_leg
from harness.sidecar import ROOT

pytestmark = pytest.mark.own_engines

RANKS = 2
RANK_BYTES_PER_TOKEN = KV_BYTES_PER_TOKEN // RANKS

# Number of tokens in an answer.
TOKENS = 16

# Prompts with a part of a chunk, with more than one chunk, and with several steps of chunked prefill.
LENGTHS = (1, 300, 1100)


@pytest.fixture(scope="module")
def started(logs: Path) -> Iterator[Pair]:
    options = PairOptions(
        write_model(ROOT / "target" / "model"), logs, prefill_workers=2, decode_workers=1, ranks=RANKS,
        forked=True, prefix="ranks-",
        # Each worker gets a quarter of the KV memory that an engine of the session's pair has.
        more=("--kv-cache-memory-bytes", str(256 << 20)),
        sidecar_keys={
            # The receiver compares the checksum of every chunk with the checksum that the sender computed.
            "checksum": True,
            # The eight processes of two engines may share two cores, so sidecars run late. Longer limits prevent a
            # timeout.
            "park_ms": 3000, "heartbeat_ms": 5000, "register_ms": 5000, "no_sender_ms": 20_000,
            # For routers that name no receiver.
            "fetch_port": 0,
        },
    )  # fmt: skip
    with pair_of(options, Progress()) as pair:
        yield pair


# Numbers of workers of prefill and decode. The order of the sizes is such that only one engine restarts between two
# entries. Workers of vLLM's CPU build use a whole core while they wait for each other. If they use all cores, sidecars
# do not run for seconds.
CORES = os.cpu_count() or 1
SIZES = [
    pytest.param(size, id=name, marks=pytest.mark.skipif(cores > CORES, reason=f"needs {cores} cores"))
    for size, cores, name in (((2, 1), 2, "2 to 1"), ((2, 2), 6, "2 to 2"), ((1, 2), 6, "1 to 2"))
]


@pytest.fixture(scope="module", params=SIZES)
def sized(request: pytest.FixtureRequest, started: Pair) -> Pair:
    started.restart_engines(*request.param)
    return started


@pytest.fixture
def pair(sized: Pair) -> Iterator[Pair]:
    sized.reset_prefix_caches()
    yield sized
    sized.wait_empty()


def alone(pair: Pair, tokens: list[int]) -> list[int]:
    """Returns the answer of the decode engine when it computes the whole prompt itself, as a plain instance of the same
    size would.
    """
    pair.decode.reset_prefix_cache()
    before = pair.decode.prompt_tokens()
    answer = complete(pair.decode.url, tokens, max_tokens=TOKENS)
    spent = pair.prompt_tokens_since(before, len(tokens))
    assert (spent.computed, spent.external) == (len(tokens), 0), spent
    pair.decode.reset_prefix_cache()
    return answer.token_ids


def check_ranks(pair: Pair, request_id: str, tokens: int, held: int = 0) -> None:
    """Asserts that every rank moved its half of the KV, and that nothing was left out."""
    for sidecar in (pair.sender, pair.receiver):
        for rank, record in enumerate(sidecar.record_of_each_rank(request_id)):
            assert record["reason"] is None, record
            assert record["have_tokens"] == held, record
            assert record["bytes"] == (tokens - held) * RANK_BYTES_PER_TOKEN, (rank, record)
    links = pair.sender.status()["links"]
    assert [link["rank"] for link in links] == list(range(RANKS)), links
    assert len({link["peer"] for link in links}) == RANKS, links


def move(pair: Pair, tokens: list[int], *, cached: int = 0) -> Moved:
    """Moves one request while no other request runs, and checks that the decode side computes only the last token."""
    moved = pair.move(tokens, max_tokens=TOKENS)
    check_tokens(moved.tokens, len(tokens), cached=cached)
    check_ranks(pair, moved.request_id, len(tokens), cached)
    return moved


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(pair: Pair, length: int) -> None:
    tokens = prompt(length, seed=80)
    expect = alone(pair, tokens)
    assert move(pair, tokens).answer.token_ids == expect


def test_several_at_once(pair: Pair) -> None:
    prompts = [prompt(length, seed=81) for length in (40, 300, 777, 1500)]
    expect = [alone(pair, tokens) for tokens in prompts]
    total = sum(map(len, prompts))
    before = pair.decode.prompt_tokens()
    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        answers = list(pool.map(lambda tokens: pair.complete(tokens, max_tokens=TOKENS), prompts))
    assert [answer.token_ids for answer in answers] == expect
    check_tokens(pair.prompt_tokens_since(before, total), total, requests=len(prompts))
    for tokens, answer in zip(prompts, answers, strict=True):
        check_ranks(pair, answer.headers["x-request-id"], len(tokens))


def test_prefix_on_the_decode_side(pair: Pair) -> None:
    first = prompt(700, seed=82)
    second = first + prompt(400, seed=83)
    expect = alone(pair, second)
    move(pair, first)
    # The common part has 700 tokens; 640 are in whole blocks of 64.
    assert move(pair, second, cached=640).answer.token_ids == expect


def test_a_router_that_names_no_receiver(pair: Pair) -> None:
    """Each rank of the decode side fetches its part of the KV from the same rank of the prefill side."""
    tokens = prompt(700, seed=86)
    expect = alone(pair, tokens)
    # The scheduler's half learns the ports of both ranks in a step.
    pair.prefill.warm_up()
    told = prefill_leg(pair.prefill, tokens)
    pd = told["pd"]
    assert isinstance(pd, dict)
    assert len(set(pd["fetch_ports"])) == RANKS, pd
    before = pair.decode.prompt_tokens()
    with pair.receiver.recorded() as records:
        answer = complete(pair.decode.url, tokens, max_tokens=TOKENS, request_id="no-receiver", kv_transfer_params=told)
    assert answer.token_ids == expect
    check_tokens(pair.prompt_tokens_since(before, len(tokens)), len(tokens))
    (name,) = {row["req"] for row in records if "no-receiver" in row["req"]}
    check_ranks(pair, name, len(tokens))
    # An idle engine frees the blocks of fetched KV with its next step.
    pair.prefill.warm_up()


def test_a_receiver_of_another_number_of_ranks_is_refused(pair: Pair) -> None:
    """The prefill engine reports the reason, and still computes its answer."""
    spec = {
        "req_id": "too-few-ports", "receiver_host": pair.receiver.host, "overlap": False,
        "receiver_init_port": pair.receiver.init_ports[:1], "receiver_alloc_port": pair.receiver.alloc_ports[:1],
    }  # fmt: skip
    params = {"do_remote_decode": True, "disagg_spec": spec}
    tokens = prompt(300, seed=85)
    body = {"prompt": tokens, "max_tokens": 1, "kv_transfer_params": params}
    answer = post_json(f"{pair.prefill.url}/v1/completions", body)
    assert answer["kv_transfer_params"] == {"pushed": False, "reason": "tp_mismatch"}
    assert pair.prefill.process is not None
    assert "takes KV in 1 ranks, but this engine divides it into 2" in pair.prefill.process.output()
