"""Checks that for KV that cannot be moved the proxy sends no prefill leg, and that the parts report the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness.client import complete, post_json
from harness.engine import Engine, EngineOptions
from harness.model import LAYERS, write_gemma, write_llava
from harness.pair import Pair, PairOptions, pair_of
from harness.progress import Progress
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import ROOT

TOKENS = 24


@pytest.fixture
def gemmas(logs: Path) -> Iterator[Pair]:
    """Starts a prefill and a decode engine whose KV has several groups, with more ranks than workers."""
    options = PairOptions(
        write_gemma(ROOT / "target" / "model-gemma"),
        logs,
        forked=True,
        prefix="gemma-",
        ranks=2,
        more=("--kv-cache-memory-bytes", str(256 << 20)),
    )
    with pair_of(options, Progress()) as pair:
        yield pair


@pytest.mark.own_engines
def test_kv_that_the_connector_cannot_read(gemmas: Pair) -> None:
    tokens = prompt(700, seed=910)
    expect = complete(gemmas.prefill.url, tokens, max_tokens=TOKENS).token_ids
    before = gemmas.prefill.prompt_tokens()
    for _ in range(2):
        answer = gemmas.complete(tokens, max_tokens=TOKENS)
        assert answer.token_ids == expect
        record = gemmas.proxy.record(answer.headers["x-request-id"])
        assert (record["alone"], record["outcome"]) == ("unfit", "done"), record
    assert gemmas.prefill.prompt_tokens() == before, "a prefill leg was sent for nothing"

    for sidecar in (gemmas.sender, gemmas.receiver):
        status = sidecar.status()
        assert status["ready"] and "groups of layers" in status["unmoved"], status
    for instance in gemmas.proxy.instances():
        assert "groups of layers" in instance["unmoved"], instance
        assert "moves no KV" in instance["unfit"][0]["why"], instance
    said = [line for line in _log(gemmas) if "moves no KV: the decode instance computes each prompt itself" in line]
    assert len(said) == 2, said

    # A proxy of another project may send a prefill leg anyway. Even the answer to the first prefill leg says that no KV
    # is pushed.
    spec = {"req_id": "r", "receiver_host": "127.0.0.1", "receiver_init_port": [1], "receiver_alloc_port": [1]}
    params = {"do_remote_decode": True, "disagg_spec": spec}
    body = {"prompt": tokens, "max_tokens": 1, "kv_transfer_params": params}
    told = post_json(f"{gemmas.prefill.url}/v1/completions", body)["kv_transfer_params"]
    assert told == {"pushed": False, "reason": "layout"}


@pytest.fixture
def deeper(pair: Pair) -> Iterator[Engine]:
    """Replaces the pair's decode engine by an engine with one more layer, as if only one side had a draft model."""

    def change(options: EngineOptions) -> EngineOptions:
        assert options.kv_transfer is not None
        # Give the model the same name, so that only the number of layers differs.
        options.kv_transfer["kv_connector_extra_config"]["model_name"] = str(pair.options.model)
        return replace(options, model=write_llava(ROOT / "target" / f"model-llava-{LAYERS + 1}", layers=LAYERS + 1))

    # The session's decode engine keeps running. The proxy does not know that engine while the engine's
    # sidecar is stopped.
    pair.receiver.stop()
    try:
        with pair.another_decoder(change, lambda e: _instance(pair, "decode")["http"].startswith(e.url)) as (engine, _):
            yield engine
    finally:
        pair.restore()


def test_a_pair_of_four_and_five_layers(pair: Pair, reference: Reference, deeper: Engine) -> None:
    before, deep = pair.prefill.prompt_tokens(), deeper.prompt_tokens()
    for seed in (920, 921):
        tokens = prompt(500, seed=seed)
        answer = pair.complete(tokens, max_tokens=TOKENS)
        assert answer.token_ids == reference.token_ids(tokens, max_tokens=TOKENS)
        record = pair.proxy.record(answer.headers["x-request-id"])
        assert (record["alone"], record["outcome"]) == ("unfit", "done"), record
    assert pair.prefill.prompt_tokens() == before, "every prompt is computed on both sides"
    assert pair.prompt_tokens_since(deep, 1000, engine=deeper).computed == 1000
    why = _instance(pair, "decode")["unfit"][0]["why"]
    assert why.startswith(f"layers is {LAYERS} on the prefill side and {LAYERS + 1} on the decode side"), why
    said = [line for line in _log(pair) if "not a pair" in line and "layers is" in line]
    assert len(said) == 1, said


def _instance(pair: Pair, role: str) -> dict[str, Any]:
    there = [i for i in pair.proxy.instances() if i["role"] == role and i["standing"]["state"] == "ready"]
    return there[0] if len(there) == 1 else {"http": ""}


def _log(pair: Pair) -> list[str]:
    return (pair.options.logs / "proxy.log").read_text(errors="replace").splitlines()
