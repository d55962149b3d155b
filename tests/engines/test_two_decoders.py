"""Tests one prefill instance with two decode instances."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from harness.client import HttpError, call, complete
from harness.engine import Engine, EngineOptions
from harness.model import KV_BYTES_PER_TOKEN
from harness.pair import Pair, check_tokens
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import Sidecar
from harness.traffic import Traffic

BOUND_S = 60.0
SOME = 6


# The last test kills this engine, so that it starts only once for all tests.
@pytest.fixture(scope="module")
def second(engines: tuple[Pair, Reference]) -> Iterator[tuple[Engine, Sidecar]]:
    pair, _ = engines
    pair.restore()

    def change(options: EngineOptions) -> EngineOptions:
        # The API server stays alive after its core has died, and the proxy must handle the server's errors.
        env = {**options.env, "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1"}
        return replace(options, env=env, more=(*options.more, "--no-enable-prefix-caching"))

    with pair.another_decoder(change, lambda _: len(decoders(pair)) == 2) as started:
        yield started


def wait_for_decoders(pair: Pair, count: int, bound_s: float = BOUND_S) -> None:
    deadline = time.monotonic() + bound_s
    while len(ready := decoders(pair)) != count:
        assert time.monotonic() < deadline, ready
        time.sleep(0.05)


def wait_for_request(engine: Engine, bound_s: float = BOUND_S) -> None:
    deadline = time.monotonic() + bound_s
    while engine.requests() == 0:
        assert time.monotonic() < deadline, "it gets no requests"


def decoders(pair: Pair) -> list[dict[str, Any]]:
    """Returns the decode instances to which the proxy sends requests."""
    return [i for i in pair.proxy.instances() if (i["role"], i["standing"]["state"]) == ("decode", "ready")]


def test_sequences_without_a_prefix_cache(pair: Pair, reference: Reference, second: tuple[Engine, Sidecar]) -> None:
    """Without a prefix cache, each sequence has its own blocks. The KV is moved once, and copied into these blocks."""
    engine, sidecar = second
    for length in (1, 64, 600):
        tokens = prompt(length, seed=420)
        request = {"prompt": tokens, "max_tokens": 16, "temperature": 1.0, "seed": 5, "n": 3, "ignore_eos": True}
        request["return_token_ids"] = True
        before = engine.prompt_tokens()
        req = f"sequences-{length}"
        # Like the proxy, send no seed in the prefill leg. A seed crashes vLLM's CPU engine on a prompt of several
        # steps.
        answer = pair.legs(req, {"prompt": tokens, "temperature": 0}, request, decoder=second)
        expect = reference.post("/v1/completions", request)
        assert [c["token_ids"] for c in answer["choices"]] == [c["token_ids"] for c in expect["choices"]]
        check_tokens(pair.prompt_tokens_since(before, 3 * length, engine=engine), 3 * length, requests=3)
        assert sidecar.record(req)["bytes"] == length * KV_BYTES_PER_TOKEN
        assert engine.metrics().sum("vllm:pd_sidecar_copied_tokens") > 0
    deadline = time.monotonic() + BOUND_S
    while (engine.requests(), engine.cache_usage()) != (0, 0.0):
        assert time.monotonic() < deadline, "blocks are held"
    sidecar.wait_empty()


def test_both_decode_and_the_core_of_one_dies(pair: Pair, reference: Reference, second: tuple[Engine, Sidecar]) -> None:
    used = set()
    for number in range(4):
        tokens = prompt(300 + 256 * number, seed=410 + number)
        answer = pair.complete(tokens)
        assert answer.token_ids == reference.token_ids(tokens)
        record = pair.proxy.record(answer.headers["x-request-id"])
        assert (record["alone"], record["outcome"]) == (None, "done"), record
        used.add(record["decode"])
    assert len(used) == 2, used
    engine, _ = second
    assert engine.prompt_tokens().external > 0, "the second one computed what was pushed to it"

    # Ask for one token, so that no answer breaks off in the middle: an answer that has begun is complete.
    with Traffic(pair, clients=3, seed=42, bound_s=BOUND_S, max_tokens=1) as traffic:
        traffic.wait_for(SOME)
        wait_for_request(engine)
        engine.kill_core()
        traffic.wait_for(2 * SOME)
        wait_for_decoders(pair, 1)
        traffic.wait_for(SOME)
    assert engine.running, "its API server has ended too"
    assert call(f"{engine.url}/health")[0] == 503
    with pytest.raises(HttpError, match=r"500|EngineCore|EngineDead"):
        complete(engine.url, [2, 3, 4], max_tokens=1)
    assert [result.error for result in traffic.results if result.error] == []
    for result in traffic.results:
        assert result.answer is not None
        assert result.answer.token_ids == reference.token_ids(result.prompt, max_tokens=1)
    records = pair.proxy.records()[-len(traffic.results) :]
    assert {record["outcome"] for record in records} == {"done"}, records
    assert "decode_retry" in {record["alone"] for record in records}, "no request was on the engine that died"
